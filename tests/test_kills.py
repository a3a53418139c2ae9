"""kill -9 at system calls of a save, of a rotation, of a set-aside, of a lock: the same command goes on, to the same
bits, and no committed step is damaged.

strace kills the process as it enters a call. Which calls a run makes in its workdir is found out by a run that is not
killed; those that are tried are spread over them, in the order in which they are made.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import helpers
import pytest

from runtime.verify import verify

TRIED = {"new": 36, "damaged": 8}  # calls of a run from its beginning; of one whose newest step is damaged
SYSCALLS = "rename renameat renameat2 unlink unlinkat rmdir mkdir mkdirat fsync fdatasync openat".split()
OPTIONS = ["--config.steps=6", "--config.checkpoint.every=2", "--config.checkpoint.keep=2", "--config.sample.tokens=0"]
OPTIONS += ["--config.model.num_layers=1"]


def strace(log: Path, syscalls: Sequence[str], *options: str) -> list[str]:
    known = ",".join(f"?{name}" for name in syscalls)  # not every machine has all of them
    return ["strace", "-f", "-y", "-o", str(log), "-e", f"trace={known}", *options]


def why_not() -> str:
    if shutil.which("strace") is None:
        return "strace is not installed: apt-get install strace"
    tried = subprocess.run([*strace(Path("/dev/null"), SYSCALLS), "true"], capture_output=True, text=True)
    return f"strace may not trace here: {tried.stderr.strip()}" if tried.returncode else ""


WHY_NOT = why_not()
pytestmark = [pytest.mark.prove, pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)]


class Call(NamedTuple):
    """path: one that the call names, relative to the workdir."""

    syscall: str
    path: str


DRAWN = re.compile(r"[0-9a-f]{16}|\.\w+\.tmp$|tfevents")  # names that are others in every run


def calls(log: Path, workdir: Path) -> list[Call]:
    """Each kind of them in the workdir that may change something, in the order in which they are made first."""
    found: dict[Call, None] = {}
    for line in log.read_text().splitlines():
        match = re.match(r"\d+ +(\w+)\((.*)", line)
        if match is None or (match[1] == "openat" and not re.search("O_CREAT|O_WRONLY|O_RDWR", line)):
            continue
        paths = [path for path in re.findall(r'[<"](/[^">]*)[>"]', match[2]) if f"{path}/".startswith(f"{workdir}/")]
        inside = [str(Path(path).relative_to(workdir)) for path in paths[:1]]  # strace -P sees no second one
        found |= {Call(match[1], path): None for path in inside if not DRAWN.search(path)}
    return list(found)


def spread(made: list[Call], count: int) -> list[Call]:
    assert len(made) >= count
    return [made[i * (len(made) - 1) // (count - 1)] for i in range(count)]


class Scene(NamedTuple):
    """before: the workdir that the command finds, or None. calls: that are tried. digest: of the parameters that it
    ends with."""

    before: Path | None
    calls: list[Call]
    digest: str

    def begin(self, workdir: Path) -> Path:
        if self.before is not None:
            shutil.copytree(self.before, workdir)
        return workdir


def run(workdir: Path, prefix: list[str]) -> subprocess.CompletedProcess:
    command = [*prefix, *helpers.command(workdir, *OPTIONS, simulate=1)]
    return subprocess.run(command, cwd=helpers.ROOT, capture_output=True, text=True, timeout=500)


def digest(workdir: Path) -> str:
    return json.loads((workdir / "summary.json").read_text())["params_digest"]


def damage(workdir: Path) -> None:
    """Of the newest step."""
    largest = max((workdir / "checkpoints" / "6" / "state").rglob("*"), key=lambda p: p.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> dict[str, Scene]:
    folder = tmp_path_factory.mktemp("undisturbed")
    found, before = {}, None
    for name in ("new", "damaged"):
        workdir = Scene(before, [], "").begin(folder / name)
        done = run(workdir, strace(folder / f"{name}.log", SYSCALLS))
        assert done.returncode == 0, done.stdout + done.stderr
        made = calls(folder / f"{name}.log", workdir)
        if name == "damaged":  # its save is like the others'
            made = [call for call in made if "-tmp" not in call.path]
        found[name] = Scene(before, spread(made, TRIED[name]), digest(workdir))
        before = folder / "to be damaged"
        if name == "new":
            shutil.copytree(workdir, before)
            damage(before)
    assert Call("rename", "checkpoints/6") in found["damaged"].calls, "when it is set aside"
    assert found["new"].digest == found["damaged"].digest and (workdir / "checkpoints" / "6.damaged").is_dir()
    return found


@pytest.mark.parametrize(("name", "point"), [(name, point) for name, count in TRIED.items() for point in range(count)])
def test_a_kill_at_a_call_costs_nothing(tmp_path, scenes, name, point, record_property):
    scene = scenes[name]
    call = scene.calls[point]
    workdir = scene.begin(tmp_path / "run")
    kill = ["-P", str(workdir / call.path), "-e", f"inject={call.syscall}:signal=KILL:when=1"]
    killed = run(workdir, strace(tmp_path / "log", [call.syscall], *kill))
    assert killed.returncode == -9, f"{call}\n{killed.stdout}{killed.stderr}"
    record_property("kills at system calls", 1)
    known = [6] if name == "damaged" and not (workdir / "checkpoints" / "6.damaged").is_dir() else []
    left = [step for step, problems in verify(workdir) if problems]
    assert left == known, call
    done = run(workdir, [])
    assert done.returncode == 0, f"{call}\n{done.stdout}{done.stderr}"
    assert digest(workdir) == scene.digest, call
    steps = verify(workdir)
    assert steps[-1][0] == 6 and not any(problems for _, problems in steps), f"{call}: {steps}"

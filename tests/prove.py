"""Every test there is, in pieces, for hours if need be. Stopped anywhere, it goes on from the piece it was at.

python tests/prove.py                  what this commit has not passed yet, on this Python; then writes docs/proofs.md
python tests/prove.py --only TEXT      the pieces whose name contains TEXT, and writes nothing
python tests/prove.py --list           what there is, and how it went
python tests/prove.py --write          docs/proofs.md from what is there

A piece is a test file with all its cases, or one edit of tests/taken_out.py. Its result is
runs/prove/COMMIT/PYTHON/PIECE.json, and the report says of every piece how it went last, and at which commit. A working
tree with changes proves nothing about a commit: its results are kept apart, and each time made anew.
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import taken_out

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "runs" / "prove"
REPORT = ROOT / "docs" / "proofs.md"
CORES = 2
TAKEN_OUT = "taken out, "
# Oracles: of PowerSGD, models, weights, adapters.
TORCH = ("torch==2.13.0", "transformers==5.24.0", "gguf==0.19.0", "accelerate==1.*", "peft==0.21.2")
WITH_TORCH = ("powersgd", "weights", "chat", "lora", "smollm2")  # in the names of pieces
AZURITE = "azurite@3.35.0"  # newer ones need a newer Node.js than Debian and Ubuntu have
TRANSFORMERS4 = ("transformers==4.57.*", "huggingface-hub<1.0", "tokenizers>=0.22,<0.23.1")


class Piece(NamedTuple):
    """command: of a process that ends with 0 if all is well; {junit} in it is a file for pytest's results. cores: that
    it keeps busy."""

    name: str
    command: list[str]
    cores: int = CORES


def pieces() -> list[Piece]:
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "", "-n", f"{CORES}", "--dist", "worksteal"]
    pytest += ["--junitxml={junit}"]
    files = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").glob("test_*.py"))
    edits = [case.name for case in taken_out.CASES]
    return [
        *(Piece(file, [*pytest, file]) for file in files),
        *(Piece(f"{TAKEN_OUT}{name}", [sys.executable, "tests/taken_out.py", name], cores=1) for name in edits),
    ]


# ── where results are ────────────────────────────────────────────────────────────────────────────────────────────


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def commit() -> str:
    """The one that is checked out; with "-changed" if the working tree differs from it in more than the report."""
    changed = git("status", "--porcelain", "--", ".", f":!{REPORT.relative_to(ROOT)}")
    return git("rev-parse", "--short=10", "HEAD") + ("-changed" if changed else "")


def python() -> str:
    return ".".join(map(str, sys.version_info[:2]))


class Store:
    """The results of one commit on one Python."""

    def __init__(self, root: Path, commit: str, python: str):
        self.root, self.commit, self.python = root, commit, python

    def _path(self, piece: str) -> Path:
        return self.root / self.commit / self.python / f"{re.sub('[^A-Za-z0-9]+', '-', piece).strip('-')}.json"

    def get(self, piece: str) -> dict[str, Any] | None:
        path = self._path(piece)
        return _read(path) if path.exists() else None

    def put(self, result: dict[str, Any]) -> None:
        path = self._path(result["piece"])
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        new.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        new.replace(path)

    def last(self, piece: str) -> dict[str, Any] | None:
        """The newest result, at whatever commit; none of a working tree with changes."""
        every = self.root.glob(f"*/{self.python}/{self._path(piece).name}")
        found = [file for file in every if not file.parent.parent.name.endswith("-changed")]
        return max(map(_read, found), key=lambda result: result["date"], default=None)

    def is_proven(self, piece: str) -> bool:
        found = self.get(piece)
        return not self.commit.endswith("-changed") and found is not None and not found["failed"]

    def seconds_before(self, piece: str) -> float | None:
        """What the piece took when it ran last, of whatever commit."""
        name = self._path(piece).name
        found = sorted(self.root.glob(f"*/*/{name}"), key=lambda path: path.stat().st_mtime)
        return _read(found[-1])["seconds"] if found else None


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text())


# ── running ──────────────────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """What comes meanwhile is heard afterwards, of signals that are handled. Not by a mask: that is a thread's own, and
    another thread would take the signal."""
    came: list[int] = []
    handled = [n for n in signal.valid_signals() if callable(signal.getsignal(n))]
    before = {n: signal.signal(n, lambda number, _: came.append(number)) for n in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


class Running:
    """A piece under way. To be started where signals are unheard, until somebody knows of it."""

    def __init__(self, piece: Piece):
        self.piece, self.started = piece, time.time()
        self._folder = tempfile.TemporaryDirectory()
        self._junit, self._output = (Path(self._folder.name) / name for name in ("junit.xml", "output"))
        command = [part.format(junit=self._junit) if "{junit}" in part else part for part in piece.command]
        with self._output.open("w") as output:
            pipes = {"stdout": output, "stderr": subprocess.STDOUT}
            self.process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)

    def result(self, commit: str) -> dict[str, Any]:
        code, output = self.process.returncode, self._output.read_text(errors="replace")
        counted = read_junit(self._junit) if self._junit.exists() else {"passed": int(code == 0)}
        # pytest's 5: nothing was collected, because what the whole file needs is not installed
        if code not in (0, 5) and not counted.get("failed"):
            counted["failed"] = 1
        return {
            "piece": self.piece.name,
            **{"passed": 0, "failed": 0, "skipped": 0, "counted": {}, "skips": []},
            **counted,
            "seconds": round(time.time() - self.started, 1),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "commit": commit,
            "python": sys.version.split()[0],
            "jax": version_of("jax"),
            "output": "" if code == 0 else output[-20_000:],
        }

    def close(self) -> None:
        """Nothing is left of it, whether it has ended or not."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._folder.cleanup()


def results(todo: Iterable[Piece], commit: str) -> Iterator[dict[str, Any]]:
    """Of each piece as it ends. Side by side where one does not keep the machine busy. Stopped, it stops them."""
    waiting, running = list(todo), []
    try:
        while waiting or running:
            while waiting and sum(other.piece.cores for other in running) + waiting[0].cores <= CORES:
                with unheard():
                    running.append(Running(waiting.pop(0)))
            for ended in [other for other in running if other.process.poll() is not None]:
                yield ended.result(commit)
                ended.close()
                running.remove(ended)
            time.sleep(0.05)
    finally:
        for other in running:
            other.close()


def read_junit(path: Path) -> dict[str, Any]:
    """passed, failed, skipped; skips: why; counted: what tests have recorded (record_property), each name added up."""
    found: dict[str, Any] = {"passed": 0, "failed": 0, "skipped": 0}
    skips, counted = set(), {}
    for case in xml.parse(path).iter("testcase"):
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found[kind] += 1
        skips |= {child.get("message") for child in case.iter("skipped")}
        for item in case.iter("property"):
            counted[item.get("name")] = counted.get(item.get("name"), 0) + int(item.get("value"))
    return found | {"skips": sorted(filter(None, skips)), "counted": counted}


def version_of(package: str) -> str:
    from importlib.metadata import version

    return version(package)


def prove(wanted: list[Piece], store: Store) -> int:
    """How many pieces have failed."""
    todo = [piece for piece in wanted if not store.is_proven(piece.name)]
    print(f"{len(wanted)} pieces, {len(wanted) - len(todo)} proven already at {store.commit}", flush=True)
    known = {piece.name: store.seconds_before(piece.name) for piece in todo}
    usual = [seconds for seconds in known.values() if seconds is not None] or [60.0]
    expected = {name: sum(usual) / len(usual) if s is None else s for name, s in known.items()}
    left = {piece.name: expected[piece.name] * piece.cores / CORES for piece in todo}
    failures = 0
    for result in results(todo, store.commit):
        store.put(result)
        failures += bool(result["failed"])
        del left[result["piece"]]
        done, minutes = len(todo) - len(left), sum(left.values()) / 60
        print(f"[{done}/{len(todo)}] {tell(result)}; about {minutes:.0f} min left", flush=True)
        if result["failed"]:
            print(result["output"][-3000:], flush=True)
    return failures


def tell(result: dict[str, Any]) -> str:
    found = ", ".join(f"{result[kind]} {kind}" for kind in ("passed", "failed", "skipped") if result[kind])
    counted = "".join(f", {number:,} {name}" for name, number in result["counted"].items())
    return f"{result['piece']}: {found or 'nothing to run'}{counted} in {result['seconds']:.0f} s"


def find_torch() -> None:
    """PyTorch in an environment of its own, for tests that ask for it by SLACKLINE_TORCH_PYTHON."""
    if os.environ.get("SLACKLINE_TORCH_PYTHON"):
        return
    python = ROOT / ".venv-torch" / "bin" / "python"
    there = [python, "-c", "import torch, transformers, peft"]
    if not python.exists() or subprocess.run(there, capture_output=True).returncode:
        print(f"installing {' and '.join(TORCH)} into .venv-torch", flush=True)
        subprocess.run([sys.executable, "-m", "venv", python.parent.parent], check=True)
        if subprocess.run([python, "-m", "pip", "install", "--quiet", *TORCH, "numpy"]).returncode:
            print("PyTorch cannot be installed here: what is compared with it is skipped", flush=True)
            return
    os.environ["SLACKLINE_TORCH_PYTHON"] = str(python)
    folder = python.parent.parent / "transformers4"  # beside transformers 5, for those who have not changed yet
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", folder, *TRANSFORMERS4]
    if folder.exists() or not subprocess.run(install).returncode:
        os.environ["SLACKLINE_TRANSFORMERS4"] = str(folder)


def find_azurite() -> None:
    """Azurite in a folder of its own, for tests that ask for it by SLACKLINE_AZURITE."""
    if os.environ.get("SLACKLINE_AZURITE"):
        return
    folder, npm = ROOT / ".venv-azurite", shutil.which("npm")
    if not (folder / "node_modules" / ".bin" / "azurite-blob").exists():
        print(f"installing {AZURITE} into {folder.name}", flush=True)
        if not npm or subprocess.run([npm, "install", "--silent", "--prefix", folder, AZURITE]).returncode:
            print("Azurite cannot be installed here (with npm, of Node.js): what asks it is skipped", flush=True)
            return
    os.environ["SLACKLINE_AZURITE"] = str(folder)


# ── telling ──────────────────────────────────────────────────────────────────────────────────────────────────────

HEAD = """# What was proven, and when

Written by `make prove`, which runs every case of every test file, and makes every edit of `tests/taken_out.py` to see
that a test notices. `make test` runs the part of it that fits into minutes, and `.ci/run` a sample of the rest.
"""


def report(names: Iterable[str], stores: list[Store]) -> str:
    """The page: for each Python a table of its pieces, each as it went last, then what is missing."""
    names, parts = list(names), [HEAD]
    for store in stores:
        found = [result for name in names if (result := store.last(name))]
        if not found:
            continue
        total = {kind: sum(result[kind] for result in found) for kind in ("passed", "failed", "skipped")}
        commits = sorted({result["commit"] for result in found}, key=[result["commit"] for result in found].count)
        parts += [
            f"## Python {found[-1]['python']}, JAX {found[-1]['jax']}\n",
            f"{len(found)} of {len(names)} pieces, {total['passed']:,} passed, {total['failed']:,} failed, "
            f"{total['skipped']:,} skipped, {sum(result['seconds'] for result in found) / 3600:.1f} hours, at commit "
            f"{' and '.join(reversed(commits))}.\n",
            "| piece | passed | failed | skipped | counted | seconds | commit | date |",
            "|---|---|---|---|---|---|---|---|",
            *(row(result) for result in together(found)),
            "",
        ]
        skips = sorted({reason for result in found for reason in result["skips"]})
        if skips:
            parts += ["Skipped, because:\n", *(f"- {' '.join(reason.split())}" for reason in skips), ""]
        missing = [name for name in names if not store.last(name)]
        edits = sum(name.startswith(TAKEN_OUT) for name in missing)
        missing = [name for name in missing if not name.startswith(TAKEN_OUT)] + [f"{edits} edits"] * bool(edits)
        parts += ["Missing:\n", *(f"- {name}" for name in missing), ""] if missing else []
    return "\n".join(parts if len(parts) > 1 else [HEAD, "Nothing has been run.\n"])


def together(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The edits of one commit that a test notices are one row."""
    noticed: dict[str, list[dict[str, Any]]] = {}
    for result in found:
        if result["piece"].startswith(TAKEN_OUT) and not result["failed"]:
            noticed.setdefault(result["commit"], []).append(result)
    rows = [result for result in found if not any(result in group for group in noticed.values())]
    for group in noticed.values():
        last = max(group, key=lambda result: result["date"])
        total = {key: sum(result[key] for result in group) for key in ("passed", "skipped", "seconds")}
        rows.append(last | total | {"piece": f"{len(group)} edits taken out, and noticed"})
    return rows


def row(result: dict[str, Any]) -> str:
    counted = ", ".join(f"{number:,} {name}" for name, number in result["counted"].items())
    cells = (result[key] for key in ("piece", "passed", "failed", "skipped"))
    return (
        "| "
        + " | ".join(map(str, (*cells, counted, round(result["seconds"]), result["commit"], result["date"])))
        + " |"
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only", default="", metavar="TEXT")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args(argv)
    every, at = pieces(), commit()
    wanted = [piece for piece in every if options.only in piece.name]
    store = Store(RESULTS, at, python())
    if options.list:
        for piece in wanted:
            result = store.get(piece.name)
            print(tell(result) if result else f"{piece.name}: not run at {at}")
        return 0
    failures = 0
    if not options.write:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        if any(word in piece.name for piece in wanted for word in WITH_TORCH):
            find_torch()
        if any("islands_stores" in piece.name for piece in wanted):
            find_azurite()
        try:
            failures = prove(wanted, store)
        except KeyboardInterrupt:
            print("stopped; the same command goes on with the piece that was under way", flush=True)
            return 130
    if options.only and not options.write:
        return int(failures > 0)
    pythons = sorted({path.name for path in RESULTS.glob("*/*")})
    REPORT.write_text(report([piece.name for piece in every], [Store(RESULTS, at, name) for name in pythons]))
    print(f"{f'{failures} pieces failed; ' if failures else ''}{REPORT.relative_to(ROOT)} is written")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

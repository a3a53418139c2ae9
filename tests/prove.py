"""Every test there is, in pieces, for hours if need be. Stopped anywhere, it goes on from the piece it was at.

python tests/prove.py                  what this commit has not passed yet, on this Python; then writes docs/proofs.md
python tests/prove.py --only TEXT      the pieces whose name contains TEXT, and writes nothing
python tests/prove.py --list           what there is, and how it went
python tests/prove.py --write          docs/proofs.md from what is there

A piece is a test file with all its cases, or one edit of tests/taken_out.py. Its result is
runs/prove/COMMIT/PYTHON/PIECE.json. A working tree with changes proves nothing about a commit: its results are kept
apart, and each time made anew.
"""

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import taken_out

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "runs" / "prove"
REPORT = ROOT / "docs" / "proofs.md"
TORCH = "torch==2.13.0"  # its hook is the oracle of PowerSGD


class Piece(NamedTuple):
    """command: of a process that ends with 0 if all is well; {junit} in it is a file for pytest's results."""

    name: str
    command: list[str]


def pieces() -> list[Piece]:
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "", "-n", "2", "--dist", "worksteal", "--junitxml={junit}"]
    files = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").glob("test_*.py"))
    edits = [case.name for case in taken_out.CASES]
    return [
        *(Piece(file, [*pytest, file]) for file in files),
        *(Piece(f"taken out, {name}", [sys.executable, "tests/taken_out.py", name]) for name in edits),
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
        return json.loads(path.read_text()) if path.exists() else None

    def put(self, result: dict[str, Any]) -> None:
        path = self._path(result["piece"])
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        new.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
        new.replace(path)

    def is_proven(self, piece: str) -> bool:
        found = self.get(piece)
        return not self.commit.endswith("-changed") and found is not None and not found["failed"]

    def seconds_before(self, piece: str) -> float | None:
        """What the piece took when it ran last, of whatever commit."""
        name = self._path(piece).name
        found = sorted(self.root.glob(f"*/*/{name}"), key=lambda path: path.stat().st_mtime)
        return json.loads(found[-1].read_text())["seconds"] if found else None


# ── running ──────────────────────────────────────────────────────────────────────────────────────────────────────


def run(piece: Piece, commit: str) -> dict[str, Any]:
    """Its result. Stopped, it stops what it has started, and there is none."""
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        junit = Path(folder) / "junit.xml"
        command = [part.format(junit=junit) if "{junit}" in part else part for part in piece.command]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes)
        try:
            output, _ = process.communicate()
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        counted = read_junit(junit) if junit.exists() else {"passed": int(process.returncode == 0)}
    # pytest's 5: nothing was collected, because what the whole file needs is not installed
    if process.returncode not in (0, 5) and not counted.get("failed"):
        counted["failed"] = 1
    return {
        "piece": piece.name,
        **{"passed": 0, "failed": 0, "skipped": 0, "counted": {}, "skips": []},
        **counted,
        "seconds": round(time.time() - started, 1),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit,
        "python": sys.version.split()[0],
        "jax": version_of("jax"),
        "output": "" if process.returncode == 0 else output[-20_000:],
    }


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
    failures = 0
    for i, piece in enumerate(todo):
        result = run(piece, store.commit)
        store.put(result)
        failures += bool(result["failed"])
        left = sum(expected[later.name] for later in todo[i + 1 :])
        print(f"[{i + 1}/{len(todo)}] {tell(result)}; about {left / 60:.0f} min left", flush=True)
        if result["failed"]:
            print(result["output"][-3000:], flush=True)
    return failures


def tell(result: dict[str, Any]) -> str:
    found = ", ".join(f"{result[kind]} {kind}" for kind in ("passed", "failed", "skipped") if result[kind])
    counted = "".join(f", {number:,} {name}" for name, number in result["counted"].items())
    return f"{result['piece']}: {found or 'nothing to run'}{counted} in {result['seconds']:.0f} s"


def find_torch() -> None:
    """PyTorch in an environment of its own, for the test that asks for it by SLACKLINE_TORCH_PYTHON."""
    if os.environ.get("SLACKLINE_TORCH_PYTHON"):
        return
    python = ROOT / ".venv-torch" / "bin" / "python"
    if not python.exists() or subprocess.run([python, "-c", "import torch, numpy"], capture_output=True).returncode:
        print(f"installing {TORCH} into .venv-torch", flush=True)
        subprocess.run([sys.executable, "-m", "venv", python.parent.parent], check=True)
        if subprocess.run([python, "-m", "pip", "install", "--quiet", TORCH, "numpy"]).returncode:
            print("PyTorch cannot be installed here: the comparison with its PowerSGD hook is skipped", flush=True)
            return
    os.environ["SLACKLINE_TORCH_PYTHON"] = str(python)


# ── telling ──────────────────────────────────────────────────────────────────────────────────────────────────────

HEAD = """# What was proven, and when

Written by `make prove`, which runs every case of every test file, and makes every edit of `tests/taken_out.py` to see
that a test notices. `make test` runs the part of it that fits into minutes, and `.ci/run` a sample of the rest.
"""


def report(commit: str, names: Iterable[str], stores: list[Store]) -> str:
    """The page: for each Python a table of its pieces, then what is missing."""
    names, parts = list(names), [HEAD]
    if not any(store.get(name) for store in stores for name in names):
        parts += [f"Nothing has been run at commit {commit}.\n"]
    for store in stores:
        found = [result for name in names if (result := store.get(name))]
        if not found:
            continue
        total = {kind: sum(result[kind] for result in found) for kind in ("passed", "failed", "skipped")}
        parts += [
            f"## Python {found[0]['python']}, JAX {found[0]['jax']}\n",
            f"Commit {commit}: {len(found)} of {len(names)} pieces, {total['passed']:,} passed, "
            f"{total['failed']:,} failed, {total['skipped']:,} skipped, "
            f"{sum(result['seconds'] for result in found) / 3600:.1f} hours.\n",
            "| piece | passed | failed | skipped | counted | seconds | date |",
            "|---|---|---|---|---|---|---|",
            *(row(result) for result in found),
            "",
        ]
        skips = sorted({reason for result in found for reason in result["skips"]})
        if skips:
            parts += ["Skipped, because:\n", *(f"- {' '.join(reason.split())}" for reason in skips), ""]
        if missing := [name for name in names if not store.get(name)]:
            parts += ["Missing:\n", *(f"- {name}" for name in missing), ""]
    return "\n".join(parts)


def row(result: dict[str, Any]) -> str:
    counted = ", ".join(f"{number:,} {name}" for name, number in result["counted"].items())
    cells = (result[key] for key in ("piece", "passed", "failed", "skipped"))
    return "| " + " | ".join(map(str, (*cells, counted, round(result["seconds"]), result["date"]))) + " |"


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
        if any("powersgd" in piece.name for piece in wanted):
            find_torch()
        try:
            failures = prove(wanted, store)
        except KeyboardInterrupt:
            print("stopped; the same command goes on with the piece that was under way", flush=True)
            return 130
    if options.only and not options.write:
        return int(failures > 0)
    pythons = sorted({path.name for path in (RESULTS / at).glob("*")})
    REPORT.write_text(report(at, [piece.name for piece in every], [Store(RESULTS, at, name) for name in pythons]))
    print(f"{f'{failures} pieces failed; ' if failures else ''}{REPORT.relative_to(ROOT)} is written")
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

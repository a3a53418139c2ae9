"""Seconds from the start of the process to the first step, and how compilation grows with the layers.

python bench/startup.py
python bench/startup.py --pairs=1 --parts=start

train.py on bench/gpt12m.py, with an empty compilation cache (cold) and a filled one (warm), in turn; the tokens are
cached already. Beside it the hand-written script of the same model, which reads no data and saves nothing. What a
newcomer waits for: configs/quickstart.py on a terminal with nothing cached, its first line and its longest silence.
"""

import json
import math
import os
import pty
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import common, gpt12m  # noqa: E402
from runtime import usage  # noqa: E402

CONFIG = "bench/gpt12m.py"


def warm_tokens() -> Path:
    """Makes the tokens in the user's cache, if they are not there yet. Returns its folder."""
    from data.corpus import cache_directory
    from recipes.language import read_corpus

    read_corpus(gpt12m.get_config().data)
    return cache_directory()


def run_train(cache: Path, workdir: Path) -> dict[str, float]:
    """The phases of one start of train.py, up to the first step, and `to first step`: their sum and Python's start."""
    command = [sys.executable, "train.py", f"--config={CONFIG}", f"--workdir={workdir}"]
    done = subprocess.run(
        command, cwd=common.ROOT, env=os.environ | {"SLACKLINE_CACHE": str(cache)}, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"train.py failed:\n{done.stdout}{done.stderr}")
    phases = json.loads((workdir / "summary.json").read_text())["phases"]
    names = [name for name in phases if name != "total"]
    names = names[: names.index("first step") + 1]
    return {name: phases[name] for name in names} | {"to first step": math.fsum(phases[name] for name in names)}


def run_handwritten(cache: Path) -> float:
    command = [sys.executable, "bench/handwritten.py", f"--cache={cache}"]
    done = subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[0])


def measure_start(report: common.Report, pairs: int) -> None:
    tokens = warm_tokens()
    found: dict[str, list[Any]] = {"cold": [], "warm": [], "hand cold": [], "hand warm": []}
    with tempfile.TemporaryDirectory() as folder:
        run_train(tokens, Path(folder) / "run")  # fills the page cache and the .pyc files
    for _ in range(pairs):
        with tempfile.TemporaryDirectory() as folder:
            cache, hand_cache = Path(folder) / "cache", Path(folder) / "hand"
            shutil.copytree(tokens, cache, ignore=shutil.ignore_patterns("xla"))
            cache.chmod(0o700)
            for temperature in ("cold", "warm"):
                found[temperature].append(run_train(cache, Path(folder) / temperature))
                found[f"hand {temperature}"].append(run_handwritten(hand_cache))
    python = statistics.median(common.clock(subprocess.run, [sys.executable, "-c", ""])[0] for _ in range(5))
    for temperature, limit in (("cold", 10), ("warm", 4)):
        runs = found[temperature]
        total = python + statistics.median(run["to first step"] for run in runs)
        report.row(f"{temperature}: to the first step", total, "s", at_most=limit)
        for phase in runs[0]:
            if phase != "to first step":
                report.row(f"{temperature}:   {phase}", statistics.median(run[phase] for run in runs), "s")
        hand = python + statistics.median(found[f"hand {temperature}"])
        report.row(f"{temperature}: the hand-written script", hand, "s")
    report.details["start"] = found | {"start of python": python}


def listen(command: list[str], cache: Path) -> tuple[float, float]:
    """Runs it on a terminal. Seconds (until its first line is whole, of the longest silence, the end included)."""
    ours, terminal = pty.openpty()
    environment = os.environ | {"SLACKLINE_CACHE": str(cache), "COLUMNS": "120"}
    start = last = time.perf_counter()
    child = subprocess.Popen(
        command, cwd=common.ROOT, env=environment, stdin=terminal, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    first, longest, said = math.nan, 0.0, b""
    while True:
        try:
            said += (heard := os.read(ours, 65_536))
        except OSError:  # how Linux says that nobody is left to write
            heard = b""
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
        first = now - start if math.isnan(first) and b"\n" in said else first
        if not heard:
            break
    os.close(ours)
    if child.wait():
        raise SystemExit(f"{' '.join(command)} failed:\n{said.decode()}")
    return first, longest


def measure_said(report: common.Report, runs: int) -> None:
    found = []
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder:
            cache, workdir = Path(folder) / "cache", Path(folder) / "run"
            cache.mkdir(mode=0o700)
            command = [sys.executable, "train.py", "--config=configs/quickstart.py", f"--workdir={workdir}"]
            found.append(listen([*command, "--config.steps=200"], cache))
    firsts, silences = zip(*found, strict=True)
    report.row("quickstart, nothing cached: the first line", statistics.median(firsts), "s")
    report.row("quickstart, nothing cached: the longest silence", statistics.median(silences), "s", at_most=3)
    report.details["said"] = [{"first line": first, "silence": silence} for first, silence in found]


def compile_seconds(layers: int) -> float:
    """Tracing, lowering and compiling the step of bench/gpt12m.py with so many layers, without any cache."""
    from parallel.layout import mesh as meshes
    from recipes import build, programs

    config = gpt12m.get_config()
    config.model.num_layers = layers
    parts = build.build(config, meshes.build({}))
    return common.clock(programs.compile_steps, parts)[0]


def measure_compilation(report: common.Report, pairs: int) -> None:
    timing = common.in_turn(lambda: compile_seconds(24), lambda: compile_seconds(2), pairs, warmup=1)
    report.row("compilation: 24 layers", timing["a_seconds"]["median"], "s")
    report.row("compilation: 2 layers", timing["b_seconds"]["median"], "s")
    report.row("compilation: 24 layers / 2 layers", timing["ratio"], at_most=1.5)
    report.details["compilation"] = timing


def import_times() -> list[tuple[str, float]]:
    """The packages that take longest to import for train.py, each with what it imports first: seconds."""
    code = "import train; from runtime import checkpoint, plot"
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code], cwd=common.ROOT, capture_output=True, text=True
    )
    rows = []
    for line in done.stderr.splitlines():
        parts = line.removeprefix("import time:").split("|")
        if len(parts) == 3 and parts[1].strip().isdigit():
            rows.append((parts[2].strip(), int(parts[1]) / 1e6))
    return sorted(rows, key=lambda row: -row[1])[:40]


def main() -> None:
    parser = usage.parser(__doc__, "python bench/startup.py")
    parser.add_argument("--pairs", type=int, default=5, help="of starts, each in turn")
    parser.add_argument("--parts", default="start,said,compilation,imports", help="which of these")
    args = parser.parse_args()
    report, parts = common.Report("startup"), args.parts.split(",")
    if "start" in parts:
        measure_start(report, args.pairs)
    if "said" in parts:
        measure_said(report, args.pairs)
    if "compilation" in parts:
        measure_compilation(report, args.pairs)
    if "imports" in parts:
        report.details["imports, seconds with all they import"] = rows = import_times()
        print("  imports, seconds with all they import: " + ", ".join(f"{name} {s:.2f}" for name, s in rows[:16]))
    report.finish()


if __name__ == "__main__":
    main()

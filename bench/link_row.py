"""One row of bench/link.py: what it trains, and what is measured meanwhile at the hosts' interfaces."""

import dataclasses
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench import common
from bench.namespaces import Hosts

HEADERS = 14 + 20 + 32  # of a frame that TCP sends: Ethernet, IPv4, TCP with timestamps
START_SECONDS, STEP_SECONDS, POLL_SECONDS = 600, 180, 0.004


@dataclasses.dataclass(frozen=True)
class Row:
    """A line of the table. round: steps from exchange to exchange. speedup: over `sync none`, that is wanted."""

    strategy: str
    codec: str
    options: tuple[str, ...] = ()
    round: int = 1
    speedup: float | None = None
    label: str = ""

    @property
    def name(self) -> str:
        return f"{self.strategy} {self.codec}{self.label}"

    def flags(self, config: str, hosts: int) -> list[str]:
        sync = [f"--config.sync.strategy={self.strategy}", f"--config.sync.codec={self.codec}"]
        mesh = [f"--config.mesh.replica={hosts}", "--config.mesh.fsdp=1", f"--config.data.batch_size={max(4, hosts)}"]
        quiet = "log_every=1 eval_every=0 checkpoint.every=0 sample.tokens=0 metrics.tensorboard=off steps=30000"
        return [f"--config={config}", *sync, *mesh, *(f"--config.{o}" for o in quiet.split()), *self.options]


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


# ── the processes ────────────────────────────────────────────────────────────────────────────────────────────────


class Run:
    """The processes of one row, and the rows of metrics that they have written."""

    def __init__(self, row: Row, hosts: Hosts, config: str, port: int):
        self.workdir = hosts.folder / f"{row.name.replace(' ', '-')}-{port}"
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


def measure(row: Row, hosts: Hosts, config: str, port: int, steps: int, seconds: float, mbit: float) -> dict[str, Any]:
    """Trains for so many steps and seconds at least, in whole rounds after the first; counters between two rounds.
    mbit: of each host's link; 0: no limit."""
    hosts.limit(mbit)
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
        "mbit": mbit,
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

"""Hosts of one machine for bench/link.py: network namespaces on one bridge, with links of a given rate.

Run by itself, as `Hosts` runs it, it is the guardian that removes them: python bench/namespaces.py PREFIX FOLDER
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


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
        guardian = [sys.executable, __file__, self.prefix, str(self.folder)]
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


if __name__ == "__main__":
    guard(sys.argv[1], Path(sys.argv[2]))

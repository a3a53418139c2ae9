"""bench/link.py: what it needs, how it counts, and that it leaves nothing behind."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import helpers
import pytest

from bench import link, link_row, namespaces

BENCH = [sys.executable, "bench/link.py", "--config=configs/tiny.py", "--only=sync none"]
needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None,
    reason="network namespaces need root, ip and tc (Debian: iproute2)",
)


def test_without_root_it_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(sys, "argv", ["bench/link.py"])
    assert link.main() == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "root" in message and "sudo" in message


def test_without_iproute2_it_says_what_it_needs(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(shutil, "which", lambda name: None if name == "tc" else f"/sbin/{name}")
    message = namespaces.missing()
    assert "programs tc (" in message and "iproute2" in message and "root" not in message
    monkeypatch.setattr(shutil, "which", lambda name: f"/sbin/{name}")
    assert namespaces.missing() == ""


NET_DEV = """Inter-|   Receive  |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier
    lo: 999 9 0 0 0 0 0 0 999 9 0 0 0 0 0 0
  eth0: 575624    8720    0    0    0     0          0         0 {bytes} {packets}    0    0    0     0       0
"""


def test_headers_are_taken_off_what_an_interface_has_sent():
    before = link_row.parse_sent(NET_DEV.format(bytes=1000, packets=10))
    after = link_row.parse_sent(NET_DEV.format(bytes=1000 + 3 * 1514 + 2 * 66, packets=15))
    sent = after - before
    assert sent == link_row.Sent(3 * 1514 + 2 * 66, 5)
    assert sent.payload == 3 * 1448, "three full segments; acknowledgements carry nothing"
    with pytest.raises(ValueError, match="eth7"):
        link_row.parse_sent(NET_DEV, "eth7")


def test_losses_are_compared_within_equal_time():
    losses, took = [5.0, 4.0, 3.0, 2.0, 1.0], [1.0, 4.0, 4.0, 1.0, 1.0]
    assert link_row.loss_within(10, losses, took) == {"loss": 2.5, "loss_steps": 4}, "those that end at 9 and 10 s"
    assert link_row.loss_within(3, losses, took) == {"loss": None, "loss_steps": 1}


@pytest.mark.parametrize("row", link.ROWS, ids=lambda row: row.name)
def test_every_row_has_a_prediction(row):
    """Fewer bytes than float32's for every codec and every strategy that exchanges less often."""
    size = link.predicted(row, "configs/tiny.py", 8)
    full = link.predicted(link.ROWS[0], "configs/tiny.py", 8)
    assert 0 < size <= full
    assert (size < full) == ((row.strategy, row.codec) not in (("sync", "none"), ("stale", "none")))


@pytest.mark.slow
@needs_namespaces
def test_sockets_carry_what_the_program_says(tmp_path):
    command = [*BENCH, "--seconds=1", f"--json={tmp_path / 'table.json'}"]
    process = subprocess.Popen(command, cwd=helpers.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    [row] = json.loads((tmp_path / "table.json").read_text())
    assert row["socket"] == pytest.approx(row["hlo"], rel=0.05)
    assert row["raw"] > row["socket"] + 40 * row["packets"]
    assert not leftovers(process.pid)


@pytest.mark.slow
@needs_namespaces
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
def test_nothing_is_left_when_it_is_killed(number):
    # Tests that a shell has put in the background ignore Ctrl-C, and so would what they start.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    command = [*BENCH, "--seconds=600"]
    process = subprocess.Popen(command, cwd=helpers.ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    try:
        metrics = Path(tempfile.gettempdir()).glob
        wait_until(lambda: any(metrics(f"slackline-{process.pid}-*/*/run/metrics.jsonl")), "the hosts train")
        pids = processes_in_namespaces(process.pid)
        assert len(pids) == 2 and leftovers(process.pid)
        process.send_signal(number)
        process.communicate(timeout=60)
        wait_until(lambda: not leftovers(process.pid), "the guardian has removed everything")
        wait_until(lambda: not any(is_running(pid) for pid in pids), "no host is left running")
    finally:
        process.kill()
        process.wait()


def namespaces_of(pid: int) -> list[str]:
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listed.splitlines() if line.startswith(f"slackline-{pid}-")]


def processes_in_namespaces(pid: int) -> list[int]:
    found = [subprocess.run(["ip", "netns", "pids", n], capture_output=True, text=True) for n in namespaces_of(pid)]
    return [int(word) for done in found for word in done.stdout.split()]


def leftovers(pid: int) -> list[str]:
    """What a bench of this process id has made and not removed."""
    folders = [*Path("/etc/netns").glob(f"slackline-{pid}-*"), *Path(tempfile.gettempdir()).glob(f"slackline-{pid}-*")]
    return namespaces_of(pid) + [str(path) for path in folders]


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, what: str, seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"still waiting until {what}"
        time.sleep(0.1)

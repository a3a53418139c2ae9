"""Several processes: the same run as one process, and the same end for all of them."""

import json
import os
import signal
import subprocess
import time

import helpers
import pytest

STEPS = ["--config.steps=20", "--config.sample.tokens=16", "--config.eval_every=10"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one")
    helpers.train(workdir, *STEPS, "--config.steps=24", simulate=1)
    return helpers.metric_losses(workdir)


@pytest.mark.parametrize(
    ("processes", "devices", "mesh"),
    [(2, 4, (2, 1, 2)), pytest.param(4, 4, (2, 2, 1), marks=pytest.mark.slow),
     pytest.param(2, 2, (1, 2, 1), marks=pytest.mark.slow)],
)  # fmt: skip
def test_processes_train_like_one(tmp_path, one_process, processes, devices, mesh):
    sizes = [f"--config.mesh.{axis}={size}" for axis, size in zip(("replica", "fsdp", "tensor"), mesh, strict=True)]
    done = helpers.train(tmp_path, *STEPS, *sizes, simulate=devices, processes=processes)
    losses = helpers.metric_losses(tmp_path)
    assert list(losses) == list(range(1, 21))
    assert all(abs(losses[step] / one_process[step] - 1) < 5e-6 for step in losses)
    assert done.stdout.count("held-out text:") == 1, "only process 0 prints"
    assert json.loads((tmp_path / "summary.json").read_text())["mesh"] == dict(
        zip(("replica", "fsdp", "tensor"), mesh, strict=True)
    )
    # One process goes on with what several have saved.
    digest = json.loads((tmp_path / "summary.json").read_text())["params_digest"]
    helpers.train(tmp_path, *STEPS, simulate=1)
    assert json.loads((tmp_path / "summary.json").read_text())["params_digest"] == digest
    helpers.train(tmp_path, *STEPS, "--config.steps=24", simulate=1)
    later = helpers.metric_losses(tmp_path)
    assert all(abs(later[step] / one_process[step] - 1) < 5e-6 for step in (21, 22, 23, 24))


@pytest.mark.parametrize("replicas", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_codec_gives_the_same_bits_between_processes(tmp_path, replicas):
    """Between processes gloo carries the messages, and all-reduces of pairs (parallel/pairwise.py)."""
    options = ["--config.steps=5", "--config.sample.tokens=0", "--config.sync.codec=int4"]
    options += [f"--config.mesh.replica={replicas}"]
    digests, sent = set(), set()
    for processes in (1, replicas):
        helpers.train(tmp_path / str(processes), *options, simulate=replicas, processes=processes)
        summary = json.loads((tmp_path / str(processes) / "summary.json").read_text())
        digests.add(summary["params_digest"])
        sent.add(summary["wire_bytes_per_step"]["replica"])
    assert len(digests) == len(sent) == 1


def test_sigterm_to_the_launcher_saves_at_one_step_in_all_processes(tmp_path):
    options = ["--config.steps=5000", "--config.checkpoint.every=5", "--config.mesh.replica=2", "--config.log_every=1"]
    command = helpers.command(tmp_path, *options, simulate=2, processes=2)
    process = subprocess.Popen(command, cwd=helpers.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.time() + 240
    while time.time() < deadline and not (tmp_path / "checkpoints" / "5").is_dir() and process.poll() is None:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 75, output
    assert "stopped by SIGTERM after step" in output
    newest = max(int(p.name) for p in (tmp_path / "checkpoints").glob("*") if p.name.isdigit())
    assert f"after step {newest}" in output


def test_the_coordinator_listens_on_its_own_address_only(tmp_path):
    """Explicit flags bind it to loopback here; JAX's own default would be every interface."""
    options = ["--config.steps=5000", "--config.mesh.replica=2"]
    command = helpers.command(tmp_path, *options, simulate=2, processes=2)
    process = subprocess.Popen(command, cwd=helpers.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        deadline = time.time() + 240
        while time.time() < deadline and not (tmp_path / "metrics.jsonl").exists() and process.poll() is None:
            time.sleep(0.2)
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
        addresses = [address for pid in children.stdout.split() for address in listening(int(pid))]
        assert addresses, "the coordinator listens somewhere"
        assert all(address.endswith("0100007F") for address in addresses), f"other than 127.0.0.1: {addresses}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=240)


def listening(pid: int) -> list[str]:
    """Local addresses (hexadecimal, as in /proc/net/tcp) of the listening sockets of a process."""
    inodes = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        try:
            target = os.readlink(f"/proc/{pid}/fd/{fd}")
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = []
    for table in ("tcp", "tcp6"):
        with open(f"/proc/net/{table}") as lines:
            for row in map(str.split, list(lines)[1:]):
                if row[3] == "0A" and row[9] in inodes:
                    found.append(row[1].split(":")[0])
    return found

"""Several processes: the same run as one process, and the same end for all of them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import helpers
import pytest

from runtime.launch import free_port

STEPS = ["--config.steps=20", "--config.sample.tokens=16", "--config.eval_every=10"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one")
    helpers.run_here(workdir, *STEPS, "--config.steps=24")
    return helpers.metric_losses(workdir)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "devices", "mesh"),
    [(2, 4, (2, 1, 2)), (4, 4, (2, 2, 1)), (2, 2, (1, 2, 1))],
)
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
    helpers.run_here(tmp_path, *STEPS)
    assert json.loads((tmp_path / "summary.json").read_text())["params_digest"] == digest
    helpers.run_here(tmp_path, *STEPS, "--config.steps=24")
    later = helpers.metric_losses(tmp_path)
    assert all(abs(later[step] / one_process[step] - 1) < 5e-6 for step in (21, 22, 23, 24))


# In the default run test_exchange.py::test_pairs_of_devices_carry_the_same_bits_and_bytes, within one process.
@pytest.mark.slow
@pytest.mark.parametrize("replicas", [2, 4])
def test_a_codec_gives_the_same_bits_between_processes(tmp_path, replicas):
    """Between processes gloo carries the messages, and all-reduces of pairs (parallel/exchange/pairwise.py)."""
    options = ["--config.steps=5", "--config.sample.tokens=0", "--config.sync.codec=int4"]
    options += [f"--config.mesh.replica={replicas}", f"--config.mesh.fsdp={8 // replicas}"]
    digests, sent = set(), set()
    helpers.run_here(tmp_path / "one", *options)
    helpers.train(tmp_path / "several", *options, processes=replicas)
    for workdir in ("one", "several"):
        summary = json.loads((tmp_path / workdir / "summary.json").read_text())
        digests.add(summary["params_digest"])
        sent.add(summary["wire_bytes_per_step"]["replica"])
    assert len(digests) == len(sent) == 1


@pytest.mark.slow  # in the default run: test_agree.py, without a run
def test_sigterm_to_the_launcher_saves_at_one_step_in_all_processes_and_only_loopback_is_listened_on(tmp_path):
    """Explicit flags bind the coordinator to loopback here; JAX's own default would be every interface."""
    options = ["--config.steps=5000", "--config.checkpoint.every=5", "--config.mesh.replica=2", "--config.log_every=1"]
    command = helpers.command(tmp_path, *options, simulate=2, processes=2)
    process = subprocess.Popen(command, cwd=helpers.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.time() + 240
    while time.time() < deadline and not (tmp_path / "checkpoints" / "5").is_dir() and process.poll() is None:
        time.sleep(0.1)
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
    addresses = [address for pid in children.stdout.split() for address in listening(int(pid))]
    os.kill(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 75, output
    assert "stopped by SIGTERM after step" in output
    newest = max(int(p.name) for p in (tmp_path / "checkpoints").glob("*") if p.name.isdigit())
    assert f"after step {newest}" in output
    assert addresses, "the coordinator listens somewhere"
    assert all(address.endswith("0100007F") for address in addresses), f"other than 127.0.0.1: {addresses}"


def both(first: list[str], second: list[str], roots: tuple = (helpers.ROOT, helpers.ROOT), prefix: tuple = ([], [])):
    """Two processes of train.py without the launcher, each with its own options: [(exit code, stderr)]."""
    address = f"--coordinator=127.0.0.1:{free_port()}"
    running = []
    for i, options in enumerate((first, second)):
        command = [*prefix[i], sys.executable, "train.py", "--config=configs/tiny.py", "--simulate=2", address]
        command += ["--config.mesh.fsdp=2", "--config.sample.tokens=0", "--num_processes=2", f"--process_id={i}"]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True, "cwd": roots[i]}
        running.append(subprocess.Popen([*command, *options], **pipes))
    try:
        texts = [process.communicate(timeout=240)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    return [(process.returncode, text) for process, text in zip(running, texts, strict=True)]


@pytest.mark.parametrize(
    ("fact", "option"),
    [
        ("optimizer.lr", "--config.optimizer.lr=5e-3"),
        pytest.param("data.seq_len", "--config.data.seq_len=16", marks=pytest.mark.slow),
        pytest.param("data", "--config.data.path={other}", marks=pytest.mark.slow),
        pytest.param("workdir", "--workdir={tmp}/other", marks=pytest.mark.slow),
        pytest.param("--simulate", "--simulate=4", marks=pytest.mark.slow),
    ],
)
def test_processes_that_differ_all_say_in_what_and_train_nothing(tmp_path, fact, option):
    for name, text in (("same", "one two three\n" * 900), ("other", "one two four\n" * 900)):
        (tmp_path / f"{name}.txt").write_text(text)
    common = [f"--workdir={tmp_path}/run", f"--config.data.path={tmp_path}/same.txt"]
    option = option.format(tmp=tmp_path, other=tmp_path / "other.txt")
    for code, text in both(common, [*common, option]):
        assert code == 2 and f"\n  {fact}: " in text and "(process 0)" in text and "Traceback" not in text, text
    assert not (tmp_path / "run").exists() and not (tmp_path / "other").exists()


@pytest.mark.slow
def test_an_old_checkout_is_found_out(tmp_path):
    old = tmp_path / "old"
    shutil.copytree(helpers.ROOT, old, ignore=shutil.ignore_patterns(".*", "__pycache__", "runs", "tests", "bench"))
    with (old / "parallel" / "stale.py").open("a") as file:
        file.write("\n# of yesterday\n")
    common = [f"--workdir={tmp_path}/run"]
    for code, text in both(common, common, roots=(helpers.ROOT, old)):
        assert code == 2 and "\n  code: " in text, text


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("unshare"), reason="needs a mount namespace of its own")
def test_a_workdir_that_is_not_shared_is_found_out(tmp_path):
    (tmp_path / "disk").mkdir()
    hidden = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs none {tmp_path}/disk && exec "$@"', "sh"]
    common = [f"--workdir={tmp_path}/disk/run"]
    for code, text in both(common, common, prefix=([], hidden)):
        assert code == 2 and "workdir: " in text and "is not the folder that process 0 writes to" in text, text
    assert not (tmp_path / "disk" / "run").exists()


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

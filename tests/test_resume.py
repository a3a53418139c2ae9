"""Stop anywhere, go on: the same bits as a run that was never stopped."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import helpers
import pytest

from recipes import methods
from runtime.metrics import read
from runtime.verify import verify

# Saves overlap the steps that follow: a kill hits before, in and after commits.
OPTIONS = ["--config.steps=120", "--config.checkpoint.every=3", "--config.log_every=4", "--config.sample.tokens=0"]
OPTIONS += ["--config.eval_every=40", "--config.mesh.fsdp=4", "--config.mesh.tensor=2"]


def start(workdir: Path, *options: str, **kwargs) -> subprocess.Popen:
    command = helpers.command(workdir, *OPTIONS, *options, **kwargs)
    return subprocess.Popen(command, cwd=helpers.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def summary(workdir: Path) -> dict:
    return json.loads((workdir / "summary.json").read_text())


def wait_for_steps(process: subprocess.Popen, workdir: Path, at_least: int) -> None:
    """Until a checkpoint of `at_least` is committed."""
    deadline = time.time() + 200
    while time.time() < deadline and process.poll() is None:
        if any(p.name.isdigit() and int(p.name) >= at_least for p in (workdir / "checkpoints").glob("*")):
            return
        time.sleep(0.005)
    output = process.stdout.read() if process.poll() is not None and process.stdout else "(still running)"
    raise AssertionError(f"no checkpoint {at_least} in time:\n{output}")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("uninterrupted")
    helpers.run_here(workdir, *OPTIONS)
    return workdir


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """A workdir whose run was ended by SIGTERM."""
    workdir = tmp_path_factory.mktemp("stopped")
    process = start(workdir)
    wait_for_steps(process, workdir, 30)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert f"stopped by SIGTERM after step {newest(workdir)}" in output
    return workdir


def newest(workdir: Path) -> int:
    return max(int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit())


def check_same_run(workdir: Path, uninterrupted: Path) -> None:
    assert summary(workdir)["params_digest"] == summary(uninterrupted)["params_digest"]
    columns = lambda path: [
        {k: row.get(k) for k in ("step", "loss", "grad_norm", "tokens", "eval_loss")}
        for row in read(path / "metrics.jsonl")
    ]
    assert columns(workdir) == columns(uninterrupted), "metrics.jsonl has each step once, with the same values"


@pytest.mark.slow  # in the default run: what a kill leaves of a save, in test_checkpoint.py
@pytest.mark.parametrize("kills", [1, 10])
def test_killed_at_random_moments_and_resumed(tmp_path, uninterrupted, kills):
    chance = random.Random(kills)
    for kill in range(kills):
        process = start(tmp_path)
        wait_for_steps(process, tmp_path, 1 + 100 * kill // kills)
        time.sleep(chance.uniform(0, 0.4))
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    helpers.run_here(tmp_path, *OPTIONS)
    check_same_run(tmp_path, uninterrupted)
    starts = summary(tmp_path)["starts"]
    assert len(starts) == kills + 1 and starts[0]["restored_step"] is None
    restored = [start["restored_step"] for start in starts[1:]]
    assert all(step and step % 3 == 0 for step in restored), f"each restart continues from a committed step: {restored}"
    assert restored == sorted(restored)


@pytest.mark.slow  # in the default run: test_task.py, in one process
@pytest.mark.parametrize("config", ["tiny", None], ids=["the same command", "the workdir alone"])
def test_sigterm_saves_and_the_run_goes_on(tmp_path, stopped, uninterrupted, config):
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    done = helpers.run_here(tmp_path, *(OPTIONS if config else ()), config=config)
    assert f"from step {newest(stopped)}" in done.stdout
    check_same_run(tmp_path, uninterrupted)


@pytest.mark.slow
def test_a_run_that_lost_its_checkpoints_does_not_begin_again(tmp_path):
    helpers.run_here(tmp_path, "--config.checkpoint.every=5", "--config.sample.tokens=0")
    rows = (tmp_path / "metrics.jsonl").read_bytes()
    for step in (tmp_path / "checkpoints").glob("*"):
        step.rename(tmp_path / f"moved-{step.name}")
    done = helpers.run_here(tmp_path, check=False)
    assert done.returncode == 1 and "nothing to resume from" in done.stderr and "Traceback" not in done.stderr
    assert (tmp_path / "metrics.jsonl").read_bytes() == rows


@pytest.mark.slow  # in the default run: test_checkpoint.py, without a run
def test_a_damaged_newest_step_is_named_and_the_one_before_it_used(tmp_path):
    helpers.run_here(tmp_path, "--config.steps=6", "--config.checkpoint.every=3", "--config.sample.tokens=0")
    newest = tmp_path / "checkpoints" / "6" / "state"
    data = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    done = helpers.run_here(tmp_path, "--config.steps=8", "--config.checkpoint.every=3", "--config.sample.tokens=0")
    assert "warning: checkpoint step 6 is corrupt: array" in done.stderr
    assert summary(tmp_path)["starts"][-1]["restored_step"] == 3
    assert "from step 3" in done.stdout
    assert dict(verify(tmp_path))[6] == [], "the damaged step was saved again when training came by"


@pytest.mark.parametrize(
    "mesh",
    [pytest.param(mesh, marks=pytest.mark.slow) for mesh in ((2, 1, 4), (1, 1, 1), (1, 8, 1))],
    ids=helpers.name,
)
def test_another_mesh_goes_on_with_the_same_parameters_and_losses(tmp_path, mesh, uninterrupted):
    """The digest of the restored parameters is checked array by array; the losses that follow are compared here."""
    sizes = [f"--config.mesh.{axis}={size}" for axis, size in zip(("replica", "fsdp", "tensor"), mesh, strict=True)]
    first = ["--config.steps=10", "--config.optimizer.schedule=constant", "--config.sample.tokens=0"]
    helpers.run_here(tmp_path, *first, "--config.mesh.fsdp=4", "--config.mesh.tensor=2")
    before = summary(tmp_path)["params_digest"]
    go_on = functools.partial(helpers.train, simulate=1) if mesh == (1, 1, 1) else helpers.run_here
    go_on(tmp_path, *first, *sizes)
    assert summary(tmp_path)["params_digest"] == before, "restored on another mesh, trained no step: the same bits"
    go_on(tmp_path, "--config.steps=20", *first[1:], *sizes)
    ours, theirs = helpers.metric_losses(tmp_path), helpers.metric_losses(uninterrupted)
    later = [step for step in theirs if 10 < step <= 20]
    assert later and all(abs(ours[step] / theirs[step] - 1) < 5e-6 for step in later)


# Each strategy, so that the kill finds it in the middle of an interval or with messages pending.
STRATEGIES = {
    "sync": "",
    "stale": "compensation=0.1",
    "diloco": "interval=7",
    "eager": "interval=4",
    "streaming": "interval=8 overlap=2 mix=0.25",
}
assert STRATEGIES.keys() == methods.STRATEGIES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["none", "int4", "topk", "powersgd"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_killed_and_resumed_ends_with_the_same_bits(tmp_path, strategy, codec, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # compiles in half the time
    chosen = f"strategy={strategy} codec={codec} {STRATEGIES[strategy]}"
    options = [f"--config.sync.{option}" for option in chosen.split()]
    options += [f"--config.{option}" for option in "mesh.replica=2 steps=60 checkpoint.every=4 eval_every=20".split()]
    options += ["--config.log_every=4", "--config.sample.tokens=0"]
    helpers.train(tmp_path / "straight", *options, simulate=2)
    workdir = tmp_path / "killed"
    process = subprocess.Popen(
        helpers.command(workdir, *options, simulate=2),
        cwd=helpers.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    wait_for_steps(process, workdir, 8)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    helpers.train(workdir, *options, simulate=2)
    check_same_run(workdir, tmp_path / "straight")
    restored = summary(workdir)["starts"][-1]["restored_step"]
    assert 8 <= restored < 60 and restored % 4 == 0

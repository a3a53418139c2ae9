"""Checkpoints of format 1 are read by today's names. One of them is kept here: an eager run, whose state has every kind
of array; the others are made by the release that wrote them, out of the repository's history."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import helpers
import jax
import numpy as np
import pytest

from recipes import phases
from runtime.checkpoint import Checkpoints, load_params
from runtime.digest import digest_all, named_arrays, to_hex
from runtime.metrics import read
from runtime.steps import read_record

KEPT = Path(__file__).parent / "data" / "format1.tar.xz"
LAST_RELEASE = "bd6bba4"  # that wrote format 1


def config():
    small = {"model_dim": 4, "num_heads": 1, "num_kv_heads": 1, "head_dim": 4, "mlp_dim": 8}
    model = {f"model__{key}": value for key, value in small.items()}
    sync = {"sync__codec": "int4", "sync__strategy": "eager", "sync__interval": 4, "sync__algorithm": "two_stage"}
    return helpers.tiny(**model, **sync)


def restored(folder, mesh):
    shutil.unpack_archive(KEPT, folder)
    parts, notes = helpers.build(config(), mesh), []
    state, step = Checkpoints(folder / "format1").restore(lambda _: parts.state, notes.append, phases.adapter(parts))
    return parts, state, step, notes, read_record(folder / "format1" / "8")["arrays"]


def test_the_kept_checkpoint_is_small():
    assert KEPT.stat().st_size <= 150_000


def test_a_run_starts_from_its_parameters(tmp_path):
    shutil.unpack_archive(KEPT, tmp_path)
    parts = helpers.build(config(), (2, 2, 1))
    given = load_params(tmp_path / "format1", parts.state.params, pytest.fail)
    record = read_record(tmp_path / "format1" / "8")
    assert record and record["format"] == 1 and given.step == 8
    digests = {name: x["digest"] for name, x in record["arrays"].items()}
    found = {f"params/{name}": to_hex(x) for name, x in digest_all(named_arrays(given.params)).items()}
    assert found.items() <= digests.items()


@pytest.mark.parametrize("mesh", [(2, 1, 1), pytest.param((2, 2, 1), marks=pytest.mark.slow)])
def test_every_array_is_found_and_has_its_digest(tmp_path, mesh):
    """But for the guard's windows, which are of other sizes now, and servers' chunks on another mesh."""
    parts, state, step, notes, old = restored(tmp_path, mesh)
    assert step == 8 == int(state.step), "format 1 counted calls, of 4 steps each"
    (fresh,) = [note for note in notes if "begun anew" in note] or [""]
    names = set(fresh.partition(": ")[2].split(", "))
    assert all(name.endswith(("_W", "/clipped")) for name in names), fresh
    arrays = jax.device_get(named_arrays(state))
    for was, now in {
        "params/blocks/mlp/up": "params/blocks/mlp/up",
        "opt_state/0/trace/embed": "strategy/outer/shared/embed/momentum",
        "strategy/replicas/opt_state/1/0/mu/blocks/attention/q": "strategy/replicas/opt/blocks/attention/q/first",
        "strategy/outer/replicas/opt_state/0/trace/embed": "strategy/outer/replicas/opt/embed/momentum",
        "strategy/pending/embed": "strategy/pending/embed",
        "codec/worker/embed": "codec/worker/embed",
    }.items():
        assert old[was]["shape"] == list(arrays[now].shape) and np.any(arrays[now]), (was, now)
    assert bool(state.strategy["finite"]) and int(state.strategy["replicas"]["guard"].applied[0]) == 8
    if mesh == (2, 1, 1):
        assert any(np.any(x) for x in state.codec["server"].values())


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    ["codec=none", "strategy=stale codec=int4", "strategy=diloco codec=int4 interval=4", "strategy=eager interval=4"],
)
def test_runs_of_the_release_before_go_on_from_their_step(tmp_path, options):
    gone_on(LAST_RELEASE, tmp_path, options)


def gone_on(release: str, tmp_path: Path, options: str) -> str:
    """What is said of a run of 8 steps of that release, when it goes on for 8 more."""
    folder, workdir, archive = tmp_path / "release", tmp_path / "run", tmp_path / "release.tar"
    done = subprocess.run(["git", "archive", f"--output={archive}", release], cwd=helpers.ROOT)
    if done.returncode:
        pytest.skip(f"needs the repository's history back to {release}")
    shutil.unpack_archive(archive, folder)
    chosen = [f"--config.sync.{option}" for option in options.split()]
    chosen += ["--config.mesh.replica=2", "--config.mesh.fsdp=2", "--config.sample.tokens=0", f"--workdir={workdir}"]
    command = [sys.executable, "train.py", "--config=configs/tiny.py", "--simulate=4", *chosen]
    cache = {"SLACKLINE_CACHE": str(tmp_path / "cache")}  # its programs and tokens are not ours
    subprocess.run(
        [*command, "--config.steps=8"], cwd=folder, env={**os.environ, **cache}, check=True, capture_output=True
    )
    done = helpers.train(workdir, *chosen, "--config.steps=16", simulate=4)
    assert "from step 8" in done.stdout and "has the digest" in done.stdout
    assert "dropped" not in done.stderr, done.stderr
    rows = [row for row in read(workdir / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 17))
    assert rows[8]["loss"] < rows[7]["loss"] + 0.5 and rows[-1]["loss"] < rows[0]["loss"]
    return done.stdout + done.stderr

"""Checkpoints: what is restored is what was saved, to the bit, or it is named as damaged."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import train
from parallel.layout import mesh as meshes
from runtime import digest as digest_module
from runtime import steps, stored
from runtime.checkpoint import CheckpointError, Checkpoints
from runtime.digest import digest, digest_all, named_arrays, params_digest, to_hex
from runtime.stored import Record
from runtime.verify import verify

SPECS = {"step": P(), "params": {"w": P("fsdp", "tensor"), "b": P(), "half": P(None, "fsdp")}, "count": P()}


def mesh(*sizes: int) -> jax.sharding.Mesh:
    return meshes.build(dict(zip(meshes.COMMON, sizes, strict=True)), jax.devices()[: int(np.prod(sizes))])


def values(seed: int) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "step": np.int32(seed),
        "params": {
            "w": rng.standard_normal((64, 48), np.float32),
            "b": rng.standard_normal(7, np.float32),
            "half": rng.standard_normal((3, 32)).astype(jnp.bfloat16),
        },
        "count": np.uint32(2**32 - 1 - seed),
    }


def place(tree: dict, on: jax.sharding.Mesh) -> dict:
    return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(on, s)), tree, SPECS)


def abstract(on: jax.sharding.Mesh) -> dict:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), place(values(0), on))


def same(a: dict, b: dict) -> bool:
    equal = lambda x, y: np.asarray(x).tobytes() == np.asarray(y).tobytes() and x.dtype == y.dtype
    return all(jax.tree.leaves(jax.tree.map(equal, a, b)))


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A directory with steps 1 and 2."""
    directory = tmp_path_factory.mktemp("run") / "checkpoints"
    checkpoints = Checkpoints(directory, keep=3)
    for step in (1, 2):
        checkpoints.save(step, place(values(step), mesh(1, 4, 2)), eval_loss=None)
    checkpoints.close()
    return directory


def restore(directory: Path, on=None) -> tuple[dict, int, list[str]]:
    warnings: list[str] = []
    checkpoints = Checkpoints(directory, keep=3)
    try:
        state, step = checkpoints.restore(lambda _: abstract(on or mesh(1, 1, 1)), warnings.append)
    finally:
        checkpoints.close()
    return state, step, warnings


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 2), (2, 2, 2), (8, 1, 1)], ids=helpers.name)
def test_a_step_restores_on_any_mesh_to_the_same_bits(saved, sizes):
    state, step, warnings = restore(saved, mesh(*sizes))
    assert step == 2 and same(state, values(2)) and not warnings
    assert state["params"]["w"].sharding.spec == SPECS["params"]["w"]


def test_retention_keeps_the_newest_the_best_and_every_so_many(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2, keep_every=4)
    for step in range(1, 8):
        checkpoints.save(step, place(values(step), mesh(1, 1, 1)), eval_loss=float(abs(step - 2)))
    checkpoints.close()
    assert checkpoints.steps() == [2, 4, 6, 7]


def test_the_state_may_be_donated_while_it_is_saved(tmp_path):
    on = mesh(1, 4, 2)
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), s), donate_argnums=0)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    state = place(values(5), on)
    checkpoints.save(1, state, eval_loss=None)
    for _ in range(20):
        state = advance(state)
    checkpoints.close()
    assert same(restore(tmp_path / "checkpoints")[0], values(5))


# ── damage ───────────────────────────────────────────────────────────────────────────────────────────────────────


def files_of(step: Path) -> list[Path]:
    return sorted(p for p in step.rglob("*") if p.is_file() and p.stat().st_size)


def damage(file: Path, rng: np.random.Generator) -> str:
    """Flips one bit, or cuts the file."""
    content = bytearray(file.read_bytes())
    if rng.random() < 0.25:
        size = int(rng.integers(len(content)))
        file.write_bytes(content[:size])
        return f"{file} cut to {size} bytes"
    position, bit = int(rng.integers(len(content))), int(rng.integers(8))
    content[position] ^= 1 << bit
    file.write_bytes(content)
    return f"{file} byte {position} bit {bit}"


@pytest.mark.slow
def test_every_flip_and_cut_that_changes_a_value_is_detected_and_the_array_named(saved, tmp_path):
    """96 random flips and truncations over all files of a step."""
    rng = np.random.default_rng(7)
    files = [p.relative_to(saved / "2") for p in files_of(saved / "2")]
    names = set(named_arrays(values(0)))
    detected = 0
    for trial in range(96):
        directory = tmp_path / str(trial)
        shutil.copytree(saved, directory)
        what = damage(directory / "2" / files[trial % len(files)], rng)
        state, step, warnings = restore(directory)
        if step == 2:
            assert same(state, values(2)), f"silently wrong: {what}"
            assert not warnings
        else:
            assert same(state, values(1)) and "step 2 is corrupt" in warnings[0], what
            named = [name for name in names if re.search(rf"array {name} |arrays \(.*\b{name}\b", warnings[0])]
            assert named, f"no array named: {warnings[0]} ({what})"
            detected += 1
        shutil.rmtree(directory)
    assert detected >= 20, "the damage must reach the arrays, else this shows nothing"


def test_without_the_digests_flips_would_load_silently(saved, tmp_path, monkeypatch):
    """The test above tests our digests: Orbax alone lets flipped array bits through."""
    monkeypatch.setattr(stored, "wrong_digests", lambda recorded, arrays: [])
    wrong = 0
    for trial in range(8):
        directory = tmp_path / str(trial)
        shutil.copytree(saved, directory)
        data = max(files_of(directory / "2" / "state"), key=lambda p: p.stat().st_size)
        content = bytearray(data.read_bytes())
        content[len(content) // 2 + trial] ^= 1
        data.write_bytes(content)
        state, step, _ = restore(directory)
        wrong += step == 2 and not same(state, values(2))
    assert wrong >= 4


def test_if_no_step_is_intact_training_stops(saved, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(saved, directory)
    for step in ("1", "2"):
        data = max(files_of(directory / step / "state"), key=lambda p: p.stat().st_size)
        data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint .* is intact.*step 2 is corrupt.*step 1 is corrupt"):
        restore(directory)


def test_a_record_damaged_in_one_copy_does_no_harm(saved, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(saved, directory)
    (directory / "2" / "record" / steps.COPIES[0]).write_text("{")
    assert restore(directory)[1] == 2
    (directory / "2" / "record" / steps.COPIES[1]).unlink()
    _, step, warnings = restore(directory)
    assert step == 1 and "record of digests" in warnings[0]


def test_another_model_is_refused_with_every_array_and_both_shapes(saved):
    wanted = abstract(mesh(1, 1, 1))
    wanted["params"]["w"] = jax.ShapeDtypeStruct((64, 50), np.float32)
    wanted["params"]["new"] = jax.ShapeDtypeStruct((3,), np.float32)
    del wanted["count"]
    with pytest.raises(CheckpointError) as error:
        Checkpoints(saved, keep=3).restore(lambda _: wanted, print)
    text = str(error.value)
    assert "params/w: [64, 48] float32 in the checkpoint, [64, 50] float32 in this config" in text
    assert "params/new: absent in the checkpoint, [3] float32 in this config" in text
    assert "count: [] uint32 in the checkpoint, absent in this config" in text
    assert "corrupt" not in text


@pytest.mark.parametrize("file", ["state/_METADATA", "state/manifest.ocdbt", "_CHECKPOINT_METADATA"])
def test_one_damaged_file_below_all_arrays_is_one_sentence_that_names_it(saved, tmp_path, file):
    directory = tmp_path / "checkpoints"
    shutil.copytree(saved, directory)
    (directory / "2" / file).write_text("not what was written")
    _, step, warnings = restore(directory)
    if step == 2:
        return  # nothing is read from it
    assert (
        f"each of {len(named_arrays(values(0)))} arrays (" in warnings[0] and warnings[0].count("cannot be read") == 1
    )
    assert str(directory / "2" / file) in warnings[0] and len(warnings[0]) < 500 and "\n" not in warnings[0]


def test_places_that_share_a_hash_are_what_the_pages_say():
    """The position hashes again, in NumPy: no two alike in 2 dimensions, 1,920 in 4."""

    def shared(*shape: int) -> int:
        hashed = np.full(shape, 0x165667B1, np.uint32)
        for dim, n in enumerate(shape):
            index = np.arange(n, dtype=np.uint32).reshape([-1 if d == dim else 1 for d in range(len(shape))])
            hashed = (hashed ^ index) * np.uint32(digest_module._MIX[dim % 4])
            hashed ^= hashed >> np.uint32(15)
        ordered = np.sort(hashed.ravel())
        return int((ordered[1:] == ordered[:-1]).sum())

    assert (shared(1024, 1024), shared(16, 256, 256), shared(4, 1024, 8, 128)) == (0, 0, 1920)
    x = np.zeros((4, 1024, 8, 128), np.float32)
    x[2, 210, 0, 41], x[3, 593, 5, 78] = 1, 2
    y = x.copy()
    y[2, 210, 0, 41], y[3, 593, 5, 78] = 2, 1
    assert to_hex(digest(jnp.asarray(x))) == to_hex(digest(jnp.asarray(y))), "the sums of earlier runs stay the same"
    for text in (digest_module.__doc__, (helpers.ROOT / "docs" / "workdir.md").read_text()):
        assert "1,920" in text


def test_verify_lists_damage(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "checkpoints")
    run = lambda: subprocess.run(
        [sys.executable, "-m", "runtime.checkpoint", "verify", tmp_path],
        cwd=helpers.ROOT, capture_output=True, text=True,
    )  # fmt: skip
    done = run()
    assert (done.returncode, done.stdout) == (0, "step 1: intact\nstep 2: intact\n"), done.stderr
    data = max(files_of(tmp_path / "checkpoints" / "1" / "state"), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 4
    data.write_bytes(content)
    done = run()
    assert done.returncode == 1 and "step 1 is corrupt: array params/w" in done.stdout
    assert "step 2: intact" in done.stdout
    assert Path(tmp_path / "checkpoints" / "2").is_dir()


@pytest.mark.slow  # of a save that is not on the disk, in the default run: test_a_run_whose_last_step_has_vanished_…
def test_a_full_disk_stops_training_and_leaves_the_previous_step_intact(tmp_path):
    """A file-size limit stands in for the full disk."""
    helpers.run_here(tmp_path, "--config.steps=4", "--config.checkpoint.every=4", "--config.sample.tokens=0")
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "sys.path.insert(0, '.'); sys.argv[0] = 'train.py'; import train, runtime.checkpoint as c\n"
        "save = c.Checkpoints.save\n"
        "def limited(self, step, *rest):\n"
        "    if step == 8: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "    return save(self, step, *rest)\n"
        "c.Checkpoints.save = limited; sys.exit(train.run(sys.argv))\n"
    )
    options = ["--config.steps=500", "--config.checkpoint.every=4", "--config.sample.tokens=0"]
    done = subprocess.run(
        [sys.executable, "-c", code, *helpers.command(tmp_path, *options)[2:]],
        cwd=helpers.ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    assert "saving a checkpoint" in done.stderr and "step 4" in done.stderr and "Traceback" not in done.stderr
    assert json.loads((tmp_path / "config.json").read_text())["steps"] == 500
    rows = dict(verify(tmp_path))
    assert rows[4] == [] and 8 not in rows


# ── what else is in the directory ────────────────────────────────────────────────────────────────────────────────


def flip_largest(step: Path) -> None:
    data = max(files_of(step / "state"), key=lambda p: p.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)


def lose_the_record(step: Path) -> None:
    for copy in steps.COPIES:
        (step / "record" / copy).unlink()


@pytest.mark.parametrize("damage", [flip_largest, lose_the_record, lambda step: shutil.rmtree(step / "state")])
def test_a_save_below_a_damaged_step_is_on_the_disk(saved, tmp_path, damage):
    directory = tmp_path / "checkpoints"
    shutil.copytree(saved, directory)
    (directory / "2").rename(directory / "9")
    damage(directory / "9")
    damaged = {str(p.relative_to(directory / "9")): p.read_bytes() for p in files_of(directory / "9")}
    said: list[str] = []
    checkpoints = Checkpoints(directory, keep=1)
    _, step = checkpoints.restore(lambda _: abstract(mesh(1, 1, 1)), said.append)
    assert step == 1 and "step 9 is corrupt" in said[0] and "set aside as 9.damaged" in said[1]
    for step in (4, 5):
        checkpoints.save(step, place(values(step), mesh(1, 1, 1)), eval_loss=None)
        assert checkpoints.finish() == [step], "saved, and it is the one that is kept"
    checkpoints.close()
    state, step, warnings = restore(directory)
    assert step == 5 and same(state, values(5)) and not warnings
    aside = directory / "9.damaged"
    assert {str(p.relative_to(aside)): p.read_bytes() for p in files_of(aside)} == damaged, "nothing of it is lost"


def test_nothing_is_set_aside_where_no_step_is_intact(saved, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(saved, directory)
    for step in ("1", "2"):
        lose_the_record(directory / step)
    with pytest.raises(CheckpointError):
        restore(directory)
    assert sorted(p.name for p in directory.iterdir()) == ["1", "2"]


def foreign(directory: Path) -> set[str]:
    """Names that are numbers, numbers of other alphabets, links, things of other programs."""
    (directory / "99").mkdir()
    (directory / "98").write_text("a file")
    (directory / "097").mkdir()
    (directory / "٩٦").mkdir()
    (directory / "95").symlink_to("nowhere")
    (directory / "94" / "weights").mkdir(parents=True)
    (directory / "latest").symlink_to("2")
    (directory / "7.damaged").mkdir()
    return {"99", "98", "097", "٩٦", "95", "94", "latest", "7.damaged"}


def test_what_is_not_ours_neither_stops_a_save_nor_is_deleted(saved, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(saved, directory)
    names = foreign(directory)
    said: list[str] = []
    checkpoints = Checkpoints(directory, keep=1, warn=said.append)
    assert checkpoints.restore(lambda _: abstract(mesh(1, 1, 1)), said.append)[1] == 2 and not said
    for step in (3, 4):
        checkpoints.save(step, place(values(step), mesh(1, 1, 1)), eval_loss=None)
    assert checkpoints.finish() == [4]
    assert {p.name for p in directory.iterdir()} == names | {"4"}
    for step in (94, 95, 98, 99):  # training comes by
        checkpoints.save(step, place(values(step), mesh(1, 1, 1)), eval_loss=None)
        assert checkpoints.finish() == [step]
        assert f"{step} in {directory} was set aside as {step}.foreign" in said[-1]
    checkpoints.close()
    assert (directory / "94.foreign" / "weights").is_dir() and (directory / "98.foreign").read_text() == "a file"


def test_what_a_kill_left_of_a_save_or_a_deletion_goes_and_is_no_step(saved, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(saved, directory)
    for name in ("3.orbax-checkpoint-tmp", "1.deleted"):
        shutil.copytree(directory / "2", directory / name)
    checkpoints = Checkpoints(directory)
    assert sorted(p.name for p in directory.iterdir()) == ["1", "2"] and checkpoints.steps() == [1, 2]


@pytest.mark.parametrize("part", ["state", "record"])
def test_a_step_that_is_being_deleted_is_none(tmp_path, monkeypatch, part):
    """The deletion is interrupted when a part of it is done."""
    for step in (1, 2):
        for folder in ("state", "record"):
            (tmp_path / str(step) / folder).mkdir(parents=True)
    rmtree = shutil.rmtree

    def interrupted(path: Path) -> None:
        rmtree(path / part)
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        steps.rotate(tmp_path, 1, 0)
    assert list(steps.committed(tmp_path)) == [2]


def test_poll_and_finish_tell_what_is_on_the_disk(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    assert checkpoints.poll() == checkpoints.finish() == []
    for step in (1, 2):
        checkpoints.save(step, place(values(step), mesh(1, 1, 1)), eval_loss=None)
        while not (found := checkpoints.poll()):
            pass
        assert found == list(range(1, step + 1)) and checkpoints.poll() == []
    shutil.rmtree(tmp_path / "checkpoints" / "2")
    assert checkpoints.finish() == [1]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_best_step_is_one_whose_loss_is_a_number(tmp_path, bad):
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=1)
    for step, loss in enumerate([bad, 3.0, 2.0, bad, bad], start=1):
        checkpoints.save(step, place(values(step), mesh(1, 1, 1)), eval_loss=loss)
    assert checkpoints.finish() == [3, 5]


def test_the_best_step_of_a_run_begun_before_records_had_losses_stays(saved, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(saved, directory)
    for step, loss in ((1, 1.0), (2, 2.0)):
        record = steps.read_record(directory / str(step))
        assert record
        del record["eval_loss"], record["facts"]
        for copy in steps.COPIES:
            (directory / str(step) / "record" / copy).write_text(Record(record).text)
        (directory / str(step) / "metrics").mkdir()
        (directory / str(step) / "metrics" / "metrics").write_text(json.dumps({"eval_loss": loss}))
    checkpoints = Checkpoints(directory, keep=1)
    checkpoints.save(3, place(values(3), mesh(1, 1, 1)), eval_loss=None)
    assert checkpoints.finish() == [1, 3] and checkpoints.facts() == {}


def test_facts_are_read_without_a_restore(saved, tmp_path):
    directory = tmp_path / "checkpoints"
    shutil.copytree(saved, directory)
    checkpoints = Checkpoints(directory)
    checkpoints.save(3, place(values(3), mesh(1, 1, 1)), eval_loss=None, facts={"data": "0f", "tokens": 2**70})
    checkpoints.finish()
    assert Checkpoints(directory).facts() == {"data": "0f", "tokens": 2**70}
    (directory / "3" / "record" / steps.COPIES[0]).write_text("{")
    assert Checkpoints(directory).facts()["data"] == "0f"


def test_a_run_whose_last_step_has_vanished_does_not_say_that_it_is_saved(tmp_path, monkeypatch, capsys):
    """Another program deletes it as soon as it is there."""
    finish = Checkpoints.finish

    def vanishing(self) -> list[int]:
        finish(self)
        shutil.rmtree(tmp_path / "checkpoints" / "2", ignore_errors=True)
        return finish(self)

    monkeypatch.setattr(Checkpoints, "finish", vanishing)
    options = ["--config.steps=2", "--config.sample.tokens=0", "--config.eval_batches=1", f"--workdir={tmp_path}"]
    assert train.run(["train.py", f"--config={helpers.ROOT}/configs/tiny.py", *options]) == 1
    out, err = capsys.readouterr()
    assert "step 2 is not among the checkpoints" in err and "complete" not in out


# ── digests ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_any_flipped_bit_changes_the_digest(dtype):
    rng = np.random.default_rng(0)
    x = (
        (rng.standard_normal((5, 7)) * 9 > 0)
        if dtype == "bool"
        else rng.standard_normal((5, 7)).astype(jnp.dtype(dtype))
    )
    of = jax.jit(digest)
    before = np.asarray(of(x))
    for _ in range(40):
        y = x.copy()
        flat = y.reshape(-1).view(np.uint8)
        flat[rng.integers(flat.size)] ^= 1 if dtype == "bool" else 1 << int(rng.integers(8))
        after = np.asarray(of(y))
        assert np.all(before != after), "each of the four sums sees each flip"


def test_swapped_elements_change_the_digest():
    x = np.arange(64, dtype=np.float32).reshape(8, 8)
    assert to_hex(digest(jnp.asarray(x))) != to_hex(digest(jnp.asarray(x.T)))


def test_the_digest_is_of_the_logical_array_whatever_the_mesh():
    sums = {
        sizes: {k: to_hex(v) for k, v in digest_all(named_arrays(place(values(3), mesh(*sizes)))).items()}
        for sizes in [(1, 1, 1), (1, 4, 2), (2, 2, 2), (1, 8, 1)]
    }
    assert len({json.dumps(s, sort_keys=True) for s in sums.values()}) == 1


def test_params_digest_sees_names_shapes_dtypes_and_bits():
    x = {"a": jnp.zeros(4), "b": jnp.zeros((2, 2))}
    digests = {
        params_digest(t)
        for t in (
            x,
            {"a": jnp.zeros(4), "c": jnp.zeros((2, 2))},
            {"a": jnp.zeros(4), "b": jnp.zeros((4, 1))},
            {"a": jnp.zeros(4, jnp.int32), "b": jnp.zeros((2, 2))},
            {"a": jnp.zeros(4), "b": -jnp.zeros((2, 2))},
        )
    }
    assert len(digests) == 5


def test_a_digest_gathers_nothing():
    from parallel.cost import wire

    x = jax.ShapeDtypeStruct((1024, 1024), np.float32, sharding=NamedSharding(mesh(1, 4, 2), P("fsdp", "tensor")))
    hlo = jax.jit(digest).lower(x).compile().as_text()
    assert sum(wire.per_axis(hlo, mesh(1, 4, 2)).values()) <= 256, (
        "sixteen bytes, added up over the mesh; a shard has half a megabyte"
    )

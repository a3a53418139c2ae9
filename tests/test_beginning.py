"""A run that begins with the parameters of another: the same bits on any mesh, its model, its tokenizer; and nothing
else of it."""

import json
import shutil
import signal
from pathlib import Path

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import train
from recipes import begin, methods, programs
from recipes.compare import Plan
from runtime import config as configuration
from runtime import steps
from runtime.checkpoint import CheckpointError, Checkpoints, load_params
from runtime.config import UsageError
from runtime.digest import named_arrays, params_digest
from runtime.steps import read_record
from runtime.workdir import Workdir

TINY = f"--config={helpers.ROOT}/configs/tiny.py"
SHORT = [TINY, "--config.steps=2", "--config.sample.tokens=0", "--config.checkpoint.every=1"]


def summary(workdir: Path) -> dict:
    return json.loads((workdir / "summary.json").read_text())


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


def run(*options: str) -> int:
    before = signal.getsignal(signal.SIGTERM)
    try:
        return train.run(["train.py", *options])
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    """The workdir of a run of one layer, and of words that were learnt from its text."""
    folder = tmp_path_factory.mktemp("origin")
    (folder / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 800)
    own = ["--config.data.tokenizer=bpe", "--config.data.vocab_size=320", "--config.model.num_layers=1"]
    assert run(*SHORT, f"--workdir={folder}/first", f"--config.data.path={folder}/a.txt", *own) == 0
    return folder / "first"


@pytest.fixture(scope="module")
def second(first) -> tuple[Path, list[str]]:
    """A run that began with the first one's parameters, on other text; and its command."""
    folder = first.parent
    (folder / "b.txt").write_text("some other text about nothing at all, of another kind. " * 900)
    options = [*SHORT, f"--workdir={folder}/second", f"--config.data.path={folder}/b.txt"]
    options += [f"--config.init.workdir={first}", "--config.checkpoint.every=2"]
    assert run(*options) == 0
    return folder / "second", options


@pytest.fixture
def spoiled(first, tmp_path) -> Path:
    """A copy of the first run, to spoil."""
    return Path(shutil.copytree(first, tmp_path / "spoiled"))


@pytest.fixture(scope="module")
def parts(first):
    """Of a run from the first one, on a mesh that is not its own."""
    return helpers.build(configuration.read_json(first), (2, 2, 2))


def params_alone(folder: Path, first: Path, parts) -> Path:
    """A workdir of parameters only."""
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(first / name, folder)
    params = load_params(first / "checkpoints", parts.state.params, pytest.fail).params
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(7, {"params": params}, None)
    checkpoints.close()
    return folder


def digests(step: Path) -> dict[str, str]:
    record = read_record(step)
    assert record
    return {name: x["digest"] for name, x in record["arrays"].items()}


# ── what is taken ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_a_run_begins_with_the_parameters_of_the_newest_step_and_an_optimizer_of_its_own(first, second):
    begun, theirs = (digests(path) for path in (second[0] / "checkpoints" / "0", first / "checkpoints" / "2"))
    params = [name for name in theirs if name.startswith("params/")]
    assert params and all(begun[name] == theirs[name] for name in params)
    moments = [name for name in theirs if name.endswith(("/first", "/second"))]
    assert moments and all(begun[name] != theirs[name] for name in moments)
    assert summary(second[0])["init"] == {
        "workdir": str(first), "step": 2, "params_digest": summary(first)["params_digest"],
    }  # fmt: skip
    assert [start["restored_step"] for start in summary(second[0])["starts"]] == [None]


@pytest.mark.slow
def test_it_has_the_model_and_the_tokenizer_of_the_other_run(first, second):
    ours, theirs = (configuration.read_json(path) for path in (second[0], first))
    assert ours.model == theirs.model and ours.model.num_layers == 1
    assert (ours.data.tokenizer, ours.data.vocab_size) == ("bpe", 320)
    assert (second[0] / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()
    record = json.loads((second[0] / "data.json").read_text())
    assert [file[0] for file in record["sources"][0]["files"]] == ["b.txt"]


@pytest.mark.slow
def test_the_same_command_goes_on_when_the_other_run_is_gone(first, second, tmp_path, capsys):
    workdir, options = second
    moved = first.rename(tmp_path / "moved")
    try:
        assert run(*options, "--config.data.tokenizer=bpe", "--config.steps=3") == 0
    finally:
        moved.rename(first)
    out = capsys.readouterr().out
    assert "resuming from step 2" in out and "config changed" in out
    assert str(first) not in out and "init.workdir" not in out, "its own checkpoint counts"
    assert [start["restored_step"] for start in summary(workdir)["starts"]] == [None, 2]
    assert "init" in summary(workdir)


def test_parameters_are_the_same_bits_on_another_mesh(first, parts):
    given = load_params(first / "checkpoints", parts.state.params, pytest.fail)
    assert given.step == 2
    for ours, abstract in zip(jax.tree.leaves(given.params), jax.tree.leaves(parts.state.params), strict=True):
        assert ours.sharding == abstract.sharding
    assert given.digest == params_digest(given.params) == summary(first)["params_digest"]


SMALL = {"model_dim": 8, "num_heads": 2, "num_kv_heads": 2, "head_dim": 4, "mlp_dim": 8}
STATES = {
    "sync": {"sync__codec": "int4"},
    "stale": {"sync__staleness": 2, "sync__compensation": 0.1},
    "diloco": {},
    "eager": {"sync__interval": 4},
    "streaming": {"sync__interval": 4, "sync__outer__optimizer": "adam"},
}
assert STATES.keys() == methods.STRATEGIES.keys()


@pytest.mark.parametrize(
    "strategy", [name if name in ("sync", "diloco") else pytest.param(name, marks=pytest.mark.slow) for name in STATES]
)
def test_the_state_of_every_strategy_is_made_from_the_given_parameters(strategy):
    """As from drawn ones: each replica's copy, and whatever else a strategy makes of them."""
    model = {f"model__{key}": value for key, value in SMALL.items()}
    parts = helpers.build(helpers.tiny(sync__strategy=strategy, **STATES[strategy], **model), (2, 2, 1))
    drawn = programs.compile_init(parts)(np.uint32(1))
    given = programs.compile_init(parts, given=True)(jax.tree.map(jnp.copy, drawn.params))
    ours, theirs = (named_arrays(jax.device_get(state)) for state in (given, drawn))
    assert ours.keys() == theirs.keys()
    for name, x in theirs.items():
        np.testing.assert_array_equal(ours[name], x, err_msg=name)


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("key", "typed", "theirs"),
    [("model.num_layers", 2, 1), ("data.vocab_size", 512, 320), ("data.tokenizer", "bytes", "bpe")],
)
def test_another_value_that_is_typed_is_refused_by_its_key(first, tmp_path, capsys, key, typed, theirs):
    options = [TINY, f"--workdir={tmp_path}/new", f"--config.init.workdir={first}", f"--config.{key}={typed}"]
    assert run(*options) == 2
    error = capsys.readouterr().err
    assert f"--config.{key}={typed} is typed, and init.workdir={first} holds a run with {theirs}" in error
    assert not (tmp_path / "new").exists()


def origin(folder: Path, **values) -> str:
    (folder / "config.json").write_text(helpers.tiny(**values).to_json())
    return f"--config.init.workdir={folder}"


def parsed(*options: str):
    return methods.parse(["train.py", *options], "")


def test_every_key_that_parameters_and_ids_depend_on_is_taken_and_no_other(tmp_path):
    """A learned position has a row for each token of the window."""
    for position, length in (("rope", 32), ("learned", 64)):
        option = origin(tmp_path, model__position=position, model__mlp_dim=256, data__seq_len=64, optimizer__lr=0.5)
        config, flags = parsed(TINY, option)
        assert (config.model.mlp_dim, config.model.position) == (256, position)
        assert (config.data.seq_len, config.optimizer.lr) == (length, 1e-3)
        (note,) = flags.notes
        assert note.startswith(f"as in {tmp_path}") and "model.mlp_dim=256 (not 128)" in note, "nothing silent"
    with pytest.raises(UsageError, match="data.seq_len=128 is typed"):
        parsed(TINY, option, "--config.data.seq_len=128")
    config, flags = parsed(TINY, option, "--config.model.mlp_dim=256")  # the same value may be typed
    assert config.model.mlp_dim == 256


def test_a_run_that_has_begun_has_its_own_values(tmp_path):
    """Whatever became of the other run since: another one in its place, say."""
    (tmp_path / "own").mkdir()
    origin(tmp_path / "own", model__mlp_dim=64)
    options = [TINY, origin(tmp_path, model__mlp_dim=256), f"--workdir={tmp_path}/own"]
    config, flags = parsed(*options)
    assert config.model.mlp_dim == 64 and flags.notes == []
    config, _ = parsed(*options, "--config.model.mlp_dim=512")
    with pytest.raises(UsageError, match="model.mlp_dim: 64 in config.json, 512 now"):
        configuration.check_resume(configuration.read_json(tmp_path / "own"), config)


def test_a_folder_without_a_run_or_a_run_without_a_checkpoint_cannot_be_started_from(tmp_path, capsys, monkeypatch):
    """Before anything is compiled."""
    monkeypatch.setattr(programs, "compile_steps", lambda parts: 1 / 0)
    with pytest.raises(UsageError, match=f"init.workdir={tmp_path}: there is no config.json"):
        parsed(TINY, f"--config.init.workdir={tmp_path}")
    assert run(TINY, origin(tmp_path), f"--workdir={tmp_path}/new") == 2
    assert f"init.workdir={tmp_path}: this run has no checkpoint" in capsys.readouterr().err


def test_a_tokenizer_that_was_trained_and_not_kept_is_not_trained_anew(spoiled, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(programs, "compile_steps", lambda parts: None)
    (spoiled / "tokenizer.json").unlink()
    assert run(TINY, f"--config.init.workdir={spoiled}", f"--workdir={tmp_path}/new") == 2
    assert f"data.tokenizer: {spoiled} has no tokenizer.json" in capsys.readouterr().err


def test_a_comparison_does_not_start_from_a_run(tmp_path):
    file = tmp_path / "rows.py"
    text = (helpers.ROOT / "configs" / "compare" / "quickstart.py").read_text()
    file.write_text(text.replace("    return c", f"    c.init.workdir = {str(tmp_path)!r}\n    return c"))
    with pytest.raises(UsageError, match=r"sets init\.workdir"):
        Plan.read(str(file), "")


# ── parameters only ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_workdir_of_parameters_only_can_be_started_from_and_not_resumed(first, parts, tmp_path, capsys):
    folder = params_alone(tmp_path / "only", first, parts)
    before = contents(folder)
    assert run(f"--workdir={folder}") == 2
    assert (
        f"{folder} holds parameters only: start a new run from it with --config.init.workdir={folder}"
        in capsys.readouterr().err
    )
    assert set(contents(folder)) - set(before) <= {folder / "lock"}, "nothing but its lock was written"
    config, _ = parsed(TINY, f"--config.init.workdir={folder}")
    assert begin.origin(config, Workdir(tmp_path / "new", False, True)) == folder
    given = load_params(folder / "checkpoints", parts.state.params, pytest.fail)
    assert (given.step, given.digest) == (7, summary(first)["params_digest"])


# ── damage ───────────────────────────────────────────────────────────────────────────────────────────────────────


def flip_all_over(step: Path) -> None:
    data = max((p for p in (step / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = np.frombuffer(data.read_bytes(), np.uint8).copy()
    content[::256] ^= 1
    data.write_bytes(content.tobytes())


def lose_the_record(step: Path) -> None:
    shutil.rmtree(step / "record")


@pytest.mark.parametrize("damage", [flip_all_over, lose_the_record])
def test_a_damaged_newest_step_is_named_and_the_one_before_it_taken(spoiled, parts, damage):
    checkpoints, warnings = spoiled / "checkpoints", []
    theirs = digests(checkpoints / "1")
    damage(checkpoints / "2")
    before = contents(spoiled)
    given = load_params(checkpoints, parts.state.params, warnings.append)
    assert given.step == 1 and given.digest != summary(spoiled)["params_digest"]
    assert len(warnings) == 1 and warnings[0].startswith(f"{spoiled}: checkpoint step 2 is corrupt: ")
    again = Checkpoints(spoiled.parent / "again")
    again.save(1, {"params": given.params}, None)
    again.close()
    assert digests(spoiled.parent / "again" / "1").items() <= theirs.items()
    assert contents(spoiled) == before, "the other run is only read"
    damage(checkpoints / "1")
    with pytest.raises(CheckpointError, match="no checkpoint has intact parameters") as error:
        load_params(checkpoints, parts.state.params, warnings.append)
    assert "step 2" in str(error.value) and "step 1" in str(error.value)


def test_a_step_that_its_run_deletes_meanwhile_is_not_called_damaged(spoiled, parts, monkeypatch):
    lists = iter([[1, 2, 9], [1, 2]])
    monkeypatch.setattr(steps, "to_start_from", lambda *_: next(lists))
    assert load_params(spoiled / "checkpoints", parts.state.params, pytest.fail).step == 2


def test_parameters_of_another_model_than_config_json_says_are_listed(first):
    other = helpers.build(helpers.tiny(data__vocab_size=320), (2, 2, 2))
    with pytest.raises(UsageError, match="params/blocks/attention/k: .1, 64, 8, 8. float32 in the checkpoint, .2, 64"):
        load_params(first / "checkpoints", other.state.params, pytest.fail)

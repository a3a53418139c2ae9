"""slackline.py, the Python door: what the command line makes, to the bit; the page docs/python.md, block by block."""

import json
import re
import subprocess
import sys

import helpers
import jax
import numpy as np
import pytest

import slackline as sl
from parallel.exchange.codecs.quantized import Int4
from parallel.strategies.local import DiLoCo
from recipes import door
from runtime import config as configuration
from runtime.digest import named_arrays, params_digest
from runtime.metrics import read

PAGE = helpers.ROOT / "docs" / "python.md"
SMALL = {"steps": 8, "log_every": 1, "eval_every": 4, "eval_batches": 1, "sample": {"tokens": 0}}
DILOCO = {"strategy": "diloco", "codec": "int4", "interval": 4}
STREAMING = {"strategy": "streaming", "interval": 4}
MESH = {"replica": 2, "fsdp": 2, "tensor": 1}


class Mine(Int4):
    """A codec of a test's."""


class int4(Int4):
    """A codec of a test's that has its values already."""


class Yours(DiLoCo):
    """A strategy of a test's."""


def fit(workdir, **changes):
    return sl.fit("tiny", workdir=workdir, mesh=MESH, **SMALL | {"sync": DILOCO} | changes)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return fit(tmp_path_factory.mktemp("python") / "run")


@pytest.mark.slow
def test_losses_and_weights_are_the_command_line_s(whole, tmp_path):
    changes = configuration.flatten({"mesh": MESH, "sync": DILOCO, **SMALL})
    helpers.train(tmp_path / "run", *(f"--config.{key}={x}" for key, x in changes), simulate=4)
    rows = [row["loss"] for row in read(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    np.testing.assert_array_equal(np.array(rows, np.float32), whole.losses)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["params_digest"] == whole.summary["params_digest"] == params_digest(whole.params)
    assert summary["wire_bytes_per_step"] == whole.wire_bytes


@pytest.mark.slow
def test_ctrl_c_ends_at_the_border_of_a_call_and_the_same_call_goes_on(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(door.Interrupt, "requested", lambda self, step: step == 3)
        stopped = fit(tmp_path / "run")
    assert stopped.interrupted and len(stopped.losses) == 3 and "interrupted" in repr(stopped)
    gone_on = fit(tmp_path / "run")
    assert not gone_on.interrupted and len(gone_on.losses) == 5
    assert (stopped.step, gone_on.step, sl.open(tmp_path / "run").step) == (3, 8, 8) and "3 of 8" in repr(stopped)
    np.testing.assert_array_equal([*stopped.losses, *gone_on.losses], whole.losses)
    assert gone_on.summary["params_digest"] == whole.summary["params_digest"]


@pytest.mark.slow
def test_a_run_is_opened_on_another_mesh(whole):
    text = "def main():\n    return 1\n" * 20
    alone = sl.open(whole.workdir)
    assert alone.parts.mesh.size == 1 and params_digest(alone.params) == whole.summary["params_digest"]
    assert alone.evaluate(text).loss == pytest.approx(whole.evaluate(text).loss, rel=1e-5)
    assert whole.sample("def ", tokens=8, temperature=0) == alone.sample("def ", tokens=8, temperature=0)
    assert whole.plot()._repr_png_().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_loop_of_one_s_own_makes_the_same_updates(whole):
    updates = sl.steps("tiny", mesh=MESH, **SMALL, sync=DILOCO)
    losses = [float(np.mean(metrics["loss"])) for _, metrics in updates]
    np.testing.assert_allclose(losses, whole.losses, rtol=1e-6)
    assert updates.done == 8 and params_digest(updates.state.params) == whole.summary["params_digest"]


@pytest.mark.slow
def test_one_gradient_goes_through_a_round_codec_in_three_lines():
    """What is applied and what is owed add up to what was given, also where it is sent again with what is owed."""
    parts = sl.build("tiny", mesh=MESH, sync={"codec": "powersgd"})
    gradients = parts.gradients()
    mean, memory = parts.exchange(gradients)

    exact = jax.tree.map(lambda g_R: np.mean(jax.device_get(g_R), axis=0), gradients)
    twice, memory = parts.exchange(gradients, memory, step=1)
    owed = jax.tree.map(lambda e_R: np.mean(jax.device_get(e_R), axis=0), memory["worker"])
    given = jax.tree.map(lambda *x: sum(map(jax.device_get, x)), mean, twice, owed)
    jax.tree.map(lambda x, g: np.testing.assert_allclose(x, 2 * g, atol=2e-6), given, exact)
    left_out = max(jax.tree.leaves(jax.tree.map(lambda m, g: np.abs(jax.device_get(m) - g).max(), mean, exact)))
    assert left_out > 1e-4 and parts.exchange_bytes > 0

    plain = sl.build("tiny", mesh=MESH)
    wanted = helpers.first_gradients(plain.config, plain.parts)
    found, _ = plain.exchange(plain.gradients())
    for name, x in named_arrays(found).items():
        np.testing.assert_allclose(x, wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_plot_shows_what_counting_letters_achieves(whole):
    """As plots/loss.png does: in nats per token, which of bytes are ln 2 times the bits."""
    labels = [text.get_text() for text in whole.plot().figure.axes[0].texts]
    bits = whole.summary["bigram_bits_per_byte"]
    assert f"bigram  {bits * np.log(2):.3f}" in labels and any(label.startswith("unigram") for label in labels)


@pytest.mark.slow
def test_a_state_that_is_set_is_where_the_next_call_begins():
    updates = sl.steps("tiny", mesh={"fsdp": 2}, **SMALL)
    seen = []
    for state, _ in updates:
        seen.append(int(state.step))
        if updates.done == 2:
            updates.state = type(state)(**vars(state) | {"step": state.step + 100})
    assert seen == [1, 2, *range(103, 109)]


@pytest.mark.slow
def test_objects_stand_where_the_config_has_names(whole, tmp_path):
    """A codec and a strategy that equal registered ones make the same run; the workdir keeps what they were."""
    own = {"strategy": Yours, "codec": Mine(), "interval": 4}
    run = fit(tmp_path / "run", sync=own, steps=8)
    np.testing.assert_array_equal(run.losses, whole.losses)
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert kept["sync"]["codec"] == "Mine" and kept["sync"]["strategy"] == "Yours"
    assert kept["objects"]["sync.codec"]["class"].endswith("test_python.Mine")
    assert kept["objects"]["sync.codec"]["fields"] == {"block": "128", "stochastic": "False"}
    done = helpers.run_here(tmp_path / "run", check=False, config=None)
    assert done.returncode == 2 and "test_python.Mine" in done.stderr and "slackline.fit" in done.stderr


@pytest.mark.slow
def test_an_object_that_has_changed_is_said(tmp_path, capsys):
    fit(tmp_path / "run", sync=DILOCO | {"codec": Mine()})
    capsys.readouterr()
    fit(tmp_path / "run", sync=DILOCO | {"codec": Mine(block=64)})
    assert "sync.codec: test_python.Mine is not what this run was made with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda: sl.fit("tinny"), ["config='tinny'", "tiny", "quickstart"]),
        (lambda: sl.fit(3), ["config=3", "ConfigDict"]),
        (lambda: sl.fit("tiny", step=3), ["'step'", "did you mean 'steps'"]),
        (lambda: sl.fit("tiny", steps="many"), ["steps='many'", "an integer"]),
        (lambda: sl.fit("tiny", mesh={"fsdp": 3}, simulate=8), ["fsdp=3", "data.batch_size"]),
        (lambda: sl.fit("tiny", sync={"codec": object()}), ["sync.codec=<object", "BlockCodec", "add-a-method"]),
        (lambda: sl.fit("tiny", sync={"codec": Mine}), ["sync.codec=<class", "an object of a class"]),
        (lambda: sl.fit("tiny", sync={"strategy": object}), ["sync.strategy=<class 'object'>", "Strategy"]),
        (lambda: sl.fit("tiny", mesh={"replica": 2}, sync={"codec": int4(), "block": 64}), ["sync.block=64", "read"]),
        (lambda: sl.fit("tiny", sync={"staleness": 2}), ["sync.staleness=2 is not read"]),
        (lambda: sl.fit("tiny", workdir="gs://bucket/run"), ["workdir=gs://bucket/run", "not supported"]),
        (lambda: sl.open("/"), ["workdir=/", "config.json"]),
        (lambda: sl.build("tiny", mesh={"replica": 2}).exchange({"embed": np.zeros(3)}), ["blocks", "found nothing"]),
        (lambda: sl.build("tiny", mesh={"replica": 2}, sync=STREAMING).exchange({}), ["Streaming exchanges", "=sync"]),
        (lambda: sl.compare("tiny", rows=[], seeds=[0, 1, 2]), ["ROWS is empty", "baseline"]),
        (lambda: sl.compare("tiny", rows=[{"name": "a", "change": {}}], seeds=[0, 1, 2]), ["'change'", "changes"]),
        (lambda: sl.compare("tiny", rows=[{"name": "a", "changes": {}}], seeds=[0, 1]), ["SEEDS=(0, 1)", "3 seeds"]),
    ],
)
def test_what_is_wrong_is_one_sentence(call, parts):
    with pytest.raises(sl.UsageError) as error:
        call()
    assert all(part in str(error.value) for part in parts), error.value
    assert error.value._render_traceback_() == [f"UsageError: {error.value}"]


@pytest.mark.slow
def test_a_folder_is_no_run_and_a_run_without_a_checkpoint_is_none(whole, tmp_path):
    (tmp_path / "config.json").write_bytes((whole.workdir / "config.json").read_bytes())
    with pytest.raises(sl.UsageError, match="no checkpoint"):
        sl.open(tmp_path)


@pytest.mark.slow  # a process of its own: the page begins with devices that nobody has asked for
def test_every_block_of_the_page_runs(tmp_path):
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 7
    code = f"import sys; sys.path.insert(0, {str(helpers.ROOT)!r})\n" + "\n".join(blocks)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "runs" / "first" / "plots" / "loss.png").exists() and "5 [" in done.stdout


@pytest.mark.slow  # a process of its own, whose devices are made anew
def test_devices_are_made_anew_and_arrays_from_before_stay_readable(tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(helpers.ROOT)!r})
import jax, jax.numpy as jnp, numpy as np
before = jnp.arange(3); assert len(jax.devices()) == 1
import slackline as sl
for mesh in ({{"fsdp": 2}}, {{"replica": 4}}, {{"tensor": 2}}):
    for state, metrics in sl.steps("tiny", steps=2, mesh=mesh): pass
    assert np.isfinite(metrics["loss"]).all() and state.params["embed"].sharding.mesh.size in (2, 4)
assert before.tolist() == [0, 1, 2] and len(jax.devices()) == 4
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]

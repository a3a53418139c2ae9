"""Tasks of a caller's: any loss and any small model, under every strategy, through the Python door."""

import ast
import dataclasses
import json

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import slackline as sl
from data.arrays import ArrayLoader, Arrays
from examples import textbook
from parallel.exchange.codecs import CODECS
from parallel.exchange.codecs.quantized import Int4
from recipes import compare as comparing
from recipes import door, methods, objects
from recipes.runner import Runner
from runtime import config as configuration
from runtime.digest import named_arrays

FEATURES, LAYERS = 8, 4
BASE = {"steps": 8, "log_every": 1, "eval_every": 4, "data": {"batch_size": 16}, "guard": {"zscore": 0.0}}
MESH = {"replica": 2, "fsdp": 2, "tensor": 1}


def init(key):
    blocks, out = jax.random.split(key)
    blocks = {
        "gain": jnp.ones((LAYERS, FEATURES)),
        "weight": jax.random.normal(blocks, (LAYERS, FEATURES, FEATURES)) / 4,
        "bias": jnp.zeros((LAYERS, FEATURES)),
    }
    return {"blocks": blocks, "out": jax.random.normal(out, (FEATURES,)), "shift": jnp.zeros(())}


AXES = {
    "blocks": {"gain": ("layers", "mlp"), "weight": ("layers", "embed", "mlp"), "bias": ("layers", "mlp")},
    "out": ("embed",),
    "shift": (),
}


def loss(params, batch, constrain):
    """Squared error, each example with a weight of its own."""

    def layer(x_BD, block):
        return x_BD + block["gain"][None] * jnp.tanh(x_BD @ block["weight"] + block["bias"][None]), None

    x_BD, _ = jax.lax.scan(layer, batch["x"], params["blocks"])
    error_B = x_BD @ params["out"] + params["shift"] - batch["y"]
    return jnp.sum(batch["weight"] * error_B**2), weight(batch), {"off": jnp.sum(batch["weight"] * jnp.abs(error_B))}


def weight(batch):
    return batch["weight"].sum()


def examples(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, FEATURES))
    return {"x": x, "y": x.sum(axis=1), "weight": rng.random(count) / 100}  # so that a batch's are less than 1


@pytest.fixture(scope="module")
def task():
    return sl.Task(init, AXES, loss, weight, examples(64), examples(20, seed=1))


# ── what is no language ───────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_in_parallel_names_a_key_of_a_batch():
    keys = set(helpers.build(helpers.tiny(data__document_mask=True), (1, 1, 1)).task.row)
    assert keys >= {"tokens", "targets", "mask", "segments"}
    for file in sorted((helpers.ROOT / "parallel").rglob("*.py")):
        named = {node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant)}
        assert not keys & {x for x in named if isinstance(x, str)}, file


def test_a_loss_is_the_mean_by_weight_over_all_replicas_and_micro_steps(task):
    """Of weights that are no whole numbers, and less than 1 together: two losses, and the step of SGD between them."""
    plain = textbook.PLAIN | {"data": {"batch_size": 16}, "steps": 2, "seed": 3}
    plain["optimizer"] = plain["optimizer"] | {"accumulate": 2, "lr": 0.01}
    updates = sl.steps("base", task=task, mesh={"replica": 2, "fsdp": 2, "tensor": 1}, **plain)
    rows = [updates.loader.rows(step, slice(None)) for step in range(2)]
    params = jax.device_get(updates.state.params)
    found = {name: [] for name in ("loss", "off", "weight")}
    for _, metrics in updates:
        for name, values in found.items():
            values.append(float(metrics[name][0]))
    of_one_device = jax.jit(jax.value_and_grad(with_rest, has_aux=True))
    for step, batch in enumerate(rows):
        (total, parts), gradient = jax.device_get(of_one_device(params, batch))
        n, off = float(parts[0]), float(parts[1]["off"])
        assert n < 1 and found["weight"][step] == pytest.approx(n, rel=1e-5)
        assert found["loss"][step] == pytest.approx(float(total) / n, rel=1e-5)
        assert found["off"][step] == pytest.approx(off / n, rel=1e-5)
        params = jax.tree.map(lambda w, g: w - 0.01 * g / n, params, gradient)  # noqa: B023


def with_rest(params, batch):
    total, *rest = loss(params, batch, None)
    return total, rest


@pytest.mark.slow
def test_a_gradient_of_a_task_goes_through_an_exchange_by_itself():
    made = textbook.binary(40)
    built = sl.build("base", task=made, mesh={"replica": 2}, **textbook.PLAIN | {"data": {"batch_size": 8}})
    gradients = jax.device_get(built.gradients())
    mean, _ = built.exchange(gradients)
    rows = built.loader().rows(0, slice(None))
    params = jax.device_get(jax.jit(made.init)(jax.random.key(0)))
    exact = jax.jit(jax.grad(lambda params: made.loss(params, rows, None)[0] / 8))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), mean, exact)


@pytest.mark.parametrize("name", ["digits", pytest.param("binary", marks=pytest.mark.slow)])
def test_8_replicas_train_like_1(name):
    rng = np.random.default_rng(0)
    made = textbook.binary() if name == "binary" else textbook.digits(
        rng.integers(0, 256, (1200, 784)), rng.integers(0, 10, 1200)
    )  # fmt: skip
    one, eight = (
        [float(m["loss"][0]) for _, m in sl.steps("base", task=made, steps=24, mesh={"replica": R}, **textbook.PLAIN)]
        for R in (1, 8)
    )
    assert one[-1] < one[0] and np.max(np.abs(np.subtract(one, eight))) <= 5e-6


def test_every_epoch_has_every_example_once_in_an_order_of_its_own_whoever_asks():
    loader = lambda seed, batch_size: ArrayLoader({"x": np.arange(40)}, batch_size=batch_size, seed=seed)
    read = lambda loader, steps: np.concatenate([loader.rows(step, slice(None))["x"] for step in range(steps)])
    first, second = read(loader(0, 8), 10).reshape(2, 40)
    assert sorted(first) == sorted(second) == list(range(40)) and (first != second).any()
    assert (read(loader(0, 16), 5) == [*first, *second]).all() and (read(loader(1, 8), 5) != first).any()
    assert loader(0, 8).rows(3, [2, 5])["x"].tolist() == [first[26], first[29]]


def test_what_is_held_out_and_not_read_is_said():
    said = lambda rows: dict(Arrays(examples(64), examples(20)).describe(128, rows))["  examples"]
    assert "2 epochs; 20 held out, of which 4 are not read" in said(16) and said(4).endswith("20 held out")


# ── a run ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def whole(task, tmp_path_factory):
    return fit(task, tmp_path_factory.mktemp("task") / "run")


def fit(task, workdir, **changes):
    return sl.fit("base", task=task, workdir=workdir, mesh=MESH, **BASE | changes)


def test_a_run_of_a_task_keeps_and_says_what_it_has_and_nothing_of_text(task, whole, capsys):
    row, summary = whole.metrics[-2], whole.summary
    assert row["examples"] == 8 * 16 and row["off"] > 0 and not {"tokens", "tokens_per_second"} & row.keys()
    assert summary["final_eval_off"] > 0 and not any("bits" in key or "tokens" in key for key in summary)
    files = {path.name for path in whole.workdir.iterdir()}
    assert files >= {"config.json", "plots", "checkpoints"} and not files & {
        "tokenizer.json",
        "data.json",
        "samples.txt",
    }
    assert whole.plot()._repr_png_().startswith(b"\x89PNG")
    found = whole.evaluate(dict(task.eval_data))
    assert found.loss == summary["final_eval_loss"] and found.values()["off"] == summary["final_eval_off"]
    rows = {name: x[:20] for name, x in task.eval_data.items()}
    total, rest = jax.jit(with_rest)(jax.device_get(whole.params), rows)
    assert found.loss == pytest.approx(float(total / rest[0]), rel=1e-5)
    with pytest.raises(sl.UsageError, match="no text"):
        whole.sample("def ")


def test_a_run_of_a_task_is_opened_with_it(task, whole):
    alone = sl.open(whole.workdir, task=task)
    assert alone.parts.mesh.size == 1 and alone.evaluate(task.eval_data).loss == pytest.approx(
        whole.summary["final_eval_loss"]
    )
    with pytest.raises(sl.UsageError, match="pass task= again") as error:
        sl.open(whole.workdir)
    assert "test_task.init" in str(error.value) and "test_task.loss" in str(error.value)
    with pytest.raises(sl.UsageError, match="pass task= again"):
        sl.fit("base", workdir=whole.workdir)
    done = helpers.run_here(whole.workdir, check=False, config=None)
    assert done.returncode == 2 and "slackline.fit" in done.stderr and "Task" in done.stderr


def test_config_json_says_which_task_it_was(task, whole):
    kept = json.loads((whole.workdir / "config.json").read_text())["objects"]["task"]
    assert kept["class"] == "recipes.task.Task" and kept["fields"]["loss"] == "test_task.loss"
    other = dataclasses.replace(task, loss=lambda params, batch, constrain: loss(params, batch, constrain))
    same = sl.Task(init, AXES, loss, weight, examples(64, seed=9), examples(20))
    assert described(task) == described(same) == kept and described(other)["source"] != kept["source"]


def described(task):
    return door.configure("base", {"task": task}).own.describe()["task"]


# ── what is wrong ─────────────────────────────────────────────────────────────────────────────────────────────────


def wrong(**changes):
    made = {"init": init, "axes": AXES, "loss": loss, "weight": weight, "data": examples(8), "eval_data": examples(8)}
    return lambda: sl.Task(**made | changes)


def without(name):
    return {key: x for key, x in AXES.items() if key != name}


@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (wrong(init=3), ["init=3", "function"]),
        (wrong(weight=None), ["weight=None", "function"]),
        (wrong(data=np.zeros(3)), ["data", "ndarray", "dictionary"]),
        (wrong(data={}), ["data", "dictionary"]),
        (wrong(data=examples(8) | {"y": np.zeros(9)}), ["data", "'y': 9"]),
        (wrong(data=examples(8) | {"y": np.array(["a"] * 8)}), ["data['y']", "numbers"]),
        (wrong(eval_data={"x": np.zeros((3, FEATURES))}), ["eval_data", "rows"]),
        (wrong(init=lambda key: jnp.zeros(3)), ["init", "dictionary"]),
        (wrong(init=lambda key: {"a": [jnp.zeros(3)]}), ["a/0", "dictionaries"]),
        (wrong(init=lambda key: {"count": jnp.zeros(3)}), ["'count'"]),
        (wrong(init=lambda key: {"a": jnp.zeros(3, jnp.int32)}), ["a as int32", "float32"]),
        (wrong(axes=without("out")), ["axes of out", "(8,)", "embed"]),
        (wrong(axes=AXES | {"out": ("model",)}), ["axes of out", "'model'", "embed"]),
        (wrong(axes=AXES | {"out": ("embed", None)}), ["axes of out", "(8,)"]),
        (wrong(axes=AXES | {"more": (None,)}), ["axes has more"]),
        (wrong(loss=lambda params, batch, constrain: jnp.zeros(())), ["loss gives ()", "weight"]),
        (
            wrong(loss=lambda params, batch, constrain: (batch["y"], batch["weight"].sum())),
            ["loss gives ((2,)", "scalars"],
        ),
        (
            wrong(loss=lambda params, batch, constrain: (*loss(params, batch, constrain)[:2], {"loss": jnp.zeros(())})),
            ["'loss'", "metrics"],
        ),
        (wrong(weight=lambda batch: batch["weight"]), ["weight gives", "(2,)"]),
    ],
)
def test_a_task_that_does_not_fit_together_is_one_sentence(call, parts):
    says(call, parts)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"task": lambda: 0}, ["task=", "Task(init, axes, loss, weight, data, eval_data)"]),
        ({"model": {"num_layers": 3}}, ["model.num_layers=3", "task"]),
        ({"sample": {"tokens": 3}}, ["sample.tokens=3", "task"]),
        ({"data": {"seq_len": 3}}, ["data.seq_len=3", "task"]),
        ({"data": {"batch_size": 6}, "mesh": {"replica": 4}}, ["data.batch_size=6", "4 replicas"]),
        ({"task": wrong(eval_data=examples(7))(), "mesh": {"replica": 8}}, ["eval_data has 7", "8 at a time"]),
        ({"mesh": {"fsdp": 3}, "data": {"batch_size": 6}}, ["blocks/weight", "'embed' of size 8", "mesh.fsdp=3"]),
        ({"mesh": {"stage": 2}}, ["mesh.stage=2: layers are cut over it", "a task of your own", "leave it at 1"]),
        ({"mesh": {"context": 2}}, ["mesh.context=2: sequences are cut over it", "a task of your own"]),
        (
            {"mesh": {"replica": 2}, "sync": {"strategy": "streaming", "fragments": 3, "interval": 6}, "steps": 6},
            ["sync.fragments=3", "model.num_layers=4"],
        ),
        (
            {"mesh": {"replica": 2}, "sync": {"exchange": "backward"}},
            ["sync.exchange=backward", "a task of your own", "sync.exchange=after"],
        ),
    ],
)
def test_a_call_with_a_task_that_does_not_fit_is_one_sentence(task, changes, parts):
    says(lambda: sl.build("base", **{"task": task} | changes), parts)


def test_streaming_needs_layers():
    plain = BASE | {"mesh": {"replica": 2}, "sync": {"strategy": "streaming", "fragments": 1, "interval": 4}}
    says(lambda: sl.build("base", task=textbook.binary(8), **plain), ["sync.strategy=streaming", "'blocks'", "layers"])


def says(call, parts):
    with pytest.raises(sl.UsageError) as error:
        call()
    assert all(part in str(error.value) for part in parts), error.value


# ── everything of a caller's at once ──────────────────────────────────────────────────────────────────────────────

STRATEGIES = {
    "sync": {},
    "stale": {"staleness": 1},
    "diloco": {"interval": 4},
    "eager": {"interval": 4},
    "streaming": {"interval": 4, "overlap": 1},
    "warm stale": {"staleness": 1, "warm_steps": 2},
}
OWN = {name: type(f"My_{name}", (methods.STRATEGIES[name.split()[-1]],), {}) for name in STRATEGIES}


class Coarse(Int4):
    """A codec of a test's."""


def schedule_free():
    """Chained, with two counts, moments, a state without arrays, and numbers that may be changed."""
    decaying = optax.inject_hyperparams(optax.scale)(step_size=lambda count: -0.01 / (1 + count))
    return optax.chain(optax.clip(1.0), optax.scale_by_adam(), optax.trace(0.5), decaying)


@pytest.mark.parametrize("name", [x if x == "sync" else pytest.param(x, marks=pytest.mark.slow) for x in STRATEGIES])
def test_a_codec_a_strategy_an_optimizer_and_a_loss_of_a_caller_s_train_and_go_on_to_the_same_bits(
    task, name, tmp_path, monkeypatch
):
    def run(workdir):
        sync = {"strategy": OWN[name], "codec": Coarse()} | STRATEGIES[name]
        return fit(task, tmp_path / workdir, sync=sync, optimizer=schedule_free())

    whole = run("whole")
    with monkeypatch.context() as patch:
        patch.setattr(door.Interrupt, "requested", lambda self, step: step == 4)
        assert run("stopped").step == 4
    again = run("stopped")
    np.testing.assert_array_equal(again.losses, whole.losses[4:])
    assert again.summary["params_digest"] == whole.summary["params_digest"]
    assert np.isfinite(whole.losses).all() and whole.wire_bytes["replica"] > 0
    assert not any("lr" in row for row in whole.metrics)
    kept = json.loads((tmp_path / "whole" / "config.json").read_text())["objects"]
    assert kept.keys() == {"sync.codec", "sync.strategy", "optimizer", "task"}
    with pytest.raises(sl.UsageError, match="pass optimizer= again"):
        fit(task, tmp_path / "whole")
    own = whole.state.strategy.get("replicas")
    arrays = named_arrays(own["opt"] if own else whole.state.opt)
    assert {
        "1/count",
        "1/mu/blocks/weight",
        "1/nu/out",
        "2/trace/blocks/bias",
        "3/hyperparams/step_size",
    } <= arrays.keys()
    leading = ("replica",) if own else ()
    assert tuple(arrays["1/mu/blocks/weight"].sharding.spec) == (
        *leading,
        "stage",
        ("fsdp", "expert", "context"),
        "tensor",
    )


SIGNS = {"codec": "sign", "error_feedback": "off", "stochastic": True}
CATALOGUE = {name: ({"codec": name} | ({"rank": 1} if name == "powersgd" else {}), {}) for name in CODECS} | {
    name: (SIGNS if name == "signum" else {}, {"name": name}) for name in configuration.CHOICES["optimizer.name"]
}


@pytest.mark.parametrize("name", CATALOGUE)
def test_every_codec_and_every_optimizer_takes_a_model_that_is_no_language_model(task, name):
    """Traced, not compiled. One array has its layers, one is a vector, one a number."""
    sync, optimizer = CATALOGUE[name]
    spec = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    parts = sl.build("base", task=task, mesh=MESH, data={"batch_size": 16}, sync=sync, optimizer=optimizer).parts
    for program in parts.strategy.programs().values():
        state, metrics = jax.eval_shape(program, parts.state, parts.batch)
        assert spec(state) == spec(parts.state)
        assert metrics["off"].shape == (1,)


def test_an_optimizer_of_a_caller_s_is_the_config_s_where_it_is_the_same():
    made, base = textbook.binary(200), textbook.PLAIN | {"steps": 6, "mesh": {"replica": 2}}
    rate = optax.sgd(0.1)
    ours, theirs = (
        [float(m["loss"][0]) for _, m in sl.steps("base", task=made, **base | change)]
        for change in ({}, {"optimizer": rate})
    )
    assert ours == theirs


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"optimizer": 3}, ["optimizer=3", "init and update"]),
        ({"optimizer": optax.adafactor(0.1, min_dim_size_to_factor=4)}, ["v_row", "neither a number nor"]),
        ({"optimizer": optax.add_noise(0.1, 0.5, 0)}, ["rng_key", "neither a number nor"]),
        ({"optimizer": optax.scale_by_backtracking_linesearch(3)}, ["update(gradients, state, params) fails"]),
        (
            {"optimizer": optax.GradientTransformation(lambda p: (), lambda g, s, p: ({}, s))},
            ["updates of other shapes"],
        ),
        ({"optimizer": optax.sgd(0.1), "optimizer.lr": 0.3}, ["optimizer.lr=0.3 is not read", "optimizer.name=own"]),
        ({"optimizer": {"name": "own"}}, ["optimizer.name='own'", "adamw"]),
    ],
)
def test_an_optimizer_that_does_not_fit_is_one_sentence(task, changes, parts):
    says(lambda: sl.build("base", **{"task": task} | changes), parts)


# ── in a comparison ───────────────────────────────────────────────────────────────────────────────────────────────


def test_the_file_of_a_run_is_named_by_the_objects_of_its_row_too(task, tmp_path):
    def files(changes, **shared):
        asked = door.configure("base", {"sync": {"replicas": 2}, "eval_every": 10, **shared})
        plan = comparing.Plan.of(asked.config, [{"name": "a", "changes": changes}], range(3), own=asked.own)
        (row, *_) = jobs = plan.jobs()
        runner = Runner(tmp_path, [job for row in jobs for job in row])
        return [runner.file(job).name for job in row]

    plain = files({"sync.codec": "int4"})
    named = [plain]
    for codec in (Coarse(), Coarse(block=64), Int4()):
        named += [files({"sync.codec": codec})]
        assert files({"sync": {"codec": codec}}) == named[-1] == files({}, sync={"replicas": 2, "codec": codec})
    named += [files({"optimizer": optax.sgd(rate)}) for rate in (0.1, 0.2)]
    named += [files({"sync.codec": "int4"}, task=task, data={"batch_size": 16})]
    named += [files({"sync.strategy": OWN["stale"]}), files({"sync.strategy": OWN["sync"]})]
    assert files({"sync.codec": "int4"}, sync={"replicas": 2, "codec": Coarse()}) == plain, (
        "a name takes an object away"
    )
    assert len({name for names in named for name in names}) == 3 * len(named)


@pytest.mark.slow
def test_rows_of_a_comparison_hold_objects(tmp_path):
    rows = [
        {"name": "plain", "changes": {}},
        {"name": "own", "changes": {"sync.codec": Coarse(), "optimizer": optax.sgd(0.1)}},
    ]
    small = {"steps": 4, "eval_every": 4, "sync": {"replicas": 2}} | textbook.PLAIN
    task = textbook.binary(80)
    made = lambda: sl.compare("base", task=task, rows=rows, seeds=[0, 1, 2], workdir=tmp_path, **small)
    table = made()
    losses = {row["name"]: row["final_losses"] for row in table.rows}
    assert losses["own"] != losses["plain"]
    # Its weights begin at 0, and residuals are judged by the update relative to them: nothing is refused for that.
    assert max(losses["own"]) < 0.6 and all(row["skipped"] == [0, 0, 0] for row in table.rows)
    assert "160 examples" in repr(table) and "held out" in repr(table)
    assert repr(made()) == repr(table), "from the files"


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"sync.codec": 3}, ["sync.codec=3", "BlockCodec"]),
        ({"optimizer": 3}, ["optimizer=3", "init and update"]),
        ({"model.num_layers": 2}, ["model.num_layers=2", "task"]),
        ({"sync.codec": "int5"}, ["sync.codec='int5'", "int4"]),
    ],
)
def test_an_object_that_does_not_fit_a_row_is_one_sentence(task, changes, parts):
    rows = [{"name": "a", "changes": changes}]
    says(lambda: sl.compare("base", task=task, rows=rows, seeds=[0, 1, 2]), parts)


def test_another_optimizer_is_told_by_what_it_closes_over(task):
    found = [
        door.configure("base", {"optimizer": optax.sgd(x)}).own.describe()["optimizer"]["source"] for x in (1, 1, 2)
    ]
    assert found[0] == found[1] != found[2]


def test_equal_numbers_in_an_object_are_each_counted():
    """Small integers are one object in Python, wherever they stand."""

    def closure(*numbers):
        return lambda: numbers

    source = lambda *numbers: objects.described(dict, {"f": closure(*numbers)})["source"]
    assert source(1, 2, 1) == source(1, 2, 1) != source(1, 2, 2)

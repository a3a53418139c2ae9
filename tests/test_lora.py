"""LoRA: an adapter is what is trained, sent, remembered and saved, beside weights that stay as they are; what is used
is W + scale · A B, on every mesh; out it goes merged, or as PEFT keeps it."""

import functools
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import test_weights
from jax.sharding import PartitionSpec as P

import slackline as sl
from model import families, huggingface
from parallel.cost.bytes import exchange_bytes
from parallel.layout.rules import Constrain
from recipes import describe, memory, programs
from recipes.build import Parts
from recipes.programs import shardings_of
from runtime.config import UsageError
from runtime.digest import named_arrays
from runtime.progress import on_host
from runtime.steps import committed, read_record

LORA = {"lora__rank": 4, "lora__alpha": 8.0, "init__workdir": "runs/base"}
SCALE = 8.0 / 4

EMBED = ("fsdp", "expert", "context")
STAGED = pytest.param((1, 2, 2, 1, 2), marks=pytest.mark.slow)


def tuned(mesh: tuple[int, ...] = (1, 1, 1), **overrides: Any) -> tuple[Any, Parts]:
    config = helpers.tiny(**LORA | overrides)
    return config, helpers.build(config, mesh)


# ── what is what ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_state_holds_the_adapter_alone_and_the_base_lies_beside_it_once():
    _, parts = tuned((2, 2, 2), sync__strategy="diloco", sync__codec="int4")
    (base,), (weights, _) = parts.frozen, parts.task.frozen[0]
    assert named_arrays(base).keys() == named_arrays(weights).keys()
    assert all(x.shape == weights_x.shape for x, weights_x in zip(*map(jax.tree.leaves, (base, weights)), strict=True))
    trained = named_arrays(parts.state.params)
    assert {name.rpartition("/")[0] for name in trained} == {
        *(f"blocks/attention/{name}" for name in ("q", "k", "v", "out")),
        *(f"blocks/mlp/{name}" for name in ("gate", "up", "down")),
    }
    small = 3 * max(x.size for x in trained.values())  # also for two replicas
    assert all(x.size < small for x in jax.tree.leaves(parts.state))
    assert base["blocks"]["attention"]["q"].sharding.spec == P("stage", EMBED, "tensor", None)


@pytest.mark.parametrize("path, a, b", [
    ("attention/q", ((2, 64, 4), P("stage", EMBED, None)), ((2, 4, 8, 8), P("stage", None, "tensor", None))),
    ("attention/out", ((2, 8, 8, 4), P("stage", "tensor", None, None)), ((2, 4, 64), P("stage", None, EMBED))),
    ("mlp/down", ((2, 128, 4), P("stage", "tensor", None)), ((2, 4, 64), P("stage", None, EMBED))),
])  # fmt: skip
def test_an_adapter_lies_as_its_weight_does_and_its_rank_is_whole(path, a, b):
    _, parts = tuned((2, 2, 2))
    node = functools.reduce(lambda node, name: node[name], path.split("/"), parts.state.params["blocks"])
    assert [(node[part].shape, node[part].sharding.spec) for part in "ab"] == [a, b]


def test_with_freeze_a_a_is_saved_and_neither_trained_nor_exchanged():
    _, parts = tuned((2, 2, 1), lora__freeze_a=True)
    trained, fixed = named_arrays(parts.state.params), named_arrays(parts.state.fixed)
    assert {name[-2:] for name in trained} == {"/b"} and {name[-2:] for name in fixed} == {"/a"}
    assert [leaf.name for leaf in jax.tree.leaves(parts.strategy.exchange.leaves)] == [*trained]
    names = named_arrays(parts.state)
    assert all(name.endswith(("/b/first", "/b/second", "/count")) for name in names if name.startswith("opt/"))


# ── what is computed ──────────────────────────────────────────────────────────────────────────────────────────────────


def drawn(shapes: Any, seed: int) -> Any:
    """NumPy's numbers, of about the size of weights."""
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: draw.normal(0, 0.1, x.shape).astype(np.float32), shapes)


def product(a: np.ndarray, b: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A B of all layers."""
    rank, layers = a.shape[-1], len(a)
    return (a.reshape(layers, -1, rank) @ b.reshape(layers, rank, -1)).reshape(shape)


def merged(weights: Any, adapter: Any, scale: float = SCALE) -> Any:
    flat, parts = named_arrays(weights), named_arrays(adapter)
    more = lambda name, w: scale * product(parts[f"{name}/a"], parts[f"{name}/b"], w.shape)
    found = [w + more(name, w) if f"{name}/a" in parts else w for name, w in flat.items()]
    return jax.tree.structure(weights).unflatten(found)


def logits_and_loss(parts: Parts, whole: Any, tokens_BT: Any) -> tuple[Any, Any]:
    x_BTD, head_DV, _ = parts.task.model.features(whole, tokens_BT[:, :-1], Constrain(parts.mesh))
    logits_BTV = x_BTD @ head_DV
    picked_BT1 = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV), tokens_BT[:, 1:, None], axis=2)
    return -jnp.sum(picked_BT1), logits_BTV


# Beside experts, which have no adapters: attention, and the layers before theirs.
BEFORE = {"model__dense_layers": 2, "model__dense_dim": 96} | helpers.dropless(4)
OF_MODELS = {"dense": {}, "layers before experts": BEFORE}
ADAPTED = {"dense": {}, "layers before experts": BEFORE | {"lora__pattern": "attention|first"}}


@functools.cache
def expected(model: str) -> tuple[Any, Any, np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """(weights, adapter, tokens; logits of the merged weights, and the adapter's gradient by theirs)."""
    parts = helpers.build(helpers.tiny(**OF_MODELS[model]), (1, 1, 1))
    _, with_adapter = tuned(**ADAPTED[model])
    weights, adapter = drawn(parts.param_shapes, 0), drawn(with_adapter.param_shapes, 1)
    tokens_BT = np.random.default_rng(2).integers(0, 256, (4, 33))
    loss = lambda weights: logits_and_loss(parts, weights, tokens_BT)
    (_, logits), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(merged(weights, adapter))
    found, flat = {}, named_arrays(adapter)
    for name, g in named_arrays(jax.tree.map(np.asarray, gradient)).items():
        if f"{name}/a" in flat:
            a, b = flat[f"{name}/a"], flat[f"{name}/b"]
            layers, rank = len(a), a.shape[-1]
            a_LIr, b_LrO = a.reshape(layers, -1, rank), b.reshape(layers, rank, -1)
            g_LIO = g.reshape(layers, a_LIr.shape[1], -1)
            found[f"{name}/a"] = SCALE * (g_LIO @ b_LrO.swapaxes(1, 2)).reshape(a.shape)
            found[f"{name}/b"] = SCALE * (a_LIr.swapaxes(1, 2) @ g_LIO).reshape(b.shape)
    return weights, adapter, tokens_BT, np.asarray(logits), found


@pytest.mark.slow
@pytest.mark.parametrize("model", OF_MODELS)
@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 2, 2), STAGED], ids=helpers.name)
def test_logits_are_those_of_merged_weights_and_gradients_follow_from_theirs(mesh, model):
    weights, adapter, tokens_BT, logits, gradients = expected(model)
    _, parts = tuned(mesh, **ADAPTED[model])
    base = jax.device_put(weights, shardings_of(parts.frozen[0]))
    adapter = jax.device_put(adapter, shardings_of(parts.state.params))
    loss = lambda adapter, base: logits_and_loss(parts, parts.task.whole(adapter, {}, base), tokens_BT)
    (_, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(adapter, base)
    np.testing.assert_allclose(found, logits, atol=1e-5 * np.abs(logits).max())
    gradient = named_arrays(jax.tree.map(np.asarray, gradient))
    assert gradient.keys() == gradients.keys()
    for name, x in gradients.items():
        assert np.linalg.norm(gradient[name] - x) <= 1e-4 * np.linalg.norm(x), name


@pytest.mark.slow
@pytest.mark.parametrize("remat, unroll", [("none", False), ("dots", False), ("full", True)])
def test_however_it_is_executed_it_is_the_same(remat, unroll):
    weights, adapter, tokens_BT, logits, gradients = expected("dense")
    _, parts = tuned(compute__remat=remat, compute__unroll=unroll)
    loss = lambda adapter: logits_and_loss(parts, parts.task.whole(adapter, {}, weights), tokens_BT)
    (_, found), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(adapter)
    np.testing.assert_allclose(found, logits, atol=1e-5 * np.abs(logits).max())
    for name, x in named_arrays(jax.tree.map(np.asarray, gradient)).items():
        assert np.linalg.norm(x - gradients[name]) <= 1e-4 * np.linalg.norm(gradients[name]), name


# ── what is sent ──────────────────────────────────────────────────────────────────────────────────────────────────────

SENT = [
    ("sync", "int4", False), ("diloco", "int4", False), ("sync", "powersgd", False), ("diloco", "powersgd", True),
    ("sync", "none", True), ("stale", "sign", False), ("eager", "int8", False), ("streaming", "int4", False),
]  # fmt: skip
LOCAL = {"sync__interval": 2, "steps": 4}
THIN = {"powersgd": {"sync__rank": 1, "lora__rank": 16}}  # of A and B: less than theirs


@pytest.mark.slow
@pytest.mark.parametrize("strategy, codec, freeze_a", SENT)
def test_only_adapters_cross_replica(strategy, codec, freeze_a):
    keys = THIN.get(codec, {}) | (LOCAL if strategy in ("diloco", "eager", "streaming") else {})
    _, parts = tuned((2, 2, 2), sync__strategy=strategy, sync__codec=codec, lora__freeze_a=freeze_a, **keys)
    found = {name: lower().compile(helpers.QUICKLY) for name, lower in programs.steps(parts).items()}
    trained = memory.tree_bytes(parts.state.params, parts.mesh.shape)  # of a device
    for name, exchanges in parts.strategy.exchanges().items():
        closed: dict[str, float] = {}
        for exchange in exchanges:
            for dtype, size in exchange_bytes(exchange).items():
                closed[dtype] = closed.get(dtype, 0) + size
        assert helpers.exchanged(found[name].as_text(), parts.mesh) == closed
        assert sum(closed.values()) <= len(exchanges) * trained
    assert not any(t.stray for t in describe.traffic(parts, found).values())


# ── what is trained ───────────────────────────────────────────────────────────────────────────────────────────────────


def train(mesh: tuple[int, int, int], steps: int = 6, **overrides: Any) -> tuple[list[dict], Any, Any]:
    """(metrics of each call, the state before, the state after), beside weights that are drawn."""
    config, parts = tuned(mesh, **{"optimizer__lr": 1e-2, "steps": steps} | overrides)
    base = jax.device_put(drawn(parts.task.frozen[0][0], 0), shardings_of(parts.frozen[0]))
    compiled, state = programs.compile_steps(parts, helpers.QUICKLY), helpers.init_state(config, parts)
    before, found, K = jax.tree.map(np.asarray, state), [], parts.strategy.steps_per_call
    for n in range(0, steps, K):
        batches = [helpers.batch(config, parts, n + i) for i in range(K)]
        stacked = jax.device_put(jax.tree.map(lambda *x: jnp.concatenate(x), *batches), shardings_of(parts.batch))
        state, metrics = compiled[parts.strategy.program_at(n, steps)](state, stacked, base)
        found.append(on_host(metrics))
    return found, before, state


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["sign", "int4", "powersgd", "topk", "fp8"])
@pytest.mark.parametrize("strategy", ["sync", "diloco"])
def test_codecs_stand_a_first_gradient_of_zeros(strategy, codec):
    """B begins with zeros, so that A's first gradient is nothing but zeros."""
    keys = THIN.get(codec, {}) | (LOCAL | {"steps": 6} if strategy == "diloco" else {})
    metrics, before, after = train((2, 2, 1), sync__strategy=strategy, sync__codec=codec, **keys)
    assert all(np.isfinite(m["loss"]).all() and not np.any(m["skipped"]) for m in metrics)
    moved = jax.tree.map(lambda x, y: bool(np.any(x != np.asarray(y))), before.params, after.params)
    some = any if codec == "topk" else all  # a few elements are sent, first those of B
    assert some(jax.tree.leaves(moved))


@pytest.mark.slow
def test_replicas_train_as_one_does():
    one, two = (train(mesh)[0] for mesh in ((1, 1, 1), (2, 2, 1)))
    losses = [[float(np.mean(m["loss"])) for m in metrics] for metrics in (one, two)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.slow
def test_a_frozen_a_stays_to_the_bit():
    _, before, after = train((2, 2, 1), lora__freeze_a=True, sync__strategy="diloco", **LOCAL | {"steps": 6})
    for name, x in named_arrays(before.fixed).items():
        np.testing.assert_array_equal(x, named_arrays(after.fixed)[name])


# ── runs ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A workdir that was imported, and beside it a text."""
    folder = tmp_path_factory.mktemp("lora")
    test_weights.write(folder / "in", dtype=ml_dtypes.bfloat16)
    test_weights.command("import", folder / "in", folder / "base")
    letters = np.random.default_rng(0).choice(list("ab"), 4000)
    (folder / "text.txt").write_text("".join(letters))
    return folder / "base"


def fit(base: Path, workdir: Path, steps: int = 4, origin: Path | None = None, **changes: Any) -> Any:
    keys = {"init.workdir": str(origin or base), "data.path": str(base.parent / "text.txt"), "data.seq_len": 16}
    keys |= {"data.batch_size": 8, "optimizer.lr": 1e-2, "optimizer.warmup_steps": 0, "sample.tokens": 0}
    keys |= {"lora.rank": 2, "lora.alpha": 4.0, "mesh.replica": 2, "mesh.fsdp": 2, "checkpoint.every": 2}
    return sl.fit("tiny", steps=steps, workdir=workdir, **keys | changes)


DILOCO = {"sync.strategy": "diloco", "sync.codec": "int4", "sync.interval": 2}


@pytest.fixture(scope="module")
def run(base) -> Any:
    return fit(base, base.parent / "run", **DILOCO)


def digests(workdir: Path, step: int) -> dict[str, str]:
    record = read_record(committed(workdir / "checkpoints")[step])
    assert record
    return {name: x["digest"] for name, x in record["arrays"].items()}


@pytest.mark.slow
@pytest.mark.parametrize("freeze_a", [False, True])
def test_a_run_that_goes_on_has_the_bits_of_one_that_was_not_stopped(freeze_a, base, run, tmp_path):
    whole = fit(base, tmp_path / "whole", **DILOCO, **{"lora.freeze_a": True}) if freeze_a else run
    keys = DILOCO | {"lora.freeze_a": freeze_a}
    fit(base, tmp_path / "stopped", 2, **keys)
    moved = Path(shutil.copytree(base, tmp_path / "moved"))  # the base is known by its parameters, not by its folder
    fit(base, tmp_path / "stopped", 4, origin=moved, **keys)
    found = digests(tmp_path / "stopped", 4)
    assert found == digests(whole.workdir, 4)
    assert not any(name.startswith("params/embed") for name in found), "the base is not in a checkpoint"
    assert any(name.startswith("fixed/") for name in found) == freeze_a


@pytest.mark.slow
def test_a_run_crosses_over_from_its_first_steps_with_the_same_a(base, tmp_path):
    run = fit(base, tmp_path / "warm", **DILOCO, **{"lora.freeze_a": True, "sync.warm_steps": 2})
    first, last = digests(run.workdir, 2), digests(run.workdir, 4)
    fixed = [name for name in last if name.startswith("fixed/")]
    assert fixed and all(first[name] == last[name] for name in fixed)


@pytest.mark.slow
def test_another_base_is_refused(base, run, tmp_path):
    test_weights.write(tmp_path / "in", test_weights.LLAMA | {"vocab_size": 320}, np.float16)
    test_weights.command("import", tmp_path / "in", tmp_path / "other")
    copy = Path(shutil.copytree(run.workdir, tmp_path / "copy"))
    with pytest.raises(UsageError, match="this adapter was trained beside parameters with"):
        fit(base, copy, 6, origin=tmp_path / "other", **DILOCO)
    with pytest.raises(UsageError, match="there is no config.json of a run"):
        fit(base, copy, 6, origin=tmp_path / "gone", **DILOCO)
    with pytest.raises(UsageError, match="lora.rank: 2 in config.json, 3 now"):
        fit(base, copy, 6, **DILOCO | {"lora.rank": 3})


@pytest.mark.slow
def test_it_is_opened_merged_and_goes_out_merged_or_alone(base, run, tmp_path):
    opened = sl.open(run.workdir)
    text = (base.parent / "text.txt").read_text()
    np.testing.assert_allclose(opened.evaluate(text).loss, run.evaluate(text).loss, rtol=1e-5)
    weights = jax.tree.map(np.asarray, sl.open(base).params)
    wanted = merged(weights, jax.tree.map(np.asarray, run.state.params))
    for name, x in named_arrays(wanted).items():
        np.testing.assert_allclose(named_arrays(opened.params)[name], x, atol=1e-6, err_msg=name)
    test_weights.command("export", run.workdir, tmp_path / "merged")
    test_weights.command("export", run.workdir, tmp_path / "adapter", "--adapter")
    out = safetensors.numpy.load_file(tmp_path / "merged" / "model.safetensors")
    row = next(row for row in families.FAMILIES["llama"].rows if row.ours == "blocks/attention/out")
    whole = np.asarray(named_arrays(opened.params)[row.ours][1])
    sizes = families.sizes(run.config.model, 320, 16)
    np.testing.assert_array_equal(
        out[row.theirs.format(layer=1)], row.to_theirs(whole, sizes).astype(ml_dtypes.bfloat16)
    )
    theirs = safetensors.numpy.load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    module = "base_model.model." + row.theirs.format(layer=1).removesuffix(".weight")
    a_rI, b_Or = theirs[f"{module}.lora_A.weight"], theirs[f"{module}.lora_B.weight"]
    before = row.to_theirs(weights["blocks"]["attention"]["out"][1], sizes)
    np.testing.assert_allclose(before + 2.0 * b_Or @ a_rI, row.to_theirs(whole, sizes), atol=1e-6)
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["fan_in_fan_out"]) == (2, 4.0, False)
    assert said["base_model_name_or_path"] == str(base.parent / "in") and "mlp.up_proj" in said["target_modules"]
    assert (tmp_path / "adapter" / "tokenizer.json").is_file() and not (tmp_path / "adapter" / "config.json").exists()


@pytest.mark.slow
def test_an_adapter_can_be_the_base_of_another(base, run, tmp_path):
    second = fit(base, tmp_path / "second", 2, origin=run.workdir, **{"optimizer.lr": 0.0})
    for name, x in named_arrays(sl.open(run.workdir).params).items():
        np.testing.assert_array_equal(named_arrays(sl.open(second.workdir).params)[name], x, name)
    full = fit(
        base, tmp_path / "full", 2, origin=run.workdir, **{"optimizer.lr": 0.0, "lora.rank": 0, "lora.alpha": 16.0}
    )
    np.testing.assert_array_equal(
        full.params["blocks"]["mlp"]["up"], sl.open(run.workdir).params["blocks"]["mlp"]["up"]
    )


# ── bad input ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("keys, said", [
    ({"lora__rank": 64}, r"lora.rank=64: blocks/attention/k is a matrix of 64 × 64, so a rank of 64 is no less"),
    ({"lora__rank": -1}, "lora.rank=-1: must be at least 0"),
    ({"lora__alpha": 0.0}, "lora.alpha=0.0: must be greater than 0"),
    ({"lora__pattern": "nothing"}, "lora.pattern='nothing' matches no weight: they are blocks/attention/k"),
    ({"lora__pattern": "norm"}, "matches blocks/attention_norm/scale, .* none of them is a matrix"),
    ({"lora__pattern": "embed|mlp"}, r"matches embed, which is the embedding and the head at once \(model.tie_embed"),
    ({"lora__pattern": "["}, r"lora.pattern='\[' is no regular expression"),
    ({"init__workdir": ""}, "lora.rank=4 trains an adapter beside a model that is there: name the run .* init.workdir"),
    ({"sync__exchange": "backward"}, "an adapter has too few to be worth that: set sync.exchange=after"),
])  # fmt: skip
def test_bad_values_are_refused_before_anything_is_computed(keys, said):
    with pytest.raises(UsageError, match=said):
        tuned((2, 1, 1), **keys)


def test_a_key_that_nothing_reads_is_refused():
    with pytest.raises(UsageError, match="lora.alpha=8.0 is not read when lora.rank=0"):
        sl.build("tiny", **{"lora.alpha": 8.0})


@pytest.mark.slow
def test_what_has_no_adapter_or_keeps_three_in_one_cannot_go_out_as_one(base, tmp_path):
    with pytest.raises(UsageError, match="has trained all of its weights and no adapter: leave --adapter out"):
        huggingface.main(["export", str(base), str(tmp_path / "out"), "--adapter"])
    test_weights.write(tmp_path / "in", test_weights.GPT2)
    test_weights.command("import", tmp_path / "in", tmp_path / "gpt2")
    keys = {"data.seq_len": 64, "steps": 1, "mesh.replica": 1}
    fit(base, tmp_path / "run", origin=tmp_path / "gpt2", **keys)
    with pytest.raises(
        UsageError, match=r"gpt2 keeps blocks/attention/k, .* in one array \(transformer.h.0.attn.c_attn\)"
    ):
        huggingface.main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--adapter"])
    assert not (tmp_path / "out").exists()


# ── PEFT ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

made = test_weights.made
CASES = {
    "llama": {"lora.pattern": "attention|mlp|head|embed"},
    "qwen3": {"lora.rs": True, "lora.pattern": "attention/(q|out)|mlp/down"},
    "gpt2": {"lora.pattern": "attention/out|mlp", "data.seq_len": 256},
}


@pytest.mark.slow
@pytest.mark.prove
@pytest.mark.parametrize("name", CASES)
def test_an_adapter_has_the_same_logits_in_peft(name, made, tmp_path):
    folder, oracle = made
    if subprocess.run([oracle.python, "-c", "import peft"], capture_output=True).returncode:
        pytest.skip("the Python that SLACKLINE_TORCH_PYTHON names has no peft: pip install peft there")
    test_weights.command("import", folder / name, tmp_path / "base")
    letters = np.random.default_rng(0).integers(1, 32, 20_000)
    (tmp_path / "text.txt").write_text("".join(map(chr, letters)))
    run = fit(tmp_path / "base", tmp_path / "run", 3, **{"optimizer.lr": 0.05} | CASES[name])
    assert all(np.abs(x).max() > 1e-3 for x in jax.tree.leaves(run.state.params))
    test_weights.command("export", tmp_path / "run", tmp_path / "adapter", "--adapter")
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == str(folder / name)
    oracle("peft", tmp_path / "adapter")
    found = np.load(tmp_path / "adapter.peft.npz")
    test_weights.command("export", tmp_path / "run", tmp_path / "merged")
    oracle("read", tmp_path / "merged")
    merged = np.load(tmp_path / "merged.read.npz")["logits"]
    assert np.abs(found["logits"] - merged).max() <= 1e-5 * np.abs(merged).max()
    assert np.abs(found["logits"] - found["base"]).max() >= 1e-2 * np.abs(merged).max(), "it has an effect"

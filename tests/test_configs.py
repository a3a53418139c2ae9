"""The configs that are shipped: sizes and FLOPs of known models, and the golden numbers of one step of the tiny one."""

import dataclasses
import functools
import importlib

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.transformer import Transformer
from parallel.cost import flops
from parallel.layout.rules import Constrain
from recipes import build, language, methods

ALONE = Constrain(None)  # one device: nothing to constrain
QUICKLY = {"xla_backend_optimization_level": "0"}

CONFIGS = sorted(
    ".".join(path.relative_to(helpers.ROOT).with_suffix("").parts)
    for folder in ("configs", "bench")
    for path in (helpers.ROOT / folder).rglob("*.py")
    if "def get_config(" in path.read_text()
)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_one_that_can_be_run(name):
    methods.validate(importlib.import_module(name).get_config())


# ── sizes of known models ────────────────────────────────────────────────────────────────────────────────────────


def known(name: str) -> Transformer:
    return language.build_model(importlib.import_module(f"configs.{name}").get_config(), "cpu")[0]


def num_parameters(model: Transformer) -> int:
    return sum(x.size for x in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))


def with_vocabulary(model: Transformer, size: int) -> Transformer:
    return Transformer(dataclasses.replace(model.config, vocab_size=size), model.compute)


@pytest.mark.parametrize(
    "name, published",
    [
        ("gpt2_124m", 124_439_808),
        ("llama3_1b", 1_235_814_400),
        ("llama3_8b", 8_030_261_248),
        ("llama3_70b", 70_553_706_496),
        ("llama3_405b", 405_853_388_800),
        ("qwen3_600m", 596_049_920),
        ("mixtral_8x7b", 46_702_792_704),
        ("qwen3_30b_a3b", 30_532_122_624),
    ],
)
def test_parameter_counts_are_the_published_ones(name, published):
    model = known(name)
    if name == "gpt2_124m":  # ours pads 50,257 rows to 50,304
        assert model.config.vocab_size == 50_304
        model = with_vocabulary(model, 50_257)
    assert num_parameters(model) == published


def test_axes_name_every_dimension_of_every_weight():
    for name in ("gpt2_124m", "llama3_1b", "qwen3_600m", "mixtral_8x7b"):
        model = known(name)
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        jax.tree.map(lambda x, axes: len(x.shape) == len(axes) or pytest.fail(f"{x} {axes}"), shapes, model.axes)


def per_token(model, seq_len: int, causal: bool) -> float:
    return flops.per_token(jax.eval_shape(model.init, jax.random.key(0)), model.axes, model.config, seq_len, causal)


def test_flops_per_token_of_gpt2():
    """6 · (12 layers · (4 · 768² + 2 · 768 · 3072) + 50,257 · 768) + 12 · 12 · 768 · 1024: 0.855 GFLOP. Biases and
    norms are not counted."""
    model = with_vocabulary(known("gpt2_124m"), 50_257)
    matmuls = 6 * (12 * (4 * 768**2 + 2 * 768 * 3072) + 50_257 * 768)
    assert per_token(model, 1024, causal=False) == pytest.approx(0.855e9, rel=0.01)
    assert per_token(model, 1024, causal=False) == matmuls + 12 * 12 * 768 * 1024
    assert per_token(model, 1024, causal=True) == matmuls + 6 * 12 * 768 * 1024


def test_flops_per_token_of_llama3():
    model = known("llama3_8b")
    assert per_token(model, 8192, causal=True) == pytest.approx(51.5e9, rel=0.01)
    assert per_token(model, 8192, causal=False) == pytest.approx(57.9e9, rel=0.01)


# ── golden numbers ───────────────────────────────────────────────────────────────────────────────────────────────

GOLDEN = {"loss": 5.5388026, "grad_norm": 1.1438308, "param_norm": 18.755032, "change": 0.31393972}


def test_one_step_of_the_tiny_config_gives_the_golden_numbers():
    config = importlib.import_module("configs.tiny").get_config()
    model, _ = language.build_model(config, "cpu")
    built = build.build_optimizer(config, model.axes)
    tokens = np.random.default_rng(1).integers(0, config.data.vocab_size, (2, 4, config.data.seq_len)).astype(np.int32)
    batch = {"tokens": tokens[0], "targets": tokens[1], "mask": np.ones(tokens[0].shape, np.float32)}

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def step(params, batch):
        (total, count), grads = jax.value_and_grad(model.loss, has_aux=True)(params, batch, ALONE)
        grads = jax.tree.map(lambda g: g / count, grads)
        after, _ = built.apply(grads, built.init(params), params)
        change = jax.tree.map(jnp.subtract, after, params)
        norm = lambda tree: jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(tree)))
        return {"loss": total / count, "grad_norm": norm(grads), "param_norm": norm(after), "change": norm(change)}

    got = {
        name: float(x)
        for name, x in step(jax.jit(model.init, compiler_options=QUICKLY)(jax.random.key(config.seed)), batch).items()
    }
    wrong = [name for name in GOLDEN if abs(got[name] - GOLDEN[name]) > 2e-5 * abs(GOLDEN[name])]
    rounded = {name: float(f"{got[name]:.8g}") for name in GOLDEN}
    assert not wrong, (
        f"{', '.join(wrong)} of one AdamW step of configs/tiny.py moved. If you did not mean to change the model, its "
        f"initial weights, the loss, the optimizer or the tiny config, this is a bug. If you did, put this into "
        f"tests/test_model.py and say why in the commit:\nGOLDEN = {rounded}"
    )


@pytest.mark.parametrize(("kind", "mib"), [("cpu", 32), ("NVIDIA H100 80GB HBM3", 128), ("TPU v5", 512)])
def test_the_chunk_of_logits_suits_the_chip_unless_it_is_set(kind, mib):
    config = importlib.import_module("configs.llama3_8b").get_config()
    config.data.vocab_size = 1024  # the chunk does not follow from it
    assert language.build_model(config, kind)[0].compute.loss_chunk_mib == mib
    config.compute.loss_chunk_mib = 7
    assert language.build_model(config, kind)[0].compute.loss_chunk_mib == 7

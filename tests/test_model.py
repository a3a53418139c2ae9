"""model/: the network, its loss and its gradients, against NumPy float64 (tests/oracle.py).

The weights are random and large, so that every norm scale, bias and frequency moves the loss; a guard in the test
says so. JAX's float64 is compared at 1e-6, its float32 at 1e-5.
"""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.nn.initializers import normal

from model import attention
from model.config import Compute, ModelConfig, RopeScaling
from model.layers import Weights
from model.loss import cross_entropy
from model.remat import POLICIES
from model.transformer import Transformer
from parallel.cost import flops
from parallel.layout.rules import Constrain

ALONE = Constrain(None)  # one device: nothing to constrain
B, T, V = 2, 24, 61
DOCUMENTS = ((0,) * 7 + (1,) + (2,) * 16, (0,) * 15 + (1,) * 9)

GPT2 = ModelConfig(
    vocab_size=V,
    max_seq_len=T,
    num_layers=2,
    model_dim=32,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    mlp_dim=48,
    norm="layer",
    norm_eps=1e-5,
    mlp="gelu",
    position="learned",
    rope_theta=10_000.0,
    rope_scaling=None,
    qk_norm=False,
    bias="all",
    tie_embeddings=True,
    sliding_window=0,
    init_std=0.02,
    moe=None,
)
LLAMA = dataclasses.replace(
    GPT2, norm="rms", mlp="swiglu", position="rope", bias="none", tie_embeddings=False, head_dim=16, num_kv_heads=2
)
# Four periods of 64 positions: wavelengths under 16 are kept, above 64 divided by 8; K = 16 has some of each.
STRETCHED = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_len=64)
F32 = Compute(
    dtype=jnp.dtype("float32"), attention="reference", context="", remat="none", pipeline=("layer", "tick", 1),
    dispatch=("", ""), unroll=False, loss_chunk_mib=1,
)  # fmt: skip

# name: (base, what differs from it in the config, z-loss, what differs in the batch)
VARIANTS = {
    "gpt2": (GPT2, {}, 0.0, ()),
    "gpt2-untied": (GPT2, {"tie_embeddings": False}, 0.0, ()),
    "gpt2-no-bias": (GPT2, {"bias": "none"}, 0.0, ()),
    "gpt2-window": (GPT2, {"sliding_window": 5}, 0.0, ()),
    "gpt2-mask": (GPT2, {}, 0.0, ("mask",)),
    "gpt2-all": (GPT2, {"sliding_window": 5}, 1e-2, ("segments", "mask")),
    "llama": (LLAMA, {}, 0.0, ()),
    "llama-tied": (LLAMA, {"tie_embeddings": True}, 0.0, ()),
    "llama-rope-scaling": (LLAMA, {"rope_scaling": STRETCHED}, 0.0, ()),
    "llama-theta": (LLAMA, {"rope_theta": 500_000.0}, 0.0, ()),
    "llama-qk-norm": (LLAMA, {"qk_norm": True}, 0.0, ()),
    "llama-bias": (LLAMA, {"bias": "all"}, 0.0, ()),
    "qwen2": (LLAMA, {"bias": "qkv"}, 0.0, ()),
    "llama-eps": (LLAMA, {"norm_eps": 1e-1}, 0.0, ()),
    "llama-window": (LLAMA, {"sliding_window": 5}, 0.0, ()),
    "llama-segments": (LLAMA, {}, 0.0, ("segments",)),
    "llama-z-loss": (LLAMA, {}, 1e-2, ()),
    "llama-all": (LLAMA, {"rope_scaling": STRETCHED, "qk_norm": True, "sliding_window": 5}, 1e-2, ("segments", "mask")),
}
WITH_GRADIENT = ("gpt2-all", "llama", "llama-all")


@functools.cache
def random_params(config: ModelConfig, seed: int = 0):
    """Weights of std 0.2, scales around 1, biases around 0, each from a seed of its own name; float32 values."""
    shapes = jax.eval_shape(Transformer(config, F32).init, jax.random.key(0))

    def draw(path, x):
        name = "/".join(key.key for key in path)
        noise = np.random.default_rng([seed, *name.encode()]).standard_normal(x.shape)
        scale, mean = {"scale": (0.3, 1.0)}.get(path[-1].key, (0.3 if path[-1].key.endswith("bias") else 0.2, 0.0))
        return (mean + scale * noise).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_batch(extra=(), vocab: int = V, rows: int = B, length: int = T):
    rng = np.random.default_rng(1)
    batch = {
        "tokens": rng.integers(0, vocab, (rows, length)).astype(np.int32),
        "targets": rng.integers(0, vocab, (rows, length)).astype(np.int32),
        "mask": np.ones((rows, length), np.float32),
    }
    if "mask" in extra:
        batch["mask"][0, :9] = 0
        batch["mask"][1, ::3] = 0
    if "segments" in extra:
        batch["segments"] = np.array(DOCUMENTS, np.int32)
    return batch


def variant(name: str):
    base, changes, z_loss, extra = VARIANTS[name]
    config = dataclasses.replace(base, **changes)
    return config, z_loss, random_params(config), random_batch(extra)


def float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


# These programs run once: XLA's expensive passes would be most of the test's time.
QUICKLY = {"xla_backend_optimization_level": "0"}


@functools.cache
def compiled(config: ModelConfig, z_loss: float, dtype: str, gradient: bool):
    model = Transformer(config, dataclasses.replace(F32, dtype=jnp.dtype(dtype)), z_loss)
    loss = lambda params, batch: model.loss(params, batch, ALONE)
    return jax.jit(jax.value_and_grad(loss, has_aux=True) if gradient else loss, compiler_options=QUICKLY)


def run(config: ModelConfig, z_loss: float, params, batch, dtype: str, gradient: bool = False):
    """The model's (loss, count), or ((loss, count), gradients), in this precision, as NumPy."""
    with jax.enable_x64(dtype == "float64"):
        params = jax.tree.map(lambda x: jnp.asarray(x, "float64" if dtype == "float64" else "float32"), params)
        return jax.device_get(compiled(config, z_loss, dtype, gradient)(params, batch))


# ── the loss ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_equals_numpy(name):
    config, z_loss, params, batch = variant(name)
    expected = oracle.loss(float64(params), batch, config, z_loss)
    for dtype, tolerance in (("float64", 1e-6), ("float32", 1e-5)):
        total, count = run(config, z_loss, params, batch, dtype)
        assert total.dtype == dtype
        assert float(total) == pytest.approx(expected, rel=tolerance)
        assert count == batch["mask"].sum()


@pytest.mark.parametrize("name", [name for name, (_, *differs) in VARIANTS.items() if any(differs)])
def test_every_variant_matters(name):
    """The guard of the test above: each feature, switched off alone in the oracle, gives another loss."""
    config, z_loss, _, batch = variant(name)
    base, changes, _, extra = VARIANTS[name]
    every_weight = float64(random_params(dataclasses.replace(config, bias="all", qk_norm=True, tie_embeddings=False)))
    expected = oracle.loss(every_weight, batch, config, z_loss)
    configs = [dataclasses.replace(config, **{key: getattr(base, key)}) for key in changes]
    others = [oracle.loss(every_weight, batch, without, z_loss) for without in configs]
    others += [oracle.loss(every_weight, batch, config, 0.0)] if z_loss else []
    if "segments" in extra:
        others.append(oracle.loss(every_weight, {k: x for k, x in batch.items() if k != "segments"}, config, z_loss))
    if "mask" in extra:
        others.append(oracle.loss(every_weight, batch | {"mask": np.ones((B, T))}, config, z_loss))
    for other in others:
        assert abs(other / expected - 1) > 1e-4


def test_grouped_heads_matter():
    config, _, params, batch = variant("llama")
    params = float64(params)
    assert config.num_kv_heads == 2
    swapped = params | {"blocks": params["blocks"] | {"attention": dict(params["blocks"]["attention"])}}
    for name in "kv":
        swapped["blocks"]["attention"][name] = params["blocks"]["attention"][name][:, :, ::-1]
    assert abs(oracle.loss(swapped, batch, config) / oracle.loss(params, batch, config) - 1) > 1e-4


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_logits_equal_numpy(name):
    config, _, params, batch = variant(name)
    features = jax.jit(lambda p, t: Transformer(config, F32).features(p, t, ALONE)[:2])
    logits_BTV = jnp.matmul(*features(params, batch["tokens"]), precision="highest")
    expected_BTV = np.stack([oracle.logits(float64(params), tokens_T, config) for tokens_T in batch["tokens"]])
    np.testing.assert_allclose(logits_BTV, expected_BTV, rtol=1e-5, atol=1e-5 * np.abs(expected_BTV).max())


def test_llama_31_rope_scaling_keeps_interpolates_and_stretches():
    """Llama 3.1 8B itself: the first and last of its 64 frequencies, and those next to the two bounds."""
    config = dataclasses.replace(
        LLAMA, head_dim=128, rope_theta=500_000.0, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192)
    )
    plain = np.array([500_000.0 ** (-i / 64) for i in range(64)])
    stretched = oracle.rope_frequencies(config)
    wavelength = 2 * np.pi / plain
    assert (stretched == plain)[wavelength < 2048].all() and (stretched == plain / 8)[wavelength > 8192].all()
    between = (wavelength > 2048) & (wavelength < 8192)
    assert between.sum() == 6 and ((stretched < plain) & (stretched > plain / 8))[between].all()
    with jax.enable_x64(True):
        tables = lambda positions: attention.rope_tables(positions, 128, 500_000.0, config.rope_scaling)
        angle = jax.jit(lambda positions: jnp.arctan2(*reversed(tables(positions))))(np.array([[0, 1, 3]]))
    assert angle.shape == (1, 3, 1, 64)
    np.testing.assert_allclose(angle[0, 1, 0], stretched, rtol=1e-12)
    np.testing.assert_array_equal(angle[0, 0], 0)
    np.testing.assert_allclose(angle[0, 2, 0], 3 * stretched, rtol=1e-12)


def test_bfloat16_is_near_float32():
    config, z_loss, params, batch = variant("llama-all")
    half, _ = run(config, z_loss, params, batch, "bfloat16")
    assert half.dtype == "float32"
    assert float(half) == pytest.approx(oracle.loss(float64(params), batch, config, z_loss), rel=1e-2)


# ── its gradient ─────────────────────────────────────────────────────────────────────────────────────────────────


def slope(f, w: np.ndarray, direction: np.ndarray, h: float = 2e-3) -> float:
    """Derivative of f at w along `direction`: central differences of 4th order."""
    at = lambda t: f(w + t * direction)
    return (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)


@pytest.mark.parametrize(
    "name", [WITH_GRADIENT[0], *(pytest.param(x, marks=pytest.mark.slow) for x in WITH_GRADIENT[1:])]
)
def test_gradient_equals_finite_differences(name):
    """Along the gradient itself (its length), along random directions, and at single weights.

    Float64 against the differences, relative to that slope's expected size: ‖g‖ along g, ‖g‖/√n along a random unit
    vector and for one weight. Float32 against float64, relative to ‖g‖ of that weight. GPT-2's key bias has no
    gradient in exact arithmetic (softmax ignores what all keys share): there the whole gradient's length counts.
    """
    config, z_loss, params, batch = variant(name)
    _, grads = run(config, z_loss, params, batch, "float64", gradient=True)
    _, grads32 = run(config, z_loss, params, batch, "float32", gradient=True)
    everything = math.sqrt(sum(np.sum(g**2) for g in jax.tree.leaves(grads)))
    rng = np.random.default_rng(2)
    leaves, structure = jax.tree_util.tree_flatten_with_path(float64(params))
    grads, grads32 = jax.tree.leaves(grads), jax.tree.leaves(grads32)
    for index, (path, w) in enumerate(leaves):
        g, label, length = grads[index], jax.tree_util.keystr(path), np.linalg.norm(grads[index])
        assert g.dtype == "float64" and g.shape == w.shape

        def at(w, index=index):
            changed = [x if i != index else w for i, (_, x) in enumerate(leaves)]
            return oracle.loss(jax.tree.unflatten(structure, changed), batch, config, z_loss)

        error32 = np.linalg.norm(grads32[index] - g)
        if "k_bias" in label and config.position == "learned":
            assert length < 1e-12 * everything and error32 < 1e-6 * everything
            continue
        assert length > 1e-4 * everything, label
        assert error32 < 1e-5 * length, label
        assert slope(at, w, g / length) == pytest.approx(length, rel=1e-6), label
        directions = [rng.standard_normal(w.shape), np.zeros(w.shape), np.zeros(w.shape)]
        directions[1][np.unravel_index(np.argmax(np.abs(g)), w.shape)] = 1
        directions[2][tuple(rng.integers(0, w.shape))] = 1
        for direction in directions:
            direction = direction / np.linalg.norm(direction)
            size = max(abs(np.sum(g * direction)), length / math.sqrt(w.size))
            assert slope(at, w, direction) == pytest.approx(np.sum(g * direction), abs=1e-6 * size), label


# ── chunked cross-entropy (model/loss.py) ────────────────────────────────────────────────────────────────────────


def features_and_head(rows, length, dim, vocab, dtype="float32"):
    rng = np.random.default_rng(3)
    x_BTD = jnp.asarray(rng.standard_normal((rows, length, dim)), dtype)
    head_DV = jnp.asarray(rng.standard_normal((dim, vocab)), dtype)
    return x_BTD, head_DV, random_batch(("mask",), vocab, rows, length)


def value_and_gradients(f, x, head, weight: float = 0.37):
    """f, and the gradients of weight · f: the weight shows that what comes from behind the loss is passed on."""
    both = lambda x, head: (f(x, head), jax.grad(lambda x, head: weight * f(x, head), (0, 1))(x, head))
    return jax.jit(both, compiler_options=QUICKLY)(x, head)


def reference_cross_entropy(x_BTD, head_DV, targets_BT, mask_BT, *, z_loss: float) -> jax.Array:
    """The obvious one, which holds all logits: what `cross_entropy` is compared with."""
    logits_BTV = jnp.einsum("btd,dv->btv", x_BTD, head_DV)
    lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jnp.sum(mask_BT * (lse_BT - target_BT + z_loss * lse_BT**2))


@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
@pytest.mark.parametrize("tokens_per_chunk", [1, 4, 7, 10, 33, 1000])
def test_chunked_cross_entropy_equals_the_plain_one(tokens_per_chunk, z_loss):
    """33 tokens, 3 · 11: chunks of 4, 7 and 10 do not divide them; 1000 is one chunk."""
    x_BTD, head_DV, batch = features_and_head(3, 11, 8, 19)
    targets_BT, mask_BT = batch["targets"], jnp.asarray(batch["mask"])
    chunked = lambda x, head: cross_entropy(
        x, head, targets_BT, mask_BT, ALONE, z_loss=z_loss, chunk_bytes=tokens_per_chunk * 19 * 4
    )
    plain = lambda x, head: reference_cross_entropy(x, head, targets_BT, mask_BT, z_loss=z_loss)
    value, gradients = value_and_gradients(chunked, x_BTD, head_DV)
    expected, expected_gradients = value_and_gradients(plain, x_BTD, head_DV)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max())


def test_cross_entropy_survives_huge_logits():
    x_BTD, head_DV, batch = features_and_head(3, 11, 8, 19)
    args = 300 * x_BTD, head_DV, batch["targets"], batch["mask"]
    value = jax.jit(functools.partial(cross_entropy, z_loss=0.0, chunk_bytes=300), static_argnums=4)(*args, ALONE)
    np.testing.assert_allclose(value, jax.jit(functools.partial(reference_cross_entropy, z_loss=0.0))(*args), rtol=1e-6)
    assert np.isfinite(value)


def test_cross_entropy_in_bfloat16():
    """Products and sums are float32: only features, head, the logits' gradient and the results are rounded."""
    x_BTD, head_DV, batch = features_and_head(3, 11, 8, 19, "bfloat16")
    targets_BT, mask_BT = batch["targets"], jnp.asarray(batch["mask"])
    f = lambda x, head: cross_entropy(x, head, targets_BT, mask_BT, ALONE, z_loss=1e-2, chunk_bytes=300)
    plain = lambda x, head: reference_cross_entropy(x, head, targets_BT, mask_BT, z_loss=1e-2)
    value, gradients = value_and_gradients(f, x_BTD, head_DV)
    expected, expected_gradients = value_and_gradients(plain, x_BTD.astype("float32"), head_DV.astype("float32"))
    assert value.dtype == "float32" and all(g.dtype == "bfloat16" for g in gradients)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        error = np.asarray(got, np.float32) - wanted
        assert np.linalg.norm(error) < 2**-8 * np.linalg.norm(wanted)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chunked_cross_entropy_never_holds_the_logits(dtype):
    """1024 tokens × 512 words: 2 MiB of logits in chunks of 128 KiB."""
    x_BTD, head_DV, batch = features_and_head(4, 256, 16, 512, dtype)
    targets_BT, mask_BT = batch["targets"], jnp.asarray(batch["mask"])
    chunked = lambda x, head: cross_entropy(x, head, targets_BT, mask_BT, ALONE, z_loss=1e-4, chunk_bytes=128 << 10)
    plain = lambda x, head: reference_cross_entropy(x, head, targets_BT, mask_BT, z_loss=1e-4)

    def measure(f):
        program = jax.jit(jax.value_and_grad(f, (0, 1))).lower(x_BTD, head_DV).compile(QUICKLY)
        shapes = re.findall(r"\b(?:f32|f64|bf16|f16)\[([\d,]+)\]", program.as_text())
        largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
        return largest, program.memory_analysis().temp_size_in_bytes

    logits = 4 * 256 * 512
    largest, temporary = measure(chunked)
    assert largest <= logits // 16
    assert temporary < 4 * logits // 2
    largest, temporary = measure(plain)  # the test can see them
    assert largest >= logits and temporary >= 4 * logits


# ── how it is executed changes nothing ───────────────────────────────────────────────────────────────────────────


@functools.cache
def executed(remat: str, unroll: bool):
    """Loss, gradients and bytes of temporary memory of one and the same model."""
    config = dataclasses.replace(LLAMA, num_layers=3, tie_embeddings=True)
    model = Transformer(config, dataclasses.replace(F32, remat=remat, unroll=unroll))
    params, batch = random_params(config), random_batch(rows=4, length=128)
    f = jax.jit(lambda p, b: jax.value_and_grad(model.loss, has_aux=True)(p, b, ALONE))
    program = f.lower(params, batch).compile(QUICKLY)
    (total, _), grads = jax.device_get(program(params, batch))
    return total, grads, program.memory_analysis().temp_size_in_bytes


EXECUTIONS = [(remat, False) for remat in POLICIES if remat != "none"] + [("none", True), ("full", True)]


@pytest.mark.parametrize("remat, unroll", EXECUTIONS)
def test_remat_and_unrolling_change_nothing(remat, unroll):
    total, grads, _ = executed(remat, unroll)
    expected, expected_grads, _ = executed("none", False)
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    for got, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        assert np.linalg.norm(got - wanted) < 1e-5 * np.linalg.norm(wanted)


def test_remat_saves_memory():
    memory = {remat: executed(remat, False)[2] for remat in POLICIES}
    assert memory["full"] < memory["matmuls"] < memory["none"]
    assert memory["full"] < memory["none"] / 2
    assert executed("full", True)[2] < executed("none", True)[2]


# ── initial weights ──────────────────────────────────────────────────────────────────────────────────────────────


@functools.cache
def initial(config: ModelConfig, unroll: bool = False):
    init = Transformer(config, dataclasses.replace(F32, unroll=unroll)).init
    return jax.device_get(jax.jit(init, compiler_options=QUICKLY)(jax.random.key(5)))


def assert_same_bits(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), a, b)


def test_scanned_and_unrolled_models_start_from_the_same_bits():
    assert_same_bits(initial(LLAMA), initial(LLAMA, unroll=True))


def test_initial_weights_have_the_stated_sizes():
    """Normal, std init_std; what is added to the residual stream divided by √(2L) (GPT-2); biases 0; scales 1."""
    for path, w in jax.tree_util.tree_leaves_with_path(initial(dataclasses.replace(GPT2, tie_embeddings=False))):
        name = path[-1].key
        assert w.dtype == "float32"
        if name == "scale":
            assert (w == 1).all()
        elif name.endswith("bias"):
            assert (w == 0).all()
        else:
            std = 0.02 / math.sqrt(2 * 2) if name in ("out", "down") else 0.02
            assert abs(w.mean()) < 5 * std / math.sqrt(w.size)
            assert abs(w.std() / std - 1) < 5 / math.sqrt(2 * w.size), path


def test_no_two_weights_start_alike():
    leaves = [w for w in jax.tree.leaves(initial(dataclasses.replace(LLAMA, num_kv_heads=4))) if np.ptp(w)]
    layers = [w[index] for w in leaves if w.ndim > 2 for index in range(2)] + [w for w in leaves if w.ndim == 2]
    firsts = [float(np.ravel(w)[0] / np.std(w)) for w in layers]
    assert len(set(np.round(firsts, 4))) == len(layers) == 2 * 7 + 2


def test_a_weight_depends_on_its_name_alone():
    init, axes = normal(1.0), (None,)
    weights = Weights(jax.random.key(0))
    first = [weights(name, (4,), axes, init)[...] for name in ("a", "b")]
    weights = Weights(jax.random.key(0))
    again = [weights(name, (4,), axes, init)[...] for name in ("c", "b", "a")]
    np.testing.assert_array_equal(first[0], again[2])
    np.testing.assert_array_equal(first[1], again[1])
    assert not np.array_equal(first[0], first[1]) and not np.array_equal(again[0], first[0])
    assert not np.array_equal(first[0], Weights(jax.random.key(1))("a", (4,), axes, init)[...])


@pytest.mark.parametrize("changes", [{"qk_norm": True}, {"bias": "all"}, {"tie_embeddings": True}], ids=str)
def test_a_new_weight_leaves_the_others_as_they_were(changes):
    before = dict(jax.tree_util.tree_leaves_with_path(initial(LLAMA)))
    after = dict(jax.tree_util.tree_leaves_with_path(initial(dataclasses.replace(LLAMA, **changes))))
    assert before.keys() != after.keys()
    for path in before.keys() & after.keys():
        np.testing.assert_array_equal(before[path], after[path])


def test_a_deeper_model_starts_from_the_same_first_layers():
    """Up to the √(2L) by which what is added to the residual stream is divided."""
    shallow, deep = initial(LLAMA), initial(dataclasses.replace(LLAMA, num_layers=3))
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(shallow["blocks"]), jax.tree.leaves(deep["blocks"]), strict=True
    ):
        assert len(b) == 3
        if path[-1].key in ("out", "down"):
            np.testing.assert_allclose(a * math.sqrt(2 * 2), b[:2] * math.sqrt(2 * 3), rtol=1e-6)
        else:
            np.testing.assert_array_equal(a, b[:2])


# ── floating-point operations ──────────────────────────────────────────────────────────────────────────────────────


def test_flops_per_token_with_a_sliding_window():
    """Causal: query t sees min(t + 1, W) keys, which is W for most, not W / 2."""
    config = dataclasses.replace(LLAMA, sliding_window=64)
    model = Transformer(config, F32)
    weights = jax.eval_shape(model.init, jax.random.key(0)), model.axes
    matmuls = flops.per_token(*weights, config, 0, causal=True)
    seen = np.minimum(np.arange(1024) + 1, 64).mean()
    attention_flops = 12 * 2 * 4 * 16 * seen
    assert flops.per_token(*weights, config, 1024, causal=True) - matmuls == pytest.approx(attention_flops, rel=0.02)

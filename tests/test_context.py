"""Sequences that are cut over devices train as whole ones do: the same attention, losses and gradients."""

from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_parity import check

from model import fused, products
from model.attention import reference
from model.products import PLAIN, Products
from parallel.cost import wire
from parallel.layout import mesh as meshes
from parallel.layout import ring
from parallel.layout.rules import Constrain
from recipes import context
from recipes.programs import compile_steps
from runtime.console import human_bytes

SLOW = pytest.mark.slow
WAYS = "ring", "gather", "heads"
B, T, H, G, K = 2, 32, 4, 2, 8
INT4 = {"sync__codec": "int4"}


def arrays(heads: int = H, kv_heads: int = G) -> list[np.ndarray]:
    """q, k, v and a cotangent."""
    rng = np.random.default_rng(0)
    return [rng.standard_normal((B, T, n, K)).astype(np.float32) for n in (heads, kv_heads, kv_heads, heads)]


def documents() -> np.ndarray:
    """Of other lengths in each row, over the borders of devices."""
    return np.stack([np.searchsorted([5, 6, 21], np.arange(T), "right"), np.arange(T) // 13]).astype(np.int32)


def plain(q, k, v, segments, window, cotangent) -> tuple:
    @jax.jit
    def run(q, k, v, cotangent):
        y, back = jax.vjp(lambda q, k, v: reference(q, k, v, segments, window, Constrain(None)), q, k, v)
        return (y, *back(cotangent))

    return run(q, k, v, cotangent)


def cut(way: str, mesh: Any, q, k, v, segments, window, cotangent) -> tuple:
    """As `plain`, on the mesh."""
    constrain = Constrain(mesh)
    sequences = constrain.sequences(way)
    attend = sequences.attention(reference, PLAIN)

    @jax.jit
    def run(q, k, v, segments, cotangent):
        q, k, v, cotangent = (sequences.spread(x) for x in (q, k, v, cotangent))
        segments = sequences.known(segments)
        y, back = jax.vjp(lambda q, k, v: attend(q, k, v, segments, window, constrain), q, k, v)
        return tuple(sequences.back(x) for x in (y, *back(cotangent)))

    return run(q, k, v, segments, cotangent)


CASES = {
    "causal": (H, G, False, None),
    "documents": (H, G, True, None),
    "window": (H, G, False, 7),
    "window and documents": (H, H, True, 11),
}


@pytest.mark.parametrize("parts", [1, pytest.param(2, marks=SLOW)])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "sizes",
    [{"context": 4}, *(pytest.param(x, marks=SLOW) for x in ({"context": 2}, {"context": 2, "tensor": 2, "fsdp": 2}))],
    ids=str,
)
def test_attention_and_its_gradients_are_those_of_whole_sequences(way, case, sizes, parts, monkeypatch):
    monkeypatch.setattr(products, "SCORES", 2**28 if parts == 1 else 2**10)
    heads, kv_heads, masked, window = CASES[case]
    if way == "heads":
        kv_heads = heads = sizes["context"] * sizes.get("tensor", 1) * 2
    mesh = meshes.build(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    q, k, v, cotangent = arrays(heads, kv_heads)
    segments = documents() if masked else None
    wanted = plain(q, k, v, segments, window, cotangent)
    found = cut(way, mesh, q, k, v, segments, window, cotangent)
    for ours, theirs in zip(found, wanted, strict=True):
        assert np.max(np.abs(ours - theirs)) <= 2e-6 * max(1, np.max(np.abs(theirs)))


@pytest.mark.parametrize("way", ["ring", "gather"])
def test_a_key_whose_value_is_nothing_is_felt_by_the_sum_of_weights_alone(way):
    """Values of the first half are zero: queries of the second half hear of those keys by the log-sum-exp, and by
    nothing else, so that theirs are the gradients that a hop loses whose log-sum-exp has none."""
    mesh = meshes.build({"context": 4}, jax.devices()[:4])
    q, k, v, cotangent = arrays()
    v[:, : T // 2] = 0
    cotangent[:, : T // 2] = 0
    wanted, found = plain(q, k, v, None, None, cotangent), cut(way, mesh, q, k, v, None, None, cotangent)
    dk = wanted[2][:, : T // 2]
    assert np.min(np.linalg.norm(dk, axis=-1)) > 1e-3
    assert np.max(np.abs(found[2][:, : T // 2] - dk)) <= 2e-6 * np.max(np.abs(dk))


MESHES = [(1, 1, 2, 1), (2, 2, 2, 1), (1, 2, 2, 2), (2, 1, 2, 2), (1, 1, 4, 2), (2, 1, 4, 1), (1, 1, 8, 1)]


@SLOW  # in the default run: all six axes at once, tests/test_factorings.py
@pytest.mark.parametrize("way", ["ring", "gather", "heads"])
@pytest.mark.parametrize("mesh", MESHES, ids=helpers.name)
def test_every_mesh_trains_like_one_device(mesh, way):
    check(mesh, True, attention__context=way)


BYTES = [("none", 1), ("matmuls", 2), ("full", 1)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("remat", "accumulate"), [pytest.param(*case, marks=[] if case[0] == "matmuls" else [SLOW]) for case in BYTES]
)
def test_what_attention_sends_over_context_is_the_closed_form(way, remat, accumulate):
    masked = {"data__document_mask": True} if remat == "matmuls" else {}
    config = helpers.tiny(attention__context=way, compute__remat=remat, optimizer__accumulate=accumulate, **masked)
    parts = helpers.build(config, (1, 1, 4, 2))
    (program,) = compile_steps(parts, helpers.QUICKLY).values()
    found = [c for c in wire.collectives(program.as_text(), parts.mesh) if ring.SCOPE in c.scope]
    assert {c.axis for c in found} == {"context"}
    wanted = context.described(config, parts.mesh.shape, 4).sent(way) * config.model.num_layers * accumulate
    assert sum(c.sent for c in found) == wanted == context.sent(config, parts)
    assert (
        dict(context.rows(config, parts))["ring"]
        == f"{way}: {human_bytes(wanted)} sent by attention over mesh.context in a step, predicted"
    )


PASSES = [("none", "layer"), ("none", "stage"), ("matmuls", "layer"), ("full", "stage")]


@SLOW
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("remat", "pipeline"), PASSES)
def test_what_attention_sends_over_context_inside_of_a_pipeline(way, remat, pipeline):
    """A stage's layers are a loop: XLA would not work a single one out again."""
    config = helpers.tiny(
        attention__context=way, compute__remat=remat, optimizer__accumulate=3, pipeline__remat=pipeline,
        data__batch_size=24, model__num_layers=4,
    )  # fmt: skip
    parts = helpers.build(config, (1, 2, 1, 2, 1))
    (program,) = compile_steps(parts, helpers.QUICKLY).values()
    found = [c for c in wire.collectives(program.as_text(), parts.mesh) if ring.SCOPE in c.scope]
    assert {c.axis for c in found} == {"context"}
    assert sum(c.sent for c in found) == context.sent(config, parts)


EXCHANGES = helpers.EXCHANGES | {
    "streaming int4": INT4 | {"sync__strategy": "streaming", "sync__interval": 4, "sync__overlap": 1},
    "backward int8": {"sync__codec": "int8", "sync__exchange": "backward"},
}


STAGED = "diloco int4"


@SLOW  # in the default run: all six axes at once, whose gradients cross `replica` by the exchange alone
@pytest.mark.parametrize("name", EXCHANGES)
def test_over_replica_goes_the_exchange_alone_and_the_loss_falls(name):
    """Once with stages, too."""
    config = helpers.tiny(attention__context="ring", optimizer__accumulate=1 + (name == STAGED), **EXCHANGES[name])
    parts = helpers.build(config, (2, 2, 1, 2, 1) if name == STAGED else (2, 1, 2, 2))
    helpers.check_exchange_alone(config, parts)


@pytest.mark.parametrize("way", ["ring", pytest.param("heads", marks=SLOW)])
def test_a_sample_is_what_one_device_writes(way):
    assert helpers.sampled((2, 1, 4, 1), attention__context=way) == helpers.sampled((1, 1, 1))


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), pytest.param(4, 2, marks=SLOW)])
def test_splash_attentions_products_are_plain_ones(heads, kv_heads, monkeypatch):
    """Interpreted: of cuDNN's a run on a GPU asks the same at its start."""
    monkeypatch.setattr(fused, "INTERPRET", True)
    monkeypatch.setattr(fused, "ENOUGH", 1e-5)
    assert not fused.check("splash", heads, kv_heads, 128, jnp.float32, ring.Side)


def test_heads_need_no_pieces():
    """Positions that devices divide, and twice as many pieces do not."""
    config = helpers.tiny(attention__context="auto", data__seq_len=12)
    parts = helpers.build(config, (1, 1, 4, 1))
    assert parts.task.model.compute.context == "heads"
    assert np.all(np.isfinite(helpers.train_here(config, parts, 2, uneven=True, quickly=True)[0]))


def test_a_backward_pass_that_has_moved_is_said(monkeypatch):
    def moved(*sides):
        raise AttributeError("no such thing\nby name")

    monkeypatch.setitem(fused.PRODUCTS, "splash", Products(PLAIN.forward, moved))
    assert fused.check("splash", 2, 2, 8, jnp.float32, ring.Side) == (
        "its passes cannot be taken by themselves (AttributeError: no such thing)"
    )


def test_products_that_differ_are_said(monkeypatch):
    other = lambda *sides: tuple(1.1 * x for x in PLAIN.gradient(*sides))
    monkeypatch.setitem(fused.PRODUCTS, "splash", Products(PLAIN.forward, other))
    assert fused.check("splash", 2, 2, 8, jnp.float32, ring.Side) == "dq of the own product is 10% off"

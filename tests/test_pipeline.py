"""Models whose layers are cut over stages train as whole ones do: the same losses and gradients."""

import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from test_parity import check

from optim.muon import muon
from parallel.cost import wire
from parallel.layout import mesh as meshes
from parallel.layout import pipeline
from parallel.layout.rules import Constrain, spec
from recipes import describe
from recipes.pipeline import described
from recipes.programs import compile_steps, steps
from runtime.config import UsageError

SLOW = pytest.mark.slow
TWICE = {"pipeline__interleave": 2, "model__num_layers": 4}
INT4 = {"sync__codec": "int4"}
# replica × stage × fsdp × context × tensor; micro-batches; more
CASES = [
    ((1, 2, 2, 1, 2), 2, {"pipeline__remat": "stage", "pipeline__gather": "step", "data__document_mask": True}),
    ((2, 2, 1, 1, 2), 4, {"pipeline__remat": "stage"}),
    ((2, 2, 2, 1, 1), 4, {"pipeline__gather": "step"}),
    ((1, 2, 2, 2, 1), 1, {"pipeline__gather": "step", "attention__context": "ring", "pipeline__remat": "stage"}),
    ((1, 2, 2, 2, 1), 2, {"attention__context": "ring"}),
    ((1, 2, 1, 1, 1), 1, {}),
    ((1, 2, 4, 1, 1), 1, {"compute__remat": "full"}),
    ((1, 2, 2, 1, 2), 2, {"compute__remat": "none"}),
    ((4, 2, 1, 1, 1), 2, {"compute__remat": "dots"}),
    ((1, 2, 1, 4, 1), 4, {"attention__context": "gather"}),
    ((1, 2, 1, 2, 2), 8, {"attention__context": "heads", "pipeline__remat": "stage"}),
    ((1, 2, 2, 1, 2), 2, TWICE | {"data__document_mask": True}),
    ((2, 2, 2, 1, 1), 4, TWICE | {"pipeline__gather": "step", "pipeline__remat": "stage"}),
    ((1, 2, 2, 1, 2), 1, TWICE | {"pipeline__gather": "step"}),
    ((1, 2, 1, 2, 2), 4, TWICE | {"attention__context": "ring", "compute__remat": "full"}),
    ((1, 4, 2, 1, 1), 8, TWICE | {"model__num_layers": 8, "pipeline__remat": "stage"}),
    ((1, 4, 2, 1, 1), 4, {"model__num_layers": 12, "pipeline__interleave": 3}),
    ((2, 2, 1, 2, 1, 1), 2, TWICE | helpers.dropless(4) | {"pipeline__remat": "stage"}),
    ((1, 2, 2, 2, 1, 1), 4, TWICE | helpers.dropless(4)),
]


@pytest.mark.parametrize(
    ("mesh", "micro", "more"),
    [pytest.param(*case, marks=[] if i == 0 else [SLOW]) for i, case in enumerate(CASES)],
    ids=lambda x: helpers.name(x) if isinstance(x, tuple) else None,
)
def test_every_mesh_with_stages_trains_like_one_device(mesh, micro, more):
    check(mesh, True, optimizer__accumulate=micro, **more)


ORDERS = [(2, 3, 1), (2, 4, 2), *(pytest.param(*case, marks=SLOW) for case in [
    (4, 1, 1), (4, 6, 1), (4, 8, 1), (4, 1, 2), (4, 6, 2), (4, 8, 2), (2, 1, 3), (2, 3, 3), (4, 12, 3),
])]  # fmt: skip


@pytest.mark.parametrize("gather", ["tick", pytest.param("step", marks=SLOW)])
@pytest.mark.parametrize(("count", "micro", "repeats"), ORDERS)
def test_what_ends_belongs_to_what_has_started(count, micro, repeats, gather):
    """Through layers that add and scale, each in its turn; and it is taken back in order."""
    mesh = meshes.build({"stage": count, "fsdp": 2}, jax.devices()[: 2 * count])
    rows, layers = 4 * micro, 2 * count * repeats
    constrain = Constrain(mesh, micro)
    stages = pipeline.Stages(constrain, rows, "layer", gather, repeats)
    axes = (*("repeats", "layers")[repeats == 1 :], None)
    x_BTD = np.random.default_rng(0).standard_normal((rows, 4, 3)).astype(np.float32)
    w_L = np.linspace(0.5, 1.5, layers, dtype=np.float32)[:, None]
    known_BT = np.arange(rows * 4, dtype=np.float32).reshape(rows, 4) / 50

    def layer_of(_, known):
        return lambda x, w: (x * w + w * known[..., None], None)

    def plain(w_L):
        layer = layer_of(None, known_BT)
        y_BTD = x_BTD
        for w in w_L:
            y_BTD = layer(y_BTD, w)[0]
        return y_BTD

    def staged(w_L):
        x_NTD = stages.start(jnp.asarray(x_BTD), ("positions", None))
        w_L = {"w": w_L if repeats == 1 else w_L.reshape(repeats, -1, 1)}
        layer = lambda *known: lambda x, w: layer_of(*known)(x, w["w"])
        return stages.run(layer, jnp.asarray(known_BT), x_NTD, w_L, {"w": axes}, lambda w: w, None)[0]

    y_BTD = jax.jit(lambda w_L: stages.back(staged(w_L), ("positions", None)))(w_L)
    np.testing.assert_allclose(y_BTD, plain(w_L), rtol=1e-5)
    weight_BT = known_BT + 1
    ours = jax.grad(lambda w: jnp.sum(staged(w) * stages.end(jnp.asarray(weight_BT), ("positions",))[..., None]))
    theirs = jax.grad(lambda w: jnp.sum(plain(w) * weight_BT[..., None]))
    np.testing.assert_allclose(jax.jit(ours)(w_L), jax.jit(theirs)(w_L), rtol=1e-5)


@pytest.mark.parametrize(
    ("remat", "micro", "repeats"),
    [("stage", 2, 1), *(pytest.param(*x, marks=SLOW) for x in [("layer", 4, 1), ("layer", 1, 1), ("stage", 4, 2)])],
)
def test_in_the_loop_two_activations_a_tick_and_pass_cross_stages_and_nothing_else(remat, micro, repeats):
    keys = {"model__num_layers": 2 * repeats, "pipeline__interleave": repeats}
    config = helpers.tiny(optimizer__accumulate=micro, pipeline__remat=remat, **keys)
    parts = helpers.build(config, (1, 2, 2, 1, 2))
    (program,) = compile_steps(parts, helpers.QUICKLY).values()
    text, ticks = program.as_text(), repeats * micro + 1
    found = [c for c in wire.collectives(text, parts.mesh) if c.axis == "stage" and "while/body" in c.scope]
    assert all(pipeline.SCOPE in c.scope for c in found)
    assert f'"known_trip_count":{{"n":"{ticks}"}}' in text
    own = described(config, parts.mesh.shape, itemsize=4)
    rows = config.data.batch_size // (2 * micro)
    assert own.activation == rows * config.data.seq_len // 2 * config.model.model_dim * 4
    assert sum(c.sent for c in found) == own.sent == 4 * ticks * own.activation
    shown = dict(describe.read(config, parts, {"step": program}, {}, {})[0])
    runs = f"{repeats} × " if repeats > 1 else ""
    assert shown["bubble"].startswith(f"{1 / ticks:.0%} of the time: 2 stages of {runs}1 layer, {micro} micro-batch")


@pytest.mark.parametrize("remat", ["matmuls", pytest.param("full", marks=SLOW)])
def test_what_is_picked_of_weights_is_not_kept_for_every_tick(remat):
    """Activations of every tick are, what a layer begins with among them, and no weights."""
    config = helpers.tiny(optimizer__accumulate=8, compute__remat=remat, **TWICE)
    parts = helpers.build(config, (1, 2, 1, 1, 1))
    (lower,) = steps(parts).values()
    kept = set(re.findall(r"tensor<17x([\dx]*)xf32>", lower().as_text()))  # 2 · 8 + 1 ticks
    D, F = parts.param_shapes["blocks"]["mlp"]["up"].shape[2:]
    assert any(shape.endswith(f"32x{D}") for shape in kept)
    assert not [shape for shape in kept if shape.endswith((f"{D}x{F}", f"{F}x{D}", f"{D}x8x8"))]


def test_muon_with_runs_of_layers_is_muon():
    """Layers [2, 3, …], two steps, against [6, …]: updates and momentum."""
    found = []
    for leading in ((6,), (2, 3)):
        axes = {"blocks": {"w": (*("repeats", "layers")[2 - len(leading) :], "embed", "mlp")}}
        made = muon(lambda count: 0.1, axes, 0.9, 0.0, 1e-8, optax.adamw(0.1))
        w = jax.random.normal(jax.random.key(0), (6, 8, 5)).reshape(*leading, 8, 5)
        params = {"blocks": {"w": w}}
        state = made.init(params)

        @jax.jit
        def step(params, state, made=made):
            updates, state = made.update(jax.tree.map(jnp.sin, params), state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(2):
            params, state = step(params, state)
        found.append([np.asarray(x).reshape(6, 8, 5) for x in jax.tree.leaves((params, state)) if x.size == 6 * 8 * 5])
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@SLOW
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_no_layer_leaves_its_stage_however_many_runs_there_are(optimizer):
    """Over stages, what is no activation does not depend on them, whatever the optimizer makes of layers."""
    found = []
    for runs in (1, 2):
        keys = {"model__num_layers": 4, "pipeline__interleave": runs, "optimizer__name": optimizer}
        parts = helpers.build(helpers.tiny(optimizer__accumulate=4, **keys), (1, 2, 2, 1, 1))
        (program,) = compile_steps(parts, helpers.QUICKLY).values()
        sent = [c for c in wire.collectives(program.as_text(), parts.mesh) if c.axis == "stage"]
        found.append(sum(c.sent for c in sent if pipeline.SCOPE not in c.scope))
    assert found[0] == found[1] > 0


@SLOW
def test_what_is_handed_on_is_that_of_all_replicas_of_a_device():
    config = helpers.tiny(optimizer__accumulate=2, sync__replicas=4)
    parts = helpers.build(config, (2, 2, 1, 1, 1))
    (program,) = compile_steps(parts, helpers.QUICKLY).values()
    found = [c for c in wire.collectives(program.as_text(), parts.mesh) if pipeline.SCOPE in c.scope]
    assert sum(c.sent for c in found) == described(config, parts.mesh.shape, itemsize=4).sent


def test_a_further_dimension_of_layers_is_not_cut():
    """As of a caller's own model, whose loops lie in each other."""
    assert spec(("layers", "layers", "embed", "mlp")) == P("stage", None, ("fsdp", "expert", "context"), "tensor")


EXCHANGES = helpers.EXCHANGES | {
    "streaming int4": INT4
    | {"sync__strategy": "streaming", "sync__interval": 4, "sync__overlap": 1, "model__num_layers": 4},
    "eager int4": INT4 | {"sync__strategy": "eager", "sync__interval": 4},
}


@SLOW  # in the default run: tests/test_context.py, with stages too
@pytest.mark.parametrize("name", EXCHANGES)
def test_over_replica_goes_the_exchange_alone_and_the_loss_falls(name):
    config = helpers.tiny(optimizer__accumulate=2, **EXCHANGES[name])
    parts = helpers.build(config, (2, 2, 2, 1, 1))
    helpers.check_exchange_alone(config, parts)


@SLOW
def test_a_sample_is_what_one_device_writes():
    assert (
        helpers.sampled((2, 2, 2, 1, 1))
        == helpers.sampled((1, 2, 1, 2, 2), attention__context="ring")
        == helpers.sampled((1, 1, 1))
    )


STREAMING = {"sync__strategy": "streaming", "sync__interval": 4}
ADAPTER = {"lora__rank": 2, "init__workdir": "runs/base"}


@pytest.mark.parametrize(
    ("mesh", "more", "said"),
    [
        ((1, 3, 1, 1, 1), {}, ["model.num_layers=2", "mesh.stage=3", "sizes: 3; or mesh.stage in {1, 2}"]),
        ((2, 2, 1, 1, 1), {"sync__exchange": "backward"}, ["sync.exchange=backward", "mesh.stage=2", "after"]),
        ((1, 2, 1, 1, 1), {"compute__unroll": True}, ["compute.unroll", "mesh.stage=2"]),
        ((2, 2, 1, 1, 1), STREAMING, ["sync.fragments=2", "mesh.stage=2", "a stage has 1"]),
        ((1, 2, 2, 1, 1), ADAPTER | {"pipeline__gather": "step"}, ["pipeline.gather=step", "lora.rank"]),
        ((1, 2, 1, 1, 1), {"compute__remat": "offload"}, ["compute.remat=offload", "mesh.stage=2", "full, or matmuls"]),
        ((1, 2, 1, 1, 2), {"pipeline__gather": "step"}, ["pipeline.gather=step", "mesh.fsdp=1"]),
        ((1, 2, 1, 1, 1), {"pipeline__interleave": 2},
         ["mesh.stage=2 × pipeline.interleave=2", "sizes: 4; or mesh.stage × pipeline.interleave in {1, 2}"]),
        ((1, 2, 1, 1, 1), ADAPTER | TWICE, ["pipeline.interleave=2", "lora.rank"]),
        ((2, 2, 1, 1, 1), STREAMING | TWICE, ["pipeline.interleave=2", "sync.strategy=streaming"]),
        ((1, 2, 1, 1, 2), {"model__model_dim": 63}, ["embed", "'embed' of size 63", "mesh.stage=2"]),
    ],
    ids=[
        "layers", "backward", "unroll", "streaming", "adapter", "offload", "no shards", "runs", "runs of adapters",
        "runs of fragments", "embedding",
    ],
)  # fmt: skip
def test_what_stages_cannot_take_is_said_before_anything_is_compiled(mesh, more, said):
    with pytest.raises(UsageError) as error:
        helpers.build(helpers.tiny(**more), mesh)
    assert all(part in str(error.value) for part in said), str(error.value)


@pytest.mark.parametrize(
    ("asked", "said"),
    [({"stage": 3}, "and mesh.stage in {1, 2, 4, 8}."), ({"stage": 2, "tensor": 3}, ", beside stage 2.")],
)
def test_a_mesh_that_does_not_fit_is_offered_others(asked, said):
    with pytest.raises(ValueError, match="does not multiply to the 8 devices") as error:
        meshes.fill_sizes({"fsdp": 1} | asked, 8)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"fsdp": -1, "tensor": 3}, "mesh.fsdp=-1 cannot be filled in: tensor 3 does not divide the 8 devices"),
        ({"context": -1, "stage": 3, "tensor": 2}, "mesh.context=-1 cannot be filled in: stage 3 × tensor 2 does not"),
    ],
)
def test_an_axis_that_cannot_be_filled_in_is_said_with_what_is_in_its_way(asked, said):
    with pytest.raises(ValueError) as error:
        meshes.fill_sizes(asked, 8)
    assert str(error.value).startswith(said) and "-1" not in str(error.value).replace("=-1", "")

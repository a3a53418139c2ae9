"""Experts: the router and the products against NumPy float64, every mesh against one device, bytes against the closed
form, drops against a recount; and that the load is balanced, said, and what cannot be is refused.

Every factoring of eight devices: tests/test_factorings.py.
"""

import dataclasses
import math
from types import SimpleNamespace

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import PartitionSpec as P
from test_model import ALONE, F32, LLAMA, float64, random_batch, random_params
from test_parity import check

from model.moe import Moe, route
from model.transformer import Transformer
from optim import build as optimizers
from parallel.cost import compilers, hardware, schedule, targets, wire
from parallel.cost.hlo import Program
from parallel.exchange import units
from parallel.layout import experts, rules
from parallel.layout import mesh as meshes
from parallel.strategies.local import Outer
from recipes import build, describe, programs
from recipes import experts as recipe
from recipes.experts import described, notable, sent
from recipes.programs import compile_steps
from runtime.config import UsageError

SLOW = pytest.mark.slow
MIXTRAL = Moe(experts=6, chosen=2, shared=0, router="softmax", normalise=True, balance="loss")
KINDS = {
    "softmax": MIXTRAL,
    "not normalised": dataclasses.replace(MIXTRAL, normalise=False, chosen=3),
    "sigmoid, bias, shared": Moe(experts=6, chosen=2, shared=2, router="sigmoid", normalise=True, balance="bias"),
    "dense first": dataclasses.replace(MIXTRAL, dense_layers=2, dense_dim=40),
}


EACH = [
    pytest.param(kind, way, marks=[] if (i + j) % 2 == 0 and i != 1 else [SLOW])
    for i, kind in enumerate(KINDS)
    for j, way in enumerate(("grouped", "capacity"))
]


def network(moe: Moe, way: str = "grouped", rows: str = "worst", router: tuple = (0.0, 0.0)) -> Transformer:
    return Transformer(dataclasses.replace(LLAMA, moe=moe), dataclasses.replace(F32, dispatch=(way, rows)), 0.0, router)


# ── one device ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("kind", "way"), EACH)
def test_the_loss_is_that_of_every_expert_computed_and_masked(kind, way):
    model = network(KINDS[kind], way)
    params, batch = random_params(model.config), random_batch()
    total, weight, found = jax.jit(lambda p, b: model.loss(p, b, ALONE))(params, batch)
    assert float(total) == pytest.approx(oracle.loss(float64(params), batch, model.config), rel=1e-5)
    assert found["tokens_dropped"] == 0 and found["expert_load_max"] / weight > 1


def plainly(c: Moe, x_ND, w):
    """Every expert of every token, in the simplest JAX: for its gradients."""
    gates_Nk, ids_Nk, _ = route(c, x_ND @ w["router"], w.get("balance_bias"))
    gates_NE = jnp.sum(jax.nn.one_hot(ids_Nk, c.experts) * gates_Nk[..., None], axis=1)
    h_NEF = jax.nn.silu(jnp.einsum("nd,edf->nef", x_ND, w["gate"])) * jnp.einsum("nd,edf->nef", x_ND, w["up"])
    y_ND = jnp.einsum("nef,efd,ne->nd", h_NEF, w["down"], gates_NE)
    if c.shared:
        shared = w["shared"]
        y_ND = y_ND + (jax.nn.silu(x_ND @ shared["gate"]) * (x_ND @ shared["up"])) @ shared["down"]
    return y_ND


@pytest.mark.parametrize(("kind", "way"), EACH)
def test_gradients_are_those_of_every_expert_computed_and_masked(kind, way):
    model = network(KINDS[kind], way)
    params, batch = random_params(model.config), random_batch()
    masked = network(KINDS[kind], way)
    half = lambda module, x_BTD, ctx: (
        plainly(module.c, x_BTD.reshape(-1, x_BTD.shape[-1]), _weights(module)).reshape(x_BTD.shape),
        None,
    )
    ours = jax.jit(jax.grad(lambda p: model.loss(p, batch, ALONE)[0]))(params)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("model.moe.Experts.__call__", half)
        theirs = jax.jit(jax.grad(lambda p: masked.loss(p, batch, ALONE)[0]))(params)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        if path[-1].key != "balance_bias":
            assert np.linalg.norm(x - y) <= 1e-5 * np.linalg.norm(y), path


def _weights(module) -> dict:
    names = [name for name in ("router", "gate", "up", "down", "balance_bias") if hasattr(module, name)]
    found = {name: getattr(module, name)[...] for name in names}
    shared = {name: getattr(module.shared, name)[...] for name in oracle.SWIGLU} if module.c.shared else {}
    return found | {"shared": shared}


@pytest.mark.parametrize(("way", "rows"), [("capacity", "0.5"), ("capacity", "1"), ("grouped", "0.5")])
def test_what_finds_no_slot_is_left_out_and_counted(way, rows):
    """On one device grouped rows have room for all."""
    N, D, c = 40, 8, MIXTRAL
    draw = np.random.default_rng(0)
    x_ND, logits_NE = (draw.standard_normal(shape).astype(np.float32) for shape in ((N, D), (N, c.experts)))

    @jax.jit
    def through(x_ND, logits_NE):
        gates_Nk, ids_Nk, _ = route(c, logits_NE)
        network = lambda rows, gates, _: rows * gates[..., None]
        found = experts.Experts(ALONE, (way, rows)).through(x_ND, ids_Nk, gates_Nk, network, c.experts)
        return gates_Nk, ids_Nk, *found

    gates_Nk, ids_Nk, y_ND, dropped = jax.device_get(through(x_ND, logits_NE))
    room = N * c.chosen if way == "grouped" else math.ceil(float(rows) * N * c.chosen / c.experts)
    taken, wanted, lost = [0] * c.experts, np.zeros_like(x_ND), 0
    for n in range(N):
        for k in range(c.chosen):
            taken[ids_Nk[n, k]] += 1
            fits = taken[ids_Nk[n, k]] <= room
            wanted[n] += gates_Nk[n, k] * x_ND[n] if fits else 0
            lost += not fits
    assert dropped == lost and (lost > 0) == (way == "capacity")
    np.testing.assert_allclose(y_ND, wanted, rtol=1e-6, atol=1e-6)


def test_the_losses_of_the_router_are_those_of_the_paper():
    """Fedus et al. 2021, eq. 4, with shares of choices; and the mean of logsumexp² (Zoph et al. 2022, eq. 5)."""
    c, N = MIXTRAL, random_batch()["tokens"].size
    model, plain = network(c, router=(0.5, 0.25)), network(c)
    params, batch = random_params(model.config), random_batch(("mask",))
    loss = lambda model: jax.jit(lambda p: model.loss(p, batch, ALONE))(params)
    (with_losses, weight, found), (without, *_) = loss(model), loss(plain)
    wanted, load = 0.0, []
    for layer in range(2):
        h_ND = _router_inputs(params, batch, model.config, layer)
        s_NE = h_ND @ float64(params["blocks"]["mlp"]["router"][layer])
        p_NE = np.exp(s_NE) / np.exp(s_NE).sum(1, keepdims=True)
        f_E = np.bincount(np.argsort(-p_NE, axis=1)[:, : c.chosen].ravel(), minlength=c.experts) / (N * c.chosen)
        z = np.mean(np.log(np.exp(s_NE).sum(1)) ** 2)
        wanted += batch["mask"].sum() * (0.5 * c.experts * np.sum(f_E * p_NE.mean(0)) + 0.25 * z)
        load.append(c.experts * f_E.max())
    assert float(with_losses - without) == pytest.approx(wanted, rel=1e-4)
    assert float(found["expert_load_max"] / weight) == pytest.approx(np.mean(load), rel=1e-5)


def _router_inputs(params, batch, c, layer: int) -> np.ndarray:
    p, rows = float64(params), []
    for tokens_T in batch["tokens"]:
        x_TD = p["embed"][tokens_T]
        for index in range(layer + 1):
            own = oracle.layer_of(p["blocks"], index)
            x_TD = x_TD + oracle.attention(oracle.norm(x_TD, own["attention_norm"], c), own["attention"], c)
            h_TD = oracle.norm(x_TD, own["mlp_norm"], c)
            x_TD = x_TD + oracle.experts(h_TD, own["mlp"], c)
        rows.append(h_TD)
    return np.concatenate(rows)


# ── several ──────────────────────────────────────────────────────────────────────────────────────────────────────

# replica × stage × fsdp × expert × context × tensor
CASES = [
    ((1, 1, 2, 2, 1, 2), {}),
    ((1, 1, 1, 4, 1, 1), {"moe__dispatch": "capacity", "compute__remat": "full"}),
    ((1, 1, 2, 4, 1, 1), {"compute__remat": "none"}),
    ((2, 1, 1, 2, 2, 1), {"attention__context": "ring", "data__document_mask": True}),
    ((1, 2, 1, 2, 1, 2), {"optimizer__accumulate": 2, "pipeline__remat": "stage"}),
    ((2, 2, 1, 2, 1, 1), {"moe__dispatch": "capacity", "compute__unroll": False}),
    ((1, 1, 1, 2, 1, 1), {"compute__unroll": True}),
]


@SLOW  # in the default run: all six axes at once, tests/test_factorings.py
@pytest.mark.parametrize(("mesh", "more"), CASES, ids=lambda x: helpers.name(x) if isinstance(x, tuple) else None)
def test_every_mesh_with_experts_trains_like_one_device(mesh, more):
    check(mesh, True, **helpers.dropless(4), **more)


@SLOW
@pytest.mark.parametrize("mesh", [(1, 2, 2, 2, 1, 1), (1, 2, 1, 4, 1, 1), (1, 1, 1, 2, 2, 2)], ids=helpers.name)
def test_metrics_and_the_balancing_loss_are_those_of_one_device(mesh):
    """Replicas have a balance each."""
    of = {"model__experts": 4, "moe__rows": "worst", "moe__z_loss": 0.1, "moe__balance_weight": 0.1}
    config = helpers.tiny(**of, optimizer__accumulate=2)
    found, wanted = (metrics(config, x, 2, uneven=True) for x in (mesh, (1, 1, 1, 1, 1, 1)))
    for row, exact in zip(found, wanted, strict=True):
        for name in ("loss", "grad_norm", "expert_load_max", "experts_idle", "tokens_dropped"):
            assert row[name] == pytest.approx(exact[name], rel=2e-5), name


BYTES = [
    ((2, 1, 1, 4, 1, 1), {}),  # all-to-all
    ((1, 1, 2, 2, 1, 2), {}),  # all tokens to all
    ((1, 1, 1, 4, 1, 2), {"moe__dispatch": "capacity"}),
    ((1, 1, 1, 4, 1, 1), {"compute__remat": "none"}),
    ((1, 1, 1, 2, 2, 1), {"compute__remat": "full", "moe__rows": "worst"}),
    ((1, 1, 1, 4, 1, 1), {"compute__remat": "dots", "moe__dispatch": "capacity"}),
    ((1, 2, 1, 2, 1, 1), {"optimizer__accumulate": 2}),
    ((1, 2, 1, 4, 1, 1), {"optimizer__accumulate": 2, "pipeline__remat": "stage", "model__num_layers": 4}),
]


@pytest.mark.parametrize(
    ("mesh", "more"),
    [pytest.param(*case, marks=[] if i == 0 else [SLOW]) for i, case in enumerate(BYTES)],
    ids=lambda x: helpers.name(x) if isinstance(x, tuple) else None,
)
def test_bytes_on_the_way_to_experts_are_the_closed_form(mesh, more):
    config = helpers.tiny(model__experts=4, **more)
    parts = helpers.build(config, mesh)
    (program,) = compile_steps(parts, helpers.QUICKLY).values()
    found = [c for c in wire.collectives(program.as_text(), parts.mesh) if experts.SCOPE in c.scope]
    assert {c.axis for c in found} == {"expert"}
    assert sum(c.sent for c in found) == sent(config, parts)
    own = described(config, parts.mesh.shape, parts.task.model.compute)
    assert own.multiplied >= own.tokens * own.chosen
    shown = dict(describe.read(config, parts, {"step": program}, {}, {})[0])
    assert shown["experts"].startswith("4, 2 of a token, balanced by a loss; ")


@SLOW
@pytest.mark.parametrize("name", helpers.EXCHANGES)
def test_over_replica_goes_the_exchange_alone_and_the_loss_falls(name):
    config = helpers.tiny(model__experts=4, model__balance="bias", **helpers.EXCHANGES[name])
    helpers.check_exchange_alone(config, helpers.build(config, (2, 1, 2, 2, 1, 1)))


@SLOW
def test_a_sample_is_what_one_device_writes():
    routed = helpers.dropless(4)
    assert helpers.sampled((2, 1, 1, 2, 1, 2), **routed) == helpers.sampled((1, 2, 1, 4, 1, 1), **routed)
    assert helpers.sampled((1, 1, 1), **routed) == helpers.sampled((1, 1, 1, 4, 1, 1), **routed)


# ── by Mosaic's kernels ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def cores(monkeypatch):
    """That the kernels ask the first device for: here it is the CPU."""
    monkeypatch.setattr(jax.Device, "core_count", 132, raising=False)


@pytest.fixture
def interpreted(cores):
    """Kernels for GPUs, on this machine, instruction by instruction; what nothing has written yet is NaN."""
    from jax.experimental.pallas import mosaic_gpu

    if not hasattr(mosaic_gpu, "set_gpu_interpret_mode"):
        pytest.skip(f"JAX {jax.__version__} interprets no kernel that turns an operand")
    mosaic_gpu.set_gpu_interpret_mode()
    yield
    mosaic_gpu.set_gpu_interpret_mode(None)


def product_with_gradients(product, sizes_E, x_SX, w_EXY, dy_SY) -> tuple:
    y_SY, backward = jax.vjp(lambda x, w: product(sizes_E, x, w), x_SX, w_EXY)
    return y_SY, *backward(dy_SY)


# Rows and features, and the rows of each expert. Rows are no multiple of a block, nor of 8, and fewer than a block.
GROUPS = [(300, 64, 128, (50, 0, 130, 10)), (20, 192, 64, (0, 7, 12)), (256, 128, 128, (0, 128, 0, 128, 0))]


@pytest.mark.parametrize("case", [GROUPS[0], *(pytest.param(case, marks=SLOW) for case in GROUPS[1:])], ids=str)
def test_mosaic_products_and_gradients_are_those_of_xla(interpreted, case):
    from parallel.layout import mosaic

    S, X, Y, groups = case
    sizes_E, E = jnp.array(groups, jnp.int32), len(groups)
    draw, filled = np.random.default_rng(0), (np.arange(S) < sum(groups))[:, None]
    x_SX, w_EXY, dy_SY = (draw.standard_normal(shape) for shape in ((S, X), (E, X, Y), (S, Y)))
    given = [jnp.asarray(x, jnp.bfloat16) for x in (x_SX * filled, w_EXY, dy_SY * filled)]
    found, wanted = (
        jax.jit(lambda *x, p=p: product_with_gradients(p, *x))(sizes_E, *given)
        for p in (mosaic.product, experts._product)
    )
    for x, y in zip(found, wanted, strict=True):
        x, y = (np.asarray(z, np.float32) for z in (x, y))
        assert np.linalg.norm(x - y) <= 1e-3 * np.linalg.norm(y)
    empty = np.array(groups) == 0
    assert empty.any() and not np.asarray(found[2], np.float32)[empty].any()


@SLOW
@pytest.mark.parametrize("mesh", [(1, 1, 1, 2, 1, 1), (1, 1, 1, 4, 1, 1)], ids=helpers.name)
def test_a_mosaic_step_is_that_of_grouped_products(interpreted, monkeypatch, mesh):
    """All tokens to all devices, and an all-to-all; of rows and slots that nothing is in no NaN may come."""
    config = helpers.tiny(model__experts=4, compute__dtype="bfloat16", compute__remat="none", data__batch_size=8)
    found = {}
    for way in ("grouped", "mosaic"):
        monkeypatch.setattr(recipe, "dispatch", lambda c, kind, way=way: (way, "1.25"))
        found[way] = metrics(config, mesh, 1)
    for row, exact in zip(found["mosaic"], found["grouped"], strict=True):
        assert all(row[name] == pytest.approx(exact[name], rel=1e-4) for name in ("loss", "grad_norm"))


def test_mosaic_kernels_take_any_number_of_rows(cores):
    """What their lowering for a GPU asks of shapes, which an interpreter does not."""
    from parallel.layout import mosaic

    for S, X, Y, groups in GROUPS:
        shapes = ((S, X), (len(groups), X, Y), (S, Y))
        given = [jax.ShapeDtypeStruct((len(groups),), jnp.int32)]
        given += [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
        traced = jax.jit(lambda *x: product_with_gradients(mosaic.product, *x)).trace(*given)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("@mosaic_gpu") == 3 and "dot_general" not in text


@SLOW
def test_a_mosaic_step_compiles_for_hopper_and_multiplies_no_more_than_its_rows():
    """As many FLOPs as by slots, which have room for as many: nothing is multiplied with all experts."""
    pytest.importorskip("jax_cuda13_plugin", reason="see requirements-prove.txt")
    target = targets.parse("h100:4", hardware.by_name(hardware.CHIPS))
    compilers.prepare(target.chip)
    mesh = meshes.build({"replica": 1, "fsdp": 1, "expert": 2, "tensor": 2}, compilers.devices(target))
    flops, options = {}, {"compute__attention": "reference", "compute__dtype": "bfloat16"}
    for way in ("capacity", "mosaic"):
        config = helpers.tiny(model__experts=4, moe__dispatch=way, **options)
        parts = build.build(config, mesh)
        text = programs.steps(parts)["step"]().compile(compiler_options=parts.xla_options).as_text()
        flops[way] = schedule.flops(Program.read(text))
    assert flops["mosaic"] == pytest.approx(flops["capacity"], rel=0.01)
    assert text.count('custom_call_target="mosaic_gpu') == 3 * 3  # products, each with two gradients
    rows = described(config, mesh.shape, parts.task.model.compute).multiplied
    dots = schedule.flops(Program.read(text.replace('custom_call_target="mosaic_gpu', 'custom_call_target="')))
    assert flops["mosaic"] - dots == 2 * (3 * 3) * (2 * rows * 64 * 128 / 2)  # two layers; half of the features


# ── the load ─────────────────────────────────────────────────────────────────────────────────────────────────────


def metrics(config, mesh: tuple[int, ...], steps: int, params=None, uneven: bool = False) -> list[dict[str, float]]:
    parts = helpers.build(config, mesh)
    (step,) = compile_steps(parts, helpers.QUICKLY).values()
    state, found = helpers.init_state(config, parts), []
    if params is not None:
        state.params = jax.tree.map(lambda x, y: jax.device_put(y, x.sharding), state.params, params(state.params))
    for n in range(steps):
        state, row = step(state, helpers.batch(config, parts, n, uneven))
        found.append({name: float(x[0]) for name, x in row.items()})
    return found


@pytest.mark.parametrize(("rows", "dropped"), [pytest.param("worst", 0.0, marks=SLOW), ("1", 0.25)])
def test_all_tokens_to_the_same_experts_works_and_is_said(rows, dropped):
    """Scores that are all alike choose the first two of four: two get twice the even load, two none. On two devices
    all goes to the first, which has room for half of it."""
    config = helpers.tiny(model__experts=4, moe__rows=rows, optimizer__lr=0.0, model__balance="none")
    alike = lambda params: _with(params, router=jnp.zeros((2, 64, 4)))
    (found,) = metrics(config, (1, 1, 1, 2, 1, 1), 1, alike)
    assert found["expert_load_max"] == 2 and found["experts_idle"] == 2 * 2  # of two layers
    assert found["tokens_dropped"] == pytest.approx(2 * dropped) and np.isfinite(found["loss"])


@SLOW
@pytest.mark.parametrize("balance", ["loss", "bias"])
def test_a_load_that_is_uneven_becomes_even(balance):
    """Without either it stays so, for the loss gains by it."""
    of = {"loss": {"moe__balance_weight": 0.1}, "bias": {"moe__balance_rate": 0.005}, "none": {}}
    skewed = lambda params: _with(params, router=params["blocks"]["mlp"]["router"].at[..., 0].add(0.1))
    excess = {}
    for kind in (balance, "none"):
        config = helpers.tiny(model__experts=4, model__balance=kind, **of[kind])
        rows = metrics(config, (1, 1, 1), 60, skewed)
        excess[kind] = np.mean([row["expert_load_max"] for row in rows[-20:]]) - 1
    assert excess[balance] < 0.6 * excess["none"]


def _with(params, **of_mlp):
    return params | {"blocks": params["blocks"] | {"mlp": params["blocks"]["mlp"] | of_mlp}}


def test_a_bias_moves_against_the_load_by_its_rate_whatever_the_optimizer():
    axes = {"mlp": {"balance_bias": ("layers", "counts"), "router": ("layers", "embed", "scores")}}
    params = {"mlp": {"balance_bias": jnp.zeros((1, 3)), "router": jnp.ones((1, 2, 3))}}
    pull = {"mlp": {"balance_bias": jnp.array([[1e-9, -1e-7, 0.0]]), "router": jnp.ones((1, 2, 3))}}
    for name in ("adamw", "muon", "sgd", "lion", "sign"):
        schedule = optimizers.schedule("constant", 0.1, 0, 10, 0.1)
        more = {"b1": 0.9, "b2": 0.95, "eps": 1e-8, "momentum": 0.9, "weight_decay": 0.1, "clip_norm": 1.0}
        built = optimizers.optimizer(name, schedule, axes, **more, balance_rate=0.25)
        after, _ = jax.jit(lambda built=built: built.apply(pull, built.init(params), params))()
        np.testing.assert_array_equal(after["mlp"]["balance_bias"], [[-0.25, 0.25, 0.0]])
        assert not np.array_equal(after["mlp"]["router"], params["mlp"]["router"])


@pytest.mark.parametrize("outer", ["nesterov", "sgd", "adam"])
def test_local_replicas_average_their_biases(outer):
    params = {"balance_bias": jnp.array([1.0, 2.0]), "w": jnp.ones(2)}
    mean = {"balance_bias": jnp.array([0.5, -0.25]), "w": jnp.ones(2)}
    made = Outer(outer, 0.7, 0.9, ("balance_bias",))
    after, _ = jax.jit(lambda: made.apply(mean, (params, made.init(params))))()
    np.testing.assert_array_equal(after["balance_bias"], params["balance_bias"] - mean["balance_bias"])
    assert not np.array_equal(after["w"], params["w"] - mean["w"])


@pytest.mark.parametrize("codec", ["topk", pytest.param("int4", marks=SLOW), pytest.param("demo", marks=SLOW)])
def test_a_bias_is_sent_beside_any_codec(codec):
    """Whose messages are gathered, or go in two stages. The router is a unit of its own."""
    config = helpers.tiny(
        model__experts=128, model__mlp_dim=8, model__balance="bias", sync__codec=codec, model__num_layers=4
    )
    parts = helpers.build(config, (4, 1, 1))
    (found,) = describe.traffic(parts, compile_steps(parts, helpers.QUICKLY)).values()
    assert found.stray == 0 and not found.not_counted
    sizes = {unit.name: unit.codec.exact for unit in parts.strategy.exchange.units if not hasattr(unit.codec, "mean")}
    assert any(sizes.values())


def test_a_local_strategy_is_told_what_it_averages():
    outer = {"sync__codec": "int4", "sync__strategy": "diloco", "sync__interval": 2, "model__experts": 4}
    of = lambda **more: helpers.build(helpers.tiny(**outer, **more), (2, 1, 1)).strategy.outer.averaged
    assert of(model__balance="bias") == ("balance_bias",) and of() == ()


def test_experts_count_matrices_and_a_bias_is_sent_as_it_is():
    config = helpers.tiny(model__experts=4, model__balance="bias", sync__codec="topk")
    parts = helpers.build(config, (2, 1, 1, 4, 1, 1))
    leaves = {leaf.name: leaf for leaf in jax.tree.leaves(parts.strategy.exchange.leaves)}
    assert leaves["blocks/mlp/gate"].batch_dims == 2 and leaves["blocks/mlp/gate"].matrix == (2 * 4, 64, 128)
    assert leaves["blocks/mlp/down"].shard(parts.mesh.shape).matrix == (2, 128, 64)
    assert leaves["blocks/mlp/gate"].spec == P("stage", "expert", ("fsdp", "context"), "tensor")
    flat = [leaf.name for leaf in jax.tree.leaves(parts.strategy.exchange.leaves)]
    (own,) = (unit for unit in parts.strategy.exchange.units if flat.index("blocks/mlp/balance_bias") in unit.leaves)
    assert own.codec.exact and isinstance(own, units.Unit)
    assert rules.spec(("experts", "embed")) == P("expert", ("fsdp", "stage", "context"))


def test_idle_experts_and_dropped_tokens_are_said():
    means = {"expert_load_max": 3.0, "experts_idle": 0.5, "tokens_dropped": 0.01}
    moe = dataclasses.replace(MIXTRAL, experts=64)
    assert notable(moe, 12, "1.25", means) == ""
    said = notable(moe, 12, "1.25", means | {"experts_idle": 1.5, "tokens_dropped": 0.2, "expert_load_max": 16.0})
    assert "1.5 of 12 × 64 experts" in said and "20% of what tokens choose" in said and "moe.rows=1.25" in said
    assert "16.0 times the mean" in said


# ── what cannot be ───────────────────────────────────────────────────────────────────────────────────────────────

ROUTED = {"model__experts": 4}


@pytest.mark.parametrize(
    ("mesh", "more", "said"),
    [
        ((1, 1, 1, 2, 1, 1), {}, ["mesh.expert=2", "model.experts=0", "mesh.fsdp"]),
        ((1, 1, 1, 3, 1, 1), ROUTED, ["model.experts=4", "mesh.expert=3", "3 or 6; or mesh.expert in {1, 2}"]),
        ((1, 2, 2, 1, 1, 1), ROUTED | {"pipeline__gather": "step"}, ["pipeline.gather=step", "model.experts"]),
        ((1, 1, 1, 1, 1, 1), {"model__experts": 1}, ["model.experts_per_token=2", "model.experts=1"]),
        ((1, 1, 1, 1, 1, 1), ROUTED | {"model__mlp": "gelu"}, ["model.mlp=gelu", "swiglu"]),
        ((1, 1, 1, 1, 1, 1), ROUTED | {"moe__rows": "twice"}, ["moe.rows='twice'", "worst"]),
        ((1, 1, 1, 1, 1, 1), ROUTED | {"moe__rows": "-1"}, ["moe.rows='-1'"]),
        ((1, 1, 1, 1, 1, 1), ROUTED | {"model__balance": "bias", "optimizer__name": "signum"}, ["bias", "signum"]),
        ((1, 1, 1, 1, 1, 1), ROUTED | {"lora__rank": 2, "init__workdir": "runs/base"}, ["lora.pattern", "attention"]),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_compiled(mesh, more, said):
    with pytest.raises(UsageError) as error:
        helpers.build(helpers.tiny(**more), mesh)
    assert all(part in str(error.value) for part in said), str(error.value)


def test_grouped_products_on_a_gpu_are_refused():
    config = helpers.tiny(model__experts=4)
    of = lambda kind: recipe.dispatch(config, kind)
    assert of("NVIDIA H100") == ("capacity", "1.25") and of("TPU v5p")[0] == "grouped"
    config.moe.dispatch = "grouped"
    with pytest.raises(UsageError, match="moe.dispatch=capacity"):
        of("NVIDIA H100")


MOSAIC = ROUTED | {"moe__dispatch": "mosaic"}


@pytest.mark.parametrize("kind", ["cpu", "TPU v5", "NVIDIA A100-SXM4-80GB", "NVIDIA B200", "NVIDIA GH200 480GB"])
def test_mosaic_kernels_are_refused_elsewhere_than_on_hopper(kind):
    with pytest.raises(UsageError) as error:
        recipe.dispatch(helpers.tiny(**MOSAIC), kind)
    assert all(part in str(error.value) for part in ("moe.dispatch=mosaic", kind, "H100, H200", "moe.dispatch=auto"))


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA H100 PCIe"])
def test_mosaic_kernels_are_said_to_be_unchecked(kind):
    config = helpers.tiny(**MOSAIC)
    compute = dataclasses.replace(F32, dispatch=recipe.dispatch(config, kind))
    parts = SimpleNamespace(
        mesh=SimpleNamespace(shape=helpers.sizes((1,) * 6)),
        task=SimpleNamespace(model=SimpleNamespace(compute=compute)),
    )
    assert dict(recipe.rows(config, parts))["experts"].endswith("; mosaic, whose values no chip has checked")


@pytest.mark.parametrize(
    ("mesh", "more", "said"),
    [
        ((1, 1, 1, 1, 1, 1), {"model__model_dim": 96}, ["model.model_dim=96", "multiples of 64", "64 or 128"]),
        ((1, 1, 1, 1, 1, 4), {}, ["model.mlp_dim=128", "mesh.tensor=4", "multiples of 256", "set 256"]),
    ],
)
def test_features_that_mosaic_kernels_cannot_take_are_refused(mesh, more, said):
    recipe.check(helpers.tiny(**MOSAIC), helpers.sizes((1, 1, 1, 2, 1, 2)))
    with pytest.raises(UsageError) as error:
        recipe.check(helpers.tiny(**MOSAIC, **more), helpers.sizes(mesh))
    assert all(part in str(error.value) for part in ("moe.dispatch=mosaic", "moe.dispatch=capacity", *said))


def test_mosaic_kernels_in_float32_are_refused():
    with pytest.raises(UsageError, match="moe.dispatch=mosaic with compute.dtype=float32: .* bfloat16"):
        recipe.dispatch(helpers.tiny(**MOSAIC, compute__dtype="float32"), "NVIDIA H100")


def test_a_run_with_mosaic_kernels_on_a_cpu_ends_with_a_sentence(tmp_path):
    done = helpers.run_here(tmp_path / "run", "--config.moe.dispatch=mosaic", check=False, config="tiny_moe")
    assert done.returncode == 2 and "moe.dispatch=mosaic on cpu" in done.stderr and "Traceback" not in done.stderr

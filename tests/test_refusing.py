"""One bad batch, of any sort, at any phase of a round: what it leaves behind, for every strategy, codec and optimizer.

A cell is a strategy, a codec and an optimizer that the config allows together. Its programs are compiled once, for a
model that can be written on a postcard, and run for each sort of bad batch and each phase of a round. `make prove`
counts them.
"""

import dataclasses
from functools import cache, partial
from itertools import product

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optim import guard as guards
from optim.messages import OneBitAdam, Signum
from optim.optimizer import Optimizer
from parallel.exchange import exchange as exchanges
from parallel.exchange import units
from parallel.exchange.codecs import CODECS
from parallel.exchange.exchange import Feedback
from parallel.layout import mesh as meshes
from parallel.strategies import eager, local, stale, streaming
from parallel.strategies.sync import Sync
from parallel.strategies.warmed import Warmed
from recipes import methods
from runtime import config as configuration
from runtime.digest import named_arrays

R, ROWS, FEATURES, LAYERS, WINDOW, LR = 2, 8, 8, 2, 8, 0.02
MESH = (1, 2, 1)
STRATEGIES = {
    "sync": {},
    "stale": {"staleness": 2},
    "diloco": {"interval": 4},
    "streaming": {"interval": 4, "fragments": 2, "overlap": 1, "mix": 0.25},
    "eager": {"interval": 4},
}
PHASES = {"sync": 1, "stale": 3, "diloco": 4, "streaming": 4, "eager": 8}
NAMES = {
    "none": {},
    "int4": {"block": 8},
    "sign": {"block": 8},
    "topk": {"density": 1 / 8, "chunk": 8},
    "powersgd": {"rank": 1},
}
OPTIMIZERS = ("adamw", "signum", "onebit_adam")
BAD = ("nan", "large", "empty")


def allowed(strategy: str, codec: str, optimizer: str) -> bool:
    """What the check of the config says, of a real one."""
    options = {"sync__strategy": strategy, "sync__codec": codec, "optimizer__name": optimizer}
    if optimizer == "signum" and codec == "sign":
        options |= {"sync__error_feedback": "off", "sync__stochastic": True}
    try:
        helpers.tiny(**options | ({"sync__interval": 4} if strategy in ("diloco", "streaming", "eager") else {}))
    except configuration.UsageError:
        return False
    return True


CELLS = list(product(STRATEGIES, NAMES, OPTIMIZERS))
QUICK = {("sync", "topk", "adamw"), ("stale", "none", "signum")}


def residual(params, batch, constrain):
    """½ Σ_b |x_b W a − y_b|², W the product of the layers: a row of a batch is (x, y)."""
    w = params["blocks"]["w"]
    y = batch["tokens"] @ w[0] @ w[1] * params["a"]
    error_B = jnp.sum(y, axis=1) - batch["targets"][:, 0]
    return 0.5 * jnp.sum(error_B**2 * batch["mask"][:, 0]), jnp.sum(batch["mask"])


def make(
    strategy: str,
    codec: str,
    optimizer: str,
    mesh=MESH,
    replicas: int = R,
    outer: str = "nesterov",
    layers: int = LAYERS,
):
    """(the strategy, the first parameters, their units.Leaf)."""
    made = meshes.build(helpers.sizes(mesh), jax.devices()[: int(np.prod(mesh))])
    key = jax.random.key(0)
    params = {
        "a": jnp.ones(FEATURES),
        "blocks": {"w": jnp.eye(FEATURES) + 0.1 * jax.random.normal(key, (layers, FEATURES, FEATURES))},
        "never": jnp.ones((4, FEATURES)),  # rows that no batch has
    }
    axes = {"a": (None,), "blocks": {"w": ("layers", "embed", "mlp")}, "never": (None, "embed")}
    leaves = units.leaves(params, axes)
    kind = CODECS[codec](**NAMES[codec], **({"stochastic": True} if (codec, optimizer) == ("sign", "signum") else {}))
    feedback = Feedback() if kind.wants_error_feedback and optimizer != "signum" else None

    def build(tree, kind=kind, feedback=feedback):
        return exchanges.build(kind, "auto", made, replicas, tree, feedback)

    shared = {
        "loss_fn": residual,
        "optimizer": {
            "adamw": Optimizer(lambda step: LR, optax.adamw(LR, weight_decay=0.0), clip_norm=1.0),
            "signum": Signum(lambda step: LR),
            "onebit_adam": OneBitAdam(lambda step: LR),
        }[optimizer],
        "mesh": made,
        "specs": jax.tree.map(lambda leaf: leaf.spec, leaves),
        "accumulate": 1,
        "guard": guards.Guard(6.0, WINDOW),
    }
    by = {"outer": local.Outer(outer, {"nesterov": 0.7, "adam": 0.02}[outer], 0.5)}
    if optimizer == "onebit_adam":
        exact = {"optimizer": dataclasses.replace(shared["optimizer"], frozen=False)}
        warm = Sync(exchange=build(leaves, CODECS["none"](), None), **shared | exact)
        return Warmed(exchange=build(leaves), warm=warm, warm_steps=2 * WINDOW, **shared), params, leaves
    if strategy == "streaming":
        rest = build({name: leaf for name, leaf in leaves.items() if name != "blocks"})
        part = layers // STRATEGIES[strategy]["fragments"]
        own = build({"blocks": jax.tree.map(lambda leaf: leaf.with_layers(part), leaves["blocks"])})
        fragments = streaming.Streaming(exchange=own, rest=rest, **STRATEGIES[strategy], **by, **shared)
        return fragments, params, leaves
    kinds = {"sync": Sync, "stale": stale.Stale, "diloco": local.DiLoCo, "eager": eager.Eager}
    by = by if strategy in ("diloco", "eager") else {}
    return kinds[strategy](exchange=build(leaves), **STRATEGIES[strategy], **by, **shared), params, leaves


@cache
def cell(strategy: str, codec: str, optimizer: str):
    """(strategy, compiled programs, its first state)."""
    made, params, _ = make(strategy, codec, optimizer)
    return made, {name: jax.jit(f) for name, f in made.programs().items()}, jax.jit(made.init)(params)


TARGET = np.linspace(-1.0, 1.0, FEATURES)


def batches(count: int, bad_at: int | None, sort: str):
    rng = np.random.default_rng(0)
    for n in range(count):
        x = rng.standard_normal((R, ROWS, FEATURES)).astype(np.float32)
        y = (x @ TARGET + 0.1 * rng.standard_normal(x.shape[:-1])).astype(np.float32)
        mask = np.ones((R, ROWS, 1), np.float32)
        if n == bad_at:
            x = {"nan": np.nan, "large": 1e3, "empty": 1.0}[sort] * x
            mask = mask * (0 if sort == "empty" else 1)
        yield {"tokens": x, "targets": y[..., None], "mask": mask}


def run(name: tuple[str, str, str], steps: int, bad_at: int | None, sort: str = "nan"):
    """(state, losses, skipped and clipped in the end, applied counters when the bad batch came and at the end)."""
    strategy, programs, state = cell(*name)
    K, losses, pending, metrics = strategy.steps_per_call, [], [], {}
    applied = {}
    for n, batch in enumerate(batches(steps, bad_at, sort)):
        pending.append(batch)
        if len(pending) == K:
            stacked = jax.tree.map(lambda *x: np.stack(x), *pending)
            state, metrics = programs[strategy.program_at(n + 1 - K, 10**6)](state, stacked)
            losses += np.asarray(metrics["loss"]).reshape(K, -1).mean(axis=1).tolist()
            pending = []
        if n in (bad_at, steps - 1):
            applied[n] = sum(int(np.sum(x)) for key, x in named_arrays(state).items() if key.endswith("/applied"))
    return jax.device_get(state), losses, metrics, applied


@pytest.mark.parametrize(
    "name", [pytest.param(c, marks=[] if c in QUICK else [pytest.mark.slow]) for c in CELLS], ids="-".join
)
def test_one_bad_batch_at_any_phase_of_a_round_leaves_no_lasting_trace(name, record_property):
    if not allowed(*name):
        record_property("cells refused by the config", 1)
        return
    record_property("cells", 1)
    start = 3 * WINDOW + 8
    interval = STRATEGIES[name[0]].get("interval", 1)
    steps = start + 8 + 2 * WINDOW * interval
    steps -= steps % 4
    undisturbed, calm, _, _ = run(name, steps, None)
    count = 0
    for sort in BAD:
        for phase in range(PHASES[name[0]]):
            at = start + phase
            state, losses, metrics, applied = run(name, steps, at, sort)
            where = (*name, sort, phase)
            for key, x in named_arrays(state).items():
                assert np.all(np.isfinite(x)), (*where, key)
            assert applied[steps - 1] > applied[at], (*where, "updates are applied again")
            assert int(np.max(metrics["skipped_in_a_row"])) == 0, where
            tail = slice(-WINDOW * interval, None)  # so many rounds: over one, the loss of a local strategy is noise
            assert np.mean(losses[tail]) <= 1.5 * np.mean(calm[tail]) + 0.05, (*where, losses[tail], calm[tail])
            never = np.abs(state.params["never"] - undisturbed.params["never"]).max()
            assert never <= 3 * LR * np.sqrt(steps) if name[1] == "sign" else never == 0, (
                *where,
                "a row without a gradient",
            )
            count += 1
    record_property("bad batches", count)


def test_a_lump_that_residuals_hold_is_cut_off_and_does_not_come_back():
    """With an optimizer whose step is as large as what it is given, the update is refused; the lump is gone with it."""
    strategy, _, state = cell("sync", "topk", "adamw")
    strategy = dataclasses.replace(strategy, optimizer=Optimizer(lambda step: LR, optax.sgd(LR)))
    state, program = dataclasses.replace(state, opt={}), jax.jit(strategy.step)
    for n, batch in enumerate(batches(60, None, "nan")):
        if n == 40:
            lump = lambda x: jnp.where(jnp.arange(x.size).reshape(x.shape) % 17 == 0, 1e4, x)
            worker = jax.jit(partial(jax.tree.map, lump))(state.codec["worker"])
            state, before = dataclasses.replace(state, codec=state.codec | {"worker": worker}), state
        state, metrics = program(state, jax.tree.map(lambda x: x[None], batch))
    assert 1 <= int(state.guard.skipped) <= guards.PATIENCE and int(state.guard.clipped) == 0
    assert int(metrics["skipped_in_a_row"][0]) == 0 and int(state.guard.applied) >= int(before.guard.applied) + 15
    for x, y in zip(jax.tree.leaves(state.params), jax.tree.leaves(before.params), strict=True):
        assert np.abs(x - y).max() < 1, "nothing of the lump is applied"


def test_the_cells_are_those_that_the_config_knows():
    assert set(STRATEGIES) == set(methods.STRATEGIES) and set(NAMES) <= set(CODECS)

"""Strategies: each against what it must equal, on every mesh the same, nothing over the slow axis but its exchange."""

import dataclasses
from collections import Counter
from functools import cache, partial

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optim import guard as guards
from optim import optimizer as optimizers
from optim.messages import OneBitAdam, Signum
from parallel.cost import wire
from parallel.cost.bytes import exchange_bytes
from parallel.exchange import exchange as exchanges
from parallel.exchange import residuals, units
from parallel.exchange.codecs import CODECS
from parallel.layout import mesh as meshes
from parallel.strategies import eager, local, stale
from parallel.strategies.base import Strategy, norms
from parallel.strategies.sync import Sync
from parallel.strategies.warmed import Warmed
from recipes import methods
from recipes.programs import compile_steps, shardings_of
from runtime import config as configuration

SLOW = pytest.mark.slow
# Each strategy as it is tested: options of tiny, and the number of steps that make whole rounds.
OPTIONS = {
    "sync": {},
    "stale": {"sync__staleness": 2, "sync__compensation": 0.5},
    "diloco": {"sync__interval": 4},
    "eager": {"sync__interval": 4},
    "streaming": {"sync__interval": 8, "sync__overlap": 2, "sync__mix": 0.25},
}


def options(strategy: str, codec: str = "none", **more) -> dict:
    return {"sync__strategy": strategy, "sync__codec": codec} | OPTIONS[strategy] | more


@cache
def trained(strategy: str, mesh: tuple[int, int, int], steps: int = 8, **more):
    config = helpers.tiny(**options(strategy, **more))
    losses, state = helpers.train_here(config, helpers.build(config, mesh), steps, quickly=True)
    return losses, jax.device_get(state.params)


def test_the_keys_of_a_method_are_the_fields_of_its_class():
    outer = {"outer.optimizer", "outer.lr", "outer.momentum"}
    known = methods.known()
    assert (
        known.strategies.items()
        >= {
            "sync": set(),
            "stale": {"staleness", "compensation"},
            "diloco": {"interval", *outer},
            "eager": {"interval", *outer},
            "streaming": {"interval", "fragments", "overlap", "mix", *outer},
            "island": {"interval", *outer},
        }.items()
    )
    assert (
        known.codecs.items()
        >= {
            **dict.fromkeys(("none", "bf16"), set()),
            **dict.fromkeys(("fp8", "fp4", "int8", "int4", "int2", "sign"), {"block", "stochastic"}),
            "topk": {"density", "bits"},
            **dict.fromkeys(("randk", "demo"), {"density"}),
            "powersgd": {"rank"},
        }.items()
    )
    assert known.strategies.keys() == OPTIONS.keys() | methods.OUTSIDE.keys()


def test_every_key_of_the_group_is_read_by_a_method_or_by_all():
    by_all = "replicas strategy codec algorithm exchange error_feedback warm_steps allow_stray_bytes decay "
    by_all += "residual_dtype"
    read = set(by_all.split()).union(*methods.known().strategies.values(), *methods.known().codecs.values())
    assert {f"sync.{key}" for key in read} == {key for key in configuration.base_values() if key.startswith("sync.")}


# ── the same on every mesh ───────────────────────────────────────────────────────────────────────────────────────


@SLOW
@pytest.mark.parametrize("strategy", OPTIONS)
def test_with_moments_in_bfloat16_every_strategy_trains_as_with_float32(strategy):
    narrow, exact = (
        trained(strategy, (2, 2, 2), optimizer__moment_dtype=dtype)[0] for dtype in ("bfloat16", "float32")
    )
    np.testing.assert_allclose(narrow, exact, rtol=5e-3)
    assert not np.array_equal(narrow, exact)


@SLOW  # in the default run: the strategies against NumPy, below
@pytest.mark.parametrize("strategy", OPTIONS)
@pytest.mark.parametrize("mesh", [(4, 2, 1), (2, 2, 2), (1, 1, 1)])
def test_four_replicas_train_alike_on_every_mesh(strategy, mesh):
    losses, params = trained(strategy, (4, 1, 1))
    others, other_params = trained(strategy, mesh, sync__replicas=4)
    assert helpers.relative(others, losses) <= 5e-6
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), other_params, params)


# ── what each must equal ─────────────────────────────────────────────────────────────────────────────────────────


@SLOW  # in the default run: stale against NumPy, for 1 and 3 steps, below
@pytest.mark.parametrize("codec", ["int4", "none"])
def test_staleness_0_is_synchronous(codec):
    sync, params = trained("sync", (4, 1, 1), codec=codec)
    same, same_params = trained("stale", (4, 1, 1), codec=codec, sync__staleness=0, sync__compensation=0.0)
    np.testing.assert_array_equal(sync, same)
    jax.tree.map(np.testing.assert_array_equal, params, same_params)


@SLOW
def test_streaming_of_one_fragment_without_overlap_is_diloco():
    diloco, params = trained("diloco", (4, 1, 1))
    more = {"sync__interval": 4, "sync__fragments": 1, "sync__overlap": 0, "sync__mix": 0.0}
    same, same_params = trained("streaming", (4, 1, 1), **more)
    assert helpers.relative(same, diloco) <= 5e-6
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), params, same_params)


@SLOW
def test_diloco_of_one_step_and_plain_sgd_is_synchronous_sgd():
    sgd = {"optimizer__name": "sgd", "optimizer__momentum": 0.0, "optimizer__weight_decay": 0.0,
           "optimizer__clip_norm": 0.0, "optimizer__lr": 0.1}  # fmt: skip
    outer = {"sync__outer__optimizer": "sgd", "sync__outer__lr": 1.0, "sync__interval": 1}
    _, sync = trained("sync", (4, 1, 1), **sgd)
    _, diloco = trained("diloco", (4, 1, 1), **sgd, **outer)
    for a, b in zip(jax.tree.leaves(sync), jax.tree.leaves(diloco), strict=True):
        assert np.abs(a - b).max() <= 2 * 8 * np.finfo(np.float32).eps * np.abs(a).max()


# ── against NumPy float64, on a problem small enough to write down ───────────────────────────────────────────────

FEATURES = 6


def least_squares(params, batch, constrain):
    """½ Σ_b (x_b · (a ⊙ w) − y_b)²: a batch row is (x, y), in `tokens` and `targets`."""
    error_B = batch["tokens"] @ (params["a"] * params["blocks"]["w"][0]) - batch["targets"][:, 0]
    return 0.5 * jnp.sum(error_B**2 * batch["mask"][:, 0]), jnp.sum(batch["mask"])


def gradient64(params, x, y):
    error = x @ (params["a"] * params["w"]) - y
    return {"a": (error @ x) * params["w"] / len(y), "w": (error @ x) * params["a"] / len(y)}


def toy(kind, replicas: int, lr: float = 0.05, codec=None, **fields):
    mesh = meshes.build({"replica": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    axes = {"a": (None,), "blocks": {"w": ("layers", None)}}
    params = {"a": jnp.linspace(0.5, 1.5, FEATURES), "blocks": {"w": jnp.linspace(-1.0, 1.0, FEATURES)[None]}}
    exchange = exchanges.build(codec or CODECS["none"](), "auto", mesh, replicas, units.leaves(params, axes))
    optimizer = optimizers.Optimizer(lambda step: lr, optax.sgd(lr))
    specs = jax.tree.map(lambda leaf: leaf.spec, exchange.leaves)
    guard = guards.Guard(0.0, 4)
    return kind(least_squares, optimizer, exchange, mesh, specs, 1, guard, **fields), params


def toy_batches(replicas: int, steps: int):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((steps, replicas, 8, FEATURES)).astype(np.float32)
    y = (x @ np.arange(FEATURES) / FEATURES + 0.1 * rng.standard_normal(x.shape[:-1])).astype(np.float32)
    return x, y


def run_toy(strategy, params, x, y):
    state = strategy.init(params)
    programs = {name: jax.jit(f) for name, f in strategy.programs().items()}
    K = strategy.steps_per_call
    for n in range(0, len(x), K):
        batch = {
            "tokens": x[n : n + K],
            "targets": y[n : n + K, ..., None],
            "mask": np.ones((*y[n : n + K].shape, 1), np.float32),
        }
        state, _ = programs[strategy.program_at(n, len(x))](state, batch)
    return {"a": np.asarray(state.params["a"]), "w": np.asarray(state.params["blocks"]["w"][0])}


def test_diloco_equals_numpy_float64():
    """3 rounds of 3 workers with Nesterov, and a last round of one step: algorithm 1 of the paper, written out."""
    R, H, lr, outer_lr, momentum = 3, 4, 0.05, 0.7, 0.9
    strategy, params = toy(local.DiLoCo, R, lr, interval=H, outer=local.Outer("nesterov", outer_lr, momentum))
    x, y = toy_batches(R, 3 * H + 1)
    found = run_toy(strategy, params, x, y)
    theta = {"a": np.linspace(0.5, 1.5, FEATURES), "w": np.linspace(-1.0, 1.0, FEATURES)}
    moment = {name: np.zeros(FEATURES) for name in theta}
    local_copies = [dict(theta) for _ in range(R)]
    for n in range(len(x)):
        for i in range(R):
            g = gradient64(local_copies[i], x[n, i].astype(np.float64), y[n, i].astype(np.float64))
            local_copies[i] = {name: local_copies[i][name] - lr * g[name] for name in theta}
        if (n + 1) % H == 0 or n + 1 == len(x):
            for name in theta:
                delta = np.mean([theta[name] - copy[name] for copy in local_copies], axis=0)
                moment[name] = momentum * moment[name] + delta
                theta[name] = theta[name] - outer_lr * (delta + momentum * moment[name])
            local_copies = [dict(theta) for _ in range(R)]
    for name in theta:
        np.testing.assert_allclose(found[name], theta[name], rtol=2e-5, atol=2e-6)


@SLOW  # in the default run: stale and DiLoCo against NumPy
def test_eager_updates_equal_numpy_float64():
    """4 rounds of 3 workers with Nesterov; the last round's pseudo-gradients are in the result too."""
    R, H, lr, outer_lr, momentum = 3, 4, 0.05, 0.7, 0.9
    strategy, params = toy(eager.Eager, R, lr, interval=H, outer=local.Outer("nesterov", outer_lr, momentum))
    x, y = toy_batches(R, 4 * H)
    found = run_toy(strategy, params, x, y)
    start = {"a": np.linspace(0.5, 1.5, FEATURES), "w": np.linspace(-1.0, 1.0, FEATURES)}

    class Outer:
        """Nesterov's step, from its own parameters."""

        def __init__(self):
            self.theta, self.moment = dict(start), {name: np.zeros(FEATURES) for name in start}

        def step(self, delta):
            for name, d in delta.items():
                self.moment[name] = momentum * self.moment[name] + d
                self.theta[name] = self.theta[name] - outer_lr * (d + momentum * self.moment[name])

    shared, own = Outer(), [Outer() for _ in range(R)]
    pending = [{name: np.zeros(FEATURES) for name in start} for _ in range(R)]
    mean = lambda deltas: {name: np.mean([d[name] for d in deltas], axis=0) for name in start}
    for t in range(4):
        fresh = []
        for i in range(R):
            copy = dict(own[i].theta)
            for n in range(t * H, (t + 1) * H):
                g = gradient64(copy, x[n, i].astype(np.float64), y[n, i].astype(np.float64))
                copy = {name: copy[name] - lr * g[name] for name in copy}
            fresh.append({name: own[i].theta[name] - copy[name] for name in copy})
        late = mean(pending)
        shared.step(late)
        for i in range(R):
            own[i].step({name: late[name] + (fresh[i][name] - pending[i][name]) / R for name in start})
        pending = fresh
    shared.step(mean(pending))
    for name in start:
        np.testing.assert_allclose(found[name], shared.theta[name], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("staleness", [1, 3])
@pytest.mark.parametrize("compensation", [0.0, 0.4])
def test_stale_equals_numpy_float64(staleness, compensation):
    R, lr = 2, 0.05
    strategy, params = toy(stale.Stale, R, lr, staleness=staleness, compensation=compensation)
    x, y = toy_batches(R, 9)
    found = run_toy(strategy, params, x, y)
    theta = {"a": np.linspace(0.5, 1.5, FEATURES), "w": np.linspace(-1.0, 1.0, FEATURES)}
    queue = []
    for n in range(len(x)):
        grads = [gradient64(theta, x[n, i].astype(np.float64), y[n, i].astype(np.float64)) for i in range(R)]
        queue.append((dict(theta), {name: np.mean([g[name] for g in grads], axis=0) for name in theta}))
        if n >= staleness:
            old, g = queue.pop(0)
            theta = {
                name: theta[name] - lr * (g[name] + compensation * g[name] ** 2 * (theta[name] - old[name]))
                for name in theta
            }
    for name in theta:
        np.testing.assert_allclose(found[name], theta[name], rtol=2e-5, atol=2e-6)


# ── bytes ────────────────────────────────────────────────────────────────────────────────────────────────────────

# Every codec under sync; the exchange is the same object in the other strategies, which are tried with three.
STEP_CODECS = [
    pytest.param(strategy, codec, marks=[SLOW])  # in the default run: tests/test_bytes.py
    for strategy in OPTIONS
    for codec in (CODECS if strategy == "sync" else ("int4", "topk", "powersgd"))
]


@pytest.mark.parametrize(("strategy", "codec"), STEP_CODECS)
def test_every_program_sends_its_exchange_and_named_scalars_over_the_slow_axis_and_nothing_else(strategy, codec):
    mesh = (2, 2, 1)
    parts = helpers.build(helpers.tiny(**options(strategy, codec)), mesh)
    own = parts.strategy
    expected = {
        name: sum((Counter(exchange_bytes(exchange)) for exchange in exchanges), Counter())
        for name, exchanges in own.exchanges().items()
    }
    assert expected.keys() == own.programs().keys()
    outputs = (shardings_of(parts.state), None)
    for name, program in own.programs().items():
        step = jax.jit(program, out_shardings=outputs).lower(parts.state, parts.batch)
        found = wire.collectives(step.compile(compiler_options=helpers.QUICKLY).as_text(), parts.mesh)
        slow = [c for c in found if c.axis == "replica"]
        scalars = [c for c in slow if "scalars_" in c.scope]
        sent: dict[str, float] = {}
        for c in slow:
            if c not in scalars:
                assert "/exchange/" in c.scope or "exchange" in c.scope, c
                sent[c.dtype] = sent.get(c.dtype, 0) + c.sent
        assert sent == expected[name], name
        R = mesh[0]
        count = {"inner": 0, "step": 3}.get(name, 2)  # of scalars: one alone, with its zero
        assert sum(c.sent for c in scalars) == count * 4 * 2 * (R - 1) / R, name


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────────────────────


@SLOW  # in the default run: test_train.py, and on a small problem test_refusing.py
@pytest.mark.parametrize("codec", ["int4", "topk", "powersgd"])
@pytest.mark.parametrize("strategy", ["sync", "stale"])
def test_a_gradient_of_nan_leaves_no_trace(strategy, codec):
    """The same state as if the call had not been made, but for the counters and, when stale, the queue."""
    config = helpers.tiny(**options(strategy, codec) | ({"sync__staleness": 1} if strategy == "stale" else {}))
    parts = helpers.build(config, (2, 2, 1))
    (program,) = compile_steps(parts, helpers.QUICKLY).values()
    state, late = helpers.init_state(config, parts), strategy == "stale"
    good = [helpers.batch(config, parts, n) for n in range(3)]
    bad = dict(good[0], mask=good[0]["mask"] * np.float32("nan"))
    state, _ = program(state, good[0])
    if late:
        state, _ = program(state, good[1])
    for _ in range(1 + late):
        before = jax.device_get((state.params, state.opt, state.codec))
        state, metrics = program(state, bad)
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(jax.device_get(state))), "what is pending, too"
    jax.tree.map(np.testing.assert_array_equal, jax.device_get((state.params, state.opt, state.codec)), before)
    assert int(metrics["skipped"][0]) == 1 + late, "each is counted when it is new"
    state, metrics = program(state, good[2])
    if late:
        state, metrics = program(state, good[1])
    assert np.isfinite(float(metrics["loss"][0])) and all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state.codec))


@SLOW
@pytest.mark.parametrize("strategy", ["diloco", "eager", "streaming"])
def test_a_replica_with_a_gradient_of_nan_skips_its_step(strategy):
    config = helpers.tiny(**options(strategy, "int4"))
    parts = helpers.build(config, (2, 1, 1))
    programs, state, K = (
        compile_steps(parts, helpers.QUICKLY),
        helpers.init_state(config, parts),
        parts.strategy.steps_per_call,
    )
    for n in range(0, 8, K):
        rows = [helpers.batch(config, parts, n + i) for i in range(K)]
        batch = jax.tree.map(lambda *x: np.concatenate(x), *rows)
        if n == 0:
            batch["mask"][0, 1] = np.nan
        state, metrics = programs[parts.strategy.program_at(n, 8)](
            state, jax.device_put(batch, shardings_of(parts.batch))
        )
    assert np.asarray(metrics["skipped"])[-1].tolist() == [0, 1]
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((state.params, state.codec)))


def test_without_feedback_scaled_signs_stand_still_and_with_it_they_arrive():
    """methods.md 1.0: f(x) = ½|x1 + x2| + |x1 − x2| from (1, 1.001), four copies side by side to fill a byte."""
    from parallel.exchange.exchange import Feedback

    def arrive(feedback) -> float:
        mesh = meshes.build({"replica": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
        leaf = {"x": units.Leaf("x", (8,), jax.sharding.PartitionSpec(None))}
        exchange = exchanges.build(CODECS["sign"](block=8), "gather", mesh, 2, leaf, feedback)

        def step(carry, n):
            x, codec = carry
            f = lambda x: jnp.sum(0.5 * jnp.abs(x[:4] + x[4:]) + jnp.abs(x[:4] - x[4:]))
            g = jax.grad(f)(x)
            mean, codec = exchange.mean({"x": jnp.stack([g, g])}, codec, n)
            return (x - 1e-3 * mean["x"], codec), None

        x = jnp.array([1.0] * 4 + [1.001] * 4)
        (x, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(5000)))((x, residuals.init(exchange)))
        return float(0.5 * jnp.abs(x[0] + x[4]) + jnp.abs(x[0] - x[4]))

    assert arrive(None) > 0.9 and arrive(Feedback()) < 0.01


@pytest.mark.parametrize("codec", ["int8", "int4", "fp8", "fp4"])
def test_stochastic_rounding_is_unbiased(codec):
    """The mean of many decoded draws, within 6 standard errors of x; rounding to nearest is off by far more."""
    x = np.random.default_rng(0).standard_normal(512).astype(np.float32)
    through = lambda c, key=None: c.decode(c.encode(jnp.asarray(x), key))
    keys = jax.random.split(jax.random.key(0), 4000)
    draws = np.asarray(jax.jit(jax.vmap(partial(through, CODECS[codec](stochastic=True))))(keys), np.float64)
    error, spread = draws.mean(axis=0) - x, draws.std(axis=0) / np.sqrt(len(draws))
    # Where one draw in thousands rounds the other way, the spread of the draws says little.
    assert np.all(np.abs(error) <= 6 * spread + 1e-4)
    bias = np.asarray(jax.jit(partial(through, CODECS[codec]()))()) - x
    assert np.sqrt(np.mean(error**2)) < np.sqrt(np.mean(bias**2)) / 5


# ── optimizers whose message is momentum ─────────────────────────────────────────────────────────────────────────


def with_optimizer(optimizer, replicas: int, codec=None, feedback=None):
    strategy, params = toy(Sync, replicas)
    exchange = exchanges.build(
        codec or CODECS["none"](), "auto", strategy.mesh, replicas, strategy.exchange.leaves, feedback
    )
    return dataclasses.replace(strategy, optimizer=optimizer, exchange=exchange), params


def test_signum_is_the_majority_of_the_signs_of_momentum():
    R, lr, beta = 3, 0.01, 0.9
    optimizer = Signum(lambda step: lr, momentum=beta)
    strategy, params = with_optimizer(optimizer, R, CODECS["sign"](block=8, stochastic=True))
    x, y = toy_batches(R, 6)
    found = run_toy(strategy, params, x, y)
    theta = {"a": np.linspace(0.5, 1.5, FEATURES), "w": np.linspace(-1.0, 1.0, FEATURES)}
    momentum = [{name: np.zeros(FEATURES) for name in theta} for _ in range(R)]
    for n in range(len(x)):
        for i in range(R):
            g = gradient64(theta, x[n, i].astype(np.float64), y[n, i].astype(np.float64))
            momentum[i] = {name: beta * momentum[i][name] + (1 - beta) * g[name] for name in theta}
        for name in theta:
            theta[name] = theta[name] - lr * np.sign(sum(np.sign(m[name]) for m in momentum))
    for name in theta:
        np.testing.assert_allclose(found[name], theta[name], rtol=1e-5, atol=1e-6)


def test_a_tie_and_a_vote_of_zero_move_nothing():
    optimizer, params = Signum(lambda step: 1.0), {"w": jnp.arange(4.0)}
    state = optimizer.init(params, 2)
    votes, _ = optimizer.message({"w": jnp.array([[1.0, 0.0, -1.0, 0.0], [-1.0, 0.0, -1.0, 2.0]])}, state)
    np.testing.assert_array_equal(votes["w"], [[1, 0, -1, 0], [-1, 0, -1, 1]])
    after, _ = optimizer.apply({"w": jnp.mean(votes["w"], axis=0)}, state, params, jnp.zeros(()))
    np.testing.assert_array_equal(after["w"] - params["w"], [0, 0, 1, -1])


def test_onebit_adam_freezes_the_variance_and_goes_on_with_momentum():
    """Against NumPy float64, with float32 messages: 4 steps of Adam without bias correction, then 4 with v frozen."""
    R, lr, b1, b2, eps = 2, 0.01, 0.9, 0.99, 1e-6
    make = lambda frozen: OneBitAdam(lambda step: lr, b1=b1, b2=b2, eps=eps, frozen=frozen)
    warm, params = with_optimizer(make(False), R)
    cold, _ = with_optimizer(make(True), R)
    shared = {field.name: getattr(cold, field.name) for field in dataclasses.fields(Strategy)}
    x, y = toy_batches(R, 8)
    found = run_toy(Warmed(**shared, warm=warm, warm_steps=4), params, x, y)
    theta = {"a": np.linspace(0.5, 1.5, FEATURES), "w": np.linspace(-1.0, 1.0, FEATURES)}
    m, v = ({name: np.zeros(FEATURES) for name in theta} for _ in range(2))
    for n in range(len(x)):
        grads = [gradient64(theta, x[n, i].astype(np.float64), y[n, i].astype(np.float64)) for i in range(R)]
        for name in theta:
            g = np.mean([grad[name] for grad in grads], axis=0)
            m[name] = b1 * m[name] + (1 - b1) * g
            v[name] = b2 * v[name] + (1 - b2) * g**2 if n < 4 else v[name]
        theta = {name: theta[name] - lr * m[name] / (np.sqrt(v[name]) + eps) for name in theta}
    for name in theta:
        np.testing.assert_allclose(found[name], theta[name], rtol=1e-4, atol=1e-5)


@SLOW
@pytest.mark.parametrize(
    "options",
    [
        {"optimizer__name": "signum", "sync__codec": "sign", "sync__stochastic": True, "sync__error_feedback": "off"},
        {"optimizer__name": "onebit_adam", "sync__codec": "sign", "optimizer__freeze_steps": 4},
    ],
    ids=["signum", "onebit_adam"],
)
def test_momentum_messages_train_the_tiny_model(options):
    config = helpers.tiny(**options)
    parts = helpers.build(config, (2, 2, 1))
    losses, state = helpers.train_here(config, parts, 12, quickly=True)
    assert losses[-1] < losses[0] - 0.2
    assert int(state.guard.applied) == 12


# ── rows of tokens that never occur ──────────────────────────────────────────────────────────────────────────────

WITHOUT_GRADIENT = [
    # (what is set, whether the codec can say 0 everywhere)
    ({"optimizer__name": "signum", "sync__codec": "none"}, True),
    (
        {"optimizer__name": "signum", "sync__codec": "sign", "sync__stochastic": True, "sync__error_feedback": "off"},
        False,
    ),
    ({"optimizer__name": "onebit_adam", "sync__codec": "sign", "optimizer__freeze_steps": 10}, True),
    ({"optimizer__name": "onebit_adam", "sync__codec": "int8", "optimizer__freeze_steps": 10}, True),
    ({"sync__codec": "sign", "sync__error_feedback": "off"}, False),
    ({"sync__codec": "int4"}, True),
]


@SLOW
@pytest.mark.parametrize(
    ("options", "says_zero"),
    WITHOUT_GRADIENT,
    ids=lambda x: "-".join(map(str, x.values())) if isinstance(x, dict) else "",
)
def test_the_row_of_a_token_that_never_occurs_does_not_drift(options, says_zero):
    """Where the codec can say 0 it keeps its bits; the 1-bit sign cannot, in a block with others: there a row walks at
    random, at most 3 lr √steps, and not lr · steps."""
    steps, lr = 24, 1e-3
    common = {"model__tie_embeddings": False, "optimizer__weight_decay": 0.0, "optimizer__lr": lr}
    config = helpers.tiny(**common | options)
    parts = helpers.build(config, (2, 1, 1))
    never = np.flatnonzero(np.bincount(helpers.text(), minlength=256) == 0)
    before = np.asarray(helpers.init_state(config, parts).params["embed"])[never]
    losses, state = helpers.train_here(config, parts, steps, quickly=True)
    moved = np.asarray(state.params["embed"])[never] - before
    assert losses[-1] < losses[0], "something is learnt"
    if says_zero:
        np.testing.assert_array_equal(moved, 0.0)
    else:
        rows = np.sqrt(np.mean(moved**2, axis=1))
        assert np.all(rows <= 3 * lr * np.sqrt(steps)) and np.all(rows < 0.5 * lr * steps), rows
    assert int(state.guard.skipped) == 0 and float(jnp.max(jnp.abs(state.params["head"]))) < 1


# ── by what devices decide ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mesh", [(2, 2, 2), (1, 4, 2), (4, 1, 2)], ids=helpers.name)
def test_a_norm_is_the_same_bits_on_every_device_and_crosses_no_slow_axis(mesh):
    made = meshes.build(dict(zip(meshes.COMMON, mesh, strict=True)), jax.devices()[: int(np.prod(mesh))])
    P = jax.sharding.PartitionSpec
    specs = {"a": P("fsdp", "tensor"), "b": P(None, "fsdp"), "c": P()}
    rng = np.random.default_rng(0)
    tree = {name: rng.standard_normal((16, 8)).astype(np.float32) for name in specs}
    put = {name: jax.device_put(x, jax.sharding.NamedSharding(made, specs[name])) for name, x in tree.items()}
    program = jax.jit(lambda tree: jnp.stack(norms(made, (specs, tree), (specs, tree)))).lower(put).compile()
    found = program(put)
    exact = np.sqrt(sum(np.sum(x.astype(np.float64) ** 2) for x in tree.values()))
    for shard in found.addressable_shards:
        np.testing.assert_allclose(np.asarray(shard.data), exact, rtol=1e-6)
        np.testing.assert_array_equal(np.asarray(shard.data), np.asarray(found.addressable_shards[0].data))
    sent = wire.collectives(program.as_text(), made)
    assert all(c.axis != "replica" for c in sent)
    assert all(c.kind == "all-gather" for c in sent), "parts are gathered and added up everywhere in one order"


# ── between calls ────────────────────────────────────────────────────────────────────────────────────────────────


def toy_batch(x, y, n: int, K: int) -> dict:
    mask = np.ones((*y[n : n + K].shape, 1), np.float32)
    return {"tokens": x[n : n + K], "targets": y[n : n + K, ..., None], "mask": mask}


TOYS = {
    "sync": (Sync, {}),
    "stale": (stale.Stale, {"staleness": 2}),
    "diloco": (local.DiLoCo, {"interval": 4, "outer": local.Outer("sgd", 1.0, 0.0)}),
    "eager": (eager.Eager, {"interval": 4, "outer": local.Outer("sgd", 1.0, 0.0)}),
}


@pytest.mark.parametrize("name", [*TOYS, pytest.param("streaming", marks=pytest.mark.slow)])
def test_a_step_of_every_strategy_is_an_update(name):
    """Whatever a call makes of them: a checkpoint's number, the schedule and the draws go by it."""
    if name == "streaming":
        parts = helpers.build(helpers.tiny(**options("streaming")), (2, 1, 1))
        state, K = parts.state, parts.strategy.steps_per_call
        after = [jax.eval_shape(program, state, parts.batch)[0] for program in parts.strategy.programs().values()]
        assert K == 4 and all(x.step.shape == () for x in after)
        program = next(iter(parts.strategy.programs().values()))
        step = lambda state, batch: program(state, batch)[0].step
        begun = helpers.init_state(helpers.tiny(**options("streaming")), parts)
        rows = [helpers.batch(helpers.tiny(**options("streaming")), parts, n) for n in range(K)]
        batch = jax.device_put(jax.tree.map(lambda *x: np.concatenate(x), *rows), shardings_of(parts.batch))
        assert int(jax.jit(step, compiler_options=helpers.QUICKLY)(begun, batch)) == K
        return
    kind, fields = TOYS[name]
    strategy, params = toy(kind, 2, **fields)
    x, y = toy_batches(2, 8)
    state, K = strategy.init(params), strategy.steps_per_call
    for n in range(0, 8, K):
        state, metrics = jax.jit(strategy.programs()[strategy.program_at(n, 8)])(state, toy_batch(x, y, n, K))
        assert int(state.step) == n + K and len(metrics["loss"]) == K


def test_a_run_that_would_not_end_in_whole_rounds_is_refused():
    strategy, _ = toy(eager.Eager, 2, interval=8, outer=local.Outer("sgd", 1.0, 0.0))
    methods.check_begin(strategy.steps_per_call, 16, 24)
    for begin, end in ((20, 24), (16, 20), (20, 28)):
        with pytest.raises(
            ValueError, match=f"from step {begin} to {end}, and 8 steps are made at a time.*one of 1, 2, 4"
        ):
            methods.check_begin(strategy.steps_per_call, begin, end)


@SLOW
def test_an_eager_run_that_is_extended_goes_on_like_one_that_was_not_ended():
    R, H, rounds = 3, 4, 40
    strategy, params = toy(eager.Eager, R, 0.02, interval=H, outer=local.Outer("sgd", 1.0, 0.0))
    x, y = toy_batches(R, rounds * H)
    programs = {name: jax.jit(f) for name, f in strategy.programs().items()}

    def apart(stops) -> float:
        """How far the replicas' own parameters are from the shared ones in the end."""
        state, n = strategy.init(params), 0
        for last in stops:
            while n < last:
                state, _ = programs[strategy.program_at(n, last)](state, toy_batch(x, y, n, H))
                n += H
        own = state.strategy["outer"]["replicas"]["params"]
        gaps = jax.tree.map(lambda a, b: float(jnp.abs(a - b[None]).max()), own, state.params)
        return max(jax.tree.leaves(gaps))

    assert apart([rounds * H]) < 1e-5 and apart([2 * H, rounds * H]) < 1e-5


def test_a_batch_without_target_tokens_is_no_update():
    strategy, params = toy(Sync, 2)
    x, y = toy_batches(2, 1)
    before = strategy.init(params)
    state, metrics = jax.jit(strategy.step)(
        before, toy_batch(x, y, 0, 1) | {"mask": np.zeros((1, 2, 8, 1), np.float32)}
    )
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt), (before.params, before.opt))
    assert int(metrics["skipped"][0]) == 1 and np.isfinite(float(metrics["loss"][0]))


def test_a_replica_with_parameters_of_nan_begins_its_next_round_like_the_others():
    strategy, params = toy(local.DiLoCo, 2, interval=2, outer=local.Outer("nesterov", 0.7, 0.9))
    x, y = toy_batches(2, 4)
    state = strategy.init(params)
    own = state.strategy["replicas"]
    broken = own | {"params": jax.tree.map(lambda w: w.at[1].set(jnp.nan), own["params"])}
    state = dataclasses.replace(state, strategy=state.strategy | {"replicas": broken})
    for n in range(4):
        state, metrics = jax.jit(strategy.programs()[strategy.program_at(n, 4)])(state, toy_batch(x, y, n, 1))
        if n == 1:
            jax.tree.map(np.testing.assert_array_equal, state.params, params)
            assert int(metrics["rounds_skipped"][0]) == 1
    assert all(np.all(np.isfinite(w)) for w in jax.tree.leaves((state.params, state.strategy)))
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True))

"""optim/optimizer.py against NumPy float64 (tests/oracle.py): optimizers, schedules and the guard."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

from optim import build, narrow, optimizer
from optim import guard as guards
from parallel.layout.rules import Constrain

ALONE = Constrain(None)  # one device: nothing to constrain
QUICKLY = {"xla_backend_optimization_level": "0"}


def float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


AXES = {
    "embed": ("vocab", "embed"),
    "final_norm": {"scale": ("norm",)},
    "blocks": {
        "attention": {
            "q": ("layers", "embed", "heads", "head_dim"),
            "q_bias": ("layers", "heads", "head_dim"),
            "out": ("layers", "heads", "head_dim", "embed"),
        },
        "attention_norm": {"scale": ("layers", "norm"), "bias": ("layers", "norm")},
        "mlp": {"up": ("layers", "embed", "mlp"), "down": ("layers", "mlp", "embed")},
    },
}
SIZES = {"vocab": 10, "embed": 8, "norm": 8, "heads": 2, "head_dim": 3, "layers": 2, "mlp": 12}
SPARED = ("scale", "q_bias", "bias")  # by weight decay
DEFAULTS = {
    "b1": 0.9,
    "b2": 0.95,
    "eps": 1e-8,
    "momentum": 0.9,
    "weight_decay": 0.1,
    "clip_norm": 0.0,
    "balance_rate": 0.0,
}


def random_tree(seed: int, size: float = 1.0):
    rng = np.random.default_rng(seed)
    draw = lambda axes: (size * rng.standard_normal([SIZES[a] for a in axes])).astype(np.float32)
    return jax.tree.map(draw, AXES, is_leaf=lambda x: isinstance(x, tuple))


def optimize(built: optimizer.Optimizer, params, gradients):
    """The params after each step."""

    @jax.jit
    def step(params, state, gradient):
        message, state = built.message(gradient, state)
        return built.apply(message, state, params, optax.tree.norm(message))

    state, history = built.init(params), []
    for gradient in gradients:
        params, state = step(params, state, gradient)
        history.append(jax.device_get(params))
    return history


ORACLES = {
    "adamw": lambda w, g, s, step, lr, decay: oracle.adamw(w, g, s, step, lr, decay, b1=0.9, b2=0.95, eps=1e-8),
    "lion": lambda w, g, s, step, lr, decay: oracle.lion(w, g, s, lr, decay, b1=0.9, b2=0.95),
    "sgd": lambda w, g, s, step, lr, decay: oracle.sgd(w, g, s, lr, decay, momentum=0.9),
}


@pytest.mark.parametrize("clip_norm", [0.0, 40.0])
@pytest.mark.parametrize("name", ORACLES)
def test_optimizer_equals_numpy(name, clip_norm):
    """5 steps of a falling learning rate; weight decay spares biases and scales; two of the gradients are clipped."""
    params = random_tree(0)
    gradients = [random_tree(1 + i, size) for i, size in enumerate((1.0, 3.0, 0.5, 2.0, 1.0))]
    schedule = build.schedule("cosine", 0.05, 0, 10, 0.1)
    built = build.optimizer(name, schedule, AXES, **DEFAULTS | {"clip_norm": clip_norm})
    history = optimize(built, params, gradients)
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    weights, states = jax.tree.leaves(float64(params)), [None] * len(paths)
    clipped = 0
    for step in range(5):
        grads = jax.tree.leaves(float64(gradients[step]))
        norm = math.sqrt(sum(np.sum(g**2) for g in grads))
        clipped += clip_norm and norm > clip_norm
        shrink = min(1.0, clip_norm / norm) if clip_norm else 1.0
        lr = 0.05 * (0.1 + 0.9 * (1 + math.cos(math.pi * step / 10)) / 2)
        for i, path in enumerate(paths):
            decay = 0.0 if path[-1].key in SPARED else 0.1
            update = ORACLES[name]
            weights[i], states[i] = update(weights[i], shrink * grads[i], states[i], step + 1, lr, decay)
        for path, got, wanted in zip(paths, jax.tree.leaves(history[step]), weights, strict=True):
            assert got.dtype == "float32"
            assert np.abs(got - wanted).max() < 1e-6 * max(1, np.abs(wanted).max()), (step, path)
    assert clipped == (2 if clip_norm else 0)


def test_sgd_without_momentum_and_decay_is_plain():
    params, gradient = random_tree(0), random_tree(1)
    plain = DEFAULTS | {"momentum": 0.0, "weight_decay": 0.0}
    built = build.optimizer("sgd", build.schedule("constant", 0.1, 0, 10, 0.1), AXES, **plain)
    after = optimize(built, params, [gradient])[0]
    jax.tree.map(lambda w, g, got: np.testing.assert_allclose(got, w - 0.1 * g, atol=1e-6), params, gradient, after)


def test_an_unknown_optimizer_or_schedule_is_an_error_with_the_choices():
    with pytest.raises(ValueError, match="adam.*adamw, lion, muon, sgd"):
        build.optimizer("adam", lambda step: 0.1, AXES, **DEFAULTS)
    with pytest.raises(ValueError, match="linear.*constant, cosine, wsd"):
        build.schedule("linear", 0.1, 0, 10, 0.1)


def matrices(tree):
    """The matrices of the blocks: for each layer, all of the model dimension against all of the others."""
    attention_, mlp = tree["blocks"]["attention"], tree["blocks"]["mlp"]
    for layer in range(SIZES["layers"]):
        yield np.reshape(attention_["q"][layer], (8, 6))
        yield np.reshape(attention_["out"][layer], (6, 8))
        yield mlp["up"][layer]
        yield mlp["down"][layer]


def test_muon_orthogonalises_the_matrices_of_the_blocks():
    """First step: Newton-Schulz of the gradient, times 0.2 √(larger side) (Liu et al. 2025, eq. 4), and decay."""
    params, gradients = random_tree(0), [random_tree(1), random_tree(2)]
    built = build.optimizer("muon", build.schedule("constant", 0.1, 0, 10, 0.1), AXES, **DEFAULTS)
    first, second = optimize(built, params, gradients)
    for w, g, after in zip(matrices(params), matrices(gradients[0]), matrices(first), strict=True):
        expected = 0.2 * math.sqrt(max(w.shape)) * oracle.newton_schulz(g.astype(np.float64))
        np.testing.assert_allclose((w - after) / 0.1 - 0.1 * w, expected, atol=1e-4)
    for before, after in zip(matrices(first), matrices(second), strict=True):
        update = (before - after) / 0.1 - 0.1 * before
        values = np.linalg.svd(update, compute_uv=False) / (0.2 * math.sqrt(max(update.shape)))
        assert values.min() > 0.5 and values.max() < 1.3 and np.ptp(values) > 0.01


def not_matrices(tree):
    blocks = tree["blocks"]
    vectors = {"q_bias": blocks["attention"]["q_bias"], **blocks["attention_norm"]}
    return {"embed": tree["embed"], "final": tree["final_norm"]["scale"], **vectors}


def test_muon_gives_embedding_biases_and_norms_the_update_of_adamw():
    params, gradients = random_tree(0), [random_tree(1), random_tree(2), random_tree(3)]
    schedule = build.schedule("constant", 0.1, 0, 10, 0.1)
    with_muon = optimize(build.optimizer("muon", schedule, AXES, **DEFAULTS), params, gradients)
    with_adamw = optimize(build.optimizer("adamw", schedule, AXES, **DEFAULTS), params, gradients)
    for a, b in zip(with_muon, with_adamw, strict=True):
        for name, got in not_matrices(a).items():
            np.testing.assert_allclose(got, not_matrices(b)[name], atol=1e-6, err_msg=name)


def test_what_is_a_block_muon_is_told_by_axes_and_not_by_any_other_name():
    """Layers before those with experts are; a caller's own matrix that is called as they are is not."""
    axes = {"first": {"up": ("first", "embed", "mlp"), "w": ("embed", "mlp")}}
    params = {"first": {"up": np.ones((2, 4, 6), np.float32), "w": np.ones((4, 6), np.float32)}}
    gradient = jax.tree.map(lambda x: np.random.default_rng(0).normal(size=x.shape).astype(np.float32), params)
    schedule = build.schedule("constant", 0.1, 0, 10, 0.1)
    muon, adamw = (
        optimize(build.optimizer(n, schedule, axes, **DEFAULTS), params, [gradient])[0] for n in ("muon", "adamw")
    )
    np.testing.assert_allclose(muon["first"]["w"], adamw["first"]["w"], atol=1e-6)
    assert np.abs(muon["first"]["up"] - adamw["first"]["up"]).max() > 1e-3


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "muon"])
def test_weight_decay_spares_biases_and_scales(name):
    params, zero = random_tree(0), jax.tree.map(np.zeros_like, random_tree(0))
    built = build.optimizer(name, build.schedule("constant", 0.1, 0, 10, 0.1), AXES, **DEFAULTS)
    after = optimize(built, params, [zero])[0]

    def check(path, w, got):
        kept = 1.0 if path[-1].key in SPARED else 1 - 0.1 * 0.1
        np.testing.assert_allclose(got, kept * w, atol=1e-6, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, params, after)


# ── schedules ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "kind, warmup, expected",
    [
        ("constant", 0, {0: 2.0, 50: 2.0, 100: 2.0}),
        ("constant", 4, {0: 0.5, 1: 1.0, 2: 1.5, 3: 2.0, 4: 2.0, 99: 2.0}),
        ("constant", 1, {0: 2.0, 1: 2.0, 99: 2.0}),
        ("cosine", 0, {0: 2.0, 25: 0.2 + 1.8 * (1 + math.sqrt(0.5)) / 2, 50: 1.1, 100: 0.2, 150: 0.2}),
        ("cosine", 20, {0: 0.1, 9: 1.0, 19: 2.0, 20: 2.0, 60: 1.1, 100: 0.2}),
        ("wsd", 0, {0: 2.0, 79: 2.0, 80: 2.0, 85: 1.55, 90: 1.1, 100: 0.2, 150: 0.2}),
        ("wsd", 50, {0: 0.04, 24: 1.0, 49: 2.0, 50: 2.0, 90: 2.0, 95: 1.1, 100: 0.2}),
    ],
)
def test_schedules(kind, warmup, expected):
    """lr 2, 100 steps, to a tenth of it. Warm-up reaches lr at its last step and never wastes one at 0."""
    schedule = build.schedule(kind, 2.0, warmup, 100, 0.1)
    for step, lr in expected.items():
        assert float(schedule(jnp.int32(step))) == pytest.approx(lr, rel=1e-5), step


# ── the guard ────────────────────────────────────────────────────────────────────────────────────────────────────


def feed(guard: guards.Guard, norms):
    """What of each norm in turn is applied, and the counters at the end."""

    @jax.jit
    def step(counters, norm):
        verdict = guard.judge(counters, counters.norms_W, norm)
        return guard.count(counters, verdict), guard.commit(verdict, verdict.scale, 0.0)

    counters, applied = guard.init(), []
    for norm in norms:
        counters, share = step(counters, jnp.float32(norm))
        applied.append(float(share))
    return applied, jax.device_get(counters)


CALM = [1.0, 1.2, 0.8, 1.0]  # mean 1, standard deviation 0.1414: with 6 of the floor of half the mean the limit is 4
WILD = [0.2, 5.0, 0.2, 1.0]  # mean 1.6, standard deviation 1.99: the limit is 13.57


def limit(window) -> float:
    return np.mean(window) + 6 * max(np.std(window), np.mean(window) / 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 100.0, 4.01])
def test_the_guard_refuses_what_is_not_finite_and_spikes(bad):
    applied, counters = feed(guards.Guard(zscore=6.0, window=4), [*CALM, bad])
    assert applied == [1] * 4 + [0]
    assert (counters.applied, counters.skipped, counters.clipped, counters.in_a_row) == (4, 1, 0, 1)
    np.testing.assert_array_equal(counters.norms_W, np.float32(CALM))


@pytest.mark.parametrize(("window", "norm"), [(CALM, 3.99), (CALM, 1e-9), (WILD, 0.99 * limit(WILD))])
def test_the_guard_lets_through_what_is_within_the_limit(window, norm):
    assert feed(guards.Guard(zscore=6.0, window=4), [*window, norm])[0] == [1] * 5
    assert feed(guards.Guard(zscore=6.0, window=4), [*window, 1.01 * limit(window)])[0] == [1] * 4 + [0]


def test_the_guard_judges_only_once_its_window_is_full():
    applied, counters = feed(guards.Guard(zscore=6.0, window=4), [1.0, 1.0, 1.0, 100.0])
    assert applied == [1] * 4 and counters.skipped == 0


def test_after_three_refusals_in_a_row_what_is_finite_is_applied_scaled_to_the_limit():
    """And the limit moves with what was applied, so that a change that stays is let through in the end."""
    guard, window = guards.Guard(zscore=6.0, window=4), list(CALM)
    applied, counters = feed(guard, [*CALM, *[10.0] * 8])
    assert applied[4:7] == [0, 0, 0]
    for share in applied[7:]:
        expected = min(10.0, limit(window))
        assert share == pytest.approx(expected / 10, rel=1e-5)
        window = [*window[1:], expected]
    assert applied[-1] == 1 and counters.in_a_row == 0
    assert counters.skipped == 3 and counters.clipped == sum(0 < share < 1 for share in applied) > 0
    np.testing.assert_allclose(counters.norms_W, window, rtol=1e-5)


def test_what_is_not_finite_is_never_applied_however_often_it_comes():
    applied, counters = feed(guards.Guard(zscore=6.0, window=4), [*CALM, *[math.nan] * 6, 1.0])
    assert applied == [1] * 4 + [0] * 6 + [1]
    assert (counters.skipped, counters.clipped, counters.in_a_row) == (6, 0, 0)


def test_the_window_is_of_applied_norms_only():
    applied, counters = feed(guards.Guard(zscore=6.0, window=4), [*CALM, 100.0, 100.0, math.nan, 1.1, 0.9])
    assert applied == [1] * 4 + [0] * 3 + [1] * 2
    np.testing.assert_array_equal(counters.norms_W, np.float32([0.8, 1.0, 1.1, 0.9]))
    assert (counters.applied, counters.skipped, counters.in_a_row) == (6, 3, 0)


def test_refusals_in_a_row_are_counted_and_forgotten_by_the_next_update():
    assert feed(guards.Guard(6.0, 4), [*CALM, math.nan, math.inf, 99.0])[1].in_a_row == 3
    assert feed(guards.Guard(6.0, 4), [*CALM, math.nan, 1.0, math.inf])[1].in_a_row == 1


def test_zscore_0_lets_spikes_through_but_not_nan():
    applied, counters = feed(guards.Guard(zscore=0.0, window=4), [*CALM, 1e6, math.nan, 1e9, math.inf])
    assert applied == [1] * 5 + [0, 1, 0]
    assert (counters.applied, counters.skipped, counters.in_a_row) == (6, 2, 1)


def test_rounding_to_bfloat16_loses_nothing_on_average():
    """Each value becomes one of its two neighbours, as often as it is near: the mean is the value, within 5 sigma."""
    value, below, above = 1.0 + 3 / 1024, 1.0, 1.0 + 8 / 1024
    drawn = np.asarray(narrow.rounded(jnp.full((200_000,), value, jnp.float32), jax.random.key(0)), np.float64)
    assert set(drawn) == {below, above}
    assert abs(np.mean(drawn == above) - 3 / 8) < 5 * math.sqrt(3 / 8 * 5 / 8 / drawn.size)
    same = jnp.asarray([0.0, -2.5, 2.0**-100, jnp.inf, -jnp.inf, jnp.nan], jnp.float32)
    np.testing.assert_array_equal(np.asarray(narrow.rounded(same, jax.random.key(1)), np.float32), same)


@pytest.mark.parametrize("name", ["adamw", *(pytest.param(n, marks=pytest.mark.slow) for n in ("lion", "sgd", "muon"))])
def test_moments_in_bfloat16_follow_those_in_float32(name):
    """Of many equal weights, on average: a second moment of 1 − β2 = 0.001 a step, which rounding to the nearest would
    leave at 1 for ever."""
    params = {"blocks": {"mlp": {"up": jnp.ones((1, 64, 64))}}, "embed": jnp.ones((64, 64))}
    axes = {"blocks": {"mlp": {"up": AXES["blocks"]["mlp"]["up"]}}, "embed": AXES["embed"]}
    options = DEFAULTS | {"b2": 0.999, "clip_norm": 0.0}
    grads, states = jax.tree.map(lambda x: 0.5 * x, params), []
    for kind in (optimizer.Optimizer, narrow.Narrow):
        own = build.optimizer(name, lambda step: 1e-3, axes, **options, kind=kind)
        state = jax.tree.map(lambda x: jnp.ones_like(x) if x.ndim else x, own.init(params))
        step = jax.jit(own.apply)
        for _ in range(200):
            state = step(grads, state, params)[1]
        states.append(state)
    exact, ours = states
    moments = [x for x in jax.tree.leaves(ours) if x.ndim]
    assert moments and all(x.dtype == jnp.bfloat16 for x in moments)
    for x, like in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
        assert np.mean(float64(x)) == pytest.approx(np.mean(float64(like)), rel=2e-3)


@pytest.mark.slow
def test_what_is_drawn_is_the_same_on_any_mesh():
    x, key = jax.random.normal(jax.random.key(2), (64, 64)), jax.random.key(3)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("a", "b"))
    cut = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b"))
    program = jax.jit(narrow.rounded, in_shardings=(cut, None), out_shardings=cut).lower(x, key).compile()
    assert not re.search("all-|collective", program.as_text())
    np.testing.assert_array_equal(program(jax.device_put(x, cut), key), narrow.rounded(x, key))


def test_an_optimizer_s_state_has_our_names_whatever_the_chain_is():
    """The same with and without weight decay or momentum's neighbours; what optax would call it is nowhere."""
    params = random_tree(0)
    for name, slots in {"adamw": {"first", "second"}, "lion": {"first"}, "sgd": {"momentum"}}.items():
        for decay in (0.0, 0.1):
            options = DEFAULTS | {"weight_decay": decay}
            built = build.optimizer(name, build.schedule("constant", 0.1, 0, 10, 0.1), AXES, **options)
            state = built.init(params)
            assert set(state["blocks"]["mlp"]["up"]) == slots and set(state) <= {*params, "count"}
            again = optimizer.named(optimizer.as_optax(built.transform.init(params), state))
            assert jax.tree.structure(again) == jax.tree.structure(state)

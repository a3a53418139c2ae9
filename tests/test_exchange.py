"""The exchange, for every codec there is: the mean over replicas, the same bits whatever the layout, no copy of a
replicated array different from another, what was not sent is kept, and exactly the bytes of the closed form."""

import dataclasses
from functools import cache

import helpers
import jax
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from parallel.cost import wire
from parallel.cost.bytes import exchange_bytes
from parallel.exchange import exchange as exchanges
from parallel.exchange import net, pairwise, residuals
from parallel.exchange.codecs import CODECS, rounds
from parallel.exchange.codecs.base import is_round
from parallel.exchange.exchange import Feedback
from parallel.exchange.units import Leaf
from parallel.layout import mesh as meshes

# A shard larger than the bucket's limit, layers of matrices over both fast axes, and small arrays over none.
LEAVES = {
    "large": Leaf("large", (64, 1024), P("fsdp", None), 0, 1),
    "both": Leaf("both", (2, 32, 48), P(None, "tensor", "fsdp"), 1, 1),
    "bias": Leaf("bias", (33,), P(None)),
    "norm": Leaf("norm", (2, 16), P(None, None), 1),
}
MESHES = [(2, 1, 1), (4, 1, 1), (2, 2, 1), (2, 1, 2), (8, 1, 1), (4, 2, 1), (4, 1, 2), (2, 4, 1), (2, 1, 4), (2, 2, 2)]
SOME = ((2, 2, 2), (4, 2, 1))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """The large array in four pieces, or two of a shard of it."""
    monkeypatch.setattr(rounds, "PIECE", 2**14)


def variants() -> list[tuple[str, tuple]]:
    """Every codec as it is, and those with a choice of rounding or of bits in the other way too."""
    found = []
    for name, kind in CODECS.items():
        fields = {field.name for field in dataclasses.fields(kind)}
        found.append((name, ()))
        found += [(name, (("stochastic", True),))] if "stochastic" in fields and name != "sign" else []  # votes: below
        found += [(name, (("bits", 2),))] if "bits" in fields else []
    return found


def forms(name: str) -> list[str]:
    codec = CODECS[name]()
    if not is_round(codec) and codec.sparse:
        return ["gather"]
    return ["gather", "two_stage"]


def show(case) -> str:
    name, options = case
    return "-".join([name, *(f"{key}{value}" for key, value in options)])


SLOW = pytest.mark.slow
QUICK = {"none-two_stage", "int4-two_stage", "topk-gather", "powersgd-two_stage"}


def every(case, form: str):
    """A codec in one form; most of them only in the long run."""
    name = f"{show(case)}-{form}"
    return pytest.param(case, form, id=name, marks=[] if name in QUICK else [SLOW])


EVERY = [every(case, form) for case in variants() for form in forms(case[0])]
every_codec = pytest.mark.parametrize(("case", "algorithm"), EVERY)


def make(case, algorithm, sizes, replicas=None, feedback=None):
    name, options = case
    mesh = meshes.build(dict(zip(meshes.COMMON, sizes, strict=True)), jax.devices()[: int(np.prod(sizes))])
    return exchanges.build(CODECS[name](**dict(options)), algorithm, mesh, replicas or sizes[0], LEAVES, feedback)


def tree(replicas: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal((replicas, *leaf.shape), np.float32) for name, leaf in LEAVES.items()}


def placed(exchange, tree_R) -> dict[str, jax.Array]:
    put = lambda x, leaf: jax.device_put(x, NamedSharding(exchange.mesh, P("replica", *leaf.spec)))
    return {name: put(x, LEAVES[name]) for name, x in tree_R.items()}


def shardings(exchange) -> dict:
    is_spec = lambda x: isinstance(x, P)
    return jax.tree.map(lambda s: NamedSharding(exchange.mesh, s), exchange.state_specs, is_leaf=is_spec)


def begin(exchange) -> dict:
    return jax.jit(lambda: residuals.init(exchange), out_shardings=shardings(exchange))()


@cache
def shared(case, algorithm, sizes, replicas, feedback):
    """(exchange, its program): compiled once for all that is asserted of it."""
    exchange = make(case, algorithm, sizes, replicas, feedback)
    return exchange, compiled(exchange)


def compiled(exchange):
    arguments = placed(exchange, tree(exchange.replicas)), begin(exchange), np.int32(0)
    return jax.jit(exchange.mean).lower(*arguments).compile(compiler_options=helpers.QUICKLY)


def same_copies(result: dict) -> dict[str, np.ndarray]:
    """As NumPy, after checking that all devices hold the same copy of every shard, bit for bit."""
    for path, x in jax.tree_util.tree_leaves_with_path(result):
        copies: dict[str, np.ndarray] = {}
        for shard in x.addressable_shards:
            data = np.asarray(shard.data)
            np.testing.assert_array_equal(copies.setdefault(str(shard.index), data), data, err_msg=str(path))
    return jax.tree.map(np.asarray, result)


def run(exchange, steps: int = 1, program=None) -> list:
    """[(mean, state)] of some steps from the same residuals on, each with fresh input."""
    f, state, found = program or compiled(exchange), begin(exchange), []
    for step in range(steps):
        mean, state = f(placed(exchange, tree(exchange.replicas, step)), state, np.int32(step))
        found.append((same_copies(mean), same_copies(state)))
    return found


# ── what it computes ─────────────────────────────────────────────────────────────────────────────────────────────

# ‖decoded − x‖ / ‖x‖ of normal noise: for dense codecs that of their levels (methods.md), for the others at most 1.
ERROR = {"none": 2e-7, "bf16": 0.003, "fp8": 0.05, "fp4": 0.3, "int8": 0.012, "int4": 0.2, "int2": 1.2, "sign": 1.0}


@every_codec
def test_the_exchange_is_the_mean_over_replicas_as_exactly_as_the_codec_promises(case, algorithm):
    exchange, program = shared(case, algorithm, (4, 2, 1), 4, Feedback())  # nothing is owed yet
    ((mean, _),) = run(exchange, program=program)
    kind = CODECS[case[0]]
    assert case[0] in ERROR or is_round(kind) or kind.sparse, f"say in ERROR how exact {case[0]} is"
    bound = ERROR.get(case[0], 1.0) * (2.5 if dict(case[1]).get("stochastic") else 1.5)
    for name, x_R in tree(4).items():
        exact = x_R.astype(np.float64).mean(axis=0)
        error = np.linalg.norm(mean[name] - exact) / np.linalg.norm(exact)
        assert error <= bound, (name, error)
        assert case[0] == "none" or name == "bias" or error > 1e-4 or case[0] == "powersgd", "is the codec used at all?"


# The default run has one codec in blocks.
@pytest.mark.parametrize(
    ("case", "algorithm"),
    [pytest.param(*p.values, id=p.id, marks=p.marks if p.id == "int4-two_stage" else SLOW) for p in EVERY],
)
def test_replicas_on_any_number_of_devices_give_the_same_bits(case, algorithm):
    feedback = Feedback(0.9)
    expected = run(make(case, algorithm, (1, 1, 1), 4, feedback), steps=2)
    for devices in (2, 4):
        found = run(make(case, algorithm, (devices, 1, 1), 4, feedback), steps=2)
        for ours, theirs in zip(found, expected, strict=True):
            jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def rounds_with_draws(case) -> bool:
    name, options = case
    return getattr(CODECS[name](**dict(options)), "uses_key", False)


# In the form of most hops. Not where rounding draws: each piece has random numbers of its own.
@pytest.mark.parametrize(
    ("case", "algorithm"),
    [p for p in EVERY if not rounds_with_draws(p.values[0]) and p.values[1] == forms(p.values[0][0])[-1]],
)
def test_pieces_of_whole_blocks_give_the_same_bits_as_the_array_by_itself(case, algorithm, monkeypatch):
    exchange, program = shared(case, algorithm, (4, 1, 1), 4, Feedback())
    found = run(exchange, 2, program)
    monkeypatch.setattr(rounds, "PIECE", 2**20)
    expected = run(make(case, algorithm, (4, 1, 1), feedback=Feedback()), steps=2)
    for (mean, state), (whole_mean, whole_state) in zip(found, expected, strict=True):
        jax.tree.map(np.testing.assert_array_equal, (mean, state["worker"]), (whole_mean, whole_state["worker"]))


def test_gather_and_two_stage_without_a_codec_give_the_same_bits_as_psum():
    means = [run(make(("none", ()), form, (4, 2, 1)))[0][0] for form in ("gather", "two_stage", "psum")]
    for name in LEAVES:
        np.testing.assert_array_equal(means[0][name], means[1][name])
        np.testing.assert_allclose(means[0][name], means[2][name], rtol=1e-6, atol=1e-7)


def test_without_replicas_nothing_is_rounded():
    exchange = make(("int4", ()), "auto", (1, 2, 1), 1)
    mean, _ = jax.jit(exchange.mean)(placed(exchange, tree(1)), begin(exchange), np.int32(0))
    for name, x in mean.items():
        np.testing.assert_array_equal(x, tree(1)[name][0])


def test_auto_means_gather_for_two_replicas_and_for_sparse_messages_else_two_stage():
    form = lambda name, R: make((name, ()), "auto", (R, 1, 1)).net.form(CODECS[name]())
    assert (form("int8", 2), form("int8", 4), form("topk", 4)) == ("gather", "two_stage", "gather")


@every_codec
def test_start_and_finish_are_the_two_halves_of_mean(case, algorithm):
    exchange, program = shared(case, algorithm, (4, 2, 1), 4, Feedback())
    x, state = placed(exchange, tree(4)), begin(exchange)
    f = lambda x, state: exchange.finish(*exchange.start(x, state, np.int32(0)), np.int32(0))
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.jit(f, compiler_options=helpers.QUICKLY)(x, state), program(x, state, np.int32(0)),
    )  # fmt: skip


# ── error feedback ───────────────────────────────────────────────────────────────────────────────────────────────

OPTIMIZERS = {
    "adamw": optax.adamw(optax.cosine_decay_schedule(0.02, 50), weight_decay=0.1),
    "clipped": optax.chain(
        optax.clip_by_global_norm(0.5), optax.sgd(optax.linear_schedule(0.1, 0.01, 50), momentum=0.9)
    ),
}
WANTED = [p for p in EVERY if CODECS[p.values[0][0]].wants_error_feedback]


def owed(exchange, state) -> dict[str, np.ndarray]:
    """ē = mean of the workers' residuals + the server's, laid like the leaves (mesh without fast axes)."""
    total = {name: np.asarray(x, np.float64).mean(axis=0) for name, x in state["worker"].items()}
    names = list(LEAVES)
    for unit in exchange.units:
        if unit.name in state["server"]:
            chunks = np.asarray(state["server"][unit.name], np.float64)[:, 0, 0, 0, 0, 0]  # [R, pieces, C]
            pieces = np.moveaxis(chunks, 0, 1).reshape(unit.pieces, -1)[:, : unit.size // unit.pieces]
            flat, start = pieces.reshape(-1), 0
            for i, shape in zip(sorted(unit.leaves), unit.shapes, strict=True):
                size = int(np.prod(shape))
                total[sorted(names)[i]] += flat[start : start + size].reshape(shape)
                start += size
    return total


@pytest.mark.parametrize(("case", "algorithm"), WANTED)
@pytest.mark.parametrize("decay", [1.0, pytest.param(0.95, marks=SLOW)])
def test_nothing_is_lost_what_is_applied_and_what_is_owed_add_up(case, algorithm, decay):
    """Identity 4, at every step: ĝ_t + ē_{t+1} = ḡ_t + β ē_t; and with β = 1 the sums over 50 steps."""
    exchange, f = shared(case, algorithm, (4, 1, 1), 4, Feedback(decay))
    rng = np.random.default_rng(0)
    targets = tree(4, 7)
    for name, optimizer in OPTIMIZERS.items() if decay == 1.0 else [("sgd", optax.sgd(0.05))]:
        params = {n: np.zeros(leaf.shape, np.float32) for n, leaf in LEAVES.items()}
        opt_state, state = optimizer.init(params), begin(exchange)
        update = jax.jit(lambda g, s, p, o=optimizer: (lambda u, s: (optax.apply_updates(p, u), s))(*o.update(g, s, p)))
        before = owed(exchange, state)
        applied = dict.fromkeys(LEAVES, 0.0)
        summed, added = dict.fromkeys(LEAVES, 0.0), dict.fromkeys(LEAVES, 0.0)
        for step in range(50 if decay == 1.0 else 5):
            noise = {n: 0.1 * rng.standard_normal(x.shape).astype(np.float32) for n, x in targets.items()}
            grads = {n: params[n][None] - targets[n] + noise[n] for n in LEAVES}
            mean, state = f(placed(exchange, grads), state, np.int32(step))
            after = owed(exchange, state)
            for n in LEAVES:
                exact = grads[n].astype(np.float64).mean(axis=0)
                applied[n], summed[n] = applied[n] + np.asarray(mean[n], np.float64), summed[n] + exact
                # Relative to what is added up in float32: each replica's gradient and residual.
                scale = np.abs(grads[n]).max() + np.abs(np.asarray(state["worker"][n])).max()
                added[n] += scale
                assert np.abs(mean[n] + after[n] - exact - decay * before[n]).max() <= 1e-6 * scale, (name, n, step)
            before = after
            params, opt_state = jax.device_get(update(mean, opt_state, params))
        if decay == 1.0:
            for n in LEAVES:
                assert np.abs(applied[n] + before[n] - summed[n]).max() <= 1e-6 * added[n], (name, n)


@pytest.mark.parametrize(("case", "algorithm"), WANTED)
def test_with_sgd_the_parameters_less_what_is_owed_follow_exact_sgd(case, algorithm):
    """The corollary of Karimireddy et al. 2019: x − γ ē moves as if nothing were compressed."""
    exchange, f = shared(case, algorithm, (4, 1, 1), 4, Feedback())
    state, lr = begin(exchange), 0.05
    x = {n: np.zeros(leaf.shape) for n, leaf in LEAVES.items()}
    exact = {n: np.zeros(leaf.shape) for n, leaf in LEAVES.items()}
    for step in range(20):
        grads = {n: g + x[n].astype(np.float32)[None] for n, g in tree(4, step).items()}
        mean, state = f(placed(exchange, grads), state, np.int32(step))
        for n in LEAVES:
            x[n] = x[n] - lr * np.asarray(mean[n], np.float64)
            exact[n] = exact[n] - lr * grads[n].astype(np.float64).mean(axis=0)
    rest = owed(exchange, state)
    for n in LEAVES:
        assert np.abs(x[n] - lr * rest[n] - exact[n]).max() <= 1e-5 * np.abs(exact[n]).max(), n


@pytest.mark.parametrize("algorithm", ["gather", pytest.param("two_stage", marks=SLOW)])
def test_votes_keep_their_majority(algorithm):
    """Of stochastic signs, whose scale is the largest vote: ±1 is carried exactly."""
    exchange = make(("sign", (("stochastic", True),)), algorithm, (4, 1, 1))
    votes = {name: np.where(x < 0, -1, 1).astype(np.float32) for name, x in tree(4).items()}
    mean, _ = compiled(exchange)(placed(exchange, votes), begin(exchange), np.int32(0))
    for name, x_R in votes.items():
        decided = x_R.sum(axis=0) != 0
        np.testing.assert_array_equal(np.sign(np.asarray(mean[name]))[decided], np.sign(x_R.sum(axis=0))[decided], name)


@every_codec
def test_zeros_stay_zeros_and_are_survived(case, algorithm):
    """A gradient of zeros, and all-zero blocks, decode to zeros; the step after is as good as any."""
    feedback = Feedback() if CODECS[case[0]].wants_error_feedback else None
    exchange, f = shared(case, algorithm, (4, 1, 1), 4, feedback)
    state = begin(exchange)
    for step in range(2):
        mean, state = f(placed(exchange, {n: 0 * x for n, x in tree(4).items()}), state, np.int32(step))
        assert all(not np.any(x) for x in jax.tree.leaves(jax.device_get(mean)))
        assert not any(np.any(x) for x in jax.tree.leaves(jax.device_get((state["worker"], state["server"]))))
    x, total = tree(4), 0.0
    for step in range(30 if feedback else 1):
        mean, state = f(placed(exchange, x), state, np.int32(step))
        total = total + np.asarray(mean["large"]) / (30 if feedback else 1)
    exact = x["large"].mean(axis=0)
    cosine = np.sum(total * exact) / np.linalg.norm(total) / np.linalg.norm(exact)
    assert cosine > (0.5 if feedback else 0.95), cosine


# The last numbers: collectives, and of how many small messages. XLA:CPU writes an all-to-all between R devices as R of
# them; PowerSGD has two rounds of two hops for both its arrays, and one more for what it does not take.
@pytest.mark.parametrize(
    ("codec", "form", "sent", "messages"),
    [
        ("int8", "two_stage", 4 + 1, 3), ("none", "gather", 1, 3), ("topk", "auto", 1, 3),
        ("powersgd", "two_stage", 3 * (4 + 1), 5 / 3),
    ],
)  # fmt: skip
def test_small_messages_travel_together_and_decode_as_if_each_by_itself(codec, form, sent, messages, monkeypatch):
    exchange = make((codec, ()), form, (4, 2, 1), feedback=Feedback())
    arguments = placed(exchange, tree(4)), begin(exchange), np.int32(0)
    together = compiled(exchange)
    monkeypatch.setattr(net, "TOGETHER", 0)
    apart = compiled(exchange)
    jax.tree.map(np.testing.assert_array_equal, together(*arguments), apart(*arguments))
    counted = [len(list(wire.collectives(f.as_text(), exchange.mesh))) for f in (together, apart)]
    assert counted[0] == sent and counted[1] >= sent * messages


# ── over gloo: parallel/exchange/pairwise.py ─────────────────────────────────────────────────────────────────────


@every_codec
def test_pairs_of_devices_carry_the_same_bits_and_bytes(case, algorithm, monkeypatch):
    monkeypatch.setattr(pairwise, "SHORT", 0)
    # An all_gather is made of pairs for 2 devices only, an all_to_all for any power of two.
    devices, replicas = (2, 4) if algorithm == "gather" else (4, 4)
    exchange, program = shared(case, algorithm, (devices, 2, 1), replicas, Feedback())
    in_pairs = dataclasses.replace(exchange, net=dataclasses.replace(exchange.net, **pairwise.collectives(devices)))
    f, x, state = compiled(in_pairs), placed(exchange, tree(replicas)), begin(exchange)
    jax.tree.map(np.testing.assert_array_equal, f(x, state, np.int32(0)), program(x, state, np.int32(0)))
    sent = wire.count(f.as_text(), in_pairs.mesh)
    assert sum(sent["replica"].values()) == sum(exchange_bytes(exchange).values())


# ── bytes ────────────────────────────────────────────────────────────────────────────────────────────────────────


# Every codec and form on the meshes of the default run and on two more, so that every mesh has several.
BYTES = [
    pytest.param(m, *p.values, id=f"{helpers.name(m)}-{p.id}", marks=p.marks if m in SOME else SLOW)
    for i, p in enumerate(EVERY)
    for j, m in enumerate(MESHES)
    if m in SOME or j in (i % len(MESHES), (3 * i + 1) % len(MESHES))
]


@pytest.mark.parametrize(("sizes", "case", "algorithm"), BYTES)
def test_the_compiled_exchange_sends_the_bytes_of_the_closed_form(sizes, case, algorithm):
    exchange, program = shared(case, algorithm, sizes, sizes[0], Feedback())
    assert wire.count(program.as_text(), exchange.mesh) == {"replica": exchange_bytes(exchange)}


@every_codec
def test_bytes_with_two_replicas_on_each_device(case, algorithm):
    exchange, program = shared(case, algorithm, (2, 2, 1), 4, Feedback())
    assert wire.count(program.as_text(), exchange.mesh) == {"replica": exchange_bytes(exchange)}


def test_ratios_to_float32_of_a_large_array():
    """Scales and padding included, against float32 two-stage, of an array of a million parameters."""
    leaf = {"w": Leaf("w", (1024, 1024), P(None, None), 0, 1)}

    def size(name, R, algorithm="auto", **options):
        mesh = meshes.build({"replica": R, "fsdp": 1, "tensor": 1}, jax.devices()[:R])
        return sum(exchange_bytes(exchanges.build(CODECS[name](**options), algorithm, mesh, R, leaf)).values())

    def ratio(name, R, **options):
        return size("none", R, "two_stage") / size(name, R, **options)

    for R in (2, 4, 8):
        assert ratio("bf16", R) == 2 and ratio("int8", R) >= 3.9 and ratio("fp8", R) >= 3.9
        assert ratio("int4", R) >= 7.5 and ratio("fp4", R) >= 7.5
        assert ratio("int2", R) >= 14 and ratio("sign", R) >= 30
        assert ratio("powersgd", R, rank=4) == 1024 * 1024 / (4 * 2048)
    assert ratio("topk", 8) >= 15.5 and ratio("topk", 2) == 64
    assert ratio("randk", 8) == 64


@SLOW
def test_sixteen_devices_send_the_closed_form():
    """r4f2t2 needs more devices than this process has."""
    import subprocess
    import sys

    code = """
import sys; sys.path[:0] = ["tests", "."]
from parallel.cost import wire; from parallel.layout import mesh; mesh.simulate(16)
import helpers
from parallel.cost.bytes import exchange_bytes
for codec in ("none", "int4", "topk", "powersgd"):
    parts = helpers.build(helpers.tiny(sync__codec=codec), (4, 2, 2))
    slow = [c for c in wire.collectives(helpers.compile_quickly(parts).as_text(), parts.mesh) if c.axis == "replica"]
    sent = sum(c.sent for c in slow if "exchange/" in c.scope)
    assert sent == sum(exchange_bytes(parts.strategy.exchange).values()), (codec, sent)
    assert sum(c.sent for c in slow) == sent + 3 * 4 * 2 * 3 / 4
print("equal")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=helpers.ROOT, capture_output=True, text=True)
    assert done.stdout.endswith("equal\n"), done.stderr

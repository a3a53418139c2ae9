"""The fold: each rule against float64 written out, what it equals of the other strategies, and its bits everywhere."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import helpers
import jax
import numpy as np
import optax
import pytest
import test_strategies as others
from folding import CASES, NESTEROV, SGD, Run, between, one_fold

from islands import decode, merge, payload
from islands import state as states
from islands.merge import OUTER_LR, RULES, Average, Compensated, Nesterov, Outer, Quorum
from islands.payload import Draw, Form, Part
from islands.record import Record
from optim.optimizer import Optimizer
from parallel.strategies import local
from parallel.strategies.sync import Sync

SLOW = pytest.mark.slow


# ── what a fold equals ───────────────────────────────────────────────────────────────────────────────────────────

R, LR, ROUNDS = 3, 0.05, 3
START = {"a": np.linspace(0.5, 1.5, others.FEATURES), "w": np.linspace(-1.0, 1.0, others.FEATURES)}


def by_islands(rule, x, y, interval: int, momentum: float = 0.0, staleness: int = 0) -> dict[str, np.ndarray]:
    """Equal islands: all begin a round at the same version, and push one after another."""
    names = "abcdefgh"[: x.shape[1]]
    run = Run(rule, START, names, staleness)
    moments = {name: {leaf: np.zeros(others.FEATURES) for leaf in START} for name in names}
    for n in range(0, len(x), interval):
        base = {leaf: v.astype(np.float64) for leaf, v in run.params().items()}
        for i, name in enumerate(names):
            here = dict(base)
            for k in range(n, min(n + interval, len(x))):
                g = others.gradient64(here, x[k, i].astype(np.float64), y[k, i].astype(np.float64))
                for leaf in here:
                    moments[name][leaf] = momentum * moments[name][leaf] + g[leaf]
                    here[leaf] = here[leaf] - LR * moments[name][leaf]
            assert run.write("push", name, {leaf: base[leaf] - here[leaf] for leaf in here}, tokens=8).folded
    return run.params()


def assert_same(found, wanted):
    """Within 1e-6 of the largest parameter."""
    for leaf in START:
        np.testing.assert_allclose(found[leaf], wanted[leaf], rtol=0, atol=1e-6 * np.abs(wanted[leaf]).max())


@pytest.mark.parametrize("optimizer", ["nesterov", pytest.param("sgd", marks=SLOW), pytest.param("adam", marks=SLOW)])
def test_without_staleness_equal_islands_are_diloco(optimizer):
    """And with Delayed Nesterov, whose momentum waits until all have pushed."""
    H, lr, momentum = 4, (0.05 if optimizer == "adam" else 0.7), 0.9
    strategy, params = others.toy(local.DiLoCo, R, LR, interval=H, outer=local.Outer(optimizer, lr, momentum))
    x, y = others.toy_batches(R, ROUNDS * H)
    wanted = others.run_toy(strategy, params, x, y)
    assert_same(by_islands(Average(Outer(optimizer, lr, momentum)), x, y, H), wanted)
    if optimizer != "adam":
        assert_same(by_islands(Nesterov(Outer(optimizer, lr, momentum)), x, y, H), wanted)


@pytest.mark.parametrize("momentum", [pytest.param(0.0, marks=SLOW), 0.9])
def test_without_staleness_rounds_of_one_step_are_synchronous_sgd(momentum):
    """Each island has momentum of its own: it is linear, so their mean is the momentum of the mean."""
    strategy, params = others.toy(Sync, R, LR)
    core = optax.chain(optax.trace(momentum), optax.scale_by_learning_rate(LR))
    strategy = dataclasses.replace(strategy, optimizer=Optimizer(lambda step: LR, core))
    x, y = others.toy_batches(R, 8)
    wanted = others.run_toy(strategy, params, x, y)
    assert_same(by_islands(Average(SGD), x, y, 1, momentum), wanted)


@pytest.mark.parametrize("rule", [Average(SGD), Nesterov(SGD), Nesterov(SGD, buffer=1), Quorum(SGD), Compensated(SGD)])
def test_one_member_with_outer_sgd_at_rate_1_trains_as_if_alone(rule):
    x, y = others.toy_batches(1, 12)
    params = {leaf: v.copy() for leaf, v in START.items()}
    for k in range(12):
        g = others.gradient64(params, x[k, 0].astype(np.float64), y[k, 0].astype(np.float64))
        params = {leaf: params[leaf] - LR * g[leaf] for leaf in params}
    assert_same(by_islands(rule, x, y, 4), params)


def test_the_outer_optimizers_are_those_of_the_local_strategies():
    assert (Outer.b2, Outer.eps) == (local.Outer.b2, local.Outer.eps)
    with pytest.raises(ValueError, match=r"sync\.outer\.optimizer=adamw: expected one of nesterov, sgd, adam"):
        Outer("adamw")


# ── each rule, written out ───────────────────────────────────────────────────────────────────────────────────────

N = 40


def schedule(rule, seed: int, staleness: int, records: int = 90) -> Run:
    """Islands that join, push, leave and expire at random, with learning rates of their own now and then."""
    rng = np.random.default_rng(seed)
    run = Run(rule, {"u": rng.standard_normal(N), "v": rng.standard_normal(3)}, "ab", staleness)
    for _ in range(records):
        live = run.view.live()
        name = str(rng.choice(list("abcd")))
        if name not in live:
            run.write("join", name)
        elif rng.random() < 0.06 and len(live) > 1:
            run.write("leave", name)
        elif rng.random() < 0.06 and len(live) > 1:
            target = str(rng.choice([other for other in live if other != name]))
            run.write("expire", name, target=target)
        elif staleness < 0 or run.view.islands[name].clock - run.view.live_minimum() <= staleness:
            more = {"base": run.view.islands[name].version} if rule.pins else {}
            more |= {"numbers": {OUTER_LR: (rule.outer.lr / 2).hex()}} if rng.random() < 0.2 else {}
            deltas = {"u": rng.standard_normal(N), "v": rng.standard_normal(3)} if rng.random() < 0.95 else None
            run.write("push", name, deltas, tokens=int(rng.integers(0, 50)), **more)
    assert all(verdict.folded for _, verdict, _ in run.records)
    return run


class Reference:
    """The rules once more, on one vector, in float64, with nothing in common but the names of the numbers."""

    def __init__(self, rule, theta):
        self.rule, self.theta, self.outer = rule, theta.copy(), rule.outer
        self.m, self.first, self.second, self.t = (np.zeros_like(theta) for _ in range(4))
        self.t = 0

    def step(self, d, lr):
        if self.outer.optimizer == "nesterov":
            self.m = self.outer.momentum * self.m + d
            d = d + self.outer.momentum * self.m
        elif self.outer.optimizer == "adam":
            self.t += 1
            b1, b2 = self.outer.momentum, 0.95
            self.first, self.second = b1 * self.first + (1 - b1) * d, b2 * self.second + (1 - b2) * d**2
            d = (self.first / (1 - b1**self.t)) / (np.sqrt(self.second / (1 - b2**self.t)) + 1e-8)
        self.theta = self.theta - lr * d

    def run(self, records, deltas_of):
        rounds, buffer, bases, weights = {}, [], {}, []
        for record, verdict, deltas in records:
            lr, d = merge.rate(self.outer, record), deltas_of(deltas)
            if record.type == "join":
                bases[record.island] = self.theta.copy()
            if record.type == "push" and isinstance(self.rule, Average):
                rounds.setdefault(record.clock, []).append(d)
            elif record.type == "push" and isinstance(self.rule, Compensated):
                gap = self.theta - bases[record.island]
                self.step(d + self.rule.strength * d * d * gap, lr)
                bases[record.island] = self.theta.copy()
            elif record.type == "push" and isinstance(self.rule, Quorum):
                weights.append((record.tokens, d))
                if len(weights) == self.rule.quorum:
                    total = sum(tokens for tokens, _ in weights)
                    self.step(sum(tokens * each for tokens, each in weights) / max(total, 1), lr)
                    weights = []
            elif record.type == "push":
                self.delayed(buffer, d, lr, verdict.live)
            for clock in sorted(clock for clock in rounds if clock < verdict.complete):
                self.step(np.mean(rounds.pop(clock), axis=0), lr)
        return self.theta

    def delayed(self, buffer, d, lr, live):
        """Algorithm 3 of the paper, and its c."""
        if not buffer:
            self.B = self.rule.buffer or live
        buffer.append(d)
        B, beta, c = self.B, self.outer.momentum, self.rule.delay
        if len(buffer) == B:
            self.m = beta * self.m + np.mean(buffer, axis=0)
            self.theta = self.theta - lr * ((1 - c * B + c) * beta * self.m + d / B)
            buffer.clear()
        else:
            self.theta = self.theta - lr * (c * beta * self.m + d / B)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_a_rule_equals_itself_in_float64(case, seed):
    rule, staleness = case
    run = schedule(rule, seed, staleness)
    zeros = {"u": np.zeros(N), "v": np.zeros(3)}
    flat = lambda tree: np.concatenate([np.asarray((tree or zeros)[leaf], np.float32) for leaf in "uv"]).astype(float)
    start = merge.start(rule, {"u": np.zeros(N), "v": np.zeros(3)})
    rng = np.random.default_rng(seed)
    theta = flat({"u": rng.standard_normal(N), "v": rng.standard_normal(3)})
    wanted = Reference(rule, theta).run(run.records, flat)
    assert {record.type for record, _, _ in run.records} == {"join", "push", "leave", "expire"}
    np.testing.assert_allclose(flat(run.params()), wanted, rtol=2e-5, atol=2e-5 * np.abs(wanted).max())
    assert start.arrays.keys() <= run.state.arrays.keys()


def test_a_round_closes_when_who_has_not_pushed_is_gone():
    """By leaving, by expiring, by being taken off the list: each time with those that are there."""
    for gone in ({"type": "leave", "name": "c"}, {"type": "expire", "name": "a", "target": "c"},
                 {"type": "members", "name": "a", "clock": 0}):  # fmt: skip
        run = Run(Average(SGD), {"u": np.zeros(2)}, "abc", 0)
        run.write("push", "a", {"u": [1.0, 2.0]})
        run.write("push", "b", {"u": [3.0, 6.0]})
        np.testing.assert_array_equal(run.params()["u"], [0, 0])
        if gone["type"] == "members":
            _members(run, "ab")
        else:
            run.write(gone.pop("type"), gone.pop("name"), **gone)
        np.testing.assert_array_equal(run.params()["u"], [-2, -4])


def _members(run: Run, names: str) -> None:
    from islands.view import Member

    record = Record(type="members", island="owner", incarnation=0, nonce="0" * 32, clock=0, sequence=run.view.next)
    run.view, verdict = run.view.after(record, members={name: Member("0" * 64) for name in names})
    merge.fold(run.rule, run.state, record, verdict, run.view)


def test_average_keeps_a_sum_for_each_round_that_may_be_open_and_no_more():
    rule, run = Average(NESTEROV, 2), schedule(Average(NESTEROV, 2), 0, 2, 100)
    sums = {name.split("/")[0] for name in run.state.arrays if name.startswith("sum.")}
    assert sums == {"sum.0", "sum.1", "sum.2"}
    assert rule.staleness == 2
    with pytest.raises(ValueError, match=r"island\.staleness=-1: island\.merge=average .* needs a bound of 0 or more"):
        Average(NESTEROV, -1)


def test_compensation_keeps_one_copy_for_each_live_island():
    run = schedule(Compensated(NESTEROV), 0, -1)
    kept = {name.split("/")[0] for name in run.state.arrays if name.startswith("base.")}
    assert kept == {f"base.{name}" for name in run.view.live()}
    _members(run, "a")
    assert {name for name in run.state.arrays if name.startswith("base.")} <= {"base.a/u", "base.a/v"}


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: Nesterov(Outer("adam")), "island.merge=nesterov takes nesterov, or sgd"),
        (lambda: Quorum(NESTEROV, 0), "island.quorum=0"),
    ],
)
def test_what_a_rule_cannot_do_is_said(call, said):
    with pytest.raises(ValueError, match=said):
        call()


def test_the_rules_have_the_names_of_the_config():
    assert set(RULES) == {"average", "compensated", "nesterov", "quorum"}


# ── what does not count ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_dropped_record_changes_nothing():
    for rule in (Average(NESTEROV), Nesterov(NESTEROV, 1), Compensated(NESTEROV), Quorum(NESTEROV)):
        run = Run(rule, {"u": np.ones(3)}, "ab")
        base = {"base": run.view.islands["a"].version} if rule.pins else {}
        run.write("push", "a", {"u": np.ones(3)}, **base)
        before = run.state.digest()
        verdict = run.write("push", "a", {"u": np.ones(3)}, clock=0, **base)  # once more
        assert verdict.why and run.state.digest() == before


def test_a_push_without_blocks_counts_and_applies_nothing():
    run = Run(Nesterov(NESTEROV), {"u": np.ones(3)}, "ab")
    run.write("push", "a")
    np.testing.assert_array_equal(run.params()["u"], 1)
    run.write("push", "b", {"u": np.ones(3)})
    assert run.state.numbers["pushes"] == 0
    np.testing.assert_allclose(run.params()["u"], 1 - 0.1 * (0.5 + 0.8 * 0.5), rtol=1e-6)


def test_a_quorum_of_pushes_without_tokens_applies_nothing():
    run = Run(Quorum(NESTEROV, 2), {"u": np.ones(3)}, "ab")
    for name in "ab":
        run.write("push", name, {"u": np.ones(3)}, tokens=0)
    assert run.state.numbers["pushes"] == 0
    np.testing.assert_array_equal(run.params()["u"], 1)


def test_a_push_too_far_ahead_is_refused():
    """Whatever its writer does: else it would open sums without end, and stale work would count."""
    run = Run(Average(NESTEROV, 1), {"u": np.ones(3)}, "ab", 1)
    assert run.write("push", "a", {"u": np.ones(3)}).folded and run.write("push", "a", {"u": np.ones(3)}).folded
    verdict = run.write("push", "a", {"u": np.ones(3)})
    assert verdict.why == "round 2 is more than 1 ahead of 0, the slowest island's"


def test_a_compensated_push_began_at_the_last_version_that_its_island_wrote():
    run = Run(Compensated(NESTEROV), {"u": np.ones(3)}, "ab")
    assert run.write("push", "a", {"u": np.ones(3)}, base=0).folded
    assert (
        run.write("push", "b", {"u": np.ones(3)}, base=2).why
        == "it began at version 2, not at 1, the last that b wrote"
    )


@pytest.mark.parametrize("rate", [-0.1, 0.2, 1e30])
def test_no_record_may_raise_the_outer_learning_rate(rate):
    run = Run(Nesterov(NESTEROV), {"u": np.ones(3)}, "a")
    verdict = run.write("push", "a", {"u": np.ones(3)}, numbers={OUTER_LR: rate.hex()})
    assert verdict.why.startswith("its outer learning rate")


def test_where_denormals_are_flushed_nothing_is_folded():
    """Inside a JAX program on a CPU they are."""
    run = Run(Nesterov(NESTEROV), {"u": np.ones(3)}, "a")
    before, said = run.state.digest(), []

    def inside() -> np.ndarray:
        try:
            run.write("push", "a", {"u": np.ones(3)})
        except RuntimeError as error:
            said.append(str(error))
        return np.zeros((), np.float32)

    jax.jit(lambda: jax.pure_callback(inside, jax.ShapeDtypeStruct((), np.float32)))().block_until_ready()
    assert said and "takes denormal floats for zeros" in said[0] and run.state.digest() == before


# ── bits ─────────────────────────────────────────────────────────────────────────────────────────────────────────


ELSEWHERE = f"import sys; sys.path[:0] = {[str(helpers.ROOT), str(helpers.ROOT / 'tests')]!r}; "
ELSEWHERE += "import folding; print(folding.one_fold())"


def enabled() -> list[str]:
    """What this NumPy has kernels for beside the plain ones, and this CPU has: what can be turned off."""
    from numpy._core import _multiarray_umath as core

    return [name for name in core.__cpu_dispatch__ if core.__cpu_features__.get(name)]


def elsewhere(python: str = sys.executable, **environment: str) -> str:
    environment = {**os.environ, **environment, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([python, "-c", ELSEWHERE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


GOLDEN = "ee1f5b4d304de8ce5be9eba69796df792401acfead8bfe3e30ce90269015332f"
GOLDEN_SQUARES = "ad408ba9aa772809ae1085e2ff8be11ac630457d96d7246731d207d3baead92e"


def test_a_fold_has_the_bits_that_it_has_always_had():
    """If this fails, logs that exist would replay to other parameters: then `format` of run.json must be raised, and
    what is printed below put into GOLDEN."""
    assert one_fold() == GOLDEN
    x = between(5 * 4096 + 77, -1.0, 1.0)
    x = x * x * x  # of many sizes, so that their sum depends on its order
    assert payload._digest(states.squares([x]).tobytes()) == GOLDEN_SQUARES


@pytest.mark.parametrize("cut", [1, 128, 2500, 4999])
def test_a_fold_of_parts_has_the_bits_of_the_whole(cut):
    assert one_fold(cut) == one_fold()


def test_a_fold_has_the_same_bits_with_the_plainest_kernels():
    assert elsewhere(NPY_DISABLE_CPU_FEATURES=" ".join(enabled()), OPENBLAS_CORETYPE="Prescott") == one_fold()


@SLOW
@pytest.mark.parametrize("coretype", ["Haswell", "SkylakeX", "Prescott"])
@pytest.mark.parametrize("without", range(4))
def test_a_fold_has_the_same_bits_with_other_kernels(without, coretype):
    """The newest kernels are turned off one after another."""
    features = enabled()
    if without > len(features):
        pytest.skip(f"this machine has kernels for {features} only")
    off = features[len(features) - without :]
    assert elsewhere(NPY_DISABLE_CPU_FEATURES=" ".join(off), OPENBLAS_CORETYPE=coretype) == one_fold()


@SLOW
def test_a_fold_has_the_same_bits_under_another_python():
    """Those of .ci/run, and of SLACKLINE_PYTHONS."""
    named = os.environ.get("SLACKLINE_PYTHONS", "").split()
    found = [Path(name) for name in named] + [helpers.ROOT / venv / "bin/python" for venv in (".venv", ".venv-newest")]
    found = [path for path in found if path.exists() and path.absolute() != Path(sys.executable).absolute()]
    if not found:
        pytest.skip("there is no other Python with JAX: SLACKLINE_PYTHONS names none, and .ci/run has made none")
    for path in found:
        assert elsewhere(str(path)) == one_fold()


def test_a_snapshot_holds_a_state_to_the_bit():
    """As blobs of the codec `none`, denormal numbers included; folding goes on as if nothing had been."""
    run = schedule(Nesterov(NESTEROV), 0, -1)
    run.state.arrays["momentum/u"][:4] = [1e-41, -1e-45, -0.0, 0.0]
    arrays, form = run.state.arrays, Form({k: len(x) for k, x in run.state.arrays.items()}, decode.build("none"))
    blobs = list(payload.encode(form, [Part(name, 0, x) for name, x in arrays.items()], Draw(0, "a", 0)))
    text = payload.manifest(form, [piece for blob in blobs for piece in blob.pieces])
    stored = {blob.digest: blob.data for blob in blobs}
    found = payload.read_manifest(form, text, {name: len(data) for name, data in stored.items()})
    again = {name: np.empty(n, np.float32) for name, n in form.sizes.items()}
    for name, at, x in payload.read(form, found, form.whole(), lambda digest, at, n: stored[digest][at : at + n]):
        again[name][at : at + len(x)] = x
    restored = states.State(again, json.loads(json.dumps(run.state.numbers)))
    assert restored.digest() == run.state.digest()
    for state in (run.state, restored):
        run.state = state
        view = run.view
        run.write("push", next(iter(run.view.live())), {"u": np.ones(N), "v": np.ones(3)})
        run.view, found = view, state.digest()
    assert found == run.state.digest()


# ── norms ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_norm_is_the_same_whoever_adds_up_which_blocks():
    rng = np.random.default_rng(0)
    x = {"u": rng.standard_normal(5 * 4096 + 77).astype(np.float32), "v": rng.standard_normal(3).astype(np.float32)}
    whole = {leaf: states.squares([values]) for leaf, values in x.items()}
    wanted = states.norm(whole)
    assert wanted == pytest.approx(np.sqrt(sum(np.sum(v.astype(np.float64) ** 2) for v in x.values())), rel=1e-14)
    for cut in (4096, 3 * 4096):
        for step in (1000, 4096, 10**6):
            parts = [x["u"][:cut], x["u"][cut:]]
            joined = [states.squares(p[i : i + step] for i in range(0, len(p), step)) for p in parts]
            assert states.norm(whole | {"u": np.concatenate(joined)}) == wanted
    assert states.norm({"u": states.squares([])}) == 0

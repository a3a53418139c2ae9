"""The fold: what becomes of the parameters when a record is folded. (state, record) -> state, the same bits everywhere.

NumPy float32 on the host, one operation at a time: + − × ÷ √ and comparisons of elements, which have the same bits on
every CPU, in the order of the records. No dot, norm, power or exp: those have not. Each element is folded by itself, so
that a process may hold any part of the arrays; what a rule must know of the members comes with the verdict, as numbers.
Arrays are folded in place, a block of each at a time, while it is in a core's cache.

Δ is a pseudo-gradient: the parameters that a round began with less those that it ended with. N live islands, θ the
parameters, m the momentum, β `outer.momentum`, ε the outer learning rate: `outer.lr`, or the number OUTER_LR of the
record that brings a step about.

A push that members refuse when they have seen what is in it (not finite, beyond its norm bound, no payload at all) is
folded as one of zeros: its round counts, and nothing of it is applied.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from islands import record as records
from islands.record import Record
from islands.state import STEP, Blocks, State, check_denormals
from islands.view import Verdict, View

OUTER_LR = "outer_lr"


@dataclass(frozen=True)
class Outer:
    """What is done with a mean pseudo-gradient: nesterov, sgd (without momentum), adam, as in
    parallel/strategies/local.py."""

    optimizer: str = "nesterov"
    lr: float = 0.7
    momentum: float = 0.9
    b2: ClassVar[float] = 0.95
    eps: ClassVar[float] = 1e-8
    slots: ClassVar[Mapping[str, tuple[str, ...]]] = {"nesterov": ("momentum",), "sgd": (), "adam": ("first", "second")}

    def __post_init__(self):
        if self.optimizer not in self.slots:
            raise ValueError(f"sync.outer.optimizer={self.optimizer}: expected one of {', '.join(self.slots)}")

    def init(self, state: State) -> None:
        for slot in self.slots[self.optimizer]:
            state.add(slot)

    def step(self, state: State, means: Blocks, record: Record) -> None:
        """One step; the means are overwritten."""
        lr, t = rate(self, record), np.empty(STEP, np.float32)
        count = state.count("count", 1) if self.optimizer == "adam" else 0
        bias = 1 - _power(self.momentum, count), 1 - _power(self.b2, count)
        for leaf, start, d in means:
            here = [state.at(slot, leaf, start, d) for slot in self.slots[self.optimizer]]
            if self.optimizer == "nesterov":
                (m,) = here
                m *= self.momentum
                m += d
                d += np.multiply(m, self.momentum, out=t[: len(d)])
            elif self.optimizer == "adam":
                self._adam(d, here, bias, t[: len(d)])
            d *= lr
            theta = state.at("params", leaf, start, d)
            theta -= d

    def _adam(self, d: np.ndarray, here: list[np.ndarray], bias: tuple[float, float], t: np.ndarray) -> None:
        """d becomes the step."""
        first, second = here
        first *= self.momentum
        first += np.multiply(d, 1 - self.momentum, out=t)
        second *= self.b2
        np.multiply(d, d, out=d)
        second += np.multiply(d, 1 - self.b2, out=d)
        np.sqrt(np.divide(second, bias[1], out=t), out=t)
        t += self.eps
        np.divide(first, bias[0], out=d)
        d /= t


def _power(base: float, exponent: int) -> float:
    """base^exponent by products alone: libraries differ in the last bit of a power."""
    found = 1.0
    while exponent:
        if exponent & 1:
            found *= base
        base, exponent = base * base, exponent >> 1
    return found


# ── rules ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Rule:
    """What is done with a push. `begin` adds its arrays; `push` folds one; `settle` does what any record may bring
    about, with the view after it. pins: an island begins a round at the version of its own last push or join."""

    outer: Outer
    pins: ClassVar[bool] = False

    def begin(self, state: State) -> None:
        self.outer.init(state)

    def push(self, state: State, record: Record, verdict: Verdict, blocks: Blocks) -> None:
        raise NotImplementedError

    def settle(self, state: State, record: Record, verdict: Verdict, view: View) -> None:
        """Nothing, for most."""


@dataclass(frozen=True)
class Average(Rule):
    """A round is closed when all live islands have pushed it: the mean of its pushes goes to the outer optimizer. With
    staleness 0 it is DiLoCo. Of the rounds that are not closed it keeps a sum each: at most staleness + 1."""

    staleness: int = 0

    def __post_init__(self):
        if self.staleness < 0:
            raise ValueError(
                f"island.staleness={self.staleness}: island.merge=average keeps a sum for each round that may be open, "
                "so it needs a bound of 0 or more"
            )

    def push(self, state: State, record: Record, verdict: Verdict, blocks: Blocks) -> None:
        slot = record.clock % (self.staleness + 1)
        if not state.has(f"sum.{slot}"):
            state.add(f"sum.{slot}")
        state.numbers[f"clock.{slot}"] = record.clock
        state.count(f"pushes.{slot}", 1)
        _add(state, f"sum.{slot}", blocks)

    def settle(self, state: State, record: Record, verdict: Verdict, view: View) -> None:
        slots = [slot for slot in range(self.staleness + 1) if state.numbers.get(f"pushes.{slot}")]
        clock = lambda slot: state.numbers[f"clock.{slot}"]
        for slot in sorted((slot for slot in slots if clock(slot) < verdict.complete), key=clock):
            self.outer.step(state, _emptied(state, f"sum.{slot}", state.numbers[f"pushes.{slot}"]), record)
            state.numbers[f"pushes.{slot}"] = 0


@dataclass(frozen=True)
class Nesterov(Rule):
    """Delayed Nesterov (Liu et al. 2024, algorithm 3): every push moves the parameters by its share ε·Δ/B; momentum is
    renewed when a buffer of B pushes is full, m = β·m + ΣΔ/B, and moves them by ε·β·m then; with a delay c of more than
    0 by a part c of that at every push.

    buffer: B; 0: as many as islands were live when it was opened. 1 is the naive asynchronous Nesterov.
    """

    buffer: int = 0
    delay: float = 0.0

    def __post_init__(self):
        if self.outer.optimizer == "adam":
            raise ValueError("sync.outer.optimizer=adam: island.merge=nesterov takes nesterov, or sgd (no momentum)")

    def begin(self, state: State) -> None:
        if self._momentum:
            state.add("momentum")
            state.add("sum")

    @property
    def _momentum(self) -> float:
        return self.outer.momentum if self.outer.optimizer == "nesterov" else 0.0

    def push(self, state: State, record: Record, verdict: Verdict, blocks: Blocks) -> None:
        if not state.numbers.get("pushes"):
            state.numbers["buffer"] = self.buffer or verdict.live
        full = state.count("pushes", 1) >= state.numbers["buffer"]
        B, lr, beta, t = state.numbers["buffer"], rate(self.outer, record), self._momentum, np.empty(STEP, np.float32)
        share = 1 - self.delay * B + self.delay if full else self.delay
        for leaf, start, d in blocks:
            theta = state.at("params", leaf, start, d)
            if beta:
                m, total = state.at("momentum", leaf, start, d), state.at("sum", leaf, start, d)
                total += d
                if full:
                    m *= beta
                    m += np.divide(total, B, out=t[: len(d)])
                    total[...] = 0
                if share:
                    theta -= np.multiply(m, lr * share * beta, out=t[: len(d)])
            d *= lr / B
            theta -= d
        if full:
            state.numbers["pushes"] = 0


@dataclass(frozen=True)
class Compensated(Rule):
    """DC-ASGD (Zheng et al. 2017, equation 10): Δ + λ·Δ²·(θ − θ_base) goes to the outer optimizer, push by push. It
    costs one more copy of the parameters for each island, of where its round began."""

    strength: float = 0.04
    pins: ClassVar[bool] = True

    def push(self, state: State, record: Record, verdict: Verdict, blocks: Blocks) -> None:
        self.outer.step(state, self._corrected(state, f"base.{record.island}", blocks), record)
        state.copy(f"base.{record.island}", "params")

    def _corrected(self, state: State, base: str, blocks: Blocks) -> Blocks:
        t = np.empty(STEP, np.float32)
        for leaf, start, d in blocks:
            gap = np.subtract(state.at("params", leaf, start, d), state.at(base, leaf, start, d), out=t[: len(d)])
            gap *= d
            gap *= d
            gap *= self.strength
            d += gap
            yield leaf, start, d

    def settle(self, state: State, record: Record, verdict: Verdict, view: View) -> None:
        if record.type == records.PUSH:
            return
        if record.type == records.JOIN:
            state.add(f"base.{record.island}")
            state.copy(f"base.{record.island}", "params")
        for name, island in view.islands.items():
            if not island.live and state.has(f"base.{name}"):
                state.remove(f"base.{name}")


@dataclass(frozen=True)
class Quorum(Rule):
    """Every `quorum` pushes their mean, weighted by tokens, goes to the outer optimizer, whoever they are from."""

    quorum: int = 1

    def __post_init__(self):
        if self.quorum < 1:
            raise ValueError(f"island.quorum={self.quorum}: at least one push makes a quorum")

    def begin(self, state: State) -> None:
        super().begin(state)
        state.add("sum")

    def push(self, state: State, record: Record, verdict: Verdict, blocks: Blocks) -> None:
        _add(state, "sum", blocks, record.tokens)
        tokens = state.count("tokens", record.tokens)
        if state.count("pushes", 1) >= self.quorum:
            self.outer.step(state, _emptied(state, "sum", tokens or 1), record)
            state.numbers |= {"pushes": 0, "tokens": 0}


RULES = {"average": Average, "compensated": Compensated, "nesterov": Nesterov, "quorum": Quorum}


def _add(state: State, kind: str, blocks: Blocks, weight: int = 1) -> None:
    for leaf, start, d in blocks:
        if weight != 1:
            d *= np.float32(weight)
        total = state.at(kind, leaf, start, d)
        total += d


def _emptied(state: State, kind: str, divisor: int) -> Blocks:
    """The blocks of a sum divided by this; zeros stay where they were."""
    for leaf, start, d in state.blocks(kind):
        state.at(kind, leaf, start, d)[...] = 0
        d /= np.float32(divisor)
        yield leaf, start, d


# ── folding ──────────────────────────────────────────────────────────────────────────────────────────────────────


def start(rule: Rule, params: Mapping[str, np.ndarray]) -> State:
    """Version -1, from the first parameters (or a process's part of them), which are copied."""
    state = State({f"params/{leaf}": np.array(x, np.float32).reshape(-1) for leaf, x in params.items()})
    rule.begin(state)
    return state


def refusal(rule: Rule, staleness: int, view: View, record: Record) -> str:
    """Why a push does not count by the rules of the run, or "": `refused` of View.after. staleness: -1: no bound."""
    island = view.islands.get(record.island)
    if record.type != records.PUSH or island is None:
        return ""
    if 0 <= staleness < record.clock - view.live_minimum():
        return f"round {record.clock} is more than {staleness} ahead of {view.live_minimum()}, the slowest island's"
    if rule.pins and record.base != island.version:
        return f"it began at version {record.base}, not at {island.version}, the last that {record.island} wrote"
    if OUTER_LR in record.numbers and not 0 <= record.number(OUTER_LR) <= rule.outer.lr:
        return f"its outer learning rate {record.number(OUTER_LR):g} is not between 0 and the run's, {rule.outer.lr:g}"
    return ""


def fold(rule: Rule, state: State, record: Record, verdict: Verdict, view: View, blocks: Blocks | None = None) -> None:
    """Folds a record into the state. verdict, view: what View.after gave for it. blocks: of a push; None: zeros."""
    if not verdict.folded:
        return
    check_denormals()
    with np.errstate(all="ignore"):
        if record.type == records.PUSH:
            rule.push(state, record, verdict, state.zeros() if blocks is None else blocks)
        rule.settle(state, record, verdict, view)


def rate(outer: Outer, record: Record) -> float:
    return record.number(OUTER_LR) if OUTER_LR in record.numbers else outer.lr

"""Islands without machines: any number of them in one process, with the view and the fold of real ones, driven by a
clock that jumps from event to event. The same seed gives the same records and the same bits.

An island joins, and then, round by round: waits until no live island is more than the staleness bound behind it, takes
the newest version, makes its steps, and sends what it has gone; its push is folded when the last byte is there. Bytes
take their time on its link, both ways. One that dies is taken to be gone after PATIENCE seconds, by a record of another
one, and comes back as its next incarnation.
`python -m islands.laboratory` is in islands/experiments.py.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from islands import merge, pace, payload
from islands import record as records
from islands.pace import SPEED, Site
from islands.payload import Draw, Form, Part
from islands.record import Record
from islands.state import Params, State, in_blocks
from islands.view import View

PATIENCE = 60.0  # seconds without a heartbeat, after which others take an island to be gone
POINTS = 64  # of a curve


class Task(Protocol):
    """What is trained. Params are float32 vectors by name. tokens: of one step."""

    @property
    def tokens(self) -> int: ...

    def init(self) -> Params: ...

    def begin(self, island: int) -> Any:
        """What an island that begins keeps to itself: the state of its inner optimizer."""
        ...

    def steps(self, params: Params, own: Any, island: int, done: int, count: int) -> tuple[Params, Any, float]:
        """(params, own, mean loss) after `count` steps on this island's data, of which it has made `done` before."""
        ...

    def loss(self, params: Params) -> float:
        """Of what nobody trains on."""
        ...


@dataclass(frozen=True)
class Scheme:
    """How islands train. interval: H, the steps of a round. staleness: -1: no bound. dylu: rounds in proportion to
    speed."""

    rule: merge.Rule
    interval: int
    staleness: int = -1
    dylu: bool = False
    codec: Any = None


class Round(NamedTuple):
    """Of an island: seconds at which it began, its steps did, they ended, and its push was folded. counts: it was; what
    an island was at when it died, or when time was up, ends there."""

    island: int
    began: float
    first: float
    last: float
    ended: float
    counts: bool


@dataclass
class Measured:
    """What an experiment shows. times, losses: a curve. staleness: of each push, how many of others were folded since
    its round began. steps, bytes: of all pushes. rounds: of all islands. away: (island, from when, until when)."""

    times: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    staleness: list[int] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    away: list[tuple[int, float, float]] = field(default_factory=list)
    steps: int = 0
    bytes: int = 0

    @property
    def loss(self) -> float:
        """At the end: the mean of the last eighth of the time, so that a moment's luck does not count."""
        return float(np.mean(self.losses[-POINTS // 8 :]))

    def seconds_to(self, loss: float) -> float:
        """When the curve is first at this loss, or below; infinity: never."""
        return next((t for t, x in zip(self.times, self.losses, strict=True) if x <= loss), math.inf)


@dataclass(kw_only=True)
class Outcome(Measured):
    """What has happened. log: every record."""

    state: State
    view: View
    log: list[Record] = field(default_factory=list)


@dataclass
class _Island:
    number: int
    name: str
    site: Site
    rng: np.random.Generator
    own: Any = None  # the inner optimizer's
    owed: Params | None = None
    alive: bool = False
    life: int = 0  # which one: what was planned in an earlier one does not happen
    done: int = 0  # steps
    interval: int = 0  # of the round that it makes
    clock: int = 0
    version: int = -1  # that the round began with
    seen: int = 0  # of all pushes that were folded, so many has it
    missing: int = 0  # further bytes that it has to pull
    base: Params | None = None
    seconds: float = 0.0  # that the steps of the round take
    round: Round | None = None  # that it makes
    gone: float = 0.0  # since when it is not there


def play(
    task: Task,
    sites: Sequence[Site],
    scheme: Scheme,
    seconds: float,
    seed: int = 0,
    watch: Callable[[float, State], None] | None = None,
) -> Outcome:
    """Lets these islands train for so many seconds of their time. watch: is called after every push that was folded."""
    return _Laboratory(task, sites, scheme, seed, watch).run(seconds)


class _Laboratory:
    def __init__(self, task: Task, sites: Sequence[Site], scheme: Scheme, seed: int, watch: Any):
        params = task.init()
        self.task, self.scheme, self.seed, self._watch = task, scheme, seed, watch
        self.found = Outcome(state=merge.start(scheme.rule, params), view=View())
        self.form = Form({leaf: x.size for leaf, x in params.items()}, scheme.codec) if scheme.codec else None
        self.model_bytes = self.push_bytes = sum(4 * x.size for x in params.values())
        if self.form:
            self.push_bytes = payload.payload_bytes(self.form.sizes, self.form.codec)
        self.islands = [
            _Island(i, f"island-{i}", site, np.random.default_rng([seed, i])) for i, site in enumerate(sites)
        ]
        self.time, self._previous, self._pushes = 0.0, records.digest(b""), 0
        self._events: list[tuple[float, int, Callable[..., None], tuple]] = []
        self._order = itertools.count()
        self._waiting: list[_Island] = []
        self._speeds: dict[str, float] = {}
        self._pushed_before: dict[int, int] = {-1: 0}  # version -> pushes up to it
        self._newest: tuple[int, Params] | None = None

    def run(self, seconds: float) -> Outcome:
        for island in self.islands:
            self._at(island.site.joins, self._join, island)
            self._at(island.site.leaves, self._leave, island)
            for time in island.site.fails:
                self._at(time, self._fail, island)
        for i in range(POINTS + 1):
            grid = seconds * i / POINTS
            while self._events and self._events[0][0] <= grid:
                self.time, _, event, arguments = heapq.heappop(self._events)
                event(*arguments)
            self.found.times.append(grid)
            self.found.losses.append(self.task.loss(self._params()[1]))
        self.time = seconds
        for island in self.islands:
            self._end_round(island) if island.alive else self._return(island)
        return self.found

    def _at(self, time: float, event: Callable[..., None], *arguments: Any) -> None:
        if math.isfinite(time):
            heapq.heappush(self._events, (time, next(self._order), event, arguments))

    def _in_this_life(self, seconds: float, event: Callable[[_Island], None], island: _Island) -> None:
        """After so many seconds, unless it has died by then."""
        life = island.life
        self._at(self.time + seconds, lambda: event(island) if island.life == life else None)

    # ── the life of an island ────────────────────────────────────────────────────────────────────────────────────

    def _join(self, island: _Island) -> None:
        before = self.found.view.islands.get(island.name)
        island.clock = max(before.clock if before else 0, self.found.view.complete)
        incarnation = before.incarnation + 1 if before else 1
        self._write("join", island, incarnation=incarnation, base=self.found.view.version)
        self._return(island)
        island.own, island.alive = self.task.begin(island.number), True
        if self.form and self.form.codec.wants_error_feedback:
            island.owed = {leaf: np.zeros(size, np.float32) for leaf, size in self.form.sizes.items()}
        island.seen, island.missing = self._pushes, self.model_bytes
        self._wait(island)

    def _wait(self, island: _Island) -> None:
        """Before a round: the staleness gate."""
        if 0 <= self.scheme.staleness < island.clock - self.found.view.live_minimum():
            self._waiting.append(island)
        else:
            self._begin(island)

    def _begin(self, island: _Island) -> None:
        """Of a round: takes the newest version, or its own last one where the rule wants that."""
        view, site = self.found.view, island.site
        if self.scheme.rule.pins:
            island.version = view.islands[island.name].version
        else:
            island.version, island.base = self._params()
        island.interval = self.scheme.interval
        if self.scheme.dylu and island.name in self._speeds:
            fastest = max(self._speeds[name] for name in view.live() if name in self._speeds)
            island.interval = pace.local_steps(island.interval, self._speeds[island.name], fastest)
        island.seconds = site.seconds(island.interval, island.rng)
        pull = site.transfer(island.missing + (self._pushes - island.seen) * self.push_bytes)
        push, island.seen, island.missing = site.transfer(self.push_bytes), self._pushes, 0
        first, last = self.time + pull, self.time + pull + island.seconds
        island.round = Round(island.number, self.time, first, last, last + push, counts=True)
        self._in_this_life(pull + island.seconds + push, self._push, island)

    def _push(self, island: _Island) -> None:
        assert island.base is not None
        self._end_round(island)
        params, island.own, _ = self.task.steps(island.base, island.own, island.number, island.done, island.interval)
        island.done += island.interval
        delta = {leaf: island.base[leaf] - params[leaf] for leaf in params}
        self._speeds[island.name] = island.interval / island.seconds
        self.found.staleness.append(self._pushes - self._pushed_before[island.version])
        folded = self._write(
            "push", island, self._coded(island, delta), base=island.version, steps=island.interval,
            tokens=island.interval * self.task.tokens, numbers={SPEED: self._speeds[island.name].hex()},
        )  # fmt: skip
        assert folded, "an island of the laboratory pushes only what counts"
        self.found.steps += island.interval
        self.found.bytes += self.push_bytes
        island.clock, island.seen = island.clock + 1, island.seen + 1
        if self._watch:
            self._watch(self.time, self.found.state)
        self._wait(island)

    def _fail(self, island: _Island) -> None:
        if island.alive:
            self._die(island)
            self._at(self.time + PATIENCE, self._expire, island, self.found.view.islands[island.name].incarnation)
            if self.time + island.site.away < island.site.leaves:
                self._at(self.time + island.site.away, self._join, island)

    def _leave(self, island: _Island) -> None:
        if island.alive:
            self._die(island)
            self._write("leave", island)

    def _end_round(self, island: _Island) -> None:
        """By its push; before that, its steps are not pushed."""
        if island.round:
            began, *times = island.round[1:5]
            cut = [min(time, self.time) for time in times]
            counts = island.round.ended <= self.time
            self.found.rounds.append(Round(island.number, began, *cut, counts=counts))
        island.round = None

    def _return(self, island: _Island) -> None:
        if self.time > island.gone:
            self.found.away.append((island.number, island.gone, self.time))

    def _die(self, island: _Island) -> None:
        self._end_round(island)
        island.alive, island.life, island.gone = False, island.life + 1, self.time
        self._waiting = [each for each in self._waiting if each is not island]

    def _expire(self, gone: _Island, incarnation: int) -> None:
        """By any other that is there; if nobody is, later."""
        there = self.found.view.islands[gone.name]
        if there.incarnation != incarnation or not there.live:
            return
        proposer = next((island for island in self.islands if island.alive), None)
        if proposer:
            self._write("expire", proposer, base=self.found.view.version, target=gone.name)
        elif self._events:
            self._at(self.time + PATIENCE, self._expire, gone, incarnation)

    # ── the log ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _write(self, type: str, island: _Island, delta: Params | None = None, **fields: Any) -> bool:
        """Appends a record and folds it; whether it counts. Who waited, and need not any more, goes on."""
        found, view = self.found, self.found.view
        if "incarnation" not in fields:
            fields["incarnation"] = view.islands[island.name].incarnation
        record = Record(
            type=type, island=island.name, nonce=f"{island.number:032x}", clock=island.clock, sequence=view.next,
            previous=self._previous, **fields,
        )  # fmt: skip
        refused = merge.refusal(self.scheme.rule, self.scheme.staleness, view, record)
        found.view, verdict = view.after(record, refused)
        blocks = None if delta is None else in_blocks(delta)
        merge.fold(self.scheme.rule, found.state, record, verdict, found.view, blocks)
        self._previous = records.digest(record.encode())
        found.log.append(record)
        self._pushes += type == "push" and verdict.folded
        self._pushed_before[record.sequence] = self._pushes
        self._newest = None
        if self.scheme.rule.pins and verdict.folded and type in ("push", "join"):
            island.base = self._params()[1]
        if found.view.complete != view.complete:
            waiting, self._waiting = self._waiting, []
            for each in waiting:
                self._in_this_life(0.0, self._wait, each)
        return verdict.folded

    def _coded(self, island: _Island, delta: Params) -> Params:
        """What others receive of it: with a codec, what its payload decodes to."""
        if not self.form:
            return delta
        parts = [Part(leaf, 0, x, island.owed[leaf] if island.owed else None) for leaf, x in delta.items()]
        blobs = list(payload.encode(self.form, parts, Draw(self.seed, island.name, island.clock)))
        text = payload.manifest(self.form, [piece for blob in blobs for piece in blob.pieces])
        stored = {blob.digest: blob.data for blob in blobs}
        found = payload.read_manifest(self.form, text, {name: len(data) for name, data in stored.items()})
        received = {leaf: np.empty(size, np.float32) for leaf, size in self.form.sizes.items()}
        fetch = lambda digest, offset, length: stored[digest][offset : offset + length]
        for leaf, place, x in payload.read(self.form, found, self.form.whole(), fetch):
            received[leaf][place : place + len(x)] = x
        return received

    def _params(self) -> tuple[int, Params]:
        """(version, a copy of its parameters), shared by all that begin with it."""
        if self._newest is None:
            self._newest = self.found.view.version, self.found.state.copied("params")
        return self._newest


if __name__ == "__main__":
    from islands.experiments import command

    command()

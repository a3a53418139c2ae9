"""How long a compiled program takes: its schedule, played at the rates of a machine (rates.py) instead of run on it.

One stream computes, in the order of the text. Each axis of the mesh is a stream that carries one message after another;
those that do not leave a host are one, for they share its links. What has a start and a done travels while that
computes which stands between them; for everything else, and at its done, is waited. A matrix product or a kernel takes
what its FLOPs or its bytes take, whichever is longer; all else its bytes through the chip's memory. Copies into a TPU's
own fast memory are messages of a stream, too, and those to the host's memory and from it of one each.

Loops are played turn by turn, until a turn begins as the one before it did: the others take as long. Of a conditional
the branch that takes longest is played. What kernels take to start is not in it, nor that streams share a memory.
"""

import copy
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from jax.sharding import Mesh

from parallel.cost import host, loops, rates, schedule, wire
from parallel.cost.hlo import Instruction, Program
from parallel.cost.link import Link
from parallel.cost.targets import Target
from parallel.layout.axes import SLOW

MEMORY = "memory"  # the stream of copies
COPIES = ("copy-start", "slice-start")
EVEN = 1e-12  # seconds by which two turns that begin alike may differ


@dataclass(frozen=True)
class Played:
    """Seconds of a call: all of them, those of computing, and of each axis, and the host (host.HOST) where a program
    keeps arrays there, those in which nothing else is done."""

    seconds: float
    compute: float
    exposed: dict[str, float]


def play(program: Program, mesh: Mesh, target: Target, link: Link | None = None) -> Played:
    """link: what `replica` crosses, if it is not the catalogue's. Raises ValueError for a loop that runs nobody knows
    how often, and for a collective of a form that is not known."""
    clock = _Clock()
    _Player(program, mesh, target, link).run(program.entry, clock)
    computed = clock.now - sum(time for axis, time in clock.waited.items() if axis != MEMORY)
    exposed = {axis: time for axis, time in clock.waited.items() if axis != MEMORY}
    return Played(clock.now, computed, dict.fromkeys(mesh.axis_names, 0.0) | exposed)


class _Message(NamedTuple):
    """On a stream; of an axis."""

    stream: str
    axis: str
    seconds: float


class _Event(NamedTuple):
    """What an instruction does, in this order: begins messages under a key, computes, waits for those of keys, runs
    computations: each of them so many times, or that branch which takes longest."""

    key: str = ""
    begins: tuple[_Message, ...] = ()
    compute: float = 0.0
    waits: tuple[str, ...] = ()
    runs: tuple[str, ...] = ()
    times: int = 1
    is_choice: bool = False


@dataclass
class _Clock:
    """now: seconds since the program began. free: when a stream has carried what it was given. waited: by axis."""

    now: float = 0.0
    free: dict[str, float] = field(default_factory=dict)
    waited: dict[str, float] = field(default_factory=dict)

    def carry(self, message: _Message) -> float:
        """When it will have arrived."""
        ends = max(self.now, self.free.get(message.stream, 0.0)) + message.seconds
        self.free[message.stream] = ends
        return ends

    def wait(self, axis: str, until: float) -> None:
        late = max(0.0, until - self.now)
        self.waited[axis] = self.waited.get(axis, 0.0) + late
        self.now += late

    def busy(self) -> dict[str, float]:
        """For how long each stream still is."""
        return {stream: until - self.now for stream, until in self.free.items() if until > self.now}

    def again(self, before: "_Clock", times: int) -> None:
        """As many times as much has passed as since then."""
        passed = self.now - before.now
        self.waited = {axis: time + times * (time - before.waited.get(axis, 0.0)) for axis, time in self.waited.items()}
        self.free = {stream: until + times * passed for stream, until in self.free.items() if until > self.now}
        self.now += times * passed


class _Player:
    def __init__(self, program: Program, mesh: Mesh, target: Target, link: Link | None):
        self._program, self._places, self._sizes = program, wire.places_of(mesh), dict(mesh.shape)
        self._target, self._link, self._share = target, link, rates.share(target.chip)
        self._flops, self._turns = schedule.Flops(program), loops.Loops(program)
        self._known: dict[str, list[_Event]] = {}

    def run(self, computation: str, clock: _Clock) -> None:
        if computation not in self._known:
            self._known[computation] = list(self._events(computation))
        under_way: dict[str, list[tuple[str, float]]] = {}
        for event in self._known[computation]:
            for message in event.begins:
                under_way.setdefault(event.key, []).append((message.axis, clock.carry(message)))
            clock.now += event.compute
            for key in event.waits:
                for axis, until in under_way.pop(key, ()):
                    clock.wait(axis, until)
            if event.is_choice:
                self._longest(event.runs, clock)
            else:
                self._turn(event.runs, event.times, clock)

    def _turn(self, computations: tuple[str, ...], times: int, clock: _Clock) -> None:
        before = None
        for turn in range(times if computations else 0):
            begun = copy.deepcopy(clock)
            if before and _alike(before.busy(), begun.busy()):
                clock.again(before, times - turn)
                return
            for name in computations:
                self.run(name, clock)
            before = begun

    def _longest(self, branches: tuple[str, ...], clock: _Clock) -> None:
        ends = []
        for name in branches:
            ends.append(copy.deepcopy(clock))
            self.run(name, ends[-1])
        if ends:
            longest = max(ends, key=lambda end: end.now)
            clock.now, clock.free, clock.waited = longest.now, longest.free, longest.waited

    # ── what instructions do ─────────────────────────────────────────────────────────────────────────────────────

    def _events(self, computation: str) -> Iterator[_Event]:
        body = self._program.computations[computation]
        last = self._last_of_channels(body)
        begun: set[str] = set()  # channels
        met: dict[str, str] = {}  # {rendezvous of a transfer between slices: the first of its send and recv}
        for x in body:
            if x.op == "while":
                yield _Event(runs=(loops.body(x),), times=self._turns.trips(computation, x))
            elif x.op in ("call", "conditional"):
                yield _Event(runs=tuple(x.called), is_choice=x.op == "conditional")
            elif x.op in ("send", "recv"):
                yield from self._transfer(computation, x, met)
            elif x.op.endswith("-done"):
                yield _Event(waits=tuple(x.operands[:1]))
            elif x.name in last:
                yield from self._part_of_async(computation, x, last[x.name], begun)
            else:
                yield self._alone(computation, x)

    def _alone(self, computation: str, x: Instruction) -> _Event:
        """What begins a message and leaves it, begins one and waits, or computes."""
        if x.op.endswith("-start") and any(a.is_away for a in x.arrays):
            return _Event(x.name, (self._away(x),))
        own = wire.sent_by(self._program, computation, x, self._places)
        for called in x.called if x.op in ("fusion", "async-start") else ():
            own += [c for y in self._program.computations[called] for c in self._sent(called, y)]
        begins = self._messages(own)
        if begins and not self._flops.of(computation, x):
            return _Event(x.name, begins, waits=() if x.op.endswith("-start") else (x.name,))
        if x.op in COPIES:
            took = self._through_memory(schedule.moved(self._program, computation, x))
            return _Event(x.name, (_Message(MEMORY, MEMORY, took),))
        return _Event(x.name, begins, self._computing(computation, x), (x.name,) if begins else ())

    def _away(self, x: Instruction) -> _Message:
        """A copy to the host's memory, or from it. Its type has operands, then the result: all of what lies there, and
        the part of it that lies here."""
        arrays = [a for a in x.arrays if a.shape]  # and not where the part begins
        took = host.seconds(self._target.chip, schedule.in_memory(arrays))
        return _Message(f"{'to' if arrays[-1].is_away else 'from'} the host", host.HOST, took)

    def _sent(self, computation: str, x: Instruction) -> list[wire.Collective]:
        found = wire.sent_by(self._program, computation, x, self._places)
        inside = x.called if x.op in ("fusion", "call") else ()
        return found + [c for name in inside for y in self._program.computations[name] for c in self._sent(name, y)]

    def _messages(self, found: list[wire.Collective]) -> tuple[_Message, ...]:
        """One of each collective, of all its arrays."""
        sizes: dict[tuple[str, tuple[str, ...], str], float] = {}
        for c in found:
            key = (c.name, c.axes, c.kind)
            sizes[key] = sizes.get(key, 0.0) + c.sent
        return tuple(self._message(axes, kind, size) for (_, axes, kind), size in sizes.items())

    def _message(self, axes: tuple[str, ...], kind: str, size: float) -> _Message:
        steps = math.prod(self._sizes[axis] for axis in axes) - 1
        hops = 1 if axes[0] == SLOW or kind == "collective-permute" else steps
        took = rates.seconds(self._target, self._sizes, axes, size, hops, self._link)
        return _Message(rates.stream(self._target, self._sizes, axes), axes[0], took)

    def _computing(self, computation: str, x: Instruction) -> float:
        multiplied = self._flops.of(computation, x) / (self._share.products * self._target.chip.bf16)
        return max(multiplied, self._through_memory(schedule.moved(self._program, computation, x)))

    def _through_memory(self, size: float) -> float:
        return size / (self._share.memory * self._target.chip.bandwidth)

    # ── TPUs ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _last_of_channels(self, body: list[Instruction]) -> dict[str, tuple[list[wire.Collective], set[str]]]:
        """{fusion that has a part of asynchronous collectives: (these, the channels that it is the last of)}."""
        found: dict[str, list[wire.Collective]] = {}
        for x in body:
            for called in x.called if x.op == "fusion" else ():
                if wire.is_part_of_async(called, self._program):
                    inside = [c for y in self._program.computations[called] for c in self._sent(called, y)]
                    found[x.name] = found.get(x.name, []) + inside
        last = {c.channel: name for name, inside in found.items() for c in inside}
        return {
            name: (inside, {channel for channel, at in last.items() if at == name}) for name, inside in found.items()
        }

    def _part_of_async(
        self, computation: str, x: Instruction, own: tuple[list[wire.Collective], set[str]], begun: set[str]
    ) -> Iterator[_Event]:
        """The first part of a channel begins it, and the last waits for it when it has computed."""
        inside, last = own
        for channel in dict.fromkeys(c.channel for c in inside if c.channel not in begun):
            yield _Event(channel, self._messages([c for c in inside if c.channel == channel]))
            begun.add(channel)
        yield _Event(compute=self._computing(computation, x), waits=tuple(sorted(last)))

    def _transfer(self, computation: str, x: Instruction, met: dict[str, str]) -> Iterator[_Event]:
        """Between slices: it begins where both its send and its recv are there, and the recv's done waits for it."""
        found = re.search(wire.MEETING, x.rest)
        first = met.setdefault(found[1] if found else x.name, x.name)
        if first == x.name:
            return
        for y in self._program.computations[computation]:
            if y.op == "recv" and y.name in (first, x.name):
                yield _Event(y.name, self._messages(wire.sent_by(self._program, computation, y, self._places)))


def _alike(a: dict[str, float], b: dict[str, float]) -> bool:
    return all(abs(a.get(stream, 0.0) - b.get(stream, 0.0)) <= EVEN for stream in a.keys() | b.keys())

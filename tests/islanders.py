"""Members of a log that train nothing, for schedules full of faults; and what must hold whatever goes wrong.

`play(random)` runs one schedule to its end, or raises Broken with the number of the invariant:

1. a record that was acknowledged to its writer stays at its number, and is folded;
2. no (island, round) is folded twice;
3. every reader sees the same bytes at the same number, and comes to the same verdict;
4. one writer wins each number;
5. who reads after something was acknowledged, to anybody, sees it;
6. the version of a process never goes back;
7. what a folded record names can be read;
8. nobody pushes a round that is more than `STALENESS` ahead of the slowest live island;
9. a push is refused only to a process whose island has joined anew, or has expired;
10. when the faults end, everybody comes to the end.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

from islands import record as records
from islands import trust
from islands.faulty import Chance, Faulty, UnsyncedDisk
from islands.folder import Folder
from islands.log import Dropped, Entry, Log, LogError
from islands.record import EXPIRE, LEAVE, OWNER, PUSH, Run
from islands.schedule import Memory, Schedule
from islands.store import Away, Call, Routine, run
from islands.view import Member

NAMES, STALENESS = ("a", "b", "c"), 2
RECORDS = 24  # that an island sees before it leaves
RATES = {  # at an await where a fault can happen
    "response lost": 0.1, "error after success": 0.1, "conflict": 0.1, "late": 0.1, "duplicate": 0.1, "away": 0.06,
    "slow": 0.1, "stale list": 0.5, "crash": 0.01, "power cut": 0.004, "clock skew": 0.2,
}  # fmt: skip
MOST_STEPS = 20_000


class Broken(AssertionError):
    """An invariant does not hold."""


class Seal:
    """Signs as islands.trust.Key does, a hundred times faster, for who does not forge."""

    def __init__(self, name: str):
        self.public = hashlib.sha256(name.encode()).hexdigest()

    def sign(self, record: records.Record) -> records.Record:
        return records.with_signature(record, seal(self.public, records.unsigned(records.as_fields(record))))


def seal(public: str, message: bytes) -> str:
    return hashlib.sha512(public.encode() + message).hexdigest()


def sealed(public: str, message: bytes, signature: str) -> bool:
    """In the place of trust.genuine."""
    return signature == seal(public, message)


@contextlib.contextmanager
def quickly() -> Iterator[None]:
    """Signatures are seals, and what all readers make of the same bytes is made once."""
    trusted, cache = Log._trusted, {}

    def remembered(log: Log, data: bytes):
        key = data, log.view.next, log.tail, len(log.view.members)
        if key not in cache:
            cache[key] = trusted(log, data)
        return cache[key]

    before, trust.genuine, Log._trusted = trust.genuine, sealed, remembered
    try:
        yield
    finally:
        trust.genuine, Log._trusted = before, trusted


KEYS = {name: Seal(name) for name in (OWNER, *NAMES)}
MEMBERS = {name: Member(KEYS[name].public) for name in NAMES}
RUN = Run(owner=KEYS[OWNER].public, budget=1000, facts={})


class World:
    """Three islands, each restarted when it dies, and sometimes started twice."""

    def __init__(
        self,
        random: Random,
        rates: dict[str, float],
        log: type[Log] = Log,
        disk: type[UnsyncedDisk] = UnsyncedDisk,
        store: Any = None,
    ):
        """store: a real one, which is empty; else one in memory, or a folder on such a disk."""
        self.random, self.log = random, log
        self.chance = Chance(random, {})
        self.disk = disk(lambda: self.schedule.seconds) if store is None and random.random() < 0.5 else None
        self.schedule = Schedule(self.chance, self.disk)
        self.store = store or (Folder(Path("/log"), self.disk) if self.disk else Memory(self.schedule.now))
        self.acknowledged: dict[int, tuple[str, str]] = {}  # by number: digest, nonce
        self.truth: dict[int, Entry] = {}
        self.places: dict[str, tuple] = {}  # what an island finds when it starts anew: (view, tail)
        self.running = dict.fromkeys(NAMES, 0)
        self.pushed: set[str] = set()
        self.done: set[str] = set()
        run(Log.begin(self.store, RUN, MEMBERS, KEYS[OWNER]))  # type: ignore[arg-type]
        self.chance.rates = dict(rates)
        if self.disk:  # a disk does not answer twice, or late
            self.chance.rates |= dict.fromkeys(("conflict", "error after success", "duplicate", "late"), 0.0)

    # ── its processes ────────────────────────────────────────────────────────────────────────────────────────────

    def start(self, name: str, after: float = 0.0) -> None:
        self.running[name] += 1
        self.schedule.start(self.process(name), lambda _: self.ended(name), lambda: self.ended(name, died=True), after)

    def ended(self, name: str, died: bool = False) -> None:
        self.running[name] -= 1
        if name not in self.done and (died or not self.running[name]):
            self.start(name, after=self.random.choice((0.0, 1.0, 100.0)))

    def process(self, name: str) -> Routine[None]:
        """One process of an island, from its start to its end or death."""
        nonce, clock = self.random.randbytes(16).hex(), self.schedule.clock()
        store = Faulty(self.store, self.chance, clock, self.schedule.later)
        opened = lambda: self.log.open(
            store, name, KEYS[name], self.places.get(name), clock=clock, nonce=nonce  # type: ignore[arg-type]
        )  # fmt: skip
        log = yield from insist(opened)
        yield from self.read(log)
        try:
            yield from self.joins(log)
            while log.view.next < RECORDS or name not in self.pushed:
                yield from self.waits(log)
                yield from self.pushes(log)
            yield from insist(lambda: log.append(log.draft(LEAVE, clock=log.view.islands[name].clock)))
        except Dropped:  # a newer process of the same name goes on; or it has expired before it could leave
            self.check(name in log.view.islands, 9, f"{name} may not join")
            island = log.view.islands[name]
            taken = island.incarnation != log.incarnation
            self.check(taken or not island.live, 9, "nobody has taken its name, and it has not expired")
            if taken:
                return
        self.done.add(name)

    def joins(self, log: Log) -> Routine[None]:
        self.acknowledge(log, (yield from insist(lambda: log.join())))

    def pushes(self, log: Log) -> Routine[None]:
        """One round, after which the island may find that it was taken to be gone."""
        clock, base = log.view.islands[log.island].clock, log.view.version
        blob = f"{log.island} {clock}".encode()
        try:
            entry = yield from insist(lambda: log.push([blob], clock=clock, base=base, steps=1, tokens=1))
            self.acknowledge(log, entry)
            self.pushed.add(log.island)
        except Dropped:
            island = log.view.islands[log.island]
            if island.incarnation != log.incarnation:
                raise
            self.check(not island.live, 9, f"push {clock} of {log.island} was refused, which is live")
            yield from self.joins(log)

    def waits(self, log: Log) -> Routine[None]:
        """For the staleness bound; after some time for nothing, whoever holds the others back is taken to be gone."""
        tries = 0
        yield from self.read(log)
        while log.view.islands[log.island].clock - log.view.live_minimum() > STALENESS:
            tries += 1
            yield from log.beat()
            yield Call("sleep", lambda: self.schedule.sleep(5.0))
            yield from self.read(log)
            if tries % 3 == 0:
                yield from insist(log.heartbeats)
            slowest = min(
                log.view.islands, key=lambda name: (not log.view.islands[name].live, log.view.islands[name].clock)
            )
            if tries % 10 == 0 and slowest != log.island:
                clock, base = log.view.islands[log.island].clock, log.view.version
                draft = log.draft(EXPIRE, clock=clock, base=base, target=slowest)
                try:
                    self.acknowledge(log, (yield from insist(lambda draft=draft: log.append(draft))))
                except Dropped:  # the slowest has pushed meanwhile, or one of the two has expired
                    if not log.view.islands[log.island].live:
                        return

    # ── what must hold ───────────────────────────────────────────────────────────────────────────────────────────

    def check(self, holds: bool, number: int, *what: Any) -> None:
        if not holds:
            raise Broken(f"invariant {number}: {' '.join(map(str, what))}")

    def read(self, log: Log) -> Routine[None]:
        known, version = max(self.acknowledged, default=-1), log.view.version
        entries = yield from insist(log.read)
        self.check(log.view.next > known, 5, log.island, "reads to", log.view.next, "not", known)
        self.check(log.view.version >= version, 6, f"{log.island} was at version {version}")
        for entry in entries:
            before = self.truth.setdefault(entry.sequence, entry)
            self.check(entry == before, 3, log.island, "reads", entry, "others", before)
        if self.random.random() < 0.3:
            self.places[log.island] = log.view, log.tail
        if self.random.random() < 0.3:
            yield from insist(log.look_ahead)
            for payload in [payload for entry in entries[-1:] if entry.record for payload in entry.record.payloads]:
                yield from insist(lambda payload=payload: log.download(payload))

    def acknowledge(self, log: Log, entry: Entry) -> None:
        self.check(entry.verdict.folded, 1, entry, "is acknowledged, and dropped")
        self.check(log.view.next > entry.sequence, 5, f"{log.island} does not see its own record {entry.sequence}")
        mine = entry.digest, log.nonce
        self.check(self.acknowledged.setdefault(entry.sequence, mine) == mine, 4, f"two have written {entry.sequence}")

    def at_the_end(self) -> None:
        """The faults have ended, and the last requests have landed."""
        log = run(Log.open(self.store))
        entries = run(log.read())
        run(log.look_ahead())
        self.check(len(entries) > RECORDS and self.done == set(NAMES), 10, len(entries), "records;", self.done)
        for number, (digest, _) in self.acknowledged.items():
            same = number < len(entries) and entries[number].digest == digest and entries[number].verdict.folded
            self.check(same, 1, "record", number, "was acknowledged, and is lost")
        for number, entry in self.truth.items():
            self.check(number < len(entries) and entries[number] == entry, 3, "record", number, "has changed")
        folded = [entry.record for entry in entries if entry.verdict.folded and entry.record]
        rounds = [(record.island, record.clock) for record in folded if record.type == PUSH]
        self.check(len(set(rounds)) == len(rounds), 2, rounds)
        for before, entry in zip(entries, entries[1:], strict=False):
            if entry.verdict.folded and entry.record and entry.record.type == PUSH:
                self.check(entry.record.clock - before.verdict.complete <= STALENESS, 8, entry)
        for record in folded:
            for payload in record.payloads:
                run(log.download(payload))

    def play(self) -> None:
        for name in NAMES:
            self.start(name)
        if self.random.random() < 0.5:
            self.start(self.random.choice(NAMES), after=self.random.choice((0.0, 5.0)))  # a second process of its name
        steps = 0
        try:
            while self.schedule.processes:
                self.schedule.step()
                steps += 1
                if steps == MOST_STEPS // 2:
                    self.chance.rates = {}
                self.check(steps < MOST_STEPS, 10, f"{steps} awaits, and no end")
            self.at_the_end()
        except LogError as error:  # all who write here are honest
            raise Broken(f"invariant 3 or 7: {error}") from error


def insist(ask: Callable[[], Routine[Any]]) -> Routine[Any]:
    """Asks until the store is there."""
    while True:
        try:
            return (yield from ask())
        except Away:
            pass


def play(random: Random, rates: dict[str, float] | None = None, **options: Any) -> World:
    """One schedule. Without rates, of each fault so much as chance wants: from none to twice its rate."""
    rates = rates or {fault: rate * random.choice((0, 0.5, 1, 2)) for fault, rate in RATES.items()}
    with quickly():
        world = World(random, rates, **options)
        world.play()
    return world

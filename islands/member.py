"""An island's part in its log: a thread that reads, folds, writes and beats while the island trains.

What a round has made is handed over by `push`, and `take` gives the version that the next one begins with. As long as
the store answers, `take` waits until the island's own pushes are folded, and until no live island is more than the
staleness bound behind. While the store is away the island goes on from the newest version it has, up to that bound and
to MOST_WAITING rounds, and then waits.
"""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from islands import keyring, payload, presence, snapshot
from islands import record as records
from islands.ahead import Ahead
from islands.follow import Follower, Fork, Refused
from islands.log import BEAT, Dropped, Log
from islands.payload import Blob, Draw, Part, Piece
from islands.reader import Reader
from islands.record import PUSH
from islands.secret import seal, sealed
from islands.state import Params
from islands.store import Away, Store, run
from runtime.config import RunError

IDLE = BEAT / 2  # seconds between two requests for the next record, while the island trains
WAITED_FOR = 0.05, 0.5  # while it waits, at first and at last: so it waits up to twice as long as it must
PATIENCE = 3.0  # seconds after which a store that does not answer is said to be away
MOST_WAITING = 8  # rounds that wait in memory for a store that is away
TOLD = 20  # of what was refused, in a heartbeat


@dataclass
class Push:
    """A round's result. blobs: with the manifest as the last one; none: zeros. base: the version that it began with."""

    blobs: Sequence[bytes]
    base: int
    steps: int
    tokens: int
    numbers: Mapping[str, str] = field(default_factory=dict)


class Member:
    """name: of the island. say: tells the user a line. Used by one thread, beside its own."""

    def __init__(self, follower: Follower, store: Ahead, say: Callable[[str], None]):
        self.store = store
        self.follower, self.log, self.name, self._say = follower, follower.log, follower.log.island, say
        self.clock = 0  # of the next round: those that wait are counted
        self._pushes: deque[Push] = deque()
        self._asked: deque[Future[tuple[int, Params]]] = deque()
        self._changed = threading.Condition()
        self._hurry, self._ended, self._leaving = False, False, False
        self._waits = 0  # of the island's, begun and over
        self._failed: BaseException | None = None
        self._away_since = 0.0  # 0: the store answers
        self._lookout, self._told = presence.Lookout(self.log, say), 0
        self._thread = threading.Thread(target=self._work, name=f"island {self.name}", daemon=True)

    @classmethod
    def start(cls, store: Store, name: str, clock: int, say: Callable[[str], None]) -> "Member":
        """Reads what there is, joins, and begins to follow. clock: the round that a checkpoint goes on with.

        Raises UsageError where the name may not take part, or another process does by it.
        """
        store = Ahead(store, keeps=True)
        reader = run(snapshot.begin(store, Reader))
        begun = reader.view.version
        run(reader.read())
        run(reader.look_ahead())
        key = keyring.of_member(store, reader.run, reader.view, name)
        presence.check_alone(reader, name, say)
        run(reader.store.put(f"heartbeats/{name}", records.canonical({"version": begun, **presence.process()})))
        follower = run(Follower.open(store, island=name, key=key, patience=PATIENCE))
        store.keeps, store.payloads = False, True
        _catch_up(follower, say)
        store.forget()
        member = cls(follower, store, say)
        run(follower.log.beat(**presence.process()))
        run(follower.log.join(clock))
        member._advance()
        member.clock = follower.view.islands[name].clock
        member._thread.start()
        return member

    # ── what the island asks ─────────────────────────────────────────────────────────────────────────────────────

    def push(self, made: Push) -> None:
        """Hands over what a round has made. Waits only where too many wait already."""
        with self._changed:
            self._wait_until(lambda: len(self._pushes) < MOST_WAITING, "the store to take what waits for it")
            self._pushes.append(made)
            self.clock += 1
            self._changed.notify_all()

    def hand_over(
        self, blobs: Sequence[Blob] | None, base: int, steps: int, tokens: int, numbers: Mapping[str, str]
    ) -> bool:
        """As `push`; None: the round is left out. Whether it counts."""
        self.push(Push(push_of(self.follower, blobs) if blobs else [], base, steps, tokens, numbers))
        return blobs is not None

    def take(self) -> tuple[int, Params]:
        """(version, its parameters) that the next round begins with, as soon as it may begin."""
        with self._changed:
            self._wait_until(self._may_begin, "the slowest island")
            answer: Future[tuple[int, Params]] = Future()
            self._asked.append(answer)
            self._changed.notify_all()
            self._wait_until(answer.done, "the newest version")
        return answer.result()

    def check(self) -> None:
        """Raises what has ended the thread."""
        if self._failed:
            raise self._failed

    def end(self, leave: bool = True, patience: float = float("inf")) -> None:
        """Writes what waits, and leaves. patience: seconds, after which it is given up."""
        with self._changed:
            self._ended, self._leaving, self._hurry = True, leave, True
            self._changed.notify_all()
        if self._thread.ident:
            self._thread.join(min(patience, threading.TIMEOUT_MAX))

    def _may_begin(self) -> bool:
        waiting, bound = len(self._pushes), self.follower.terms.staleness
        if waiting and (not self._away_since or self.follower.terms.rule.pins):
            return False
        return bound < 0 or self.clock - self.follower.view.live_minimum() <= bound

    def _wait_until(self, true: Callable[[], bool], what: str) -> None:
        """With the condition held."""
        said, began, self._hurry, self._waits = False, time.monotonic(), True, self._waits + 1
        self._changed.notify_all()  # once: the thread answers each turn with a notification of its own
        while not true():
            self.check()
            self._changed.wait(1.0)
            if not said and time.monotonic() - began > 10:
                said = True
                self._say(f"waiting for {what}")
        self._hurry, self._waits = False, self._waits + 1
        self.check()

    # ── the thread ───────────────────────────────────────────────────────────────────────────────────────────────

    def _work(self) -> None:
        try:
            pause, waits = IDLE, 0
            while not self._ended or self._pushes:
                self._turn()
                first, last = WAITED_FOR if self._hurry else (IDLE, IDLE)
                pause, waits = min(2 * pause, last) if waits == self._waits else first, self._waits
                with self._changed:
                    self._changed.notify_all()
                    if not self._asked and not self._ended and (not self._pushes or self._away_since):
                        self._changed.wait(pause)
            while self._leaving and not self._has_left():
                pass
            run(self.log.beat(at_once=True, **presence.process(), **self._said()))
        except BaseException as error:  # raised where the island asks for something
            self._failed = error
        with self._changed:
            self._changed.notify_all()

    def _has_left(self) -> bool:
        """Whether nobody waits for this island any more; it is asked again while the store is away."""
        try:
            run(self.log.leave())
        except Away:
            return False
        except Dropped:  # it was taken to be gone
            pass
        return True

    def _turn(self) -> None:
        while self._asked:
            self._asked.popleft().set_result(self.follower.newest(self.name))
        try:
            while self._pushes and not self._asked:
                self._write(self._pushes[0])
                self._advance()
                self.follower.own = {}
                with self._changed:
                    self._pushes.popleft()
                    self._changed.notify_all()
            self._advance()
            self._lookout.look()
        except Away as error:
            if not self._away_since:
                self._away_since = time.monotonic()
                self._say(f"the store is away ({error}): going on without it as far as the staleness bound allows")
            return
        if self._away_since:
            self._say(f"the store is back, after {time.monotonic() - self._away_since:.0f} s")
            self._away_since = 0.0

    def _advance(self) -> None:
        """Folds all that there is; takes the snapshots that are due on the way, and beats."""
        while True:
            run(self.log.beat(**presence.process(), **self._said()))
            if not run(self.follower.advance()):
                break
            self._snapshot()
            self._tell()

    def _write(self, made: Push) -> None:
        """Until it is folded: after an expiry by another incarnation."""
        while True:
            payloads = [run(self.log.upload(blob)) for blob in made.blobs]
            self.follower.own = {each.digest: blob for each, blob in zip(payloads, made.blobs, strict=True)}
            clock = self.log.view.islands[self.name].clock
            draft = self.log.draft(
                PUSH, clock=clock, base=made.base, steps=made.steps, tokens=made.tokens,
                numbers=made.numbers, payloads=tuple(payloads), manifest=payloads[-1].digest if payloads else "",
            )  # fmt: skip
            try:
                run(self.log.append(draft))
                return
            except Dropped as error:
                self._again(error)
                if self.follower.terms.rule.pins:  # it has begun somewhere else
                    made.blobs, made.base = (), self.log.view.islands[self.name].version

    def _again(self, error: Dropped) -> None:
        rejoin(self.log, error, self._say)
        with self._changed:
            self.clock = self.log.view.islands[self.name].clock + len(self._pushes)
        self._advance()

    # ── snapshots ────────────────────────────────────────────────────────────────────────────────────────────────

    def _snapshot(self) -> None:
        """Its writer is who has written that version, or else the first that is live; the one after it confirms."""
        follower = self.follower
        if follower.is_due and self._turn_of() == self.name:
            place = run(follower.store_snapshot())
            self._record(place)
        elif follower.due and (theirs := self._to_confirm(follower.due.version, records.digest(follower.due.manifest))):
            self._record(theirs)

    def _turn_of(self) -> str:
        author, live = self.follower.author, sorted(self.follower.view.live())
        return author if author in live else next(iter(live), "")

    def _to_confirm(self, version: int, manifest: str) -> snapshot.Place | None:
        """What another has stored, if it is what was folded here, and this island is next to its first writer."""
        found = self.follower.stored
        live = sorted(self.follower.view.live())
        if found is None or found.base != version or found.manifest != manifest or found.island not in live:
            return None
        next_one = live[(live.index(found.island) + 1) % len(live)]
        by = self.follower.view.snapshots.get(version, {}).get(manifest, frozenset())
        if next_one != self.name or len(by) > 1 or self.name in by:
            return None
        return snapshot.Place(version, manifest, found.payloads)

    def _record(self, place: snapshot.Place) -> None:
        with contextlib.suppress(Dropped):
            clock = self.log.view.islands[self.name].clock
            run(self.log.append(self.log.draft("snapshot", clock=clock, **snapshot.record_of(place))))

    # ── what is told ─────────────────────────────────────────────────────────────────────────────────────────────

    def _said(self) -> dict[str, Any]:
        """Of a heartbeat: for `python -m islands status`, which reads no payload."""
        wrong = self.follower.wrong[-TOLD:]
        return {
            "refused": [list(each) for each in wrong if isinstance(each, Refused)],
            "forks": [list(each) for each in wrong if isinstance(each, Fork)],
        }

    def _tell(self) -> None:
        for each in self.follower.wrong[self._told :]:
            self._say(each.line)
        self._told = len(self.follower.wrong)


def rejoin(log: Log, error: Dropped, say: Callable[[str], None]) -> None:
    """Joins anew after an expiry. Raises RunError where this island must end. error: what its push has met with."""
    name, island, member = log.island, log.view.islands[log.island], log.view.members.get(log.island)
    if island.incarnation != log.incarnation:
        raise RunError(f"another process has joined as {name}: this one ends, and nothing of it is folded")
    if member is None or not member.writes:
        raise RunError(f"the key of {name} is revoked: nothing of it is folded any more")
    if island.live:
        raise RunError(f"a round of {name} is not folded: {error.why}")
    say(f"{name} was taken to be gone, and joins again")
    run(log.join())


def encoded(follower: Follower, parts: Sequence[Part], draw: Draw) -> list[Blob]:
    """As they are stored. Raises ValueError for what is not finite."""
    blobs = payload.encode(follower.form, parts, draw)
    return list(sealed(follower.secret, blobs) if follower.secret else blobs)


def manifest_of(follower: Follower, pieces: Iterable[Piece]) -> bytes:
    """As it is stored."""
    manifest = payload.manifest(follower.form, pieces)
    return seal(follower.secret, manifest) if follower.secret else manifest


def push_of(follower: Follower, blobs: Sequence[Blob]) -> list[bytes]:
    """What is stored of these blobs: they, and the manifest as the last one."""
    return [*(blob.data for blob in blobs), manifest_of(follower, (piece for blob in blobs for piece in blob.pieces))]


def _catch_up(follower: Follower, say: Callable[[str], None]) -> None:
    began, before = time.monotonic(), follower.view.next
    while run(follower.advance()):
        pass
    if (seconds := time.monotonic() - began) > 2:
        say(f"folded {follower.view.next - before} records in {seconds:.0f} s, up to version {follower.view.version}")

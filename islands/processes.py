"""An island of several processes. Each folds and pushes its own share of the arrays; process 0 alone reads the log and
writes records, and says at the border of a round which records all fold next.

All happens between two rounds, in the main threads, by the coordination service (runtime/agree.py) and without a
collective: what one process refuses of a push, all refuse. A thread of process 0 beats. Snapshots are taken by islands
of one process, so far, and while the store is away all wait.
"""

import base64
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from islands import keyring, presence, snapshot
from islands import record as records
from islands.ahead import Ahead
from islands.decode import PayloadError
from islands.follow import Follower, Pushed, begin_at
from islands.log import BEAT, Dropped, Log
from islands.member import PATIENCE, manifest_of, rejoin
from islands.payload import Blob, Piece, Ranges
from islands.reader import Reader, record_key
from islands.record import LIMIT, PUSH, Payload
from islands.snapshot import Place
from islands.state import Params
from islands.store import Away, Routine, Store, run
from runtime import agree

AT_ONCE = 8  # records that are examined together
PAUSE = 0.1  # seconds


class Processes:
    """As islands/member.py's Member, for all processes at once: each calls the same methods in the same order.

    log: of process 0, which writes; None in the others."""

    def __init__(self, follower: Follower, log: Log | None, store: Ahead, name: str, say: Callable[[str], None]):
        self.follower, self.log, self.store, self.name, self._say = follower, log, store, name, say
        self.clock, self._told = 0, 0
        self._lookout = presence.Lookout(log, say) if log else None
        self._ended = threading.Event()

    @classmethod
    def start(cls, store: Store, name: str, clock: int, say: Callable[[str], None], share: Ranges) -> "Processes":
        """share: elements that this process folds. Raises as Member.start does, in all processes."""
        store = Ahead(store, keeps=True)
        reader = run(Reader.open(store))
        log: list[Log] = []

        def lead() -> dict[str, Any]:
            here = run(snapshot.begin(store, Reader))
            run(here.read())
            run(here.look_ahead())
            key = keyring.of_member(store, here.run, here.view, name)
            presence.check_alone(here, name, say)
            log.append(run(snapshot.begin(store, Log, island=name, key=key, patience=PATIENCE)))
            run(log[0].read())
            run(log[0].beat(at_once=True, **presence.process()))
            place = run(begin_at(reader))
            return {"version": place.version, "manifest": place.manifest, "payloads": [list(p) for p in place.payloads]}

        said = agree.decided("where the island begins", lead)
        place = Place(said["version"], said["manifest"], tuple(Payload(*each) for each in said["payloads"]))
        follower = run(Follower.at(place, reader, store, share=share))
        store.keeps = False
        own = cls(follower, log[0] if log else None, store, name, say)
        own._follow(lambda: True)
        store.forget()
        agree.decided("joining", lambda: run(log[0].join(clock)).sequence)
        own._follow(lambda: True)
        own.clock = follower.view.islands[name].clock
        if log:
            threading.Thread(target=own._beat, daemon=True, name=f"island {name}").start()
        return own

    def hand_over(
        self, blobs: Sequence[Blob] | None, base: int, steps: int, tokens: int, numbers: Mapping[str, str]
    ) -> bool:
        """Pushes what all processes have encoded; None of one: the round is left out. Whether it counts."""
        sound = all(agree.everyone("whether a round is sound", blobs is not None))
        named, pieces = [], []
        for blob in (blobs or ()) if sound else ():
            named.append(list(self._insist(lambda blob=blob: self.follower.log.upload(blob.data))))
            pieces += [list(piece) for piece in blob.pieces]
        found = agree.everyone("what was pushed", [named, pieces])
        self.follower.own = {blob.digest: blob.data for blob in blobs or ()}

        def write() -> int:
            log = self._leading()
            payloads, start = [Payload(*each) for own, _ in found for each in own], base
            if sound:
                manifest = manifest_of(self.follower, (Piece(*each) for _, own in found for each in own))
                payloads.append(self._insist(lambda: log.upload(manifest)))
            while True:
                draft = log.draft(
                    PUSH, clock=log.view.islands[self.name].clock, base=start, steps=steps, tokens=tokens,
                    numbers=numbers, payloads=tuple(payloads), manifest=payloads[-1].digest if payloads else "",
                )  # fmt: skip
                try:
                    return self._insist(lambda draft=draft: log.append(draft)).sequence
                except Dropped as error:
                    rejoin(log, error, self._say)
                    if self.follower.terms.rule.pins:  # it has begun somewhere else
                        payloads, start = [], log.view.islands[self.name].version

        agree.decided("pushing", write)
        self._follow(lambda: True)
        self.follower.own = {}
        self.clock = self.follower.view.islands[self.name].clock
        return sound

    def take(self) -> tuple[int, Params]:
        """(version, this process's share of its parameters) that the next round begins with, as soon as it may."""
        bound = self.follower.terms.staleness
        self._follow(lambda: bound < 0 or self.clock - self._leading().view.live_minimum() <= bound)
        return self.follower.newest(self.name)

    def check(self) -> None:
        """There is no thread that could have failed."""

    def end(self, leave: bool = True, patience: float = 0.0) -> None:
        def write() -> None:
            log = self._leading()
            if leave:
                self._insist(log.leave)
            run(log.beat(at_once=True, **presence.process()))

        agree.decided("leaving", write)
        self._ended.set()

    def _leading(self) -> Log:
        """Of process 0, which alone asks."""
        assert self.log
        return self.log

    # ── following ────────────────────────────────────────────────────────────────────────────────────────────────

    def _follow(self, ready: Callable[[], bool]) -> None:
        """All fold what process 0 reads, until there is no more and `ready` is true there."""
        while True:
            said = agree.decided("records of the log", lambda: self._read(ready))
            self._fold([base64.b64decode(text) for text in said["records"]])
            if said["ready"]:
                return

    def _read(self, ready: Callable[[], bool]) -> dict[str, Any]:
        log = self._leading()
        self._insist(log.read)
        first, last = self.follower.view.next, log.view.next
        keys = [record_key(number) for number in range(first, min(last, first + AT_ONCE))]
        found = [self._insist(lambda key=key: log.store.get(key, LIMIT + 1)) or b"" for key in keys]
        is_ready = not keys and ready()
        if not keys and not is_ready:
            assert self._lookout
            self._lookout.look()
            time.sleep(PAUSE)
        return {"records": [base64.b64encode(data).decode() for data in found], "ready": is_ready}

    def _fold(self, found: Sequence[bytes]) -> None:
        follower, taken = self.follower, []
        for data in found:
            entry, view = run(follower.log.given(data))
            taken.append((entry, view, *self._examined(entry.record if entry.verdict.folded else None)))
        if not taken:
            return
        refused = agree.everyone("what is refused", [why for *_, why in taken])
        for i, (entry, view, pushed, _) in enumerate(taken):
            why = next((reasons[i] for reasons in refused if reasons[i]), "")
            follower.fold(entry, view, pushed, why)
        for each in follower.wrong[self._told :]:
            self._say(each.line)
        self._told = len(follower.wrong)

    def _examined(self, record: records.Record | None) -> tuple[Pushed | None, str]:
        if record is None or record.type != PUSH:
            return None, ""
        try:
            return self._insist(lambda: self.follower.examine(record)), ""
        except PayloadError as error:
            return None, str(error)

    def _insist(self, ask: Callable[[], Routine[Any]]) -> Any:
        """Until the store answers."""
        said = False
        while True:
            try:
                return run(ask())
            except Away as error:
                if not said:
                    self._say(f"the store is away ({error}): waiting for it")
                said = True

    def _beat(self) -> None:
        """Beside the training: with a request of its own, since the log is the main thread's."""
        while not self._ended.wait(BEAT):
            said = {"version": self.follower.view.version, "nonce": self.follower.log.nonce, **presence.process()}
            try:
                run(self.store.store.put(f"heartbeats/{self.name}", records.canonical(said)))
            except Away:
                continue

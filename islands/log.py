"""Writing the log that islands share: a record is created at the next number, or another writer's is there.

Whatever the store answers, what then can be read at that key is the next record, the writer's own or another one; in
that case the writer takes the next number. A Log reads, too (islands/reader.py), and is used by one thread.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from islands import record as records
from islands import trust
from islands.reader import LIMIT, PATIENCE, RUN, RUN_LIMIT, Entry, LogError, Reader, payload_key, record_key
from islands.record import EXPIRE, JOIN, LEAVE, MEMBERS, OWNER, PUSH, Payload, Record, Run, digest
from islands.store import Away, Call, Clock, Patient, Routine, Store
from islands.trust import Key
from islands.view import Member
from runtime.config import RunError, UsageError

BEAT = 5.0  # seconds between heartbeats: stores allow about one write a second to one name


class Dropped(RunError):
    """A record that the fold would drop, and that was therefore not written."""

    def __init__(self, why: str):
        super().__init__(why)
        self.why = why


class Log(Reader):
    """A reader's place in a log, and a writer's. nonce: of this process, for every record that it writes."""

    def __init__(self, *place: Any):
        super().__init__(*place)
        self.incarnation = 0
        self._mine: Entry | None = None  # the last that this process has written
        self._pending: Record | None = None  # of which it is not known whether it has been written
        self._next_beat = float("-inf")

    @classmethod
    def begin(
        cls, store: Store, run: Run, members: Mapping[str, Member], key: Key, clock: Any = Clock
    ) -> Routine["Log"]:
        """Makes a log, whose owner has the key; its first record is the member list.

        Raises UsageError where there is another one. Stopped in between, it can be done again.
        """
        yield from store.prepare()
        data = run.encode()
        if (yield from Patient(store, clock, PATIENCE, key.public).create(RUN, data, RUN_LIMIT)) != data:
            raise UsageError("there is the log of another run already: choose another folder or path")
        log = yield from cls.open(store, OWNER, key, clock=clock)
        yield from log.read()
        if log.view.next == 0:
            yield from log.write_members(lambda before: members)
        return log

    def draft(self, type: str, **fields: Any) -> Record:
        """A record of this island, for `append`, which gives it its number."""
        return Record(type=type, island=self.island, incarnation=self.incarnation, nonce=self.nonce, **fields)

    def append(self, draft: Record) -> Routine[Entry]:
        """Writes it, and returns its entry: it is folded, and stays so.

        Its payloads are there already. Raises Dropped, and writes nothing, where it would be dropped: this island has
        expired, say, or its name has joined anew. After Away the same draft may be appended again: it is written once.
        """
        while (entry := (yield from self._append_here(draft))) is None:
            pass
        return entry

    def _append_here(self, draft: Record) -> Routine[Entry | None]:
        """At the next number and nowhere else; None: another record is there now, and was read."""
        assert self._key, "a log without a key is only read"
        self._pending = draft
        if not self._has_written(draft):
            record = self._key.sign(replace(draft, sequence=self.view.next, previous=self.tail))
            data = record.encode()
            key = record_key(record.sequence)
            refused = self._trusted(data)[2] or self.refusal(self.view, record)
            _, verdict = self.view.after(record, refused, self.view.members)
            if verdict.folded:
                there = yield from self.store.create(key, data, LIMIT + 1)
            else:  # but perhaps not after what others have written meanwhile
                there = yield from self.store.get(key, LIMIT + 1)
            if there is None:
                self._pending = None
                raise Dropped(verdict.why)
            yield from self._take(there)
        if not self._has_written(draft):
            return None
        self._pending = None
        return self._mine

    def _has_written(self, draft: Record) -> bool:
        return bool(self._mine and self._mine.record and _same(self._mine.record, draft))

    def push(self, blobs: Sequence[bytes], **fields: Any) -> Routine[Entry]:
        """A round's result. What the record names is there before the record is: a reader never waits for it."""
        payloads = []
        for blob in blobs:
            payloads.append((yield from self.upload(blob)))
        return (yield from self.append(self.draft(PUSH, payloads=tuple(payloads), **fields)))

    def join(self, clock: int = 0) -> Routine[Entry]:
        """Takes part from here on: as the next incarnation of its name, in the first round that is open and not before
        `clock`. Raises Dropped where another process has joined by this name since the last `read`.
        """
        while True:
            draft = self._pending if self._pending and self._pending.type == JOIN else self._joining(clock)
            try:
                entry = yield from self.append(draft)
            except Dropped:
                again = self._joining(clock)
                if again.incarnation != draft.incarnation or again.clock == draft.clock:
                    raise
            else:
                self.incarnation = draft.incarnation
                return entry

    def _joining(self, clock: int) -> Record:
        before = self.view.islands.get(self.island)
        incarnation, clock_before = (before.incarnation, before.clock) if before else (0, 0)
        first = max(clock, clock_before, self.view.complete)
        return replace(self.draft(JOIN, clock=first, base=self.view.version), incarnation=incarnation + 1)

    def write_members(self, change: Callable[[Mapping[str, Member]], Mapping[str, Member]]) -> Routine[Entry | None]:
        """Puts another member list into force. By the owner, or an island with the role own.

        change: from the list in force to the new one. It is asked again where another record came first. Returns None
        where nothing changes."""
        while (members := change(self.view.members)) != self.view.members:
            payload = yield from self.upload(trust.write_list(members))
            draft = self.draft(MEMBERS, clock=0, payloads=(payload,), manifest=payload.digest)
            if entry := (yield from self._append_here(draft)):
                return entry
        return None

    def upload(self, data: bytes) -> Routine[Payload]:
        """Stores what a record is going to name. What is there already has its digest, too."""
        return (yield from upload(self.store, data))

    def leave(self) -> Routine[Entry]:
        """Holds nobody back from here on."""
        island = self.view.islands[self.island]
        return (yield from self.append(self.draft(LEAVE, clock=island.clock, base=self.view.version)))

    def expire(self, target: str, numbers: Mapping[str, str]) -> Routine[Entry]:
        """Takes an island to be gone. numbers: the times of the store that prove it."""
        island = self.view.islands[self.island]
        draft = self.draft(EXPIRE, clock=island.clock, base=self.view.version, target=target, numbers=numbers)
        return (yield from self.append(draft))

    def _take(self, data: bytes) -> Routine[Entry]:
        entry = yield from super()._take(data)
        if entry.record and entry.verdict.folded and self._is_mine(entry.record):
            self._mine = entry
        return entry

    def _is_mine(self, record: Record) -> bool:
        """By this process, and not only by its island: two processes may have taken the same name."""
        return record.island == self.island and record.nonce == self.nonce

    # ── heartbeats ───────────────────────────────────────────────────────────────────────────────────────────────

    def beat(self, at_once: bool = False, **more: Any) -> Routine[bool]:
        """Says that this process is there; whether it has: at most every 5 seconds, and not while the store is away.
        more: what else it says."""
        now = yield Call("now", self.store.clock.now)
        if now < self._next_beat and not at_once:
            return False
        self._next_beat = now + BEAT
        said = {"incarnation": self.incarnation, "nonce": self.nonce, "version": self.view.version}
        try:
            yield from self.store.put(f"heartbeats/{self.island}", records.canonical(said | more))
        except Away:
            return False
        return True

    def heartbeats(self) -> Routine[dict[str, float]]:
        """When each was written, by the store's clock: only their differences mean anything."""
        found = {}
        for key in (yield from self.store.list("heartbeats")):
            if (modified := (yield from self.store.last_modified(key))) is not None:
                found[key.partition("/")[2]] = modified
        return found


def upload(store: Patient, data: bytes) -> Routine[Payload]:
    """As `Log.upload`, of what is stored before there is a log."""
    payload = Payload(digest(data), len(data))
    there = yield from store.create(payload_key(payload.digest), data, payload.bytes + 1)
    if there != data:
        raise LogError(f"{payload_key(payload.digest)} has other bytes than its name says: it was altered")
    return payload


def _same(a: Record, b: Record) -> bool:
    """Whether they say the same: the number, the digest before, and so the signature are others at every attempt."""
    return all(
        getattr(a, name) == getattr(b, name)
        for name in ("type", "island", "incarnation", "clock", "base", "target", "payloads")
    )

"""The log that islands share: append-only, totally ordered, read by everybody in the same way.

    run.json             what the run is, and its owner's key
    records/%020d        one record for each number, each naming the digest of the one before
    payloads/SHA256      what records refer to, by the digest of the stored bytes
    heartbeats/NAME      the only objects that are overwritten; they decide nothing

The next record is whatever has been created at the next number: a reader probes that key, and a listing is only a hint.
A writer creates its record there. Whatever the store answers, what then can be read at that key is the next record, the
writer's own or another one; in that case the writer takes the next number.

The methods of Log are routines (islands/store.py): `run(log.read())`. A Log is used by one thread.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from islands import record as records
from islands import trust
from islands.record import JOIN, LIMIT, MEMBERS, OWNER, PUSH, Payload, Record, Run, digest
from islands.store import Away, Call, Clock, Patient, Routine, Store
from islands.trust import Key
from islands.view import Member, Verdict, View
from runtime.config import RunError, UsageError

RUN = "run.json"
RUN_LIMIT = 1 << 20  # bytes
PATIENCE = 10.0  # seconds in which a store may come back
BEAT = 5.0  # seconds between heartbeats: stores allow about one write a second to one name


class LogError(RunError):
    """The log is not what its writers have written. Nobody can go on with it before somebody has looked."""


class Dropped(RunError):
    """A record that the fold would drop, and that was therefore not written."""

    def __init__(self, why: str):
        super().__init__(why)
        self.why = why


@dataclass(frozen=True)
class Entry:
    """What is at one number. digest: of its bytes. island: who it says has written it; "" if it does not say.
    record: None if it is not trusted, or is none."""

    sequence: int
    digest: str
    island: str
    record: Record | None
    verdict: Verdict


def record_key(number: int) -> str:
    return f"records/{number:020d}"


def payload_key(name: str) -> str:
    return f"payloads/{name}"


class Log:
    """One reader's place in a log; with a key, a writer's.

    view: what the records up to here say. tail: the digest of the last one; of run.json before the first.
    nonce: of this process, for every record that it writes.
    """

    def __init__(
        self, store: Patient, run: Run, tail: str, view: View | None, island: str, key: Key | None, nonce: str
    ):
        self.store, self.run, self.island, self.nonce, self._key = store, run, island, nonce, key
        self.view, self.tail = view or View(members=trust.owner(run.owner)), tail
        self.incarnation = 0
        self._unread: list[Entry] = []
        self._mine: Entry | None = None  # the last that this process has written
        self._pending: Record | None = None  # of which it is not known whether it has been written
        self._next_beat = float("-inf")

    @classmethod
    def open(
        cls,
        store: Store,
        island: str = "",
        key: Key | None = None,
        place: tuple[View, str] | None = None,
        clock: Any = Clock,
        patience: float = PATIENCE,
        nonce: str = "",
    ) -> Routine["Log"]:
        """Reads run.json; what else there is, `read` gives.

        island, key: of a writer. place: (view, tail) of an earlier Log, which goes on there. patience: seconds after
        which a store that is away is reported (Away); what was asked may then be asked again.
        Raises UsageError where there is no log, LogError where it is no longer the one of `place`.
        """
        nonce = nonce or secrets.token_hex(16)
        patient = Patient(store, clock, patience, nonce)
        data = yield from patient.get(RUN, RUN_LIMIT)
        if data is None:
            yield from patient.list("records")  # says so, if there is no folder or bucket either
            raise UsageError(f"there is no log: {RUN} is not there; give the folder or the path that has it")
        try:
            run = records.parse_run(data)
        except ValueError as error:
            raise UsageError(f"{RUN}: {error}") from error
        view, tail = place or (None, digest(data))
        log = cls(patient, run, tail, view, island, key, nonce)
        if place:
            yield from log._confirm()
        if key:
            yield from store.sweep()
        return log

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
            yield from log.write_members(members)
        return log

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────

    def read(self) -> Routine[list[Entry]]:
        """All entries since the last call, those that `append` has come upon and its own included, in their order."""
        while (data := (yield from self.store.get(record_key(self.view.next), LIMIT + 1))) is not None:
            yield from self._take(data)
        entries, self._unread = self._unread, []
        return entries

    def look_ahead(self) -> Routine[None]:
        """Raises LogError where records lie behind the last that can be reached: those between were removed."""
        keys = yield from self.store.list("records", record_key(self.view.next))
        for key in keys[-1:]:  # the listing may be old, or this reader behind: only what can be read counts
            is_there = yield from self.store.get(key, 1)
            before = yield from self.store.get(record_key(self.view.next), 1)
            if is_there is not None and before is None:
                raise LogError(
                    f"the log has a gap: record {self.view.next} is not there, and {key} is. Nobody can go on before "
                    "what was removed is back, as from a copy"
                )

    def download(self, payload: Payload) -> Routine[bytes]:
        """Its bytes, if they are those of which the record speaks; never more than it says. Raises LogError."""
        key = payload_key(payload.digest)
        data = yield from self.store.get(key, payload.bytes + 1)
        if data is None:
            raise LogError(f"{key} is not there: payloads are written before the records that name them")
        if len(data) != payload.bytes or digest(data) != payload.digest:
            raise LogError(f"{key} has other bytes than the {payload.bytes} that a record names: it was altered")
        return data

    def _confirm(self) -> Routine[None]:
        """That the last record read by an earlier Log is still the same."""
        number = self.view.next - 1
        key = record_key(number) if number >= 0 else RUN
        data = yield from self.store.get(key, LIMIT + 1)
        if data is None or digest(data) != self.tail:
            state = "is not there any more" if data is None else "is another one now"
            raise LogError(f"{key} {state}: it was folded here, with the digest {self.tail[:16]}…; the log was forked")

    def _take(self, data: bytes) -> Routine[Entry]:
        """Goes on by one record."""
        record, island, refused = self._trusted(data)
        members = None
        if record and record.type == MEMBERS and not refused:
            members, refused = yield from self._list_of(record)
        number, (self.view, verdict) = self.view.next, self.view.after(record, refused, members)
        self.tail = digest(data)
        entry = Entry(number, self.tail, island, record, verdict)
        self._unread.append(entry)
        if record and verdict.folded and self._is_mine(record):
            self._mine = entry
        return entry

    def _is_mine(self, record: Record) -> bool:
        """By this process, and not only by its island: two processes may have taken the same name."""
        return record.island == self.island and record.nonce == self.nonce

    def _trusted(self, data: bytes) -> tuple[Record | None, str, str]:
        """(the record at the next number, the island that it names, why it is refused). Raises LogError."""
        number = self.view.next
        if len(data) > LIMIT:
            return None, "", f"it has more than {LIMIT} bytes"
        island = ""
        try:
            fields = records.load(data)
            name = fields.get("island")
            island = name if isinstance(name, str) and records.NAME.fullmatch(name) else ""
            if why := trust.why_refused(fields, self.view.members):
                return None, island, why
            record = records.from_fields(fields)
        except records.NewerFormat as error:
            raise LogError(f"record {number}, by {island}: {error}; update it") from error
        except ValueError as error:
            return None, island, str(error)
        if record.sequence != number:
            return record, island, f"it is a copy of record {record.sequence}"
        if record.previous != self.tail:
            raise LogError(
                f"record {number}, signed by {island}, follows another record {number - 1} than the one that is there "
                f"({record.previous[:16]}…, not {self.tail[:16]}…): the log was forked, or that record was replaced"
            )
        if record.type == PUSH and (size := sum(payload.bytes for payload in record.payloads)) > self.run.budget:
            return record, island, f"its payloads have {size} bytes, and {RUN} allows {self.run.budget}"
        return record, island, ""

    def _list_of(self, record: Record) -> Routine[tuple[dict[str, Member] | None, str]]:
        """(the members, why they are refused)."""
        payload = next((payload for payload in record.payloads if payload.digest == record.manifest), None)
        if payload is None or payload.bytes > trust.LIST_LIMIT:
            return None, f"it has no member list of at most {trust.LIST_LIMIT} bytes"
        data = yield from self.download(payload)
        try:
            return trust.owner(self.run.owner) | trust.read_list(data), ""
        except records.NewerFormat as error:
            raise LogError(f"the member list of record {self.view.next}: {error}; update it") from error
        except ValueError as error:
            return None, str(error)

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────

    def draft(self, type: str, **fields: Any) -> Record:
        """A record of this island, for `append`, which gives it its number."""
        return Record(type=type, island=self.island, incarnation=self.incarnation, nonce=self.nonce, **fields)

    def append(self, draft: Record) -> Routine[Entry]:
        """Writes it, and returns its entry: it is folded, and stays so.

        Its payloads are there already. Raises Dropped, and writes nothing, where it would be dropped: this island has
        expired, say, or its name has joined anew. After Away the same draft may be appended again: it is written once.
        """
        assert self._key, "a log without a key is only read"
        self._pending = draft
        while True:
            if self._mine and self._mine.record and _same(self._mine.record, draft):
                self._pending = None
                return self._mine
            record = self._key.sign(replace(draft, sequence=self.view.next, previous=self.tail))
            data = record.encode()
            key = record_key(record.sequence)
            _, verdict = self.view.after(record, self._trusted(data)[2], self.view.members)
            if verdict.folded:
                there = yield from self.store.create(key, data, LIMIT + 1)
            else:  # but perhaps not after what others have written meanwhile
                there = yield from self.store.get(key, LIMIT + 1)
            if there is None:
                self._pending = None
                raise Dropped(verdict.why)
            yield from self._take(there)

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

    def write_members(self, members: Mapping[str, Member]) -> Routine[Entry]:
        """Puts another member list into force. By the owner, or an island with the role own."""
        payload = yield from self.upload(trust.write_list(members))
        draft = self.draft(MEMBERS, clock=0, payloads=(payload,), manifest=payload.digest)
        return (yield from self.append(draft))

    def upload(self, data: bytes) -> Routine[Payload]:
        """Stores what a record is going to name. What is there already has its digest, too."""
        payload = Payload(digest(data), len(data))
        there = yield from self.store.create(payload_key(payload.digest), data, payload.bytes + 1)
        if there != data:
            raise LogError(f"{payload_key(payload.digest)} has other bytes than its name says: it was altered")
        return payload

    # ── heartbeats ───────────────────────────────────────────────────────────────────────────────────────────────

    def beat(self) -> Routine[bool]:
        """Says that this process is there; whether it has: at most every 5 seconds, and not while the store is away."""
        now = yield Call("now", self.store.clock.now)
        if now < self._next_beat:
            return False
        self._next_beat = now + BEAT
        said = {"incarnation": self.incarnation, "nonce": self.nonce, "version": self.view.version}
        try:
            yield from self.store.put(f"heartbeats/{self.island}", records.canonical(said))
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


def _same(a: Record, b: Record) -> bool:
    """Whether they say the same: the number, the digest before, and so the signature are others at every attempt."""
    return all(
        getattr(a, name) == getattr(b, name)
        for name in ("type", "island", "incarnation", "clock", "base", "target", "payloads")
    )

"""Reading the log that islands share: append-only, totally ordered, read by everybody in the same way.

    run.json             what the run is, and its owner's key
    records/%020d        one record for each number, each naming the digest of the one before
    payloads/SHA256      what records refer to, by the digest of the stored bytes
    heartbeats/NAME      the only objects that are overwritten; they decide nothing

The next record is whatever has been created at the next number: a reader probes that key, and a listing is only a hint.
Who writes is in islands/log.py. The methods are routines (islands/store.py): `run(log.read())`, and used by one thread.
"""

import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from islands import record as records
from islands import terms, trust
from islands.record import LIMIT, MEMBERS, PUSH, Payload, Record, Run, digest
from islands.store import Clock, Patient, Routine, Store
from islands.trust import Key
from islands.view import Member, Verdict, View
from runtime.config import RunError, UsageError

RUN = "run.json"
RUN_LIMIT = 1 << 20  # bytes
PATIENCE = 10.0  # seconds in which a store may come back


class LogError(RunError):
    """The log is not what its writers have written. Nobody can go on with it before somebody has looked."""


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


class Reader:
    """One reader's place in a log.

    view: what the records up to here say. tail: the digest of the last one; of run.json before the first. refusal: why
    a record does not count by the rules of the run, or "" (islands/terms.py).
    """

    def __init__(
        self, store: Patient, run: Run, tail: str, view: View | None, island: str, key: Key | None, nonce: str
    ):
        self.store, self.run, self.island, self.nonce, self._key = store, run, island, nonce, key
        self.view, self.tail = view or first_view(run), tail
        self.refusal: Callable[[View, Record], str] = terms.refusal(run.facts)
        self._unread: deque[tuple[Entry, View]] = deque()
        self._read: list[Entry] = []

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
    ) -> Routine[Self]:
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

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────

    def read(self) -> Routine[list[Entry]]:
        """All entries since the last call, those that `append` has come upon and its own included, in their order."""
        while (found := (yield from self.next())) is not None:
            self._read.append(found[0])
        entries, self._read = self._read, []
        return entries

    def next(self) -> Routine[tuple[Entry, View] | None]:
        """The next of them, and the view after it; None: there is none yet."""
        if not self._unread:
            data = yield from self.store.get(record_key(self.view.next), LIMIT + 1)
            if data is not None:
                yield from self._take(data)
        return self._unread.popleft() if self._unread else None

    def given(self, data: bytes) -> Routine[tuple[Entry, View]]:
        """Goes on by these bytes, which another reader has found at the next number."""
        yield from self._take(data)
        return self._unread.popleft()

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
        if record and not refused:
            refused = self.refusal(self.view, record)
        number, (self.view, verdict) = self.view.next, self.view.after(record, refused, members)
        self.tail = digest(data)
        entry = Entry(number, self.tail, island, record, verdict)
        self._unread.append((entry, self.view))
        return entry

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


def first_view(run: Run) -> View:
    return View(members=trust.owner(run.owner))

"""Reading a log and folding it: the parameters of every version, one after another, the same bits for everybody.

Everything of a push is downloaded and checked before any of it is folded, since a fold is not undone. A push that is
refused when its payload is seen is folded as zeros, with the reason kept.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from islands import decode, keyring, merge, payload, snapshot, terms
from islands import record as records
from islands import secret as secrets
from islands.decode import PayloadError
from islands.log import Log
from islands.pace import SPEED
from islands.payload import Fetch, Form, Ranges
from islands.reader import Entry, LogError, Reader, payload_key
from islands.record import PUSH, SNAPSHOT, Payload, Record
from islands.secret import Secret
from islands.snapshot import Place
from islands.state import Params, State
from islands.store import Clock, Routine, Store
from islands.view import View


class Refused(NamedTuple):
    """A push that was folded as zeros."""

    sequence: int
    island: str
    reason: str

    @property
    def line(self) -> str:
        return f"record {self.sequence}, of {self.island}, counts as zeros: {self.reason}"


class Fork(NamedTuple):
    """A snapshot that is not what was folded here."""

    version: int
    island: str
    theirs: str
    ours: str

    @property
    def line(self) -> str:
        return (
            f"the snapshot of version {self.version} by {self.island} is {self.theirs[:16]}…, and here it is "
            f"{self.ours[:16]}…: one of the two folds is wrong"
        )


class Pushed(NamedTuple):
    """Of a push, what this process folds: checked, and there."""

    manifest: payload.Manifest
    fetch: Fetch


class Taken(NamedTuple):
    """Of the newest version that a snapshot is due at."""

    version: int
    manifest: bytes


class Follower:
    """state: the fold at `view.version`. speeds: steps a second that each island has last told. wrong: what was so far.
    due: the snapshot that every island takes, of the newest version that has one. author: of the last record.
    stored: the last record of a snapshot. own: payloads that were made here, which need not be downloaded.
    Of a replay: refused {number of a record that does not count: whose, and why}; read: the names of payloads."""

    def __init__(
        self, log: Log, state: State, view: View, tail: str, secret: Secret | None, share: Ranges | None, replayed: bool
    ):
        self.form, self.secret = form_of(log.run.facts), secret
        self.is_whole, self.share = share is None, share or self.form.whole()
        self.log, self.state, self.view, self.tail = log, state, view, tail
        self.terms = terms.of(log.run.facts["keys"])
        self.speeds: dict[str, float] = {}
        self.wrong: list[Refused | Fork] = []
        self.replayed, self.refused, self.read = replayed, {}, set()
        self.own: dict[str, bytes] = {}
        self.due: Taken | None = None
        self.author = ""
        self.stored: Record | None = None
        self.began = view.version
        self.watch: Callable[[Record], None] = lambda record: None  # of each that was folded
        self._waiting: tuple[Entry, View] | None = None

    @classmethod
    def open(cls, store: Store, from_oldest: bool = False, most: int | None = None, **how: Any) -> Routine["Follower"]:
        """Begins at the newest snapshot that is confirmed, of at most this version, or at the oldest. how: as
        `Log.open` takes it."""
        clock = how.get("clock", Clock)
        reader = yield from Reader.open(store, clock=clock)
        place = yield from begin_at(reader, from_oldest, most)
        return (yield from cls.at(place, reader, store, replayed=from_oldest, **how))

    @classmethod
    def at(
        cls, place: Place, reader: Reader, store: Store, share: Ranges | None = None, replayed: bool = False, **how: Any
    ) -> Routine["Follower"]:
        """Begins at this snapshot. share: elements of each leaf that this process folds; None: all."""
        secret = keyring.secret_of(reader.run)
        state, view, tail = yield from snapshot.load(reader, place, secret, share)
        tail = tail or reader.tail  # the first snapshot is named by run.json, and cannot name it
        log = yield from Log.open(store, place=(view, tail), **how)
        return cls(log, state, view, tail, secret, share, replayed)

    def advance(self, until: int | None = None) -> Routine[int]:
        """Folds what there is, up to the next version that a snapshot is due at, and to `until`; how many records it
        were."""
        count = 0
        while (until is None or self.view.next <= until) and not (count and self.is_due):
            self._waiting = self._waiting or (yield from self.log.next())
            if self._waiting is None:
                break
            yield from self._fold(*self._waiting)
            self._waiting = None
            count += 1
        return count

    def newest(self, name: str) -> tuple[int, Params]:
        """(version, a copy of its parameters) that a round of this island begins with; by a rule that pins, its own
        last one."""
        if self.terms.rule.pins:
            return self.view.islands[name].version, self.state.copied(f"base.{name}")
        return self.view.version, self.state.copied("params")

    @property
    def is_due(self) -> bool:
        """Whether a snapshot is, of the version that the state is at."""
        return self.due is not None and self.due.version == self.view.version == self.view.next - 1

    def _fold(self, entry: Entry, view: View) -> Routine[None]:
        pushed, why = None, ""
        if entry.record and entry.verdict.folded and entry.record.type == PUSH:
            try:
                pushed = yield from self.examine(entry.record)
            except PayloadError as error:
                why = str(error)
        self.fold(entry, view, pushed, why)

    def fold(self, entry: Entry, view: View, pushed: Pushed | None, why: str = "") -> None:
        """Folds the next record. view: after it. pushed: of `examine`; None: nothing, or it is refused, and why."""
        record = entry.record
        if self.replayed and not entry.verdict.folded:
            self.refused[entry.sequence] = f"of {entry.island or 'nobody known'}: {entry.verdict.why}"
        if record and entry.verdict.folded:
            if why:
                self.wrong.append(Refused(record.sequence, record.island, why))
            if SPEED in record.numbers:
                self.speeds[record.island] = record.number(SPEED)
            blocks = payload.read(self.form, pushed.manifest, self.share, pushed.fetch) if pushed and not why else None
            try:
                merge.fold(self.terms.rule, self.state, record, entry.verdict, view, blocks)
            except PayloadError as error:  # it was checked: so memory or disk is at fault, and the state is lost
                raise LogError(f"record {entry.sequence}: {error}: it was sound a moment ago") from error
            if record.type == SNAPSHOT:
                self.stored = record
                self._compare(record)
        self.view, self.tail, self.author = view, entry.digest, entry.island
        every = self.log.run.facts["snapshots"] if self.is_whole else 0
        if every and view.version == entry.sequence > 0 and entry.sequence % every == 0:
            self.due = Taken(view.version, snapshot.manifest(self.state, view, self.tail, self.secret))
        if record and entry.verdict.folded:
            self.watch(record)

    def _compare(self, record: Record) -> None:
        if self.due and record.base == self.due.version:
            ours = records.digest(self.due.manifest)
            if ours != record.manifest:
                self.wrong.append(Fork(record.base, record.island, record.manifest, ours))

    def examine(self, record: Record) -> Routine[Pushed | None]:
        """What a push adds to this process's share; None: nothing. Raises PayloadError where it is refused."""
        found, sizes = yield from self._manifest(record)
        if found is None:
            return None
        fetch = (yield from self._whole(record)) if self.is_whole or self.secret else (yield from self._pieces(found))
        payload.verify(self.form, found, self.share, fetch)
        if bound := self._bound(record):
            if not self.is_whole:
                raise LogError(
                    f"record {record.sequence}, of {record.island}, has a norm bound, and this island of several "
                    "processes sees a part of it in each: bounds need islands of one process, so far"
                )
            norm = payload.norm(self.form, found, fetch)
            if not norm <= bound:
                raise PayloadError(f"its norm is {norm:.6g}, and {record.island} may push one of {bound:.6g}")
        return Pushed(found, fetch)

    def _manifest(self, record: Record) -> Routine[tuple[payload.Manifest | None, Mapping[str, int]]]:
        """(manifest, checked; bytes of what it and the blobs hold)."""
        if not record.manifest:
            return None, {}
        sizes = {each.digest: each.bytes for each in record.payloads}
        sizes = secrets.plain(sizes) if self.secret else sizes
        if len(sizes) != len(record.payloads):
            raise PayloadError("it names a payload twice")
        own = next(each for each in record.payloads if each.digest == record.manifest)
        if sizes[own.digest] > (limit := payload.manifest_limit(self.form)):
            raise PayloadError(f"manifest: {own.bytes} bytes are more than the {limit} that it may have")
        data = yield from self._payload(own)
        blobs = {name: size for name, size in sizes.items() if name != own.digest}
        return payload.read_manifest(self.form, data, blobs), sizes

    def _whole(self, record: Record) -> Routine[Fetch]:
        stored = {}
        for each in record.payloads:
            if each.digest != record.manifest:
                stored[each.digest] = yield from self._payload(each)
        if self.replayed:
            self.read |= {each.digest for each in record.payloads}
        return lambda digest, offset, length: memoryview(stored[digest])[offset : offset + length]

    def _pieces(self, found: payload.Manifest) -> Routine[Fetch]:
        """Those that this process needs: each has a digest of its own."""
        stored = {}
        for leaf, wanted in self.share.items():
            for piece in payload.needed(found[leaf], wanted):
                key, place = payload_key(piece.blob), (piece.blob, piece.offset)
                if place not in stored and piece.blob in self.own:
                    stored[place] = self.own[piece.blob][piece.offset : piece.offset + piece.length]
                elif place not in stored:
                    data = yield from self.log.store.get_range(key, piece.offset, piece.length)
                    if data is None:
                        raise LogError(f"{key} is not there: payloads are written before the records that name them")
                    stored[place] = data
        return lambda digest, offset, length: stored[digest, offset]

    def _payload(self, payload: Payload) -> Routine[bytes]:
        data = self.own.get(payload.digest)
        if data is None:
            data = yield from self.log.download(payload)
        return secrets.open_(self.secret, data) if self.secret else data

    def _bound(self, record: Record) -> float:
        """Of the norm; 0: none."""
        member = self.view.members.get(record.island)
        own = float.fromhex(member.norm_bound) if member and member.norm_bound else 0.0
        return min((bound for bound in (own, self.terms.norm_bound) if bound), default=0.0)

    # ── snapshots ────────────────────────────────────────────────────────────────────────────────────────────────

    def store_snapshot(self) -> Routine[Place]:
        """Of this version, which must be the one that is due."""
        assert self.due and self.is_due
        blobs: list[Payload] = []
        for chunk in snapshot.chunks(self.state, self.secret):
            blobs.append((yield from self.log.upload(chunk)))
        yield from self.log.upload(self.due.manifest)
        return snapshot.place(self.due.version, self.due.manifest, blobs)


def begin_at(reader: Reader, from_oldest: bool = False, most: int | None = None) -> Routine[Place]:
    """The snapshot that a fold begins with."""
    terms.check_folded(reader.run.facts)
    oldest = yield from snapshot.oldest(reader)
    if from_oldest or not reader.run.facts["snapshots"]:
        return oldest
    scan = yield from snapshot.begin(reader.store.store, Reader, clock=reader.store.clock)
    return (yield from snapshot.newest(scan, most)) or oldest


def form_of(facts: Mapping[str, Any]) -> Form:
    """What all payloads of the run have in common."""
    codec = facts["codec"]
    keys = {name: float.fromhex(x) if isinstance(x, str) else x for name, x in codec["keys"].items()}
    return Form(facts["leaves"], decode.build(codec["name"], **keys))

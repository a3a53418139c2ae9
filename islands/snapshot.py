"""Snapshots: all that the fold depends on at a version, so that who joins need not fold from the beginning.

Every island takes one at the same versions, those that the run's `snapshots` divides: it is the same bytes everywhere,
so one of them stores it, and the others confirm it, or have found a fork. A record of type `snapshot` names it.

The arrays of the state, float32 little-endian, in the order of their names, are one stream of bytes, which is cut into
chunks: the blobs, which may be encrypted (islands/secret.py). The manifest is canonical JSON:
    {"format": 1, "sizes": {array: elements}, "chunk": bytes, "blobs": [digest, …], "numbers": {name: count},
     "view": …, "tail": digest of the record of this version}
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from islands import record as records
from islands import terms, trust
from islands.payload import Ranges
from islands.reader import LogError, Reader, record_key
from islands.record import LIMIT, OWNER, SNAPSHOT, Payload, Record, Run
from islands.secret import Secret, open_, seal, stored_bytes
from islands.state import State
from islands.store import Routine, Store
from islands.view import View

R = TypeVar("R", bound=Reader)

FORMAT = 1
CHUNK = 2**25  # bytes; more where a record would otherwise name more than BLOBS of them
BLOBS = 256
MANIFEST_LIMIT = 2**26  # bytes
COPIES = 16  # of the parameters, that a state may have beside them: budget of what is loaded


@dataclass(frozen=True)
class Place:
    """Where a fold may begin: the manifest's digest, and all that the snapshot is made of. version: -1: of the first
    parameters, which run.json names."""

    version: int
    manifest: str
    payloads: tuple[Payload, ...]


def first(run: Run) -> Place:
    return Place(-1, *terms.first(run.facts))


# ── making one ───────────────────────────────────────────────────────────────────────────────────────────────────


def chunks(state: State, secret: Secret | None) -> Iterator[bytes]:
    """The blobs, one by one, as they are stored."""
    for chunk in _chunks(state):
        yield seal(secret, chunk) if secret else chunk


def _chunks(state: State) -> Iterator[bytes]:
    size, waiting = chunk_size(state), bytearray()
    for name in sorted(state.arrays):
        data = _bytes_of(np.ascontiguousarray(state.arrays[name], "<f4"))
        while len(waiting) + len(data) >= size:
            taken = size - len(waiting)
            yield bytes(waiting + data[:taken])
            waiting, data = bytearray(), data[taken:]
        waiting += data
    if waiting:
        yield bytes(waiting)


def chunk_size(state: State) -> int:
    """A multiple of 4 bytes."""
    return max(CHUNK, 4 * -(-sum(x.size for x in state.arrays.values()) // BLOBS))


def _bytes_of(x: Any) -> memoryview:
    return memoryview(x).cast("B")


def manifest(state: State, view: View, tail: str, secret: Secret | None) -> bytes:
    return records.canonical({
        "format": FORMAT,
        "sizes": {name: x.size for name, x in state.arrays.items()},
        "chunk": chunk_size(state),
        "blobs": [hashlib.sha256(chunk).hexdigest() for chunk in chunks(state, secret)],
        "numbers": state.numbers,
        "view": view.as_fields(),
        "tail": tail,
    })  # fmt: skip


# ── reading one ──────────────────────────────────────────────────────────────────────────────────────────────────


def described(log: Reader, place: Place) -> Routine[dict[str, Any]]:
    """Its manifest."""
    for payload in place.payloads:
        if payload.digest == place.manifest and payload.bytes <= MANIFEST_LIMIT:
            return records.load((yield from log.download(payload)))
    raise LogError(f"the snapshot of version {place.version} has no manifest of at most {MANIFEST_LIMIT} bytes")


def load(
    log: Reader, place: Place, secret: Secret | None, share: Ranges | None = None
) -> Routine[tuple[State, View, str]]:
    """(state, view, tail) of it. share: elements of each leaf that are read; None: all. Raises LogError for what is not
    as its manifest says, before it is allocated."""
    by_name = {payload.digest: payload for payload in place.payloads}
    found = yield from described(log, place)
    sizes, chunk, limit = found["sizes"], found["chunk"], COPIES * sum(log.run.facts["leaves"].values())
    total = 4 * sum(sizes.values())
    if total > 4 * limit or chunk > max(CHUNK, 4 * limit) or len(found["blobs"]) != -(-total // chunk):
        raise LogError(f"the snapshot of version {place.version} is not of this run's arrays")
    ranges = {name: share[name.partition("/")[2]] if share else [(0, sizes[name])] for name in sorted(sizes)}
    arrays = {name: np.empty(sum(count for _, count in own), np.float32) for name, own in ranges.items()}
    segments = list(_segments(sizes, ranges, arrays))
    for i, name in enumerate(found["blobs"]):
        first, last = i * chunk, min((i + 1) * chunk, total)
        here = [(start, x) for start, x in segments if start < last and first < start + len(x)]
        if not here:
            continue
        if name not in by_name or by_name[name].bytes > stored_bytes(chunk):
            raise LogError(f"the snapshot of version {place.version} has a blob that its record does not name: {name}")
        data = yield from log.download(by_name[name])
        data = memoryview(open_(secret, data) if secret else data)
        if len(data) != last - first:
            raise LogError(f"the snapshot of version {place.version} has a blob of another length: {name}")
        for start, x in here:
            begin, end = max(start, first), min(start + len(x), last)
            x[begin - start : end - start] = data[begin - first : end - first]
    return State(arrays, dict(found["numbers"])), View.from_fields(found["view"]), found["tail"]


def _segments(
    sizes: Mapping[str, int], ranges: Mapping[str, Sequence[tuple[int, int]]], arrays: Mapping[str, np.ndarray]
) -> Iterator[tuple[int, memoryview]]:
    """(first byte in the stream, where these bytes go) of each range."""
    base = 0
    for name, own in ranges.items():
        place = 0
        for first, count in own:
            if count:
                yield base + 4 * first, _bytes_of(arrays[name][place : place + count])
            place += count
        base += 4 * sizes[name]


# ── choosing one ─────────────────────────────────────────────────────────────────────────────────────────────────


def confirmed(view: View, names: frozenset[str]) -> bool:
    """Whether a joiner may take what these have confirmed: the owner, or two members, or the only one."""
    writers = [name for name, member in view.members.items() if member.writes and name != OWNER]
    return OWNER in names or len(names & set(writers)) >= min(2, len(writers)) > 0


def newest(log: Reader, most: int | None = None) -> Routine[Place | None]:
    """The newest that is confirmed, of all that the log has from here on, or of those of at most this version; None:
    there is none. Reads every record, and no payload. Raises LogError where two different ones of a version are
    confirmed."""
    seen: dict[str, tuple[Payload, ...]] = {}
    while (found := (yield from log.next())) is not None:
        record = found[0].record
        if record and record.type == SNAPSHOT and found[0].verdict.folded:
            seen[record.manifest] = record.payloads
    wanted = {v: found for v, found in log.view.snapshots.items() if most is None or v <= most}
    for version, of_version in sorted(wanted.items(), reverse=True):
        agreed = [each for each, names in of_version.items() if confirmed(log.view, names) and each in seen]
        if len(agreed) > 1:
            raise LogError(f"two different snapshots of version {version} are confirmed: the fold was forked")
        if agreed:
            return Place(version, agreed[0], seen[agreed[0]])
    return None


def begin(store: Store, kind: type[R], **how: Any) -> Routine[R]:
    """A reader or writer at the beginning of what is there; how: as its `open` takes it."""
    log = yield from kind.open(store, **how)
    if "keys" in log.run.facts:
        place = yield from oldest(log)
        if place.version >= 0:
            found = yield from described(log, place)
            return (yield from kind.open(store, place=(View.from_fields(found["view"]), found["tail"]), **how))
    return log


def oldest(log: Reader) -> Routine[Place]:
    """Where a fold can begin at the earliest: at the first parameters, or, where the log is truncated, at the oldest
    snapshot that its owner has confirmed. Raises LogError where there is none."""
    if (yield from log.store.get(record_key(0), 1)) is not None:
        return first(log.run)
    keys = yield from log.store.list("records")
    if not keys:
        return first(log.run)
    number = int(keys[0].rpartition("/")[2])
    begin = number
    while (data := (yield from log.store.get(record_key(number), LIMIT + 1))) is not None:
        record = _owners(log.run, data)
        if record and record.base >= begin:
            return Place(record.base, record.manifest, record.payloads)
        number += 1
    raise LogError(
        f"records below {begin} are not there, and no snapshot of a later version is confirmed by the owner: the log "
        "was not truncated by `python -m islands truncate`. Nobody can begin before they are back, as from a copy"
    )


def _owners(run: Run, data: bytes) -> Record | None:
    """The snapshot that the owner has signed here: to be believed without the records before it."""
    try:
        fields = records.load(data)
        if fields.get("type") != SNAPSHOT or trust.why_refused(fields, trust.owner(run.owner)):
            return None
        return records.from_fields(fields)
    except ValueError:
        return None


def record_of(place: Place) -> Mapping[str, Any]:
    """What a record says of it."""
    return {"base": place.version, "payloads": place.payloads, "manifest": place.manifest}


def place(version: int, data: bytes, blobs: Sequence[Payload]) -> Place:
    """data: the manifest."""
    own = Payload(records.digest(data), len(data))
    return Place(version, own.digest, (*blobs, own))

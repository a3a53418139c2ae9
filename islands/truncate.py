"""Taking away the beginning of a log that nobody needs any more: by its owner, and never by itself.

What is left begins with the record of a version of which there is a snapshot. The owner folds the log first, and signs
the snapshot if it is what was folded: it is what everybody will begin with. Records are removed in their order, each
with the payloads that nothing later names, so that what is left is the end of a log at every moment. Stopped in
between, the same command goes on.
"""

import contextlib
from collections.abc import Callable

from islands import keyring, snapshot
from islands import record as records
from islands.follow import Follower, Fork
from islands.log import Log
from islands.presence import EXPIRY
from islands.reader import payload_key, record_key
from islands.record import LIMIT, OWNER, SNAPSHOT
from islands.snapshot import Place
from islands.store import Store, run
from runtime.config import UsageError

OLD = 86_400.0  # seconds after which a payload that nothing names is taken to be left by somebody who has died


def before(store: Store, version: int, say: Callable[[str], None]) -> None:
    """Raises UsageError where no snapshot of at most this version can be begun with, or somebody needs what is before
    it."""
    log = run(Log.open(store))
    follower = run(Follower.open(store, from_oldest=True, island=OWNER, key=keyring.of_owner(log.run)))
    oldest = run(snapshot.oldest(log))
    named: dict[int, set[str]] = {}
    places = {oldest.version: oldest} if 0 <= oldest.version <= version else {}

    def seen(record: records.Record) -> None:
        named[record.sequence] = {payload.digest for payload in record.payloads}
        due = follower.due
        if record.type == SNAPSHOT and due and record.base == due.version <= version:
            places[record.base] = Place(record.base, record.manifest, record.payloads)

    follower.watch = seen
    while run(follower.advance()):
        pass
    if forks := [each for each in follower.wrong if isinstance(each, Fork)]:
        raise UsageError(f"{forks[0].line}: find out which before anything is removed")
    if not places:
        raise UsageError(
            f"--before={version}: there is no snapshot of a version up to {version}, and one is begun with"
        )
    place = places[max(places)]
    _check_readers(follower.log, place.version)
    if OWNER not in follower.view.snapshots.get(place.version, {}).get(place.manifest, ()) and place is not oldest:
        run(follower.log.append(follower.log.draft(SNAPSHOT, clock=0, **snapshot.record_of(place))))
    kept = {name for number, names in named.items() if number >= place.version for name in names}
    _remove(follower, place, kept | {payload.digest for payload in place.payloads}, say)


def _check_readers(log: Log, version: int) -> None:
    """Whoever has beaten not long ago may be reading what comes after the version that it has told."""
    run(log.beat())
    beats = run(log.heartbeats())
    for name, modified in beats.items():
        told = _version(log, name)
        if name != OWNER and beats[OWNER] - modified <= EXPIRY and told < version:
            raise UsageError(
                f"{name} has read up to version {told}, and still needs what comes after it: try again later, or "
                f"--before={told}"
            )


def _version(log: Log, name: str) -> int:
    try:
        return int(records.load(run(log.store.get(f"heartbeats/{name}", 1 << 16)) or b"")["version"])
    except (ValueError, KeyError, TypeError):
        return -1


def _remove(follower: Follower, place: Place, kept: set[str], say: Callable[[str], None]) -> None:
    log, store = follower.log, follower.log.store.store
    kept |= _named(log, place.version)
    numbers = sorted(int(key.rpartition("/")[2]) for key in run(log.store.list("records")))
    numbers, payloads = [number for number in numbers if number < place.version], 0
    for number in numbers:
        gone = _named(log, number) - kept
        run(store.delete(record_key(number)))
        for name in sorted(gone):
            run(store.delete(payload_key(name)))
        payloads += len(gone)
    payloads += _sweep(follower, kept)
    say(f"{len(numbers)} records and {payloads} payloads removed; the log begins with version {place.version}")


def _named(log: Log, number: int) -> set[str]:
    """Payloads that the record of this number names, whoever has written it."""
    data = run(log.store.get(record_key(number), LIMIT + 1))
    with contextlib.suppress(ValueError):
        return {payload.digest for payload in records.parse(data or b"").payloads}
    return set()


def _sweep(follower: Follower, kept: set[str]) -> int:
    """Removes payloads that nothing names: of the first parameters, and of writers that died before their record."""
    log, count = follower.log, 0
    now = run(log.store.last_modified(f"heartbeats/{OWNER}")) or 0.0
    first = {payload.digest for payload in snapshot.first(log.run).payloads}
    for key in run(log.store.list("payloads")):
        name = key.partition("/")[2]
        if name not in kept and (name in first or now - (run(log.store.last_modified(key)) or now) > OLD):
            run(log.store.store.delete(key))
            count += 1
    return count

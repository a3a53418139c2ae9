"""Taking away the beginning of a log that nobody needs any more: by its owner, and never by itself.

What is left begins with the record of a version of which there is a snapshot. The owner folds the log first, and signs
the snapshot if it is what was folded: it is what everybody will begin with. Records are removed in their order, so that
what is left is the end of a log at every moment, and then the payloads that only they have named. Stopped in between,
the same command goes on.
"""

from collections.abc import Callable
from dataclasses import dataclass

from islands import keyring, snapshot
from islands import record as records
from islands.follow import Follower, Fork
from islands.log import Log
from islands.member import EXPIRY
from islands.reader import payload_key, record_key
from islands.record import OWNER, SNAPSHOT
from islands.snapshot import Place
from islands.store import Store, run
from runtime.config import UsageError


@dataclass
class Named:
    """What the records below and from some version on have named."""

    before: set[str]
    after: set[str]


def before(store: Store, version: int, say: Callable[[str], None]) -> None:
    """Raises UsageError where no snapshot of at most this version can be begun with, or somebody needs what is before
    it."""
    log = run(Log.open(store))
    follower = run(Follower.open(store, from_oldest=True, island=OWNER, key=keyring.of_owner(log.run)))
    named: dict[int, set[str]] = {}
    places: dict[int, Place] = {}

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
            f"--before={version}: there is no snapshot of a version up to {version}, other than the oldest"
        )
    place = places[max(places)]
    _check_readers(follower.log, place.version)
    if OWNER not in follower.view.snapshots[place.version][place.manifest]:
        run(follower.log.append(follower.log.draft(SNAPSHOT, clock=0, **snapshot.record_of(place))))
    _remove(follower, place, named, say)


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


def _remove(follower: Follower, place: Place, named: dict[int, set[str]], say: Callable[[str], None]) -> None:
    store, kept = follower.log.store.store, {payload.digest for payload in place.payloads}
    kept |= {name for number, names in named.items() if number >= place.version for name in names}
    first = {payload.digest for payload in snapshot.first(follower.log.run).payloads}
    gone = {name for number, names in named.items() if number < place.version for name in names} | first
    numbers = [int(key.rpartition("/")[2]) for key in run(follower.log.store.list("records"))]
    numbers = sorted(number for number in numbers if number < place.version)
    for number in numbers:
        run(store.delete(record_key(number)))
    for name in sorted(gone - kept):
        run(store.delete(payload_key(name)))
    say(f"{len(numbers)} records and {len(gone - kept)} payloads removed; the log begins with version {place.version}")

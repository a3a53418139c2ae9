"""A log folded again: the same bits as its members had, from its oldest snapshot on. What is replayed is the fold; the
steps that islands have made between two rounds are not computed again."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from islands import record as records
from islands.ahead import Ahead
from islands.follow import Follower, Fork
from islands.reader import LIMIT, LogError, record_key
from islands.state import State
from islands.store import Store, run
from runtime.config import UsageError

TELL = 5.0  # seconds between two lines of progress


@dataclass
class Replay:
    """version, params_digest: where it has come to. began: the version that it has begun with. snapshots: {version:
    whether every record of it names what was folded here}. refused: records that do not count, and why. wrong: what
    differs first, or is damaged."""

    began: int
    version: int = -1
    params_digest: str = ""
    snapshots: dict[int, bool] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    wrong: str = ""

    @property
    def differs(self) -> bool:
        return bool(self.wrong) or not all(self.snapshots.values())

    def as_dict(self) -> dict[str, Any]:
        listed = [{"version": version, "equal": equal} for version, equal in sorted(self.snapshots.items())]
        own = {
            "version": self.version,
            "params_digest": self.params_digest,
            "began": self.began,
            "snapshots": listed,
            "refused": self.refused,
        }
        return own | ({"wrong": self.wrong} if self.wrong else {})


def of(store: Store, until: int | None, verify: bool, say: Callable[[str], None]) -> Replay:
    """until: version; None: all there is. verify: what is damaged is told in `wrong`, in place of raising LogError."""
    store = Ahead(store, payloads=True)
    try:
        follower = run(Follower.open(store, from_oldest=True))
    except LogError as error:
        if not verify:
            raise
        return Replay(-1, wrong=str(error))
    found = Replay(follower.began)
    if follower.began >= 0:
        say(f"the log is truncated: beginning with the snapshot of version {follower.began}")
    if until is not None and until < follower.began:
        raise UsageError(f"--until={until}: the log is truncated, and its oldest version is {follower.began}")
    try:
        _fold(follower, until, found, say)
        if until is None:
            run(follower.log.look_ahead())
        if verify:
            _check_refused(follower)
            _check_payloads(follower)
    except LogError as error:
        if not verify:
            raise
        found.wrong = str(error)
    if until is not None and follower.view.next <= until and not found.wrong:
        raise UsageError(f"--until={until}: the log ends at version {follower.view.version}")
    found.refused = [f"record {number}, {why}" for number, why in follower.refused.items()]
    found.version, found.params_digest = follower.view.version, params_digest(follower.state)
    for fork in (each for each in follower.wrong if isinstance(each, Fork)):
        found.snapshots[fork.version] = False
        found.wrong = found.wrong or fork.line
    return found


def _fold(follower: Follower, until: int | None, found: Replay, say: Callable[[str], None]) -> None:
    def compared(record: records.Record) -> None:
        if record.type == records.SNAPSHOT and follower.due and record.base == follower.due.version:
            found.snapshots.setdefault(record.base, True)

    follower.watch, told = compared, time.monotonic()
    while run(follower.advance(until)):
        if time.monotonic() - told > TELL:
            told = time.monotonic()
            say(f"version {follower.view.version}")


def _check_refused(follower: Follower) -> None:
    """A record that is refused may have been sound once: then the one after it names it by another digest."""
    store = follower.log.store
    for number in follower.refused:
        data, after = (run(store.get(record_key(n), LIMIT)) for n in (number, number + 1))
        with contextlib.suppress(ValueError):
            if data and after and records.load(after).get("previous") != records.digest(data):
                raise LogError(
                    f"record {number} was altered: {follower.refused[number]}, and the next one names another"
                )


def _check_payloads(follower: Follower) -> None:
    """Those that were not read: of records that do not count, and of snapshots. Raises LogError."""
    log = follower.log
    for key in run(log.store.list("payloads")):
        name = key.partition("/")[2]
        data = None if name in follower.read else run(log.store.get(key, records.LARGEST))
        if data is not None and records.digest(data) != name:
            raise LogError(f"{key} has other bytes than its name says: it was altered")


def params_digest(state: State) -> str:
    """SHA-256 of names, sizes and bits of the parameters."""
    return State({f"params/{leaf}": state.arrays[f"params/{leaf}"] for leaf in state.leaves()}).digest()


def lines(found: Replay) -> Iterator[str]:
    yield f"version {found.version}, folded from version {found.began}; parameters {found.params_digest}"
    for version, equal in sorted(found.snapshots.items()):
        yield f"  snapshot of version {version}: {'equal' if equal else 'ANOTHER ONE'}"
    if found.wrong:
        yield f"differs: {found.wrong}"
    yield from (f"refused: {line}" for line in found.refused)

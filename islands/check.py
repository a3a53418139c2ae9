"""Whether a store can hold a log: of all that create one key at once, one must succeed, and everybody must see what it
has written. Some stores say that they do this and do not, so it is tried, with small objects that are removed again."""

import contextlib
import secrets
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from threading import Barrier
from typing import Any

from islands.store import Away, Store, StoreError, run

RACERS, RACES = 6, 4
SKEW = 60.0  # seconds by which clocks may differ


@dataclass
class Finding:
    """bad: the store is refused for it."""

    what: str
    bad: bool = False


@dataclass
class Check:
    """What was tried, in this order: see `of`."""

    findings: list[Finding] = field(default_factory=list)

    def say(self, what: str, bad: bool = False) -> None:
        self.findings.append(Finding(what, bad))

    @property
    def sound(self) -> bool:
        return not any(finding.bad for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        return {"sound": self.sound, "findings": [asdict(finding) for finding in self.findings]}


def of(store: Store) -> Check:
    """Creates, creates again, races, reads back, lists, overwrites and deletes, all below payloads/, where a log keeps
    what nobody looks for by another name than its digest. Raises StoreError, or Away, where nothing can be tried."""
    check, made = Check(), f"payloads/check-{secrets.token_hex(8)}-"
    run(store.prepare())
    keys = [f"{made}{n}" for n in range(RACES + 1)]
    try:
        _once(check, store, keys[0])
        _races(check, store, keys[1:])
        _listed(check, store, made, keys)
        _clock(check, store, keys[0])
        _permissions(check, store, keys[0])
    finally:
        left = [key for key in keys if not _deleted(store, key)]
    if left:
        check.say(f"{len(left)} objects named {made}… stay there, for this identity may not delete them")
    return check


def _once(check: Check, store: Store, key: str) -> None:
    if not run(store.create(key, b"first")) or run(store.get(key, 99)) != b"first":
        raise Away(f"{key} was created, and cannot be read")
    again = _created(store, key, b"second")
    if again or run(store.get(key, 99)) != b"first":
        check.say("an object that is there is created a second time: every writer of a number would win", bad=True)
    else:
        check.say("an object that is there cannot be created again")


def _races(check: Check, store: Store, keys: list[str]) -> None:
    for key in keys:
        barrier = Barrier(RACERS)

        def race(n: int, key: str = key, barrier: Barrier = barrier) -> bool:
            barrier.wait()
            return _created(store, key, b"%d" % n)

        with ThreadPoolExecutor(RACERS) as pool:
            won = [n for n, created in enumerate(pool.map(race, range(RACERS))) if created]
        there = run(store.get(key, 99))
        if len(won) > 1:
            check.say(
                f"{len(won)} of {RACERS} writers that created one object at once were told that they had", bad=True
            )
            return
        if won and there != b"%d" % won[0]:
            check.say("what is there is not what the writer has written that was told that it had", bad=True)
            return
    check.say(f"of {RACERS} writers that create one object at once, one succeeds ({RACES} objects)")


def _listed(check: Check, store: Store, made: str, keys: list[str]) -> None:
    """A listing is a hint to a log, so a store without a true one is only slower."""
    found = [key for key in run(store.list("payloads")) if key.startswith(made)]
    missing = len([key for key in keys if run(store.get(key, 1)) is not None and key not in found])
    check.say(f"a listing lacks {missing} of {len(keys)} objects" if missing else "a listing has what was just created")


def _clock(check: Check, store: Store, key: str) -> None:
    modified = run(store.last_modified(key))
    skew = abs(time.time() - modified) if modified else 0.0
    if skew > SKEW:
        check.say(f"the store's clock and this machine's differ by {skew:,.0f} s: a bucket refuses requests for less")
    else:
        check.say("the store's clock and this machine's agree")


def _permissions(check: Check, store: Store, key: str) -> None:
    """A log is safe by its signatures, and safer where the store lets nobody overwrite what others have written."""
    with contextlib.suppress(StoreError, Away):
        run(store.put(key, b"third"))
    if run(store.get(key, 99)) == b"third":
        check.say("this identity may overwrite payloads: docs/islands.md has a policy under which it may not")
    else:
        check.say("this identity may not overwrite payloads")


def _created(store: Store, key: str, data: bytes) -> bool:
    with contextlib.suppress(Away):
        return run(store.create(key, data))
    return False


def _deleted(store: Store, key: str) -> bool:
    with contextlib.suppress(StoreError, Away):
        if run(store.get(key, 1)) is not None:
            run(store.delete(key))
        return run(store.get(key, 1)) is None
    return False


def lines(check: Check) -> Iterator[str]:
    for finding in check.findings:
        yield f"  {'REFUSED' if finding.bad else '-'} {finding.what}"
    yield "sound: a log can be kept there" if check.sound else "not sound: a log there would lose records"

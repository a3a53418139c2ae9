"""Who joins late has much to read: what will be asked for next is known, and is fetched many requests at a time."""

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

from islands.follow import Follower
from islands.reader import payload_key, record_key
from islands.record import LIMIT
from islands.store import Patient, run

WORKERS = 16  # requests under way
RECORDS = 64  # that are fetched at a time
BYTES = 1 << 28  # of payloads that wait for their fold

Wanted = Sequence[tuple[str, int]]  # (key, its most bytes) of each


def catch_up(follower: Follower) -> int:
    """Folds all that there is; how many records it were."""
    store, count = follower.log.store, 0
    while True:
        first, before = follower.view.next, count
        keys = [record_key(number) for number in range(first, first + RECORDS)]
        _fetch(store, [(key, LIMIT + 1) for key in keys])
        _fetch(store, _payloads(store.there.get(key, b"") for key in keys))
        while folded := run(follower.advance(first + RECORDS - 1)):  # it ends where a snapshot is due
            count += folded
        if count == before:
            store.there.clear()
            return count


def _fetch(store: Patient, wanted: Wanted) -> None:
    """What is not there is asked for again when it is needed."""

    def one(asked: tuple[str, int]) -> tuple[str, bytes | None]:
        return asked[0], run(store.store.get(*asked))

    store.requests += len(wanted)
    with ThreadPoolExecutor(WORKERS) as pool:
        store.there |= {key: data for key, data in pool.map(one, wanted) if data is not None}


def _payloads(records: Iterable[bytes]) -> Wanted:
    """What these records name, up to BYTES. Nothing of it is trusted: it is no more than a hint."""
    found, total = [], 0
    for data in records:
        for key, most in _named(data):
            total += most
            if total > BYTES:
                return found
            found.append((key, most))
    return found


def _named(data: bytes) -> Wanted:
    try:
        payloads = json.loads(data)["payloads"]
        return [(payload_key(str(each["digest"])), int(each["bytes"]) + 1) for each in payloads]
    except (ValueError, KeyError, TypeError):
        return []

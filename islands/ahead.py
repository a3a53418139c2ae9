"""Who joins late has much to read: what will be asked for next is known, and is fetched many requests at a time."""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from islands.follow import Follower
from islands.reader import payload_key, record_key
from islands.record import LIMIT
from islands.store import Routine, Store, run

WORKERS = 16  # requests under way
RECORDS = 64  # that are fetched at a time
BYTES = 1 << 28  # of payloads that wait for their fold


class Ahead:
    """A store in which some objects are there before they are asked for: once, since they are not kept."""

    def __init__(self, store: Store):
        self.store = store
        self._there: dict[str, bytes] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.store, name)

    def get(self, key: str, most: int) -> Routine[bytes | None]:
        if key in self._there and len(self._there[key]) <= most:
            return self._there.pop(key)
        return (yield from self.store.get(key, most))

    def fetch(self, wanted: Iterable[tuple[str, int]]) -> None:
        """(key, its most bytes) of each. What is not there is asked for again when it is needed; so are errors."""

        def one(asked: tuple[str, int]) -> tuple[str, bytes | None]:
            return asked[0], run(self.store.get(*asked))

        with ThreadPoolExecutor(WORKERS) as pool:
            for key, data in pool.map(one, wanted):
                if data is not None:
                    self._there[key] = data

    def payloads(self, records: Iterable[str]) -> list[tuple[str, int]]:
        """What these records name, up to BYTES: nothing of it is trusted but as a hint."""
        found, total = [], 0
        for key in records:
            for payload in _named(self._there.get(key, b"")):
                total += payload[1]
                if total > BYTES:
                    return found
                found.append(payload)
        return found


def _named(data: bytes) -> list[tuple[str, int]]:
    try:
        payloads = json.loads(data)["payloads"]
        return [(payload_key(str(each["digest"])), int(each["bytes"]) + 1) for each in payloads]
    except (ValueError, KeyError, TypeError):
        return []


def catch_up(follower: Follower) -> int:
    """Folds all that there is; how many records it were."""
    patient, count = follower.log.store, 0
    patient.store = ahead = Ahead(patient.store)
    try:
        while True:
            first = follower.view.next
            keys = [record_key(number) for number in range(first, first + RECORDS)]
            ahead.fetch((key, LIMIT + 1) for key in keys)
            ahead.fetch(ahead.payloads(keys))
            before = count
            while folded := run(follower.advance(first + RECORDS - 1)):  # it ends where a snapshot is due
                count += folded
            if count == before:
                return count
    finally:
        patient.store = ahead.store

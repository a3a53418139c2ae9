"""A store that reads ahead: who joins late, or looks at a long log, asks for one record after another and for what each
names; many requests at a time take a fraction of that. It counts them, too: in a bucket each costs something."""

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from islands.reader import payload_key, record_key
from islands.record import LIMIT
from islands.store import Away, Routine, Store, StoreError, call, run

WORKERS = 16  # requests under way
RECORDS = 64  # that are fetched at a time, at most
BYTES = 1 << 28  # of payloads that wait for their fold
IN_A_ROW = 8  # records, after which somebody is taken to be catching up: half as many are fetched at a time

Wanted = Sequence[tuple[str, int]]  # (key, its most bytes) of each


class Ahead:
    """Around another store. requests: that it has made. keeps: records, for who reads the log once more. payloads:
    fetches what records name, too."""

    def __init__(self, store: Store, keeps: bool = False, payloads: bool = False):
        self.store, self.requests, self.keeps, self.payloads = store, 0, keeps, payloads
        self._kept: dict[str, bytes] = {}
        self._there: dict[str, bytes] = {}
        self._next, self._in_a_row = "", 0
        self._end = 0  # the first number in this row that was not asked for yet

    def get(self, key: str, most: int) -> Routine[bytes | None]:
        """From what was fetched, once."""
        if key.startswith("records/"):
            number = int(key.rpartition("/")[2])
            self._in_a_row, self._end = (self._in_a_row + 1, self._end) if key == self._next else (0, 0)
            self._next = record_key(number + 1)
            if self._in_a_row >= IN_A_ROW and number >= self._end:
                yield call("get", key, self._fetch_from, number, min(self._in_a_row // 2, RECORDS))
        fetched = self._kept if key in self._kept else self._there
        if key in fetched and len(fetched[key]) <= most:
            data = fetched.pop(key)
        else:
            data = yield from self._counted(self.store.get, key, most)
        if self.keeps and key.startswith("records/") and data is not None and len(data) < most:  # and so all of it
            self._kept[key] = data
        return data

    def forget(self) -> None:
        """What was kept has been read again, or lies before what is."""
        self.keeps = False
        self._kept.clear()

    def _fetch_from(self, number: int, count: int) -> None:
        keys, self._end = [record_key(number + i) for i in range(count)], number + count
        self._there.clear()
        self._fetch([(key, LIMIT + 1) for key in keys if key not in self._kept])
        if self.payloads:
            self._fetch(_named(self._kept.get(key) or self._there.get(key, b"") for key in keys))

    def _fetch(self, wanted: Wanted) -> None:
        """What fails is asked for again when it is needed."""

        def one(asked: tuple[str, int]) -> tuple[str, bytes | None]:
            try:
                return asked[0], run(self.store.get(*asked))
            except (Away, StoreError):
                return asked[0], None

        self.requests += len(wanted)
        with ThreadPoolExecutor(WORKERS) as pool:
            self._there |= {key: data for key, data in pool.map(one, wanted) if data is not None}

    # ── as it is ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _counted(self, ask: Callable[..., Routine[Any]], *arguments: Any) -> Routine[Any]:
        self.requests += 1
        return (yield from ask(*arguments))

    def prepare(self) -> Routine[None]:
        return self._counted(self.store.prepare)

    def sweep(self) -> Routine[Sequence[str]]:
        return self._counted(self.store.sweep)

    def create(self, key: str, data: bytes) -> Routine[bool]:
        return self._counted(self.store.create, key, data)

    def get_range(self, key: str, first: int, count: int) -> Routine[bytes | None]:
        return self._counted(self.store.get_range, key, first, count)

    def list(self, prefix: str, after: str = "") -> Routine[list[str]]:
        return self._counted(self.store.list, prefix, after)

    def put(self, key: str, data: bytes) -> Routine[None]:
        return self._counted(self.store.put, key, data)

    def delete(self, key: str) -> Routine[None]:
        return self._counted(self.store.delete, key)

    def last_modified(self, key: str) -> Routine[float | None]:
        return self._counted(self.store.last_modified, key)


def _named(records: Iterable[bytes]) -> Wanted:
    """Payloads that these name, up to BYTES. Nothing of it is trusted: it is no more than a hint."""
    found, total = [], 0
    for data in records:
        for payload in _payloads(data):
            total += payload[1]
            if total > BYTES:
                return found
            found.append(payload)
    return found


def _payloads(data: bytes) -> Wanted:
    try:
        payloads = json.loads(data)["payloads"]
        return [(payload_key(str(each["digest"])), int(each["bytes"]) + 1) for each in payloads]
    except (ValueError, KeyError, TypeError):
        return []

"""What can go wrong between a log and its store, made to go wrong: a tool for tests, of this project and of others.

Faulty          a store around another one, in which requests and answers go astray
UnsyncedDisk    a disk for islands/folder.py, which forgets in a power cut what nobody has synced
Schedule        (islands/schedule.py) the processes, one await at a time; each may die at every one

What goes wrong, by name (`FAULTS`), is drawn by `Chance`, which counts how often each has hit each await.

In a real process SLACKLINE_DIE_AT=POINT is where it ends itself with kill -9. A point is `before` or `after` an await,
that is a verb and what it is done to, as in `after link records`: one of VERBS and one of KINDS. With a number behind
it, as in `after link records 3`, it is the third time.
"""

import os
import signal
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from random import Random
from typing import Any

from islands.store import DIE_AT, Away, Call, Routine, Store, call
from runtime.config import UsageError

VERBS = {
    "write": "folder: the bytes of a new object, under another name",
    "sync": "folder: those bytes, to the disk",
    "link": "folder: its own name, which makes it the winner",
    "remove": "folder: the other name, or an object",
    "sync names": "folder: its own name, to the disk",
    "replace": "folder: a heartbeat by the next",
    "read": "folder: an object",
    "create": "bucket: an object that is not there yet",
    "get": "bucket: an object",
    "put": "bucket: a heartbeat",
    "delete": "bucket: an object",
    "list": "names",
    "modified": "when a heartbeat was written",
}
KINDS = ("run.json", "records", "payloads", "heartbeats")
FAULTS = {
    "response lost": "the object was created; nobody hears of it",
    "error after success": "the object was created; the server answers 500, the client asks again: it exists",
    "conflict": "the answer is that it exists, and there is nothing",
    "late": "no answer; the request lands later, when its sender may be dead",
    "duplicate": "the network delivers the request a second time, later",
    "away": "nothing is done, and no answer comes",
    "slow": "the answer takes up to 20 seconds",
    "stale list": "a listing lacks some of the names",
    "crash": "the process dies before the await, or after it",
    "power cut": "every process dies, and the disk forgets what was not synced",
    "clock skew": "the clock of a process jumps by up to a minute",
}
SLOWEST = 20.0  # seconds

# ── a real process dies at a point ───────────────────────────────────────────────────────────────────────────────


_reached: Counter[str] = Counter()


def perform(asked: Call) -> Any:
    """An await of a process that is to die at one."""
    reach(f"before {asked.name}")
    answer = asked.do()
    reach(f"after {asked.name}")
    return answer


def reach(point: str) -> None:
    wanted = os.environ[DIE_AT]
    *words, last = wanted.split()
    words, count = (words, int(last)) if last.isdecimal() else ([*words, last], 1)
    when, verb, kind = words[0], " ".join(words[1:-1]), words[-1]
    if when not in ("before", "after") or verb not in VERBS or kind not in KINDS:
        raise UsageError(f"{DIE_AT}={wanted} is no point: it is like `after link records` (islands/faulty.py)")
    if point == " ".join(words):
        _reached[point] += 1
        if _reached[point] == count:
            os.kill(os.getpid(), signal.SIGKILL)


# ── chance ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Chance:
    """rates: of each fault, by name, the probability at an await where it can happen. hits: {(fault, await): times}."""

    def __init__(self, random: Random, rates: Mapping[str, float]):
        self.random, self.rates, self.hits = random, rates, Counter()

    def strikes(self, fault: str, where: str) -> bool:
        if self.random.random() >= self.rates.get(fault, 0.0):
            return False
        self.hits[fault, where] += 1
        return True


# ── stores ───────────────────────────────────────────────────────────────────────────────────────────────────────


class Faulty:
    """One process's way to a store. later: is given what the network delivers when it likes, as a routine."""

    def __init__(self, store: Store, chance: Chance, clock: Any, later: Callable[[Routine[Any]], None]):
        self.store, self._chance, self._clock, self._later = store, chance, clock, later

    def prepare(self) -> Routine[None]:
        return (yield from self.store.prepare())

    def sweep(self) -> Routine[Sequence[str]]:
        return (yield from self.store.sweep())

    def create(self, key: str, data: bytes) -> Routine[bool]:
        strikes = partial(self._strikes, "create", key)
        yield from self._answer("create", key)
        if strikes("conflict"):
            return False
        if strikes("late"):
            self._later(self.store.create(key, data))
            raise Away(f"{key}: no answer in time")
        created = yield from self.store.create(key, data)
        if strikes("duplicate"):
            self._later(self.store.create(key, data))
        if strikes("error after success"):
            return (yield from self.store.create(key, data))
        if strikes("response lost"):
            raise Away(f"{key}: the connection broke")
        return created

    def get(self, key: str, most: int) -> Routine[bytes | None]:
        yield from self._answer("get", key)
        return (yield from self.store.get(key, most))

    def get_range(self, key: str, first: int, count: int) -> Routine[bytes | None]:
        yield from self._answer("get", key)
        return (yield from self.store.get_range(key, first, count))

    def list(self, prefix: str, after: str = "") -> Routine[list[str]]:
        yield from self._answer("list", prefix)
        keys = yield from self.store.list(prefix, after)
        if self._strikes("list", prefix, "stale list"):
            keys = [key for key in keys if self._chance.random.random() < 0.5]
        return keys

    def put(self, key: str, data: bytes) -> Routine[None]:
        yield from self._answer("put", key)
        if self._strikes("put", key, "late"):
            self._later(self.store.put(key, data))
            raise Away(f"{key}: no answer in time")
        yield from self.store.put(key, data)

    def delete(self, key: str) -> Routine[None]:
        yield from self._answer("delete", key)
        yield from self.store.delete(key)

    def last_modified(self, key: str) -> Routine[float | None]:
        yield from self._answer("modified", key)
        return (yield from self.store.last_modified(key))

    def _answer(self, verb: str, key: str) -> Routine[None]:
        if self._strikes(verb, key, "slow"):
            seconds = SLOWEST * self._chance.random.random()
            yield call("wait", key, self._clock.sleep, seconds)
        if self._strikes(verb, key, "away"):
            raise Away(f"{key}: no connection")

    def _strikes(self, verb: str, key: str, fault: str) -> bool:
        return self._chance.strikes(fault, f"{verb} {key.partition('/')[0]}")


class _File:
    def __init__(self, data: bytes, modified: float):
        self.data, self.modified, self.synced = data, modified, False


class _Names:
    """Of one folder. seen: by processes; kept: on the disk; changes: what is not there yet, in their order."""

    def __init__(self):
        self.seen: dict[str, _File] = {}
        self.kept: dict[str, _File] = {}
        self.changes: list[tuple[str, _File | None]] = []

    def change(self, name: str, file: _File | None) -> None:
        self.changes.append((name, file))
        _apply(self.seen, name, file)

    def sync(self) -> None:
        for change in self.changes:
            _apply(self.kept, *change)
        self.changes.clear()


def _apply(names: dict[str, _File], name: str, file: _File | None) -> None:
    if file:
        names[name] = file
    else:
        names.pop(name, None)


class UnsyncedDisk:
    """The Disk of islands/folder.py in memory. What was not synced may be gone after `power_cut`: each name by itself,
    and of a file's bytes all but a beginning."""

    def __init__(self, now: Callable[[], float]):
        self._now = now
        self._folders: dict[str, _Names] = {}

    def power_cut(self, random: Random) -> None:
        for folder in self._folders.values():
            for change in folder.changes:
                if random.random() < 0.5:
                    _apply(folder.kept, *change)
            folder.changes.clear()
            folder.seen = dict(folder.kept)
            for file in folder.seen.values():
                if not file.synced:
                    file.data, file.synced = file.data[: int(random.random() * len(file.data))], True

    def make(self, folder: str) -> None:
        for path in (folder, folder.rpartition("/")[0]):
            self._folders.setdefault(path, _Names())

    def write(self, path: str, data: bytes) -> None:
        self._add(path, _File(data, self._now()))

    def sync(self, path: str) -> None:
        if path in self._folders:
            self._folders[path].sync()
        else:
            self._file(path).synced = True

    def link(self, source: str, target: str) -> None:
        self._add(target, self._file(source))

    def replace(self, source: str, target: str) -> None:
        folder, name = self._place(target)
        folder.change(name, self._file(source))
        self.remove(source)

    def remove(self, path: str) -> None:
        folder, name = self._place(path)
        folder.change(name, None)

    def read(self, path: str, first: int, count: int) -> bytes:
        return self._file(path).data[first : first + count]

    def names(self, folder: str) -> list[str]:
        return list(self._folders[folder].seen)

    def modified(self, path: str) -> float:
        return self._file(path).modified

    def now(self) -> float:
        return self._now()

    def _add(self, path: str, file: _File) -> None:
        folder, name = self._place(path)
        if name in folder.seen:
            raise FileExistsError(path)
        folder.change(name, file)

    def _file(self, path: str) -> _File:
        folder, name = self._place(path)
        if name not in folder.seen:
            raise FileNotFoundError(path)
        return folder.seen[name]

    def _place(self, path: str) -> tuple[_Names, str]:
        folder, _, name = path.rpartition("/")
        return self._folders[folder], name

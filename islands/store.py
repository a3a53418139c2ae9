"""What a log needs of a store. There are two: a folder (islands/folder.py) and a bucket (islands/bucket.py).

    prepare     makes what a new log needs
    sweep       removes what killed writers have left; its names
    create      the only way in which anything is decided: of all that create one key, one succeeds
    get         at most so many bytes from the beginning of an object; None if there is none
    get_range   the same from anywhere
    list        keys; a hint, which may be old
    put         overwrites: for heartbeats, which decide nothing
    delete      for truncation
    last_modified

Each is a routine: a generator that yields calls, one for every await, and is sent what they return. `run` performs them
one after another. A test performs those of several processes in any order, and may stop between two
(islands/faulty.py).

An answer is a value, or Away: it may be another one later, and of what was asked nothing is known; or StoreError: it
will not be another one until somebody does something. `create` answers True if this call has stored the object, and
will never lose it. Everything else, "it exists already" as well, it answers with False or Away, since a store, or the
client in between, may have tried twice: who wants to know reads the key.
"""

import os
import random
import re
import time
from collections.abc import Callable, Generator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from runtime.config import RunError, UsageError

DIE_AT = "SLACKLINE_DIE_AT"  # a point at which this process ends itself: islands/faulty.py lists them

SHORTEST_WAIT, LONGEST_WAIT = 0.05, 2.0  # seconds
SCHEMES = ("s3://", "gs://", "az://", "memory://")
SECRET = re.compile("KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL|SAS")  # in the names of environment variables


class Call(NamedTuple):
    """One await of a routine. name: what is done to which kind of object, as in `link records`."""

    name: str
    do: Callable[[], Any]


T = TypeVar("T")
Routine = Generator[Call, Any, T]


def call(verb: str, key: str, function: Callable[..., Any], *arguments: Any, **named: Any) -> Call:
    return Call(f"{verb} {key.partition('/')[0]}", partial(function, *arguments, **named))


class Away(RunError):
    """The store gave no answer that counts, and may give one later."""


class StoreError(UsageError):
    """The store will not do what is asked until somebody does something. The message says what."""


class Clock:
    """Of this process. It decides nothing that others see."""

    now = staticmethod(time.monotonic)
    sleep = staticmethod(time.sleep)


class Store(Protocol):
    def prepare(self) -> Routine[None]: ...
    def sweep(self) -> Routine[Sequence[str]]: ...
    def create(self, key: str, data: bytes) -> Routine[bool]: ...
    def get(self, key: str, most: int) -> Routine[bytes | None]: ...
    def get_range(self, key: str, first: int, count: int) -> Routine[bytes | None]: ...
    def list(self, prefix: str, after: str = "") -> Routine[list[str]]: ...
    def put(self, key: str, data: bytes) -> Routine[None]: ...
    def delete(self, key: str) -> Routine[None]: ...
    def last_modified(self, key: str) -> Routine[float | None]: ...


def run(routine: Routine[T]) -> T:
    """Performs what it yields, and returns what it returns."""
    perform = _mortal() if os.environ.get(DIE_AT) else _perform
    try:
        asked = next(routine)
        while True:
            try:
                answer = perform(asked)
            except Exception as error:
                asked = routine.throw(error)
            else:
                asked = routine.send(answer)
    except StopIteration as end:
        return end.value


def _perform(asked: Call) -> Any:
    return asked.do()


def _mortal() -> Callable[[Call], Any]:
    from islands import faulty

    return faulty.perform


def open_store(url: str, **client: Any) -> Store:
    """Of a folder, or of s3://BUCKET/PATH, gs://BUCKET/PATH, az://CONTAINER/PATH. Nothing is asked of it yet.

    client: further client_options of obstore, as root_certificate. Credentials are the environment's or the platform's.
    """
    if url.startswith(SCHEMES):
        from islands.bucket import Bucket

        return Bucket(url, **client)
    if "://" in url:
        raise UsageError(f"{redacted(url)} is no folder, and begins with none of {', '.join(SCHEMES[:3])}")
    from islands.folder import Folder

    return Folder(Path(url))


def redacted(text: str) -> str:
    """In one line of at most 300 characters, without user and query of a URL, and without what the environment holds
    that is secret."""
    for name, value in os.environ.items():
        if SECRET.search(name) and len(value) >= 6:
            text = text.replace(value, "…")
    text = re.sub(r"(\w+://)[^/\s]*@", r"\1", text)
    text = re.sub(r"(\w+://[^\s?]*)\?\S*", r"\1", text)
    return " ".join(text.split())[:300]


# ── a store that is asked again ──────────────────────────────────────────────────────────────────────────────────


class Patient:
    """A store that is asked again, at growing intervals, while it gives no answer: for `patience` seconds, then Away.

    seed: of the intervals, so that not all ask at once.
    """

    def __init__(self, store: Store, clock: Any, patience: float, seed: str):
        self.store, self.clock, self._patience, self._random = store, clock, patience, random.Random(seed)

    def get(self, key: str, most: int) -> Routine[bytes | None]:
        return (yield from self._ask(partial(self.store.get, key, most)))

    def get_range(self, key: str, first: int, count: int) -> Routine[bytes | None]:
        return (yield from self._ask(partial(self.store.get_range, key, first, count)))

    def list(self, prefix: str, after: str = "") -> Routine[list[str]]:
        return (yield from self._ask(partial(self.store.list, prefix, after)))

    def last_modified(self, key: str) -> Routine[float | None]:
        return (yield from self._ask(partial(self.store.last_modified, key)))

    def put(self, key: str, data: bytes) -> Routine[None]:
        yield from self.store.put(key, data)  # once: another heartbeat comes anyway

    def create(self, key: str, data: bytes, most: int) -> Routine[bytes]:
        """What is there in the end: `data`, or at most so many bytes of what was created before. Only success is
        believed. After any other answer the key is read, and as long as nothing is there, the same key is tried again.
        """
        wait = _Wait(self.clock, self._patience, self._random)
        while True:
            error = Away(f"{key} is not there, and cannot be created")
            try:
                if (yield from self.store.create(key, data)):
                    return data
            except Away as said:
                error = said
            there = yield from self.get(key, most)
            if there is not None:
                return there
            yield from wait.after(error)

    def _ask(self, ask: Callable[[], Routine[T]]) -> Routine[T]:
        wait = _Wait(self.clock, self._patience, self._random)
        while True:
            try:
                return (yield from ask())
            except Away as said:
                error = said
            yield from wait.after(error)


class _Wait:
    def __init__(self, clock: Any, patience: float, random: random.Random):
        self._clock, self._patience, self._random = clock, patience, random
        self._seconds, self._until = SHORTEST_WAIT, 0.0

    def after(self, error: Away) -> Routine[None]:
        now = yield Call("now", self._clock.now)
        if self._seconds == SHORTEST_WAIT:
            self._until = now + self._patience
        elif now >= self._until:
            raise error
        yield Call("sleep", partial(self._clock.sleep, self._seconds * self._random.uniform(0.5, 1.0)))
        self._seconds = min(2 * self._seconds, LONGEST_WAIT)

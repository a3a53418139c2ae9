"""Who is there: whether a process takes part already by a name, since two would push for each other; and which islands
have been silent for so long that they are taken to be gone."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from typing import Any

from islands.log import BEAT, Dropped, Log
from islands.reader import Reader
from islands.store import run
from runtime.config import UsageError

EXPIRY = 60.0  # seconds without a heartbeat, by the store's clock, after which an island is taken to be gone
LOOK = 15.0  # seconds between two looks at the others' heartbeats


class Lookout:
    """Of an island, for the others: an expiry is proposed by the store's times alone.

    At every look it asks after one island, another one each time, of those that have written no record since the look
    before: so in a crowd each is asked after as often as among few, and what a look costs does not grow with them."""

    def __init__(self, log: Log, say: Callable[[str], None]):
        self.log, self._say, self._next, self._looks = log, say, 0.0, 0
        self._last: dict[str, int] = {}  # of each live island the number of its last record, at the look before
        self._asked: dict[str, int] = {}  # the look at which it was asked after

    def look(self) -> None:
        log = self.log
        if time.monotonic() < self._next:
            return
        self._next, before = time.monotonic() + LOOK, self._last
        self._last = {name: island.last for name, island in log.view.live().items()}
        silent = [name for name, last in self._last.items() if before.get(name) == last and name != log.island]
        if silent:
            around = sorted(silent, key=lambda name: (name < log.island, name))  # not all begin with the same one
            name = min(around, key=lambda name: self._asked.get(name, 0))
            self._looks += 1
            self._asked[name] = self._looks
            self._ask_after(name)

    def _ask_after(self, name: str) -> None:
        log = self.log
        own, theirs = (run(log.store.last_modified(f"heartbeats/{each}")) for each in (log.island, name))
        if own is not None and theirs is not None and own - theirs > EXPIRY:
            proof = {"own": own.hex(), "theirs": theirs.hex()}
            with contextlib.suppress(Dropped):
                run(log.expire(name, proof))
                self._say(f"{name} has been silent for {own - theirs:.0f} s, and is taken to be gone")


def process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


def check_alone(log: Reader, name: str, say: Callable[[str], None]) -> None:
    """Raises UsageError where another process takes part by this name: it goes on beating."""
    island, key = log.view.islands.get(name), f"heartbeats/{name}"
    before = run(log.store.last_modified(key))
    if island is None or not island.live or before is None or _has_died(run(log.store.get(key, 1 << 16)) or b""):
        return
    say(f"{name} has not left the run: waiting to see whether another process takes part by this name")
    until = time.monotonic() + 2 * BEAT + 1
    while time.monotonic() < until:
        time.sleep(0.5)
        if run(log.store.last_modified(key)) != before:
            raise UsageError(
                f"island.name={name}: another process takes part by this name: give this one another name, or "
                "end that one first"
            )


def _has_died(beat: bytes) -> bool:
    """Whether who has written it was a process of this machine that is not there any more."""
    try:
        said = json.loads(beat)
        if said["host"] != socket.gethostname():
            return False
        os.kill(int(said["pid"]), 0)
    except ProcessLookupError:
        return True
    except (ValueError, KeyError, TypeError, OSError, OverflowError):
        return False
    return False

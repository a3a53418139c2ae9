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
    """Of an island, for the others: an expiry is proposed by the store's times alone."""

    def __init__(self, log: Log, say: Callable[[str], None]):
        self.log, self._say, self._next = log, say, 0.0

    def look(self) -> None:
        log = self.log
        others = [name for name in log.view.live() if name != log.island]
        if time.monotonic() < self._next or not others:
            return
        self._next = time.monotonic() + LOOK
        beats = run(log.heartbeats())
        own = beats.get(log.island, 0.0)
        for name in others:
            if own - beats.get(name, own) > EXPIRY:
                proof = {"own": own.hex(), "theirs": beats[name].hex()}
                with contextlib.suppress(Dropped):
                    run(log.expire(name, proof))
                    self._say(f"{name} has been silent for {own - beats[name]:.0f} s, and is taken to be gone")


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

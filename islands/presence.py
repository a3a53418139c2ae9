"""Whether a process takes part already by a name: two of one name would push for each other."""

import json
import os
import socket
import time
from collections.abc import Callable
from typing import Any

from islands.log import BEAT
from islands.reader import Reader
from islands.store import run
from runtime.config import UsageError


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

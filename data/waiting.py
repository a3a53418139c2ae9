"""Long work that can be interrupted, and that says what it is doing."""

import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")
SILENCE_SECONDS = 3.0


def interruptible(call: Callable[[], T]) -> T:
    """call(), in a thread of its own. Python handles signals (Ctrl-C) in its main thread, between two steps of its own:
    inside one long call of a library it would not, while it waits for a thread it does."""
    outcome: list[Any] = []

    def work() -> None:
        try:
            outcome.append((True, call()))
        except BaseException as error:  # the caller's to handle
            outcome.append((False, error))

    thread = threading.Thread(target=work, name="slackline-tokens", daemon=True)
    thread.start()
    thread.join()
    ok, value = outcome[0]
    if ok:
        return value
    raise value


class Progress:
    """Says how far a long pass over the data is, every few seconds; nothing for a short one."""

    def __init__(self, say: Callable[[str], None], doing: str):
        self._say, self._doing, self._bytes, self._next = say, doing, 0, time.monotonic() + SILENCE_SECONDS

    def add(self, num_bytes: int) -> None:
        self._bytes += num_bytes
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + 5 * SILENCE_SECONDS
            self._say(f"{self._doing}: {self._bytes / 1e6:,.0f} MB so far")

"""A run that goes on while it is served: each new checkpoint is taken, between two answers."""

import threading
from collections.abc import Callable
from typing import Any

from runtime import steps
from runtime.config import RunError, UsageError
from serving.engine import Engine
from serving.loaded import Model, Say

Found = tuple[Any, str, int]  # weights for decoding, the digest of their checkpoint, its step


class Follower:
    """Looks for a new step every so many seconds. It may find it damaged, or deleted by the run: then what is served
    stays, until the next one."""

    def __init__(self, model: Model, engine: Engine, say: Say, seconds: float = 2.0):
        self._model, self._engine, self._say, self._seconds = model, engine, say, seconds
        self._seen = engine.step
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="follow", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Waits for a load that is under way."""
        self._closed.set()
        self._thread.join()

    def _loop(self) -> None:
        while not self._closed.wait(self._seconds):
            self.look()

    def look(self) -> None:
        newest = max(steps.committed(self._model.workdir / "checkpoints"), default=self._seen)
        if newest == self._seen:
            return
        self._seen = newest
        # On one device answers go on while it is read. On several, programs that are started by two threads could meet
        # in another order on each, and wait for one another for ever: then the engine's own thread reads it.
        self._engine.swap(self._load if self._model.mesh.size > 1 else _given(self._load()))

    def _load(self) -> Found | None:
        try:
            found = self._model.load(self._say)
        except (RunError, UsageError, OSError) as error:
            self._say(f"a new checkpoint cannot be taken: {error}")
            return None
        if found[2] == self._engine.step:  # the newer one is damaged, which has been said
            return None
        self._say(f"step {found[2]} answers from now on")
        return found


def _given(found: Found | None) -> Callable[[], Found | None]:
    return lambda: found

"""SIGTERM means: save, then leave. All processes must leave at the same step.

Before there is anything to save it means: leave at once, whatever this process is waiting for. Python runs a signal's
handler only between two steps of its main thread, which may be in a compilation or a collective; so a thread listens.
"""

import json
import os
import signal
import socket
import threading
import time

from runtime import agree

EXIT_CODE = 75  # EX_TEMPFAIL: interrupted, saved, start me again
STOP_WITHIN = 60.0  # seconds
STOP, STEP = "slackline/stop/", "slackline/step/"


class PreemptionNotice:
    """Make it in the main thread, when the processes have met."""

    def __init__(self):
        self._noticed = threading.Event()
        self._lock = threading.Lock()  # held while the processes find out at which step they stop
        self._step: int | None = None  # the last one that this process has asked about; None before training
        self._stop_at: int | None = None
        self._client, self._me, self._count = agree.peers()
        if watch := agree.watch():
            watch.look = self._look
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self._writer = writer
        threading.Thread(target=self._listen, args=(reader,), name="SIGTERM", daemon=True).start()

    def close(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        self._writer.close()  # which ends the thread, too

    def _listen(self, reader: socket.socket) -> None:
        with reader:
            while signal.SIGTERM not in (signals := reader.recv(64)):
                if not signals:
                    return
        if agree.failing.is_set():
            return
        if self._step is None:
            text = "stopped by SIGTERM before the first step; the same command begins again"
            print(text, flush=True)
            agree.tell(EXIT_CODE, text)
            os._exit(EXIT_CODE)
        self._noticed.set()

    def training_begins(self, step: int) -> None:
        """From here on there is something to save: SIGTERM waits for the end of a step."""
        self._step = step

    def requested(self, step: int) -> bool:
        """Whether to stop after this step; the same answer in every process. Call it at every step."""
        if self._client is None:
            return self._noticed.is_set()
        with self._lock:
            self._step = step
            return self._stop_at is not None and step >= self._stop_at

    def _look(self) -> None:
        """Run by the watch of every process. Where one was asked to stop, each says how far it is, and none goes on
        until all have; they stop after the first step that none of them has made yet."""
        if self._stop_at is not None:
            return
        if self._noticed.is_set():
            self._client.key_value_set(f"{STOP}{self._me}", "", True)
        if not self._client.key_value_dir_get(STOP):
            return
        with self._lock:
            self._client.key_value_set(f"{STEP}{self._me}", json.dumps(self._step or 0), True)
            deadline = time.monotonic() + STOP_WITHIN
            while len(steps := self._client.key_value_dir_get(STEP)) < self._count:
                if time.monotonic() > deadline:
                    missing = set(range(self._count)) - {int(key.removeprefix(STEP)) for key, _ in steps}
                    raise RuntimeError(f"asked to stop, and {agree.processes(missing)} did not say how far it is")
                time.sleep(0.05)
            self._stop_at = 1 + max(int(text) for _, text in steps)


_notice: PreemptionNotice | None = None


def notice() -> PreemptionNotice:
    """Listens from now on, until `done`."""
    global _notice
    done()
    _notice = PreemptionNotice()
    return _notice


def done() -> None:
    """SIGTERM ends this process again."""
    global _notice
    if _notice:
        _notice.close()
        _notice = None

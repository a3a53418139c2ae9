"""What happens to the other processes while this one works: one thread that listens, and ends this process where
another has failed. A process that waits in a collective for one that has gone would wait for ever.

Words go through JAX's coordination service (`agree.peers`); that a process was killed is told at once by the connection
over which it came (runtime/rendezvous.py), or, where JAX found the processes, after JAX's own heartbeat.
"""

import contextlib
import json
import os
import select
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from runtime.rendezvous import Connections

LOOK_EVERY = 0.25  # seconds
GRACE = 1.5  # seconds for this process to end by itself, with its own message
FAILED, ENDED = "slackline/failed/", "slackline/ended/"
KILLED = "it ended without a word: it was killed, or its machine or the network is gone"
EX_TEMPFAIL = 75


class Watch:
    """client, me, count: as in agree.Peers. On another's failure says so, and ends this process with exit code 1 (75
    where that other was stopped by SIGTERM)."""

    def __init__(self, client: Any, me: int, count: int, connections: Connections):
        self._client, self._me, self._count, self._connections = client, me, count, connections
        self._leaving = threading.Event()  # connections may close now
        self._ending = threading.Event()  # nothing is to be done any more: this process is done, or has failed itself
        self._going = threading.Event()  # on another's account
        self._gone: set[int] = set()
        self.look: Callable[[], None] = lambda: None  # what else is to be looked at (runtime/preemption.py)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def leave(self) -> None:
        """Before the last meeting of all processes, after which each may go."""
        self._leaving.set()

    def close(self) -> None:
        self._ending.set()
        self._thread.join(timeout=5)
        for connection in self._connections.values():
            connection.close()

    def hear(self) -> None:
        """Where a connection broke: time for word of the process at its other end, which then ends this one."""
        if self._going.wait(2 * GRACE):
            threading.Event().wait()

    def tell(self, code: int, text: str) -> None:
        """This process fails: tells the others, and lets them end before the coordinator goes with process 0."""
        self._ending.set()
        with contextlib.suppress(Exception):  # whatever the client raises: it is too late to do anything about it
            self._client.key_value_set(f"{FAILED}{self._me}", json.dumps([code, text[:2000]]), True)
            self._client.key_value_set(f"{ENDED}{self._me}", "", True)
            until = time.monotonic() + GRACE + 2
            while self._me == 0 and time.monotonic() < until:
                time.sleep(0.05)
                ended = {int(key.removeprefix(ENDED)) for key, _ in self._client.key_value_dir_get(ENDED)}
                if len(ended | self._gone) == self._count:
                    time.sleep(0.1)  # from its last word to its end
                    return

    def _run(self) -> None:
        by_socket = {connection: process for process, connection in self._connections.items()}
        while not self._ending.is_set():
            gone = None
            for connection in select.select(list(by_socket), [], [], LOOK_EVERY)[0] if by_socket else ():
                gone = by_socket.pop(connection)  # nobody writes there, so that is the other's end
                self._gone.add(gone)
            if not by_socket:
                self._ending.wait(LOOK_EVERY)
            gone = None if self._leaving.is_set() else gone
            if gone == 0:  # the coordination service went with it
                self._end(0, 1, KILLED)
            try:
                failed = dict(self._client.key_value_dir_get(FAILED))
                self.look()
            except Exception as error:  # the client raises many types
                if not self._ending.wait(GRACE):
                    self._go(1, f"error: {str(error).splitlines()[0][:300]}")
                return
            failed.pop(f"{FAILED}{self._me}", None)
            if failed:
                key, text = min(failed.items())
                self._end(int(key.removeprefix(FAILED)), *json.loads(text))
            elif gone:
                self._end(gone, 1, KILLED)

    def _end(self, process: int, code: int, text: str) -> None:
        if self._ending.wait(GRACE if process or text != KILLED else 0):  # it has a message of its own
            return
        code = code if code == EX_TEMPFAIL else 1
        self._go(code, f"error: process {process} failed, so this one ends, too: {text}", process > 0)

    def _go(self, code: int, text: str, tell: bool = True) -> None:
        self._going.set()
        print(text, file=sys.stderr, flush=True)
        if tell:
            self.tell(code, text.removeprefix("error: "))
        sys.stdout.flush()
        os._exit(code)

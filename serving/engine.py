"""Continuous batching: requests come and go while tokens are made, one for every slot in each turn. A thread of its own
has the devices; tokens are read one turn late, so that these never wait for the host.

An answer's bits depend on its request, the checkpoint, the mesh and the machine, and not on what else runs.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from serving.lane import Lane, Running, fetched, read
from serving.programs import Programs, bucket
from serving.requests import End, Full, Request, Token

PROMPT_TURN = 512  # positions of new prompts that a turn reads at most: those who wait for their next token wait for it
Receive = Callable[[Token | End], None]


class Ticket:
    """A request that was taken. fingerprint: of the checkpoint that answers it, from the first token on."""

    def __init__(self, request: Request, receive: Receive, wake: Callable[[], None]):
        self.request, self.fingerprint = request, ""
        self._receive, self._wake, self.is_cancelled = receive, wake, False

    def cancel(self) -> None:
        self.is_cancelled = True
        self._wake()

    def tell(self, what: Token | End) -> None:
        """A receiver that fails is one that has gone."""
        try:
            self._receive(what)
        except Exception:
            self.is_cancelled = True


class Engine:
    """programs: compiled, by `Programs.compile`. weights: as `weights.unstack` makes them; fingerprint and step: of
    their checkpoint. most_waiting: beyond that many, `submit` raises Full."""

    def __init__(self, programs: Programs, weights: Any, fingerprint: str, step: int, most_waiting: int = 256):
        self.programs, self.fingerprint, self.step = programs, fingerprint, step
        self.context, self.slots = programs.lengths[-1], programs.rungs[-1]
        self.vocab_size, self.most_waiting = weights["embed"].shape[0], most_waiting
        self.error: BaseException | None = None
        self._weights, self._next = weights, None
        self._lanes = {length: Lane(programs, length) for length in programs.lengths}
        self._waiting: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._is_open, self._takes = False, True
        self._thread = threading.Thread(target=self._loop, name="engine", daemon=True)

    # ── from any thread ──────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def ready(self) -> bool:
        return self._is_open and self._takes and self.error is None

    @property
    def running(self) -> int:
        return sum(lane.running for lane in self._lanes.values())

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def start(self) -> None:
        self._is_open = True
        self._thread.start()

    def submit(self, request: Request, receive: Receive) -> Ticket:
        """receive is called in the engine's thread, with every token, and an End at last. Raises Full; ValueError for a
        request that cannot be answered."""
        request.check(self.context, self.vocab_size)
        ticket = Ticket(request, receive, self._wake)
        with self._changed:
            if not self.ready or len(self._waiting) >= self.most_waiting:
                raise Full(f"{len(self._waiting)} requests wait already" if self.ready else "no requests are taken")
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def answer(self, request: Request) -> tuple[list[Token], End]:
        """Submitted, and waited for."""
        found: list[Any] = []
        done = threading.Event()

        def receive(what: Token | End) -> None:
            found.append(what)
            if isinstance(what, End):
                done.set()

        self.submit(request, receive)
        done.wait()
        return found[:-1], found[-1]

    def swap(self, load: Callable[[], tuple[Any, str, int] | None]) -> None:
        """Answers that begin from now on are of what this gives: weights, their fingerprint, their step; None: of the
        same as before. Those under way end first; it is called in the engine's thread."""
        with self._changed:
            self._next = load
            self._changed.notify()

    def drain(self, seconds: float) -> None:
        """Takes no more requests, and waits so long for those that it has."""
        self._takes, end = False, time.monotonic() + seconds
        while (self.running or self.waiting) and self._thread.is_alive() and time.monotonic() < end:
            time.sleep(0.01)

    def close(self) -> None:
        """What still runs ends as cancelled."""
        with self._changed:
            self._is_open = False
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    # ── the engine's thread ──────────────────────────────────────────────────────────────────────────────────────────

    def _loop(self) -> None:
        under_way: list[Any] = []
        try:
            while self._wait(bool(under_way)):
                self._clear_cancelled()
                self._take_weights()
                self._admit()
                begun = [lane.step(self._weights) for lane in self._lanes.values() if lane.running]
                for answer, slots in under_way:
                    self._hand_out(fetched(answer, slots))
                under_way = begun
        except BaseException as error:
            self.error = error
            raise
        finally:
            self._end_all("failed" if self.error else "cancelled")

    def _wait(self, is_busy: bool) -> bool:
        with self._changed:
            while self._is_open and not (is_busy or self.running or self._waiting or self._next):
                self._changed.wait()
            return self._is_open

    def _clear_cancelled(self) -> None:
        with self._changed:
            gone = [ticket for ticket in self._waiting if ticket.is_cancelled]
            for ticket in gone:
                self._waiting.remove(ticket)
        for ticket in gone:
            ticket.tell(End("cancelled"))
        for lane in self._lanes.values():
            for running in lane.slots:
                if running and running.ticket.is_cancelled:
                    self._end(running, "cancelled")

    def _take_weights(self) -> None:
        if self.running:
            return
        with self._changed:
            load, self._next = self._next, None
        if load:
            self._weights, self.fingerprint, self.step = load() or (self._weights, self.fingerprint, self.step)

    def _admit(self) -> None:
        """In the order in which they came, where a slot of their length is free."""
        left = PROMPT_TURN
        for lane in self._lanes.values():
            lane.fit()
        while left > 0 and not self._next and (ticket := self._first_with_room()):
            request, lane = ticket.request, self._lane_of(ticket.request)
            ticket.fingerprint = self.fingerprint
            kept, size, echoed = read(self.programs, self._weights, request, lane.length)
            left -= max(size, bucket(1, lane.length))
            for token in echoed:
                ticket.tell(token)
            if request.max_tokens:
                lane.fit(1)
                lane.admit(Running(request, ticket, request.max_tokens), kept, size)
            else:
                ticket.tell(End("length"))

    def _first_with_room(self) -> Ticket | None:
        with self._changed:
            for ticket in self._waiting:
                if self._lane_of(ticket.request).has_room:
                    self._waiting.remove(ticket)
                    return ticket
        return None

    def _lane_of(self, request: Request) -> Lane:
        """Of the request alone: the shortest that holds it."""
        need = len(request.prompt) + request.max_tokens
        return next(lane for length, lane in self._lanes.items() if length >= need)

    def _hand_out(self, found: list[tuple[Running, Token]]) -> None:
        for running, token in found:
            if running.ended:  # in the turn before, when this one had begun
                continue
            if token.id in running.request.stop_ids:
                self._end(running, "stop")
                continue
            running.ticket.tell(token)
            running.left -= 1
            if not running.left:
                self._end(running, "length")

    def _end(self, running: Running, reason: str) -> None:
        running.ended = True
        for lane in self._lanes.values():
            lane.free(running)
        running.ticket.tell(End(reason))

    def _end_all(self, reason: str) -> None:
        with self._changed:
            self._takes, waiting = False, list(self._waiting)
            self._waiting.clear()
        for ticket in waiting:
            ticket.tell(End(reason))
        for lane in self._lanes.values():
            for running in lane.slots:
                if running:
                    self._end(running, reason)

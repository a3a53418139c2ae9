"""Processes without threads and without time: routines that take turns at every await, in an order that a random number
generator draws. The same seed is the same run.

An await takes no time but what it sleeps. A process may die at each, before what it asked for is done or after it, and
all may when the power is cut (islands/faulty.py).
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from islands.faulty import Chance, UnsyncedDisk
from islands.store import Routine, call

LATEST, FARTHEST = 60.0, 60.0  # seconds: until a late request lands, and that a clock jumps


class Process:
    """died: is called when it has been killed. ended: is given what its routine returns. A process that is the network
    does not crash."""

    def __init__(
        self, routine: Routine[Any], wake: float, ended: Callable[[Any], None], died: Callable[[], None] | None
    ):
        self.routine, self.wake, self.ended, self.died = routine, wake, ended, died
        self.asked = next(routine)


class Schedule:
    """Processes that take turns at every await. disk: of all, where there is one: its power may be cut."""

    def __init__(self, chance: Chance, disk: UnsyncedDisk | None = None):
        self._chance, self._random, self._disk = chance, chance.random, disk
        self.processes: list[Process] = []
        self.seconds = 0.0
        self._running: Process | None = None

    def now(self) -> float:
        return self.seconds

    def start(
        self,
        routine: Routine[Any],
        ended: Callable[[Any], None] = lambda _: None,
        died: Callable[[], None] | None = None,
        after: float = 0.0,
    ) -> None:
        self.processes.append(Process(routine, self.seconds + after, ended, died))

    def later(self, routine: Routine[Any]) -> None:
        """Of the network: a request that lands some time, and mostly soon."""
        self.start(routine, after=LATEST * self._random.random() ** 4)

    def clock(self) -> "SkewedClock":
        return SkewedClock(self, self._chance)

    def sleep(self, seconds: float) -> None:
        assert self._running
        self._running.wake = self.seconds + seconds

    def step(self) -> None:
        """One await of one process. What a routine raises is raised here."""
        awake = [process for process in self.processes if process.wake <= self.seconds]
        if not awake:
            self.seconds = min(process.wake for process in self.processes)
            awake = [process for process in self.processes if process.wake <= self.seconds]
        self._running = process = awake[int(self._random.random() * len(awake))]
        self.seconds += 0.01
        name = process.asked.name
        if self._disk and self._chance.strikes("power cut", name):
            self._kill(list(self.processes))
            self._disk.power_cut(self._random)
        elif process.died and self._chance.strikes("crash", name):
            if self._random.random() < 0.5:
                with contextlib.suppress(Exception):
                    process.asked.do()
            self._kill([process])
        else:
            self._go_on(process)

    def _go_on(self, process: Process) -> None:
        try:
            try:
                answer = process.asked.do()
            except Exception as error:
                process.asked = process.routine.throw(error)
            else:
                process.asked = process.routine.send(answer)
        except StopIteration as end:
            self.processes.remove(process)
            process.ended(end.value)

    def _kill(self, processes: list[Process]) -> None:
        self.processes = [process for process in self.processes if process not in processes]
        for process in processes:
            if process.died:
                process.died()


class SkewedClock:
    """Of one process: it jumps."""

    def __init__(self, schedule: Schedule, chance: Chance):
        self._schedule, self._chance, self._skew = schedule, chance, 0.0
        self.sleep = schedule.sleep

    def now(self) -> float:
        if self._chance.strikes("clock skew", "now"):
            self._skew = FARTHEST * (2 * self._chance.random.random() - 1)
        return self._schedule.seconds + self._skew


class Memory:
    """A store without faults: every request is answered at once, and all see the same."""

    def __init__(self, now: Callable[[], float]):
        self.objects: dict[str, tuple[bytes, float]] = {}
        self._now = now

    def prepare(self) -> Routine[None]:
        yield from ()

    def sweep(self) -> Routine[Sequence[str]]:
        yield from ()
        return []

    def create(self, key: str, data: bytes) -> Routine[bool]:
        return (yield call("create", key, self._create, key, data))

    def get(self, key: str, most: int) -> Routine[bytes | None]:
        return (yield call("get", key, self._get, key, 0, most))

    def get_range(self, key: str, first: int, count: int) -> Routine[bytes | None]:
        return (yield call("get", key, self._get, key, first, count))

    def list(self, prefix: str, after: str = "") -> Routine[list[str]]:
        return (yield call("list", prefix, self._names, prefix, after))

    def put(self, key: str, data: bytes) -> Routine[None]:
        yield call("put", key, self._put, key, data)

    def delete(self, key: str) -> Routine[None]:
        yield call("delete", key, self.objects.pop, key, None)

    def last_modified(self, key: str) -> Routine[float | None]:
        return (yield call("modified", key, self.objects.get, key, (b"", None)))[1]

    def _create(self, key: str, data: bytes) -> bool:
        if key in self.objects:
            return False
        self._put(key, data)
        return True

    def _get(self, key: str, first: int, count: int) -> bytes | None:
        return self.objects[key][0][first : first + count] if key in self.objects else None

    def _names(self, prefix: str, after: str) -> Sequence[str]:
        return sorted(key for key in self.objects if key.startswith(f"{prefix}/") and key > after)

    def _put(self, key: str, data: bytes) -> None:
        self.objects[key] = data, self._now()

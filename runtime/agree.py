"""Where processes agree: facts that they compare, decisions that process 0 takes for all, and every wait.

A process that trains beside others must not look for itself: two views of one directory are two runs. Every wait has a
name and a time-out, says who is missing, and ends early where a process has failed.
"""

import contextlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from runtime.config import RunError, UsageError

LONGEST_WAIT = 1800.0  # seconds; compilations and the reading of data may differ by minutes
SAY_EVERY = 30.0  # seconds

FAILURES = (UsageError, RunError, OSError)  # what is said without a traceback

_rounds = itertools.count()


class Peers(NamedTuple):
    """client: of JAX's coordination service, None where this process is alone."""

    client: Any
    me: int
    count: int


def peers() -> Peers:
    """JAX has no public way to wait with a time-out, or to pass a few words between processes before any program is
    compiled. Its coordination client has both; this function is the only one that takes it."""
    from jax._src import distributed

    state = distributed.global_state
    if state.client is None or (state.num_processes or 1) == 1:
        return Peers(None, 0, 1)
    return Peers(state.client, state.process_id, state.num_processes)


def leader() -> bool:
    return peers().me == 0


def everyone(name: str, value: Any = None, seconds: float = LONGEST_WAIT) -> list[Any]:
    """Every process's `value` (what JSON can hold), in their order. Returns when the last one has come here, so it is
    a barrier, too. All processes call it in the same order, from their main threads.

    Raises RunError after `seconds`, or where another process has come to another place, naming the processes.
    """
    client, me, count = peers()
    if client is None:
        return [value]
    number, started, said = next(_rounds), time.monotonic(), time.monotonic()
    folder = f"slackline/round/{number}/"
    client.key_value_set(f"{folder}{me}", json.dumps([name, value]))
    if number >= 2:  # every process has read it: all have come to the round after it
        client.key_value_delete(f"slackline/round/{number - 2}/{me}")
    pause = 0.001
    while True:
        found = {int(key.rpartition("/")[2]): json.loads(text) for key, text in client.key_value_dir_get(folder)}
        if len(found) == count:
            break
        missing = _processes(set(range(count)) - found.keys())
        waited = time.monotonic() - started
        if waited > seconds:
            raise RunError(f"{missing} did not come to “{name}” within {seconds:g} s, so this process ends")
        if time.monotonic() - said > SAY_EVERY:
            said = time.monotonic()
            print(f"waiting for {missing} at “{name}” for {waited:.0f} s", file=sys.stderr, flush=True)
        time.sleep(pause)
        pause = min(2 * pause, 0.2)
    elsewhere = {i for i, (theirs, _) in found.items() if theirs != name}
    if elsewhere:
        theirs = found[min(elsewhere)][0]
        raise RunError(f"{_processes(elsewhere)} came to “{theirs}” where process {me} came to “{name}”")
    return [found[i][1] for i in range(count)]


def decided(name: str, decide: Callable[[], Any]) -> Any:
    """What process 0 decides, in every process; decide() runs there alone. Where it raises, all raise."""
    value, error = None, None
    try:
        value = decide() if leader() else None
    except FAILURES as raised:
        error = raised
    return _all_or_none(name, value, error)[0]


@contextlib.contextmanager
def together(name: str) -> Iterator[None]:
    """What fails inside in one process fails in all, with the same message."""
    error = None
    try:
        yield
    except FAILURES as raised:
        error = raised
    _all_or_none(name, None, error)


def _all_or_none(name: str, value: Any, error: Exception | None) -> list[Any]:
    kind = "usage" if isinstance(error, UsageError) else "run" if error else ""
    found = everyone(name, [kind, str(error) if error else value])
    if error:
        raise error
    for i, (kind, text) in enumerate(found):
        if kind:
            raise (UsageError if kind == "usage" else RunError)(text if i == 0 else f"process {i}: {text}")
    return [value for _, value in found]


def _processes(which: set[int]) -> str:
    names = ", ".join(map(str, sorted(which)[:20])) + (", …" if len(which) > 20 else "")
    return f"process {names}" if len(which) == 1 else f"processes {names}"

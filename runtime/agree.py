"""Where processes agree: facts that they compare, decisions that process 0 takes for all, and every wait.

A process that trains beside others must not look for itself: two views of one directory are two runs. Every wait has a
name and a time-out, says who is missing, and ends early where a process has failed (runtime/watch.py).
"""

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from runtime.config import RunError, UsageError, flatten
from runtime.rendezvous import SAY_AFTER, found_by_jax, meet, parse_address, processes
from runtime.watch import Watch

LONGEST_WAIT = 1800.0  # seconds; compilations and the reading of data may differ by minutes
SAY_EVERY = 30.0  # seconds
FAILURES = (UsageError, RunError, OSError)  # what is said without a traceback
NOT_ENCRYPTED = "the processes' collectives are not encrypted: keep them on a private network"

_rounds = itertools.count()
_watch: Watch | None = None
failing = threading.Event()  # this process ends already, with its own message and exit code


# ── coming and going ─────────────────────────────────────────────────────────────────────────────────────────────


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


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def start_distributed(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    heartbeat_seconds: int = 30,
    wait_seconds: float = 60.0,
) -> str | None:
    """Joins the other processes, if there are any. Returns a warning to print, or None.

    With explicit flags the coordinator listens on its own address only; JAX's default is every interface, where a
    stray connection can end the job. Raises ValueError, UsageError, or RunError after `wait_seconds`.
    """
    global _watch
    # Where one process has failed, the others' exit waits for it: not JAX's 300 s.
    options: dict = {"heartbeat_timeout_seconds": heartbeat_seconds, "shutdown_timeout_seconds": 2 * heartbeat_seconds}
    jax.config.update("jax_enable_preemption_service", False)  # it swallows SIGTERM; runtime/preemption.py does not
    connections, warning = {}, None
    if coordinator:
        if num_processes is None or process_id is None:
            raise ValueError("--coordinator needs --num_processes and --process_id too")
        if process_id >= num_processes:
            raise ValueError(f"--process_id={process_id}: of {num_processes} processes the last is {num_processes - 1}")
        host, _ = parse_address(coordinator)
        connections = meet(coordinator, num_processes, process_id, wait_seconds, _say)
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            coordinator_bind_address=coordinator,
            cluster_detection_method="deactivate",
            **options,
        )
        warning = None if host in ("127.0.0.1", "localhost", "[::1]") else NOT_ENCRYPTED
    elif num_processes is not None or process_id is not None:
        raise ValueError("--num_processes and --process_id need --coordinator=HOST:PORT")
    else:
        several, warning = found_by_jax()
        if several:
            with _ends_after(wait_seconds):
                jax.distributed.initialize(**options)
            warning = (
                f"{NOT_ENCRYPTED}; and the coordinator found by automatic detection listens on every interface of its "
                "host ([::]): pass --coordinator, --num_processes and --process_id to bind it to one address"
            )
    client, me, count = peers()
    if client is None:
        return warning if not coordinator else None
    _watch = Watch(client, me, count, connections)
    return warning


@contextlib.contextmanager
def _ends_after(seconds: float) -> Iterator[None]:
    """Where JAX finds the others by itself, it ends a process that waits in vain with a crash: this comes before."""

    def end() -> None:
        _say(
            f"error: the other processes of this job, which its environment names, did not come within {seconds:g} s: "
            "were all started? --wait=SECONDS waits longer"
        )
        os._exit(1)

    say = threading.Timer(SAY_AFTER, _say, ["waiting for the other processes of this job"])
    timer = threading.Timer(seconds, end)
    for thread in (say, timer):
        thread.daemon = True
        thread.start()
    try:
        yield
    finally:
        say.cancel()
        timer.cancel()


def watch() -> Watch | None:
    """None where this process is alone."""
    return _watch


def tell(code: int, text: str) -> None:
    """This process ends, and has said why: tells the others."""
    failing.set()
    if _watch:
        _watch.tell(code, text)


def hear() -> None:
    """Where a connection broke: time for word of the process that was at its other end, which ends this one."""
    if _watch:
        _watch.hear()


def leave() -> None:
    """The end of all processes, together: none waits for another afterwards."""
    global _watch
    if _watch:
        _watch.leave()
        everyone("the end")
        _watch.close()
        jax.distributed.shutdown()
        _watch = None


# ── meeting ──────────────────────────────────────────────────────────────────────────────────────────────────────


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
        missing = processes(set(range(count)) - found.keys())
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
        raise RunError(f"{processes(elsewhere)} came to “{theirs}” where process {me} came to “{name}”")
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


def same(name: str, facts: dict[str, Any]) -> None:
    """Raises UsageError in every process where they differ in one of the facts, naming it, the values, and who."""
    found = everyone(name, facts)
    rows = []
    for key in sorted(set().union(*found)):
        holders: dict[str, set[int]] = {}
        for process, theirs in enumerate(found):
            holders.setdefault(json.dumps(theirs.get(key)), set()).add(process)
        if len(holders) > 1:
            rows.append(f"  {key}: " + ", ".join(f"{value} ({processes(who)})" for value, who in holders.items()))
    if rows:
        raise UsageError(
            "the processes do not agree, so none of them trains:\n" + "\n".join(rows) + "\n"
            "Start all with the same command, code, versions and data."
        )


def shared(path: Path, nonce: str, seconds: float = 90.0) -> None:
    """Raises UsageError in every process unless all see the same folder: the file `lock` that process 0 has written
    there has `nonce` in it, and each can write there, too."""
    me = peers().me
    with together("workdir"):
        deadline = time.monotonic() + seconds
        while not _holds(path, nonce):
            if time.monotonic() > deadline:
                raise UsageError(
                    f"workdir: {path} is not the folder that process 0 writes to, or it is not seen here after "
                    f"{seconds:g} s. All processes need one folder, on a file system that all machines share."
                )
            time.sleep(0.2)
        if me:
            probe = path / f".writable-{me}"
            try:
                probe.write_text("")
                probe.unlink()
            except OSError as error:
                raise UsageError(f"workdir: {path} cannot be written ({error.strerror or error})") from error


def _holds(path: Path, nonce: str) -> bool:
    try:
        os.listdir(path)  # on NFS this asks the server again
        return nonce in (path / "lock").read_text()
    except OSError:
        return False


def same_start(config: Any, flags: Any) -> dict[str, Any]:
    """Compares what decides which programs are compiled, before one is; the facts of code and versions."""
    facts = code_facts()
    same("config", facts | typed(config, flags))
    return facts


def typed(config: Any, flags: Any) -> dict[str, Any]:
    """What all must have been started with. Files may lie elsewhere on each machine: what is read is compared."""
    flat = dict(flatten(config))
    facts = {key: value for key, value in flat.items() if key not in ("data.path", "data.tokenizer")}
    facts |= {f"--{name}": flags[name].value for name in ("num_processes", "simulate", "dry_run", "resume")}
    if flat["data.corpus"] == "stdlib" and not flat["data.path"]:  # the text is Python's own
        facts["versions.python"] = platform.python_version()
    return facts | {"workdir": flags.workdir}


def code_facts() -> dict[str, Any]:
    """What else decides which program is compiled, and what it computes: this code, and what it runs on."""
    jax_options = {name: jax.config.values[name] for name in JAX_OPTIONS if name in jax.config.values}
    return {
        "code": _code_digest(),
        "versions.python": ".".join(map(str, sys.version_info[:2])),
        "versions.jax": jax.__version__,
        "versions.jaxlib": importlib.metadata.version("jaxlib"),
        **{name: str(value) for name, value in jax_options.items()},
        **{name: _flags(os.environ.get(name, "")) for name in ENVIRONMENT},
    }


JAX_OPTIONS = (
    "jax_enable_x64 jax_default_matmul_precision jax_default_prng_impl jax_threefry_partitionable "
    "jax_numpy_dtype_promotion jax_platforms jax_use_shardy_partitioner jax_disable_most_optimizations"
).split()
ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
HARMLESS = ("--xla_dump", "--xla_force_host_platform_device_count")
NOT_THE_TRAINER = {"tests", "bench", "docs", "configs", "notebooks", "runs"}  # a config's values are compared


def _flags(text: str) -> str:
    return " ".join(sorted(flag for flag in text.split() if not flag.startswith(HARMLESS)))


def _code_digest() -> str:
    """SHA-256, shortened, of the Python files that train."""
    root, total = Path(__file__).resolve().parent.parent, hashlib.sha256()
    for folder, below, names in os.walk(root):
        below[:] = sorted(
            name
            for name in below
            if not name.startswith((".", "_")) and not os.path.lexists(f"{folder}/{name}/pyvenv.cfg")
        )
        if folder == str(root):
            below[:] = [name for name in below if name not in NOT_THE_TRAINER]
        for name in sorted(name for name in names if name.endswith(".py")):
            file = Path(folder, name)
            total.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes() + b"\0")
    return total.hexdigest()[:16]


def changed(before: dict[str, Any], now: dict[str, Any]) -> str:
    """One line about the code and versions that a run goes on with; empty where they are those it was saved with."""
    rows = [f"{key} {before[key]} -> {now[key]}" for key in now if key in before and before[key] != now[key]]
    return f"not as when it was saved: {', '.join(rows)}" if rows else ""

"""Before JAX starts: who is process 0, where does it listen, and is everybody there?

JAX itself ends a process whose coordinator or peers do not come with a crash, names nobody, and lets a second process
with the same number end a running job. So the processes meet here first, at the same address, in plain words.
"""

import contextlib
import json
import os
import select
import socket
import time
from collections.abc import Callable

from runtime.config import RunError, UsageError

SAY_AFTER = 3.0  # seconds of silence
RETRY = 0.1
LONGEST_LINE = 4096
Connections = dict[int, socket.socket]


def parse_address(coordinator: str) -> tuple[str, int]:
    """(host, port) of HOST:PORT; an IPv6 host keeps its brackets. Raises ValueError."""
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ValueError(f"--coordinator={coordinator}: expected HOST:PORT, as in 10.0.0.1:8476")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError(
            f"--coordinator={coordinator}: an IPv6 address stands in brackets, as in --coordinator=[{host}]:{port}"
        )
    return host, int(port)


def resolve(coordinator: str) -> tuple[int, tuple]:
    """(address family, socket address). Raises ValueError for a name that nobody knows."""
    host, port = parse_address(coordinator)
    try:
        family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ValueError(
            f"--coordinator={coordinator}: the host {host} cannot be resolved ({error.strerror or error}). "
            "Give an address or a name of process 0's machine that this machine knows."
        ) from error
    return family, address


def meet(coordinator: str, count: int, me: int, seconds: float, say: Callable[[str], None]) -> Connections:
    """Returns when all `count` processes have come, with the open connections: process 0's to each other process, and
    theirs to it. Whoever dies closes its own, which tells the other end at once.

    Raises UsageError for what a command line got wrong, RunError after `seconds`.
    """
    family, address = resolve(coordinator)
    deadline = time.monotonic() + seconds
    if me == 0:
        return _receive(coordinator, family, address, count, deadline, say)
    return {0: _arrive(coordinator, family, address, count, me, deadline, say)}


def _receive(coordinator: str, family: int, address: tuple, count: int, deadline: float, say: Callable) -> Connections:
    try:
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as JAX does: restart without waiting
        listener.bind(address)
        listener.listen(count)
    except OSError as error:
        raise UsageError(
            f"--coordinator={coordinator}: process 0 cannot listen there ({error.strerror or error}). "
            "Give an address of its own machine that the others can reach, and a free port."
        ) from error
    began, said, here = time.monotonic(), False, {}
    with listener:
        while len(here) < count - 1:
            missing = processes(set(range(1, count)) - here.keys())
            if time.monotonic() > deadline:
                text = f"{missing} of {count} did not come to {coordinator} within {deadline - began:.0f} s"
                _tell_all(here, {"run": text})
                raise RunError(f"{text}: were all started, with the same --coordinator and --num_processes?")
            if not said and time.monotonic() - began > SAY_AFTER:
                said = True
                say(f"process 0 waits at {coordinator} for {missing}")
            _take(listener, here, count, RETRY)
        _take(listener, here, count, 0)  # who came with a number that was there already
    _tell_all(here, {"go": True})
    return here


def _take(listener: socket.socket, here: Connections, count: int, seconds: float) -> None:
    """Takes in who comes within this time; forgets who has gone again."""
    ready = select.select([listener, *here.values()], [], [], seconds)[0]
    for process, connection in list(here.items()):
        if connection in ready:  # nothing is sent there, so that is its end
            here.pop(process).close()
    if listener not in ready:
        return
    connection = listener.accept()[0]
    answer = _welcome(connection, here, count)
    if "usage" in answer:
        _tell_all({0: connection}, answer)
    if answer.get("all"):
        _tell_all(here, answer)
        raise UsageError(answer["usage"])


def _welcome(connection: socket.socket, here: Connections, count: int) -> dict:
    """Takes a process in, or says why not. What is no process of ours is not answered."""
    try:
        hello = _read(connection, time.monotonic() + 2)
        number, of = int(hello["process"]), int(hello["of"])
    except (OSError, ValueError, KeyError, TypeError):
        connection.close()
        return {}
    if of != count:
        return {
            "usage": f"--num_processes: process {number} was started with {of}, process 0 with {count}. Give all the "
            "same.",
            "all": True,
        }
    if number in here or not 0 < number < count:
        return {"usage": f"--process_id={number}: that process is here already. Give each process a number of its own."}
    here[number] = connection
    return {}


def _arrive(
    coordinator: str, family: int, address: tuple, count: int, me: int, deadline: float, say: Callable
) -> socket.socket:
    began, said, why = time.monotonic(), False, "nobody listens there"
    while time.monotonic() < deadline:
        connection = socket.socket(family, socket.SOCK_STREAM)
        try:
            connection.settimeout(max(0.1, min(2.0, deadline - time.monotonic())))
            connection.connect(address)
            connection.sendall(json.dumps({"process": me, "of": count}).encode() + b"\n")
            why = "it is there, and waits for others"
            answer = _read(connection, deadline + 2)  # process 0 knows better who is missing
            if answer.get("go"):
                return connection
            connection.close()
            raise UsageError(answer["usage"]) if "usage" in answer else RunError(answer["run"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            connection.close()
            if isinstance(error, ConnectionRefusedError):
                why = "nobody listens there"
            elif not isinstance(error, TimeoutError):
                why = str(error) or type(error).__name__
        if not said and time.monotonic() - began > SAY_AFTER:
            said = True
            say(f"process {me} waits for process 0 at {coordinator} ({why})")
        time.sleep(RETRY)
    raise RunError(
        f"process {me} did not find process 0 at {coordinator} within {deadline - began:.0f} s ({why}): is it started, "
        "and is this its address?"
    )


def _read(connection: socket.socket, deadline: float) -> dict:
    """One line of JSON."""
    text = b""
    while not text.endswith(b"\n"):
        connection.settimeout(max(0.01, deadline - time.monotonic()))
        part = connection.recv(LONGEST_LINE)
        text += part
        if not part or len(text) > LONGEST_LINE:
            raise ValueError("what listens there is not process 0 of this run")
    return json.loads(text)


def _tell_all(connections: Connections, answer: dict) -> None:
    for connection in connections.values():
        with contextlib.suppress(OSError):
            connection.sendall(json.dumps(answer).encode() + b"\n")
            if "go" not in answer:
                connection.close()


def processes(which: set[int]) -> str:
    """ "process 1", "processes 1, 3"."""
    names = ", ".join(map(str, sorted(which)[:20])) + (", …" if len(which) > 20 else "")
    return f"process {names}" if len(which) == 1 else f"processes {names}"


def found_by_jax() -> tuple[bool, str | None]:
    """Whether a launcher that JAX can detect (SLURM, Open MPI, Kubernetes, TPU pods) started several of us, and a
    warning where it looks as if somebody had meant to."""
    env = os.environ
    if int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env:
        if "SLURM_STEP_NODELIST" in env:  # set by srun for its tasks, not by sbatch for its script
            return True, None
        return False, (
            f"SLURM has given this job {env['SLURM_NTASKS']} tasks, and this is one process, started without srun: it "
            "trains alone. To use them all, start it as `srun python train.py …`"
        )
    if int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return True, None
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        return True, None
    return len(env.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1 or "MEGASCALE_NUM_SLICES" in env, None

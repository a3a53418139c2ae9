"""Builds and validates the device mesh; starts jax.distributed.

Axes, slowest first. `replica` is the slow link between machines: only the exchange crosses it. The others are one
machine's, or one fast network's, own: `stage`, `expert` and `context` will stand between them under these names.
"""

import contextlib
import ctypes
import math
import os
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

AXES = ("replica", "fsdp", "tensor")


def simulate(num_devices: int, num_processes: int = 1) -> None:
    """Simulates `num_devices` CPU devices, shared equally among the processes. Must run before any device query."""
    if num_devices % num_processes:
        raise ValueError(f"--simulate={num_devices} devices cannot be shared equally by {num_processes} processes")
    local = num_devices // num_processes
    # XLA:CPU runs each device on a thread of one pool, as large as the machine has cores, and independent collectives
    # in no fixed order: with one thread a device, two devices can wait for each other in two collectives for ever.
    os.environ["NPROC"] = str(max(os.cpu_count() or 1, 4 * local))
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", local)


def fill_sizes(sizes: Mapping[str, int], num_devices: int) -> dict[str, int]:
    """Axis sizes with the one -1 filled in.

    Raises ValueError when the product is not the number of devices, listing factorings that are.
    """
    sizes = {axis: int(sizes[axis]) for axis in AXES}
    for axis, size in sizes.items():
        if size < 1 and size != -1:
            raise ValueError(f"mesh.{axis}={size}: an axis has at least 1 device (or -1: whatever is left)")
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f"mesh.{' and mesh.'.join(free)} are both -1: only one axis can be filled in")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and num_devices % fixed == 0:
        return sizes | {free[0]: num_devices // fixed}
    if not free and fixed == num_devices:
        return sizes
    asked = " × ".join(f"{axis} {size}" for axis, size in sizes.items())
    raise ValueError(
        f"the mesh {asked} does not multiply to the {num_devices} devices there are "
        f"(mesh.{', mesh.'.join(AXES)}). These do: {_factorings(num_devices)}. "
        "On a CPU, --simulate=N gives N devices"
    )


def _factorings(n: int, limit: int = 12) -> str:
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    rows = [(r, f, n // r // f) for r in divisors for f in divisors if (n // r) % f == 0]
    rows.sort(key=lambda row: (row[0], row[2]))
    text = ", ".join("×".join(map(str, row)) for row in rows[:limit])
    return f"{'×'.join(AXES)} = {text}{', …' if len(rows) > limit else ''}"


def keep_freed_memory() -> None:
    """XLA:CPU allocates its temporaries anew at each call. glibc would give them back to the system in between, and
    every page would fault again: a quarter of a small model's step. For one training run; a process that compiles many
    programs would grow. Nothing is done on accelerators, or with other C libraries."""
    if jax.default_backend() != "cpu":
        return
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 64 * 2**20)
        mallopt(mmap_max, 0)


def build(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over all devices of all processes (or over `devices`); `sizes` must multiply to their number.

    One process's devices are neighbours, so that the fast axes stay inside a machine. Across TPU slices `replica` is
    laid over the slow network (DCN) and the other axes inside the slices.
    """
    devices = sorted(devices or jax.devices(), key=lambda d: (d.process_index, d.id))
    shape = tuple(sizes[axis] for axis in AXES)
    if devices[0].platform == "tpu":
        from jax.experimental import mesh_utils

        slices = len({getattr(d, "slice_index", 0) for d in devices})
        if slices > 1:
            across = math.gcd(slices, sizes["replica"])
            dcn = (across, slices // across, 1)
            inside = tuple(size // d for size, d in zip(shape, dcn, strict=True))
            return Mesh(mesh_utils.create_hybrid_device_mesh(inside, dcn, devices), AXES)
        return Mesh(mesh_utils.create_device_mesh(shape, devices), AXES)
    return Mesh(np.array(devices).reshape(shape), AXES)


def describe(mesh: Mesh) -> str:
    return " × ".join(f"{axis} {size}" for axis, size in mesh.shape.items())


def start_distributed(
    coordinator: str | None, num_processes: int | None, process_id: int | None, heartbeat_seconds: int
) -> str | None:
    """Joins the other processes, if there are any. Returns a warning to print, or None.

    With explicit flags the coordinator listens on its own address only; JAX's default is every interface, where a
    stray connection can end the job.
    """
    # Where one process has failed, the others' exit waits for it: not JAX's 300 s.
    options: dict = {"heartbeat_timeout_seconds": heartbeat_seconds, "shutdown_timeout_seconds": 2 * heartbeat_seconds}
    if coordinator:
        if num_processes is None or process_id is None:
            raise ValueError("--coordinator needs --num_processes and --process_id too")
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 2**16:
            raise ValueError(f"--coordinator={coordinator}: expected HOST:PORT, as in 10.0.0.1:8476")
        if process_id >= num_processes:
            raise ValueError(f"--process_id={process_id}: of {num_processes} processes the last is {num_processes - 1}")
        if process_id == 0:
            _check_own_address(coordinator, host, int(port))
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            coordinator_bind_address=coordinator,
            cluster_detection_method="deactivate",
            **options,
        )
        return None if host in ("127.0.0.1", "localhost", "[::1]") else NOT_ENCRYPTED
    if num_processes is not None or process_id is not None:
        raise ValueError("--num_processes and --process_id need --coordinator=HOST:PORT")
    if not _in_cluster():
        return None
    jax.distributed.initialize(**options)
    if jax.process_count() == 1:
        return None
    return (
        f"{NOT_ENCRYPTED}; and the coordinator found by automatic detection listens on every interface of its host "
        "([::]): pass --coordinator, --num_processes and --process_id to bind it to one address"
    )


def _check_own_address(coordinator: str, host: str, port: int) -> None:
    """Whether process 0 can listen there: JAX crashes where it cannot."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as JAX does: restart without waiting
            probe.bind(address)
    except OSError as error:
        raise ValueError(
            f"--coordinator={coordinator}: process 0 cannot listen there ({error.strerror or error}). "
            "Give an address of its own machine that the others can reach, and a free port."
        ) from error


NOT_ENCRYPTED = "the processes' collectives are not encrypted: keep them on a private network"


def _in_cluster() -> bool:
    """Whether a launcher that JAX can detect (SLURM, Open MPI, Kubernetes, TPU pods) started several of us."""
    env = os.environ
    if int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env:
        return True
    if int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return True
    if "KUBERNETES_SERVICE_HOST" in env and "JOB_COMPLETION_INDEX" in env:
        return True
    return len(env.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1 or "MEGASCALE_NUM_SLICES" in env


def wait_for_all(name: str) -> None:
    """Waits until every process is here. Compile times differ, and a collective on CPU waits 30 s at most."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)

"""Builds the device mesh, of the axes in axes.py, and says what does not fit it."""

import contextlib
import ctypes
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import keystr

from parallel.layout import rules
from parallel.layout.axes import AXES, COMMON, SLOW, STAGE, shown


def simulate(num_devices: int, num_processes: int = 1) -> None:
    """Simulates `num_devices` CPU devices, shared equally among the processes. Must run before any device query."""
    if num_devices % num_processes:
        raise ValueError(f"--simulate={num_devices} devices cannot be shared equally by {num_processes} processes")
    local = num_devices // num_processes
    # XLA:CPU runs each device on a thread of one pool, as large as the machine has cores, and independent collectives
    # in no fixed order: with one thread a device, two devices can wait for each other in two collectives for ever.
    os.environ["NPROC"] = str(max(os.cpu_count() or 1, 4 * local))
    jax.config.update("jax_num_cpu_devices", local)  # refuses where devices were asked for, before anything changes
    jax.config.update("jax_platforms", "cpu")


SPLIT: Any = {"allow_split_physical_axes": True}  # of a TPU's torus, where no whole ones make an axis of ours
GPU_SHARE = 0.90  # of a GPU's memory that a run takes for its arrays: JAX by itself takes 0.75
SHARE_KEYS = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # the newer name first


DRIVER = "/dev/nvidiactl", "/dev/dxg"  # on Linux; on Windows' Linux


def take_gpu_memory() -> None:
    """Has JAX take that share, unless the user has said which. Before any device query; nothing to other devices. Where
    there is no driver, a CUDA plugin is there to compile for GPUs elsewhere: what JAX says of it then is left out."""
    logging.getLogger("jax._src.xla_bridge").addFilter(_is_about_this_machine)
    if not any(os.environ.get(key) for key in SHARE_KEYS):
        os.environ[SHARE_KEYS[0]] = str(GPU_SHARE)


def _is_about_this_machine(record: logging.LogRecord) -> bool:
    said = f"{record.msg} {record.args}"
    is_cuda = "plugin configuration error" in said and "cuda" in said
    return not is_cuda or any(Path(file).exists() for file in DRIVER)


def gpu_share() -> float:
    """What the user has said, or what a run takes. Raises ValueError for what is no share."""
    key = next((key for key in SHARE_KEYS if os.environ.get(key)), "")
    try:
        share = float(os.environ[key]) if key else GPU_SHARE
    except ValueError:
        share = 0.0
    if not 0 < share <= 1:
        raise ValueError(f"{key}={os.environ[key]}: expected a share of a GPU's memory, above 0 and at most 1")
    return share


def fill_sizes(
    sizes: Mapping[str, int], num_devices: int, hint: str = "On a CPU, --simulate=N gives N devices"
) -> dict[str, int]:
    """Sizes of all axes, with the one -1 filled in.

    Raises ValueError when the product is not the number of devices, listing factorings that are. hint: its last words.
    """
    sizes = {axis: int(sizes.get(axis, 1)) for axis in AXES}
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
    others = {axis: size for axis, size in sizes.items() if axis not in COMMON and size not in (1, -1)}
    wrong = f"the mesh {_said(sizes)} does not multiply to the {num_devices} devices there are"
    if free:
        given = " × ".join(f"{axis} {size}" for axis, size in sizes.items() if size not in (1, -1))
        wrong = f"mesh.{free[0]}=-1 cannot be filled in: {given} does not divide the {num_devices} devices there are"
    raise ValueError(f"{wrong} (mesh.{', mesh.'.join(AXES)}). These do: {_factorings(num_devices, others)}. {hint}")


def factorings(n: int, count: int = len(COMMON)) -> list[tuple[int, ...]]:
    """All tuples of so many sizes with the product n."""
    if count == 1:
        return [(n,)]
    return [(d, *rest) for d in divisors(n, n) for rest in factorings(n // d, count - 1)]


def divisors(n: int, most: int) -> list[int]:
    return [d for d in range(1, most + 1) if n % d == 0]


def _factorings(n: int, others: Mapping[str, int], limit: int = 12) -> str:
    """others: sizes of further axes, which stay where they divide n."""
    asked = math.prod(others.values())
    kept = others if asked > 0 and n % asked == 0 else {}
    rows = sorted(factorings(n // math.prod(kept.values())), key=lambda row: (row[0], row[-1]))
    text = ", ".join("×".join(map(str, row)) for row in rows[:limit])
    beside = "".join(f", beside {axis} {size}" for axis, size in kept.items())
    if others and not kept:
        beside = f"; and mesh.{', mesh.'.join(others)} in {_set(divisors(n, n))}"
    return f"{'×'.join(COMMON)} = {text}{', …' if len(rows) > limit else ''}{beside}"


def cut(axis: str, sizes: Mapping[str, int], over: tuple[str, ...] = ()) -> tuple[str, int]:
    """(the config's keys of the mesh axes over which a logical axis is cut, into how many parts on such a mesh). Of
    several axes those that are not 1, or else the first that every mesh has. over: where it is cut over fewer."""
    over = over or rules.RULES[axis]
    named = [a for a in over if sizes.get(a, 1) != 1] or [a for a in over if a in COMMON][:1] or over
    return " × ".join(f"mesh.{name}" for name in named), rules.shards(over, sizes)


def legal(size: int, over: str, count: int, least: int = 1) -> str:
    """What would do in place of a dimension of this size, cut over these axes into so many parts."""
    below, above = size // count * count, -(-size // count) * count
    sizes = f"{below} or {above}" if below >= max(1, least) else f"{above}"
    return f"Nearest legal sizes: {sizes}; or {over} in {_set(divisors(size, count))}"


def _set(numbers: Sequence[int]) -> str:
    return f"{{{', '.join(map(str, numbers))}}}"


def check_divisible(
    shapes_tree: Any, axes_tree: Any, sizes: Mapping[str, int], least: Mapping[str, int] | None = None
) -> None:
    """Raises ValueError for the first parameter with a dimension that its mesh axis does not divide. least: the
    smallest size that a logical axis may have for other reasons; none below is offered."""
    axes_leaves = dict(jax.tree_util.tree_leaves_with_path(axes_tree, is_leaf=lambda x: isinstance(x, tuple)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes_tree):
        for i, (size, axis) in enumerate(zip(leaf.shape, axes_leaves[path], strict=True)):
            own = rules.over(axes_leaves[path], i)
            over, count = cut(axis, sizes, own) if own else ("", 1)
            if size % count:
                name = keystr(path, simple=True, separator="/")
                raise ValueError(
                    f"parameter {name}: its dimension '{axis}' of size {size} cannot be cut over {over}={count}. "
                    f"{legal(size, over, count, (least or {}).get(axis, 1))}"
                )


def keep_freed_memory() -> None:
    """XLA:CPU allocates its temporaries anew at each call. glibc would give them back to the system in between, and
    every page would fault again, for much of a small model's step. For one training run; a process that compiles many
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
    """The mesh over all devices of all processes (or over `devices`). sizes: of the axes, 1 where none is given; they
    must multiply to the number of devices.

    One process's devices are neighbours, so that the fast axes stay inside a machine. Across TPU slices `replica` is
    laid over the slow network (DCN) and the other axes inside the slices.
    """
    devices = sorted(devices or jax.devices(), key=lambda d: (d.process_index, d.id))
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    if devices[0].platform == "tpu":
        from jax.experimental import mesh_utils

        slices = len({getattr(d, "slice_index", 0) for d in devices})
        if slices > 1:
            across = math.gcd(slices, sizes.get(SLOW, 1))
            stages = math.gcd(slices // across, sizes.get(STAGE, 1))
            # A replica of several slices is cut by its layers, else by its weights.
            slow = {SLOW: across, STAGE: stages, "fsdp": slices // across // stages}
            if shape[AXES.index("fsdp")] % slow["fsdp"]:
                every = _said(dict(zip(AXES, shape, strict=True)))
                raise ValueError(
                    f"the mesh {every} cannot be laid over {slices} slices: mesh.{SLOW} × mesh.{STAGE} × mesh.fsdp "
                    "must be a multiple of them, for the other axes stay inside of one"
                )
            dcn = tuple(slow.get(axis, 1) for axis in AXES)
            inside = tuple(size // d for size, d in zip(shape, dcn, strict=True))
            return Mesh(mesh_utils.create_hybrid_device_mesh(inside, dcn, devices, **SPLIT), AXES)
        return Mesh(mesh_utils.create_device_mesh(shape, devices, **SPLIT), AXES)
    return Mesh(np.array(devices).reshape(shape), AXES)


def describe(mesh: Mesh) -> str:
    return _said(mesh.shape)


def _said(sizes: Mapping[str, int]) -> str:
    return " × ".join(f"{axis} {size}" for axis, size in shown(sizes).items())

"""Options of XLA's compilers: what the project sets for a chip, and what the config has in their place."""

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from runtime.config import UsageError

# By default one collective may be under way at a time on a GPU. Then no loop that has collectives of its own, as that
# over the layers of sharded weights, can stand between an exchange's start and its end: nothing would hide it.
GPU = {"xla_gpu_experimental_parallel_collective_overlap_limit": 64}
# XLA:CPU hands operations that are ready to other threads only where there are more than a few. In a program as small
# as a caller's task each device would begin with another one of two independent collectives, and wait for ever. On one
# thread a device all begin with the same.
SMALL_ON_CPU = {"xla_cpu_multi_thread_eigen": False}


def options(text: str, mesh: Mesh, is_small: bool) -> dict[str, Any]:
    """For all programs on this mesh. text: `name=value,…` of the config's compute.xla_options. is_small: a caller's
    task. Raises UsageError for what the compiler does not know."""
    platform = mesh.devices.flat[0].platform
    ours: Mapping[str, Any] = GPU if platform == "gpu" else SMALL_ON_CPU if platform == "cpu" and is_small else {}
    own = dict(_option(each.strip()) for each in text.split(",") if each.strip())
    if own:
        _try(own, mesh)
    return {**ours, **own}


def said(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in options.items())


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (equals and name and value):
        raise UsageError(f"compute.xla_options: {text!r} is not name=value; several are separated by commas")
    if value in ("true", "false"):
        return name, value == "true"
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            pass
    return name, value


def _try(own: dict[str, Any], mesh: Mesh) -> None:
    """The smallest program with them: the compiler itself knows its options."""
    one = jax.ShapeDtypeStruct((), "float32", sharding=jax.sharding.SingleDeviceSharding(mesh.devices.flat[0]))
    try:
        jax.jit(lambda x: x).lower(one).compile(compiler_options=own)
    except jax.errors.JaxRuntimeError as error:
        raise UsageError(f"compute.xla_options: {str(error).partition(': ')[2]}") from None

"""Reads checkpoints of format 2, whose meshes had three axes: what owners of chunks owe, and what codecs draw for each
device, has a dimension for every fast axis now. `translate` gives a record of today's shapes; as it is stored an array
lacks the dimensions `further`."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

# [fragments?, R, fsdp, tensor, …] and [fragments?, fsdp, tensor, …]: with stage, expert and context among them
BY_DEVICE = re.compile(r"codec/(fragments/|rest/)?(server|rounds)/")


def translate(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record as if it had been written today; its sums are those of the arrays as they are stored."""
    return {**record, "format": 3, "arrays": {name: _array(name, x) for name, x in record["arrays"].items()}}


def _array(name: str, x: Mapping[str, Any]) -> dict[str, Any]:
    match = BY_DEVICE.match(name)
    if match is None:
        return dict(x)
    first = (match[1] == "fragments/") + (match[2] == "server")
    fsdp, tensor, *rest = x["shape"][first:]
    shape = [*x["shape"][:first], 1, fsdp, 1, 1, tensor, *rest]
    return {**x, "shape": shape, "further": [first, first + 2, first + 3], "stored_shape": x["shape"]}


def as_stored(x: Mapping[str, Any], wanted: Any) -> jax.ShapeDtypeStruct:
    """Where to put an array as it is stored."""
    spec = (*wanted.sharding.spec, *[None] * (len(x["shape"]) - len(wanted.sharding.spec)))
    kept = P(*(entry for i, entry in enumerate(spec) if i not in x["further"]))
    return jax.ShapeDtypeStruct(
        tuple(x["stored_shape"]), wanted.dtype, sharding=NamedSharding(wanted.sharding.mesh, kept)
    )


def with_further(x: jax.Array, further: list[int], sharding: Any) -> jax.Array:
    return jax.jit(lambda x: jnp.expand_dims(x, further), out_shardings=sharding)(x)

"""Reads checkpoints whose layers are counted otherwise than those of the run that goes on: [L, …] of a stack, or
[V, L / V, …] where stages have several runs of layers (pipeline.interleave). Their order is the same, so that either is
a reshape of the other: `translate` gives a record of the wanted shapes, in which what has another as it is stored says
so (`stored_shape`) and behind how many dimensions its layers are counted (`layers_at`)."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from runtime.steps import PARAMS

BLOCKS = f"{PARAMS}blocks/"
COUNTED = ((1, 2), (2, 1), (2, 2))  # by so many dimensions in the checkpoint, and in this run


def translate(record: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """wanted: abstract arrays by name. The record as it is, where its layers are counted as ours or it is of another
    model."""
    known = record["arrays"]
    names = [name for name in wanted if name.startswith(BLOCKS) and name in known]
    pairs = {name: (tuple(known[name]["shape"]), tuple(wanted[name].shape)) for name in names}
    cut = all(_is_second(x.sharding.spec) for name, x in wanted.items() if name in pairs)
    ways = [by for by in COUNTED if cut or by[1] == 1]
    old, new = next((counts for by in ways if (counts := _counts(list(pairs.values()), *by))), ((), ()))
    if old == new:
        return dict(record)
    arrays = {}
    for name, x in known.items():
        of = next((theirs for leaf, (theirs, _) in pairs.items() if _is_of(name, leaf)), None)
        at = len(x["shape"]) - len(of) if of else 0
        arrays[name] = x
        if of and at >= 0 and tuple(x["shape"][at:]) == of and "stored_shape" not in x:
            shape = [*x["shape"][:at], *new, *of[len(old) :]]
            arrays[name] = x | {"shape": shape, "stored_shape": x["shape"], "layers_at": (at, len(old), len(new))}
    return {**record, "arrays": arrays}


def _is_of(name: str, leaf: str) -> bool:
    """Whether an array belongs to a weight: its name is in the array's."""
    return f"/{leaf.removeprefix(PARAMS)}/" in f"/{name}/"


def _is_second(spec: Any) -> bool:
    """Whether an array is cut by its second dimension and not by its first, as runs of layers are."""
    return len(spec) > 1 and spec[0] is None and spec[1] is not None


def _counts(pairs: list, theirs: int, ours: int) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """What counts layers in the shapes of all weights, if they differ in nothing else; of weights that are all alike
    that cannot be told."""
    found, rest = {(old[:theirs], new[:ours]) for old, new in pairs}, {new[ours:] for _, new in pairs}
    if len(found) != 1 or len(rest) == 1 or any(old[theirs:] != new[ours:] for old, new in pairs):
        return None
    ((old, new),) = found
    return (old, new) if math.prod(old) == math.prod(new) and (len(old), len(new)) == (theirs, ours) else None


def as_stored(x: Mapping[str, Any], wanted: Any) -> jax.ShapeDtypeStruct:
    """Where to put an array as it is stored: cut as is wanted, layers if their number there can be."""
    shape, (at, theirs, ours), mesh = tuple(x["stored_shape"]), x["layers_at"], wanted.sharding.mesh
    spec = (*wanted.sharding.spec, *[None] * (len(wanted.shape) - len(wanted.sharding.spec)))
    last, size = spec[at + ours - 1], shape[at + theirs - 1]
    axes = () if last is None else (last,) if isinstance(last, str) else last
    entry = last if size % math.prod(mesh.shape[axis] for axis in axes) == 0 else None
    cut = P(*spec[:at], *[None] * (theirs - 1), entry, *spec[at + ours :])
    return jax.ShapeDtypeStruct(shape, wanted.dtype, sharding=NamedSharding(mesh, cut))


def counted(x: jax.Array, wanted: Any) -> jax.Array:
    """As this run counts them."""
    return jax.jit(jnp.reshape, static_argnums=1, out_shardings=wanted.sharding)(x, wanted.shape)

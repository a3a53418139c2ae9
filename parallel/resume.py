"""Going on with another number of replicas, another mesh, codec or strategy: what becomes of what replicas remember.

The rule. Parameters, optimizer and guard must be the same arrays. What belongs to replicas is carried over as its mean:
every new replica gets the mean of the old ones' (local parameters, pending gradients, residuals), so that the mean over
replicas, which is all that the mathematics sees, is kept. Residuals of error feedback are folded as
e'_i = mean(e_worker) + e_server, because the server's lie by chunks that move with R and the mesh: what was owed is
still owed. A round codec's own state (PowerSGD's Q) is drawn anew when its shapes change. What the new config has no
place for is dropped. Every drop and every change is said.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from parallel.units import Leaf

OURS = ("codec/", "strategy/")  # what may change; anything else of another shape is another model
SERVER = "codec/server/"  # those of fragments belong to what each fragment still owes, and are dropped with it
Arrays = dict[str, jax.Array]


@dataclass(frozen=True)
class Adapted:
    """load: what to read instead of the new state's own arrays of OURS. convert: from those to the new ones."""

    load: dict[str, jax.ShapeDtypeStruct]
    convert: Callable[[Arrays], Arrays]
    notes: list[str]
    replaced: set[str]  # of the new state, made by convert
    ignored: set[str]  # of the checkpoint, not read


def adapt(
    saved: dict[str, Any], wanted: dict[str, Any], leaves: Any, init: Callable[[], Any], mesh: Mesh
) -> Adapted | None:
    """None if the arrays of OURS are the same in the checkpoint and in the new state.

    saved: {name: {"shape", "dtype"}} of the checkpoint. wanted: {name: abstract array} of the new state. leaves: the
    units.Leaf of all parameters. init() gives the named arrays of a fresh state, for what must begin anew.
    """
    ours = lambda names: {name for name in names if name.startswith(OURS)}
    same = lambda name: tuple(saved[name]["shape"]) == wanted[name].shape and saved[name]["dtype"] == wanted[name].dtype
    old, new = ours(saved), ours(wanted)
    if old == new and all(same(name) for name in new):
        return None
    servers = {name for name in old if name.startswith(SERVER) and len(saved[name]["shape"]) == 5}
    notes, sources = [], {}
    for name in new:
        if name in saved and same(name) and not servers:
            sources[name] = "as it was"
        elif name in saved and _only_replicas_differ(saved[name]["shape"], wanted[name].shape):
            sources[name] = "mean"
        elif name.startswith("codec/worker/"):
            sources[name] = "zeros" if name not in saved else "mean"
        else:
            sources[name] = "fresh"
    # A server's residual moves into the workers'; its own place begins with zeros.
    sources |= {name: "zeros" for name in new if "/server/" in name}
    folding = servers and any(name.startswith("codec/worker/") for name in new)
    if any(how == "mean" for how in sources.values()):
        notes.append("what replicas remember was carried over as its mean: every replica starts from the same")
    if folding:
        notes.append(
            "residuals of error feedback were folded, mean of the workers' + the server's: nothing owed is lost"
        )
    if fresh := sorted(name for name, how in sources.items() if how == "fresh"):
        notes.append(f"begun anew, for it has other shapes or was not there: {', '.join(fresh)}")
    lost = sorted(name for name in old - new if name not in servers or not folding)
    if lost:
        notes.append(f"dropped, for there is no place for it now: {', '.join(lost)}")
    read = {name for name, how in sources.items() if how in ("as it was", "mean")} | (servers if folding else set())
    load = {name: _abstract(saved[name], wanted[name] if name in sources else None, mesh) for name in read - servers}
    load |= {name: _abstract(saved[name], None, mesh) for name in read & servers}

    def convert(arrays: Arrays) -> Arrays:
        shardings = {name: wanted[name].sharding for name in new}
        begun = init() if "fresh" in sources.values() else {}
        kept = {name: arrays[name] for name in read} | {f"new {name}": begun[name] for name in fresh}
        make = lambda arrays: _convert(arrays, sources, wanted, jax.tree.leaves(leaves))
        return jax.jit(make, out_shardings=shardings)(kept)

    return Adapted(load, convert, notes, replaced=new, ignored=old - read)


def _only_replicas_differ(saved: list[int], wanted: tuple[int, ...]) -> bool:
    """A leading dimension of replicas, of another size."""
    return len(saved) == len(wanted) > 0 and tuple(saved[1:]) == wanted[1:]


def _abstract(saved: dict[str, Any], wanted: Any, mesh: Mesh) -> jax.ShapeDtypeStruct:
    """Where to put an old array: sharded over the fast axes like its successor, or at least over fsdp."""
    shape = tuple(saved["shape"])
    if wanted is not None:
        spec = P(None, *wanted.sharding.spec[1:]) if wanted.shape != shape else wanted.sharding.spec
    else:
        spec = P(*[None] * (len(shape) - 1), "fsdp") if shape and shape[-1] % mesh.shape["fsdp"] == 0 else P()
    return jax.ShapeDtypeStruct(shape, np.dtype(saved["dtype"]), sharding=NamedSharding(mesh, spec))


def _convert(arrays: Arrays, sources: dict[str, str], wanted: dict[str, Any], leaves: list[Leaf]) -> Arrays:
    found = {}
    for name, how in sources.items():
        x = wanted[name]
        if how == "as it was":
            found[name] = arrays[name]
        elif how == "fresh":
            found[name] = arrays[f"new {name}"]
        elif how == "zeros":
            found[name] = jnp.zeros(x.shape, x.dtype)
        else:
            found[name] = jnp.broadcast_to(_mean(arrays[name]), x.shape).astype(x.dtype)
    owed = server_residuals({n.removeprefix(SERVER): x for n, x in arrays.items() if n.startswith(SERVER)}, leaves)
    for leaf, rest in owed.items():
        name = f"codec/worker/{leaf}"
        if name in found:
            found[name] = (found[name].astype(jnp.float32) + rest).astype(found[name].dtype)
    return found


def _mean(x_R: jax.Array) -> jax.Array:
    if jnp.issubdtype(x_R.dtype, jnp.floating):
        return jnp.mean(x_R.astype(jnp.float32), axis=0)
    return jnp.max(x_R, axis=0)  # counters; flags


def server_residuals(server: dict[str, jax.Array], leaves: list[Leaf]) -> dict[str, jax.Array]:
    """{leaf: what the servers owe, in its shape} from {unit: [R, F, T, pieces, C]}, whatever R, mesh and buckets were.

    A unit is one array, or all arrays over the same axes that are no unit by themselves ("small Int4 fsdp").
    """
    axes = lambda leaf: tuple(axis for axis in ("fsdp", "tensor") if axis in leaf.spec)
    owed = {}
    for unit, x in server.items():
        own = tuple(unit.split(" ")[2:])
        members = [leaf for leaf in leaves if leaf.name == unit]
        if unit.startswith("small "):
            members = [leaf for leaf in leaves if leaf.name not in server and axes(leaf) == own]
        R, F, T, pieces, C = x.shape
        shards = [leaf.shard({"fsdp": F, "tensor": T, "replica": 1}) for leaf in members]
        size = sum(local.size for local in shards) // pieces  # of one, without padding
        flat_FTN = jnp.moveaxis(x.astype(jnp.float32), 0, 3).reshape(F, T, pieces, R * C)[..., :size].reshape(F, T, -1)
        start = 0
        for leaf, local in zip(members, shards, strict=True):
            part = flat_FTN[..., start : start + local.size].reshape(F, T, *local.shape)
            owed[leaf.name] = _whole(part, leaf)
            start += local.size
    return owed


def _whole(shards_FT: jax.Array, leaf: Leaf) -> jax.Array:
    """[F, T, one device's shard] -> the array."""
    order, spec = [], (*leaf.spec, *[None] * (len(leaf.shape) - len(leaf.spec)))
    for i, axis in enumerate(spec):
        order += [{"fsdp": 0, "tensor": 1}[axis]] if axis else []
        order.append(2 + i)
    unused = [i for i in (0, 1) if i not in order]
    return shards_FT.transpose(*unused, *order).reshape(leaf.shape)

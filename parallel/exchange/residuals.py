"""What an exchange remembers from step to step: residuals of error feedback, and the round codecs' own state.

worker: what each replica still owes, like the exchanged tree, [R, …].
server: {unit: what the owners of chunks owe from rounding the sums, [R, F, T, pieces, C]}.
rounds: {unit: [F, T, …]}. F and T are the sizes of fsdp and tensor where the unit is sharded over them, else 1.

All three are {} where there is nothing to remember.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from parallel.exchange import pairwise, units
from parallel.exchange.codecs import Identity
from parallel.exchange.codecs.plain import is_round
from parallel.exchange.exchange import Exchange, Feedback
from parallel.exchange.net import ALGORITHMS, AXIS, Net
from parallel.layout import roles


def build(
    codec: Any, algorithm: str, mesh: Mesh, replicas: int, leaves: Any, feedback: Feedback | None = None, seed: int = 0
) -> Exchange:
    """The exchange of a tree of units.Leaf. Raises ValueError, with the config's keys, for what does not fit."""
    devices = mesh.shape[AXIS]
    if replicas % devices:
        raise ValueError(
            f"sync.replicas={replicas} is not a multiple of mesh.replica={devices}: "
            "each device of the slow axis holds the same number of replicas"
        )
    if algorithm not in ALGORITHMS:
        raise ValueError(f"sync.algorithm={algorithm!r} is none of {', '.join(ALGORITHMS)}")
    name = type(codec).__name__
    if algorithm == "psum" and name != "Identity":
        raise ValueError("sync.algorithm=psum adds up on the wire and knows no codec: set sync.codec=none")
    if algorithm == "two_stage" and not is_round(codec) and codec.sparse:
        raise ValueError(
            f"sync.algorithm=two_stage adds messages on the way, and those of {name} name different places: "
            "set sync.algorithm=auto"
        )
    rank, shards = getattr(codec, "rank", 0), [leaf.shard(mesh.shape) for leaf in jax.tree.leaves(leaves)]
    if rank and not any(codec.takes(shard) for shard in shards):
        largest = max((min(shard.matrix[1:]) for shard in shards if shard.matrix), default=0)
        raise ValueError(
            f"sync.rank={rank}: no array becomes half as large by factors of this rank (the largest shard of a matrix "
            f"has {largest} rows or columns): choose a lower rank, or another codec"
        )
    over_gloo = jax.process_count() > 1 and mesh.devices.flat[0].platform == "cpu"
    net = Net(algorithm, replicas, devices, **pairwise.collectives(devices) if over_gloo else {})
    plan = units.plan(leaves, codec, mesh)
    declared = _declare(net, mesh, leaves, plan, feedback)
    return Exchange(net, mesh, leaves, plan, declared, roles.specs_of(declared), feedback, seed)


def init(exchange: Exchange) -> dict[str, Any]:
    """Residuals of zeros, and the round codecs' first state: global arrays."""
    state: dict[str, Any] = {"worker": {}, "server": {}, "rounds": {}}
    if exchange.replicas == 1:
        return state
    R, sizes = exchange.replicas, exchange.mesh.shape
    dtype = exchange.feedback.dtype if exchange.feedback else None
    if exchange.feedback:
        state["worker"] = jax.tree.map(lambda leaf: jnp.zeros((R, *leaf.shape), dtype), exchange.leaves)
    for unit in exchange.units:
        counts = tuple(sizes[axis] if axis in unit.axes else 1 for axis in exchange.mesh.axis_names[1:])
        if is_round(unit.codec):
            key = jax.random.fold_in(jax.random.key(exchange.seed), unit.salt)
            make = lambda key, unit=unit: unit.codec.init(unit.local, key)
            state["rounds"][unit.name] = jax.vmap(jax.vmap(make))(jax.random.split(key, counts))
        elif has_server(exchange.net, unit, exchange.feedback):
            C = exchange.net.padded(unit.size // unit.pieces, unit.codec) // R
            state["server"][unit.name] = jnp.zeros((R, *counts, unit.pieces, C), dtype)
    return state


def has_server(net: Net, unit: Any, feedback: Feedback | None) -> bool:
    """Whether owners of chunks round what they send on."""
    if feedback is None or is_round(unit.codec) or isinstance(unit.codec, Identity):
        return False
    return net.form(unit.codec) == "two_stage"


def _declare(net: Net, mesh: Mesh, leaves: Any, plan: Any, feedback: Feedback | None) -> dict[str, Any]:
    """The Role of every array of `init`."""
    state: dict[str, Any] = {"worker": {}, "server": {}, "rounds": {}}
    if net.replicas == 1:
        return state
    if feedback:
        state["worker"] = roles.like(roles.OWED, jax.tree.map(lambda leaf: leaf.spec, leaves), AXIS)
    for unit in plan:
        axes = [axis if axis in unit.axes else None for axis in mesh.axis_names[1:]]
        if is_round(unit.codec):
            shapes = jax.eval_shape(lambda unit=unit: unit.codec.init(unit.local, jax.random.key(0)))
            state["rounds"][unit.name] = roles.each(roles.DRAWN, shapes, *axes)
        elif has_server(net, unit, feedback):
            state["server"][unit.name] = roles.Role(roles.OWED, P(AXIS, *axes))
    return state

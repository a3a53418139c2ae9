"""What an exchange remembers from step to step: residuals of error feedback, and the round codecs' own state.

worker: what each replica still owes, like the exchanged tree, [R, …].
server: {unit: what the owners of chunks owe from rounding the sums, [R, *fast, pieces, C]}.
rounds: {unit: [*fast, …]}.
*fast are the sizes of the fast mesh axes: 1 for those over which the unit is not sharded.

All three are {} where there is nothing to remember. How they lie is known here only.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from parallel.exchange.codecs.base import is_round
from parallel.exchange.units import Leaf
from parallel.layout import roles
from parallel.layout.axes import FAST, SLOW
from parallel.layout.rules import names


def nothing() -> dict[str, Any]:
    return {"worker": {}, "server": {}, "rounds": {}}


def init(exchange: Any) -> dict[str, Any]:
    """Residuals of zeros, and the round codecs' first state: global arrays."""
    state = nothing()
    if exchange.replicas == 1:
        return state
    R, sizes = exchange.replicas, exchange.mesh.shape
    dtype = exchange.feedback.dtype if exchange.feedback else None
    if exchange.feedback:
        state["worker"] = jax.tree.map(lambda leaf: jnp.zeros((R, *leaf.shape), dtype), exchange.leaves)
    for unit in exchange.units:
        counts = tuple(sizes[axis] if axis in unit.axes else 1 for axis in FAST)
        if is_round(unit.codec):
            key = jax.random.fold_in(jax.random.key(exchange.seed), unit.salt)
            make = lambda key, unit=unit: unit.codec.init(unit.local, key)
            for _ in FAST:
                make = jax.vmap(make)
            state["rounds"][unit.name] = make(jax.random.split(key, counts))
        elif has_server(exchange.net, unit, exchange.feedback):
            C = exchange.net.padded(unit.size // unit.pieces, unit.codec) // R
            state["server"][unit.name] = jnp.zeros((R, *counts, unit.pieces, C), dtype)
    return state


def declare(net: Any, leaves: Any, plan: Any, feedback: Any) -> dict[str, Any]:
    """The Role of every array of `init`."""
    state = nothing()
    if net.replicas == 1:
        return state
    if feedback:
        state["worker"] = roles.like(roles.OWED, jax.tree.map(lambda leaf: leaf.spec, leaves), SLOW)
    for unit in plan:
        axes = [axis if axis in unit.axes else None for axis in FAST]
        if is_round(unit.codec):
            shapes = jax.eval_shape(lambda unit=unit: unit.codec.init(unit.local, jax.random.key(0)))
            state["rounds"][unit.name] = roles.each(roles.DRAWN, shapes, *axes)
        elif has_server(net, unit, feedback):
            state["server"][unit.name] = roles.Role(roles.OWED, P(SLOW, *axes))
    return state


def has_server(net: Any, unit: Any, feedback: Any) -> bool:
    """Whether owners of chunks round what they send on."""
    if feedback is None or is_round(unit.codec) or unit.codec.exact:
        return False
    return net.form(unit.codec) == "two_stage"


# ── on one device ────────────────────────────────────────────────────────────────────────────────────────────────


def here(tree: Any, dims: int) -> Any:
    """A device's part, without the dimensions of the fast axes, which stand behind `dims` others."""
    return jax.tree.map(lambda x: jnp.squeeze(x, _places(dims)), tree)


def put_back(tree: Any, dims: int) -> Any:
    """The inverse of `here`."""
    return jax.tree.map(lambda x: jnp.expand_dims(x, _places(dims)), tree)


def _places(dims: int) -> tuple[int, ...]:
    return tuple(range(dims, dims + len(FAST)))


# ── in the shape of the weights ──────────────────────────────────────────────────────────────────────────────────


def of_weights(x: jax.Array, own: Sequence[Leaf]) -> dict[str, jax.Array]:
    """{leaf: what a server owes, in its shape} from [R, *fast, pieces, C], whatever R, mesh and buckets were."""
    R, *fast, pieces, C = x.shape
    shards = [leaf.shard({SLOW: 1} | dict(zip(FAST, fast, strict=True))) for leaf in own]
    size = sum(local.size for local in shards) // pieces  # of one, without padding
    flat = jnp.moveaxis(x.astype(jnp.float32), 0, -2).reshape(*fast, pieces, R * C)[..., :size].reshape(*fast, -1)
    owed, start = {}, 0
    for leaf, local in zip(own, shards, strict=True):
        part = flat[..., start : start + local.size].reshape(*fast, *local.shape)
        owed[leaf.name] = _whole(part, leaf)
        start += local.size
    return owed


def _whole(shards: jax.Array, leaf: Leaf) -> jax.Array:
    """[*fast, one device's shard] -> the array."""
    order: list[int] = []
    for i, entry in enumerate((*leaf.spec, *[None] * (len(leaf.shape) - len(leaf.spec)))):
        order += [FAST.index(axis) for axis in names(entry)]
        order.append(len(FAST) + i)
    unused = [i for i in range(len(FAST)) if i not in order]
    return shards.transpose(*unused, *order).reshape(leaf.shape)

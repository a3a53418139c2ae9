"""What the owners of chunks owe, in the shape of the weights it belongs to: chunks move with R and the mesh."""

import jax
import jax.numpy as jnp

from parallel.exchange.units import Leaf, members

FRAGMENTS = "codec/fragments/server/"
SERVERS = (FRAGMENTS, "codec/rest/server/", "codec/server/")


def server_of(name: str) -> tuple[str, str] | None:
    """(whose server, its unit) of an array's name in a state; None if it is no server's."""
    prefix = next((prefix for prefix in SERVERS if name.startswith(prefix)), None)
    return (prefix, name.removeprefix(prefix)) if prefix else None


def owners(server_names: list[str], leaves: list[Leaf]) -> dict[str, list[Leaf]]:
    """{server's array: the leaves of which it owes something}."""
    found = {}
    for name in server_names:
        prefix, unit = server_of(name) or ("", "")
        units = {other.removeprefix(prefix) for other in server_names if other.startswith(prefix)}
        found[name] = members(unit, units, [leaf for leaf in leaves if _belongs(leaf, prefix)])
    return found


def _belongs(leaf: Leaf, prefix: str) -> bool:
    in_blocks = leaf.name.startswith("blocks/")
    return {FRAGMENTS: in_blocks, "codec/rest/server/": not in_blocks}.get(prefix, True)


def unfold(name: str, x: jax.Array, own: list[Leaf]) -> dict[str, jax.Array]:
    """{leaf: what a server owes, in its shape} from [R, F, T, pieces, C], whatever R, mesh and buckets were; of
    fragments from [fragments, R, …], every fragments-th layer each."""
    if not name.startswith(FRAGMENTS):
        return _unfold(x, own)
    count = x.shape[0]
    short = [leaf.with_layers(leaf.shape[0] // count) for leaf in own]
    parts = [_unfold(x[p], short) for p in range(count)]
    join = lambda leaf: jnp.stack([part[leaf.name] for part in parts], axis=1).reshape(leaf.shape)
    return {leaf.name: join(leaf) for leaf in own}


def _unfold(x: jax.Array, own: list[Leaf]) -> dict[str, jax.Array]:
    R, F, T, pieces, C = x.shape
    shards = [leaf.shard({"fsdp": F, "tensor": T, "replica": 1}) for leaf in own]
    size = sum(local.size for local in shards) // pieces  # of one, without padding
    flat_FTN = jnp.moveaxis(x.astype(jnp.float32), 0, 3).reshape(F, T, pieces, R * C)[..., :size].reshape(F, T, -1)
    owed, start = {}, 0
    for leaf, local in zip(own, shards, strict=True):
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

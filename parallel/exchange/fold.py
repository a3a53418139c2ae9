"""What the owners of chunks owe, in the shape of the weights it belongs to: chunks move with R and the mesh."""

import jax
import jax.numpy as jnp

from parallel.exchange.residuals import of_weights
from parallel.exchange.units import SMALL_UNIT, Leaf
from parallel.layout.axes import STAGE, first

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
        found[name] = _members(unit, units, [leaf for leaf in leaves if _belongs(leaf, prefix)])
    return found


def _members(unit: str, units: set[str], leaves: list[Leaf]) -> list[Leaf]:
    """The leaves of a unit, by its name: one array, or all that are cut alike and are no unit by themselves."""
    if unit.split(" ")[0] != SMALL_UNIT:
        return [leaf for leaf in leaves if leaf.name == unit]
    cut, staged = tuple(unit.split(" ")[1:]), any(STAGE in other.split(" ")[1:] for other in units)
    return [leaf for leaf in leaves if leaf.name not in units and first(leaf.spec, staged) == cut]


def _belongs(leaf: Leaf, prefix: str) -> bool:
    in_blocks = leaf.name.startswith("blocks/")
    return {FRAGMENTS: in_blocks, "codec/rest/server/": not in_blocks}.get(prefix, True)


def unfold(name: str, x: jax.Array, own: list[Leaf]) -> dict[str, jax.Array]:
    """{leaf: what a server owes, in its shape}; of fragments from [fragments, …], every fragments-th layer each."""
    if not name.startswith(FRAGMENTS):
        return of_weights(x, own)
    count = x.shape[0]
    short = [leaf.with_layers(leaf.shape[0] // count) for leaf in own]
    parts = [of_weights(x[p], short) for p in range(count)]
    join = lambda leaf: jnp.stack([part[leaf.name] for part in parts], axis=1).reshape(leaf.shape)
    return {leaf.name: join(leaf) for leaf in own}

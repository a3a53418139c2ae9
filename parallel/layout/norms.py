"""Sizes by which devices decide: the same bits on all of them."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from parallel.layout.axes import SLOW, of


def norms(mesh: Mesh, *trees: tuple[Any, Any]) -> tuple[jax.Array, ...]:
    """The L2 norm of each (specs, tree), float32, the same bits on every device. Left to XLA, each group of replicas
    would add up its own devices' parts, in an order of its own, and replicas might decide differently on the last bit.
    Here the parts of the fast axes are gathered and added up in one order everywhere; nothing crosses `replica`."""
    fast = tuple(axis for axis in mesh.axis_names if axis != SLOW and mesh.shape[axis] > 1)

    def share(x: jax.Array, spec: P) -> jax.Array:
        """This device's part of the sum of squares: copies count on the first of their holders."""
        copies = [lax.axis_index(axis) for axis in fast if axis not in of(spec)]
        square = jnp.sum(jnp.square(x.astype(jnp.float32)))
        return jnp.where(sum(copies) == 0, square, 0.0) if copies else square

    def body(*found: Any) -> jax.Array:
        sums = [sum(jax.tree.leaves(jax.tree.map(share, x, specs))) for x, (specs, _) in zip(found, trees, strict=True)]
        parts_DM = jnp.stack(sums)[None]
        for axis in fast:
            parts_DM = lax.all_gather(parts_DM, axis, tiled=True)
        return jnp.sqrt(jnp.sum(parts_DM, axis=0))

    in_specs = tuple(specs for specs, _ in trees)
    found_M = jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=P(), check_vma=False)(*(t for _, t in trees))
    return tuple(found_M)

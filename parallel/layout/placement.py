"""From rows on a host to global arrays on the mesh: each process builds its own devices' rows and no others."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from parallel.layout import rules
from parallel.layout.axes import SLOW
from parallel.layout.rules import Constrain

Rows = Callable[[Any], dict[str, np.ndarray]]  # row numbers -> {name: [rows, …]}
EVAL = P(SLOW, *rules.spec(("batch",)))  # [D, B, …]
TRAIN = P(None, *EVAL)  # [K, R, B, …]


def place_train(mesh: Mesh, replicas: int, batch_size: int, rows: Sequence[Rows]) -> dict[str, jax.Array]:
    """One call's batch [K, R, B, …] from the rows of its K steps."""
    return _place(mesh, replicas, batch_size, rows, TRAIN)


def place_eval(mesh: Mesh, groups: int, batch_size: int, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """A batch [D·B, …] that every process holds, as [D, B, …]."""
    return _place(mesh, groups, batch_size, [lambda ids: {name: x[ids] for name, x in batch.items()}], EVAL)


def _place(mesh: Mesh, groups: int, batch_size: int, rows: Sequence[Rows], spec: P) -> dict[str, jax.Array]:
    """The batch as [K, groups, batch_size / groups, …] (or without the leading K), sharded by `spec`.

    Row number = group · rows per group + place in the group: which rows a step has does not depend on the mesh.
    """
    per_group = batch_size // groups
    sharding = NamedSharding(mesh, spec)
    leading = len(spec) - 2
    built: dict[tuple[int, int, int, int], dict[str, np.ndarray]] = {}

    def block(index) -> dict[str, np.ndarray]:
        g0, g1, _ = index[leading].indices(groups)
        b0, b1, _ = index[leading + 1].indices(per_group)
        if (g0, g1, b0, b1) not in built:  # devices along `tensor` share their rows
            numbers = np.arange(g0, g1)[:, None] * per_group + np.arange(b0, b1)[None, :]
            steps = [of_step(numbers.reshape(-1)) for of_step in rows]
            built[g0, g1, b0, b1] = {
                name: np.stack([step[name] for step in steps]).reshape(
                    (len(rows),) * leading + (g1 - g0, b1 - b0) + x.shape[1:]
                )
                for name, x in steps[0].items()
            }
        return built[g0, g1, b0, b1]

    shape = (len(rows),) * leading + (groups, per_group)
    indices = sharding.addressable_devices_indices_map(shape)
    first = block(next(iter(indices.values())))
    return {
        name: jax.make_array_from_callback(
            (*shape, *x.shape[leading + 2 :]), sharding, lambda index, name=name: block(index)[name]
        )
        for name, x in first.items()
    }


def abstract_batch(
    mesh: Mesh, leading: tuple, groups: int, batch_size: int, row: Mapping[str, Any], spec: P
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and shardings of what these return. leading: (K,) for TRAIN, () for EVAL; row: {name: shape and dtype of
    one row}."""
    shape, sharding = (*leading, groups, batch_size // groups), NamedSharding(mesh, spec)
    return {name: jax.ShapeDtypeStruct((*shape, *x.shape), x.dtype, sharding=sharding) for name, x in row.items()}


def placed(mesh: Mesh, shapes: Any, specs: Any) -> Any:
    """A tree of abstract arrays, with their shardings."""
    shardings = rules.shardings(mesh, specs)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def evaluation(loss_fn: Callable, mesh: Mesh) -> Callable:
    """evaluate(params, batch[D, B, …]) -> the sums that loss_fn gives, over all rows; D: the size of `replica`."""

    @partial(jax.shard_map, mesh=mesh, in_specs=P(SLOW), out_specs=P(), check_vma=False)
    def add_up(x_1M: jax.Array) -> jax.Array:
        return lax.psum(x_1M[0], SLOW)

    def evaluate(params: Any, batch_DBT: dict[str, jax.Array]) -> tuple:
        def one(params: Any, batch_BT: dict[str, jax.Array]) -> Any:
            return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), loss_fn(params, batch_BT, Constrain(mesh)))

        sums_D, treedef = jax.tree.flatten(jax.vmap(one, in_axes=(None, 0), spmd_axis_name=SLOW)(params, batch_DBT))
        with jax.named_scope("scalars_evaluation"):
            return treedef.unflatten(add_up(jnp.stack(sums_D, axis=1)))

    return evaluate

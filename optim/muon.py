"""Muon, put together from optax's parts."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from optim.optimizer import is_vector

COUNTS = ("first", "repeats", "layers", "experts")  # dimensions that count matrices


def muon(
    schedule: Any, axes: Any, momentum: float, weight_decay: float, eps: float, adamw: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Muon for the matrices of the blocks, `adamw` for embedding, head, biases and norms (Jordan et al. 2024).

    Updates have the root mean square 0.2, about AdamW's, so its learning rate fits (Liu et al. 2025, §2.2). Put
    together from optax's parts: its own `muon` decays biases, and turns the AdamW half into NAdam.
    """

    def is_matrix(path, names) -> bool:
        in_blocks = (path[0].key == "blocks" or names[:1] == ("first",)) and not is_vector(path)
        return in_blocks and "embed" in names and any(name not in ("embed", *COUNTS) for name in names)

    def to_rms(update: jax.Array, dims: Any) -> jax.Array:
        """An orthogonal [m, n] matrix has the root mean square 1 / sqrt(max(m, n))."""
        sizes = [math.prod(update.shape[i] for i in side) for side in dims]
        return update * (0.2 * math.sqrt(max(sizes)))

    def dimensions(path, names) -> Any:
        if not is_matrix(path, names):
            return optax.MaskedNode()
        model = names.index("embed")
        others = tuple(i for i, name in enumerate(names) if name not in ("embed", *COUNTS))
        rows, columns = (others, (model,)) if model == len(names) - 1 else ((model,), others)
        return contrib.MuonDimensionNumbers(reduction_axis=rows, output_axis=columns)

    is_axes = lambda x: isinstance(x, tuple)
    numbers = jax.tree_util.tree_map_with_path(dimensions, axes, is_leaf=is_axes)
    orthogonal = optax.chain(
        _cut_first(contrib.scale_by_muon(beta=momentum, eps=eps, weight_dimension_numbers=lambda _: numbers), axes),
        optax.stateless(lambda updates, _: jax.tree.map(to_rms, updates, numbers)),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(schedule),
    )
    labels = jax.tree_util.tree_map_with_path(
        lambda path, names: "muon" if is_matrix(path, names) else "adamw", axes, is_leaf=is_axes
    )
    return optax.partition({"muon": orthogonal, "adamw": adamw}, labels)


def _cut_first(inner: optax.GradientTransformation, axes: Any) -> optax.GradientTransformation:
    """Of several runs of layers the second dimension is cut over devices. optax makes one of all that count matrices:
    with that one in front each device has its own, else they would be gathered."""

    def turned(tree: Any) -> Any:
        turns = lambda names, x: names[:1] == ("repeats",) and not isinstance(x, optax.MaskedNode)
        turn = lambda names, x: jnp.swapaxes(x, 0, 1) if turns(names, x) else x
        return jax.tree.map(turn, axes, tree, is_leaf=lambda x: isinstance(x, tuple))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = inner.update(turned(updates), state._replace(mu=turned(state.mu)), params)
        return turned(updates), state._replace(mu=turned(state.mu))

    return optax.GradientTransformation(inner.init, update)

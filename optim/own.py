"""An optax transformation of a caller's as an optimizer. Its state is kept as it is: arrays are named by its fields,
and lie as the parameter that they belong to."""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import keystr

from optim.optimizer import Optimizer


@dataclass(frozen=True)
class Own(Optimizer):
    """weights: {path of an array of the state, as keystr: the keys of the parameter that it lies as, () for a scalar}.
    No learning rate is known, and clipping is its own."""

    weights: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def init(self, params: Any, replicas: int = 1) -> Any:
        return self.transform.init(params)

    def apply(self, mean: Any, state: Any, params: Any, norm: jax.Array | None = None) -> tuple[Any, Any]:
        updates, new = self.transform.update(mean, state, params)
        return optax.apply_updates(params, updates), new

    def weight_of(self, path: Any) -> tuple[str, ...]:
        return self.weights[keystr(path)]


def from_optax(transform: optax.GradientTransformation, shapes: Any) -> Own:
    """shapes: of the parameters. Raises ValueError for a transformation whose state cannot be laid out."""
    parameters = {_keys(path): x.shape for path, x in jax.tree_util.tree_leaves_with_path(shapes)}
    state = jax.eval_shape(transform.init, shapes)
    weights = {}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        keys = _keys(path)
        ends = [keys[i:] for i in range(len(keys))]
        weight = next((end for end in ends if end in parameters and parameters[end] == x.shape), ())
        if (x.shape and not weight) or jnp.issubdtype(x.dtype, jax.dtypes.extended):
            name = keystr(path, simple=True, separator="/")
            raise ValueError(
                f"optimizer: its state has {name} of shape {x.shape}, {x.dtype}, which is neither a number nor of the "
                "shape of the parameter that it is named by, so nobody can say where it lies on a mesh"
            )
        weights[keystr(path)] = weight
    _check_update(transform, state, shapes)
    return Own(None, transform, weights=weights)


def _check_update(transform: Any, state: Any, shapes: Any) -> None:
    try:
        updates, after = jax.eval_shape(transform.update, shapes, state, shapes)
    except Exception as error:  # of whatever type: one that wants more than gradients, as a loss to search along
        raise ValueError(
            f"optimizer: its update(gradients, state, params) fails ({type(error).__name__}: {error}); it must need "
            "nothing else"
        ) from error
    spec = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
    for what, found, wanted in (("updates", updates, shapes), ("state", after, state)):
        if jax.tree.structure(found) != jax.tree.structure(wanted) or spec(found) != spec(wanted):
            raise ValueError(f"optimizer: its update gives {what} of other shapes or types than those before it")


def _keys(path: Any) -> tuple[Any, ...]:
    """The keys of a path; None for what is no key of a dictionary."""
    return tuple(getattr(part, "key", None) for part in path)

"""What is done with the gradient: optimizers from optax.

An optimizer here has two halves, because with several replicas what is exchanged need not be the gradient:
`message(grads, state)` is what each replica sends, `apply(mean, state, params, norm)` what is done with the mean.
Its state has our own names, on disk, too: `count`, and beside each weight `first` (moment), `second` or `momentum`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax

Schedule = Callable[[Any], Any]


@dataclass(frozen=True)
class Optimizer:
    """per_replica: names in the state whose arrays every replica has for itself, [R, …]. constant_size: whether
    updates have the same size whatever the gradient is, so that there is nothing to judge."""

    schedule: Schedule | None
    transform: Any = None  # of optax
    clip_norm: float = 0.0  # 0: no clipping
    constant_size: bool = False
    per_replica: ClassVar[tuple[str, ...]] = ()

    def init(self, params: Any, replicas: int = 1) -> Any:
        return named(self.transform.init(params))

    def rate(self, step: jax.Array) -> jax.Array:
        """The learning rate, by which the size of an update is measured; 1 where it is not known."""
        return jnp.asarray(self.schedule(step) if self.schedule else 1.0, jnp.float32)

    def message(self, grads_R: Any, state: Any) -> tuple[Any, Any]:
        """What is exchanged: for these optimizers the gradient itself. Leaves [R, …]."""
        return grads_R, state

    def apply(self, mean: Any, state: Any, params: Any, norm: jax.Array | None = None) -> tuple[Any, Any]:
        """norm: of the mean. Passed in where there are several devices, so that what is clipped is clipped alike, to
        the bit, on all of them."""
        if self.clip_norm:
            norm = optax.tree.norm(mean) if norm is None else norm
            clip = lambda g: jnp.where(norm < self.clip_norm, g, g / norm * self.clip_norm)
            mean = jax.tree.map(clip, mean)
        updates, new = self.transform.update(mean, as_optax(self.transform.init(params), state), params)
        return optax.apply_updates(params, updates), named(new)


SLOTS = {"mu": "first", "nu": "second", "trace": "momentum", "count": "count"}  # fields of optax's states
CONSTANTS = ("ns_coeffs",)  # fields that never change


def named(state: Any) -> dict[str, Any]:
    """The arrays of an optax state by our names, each beside its weight: {"mlp": {"up": {"first": …}}, "count": …}.
    Positions in a chain and names of classes are left out: they change with options that have nothing to remember."""
    found: dict[str, Any] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        field, weight = _field(path)
        if field not in CONSTANTS:
            node = found
            for name in weight:
                node = node.setdefault(name, {})
            node[SLOTS[field]] = x  # several counts count the same
    return found


def as_optax(template: Any, state: dict[str, Any]) -> Any:
    """The inverse of `named`, in the form of `template`, a fresh state."""

    def find(path, fresh: jax.Array) -> jax.Array:
        field, weight = _field(path)
        if field in CONSTANTS:
            return fresh
        return functools.reduce(lambda node, name: node[name], weight, state)[SLOTS[field]]

    return jax.tree_util.tree_map_with_path(find, template)


def _field(path) -> tuple[str, list[str]]:
    """The last field of a state in a path, and the weight's names behind it."""
    last = max(i for i, key in enumerate(path) if isinstance(key, jax.tree_util.GetAttrKey))
    return path[last].name, [key.key for key in path[last + 1 :]]


def decays(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: not is_vector(path), params)


def is_vector(path) -> bool:
    return path[-1].key == "scale" or path[-1].key.endswith("bias")

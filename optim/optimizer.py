"""What is done with the gradient: optimizers and schedules from optax.

An optimizer here has two halves, because with several replicas what is exchanged need not be the gradient:
`message(grads, state)` is what each replica sends, `apply(mean, state, params, norm)` what is done with the mean.
Its state is a dictionary of our own names, which are also those on disk: `count`, and beside each weight `first`
(moment), `second` or `momentum`.
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

    schedule: Schedule
    transform: Any = None  # of optax
    clip_norm: float = 0.0  # 0: no clipping
    constant_size: bool = False
    per_replica: ClassVar[tuple[str, ...]] = ()

    def init(self, params: Any, replicas: int = 1) -> Any:
        return named(self.transform.init(params))

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


def schedule(kind: str, lr: float, warmup_steps: int, total_steps: int, final_fraction: float) -> Schedule:
    """Linear warm-up from 0 over warmup_steps, then `constant`; `cosine` to lr · final_fraction at total_steps; or
    `wsd` (warm-up, stable, decay): constant until the last fifth, then linear to lr · final_fraction."""
    decay_steps = max(1, total_steps - warmup_steps)
    if kind == "constant":
        body = optax.constant_schedule(lr)
    elif kind == "cosine":
        body = optax.cosine_decay_schedule(lr, decay_steps, alpha=final_fraction)
    elif kind == "wsd":
        decay = max(1, decay_steps // 5)
        body = optax.linear_schedule(lr, lr * final_fraction, decay, transition_begin=decay_steps - decay)
    else:
        raise ValueError(f"optimizer.schedule={kind!r} is none of constant, cosine, wsd")
    if not warmup_steps:
        return body
    # The first update is at lr / warmup_steps, not at 0, which would waste it.
    warmup = optax.linear_schedule(lr / warmup_steps, lr, max(1, warmup_steps - 1))
    return optax.join_schedules([warmup, body], [warmup_steps])


def build(
    name: str,
    schedule: Schedule,
    axes: Any,
    *,
    b1: float,
    b2: float,
    eps: float,
    momentum: float,
    weight_decay: float,
    clip_norm: float,
) -> Optimizer:
    """adamw, sgd (with momentum), lion, muon or sign (of the mean gradient). axes: the logical axes of the params.

    Weight decay is decoupled, and spares biases and norm scales. clip_norm 0: no clipping.
    """
    adamw = optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decays)
    if name == "adamw":
        core = adamw
    elif name == "lion":
        core = optax.lion(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=decays)
    elif name == "sgd":
        core = optax.chain(
            optax.trace(momentum) if momentum else optax.identity(),
            optax.add_decayed_weights(weight_decay, decays) if weight_decay else optax.identity(),
            optax.scale_by_learning_rate(schedule),
        )
    elif name == "muon":
        from optim.muon import muon

        core = muon(schedule, axes, momentum, weight_decay, eps, adamw)
    elif name == "sign":
        decay = optax.add_decayed_weights(weight_decay, decays)
        core = optax.chain(optax.scale_by_sign(), decay, optax.scale_by_learning_rate(schedule))
    else:
        raise ValueError(f"optimizer.name={name!r} is none of adamw, lion, muon, sgd, sign")
    return Optimizer(schedule, core, clip_norm, constant_size=name in ("lion", "muon", "sign"))


def decays(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: not is_vector(path), params)


def is_vector(path) -> bool:
    return path[-1].key == "scale" or path[-1].key.endswith("bias")

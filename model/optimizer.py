"""What is done with the gradient: optimizers and schedules from optax, and the guard that leaves a bad one out.

An optimizer here has two halves, because with several replicas what is exchanged need not be the gradient:
`message(grads, state)` is what each replica sends, `apply(mean, state, params)` what is done with the mean.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

Schedule = Callable[[Any], Any]


@dataclass(frozen=True)
class Optimizer:
    schedule: Schedule
    transform: Any = None  # of optax

    def init(self, params: Any, replicas: int = 1) -> Any:
        return self.transform.init(params)

    def message(self, grads_R: Any, state: Any) -> tuple[Any, Any]:
        """What is exchanged: for these optimizers the gradient itself. Leaves [R, …]."""
        return grads_R, state

    def apply(self, mean: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = self.transform.update(mean, state, params)
        return optax.apply_updates(params, updates), state


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
        from model.muon import muon

        core = muon(schedule, axes, momentum, weight_decay, eps, adamw)
    elif name == "sign":
        decay = optax.add_decayed_weights(weight_decay, decays)
        core = optax.chain(optax.scale_by_sign(), decay, optax.scale_by_learning_rate(schedule))
    else:
        raise ValueError(f"optimizer.name={name!r} is none of adamw, lion, muon, sgd, sign")
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    return Optimizer(schedule, optax.chain(*clip, core))


def decays(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: not is_vector(path), params)


def is_vector(path) -> bool:
    return path[-1].key == "scale" or path[-1].key.endswith("bias")


# ── the guard ────────────────────────────────────────────────────────────────────────────────────────────────────


@jax.tree_util.register_dataclass
@dataclass
class Counters:
    """State of the guard; part of every checkpoint."""

    applied: jax.Array  # updates made
    skipped: jax.Array  # updates left out
    in_a_row: jax.Array  # left out since the last one made
    norms_W: jax.Array  # the last W gradient norms that were let through


@dataclass(frozen=True)
class Guard:
    """A norm is a spike when it lies more than `zscore` standard deviations above the mean of the last `window`."""

    zscore: float  # 0: only non-finite gradients are skipped
    window: int

    def init(self) -> Counters:
        zero = jnp.zeros((), jnp.int32)
        return Counters(zero, zero, zero, jnp.zeros((self.window,), jnp.float32))

    def allows(self, counters: Counters, grad_norm: jax.Array, finite: jax.Array) -> jax.Array:
        if not self.zscore:
            return finite
        mean = jnp.mean(counters.norms_W)
        # The floor of 5 % of the mean keeps a run of almost equal norms from turning noise into spikes.
        deviation = jnp.maximum(jnp.std(counters.norms_W), 0.05 * mean)
        spike = (counters.applied >= self.window) & (grad_norm > mean + self.zscore * deviation)
        return finite & ~spike

    def update(self, counters: Counters, grad_norm: jax.Array, allowed: jax.Array) -> Counters:
        slot = counters.applied % self.window
        norms_W = jnp.where(allowed, counters.norms_W.at[slot].set(grad_norm), counters.norms_W)
        made = allowed.astype(jnp.int32)
        return Counters(
            applied=counters.applied + made,
            skipped=counters.skipped + 1 - made,
            in_a_row=jnp.where(allowed, 0, counters.in_a_row + 1),
            norms_W=norms_W,
        )

"""What is done with the gradient: optimizers and schedules from optax, and the guard that leaves a bad one out.

An optimizer here has two halves, because with several replicas what is exchanged need not be the gradient:
`message(grads, state)` is what each replica sends, `apply(mean, state, params)` what is done with the mean.
"""

import math
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
    if name == "adamw":
        core = optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decays)
    elif name == "lion":
        core = optax.lion(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=decays)
    elif name == "sgd":
        core = optax.chain(
            optax.trace(momentum) if momentum else optax.identity(),
            optax.add_decayed_weights(weight_decay, decays) if weight_decay else optax.identity(),
            optax.scale_by_learning_rate(schedule),
        )
    elif name == "muon":
        core = _muon(schedule, axes, b1, b2, eps, momentum, weight_decay)
    elif name == "sign":
        decay = optax.add_decayed_weights(weight_decay, decays)
        core = optax.chain(optax.scale_by_sign(), decay, optax.scale_by_learning_rate(schedule))
    else:
        raise ValueError(f"optimizer.name={name!r} is none of adamw, lion, muon, sgd, sign")
    clip = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    return Optimizer(schedule, optax.chain(*clip, core))


def _muon(schedule, axes, b1, b2, eps, momentum, weight_decay) -> optax.GradientTransformation:
    """Muon for the matrices of the blocks, AdamW for embedding, head, biases and norms (Jordan et al. 2024).

    Updates have the root mean square 0.2, about AdamW's, so its learning rate fits (Liu et al. 2025, §2.2). Put
    together from optax's parts: its own `muon` decays biases, and turns the AdamW half into NAdam.
    """
    from optax import contrib

    def is_matrix(path) -> bool:
        return path[0].key == "blocks" and not _is_vector(path)

    def to_rms(update: jax.Array, dims: Any) -> jax.Array:
        """An orthogonal [m, n] matrix has the root mean square 1 / sqrt(max(m, n))."""
        sizes = [math.prod(update.shape[i] for i in side) for side in dims]
        return update * (0.2 * math.sqrt(max(sizes)))

    def dimensions(path, names) -> Any:
        if not is_matrix(path):
            return optax.MaskedNode()
        model = names.index("embed")
        others = tuple(i for i, name in enumerate(names) if name not in ("embed", "layers"))
        rows, columns = (others, (model,)) if model == len(names) - 1 else ((model,), others)
        return contrib.MuonDimensionNumbers(reduction_axis=rows, output_axis=columns)

    numbers = jax.tree_util.tree_map_with_path(dimensions, axes, is_leaf=_is_axes)
    muon = optax.chain(
        contrib.scale_by_muon(beta=momentum, eps=eps, weight_dimension_numbers=lambda _: numbers),
        optax.stateless(lambda updates, _: jax.tree.map(to_rms, updates, numbers)),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(schedule),
    )
    adamw = optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decays)
    labels = jax.tree_util.tree_map_with_path(
        lambda path, _: "muon" if is_matrix(path) else "adamw", axes, is_leaf=_is_axes
    )
    return optax.partition({"muon": muon, "adamw": adamw}, labels)


def decays(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: not _is_vector(path), params)


def _is_vector(path) -> bool:
    return path[-1].key == "scale" or path[-1].key.endswith("bias")


def _is_axes(x: Any) -> bool:
    return isinstance(x, tuple)


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

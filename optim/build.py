"""Optimizers and schedules by name."""

from typing import Any

import jax
import optax

from optim.muon import muon
from optim.optimizer import Optimizer, Schedule, decays


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


def optimizer(
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
    balance_rate: float,
    kind: type[Optimizer] = Optimizer,
) -> Optimizer:
    """adamw, sgd (with momentum), lion, muon or sign (of the mean gradient). axes: the logical axes of the params.
    balance_rate: of a step of weights that follow counts, as their axes say. kind: Optimizer, or what keeps its
    moments in another way.

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
        core = muon(schedule, axes, momentum, weight_decay, eps, adamw)
    elif name == "sign":
        decay = optax.add_decayed_weights(weight_decay, decays)
        core = optax.chain(optax.scale_by_sign(), decay, optax.scale_by_learning_rate(schedule))
    else:
        raise ValueError(f"optimizer.name={name!r} is none of adamw, lion, muon, sgd, sign")
    label = lambda names: "counts" if "counts" in names else "core"
    labels = jax.tree.map(label, axes, is_leaf=lambda x: isinstance(x, tuple))
    if "counts" in jax.tree.leaves(labels):
        against = optax.chain(optax.scale_by_sign(), optax.scale(-balance_rate))
        core = optax.partition({"core": core, "counts": against}, labels)
    return kind(schedule, core, clip_norm, constant_size=name in ("lion", "muon", "sign"))

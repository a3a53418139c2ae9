"""Optimizers whose replicas exchange momentum instead of gradients: Signum with majority vote, and 1-bit Adam."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from model.optimizer import Optimizer, decays


@dataclass(frozen=True)
class Signum(Optimizer):
    """m_i ← β m_i + (1 − β) g_i; every replica votes sign(m_i); θ ← θ − lr (majority + decay θ).

    Bernstein et al. 2018, signSGD with majority vote. Momentum stays with its replica. The votes are ±1, so the codec
    `sign` carries them exactly. A tie is broken by a random sign that all devices draw alike: with 2 replicas half of
    pure noise is ties, and a fixed sign would drift.
    """

    momentum: float = 0.9
    weight_decay: float = 0.0

    def init(self, params: Any, replicas: int = 1) -> Any:
        zeros_R = jax.tree.map(lambda x: jnp.zeros((replicas, *x.shape), x.dtype), params)
        return {"count": jnp.zeros((), jnp.int32), "momentum": zeros_R}

    def message(self, grads_R: Any, state: Any) -> tuple[Any, Any]:
        mix = lambda m, g: self.momentum * m + (1 - self.momentum) * g
        momentum_R = jax.tree.map(mix, state["momentum"], grads_R)
        return jax.tree.map(_sign, momentum_R), state | {"momentum": momentum_R}

    def apply(self, mean: Any, state: Any, params: Any) -> tuple[Any, Any]:
        lr, key = self.schedule(state["count"]), jax.random.fold_in(jax.random.key(0), state["count"])
        leaves, treedef = jax.tree.flatten(mean)
        draws = [jax.random.rademacher(jax.random.fold_in(key, i), x.shape, x.dtype) for i, x in enumerate(leaves)]
        votes = treedef.unflatten([jnp.where(x == 0, r, jnp.sign(x)) for x, r in zip(leaves, draws, strict=True)])
        params = _descend(params, votes, lr, self.weight_decay)
        return params, state | {"count": state["count"] + 1}


def _sign(x: jax.Array) -> jax.Array:
    return jnp.where(x < 0, -1.0, 1.0).astype(x.dtype)


@dataclass(frozen=True)
class OneBitAdam(Optimizer):
    """1-bit Adam (Tang et al. 2021): plain Adam first, then the variance is frozen, and momentum, which has become a
    linear function of the gradients, is exchanged in one bit with error feedback.

    u_i = β1 m + (1 − β1) g_i is exchanged; m ← mean u_i; θ ← θ − lr (m / (√v + ε) + decay θ). No bias correction, as in
    the paper's code. During the warm-up the same u_i are exchanged in float32, and v follows the gradient they contain.
    """

    frozen: bool = True
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    def init(self, params: Any, replicas: int = 1) -> Any:
        zeros = lambda: jax.tree.map(jnp.zeros_like, params)
        return {"count": jnp.zeros((), jnp.int32), "momentum": zeros(), "variance": zeros()}

    def message(self, grads_R: Any, state: Any) -> tuple[Any, Any]:
        return jax.tree.map(lambda m, g: self.b1 * m + (1 - self.b1) * g, state["momentum"], grads_R), state

    def apply(self, mean: Any, state: Any, params: Any) -> tuple[Any, Any]:
        variance = state["variance"]
        if not self.frozen:
            gradient = jax.tree.map(lambda u, m: (u - self.b1 * m) / (1 - self.b1), mean, state["momentum"])
            variance = jax.tree.map(lambda v, g: self.b2 * v + (1 - self.b2) * g * g, variance, gradient)
        step = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + self.eps), mean, variance)
        params = _descend(params, step, self.schedule(state["count"]), self.weight_decay)
        return params, {"count": state["count"] + 1, "momentum": mean, "variance": variance}


def _descend(params: Any, step: Any, lr: Any, weight_decay: float) -> Any:
    """θ − lr (step + decay θ); biases and norm scales do not decay."""
    move = lambda x, s, decays: x - lr * (s + weight_decay * x if decays and weight_decay else s)
    return jax.tree.map(move, params, step, decays(params))

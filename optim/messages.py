"""Optimizers whose replicas exchange momentum instead of gradients: Signum with majority vote, and 1-bit Adam."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from optim.optimizer import Optimizer, decays


@dataclass(frozen=True)
class Signum(Optimizer):
    """m_i ← β m_i + (1 − β) g_i; every replica votes sign(m_i); θ ← θ − lr (majority + decay θ).

    Bernstein et al. 2018, signSGD with majority vote. Momentum stays with its replica. The votes are ±1, so the codec
    `sign` carries them exactly. Whoever has no momentum, as for the row of a token that never occurs, does not vote,
    and a tie moves nothing.
    """

    constant_size: bool = True
    momentum: float = 0.9
    weight_decay: float = 0.0
    per_replica: ClassVar[tuple[str, ...]] = ("momentum",)

    def init(self, params: Any, replicas: int = 1) -> Any:
        momentum_R = jax.tree.map(lambda x: {"momentum": jnp.zeros((replicas, *x.shape), x.dtype)}, params)
        return momentum_R | {"count": jnp.zeros((), jnp.int32)}

    def message(self, grads_R: Any, state: Any) -> tuple[Any, Any]:
        mix = lambda g, own: self.momentum * own["momentum"] + (1 - self.momentum) * g
        momentum_R = jax.tree.map(mix, grads_R, beside(state))
        opt = jax.tree.map(lambda m: {"momentum": m}, momentum_R) | {"count": state["count"]}
        return jax.tree.map(jnp.sign, momentum_R), opt

    def apply(self, mean: Any, state: Any, params: Any, norm: Any = None) -> tuple[Any, Any]:
        votes = jax.tree.map(jnp.sign, mean)
        params = _descend(params, votes, self.rate(state["count"]), self.weight_decay)
        return params, state | {"count": state["count"] + 1}


def beside(state: Any) -> dict[str, Any]:
    """What lies beside the weights in an optimizer's state: like the parameters, {slot: array} for each."""
    return {name: own for name, own in state.items() if name != "count"}


@dataclass(frozen=True)
class OneBitAdam(Optimizer):
    """1-bit Adam (Tang et al. 2021): plain Adam first, then the variance is frozen, and momentum, which has become a
    linear function of the gradients, is exchanged in one bit with error feedback.

    u_i = β1 m + (1 − β1) g_i is exchanged; m ← mean u_i; θ ← θ − lr (m / (√v + ε) + decay θ). No bias correction, as in
    the paper's code. During the warm-up the same u_i are exchanged in float32, and v follows the gradient they contain.

    Where v is 0 when it is frozen there was no gradient (the row of a token that did not occur): there m is masked, as
    by `exp_avg_mask` in the paper's code. Divided by ε, what a codec makes of its zeros would be the largest step.
    """

    frozen: bool = True
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0

    def init(self, params: Any, replicas: int = 1) -> Any:
        zeros = jax.tree.map(lambda x: {"first": jnp.zeros_like(x), "second": jnp.zeros_like(x)}, params)
        return zeros | {"count": jnp.zeros((), jnp.int32)}

    def message(self, grads_R: Any, state: Any) -> tuple[Any, Any]:
        return jax.tree.map(lambda g, own: self.b1 * own["first"] + (1 - self.b1) * g, grads_R, beside(state)), state

    def apply(self, mean: Any, state: Any, params: Any, norm: Any = None) -> tuple[Any, Any]:
        def slots(u: jax.Array, own: dict[str, jax.Array]) -> dict[str, jax.Array]:
            if self.frozen:
                return {"first": jnp.where(own["second"] > 0, u, 0), "second": own["second"]}
            gradient = (u - self.b1 * own["first"]) / (1 - self.b1)
            return {"first": u, "second": self.b2 * own["second"] + (1 - self.b2) * gradient * gradient}

        new = jax.tree.map(slots, mean, beside(state))
        step = jax.tree.map(lambda _, own: own["first"] / (jnp.sqrt(own["second"]) + self.eps), params, new)
        params = _descend(params, step, self.rate(state["count"]), self.weight_decay)
        return params, new | {"count": state["count"] + 1}


def _descend(params: Any, step: Any, lr: Any, weight_decay: float) -> Any:
    """θ − lr (step + decay θ); biases and norm scales do not decay."""
    move = lambda x, s, decays: x - lr * (s + weight_decay * x if decays and weight_decay else s)
    return jax.tree.map(move, params, step, decays(params))

"""The gradient in two halves, so that both hops of an exchange run while something is computed."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from parallel.strategies.base import Batch, Strategy, part


def loss_and_gradient(strategy: Strategy, params: Any, batch_BT: Batch, between: Any) -> tuple[tuple, Any, Any]:
    """strategy.loss_and_gradient of one replica, and `between`, tied to its middle: what makes it may run during the
    first half, what uses it during the second. Halves are those of the micro-steps, or, if there is only one, or stages
    through which all go together, the forward and the backward pass. Without the barriers a compiler may wait for
    `between` before it computes anything.
    """
    batch_ABT, half = strategy.micro_batches(batch_BT), strategy.accumulate // 2
    if half and not strategy.pipelined:
        total = strategy.add_micro_steps(params, part(batch_ABT, 0, half), None)
        rest = part(batch_ABT, half, strategy.accumulate)  # in the barrier: else its forward pass would join the first
        between, total, rest = lax.optimization_barrier((between, total, rest))
        return *strategy.add_micro_steps(params, rest, total), between
    loss, backward, beside = jax.vjp(lambda params: strategy.loss(params, batch_BT), params, has_aux=True)
    between, loss, cotangent = lax.optimization_barrier((between, loss, jnp.ones_like(loss)))
    return (loss, *beside), strategy.constrain_to_specs(backward(cotangent)[0]), between

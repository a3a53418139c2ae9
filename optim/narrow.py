"""Moments of an optimizer in bfloat16: half of their memory."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from optim.optimizer import Optimizer

NARROW = jnp.bfloat16
CUT = 16  # bits of a float32 that bfloat16 has not


@dataclass(frozen=True)
class Narrow(Optimizer):
    """They are rounded to one of the two nearest values, each as likely as it is near (stochastic rounding; Gupta et
    al. 2015, eq. 2): on average nothing is lost, where rounding to the nearest would leave a second moment as it is
    once its steps, of 1 − β2 and less, are below half a digit. What is drawn depends on the step and the array alone:
    a run that goes on draws the same, on any mesh."""

    def init(self, params: Any, replicas: int = 1) -> Any:
        return _moments(lambda _, x: x.astype(NARROW), super().init(params))

    def apply(self, mean: Any, state: Any, params: Any, norm: jax.Array | None = None) -> tuple[Any, Any]:
        key = jax.random.fold_in(jax.random.key(0), state["count"])
        params, new = super().apply(mean, _moments(lambda _, x: x.astype(jnp.float32), state), params, norm)
        return params, _moments(lambda i, x: rounded(x, jax.random.fold_in(key, i)), new)


def rounded(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 to bfloat16. What is not finite stays what it is."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits += jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    up = jax.lax.bitcast_convert_type(bits >> CUT << CUT, jnp.float32)
    return jnp.where(jnp.isfinite(x), up, x).astype(NARROW)


def _moments(f: Any, state: Any) -> Any:
    """f(place among the arrays, array) of each that is no count."""
    leaves, form = jax.tree.flatten(state)
    of = lambda i, x: f(i, x) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return jax.tree.unflatten(form, [of(i, x) for i, x in enumerate(leaves)])

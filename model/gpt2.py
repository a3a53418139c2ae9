"""The parts of GPT-2's blocks that later models have replaced.

B batch, T sequence, D model, F feed-forward.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import normal, ones, zeros

from model.layers import HIDDEN, Weights


class LayerNorm(nnx.Module):
    """(x − mean) / sqrt(var + eps) · scale + bias (Ba et al. 2016)."""

    def __init__(self, c, key: jax.Array, size: int, axis: str):
        self.eps = c.norm_eps
        self.scale = Weights(key)("scale", (size,), (axis,), ones)
        self.bias = Weights(key)("bias", (size,), (axis,), zeros)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.promote_types(jnp.float32, x.dtype))
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        scale, bias = (jnp.expand_dims(w[...], range(x.ndim - 1)) for w in (self.scale, self.bias))
        return (y * scale + bias.astype(y.dtype)).astype(x.dtype)


class GELU(nnx.Module):
    """down(gelu(up x)), with GPT-2's tanh approximation and biases."""

    def __init__(self, c, key: jax.Array):
        D, F, weight = c.model_dim, c.mlp_dim, Weights(key)
        self.up = weight("up", (D, F), ("embed", "mlp"), normal(c.init_std))
        self.up_bias = weight("up_bias", (F,), ("mlp",), zeros) if c.bias == "all" else None
        self.down = weight("down", (F, D), ("mlp", "embed"), normal(c.init_std / math.sqrt(2 * c.depth)))
        self.down_bias = weight("down_bias", (D,), ("embed",), zeros) if c.bias == "all" else None

    def __call__(self, x_BTD: jax.Array, ctx) -> tuple[jax.Array, None]:
        h_BTF = x_BTD @ self.up[...]
        if self.up_bias is not None:
            h_BTF = h_BTF + self.up_bias[None, None]
        h_BTF = checkpoint_name(ctx.constrain(h_BTF, HIDDEN), "hidden")
        y_BTD = jnp.dot(jax.nn.gelu(h_BTF, approximate=True), self.down[...])
        return y_BTD if self.down_bias is None else y_BTD + self.down_bias[None, None], None

"""The small parts: how a weight is declared, norms, and the feed-forward half of a block.

B batch, T sequence, D model, F feed-forward.
"""

import math
import zlib

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import Initializer, normal, ones

HIDDEN = ("batch", "positions", "mlp")


class Weights:
    """Makes the weights of one module, each from a key of its own, which depends on its name alone: so adding a weight,
    or reordering two lines, leaves every other weight's initial value as it was."""

    def __init__(self, key: jax.Array):
        self.key = key

    def __call__(self, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], init: Initializer) -> nnx.Param:
        assert len(shape) == len(axes), (name, shape, axes)
        # Our own metadata key: nnx's `sharding` raises unless a mesh with those very names is in scope.
        return nnx.Param(init(self.sub(name), shape, jnp.dtype("float32")), axes=axes)

    def sub(self, name: str) -> jax.Array:
        """The key of the weight or sub-module called `name`."""
        return jax.random.fold_in(self.key, zlib.crc32(name.encode()))


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x²) + eps) · scale (Zhang & Sennrich 2019, eq. 4), in float32 at least, as all norms."""

    def __init__(self, c, key: jax.Array, size: int, axis: str):
        self.eps = c.norm_eps
        self.scale = Weights(key)("scale", (size,), (axis,), ones)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.promote_types(jnp.float32, x.dtype))
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * jnp.expand_dims(self.scale[...], range(x.ndim - 1))).astype(x.dtype)


class SwiGLU(nnx.Module):
    """down(silu(gate x) · up x) (Shazeer 2020, eq. 6): Llama, Qwen."""

    def __init__(self, c, key: jax.Array, size: int = 0):
        D, F, weight = c.model_dim, size or c.mlp_dim, Weights(key)
        self.gate = weight("gate", (D, F), ("embed", "mlp"), normal(c.init_std))
        self.up = weight("up", (D, F), ("embed", "mlp"), normal(c.init_std))
        self.down = weight("down", (F, D), ("mlp", "embed"), normal(c.init_std / math.sqrt(2 * c.depth)))

    def __call__(self, x_BTD: jax.Array, ctx) -> tuple[jax.Array, None]:
        gate_BTF = checkpoint_name(ctx.constrain(x_BTD @ self.gate[...], HIDDEN), "hidden")
        up_BTF = checkpoint_name(ctx.constrain(x_BTD @ self.up[...], HIDDEN), "hidden")
        return (jax.nn.silu(gate_BTF) * up_BTF) @ self.down[...], None

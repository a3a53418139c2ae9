"""Causal grouped-query attention: one module, kernels of the same mathematics (the fused ones in model/kernels.py).

B batch, T query positions, S key positions, D model, H query heads, G key/value heads, M = H / G, K head size.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import normal, zeros

from model import kernels
from model.kernels import HEADS, KV_HEADS
from model.layers import RMSNorm, Weights


class Attention(nnx.Module):
    def __init__(self, c, key: jax.Array):
        self.c = c
        D, H, G, K = c.model_dim, c.num_heads, c.num_kv_heads, c.head_dim
        weight, std = Weights(key), c.init_std
        out_std = std / math.sqrt(2 * c.depth)  # GPT-2: the residual stream sums 2 L outputs
        self.q = weight("q", (D, H, K), ("embed", "heads", "head_dim"), normal(std))
        self.k = weight("k", (D, G, K), ("embed", "kv_heads", "head_dim"), normal(std))
        self.v = weight("v", (D, G, K), ("embed", "kv_heads", "head_dim"), normal(std))
        self.out = weight("out", (H, K, D), ("heads", "head_dim", "embed"), normal(out_std))
        if c.bias != "none":
            self.q_bias = weight("q_bias", (H, K), ("heads", "head_dim"), zeros)
            self.k_bias = weight("k_bias", (G, K), ("kv_heads", "head_dim"), zeros)
            self.v_bias = weight("v_bias", (G, K), ("kv_heads", "head_dim"), zeros)
        if c.bias == "all":
            self.out_bias = weight("out_bias", (D,), ("embed",), zeros)
        if c.qk_norm:
            self.q_norm = RMSNorm(c, weight.sub("q_norm"), K, "norm")
            self.k_norm = RMSNorm(c, weight.sub("k_norm"), K, "norm")

    def __call__(self, x_BTD: jax.Array, ctx) -> tuple[jax.Array, None]:
        q_BTHK = jnp.einsum("btd,dhk->bthk", x_BTD, self.q[...])
        k_BSGK = jnp.einsum("bsd,dgk->bsgk", x_BTD, self.k[...])
        v_BSGK = jnp.einsum("bsd,dgk->bsgk", x_BTD, self.v[...])
        if self.c.bias != "none":
            q_BTHK = q_BTHK + self.q_bias[None, None]
            k_BSGK = k_BSGK + self.k_bias[None, None]
            v_BSGK = v_BSGK + self.v_bias[None, None]
        if self.c.qk_norm:
            q_BTHK, k_BSGK = self.q_norm(q_BTHK), self.k_norm(k_BSGK)
        if ctx.rope is not None:
            q_BTHK, k_BSGK = rotate(q_BTHK, *ctx.rope), rotate(k_BSGK, *ctx.rope)
        q_BTHK = checkpoint_name(ctx.constrain(q_BTHK, HEADS), "qkv")
        k_BSGK = checkpoint_name(ctx.constrain(k_BSGK, KV_HEADS), "qkv")
        v_BSGK = checkpoint_name(ctx.constrain(v_BSGK, KV_HEADS), "qkv")
        window = self.c.sliding_window or None
        y_BTHK = ctx.attention(q_BTHK, k_BSGK, v_BSGK, ctx.segments_BT, window, ctx.constrain)
        y_BTD = jnp.einsum("bthk,hkd->btd", ctx.constrain(y_BTHK, HEADS), self.out[...])
        return y_BTD + self.out_bias[None, None] if self.c.bias == "all" else y_BTD, None


def rope_tables(positions_BT: jax.Array, head_dim: int, theta: float, scaling) -> tuple[jax.Array, jax.Array]:
    """cos and sin [B, T, 1, K/2], float32, of rotary position embedding (RoFormer, eq. 15). `scaling` stretches the
    long wavelengths as Llama 3.1 does: None, or an object with factor, low_freq_factor, high_freq_factor and
    original_max_len. Wavelengths above original/low are divided by `factor`, those below original/high are kept, and
    those between are interpolated."""
    dtype = jnp.promote_types(jnp.float32, jnp.result_type(float))
    freq_K = theta ** (-jnp.arange(0, head_dim, 2, dtype=dtype) / head_dim)
    if scaling is not None:
        turns_K = scaling.original_max_len * freq_K / (2 * math.pi)
        smooth_K = (turns_K - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        smooth_K = jnp.clip(smooth_K, 0, 1)
        freq_K = freq_K * (smooth_K + (1 - smooth_K) / scaling.factor)
    angle_BT1K = positions_BT[:, :, None, None].astype(dtype) * freq_K[None, None, None, :]
    return jnp.cos(angle_BT1K), jnp.sin(angle_BT1K)


def rotate(x_BTHK: jax.Array, cos_BT1K: jax.Array, sin_BT1K: jax.Array) -> jax.Array:
    """Rotates the pairs (x[i], x[i + K/2]): the layout of Llama and Hugging Face, not the interleaved one."""
    a, b = jnp.split(x_BTHK.astype(cos_BT1K.dtype), 2, axis=-1)
    y = jnp.concatenate([a * cos_BT1K - b * sin_BT1K, b * cos_BT1K + a * sin_BT1K], axis=-1)
    return y.astype(x_BTHK.dtype)


def reference(q_BTHK, k_BSGK, v_BSGK, segments_BT, window, constrain) -> jax.Array:
    """softmax(q k^T / sqrt(K) + mask) v, plainly: holds the B×H×T×S scores, and is what other kernels are held to."""
    B, T, H, K = q_BTHK.shape
    G = k_BSGK.shape[2]
    q_BTGMK = q_BTHK.reshape(B, T, G, H // G, K)
    dtype = jnp.promote_types(jnp.float32, q_BTHK.dtype)
    scores = jnp.einsum("btgmk,bsgk->bgmts", q_BTGMK, k_BSGK, preferred_element_type=dtype) / math.sqrt(K)
    distance_TS = jnp.arange(T)[:, None] - jnp.arange(T)[None, :]
    visible_TS = distance_TS >= 0
    if window is not None:
        visible_TS &= distance_TS < window
    visible = visible_TS[None, None, None]
    if segments_BT is not None:
        visible &= (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, jnp.finfo(dtype).min), axis=-1)
    y = jnp.einsum("bgmts,bsgk->btgmk", weights.astype(v_BSGK.dtype), v_BSGK)
    return y.reshape(B, T, H, K)


KERNELS = {"cudnn": kernels.cudnn, "splash": kernels.splash, "reference": reference}

"""Cross-entropy that never holds the B×T×V logits.

The forward pass walks over chunks of tokens; when a gradient is wanted it forms each chunk's gradient at once, while
the chunk's logits are at hand, so nothing is computed twice. Each device works on its own shard (`constrain.manual`),
so the gradient of the head crosses the mesh once, not once per chunk.

B batch, T sequence, D model, V vocabulary, N tokens of one device, C tokens of one chunk.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

FEATURES = ("rows", "positions", None)
RESIDUAL = ("rows", "sequence", None)
TOKENS = ("rows", "positions")
HEAD = (None, "vocab")


def cross_entropy(
    x_BTD: jax.Array,
    head_DV: jax.Array,
    targets_BT: jax.Array,
    mask_BT: jax.Array,
    constrain,
    *,
    z_loss: float,
    chunk_bytes: int,
) -> jax.Array:
    """Σ mask · (logsumexp(x·head) − (x·head)[target] + z_loss · logsumexp²), a scalar of at least float32. chunk_bytes
    bounds the float32 logits that one device holds at a time. The z-loss term (PaLM, §5) is 0 when unused. The mask is
    data: its gradient is not taken."""
    run = partial(_forward, constrain=constrain, z_loss=z_loss, chunk_bytes=chunk_bytes)

    @jax.custom_vjp
    def total(x_BTD, head_DV, targets_BT, mask_BT):
        return run(x_BTD, head_DV, targets_BT, mask_BT, with_gradient=False)[0]

    def forward(x_BTD, head_DV, targets_BT, mask_BT):
        loss, dx_BTD, dhead_DV = run(x_BTD, head_DV, targets_BT, mask_BT, with_gradient=True)
        return loss, (dx_BTD, dhead_DV)

    def backward(residual, cotangent):
        dx_BTD, dhead_DV = residual
        dx_BTD = (dx_BTD * cotangent.astype(dx_BTD.dtype)).astype(x_BTD.dtype)
        return dx_BTD, (dhead_DV * cotangent).astype(head_DV.dtype), None, None

    total.defvjp(forward, backward)
    return total(x_BTD, head_DV, targets_BT, mask_BT)


def _forward(x_BTD, head_DV, targets_BT, mask_BT, constrain, z_loss, chunk_bytes, with_gradient):
    local = partial(_local, constrain=constrain, z_loss=z_loss, chunk_bytes=chunk_bytes, with_gradient=with_gradient)
    # Partial sums: the loss over tokens; dx over the vocabulary; dhead over tokens.
    run = constrain.manual(
        local,
        (FEATURES, HEAD, TOKENS, TOKENS),
        ((), RESIDUAL, ("embed", "vocab")) if with_gradient else ((),),
        sums=("token", "vocab", "token") if with_gradient else ("token",),
    )
    return run(x_BTD, head_DV, targets_BT, mask_BT)


def _local(x_BTD, head_DV, targets_BT, mask_BT, constrain, z_loss, chunk_bytes, with_gradient):
    """One device's tokens against its slice of the vocabulary."""
    (B, T, D), V = x_BTD.shape, head_DV.shape[1]
    dtype = jnp.promote_types(jnp.float32, x_BTD.dtype)
    chunks = max(1, -(-B * T * V * jnp.dtype(dtype).itemsize // chunk_bytes))
    C = -(-B * T // chunks)

    def split(a: jax.Array) -> jax.Array:
        """[B, T, …] -> [chunks, C, …], padded with zeros: a padded token has mask 0."""
        a = a.reshape(B * T, *a.shape[2:])
        return jnp.pad(a, [(0, chunks * C - B * T), *[(0, 0)] * (a.ndim - 1)]).reshape(chunks, C, *a.shape[1:])

    first = constrain.index("vocab") * V  # the first token id of this device's slice

    def chunk(carry, inputs) -> tuple[Any, Any]:
        loss, dhead_DV = carry
        x_CD, targets_C, mask_C = inputs
        logits_CV = jnp.dot(x_CD, head_DV, preferred_element_type=dtype)
        peak_C = constrain.max(jnp.max(logits_CV, axis=1), "vocab")
        exp_CV = jnp.exp(logits_CV - peak_C[:, None])
        sum_C = constrain.sum(jnp.sum(exp_CV, axis=1), "vocab")
        lse_C = jnp.log(sum_C) + peak_C
        hit_CV = targets_C[:, None] - first == jnp.arange(V)[None, :]
        target_C = constrain.sum(jnp.sum(jnp.where(hit_CV, logits_CV, 0), axis=1), "vocab")
        mask_C = mask_C.astype(dtype)
        loss = loss + jnp.sum(mask_C * (lse_C - target_C + z_loss * lse_C**2))
        if not with_gradient:
            return (loss, dhead_DV), None
        softmax_CV = exp_CV * (mask_C * (1 + 2 * z_loss * lse_C) / sum_C)[:, None]
        dlogits_CV = (softmax_CV - jnp.where(hit_CV, mask_C[:, None], 0)).astype(x_CD.dtype)
        dx_CD = jnp.dot(dlogits_CV, head_DV.T, preferred_element_type=dtype)
        dhead_DV = dhead_DV + jnp.dot(x_CD.T, dlogits_CV, preferred_element_type=dtype)
        return (loss, dhead_DV), dx_CD.astype(x_CD.dtype)

    zero = jnp.zeros((), dtype), jnp.zeros((D, V) if with_gradient else (), dtype)
    inputs = split(x_BTD), split(targets_BT), split(mask_BT)
    if chunks == 1:  # a loop of one would only hide the shapes from XLA's fusion
        carry, dx = chunk(zero, jax.tree.map(lambda a: a[0], inputs))
    else:
        carry, dx = jax.lax.scan(chunk, zero, inputs)
    loss, dhead_DV = carry[0], carry[1].astype(head_DV.dtype)  # before it crosses the mesh, as all gradients do
    return (loss, dx.reshape(-1, D)[: B * T].reshape(B, T, D), dhead_DV) if with_gradient else (loss,)

"""One product of attention (model/products.py) by the fused kernels of GPUs and TPUs.

Their forward passes give the log-sum-exp. Their backward passes are taken by themselves, for those that JAX would take
belong to a whole attention: they drop the cotangent of the log-sum-exp, or refuse it. These are not public, and `check`
compares them with plain products before a run trusts them.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from model.products import PLAIN, Products

INTERPRET = False  # splash attention on a CPU, to see that it is right
ENOUGH = 0.02  # of a gradient's norm: what bfloat16 leaves is a tenth of it, and another mathematics ten times as much

# ── cuDNN ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _cudnn(q_BTHK, k_BSGK, v_BSGK, own: bool, **how: Any) -> Any:
    return jax.nn.dot_product_attention(q_BTHK, k_BSGK, v_BSGK, is_causal=own, implementation="cudnn", **how)


def _cudnn_forward(queries: Any, keys: Any, window: int | None, own: bool) -> tuple[jax.Array, jax.Array]:
    (q,), (k, v) = queries.arrays, keys.arrays
    y, lse = _cudnn(q, k, v, own, return_residual=True)
    return y.astype(jnp.float32), lse


def _cudnn_gradient(queries: Any, keys: Any, window: int | None, own: bool) -> tuple[jax.Array, ...]:
    (q, y, lse, dy), (k, v) = queries.arrays, keys.arrays
    attend = lambda q, k, v: _cudnn(q, k, v, own)
    call = _backward_call(jax.make_jaxpr(lambda q, k, v, dy: jax.vjp(attend, q, k, v)[1](dy))(q, k, v, dy).jaxpr)
    shapes = [x.aval for x in call.invars]
    given = [jnp.zeros(x.shape, x.dtype) for x in shapes]
    # Queries, keys and values come first; last the forward pass's statistics and result, and the cotangent.
    statistics = next(i for i, x in enumerate(shapes) if x.dtype == jnp.float32 and math.prod(x.shape) == lse.size)
    lse = lse if shapes[statistics].shape == lse.shape else lse.swapaxes(1, 2)
    given[:3], given[statistics : statistics + 3] = (q, k, v), (lse, y, dy)
    dq, dk, dv = call.primitive.bind(*given, **call.params)[:3]
    return tuple(x.astype(jnp.float32) for x in (dq, dk, dv))


def _backward_call(jaxpr: Any) -> Any:
    """The equation of cuDNN's backward pass."""
    for equation in jaxpr.eqns:
        if "dot_product_attention_bwd" in equation.primitive.name:
            return equation
        for inner in equation.params.values():
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns") and (found := _backward_call(inner)):
                return found
    return None


# ── splash attention ─────────────────────────────────────────────────────────────────────────────────────────────────


def _splash(own: bool, T: int, S: int, heads: int, save_residuals: bool) -> tuple[Any, Any]:
    """(its module, a kernel for all heads)."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    mask = masks.CausalMask((T, S)) if own else masks.FullMask((T, S))
    largest = lambda size, most: next(n for n in (most, 512, 256, 128) if size % n == 0)
    q, kv, at_once = largest(T, 512), largest(S, 1024), largest(S, 512)
    sizes = kernel.BlockSizes(
        block_q=q, block_kv=kv, block_kv_compute=at_once, block_q_dkv=q, block_kv_dkv=kv, block_kv_dkv_compute=at_once,
        block_q_dq=q, block_kv_dq=kv,
    )  # fmt: skip
    made = kernel.make_splash_mha(
        masks.MultiHeadMask([mask] * heads), head_shards=1, q_seq_shards=1, save_residuals=save_residuals,
        block_sizes=sizes, interpret=INTERPRET,
    )  # fmt: skip
    return kernel, made


def _by_head(x: jax.Array) -> jax.Array:
    """[B, T, H, K] -> [B, H, T, K], or back."""
    return x.swapaxes(1, 2)


def _splash_forward(queries: Any, keys: Any, window: int | None, own: bool) -> tuple[jax.Array, jax.Array]:
    (q,), (k, v) = queries.arrays, keys.arrays
    _, kernel = _splash(own, q.shape[1], k.shape[1], q.shape[2], save_residuals=True)
    y, kept = jax.vmap(kernel)(_by_head(q / math.sqrt(q.shape[-1])), _by_head(k), _by_head(v))
    lse = kept[0] if isinstance(kept, (tuple, list)) else kept["logsumexp"]
    return _by_head(y).astype(jnp.float32), lse.swapaxes(1, 2)


def _splash_gradient(queries: Any, keys: Any, window: int | None, own: bool) -> tuple[jax.Array, ...]:
    (q, y, lse, dy), (k, v), scale = queries.arrays, keys.arrays, 1 / math.sqrt(queries.arrays[0].shape[-1])
    module, kernel = _splash(own, q.shape[1], k.shape[1], q.shape[2], save_residuals=False)
    how = kernel.kwargs
    fixed = (False, how["mask_value"], False, how["block_sizes"], None, how["mask_function"], None, INTERPRET)

    def one(q, k, v, y, lse, dy) -> tuple[jax.Array, ...]:
        kept = (q, k, v, None, None, y, lse, kernel.dq_mask_info, kernel.dkv_mask_info)
        return module._splash_attention_bwd(*fixed, kept, dy)[3:6]

    arrays = _by_head(q * scale), _by_head(k), _by_head(v), _by_head(y), lse.swapaxes(1, 2), _by_head(dy)
    dq, dk, dv = (_by_head(x).astype(jnp.float32) for x in jax.vmap(one)(*arrays))
    return dq * scale, dk, dv


PRODUCTS = {
    "reference": PLAIN,
    "cudnn": Products(_cudnn_forward, _cudnn_gradient),
    "splash": Products(_splash_forward, _splash_gradient),
}


# ── whether they are what they are taken for ─────────────────────────────────────────────────────────────────────────


def check(name: str, heads: int, kv_heads: int, head_dim: int, dtype: Any, side: Any) -> str:
    """What is wrong with a kernel's products on this device, against plain ones; "": nothing. side: makes queries or
    keys of (arrays, numbers, ids). A few milliseconds, and two programs to compile."""
    B, T = 1, 256
    draw = lambda i, n: jax.random.normal(jax.random.key(i), (B, T, n, head_dim), jnp.float32).astype(dtype)
    q, k, v, dy = draw(0, heads), draw(1, kv_heads), draw(2, kv_heads), draw(3, heads)
    numbers = lambda first: jnp.broadcast_to(jnp.arange(first, first + T), (B, T))

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(products: Products) -> tuple:
        """Of queries that see half of all keys in a product of their own, and all of the others in another."""
        sides = [(side((k, v), numbers(T), None), True), (side((v, k), numbers(0), None), False)]
        parts = [products.forward(side((q,), numbers(T), None), keys, None, own) for keys, own in sides]
        (y1, lse1), (y2, lse2) = parts
        lse = jnp.logaddexp(lse1, lse2)
        y = (y1 * jnp.exp(lse1 - lse)[..., None] + y2 * jnp.exp(lse2 - lse)[..., None]).astype(dtype)
        queries = side((q, y, lse, dy), numbers(T), None)
        return y, [products.gradient(queries, keys, None, own) for keys, own in sides]

    wanted = jax.tree.leaves(gradients(PLAIN))
    try:
        found = jax.tree.leaves(gradients(PRODUCTS[name]))
    except Exception as error:  # of whatever type: what is not public may have moved
        return f"its passes cannot be taken by themselves ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    names = ["y", *(f"d{x} of the {which} product" for which in ("own", "other") for x in "qkv")]
    for what, ours, theirs in zip(names, found, wanted, strict=True):
        off = jnp.linalg.norm((ours - theirs).astype(jnp.float32)) / jnp.linalg.norm(theirs.astype(jnp.float32))
        if not off <= ENOUGH:
            return f"{what} is {float(off):.0%} off"
    return ""

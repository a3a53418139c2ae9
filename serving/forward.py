"""The model's forward pass for decoding: the mathematics of model/transformer.py with keys and values kept, written for
one device's part of the weights (serving/weights.py) and of the rows.

A row's bits depend on that row alone, and not on how many there are: a product of rows with [out, in] weights adds in
the same order for any number of rows from 8 on, and a norm's sums are such products, too, or trees of elementwise
additions, which no compiler orders anew. Which numbers of rows agree is seen at start (serving/ladder.py).

N rows (slots, or positions of one prompt), D model, H query heads of this device, G key/value heads of it, M = H / G,
K head size, S positions kept.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from model.attention import rope_tables, rotate
from model.config import ModelConfig
from model.moe import route
from parallel.layout.axes import EXPERT

# XLA:CPU multiplies one row with transposed weights at a third of the rate since then, and at a higher one before.
WEIGHTS_FIRST = jax.__version_info__ >= (0, 11)
GROUP = 16  # rows that XLA:CPU multiplies at once: of more, it adds in another order
FEW = 4 * GROUP  # rows, up to which a product waits for the weights to arrive
QUERIES = 256  # of a prompt, whose scores are held at a time
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


def tree_sum(x: jax.Array) -> jax.Array:
    """The sum over the last dimension, of elementwise additions, which no compiler orders anew for another N."""
    size = 1 << (x.shape[-1] - 1).bit_length()
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, size - x.shape[-1])])
    while size > 1:
        size //= 2
        x = x[..., :size] + x[..., size:]
    return x[..., 0]


def row_sum(x: jax.Array) -> jax.Array:
    """The sum over the last dimension. XLA:CPU takes 30 times as long for a tree as for a product with ones, of whose
    eight columns one is taken: for a single one it adds otherwise."""
    product = lambda x: jnp.matmul(x, jnp.ones((x.shape[-1], 8), x.dtype))[..., 0]
    return lax.platform_dependent(x, cpu=product, default=tree_sum)


def norm(c: ModelConfig, weights: Any, name: str, x: jax.Array, kind: str = "") -> jax.Array:
    """As RMSNorm and LayerNorm of model/layers.py."""
    y = x.astype(jnp.float32)
    if (kind or c.norm) == "layer":
        y = y - (row_sum(y) / y.shape[-1])[..., None]
    y = y * lax.rsqrt(row_sum(y * y) / y.shape[-1] + c.norm_eps)[..., None] * weights[name]
    bias = weights.get(f"{name}_bias")
    return (y if bias is None else y + bias.astype(y.dtype)).astype(x.dtype)


def embedded(c: ModelConfig, weights: Any, tokens_N: jax.Array, positions_N: jax.Array) -> jax.Array:
    """x [N, D]; the vocabulary is cut over `tensor`."""
    table_VD = weights["embed"]
    ids_N = tokens_N - lax.axis_index("tensor") * table_VD.shape[0]
    own_N = (ids_N >= 0) & (ids_N < table_VD.shape[0])
    x_ND = _over_tensor(jnp.where(own_N[:, None], table_VD[jnp.where(own_N, ids_N, 0)], 0))
    return x_ND + weights["position"][positions_N] if c.position == "learned" else x_ND


def _times(x_NI: jax.Array, w_EI: jax.Array, dtype: Any = None, precision: Any = None) -> jax.Array:
    """[N, E] in this dtype, of rows and weights [out, in]. XLA:CPU takes two thirds of the time for a few rows if the
    weights stand first; without the barrier it turns the product round again."""
    product = partial(jnp.matmul, preferred_element_type=dtype, precision=precision)
    rows_first = lambda x_NI, w_EI: product(x_NI, w_EI.T)
    weights_first = lambda x_NI, w_EI: lax.optimization_barrier(product(w_EI, x_NI.T)).T

    def in_groups(x_NI: jax.Array, w_EI: jax.Array) -> jax.Array:
        groups = [x_NI[first : first + GROUP] for first in range(0, x_NI.shape[0], GROUP)]
        return jnp.concatenate([weights_first(x_NI, w_EI) for x_NI in groups])

    fewest = 1 if WEIGHTS_FIRST else 2
    on_cpu = in_groups if fewest <= x_NI.shape[0] <= FEW else rows_first
    return lax.platform_dependent(x_NI, w_EI, cpu=on_cpu, default=rows_first)


def _over_tensor(x: jax.Array) -> jax.Array:
    """The sum over devices. XLA:CPU takes its time for one device's, too."""
    return lax.psum(x, "tensor") if lax.axis_size("tensor") > 1 else x


def rope(c: ModelConfig, positions_N: jax.Array) -> Any:
    """cos and sin [N, 1, K/2], or None."""
    if c.position != "rope":
        return None
    return tuple(x[0] for x in rope_tables(positions_N[None], c.head_dim, c.rope_theta, c.rope_scaling))


def block(
    c: ModelConfig, w: Any, x_ND: jax.Array, tables: Any, attend: Attend, apart: bool = False
) -> tuple[jax.Array, Any]:
    """One layer. attend(q [N, H, K], k, v [N, G, K]) -> (y [N, H·K], what it keeps). apart: each device of `expert` has
    rows of its own; else all have the same."""
    h_ND = norm(c, w, "attention_norm", x_ND)
    heads_NE = _plus(_times(h_ND, w["qkv"]), w.get("qkv_bias"))
    heads_NEK = heads_NE.reshape(heads_NE.shape[0], -1, c.head_dim)
    G = heads_NEK.shape[1] // (c.num_heads // c.num_kv_heads + 2)
    q_NHK, k_NGK, v_NGK = jnp.split(heads_NEK, (heads_NEK.shape[1] - 2 * G, heads_NEK.shape[1] - G), axis=1)
    if c.qk_norm:
        q_NHK, k_NGK = norm(c, w, "q_norm", q_NHK, "rms"), norm(c, w, "k_norm", k_NGK, "rms")
    if tables is not None:
        q_NHK, k_NGK = rotate(q_NHK, *tables), rotate(k_NGK, *tables)
    y_NE, kept = attend(q_NHK, k_NGK, v_NGK)
    x_ND = x_ND + _plus(_over_tensor(_times(y_NE, w["out"])), w.get("out_bias"))
    h_ND = norm(c, w, "mlp_norm", x_ND)
    y_ND = _routed(c, w, h_ND, apart) if "router" in w else None
    if "up" in w:  # of all tokens
        shared_ND = _fed_forward(c, h_ND, w["up"], w["down"], w.get("up_bias"))
        y_ND = shared_ND if y_ND is None else y_ND + shared_ND
    assert y_ND is not None
    return x_ND + _plus(_over_tensor(y_ND), w.get("down_bias")), kept


def _fed_forward(c: ModelConfig, x_ND: jax.Array, up_EI: jax.Array, down_EI: jax.Array, bias: Any = None) -> jax.Array:
    h_NF = _plus(_times(x_ND, up_EI), bias)
    if c.mlp == "swiglu":
        gate_NF, up_NF = jnp.split(h_NF, 2, axis=1)
        h_NF = jax.nn.silu(gate_NF) * up_NF
    else:
        h_NF = jax.nn.gelu(h_NF, approximate=True)
    return _times(h_NF, down_EI)


def _routed(c: ModelConfig, w: Any, x_ND: jax.Array, apart: bool) -> jax.Array:
    """Of experts, one after another, in the same order for every row: those that no row has chosen are not read. A
    device of `expert` takes all rows through its own."""
    count, own = lax.axis_size(EXPERT), w["experts_up"].shape[0]
    if count > 1 and apart:
        x_ND = lax.all_gather(x_ND, EXPERT, tiled=True)
    logits_NE = _times(x_ND.astype(jnp.float32), w["router"], precision=lax.Precision.HIGHEST)
    gates_Nk, ids_Nk, _ = route(c.moe, logits_NE, w.get("balance_bias"))

    def add(expert: jax.Array, y_ND: jax.Array) -> jax.Array:
        here_Nk = ids_Nk == lax.axis_index(EXPERT) * own + expert

        def added(y_ND: jax.Array) -> jax.Array:
            these = [
                lax.dynamic_index_in_dim(w[name], expert, keepdims=False) for name in ("experts_up", "experts_down")
            ]
            gates_N1 = jnp.sum(jnp.where(here_Nk, gates_Nk, 0), axis=1, keepdims=True)
            new_ND = y_ND + gates_N1 * _fed_forward(c, x_ND, *these).astype(y_ND.dtype)
            return jnp.where(jnp.any(here_Nk, axis=1, keepdims=True), new_ND, y_ND)

        return lax.cond(jnp.any(here_Nk), added, lambda y_ND: y_ND, y_ND)

    y_ND = lax.fori_loop(0, own, add, jnp.zeros(x_ND.shape, jnp.float32))
    if count > 1:
        y_ND = lax.psum_scatter(y_ND, EXPERT, tiled=True) if apart else lax.psum(y_ND, EXPERT)
    return y_ND.astype(x_ND.dtype)


def _plus(x: jax.Array, bias: jax.Array | None) -> jax.Array:
    return x if bias is None else x + bias


def logits(c: ModelConfig, weights: Any, x_ND: jax.Array) -> jax.Array:
    """[N, V], float32, whole on each device. The vocabulary's rows that a mesh has beyond the model's are not there."""
    x_ND = norm(c, weights, "final_norm", x_ND)
    head_VD = weights["embed" if c.tie_embeddings else "head"]
    own_NV = _times(x_ND, head_VD, jnp.float32)
    return lax.all_gather(own_NV, "tensor", axis=1, tiled=True)


# ── attention ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _weights_of(scores: jax.Array, visible: jax.Array) -> jax.Array:
    """softmax over the last dimension, of what is visible."""
    scores = jnp.where(visible, scores, jnp.finfo(scores.dtype).min)
    e = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    return e / jnp.sum(e, axis=-1, keepdims=True)


def _visible(c: ModelConfig, query: jax.Array, key: jax.Array) -> jax.Array:
    distance = query - key
    return (distance >= 0) & (distance < c.sliding_window) if c.sliding_window else distance >= 0


def cached(c: ModelConfig, keys_NGSK: jax.Array, values_NGSK: jax.Array, positions_N: jax.Array) -> Attend:
    """Each row attends to what is kept for it, up to its position; keeps (keys, values) with its own."""

    def attend(q_NHK: jax.Array, k_NGK: jax.Array, v_NGK: jax.Array) -> tuple[jax.Array, Any]:
        put = jax.vmap(lambda kept_GSK, x_GK, at: lax.dynamic_update_slice(kept_GSK, x_GK[:, None], (0, at, 0)))
        keys, values = put(keys_NGSK, k_NGK, positions_N), put(values_NGSK, v_NGK, positions_N)
        N, G, S, K = keys.shape
        q_NGMK = q_NHK.reshape(N, G, -1, K)
        scores = jnp.einsum("ngmk,ngsk->ngms", q_NGMK, keys, preferred_element_type=jnp.float32) / math.sqrt(K)
        seen_NS = _visible(c, positions_N[:, None], jnp.arange(S)[None])
        share = _weights_of(scores, seen_NS[:, None, None]).astype(values.dtype)
        return jnp.einsum("ngms,ngsk->ngmk", share, values).reshape(N, -1), (keys, values)

    return attend


def causal(c: ModelConfig) -> Attend:
    """Rows are one prompt's positions, from 0 on; keeps its keys and values [G, N, K]."""

    def attend(q_NHK: jax.Array, k_NGK: jax.Array, v_NGK: jax.Array) -> tuple[jax.Array, Any]:
        N, G, K = k_NGK.shape
        k_GNK, v_GNK = k_NGK.swapaxes(0, 1), v_NGK.swapaxes(0, 1)
        size = min(N, QUERIES)
        q_JGMQK = q_NHK.reshape(-1, size, G, q_NHK.shape[1] // G, K).transpose(0, 2, 3, 1, 4)

        def some(x: tuple) -> jax.Array:
            first, q_GMQK = x
            scores = jnp.einsum("gmqk,gnk->gmqn", q_GMQK, k_GNK, preferred_element_type=jnp.float32) / math.sqrt(K)
            seen_QN = _visible(c, first + jnp.arange(size)[:, None], jnp.arange(N)[None])
            share = _weights_of(scores, seen_QN[None, None]).astype(v_GNK.dtype)
            return jnp.einsum("gmqn,gnk->qgmk", share, v_GNK).reshape(size, -1)

        firsts_J = jnp.arange(0, N, size)
        return lax.map(some, (firsts_J, q_JGMQK)).reshape(N, -1), (k_GNK, v_GNK)

    return attend

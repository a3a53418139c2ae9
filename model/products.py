"""One product of attention among several whose results are merged (parallel/layout/ring.py): some queries with some
keys, and the log-sum-exp beside it. Its backward pass is given that of all keys, so that it finds parts of the whole
gradient.

A side is queries or keys: arrays [B, T, …], the numbers of their positions and of their documents, or None, [B, T].

B batch, T query positions, S key positions, H query heads, G key/value heads, M = H / G, K head size.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

HIDDEN = -1e30  # a score of what is not seen; of the sum of nothing else the logarithm is as good as −∞
SCORES = 2**28  # bytes of scores at a time


class Products(NamedTuple):
    """forward((q), (k, v), window, own) -> (y [B, T, H, K], log-sum-exp [B, T, H]).
    gradient((q, y, lse, dy), (k, v), window, own) -> (dq, dk, dv).
    All of float32 at least. own: queries and keys are of the same positions; else queries are after all keys, but for
    what the numbers of a window, or of documents, hide."""

    forward: Callable[[Any, Any, int | None, bool], tuple[jax.Array, jax.Array]]
    gradient: Callable[[Any, Any, int | None, bool], tuple[jax.Array, ...]]


def forward(queries: Any, keys: Any, window: int | None, own: bool) -> tuple[jax.Array, jax.Array]:
    def part(_: Any, queries: Any) -> tuple[Any, tuple]:
        (q,), (_, v) = queries.arrays, keys.arrays
        scores_BGMTS = _scores(queries, keys, window)
        lse_BGMT = jax.nn.logsumexp(scores_BGMTS, axis=-1)
        weights = jnp.exp(scores_BGMTS - lse_BGMT[..., None]).astype(v.dtype)
        y_BTGMK = _product(q)("bgmts,bsgk->btgmk", weights, v)
        return None, (y_BTGMK.reshape(q.shape), jnp.moveaxis(lse_BGMT, 3, 1).reshape(q.shape[:3]))

    return _in_parts(part, None, queries, keys)[1]


def gradient(queries: Any, keys: Any, window: int | None, own: bool) -> tuple[jax.Array, ...]:
    def part(sums: tuple, queries: Any) -> tuple[tuple, jax.Array]:
        (q, y, lse, dy), (k, v), product = queries.arrays, keys.arrays, _product(queries.arrays[0])
        delta = jnp.sum(y.astype(_dtype(q)) * dy.astype(_dtype(q)), axis=-1)
        by_group = lambda x_BTH: jnp.moveaxis(_grouped(x_BTH, k), 1, 3)[..., None]
        weights = jnp.exp(_scores(queries, keys, window) - by_group(lse))
        dy_BTGMK = _grouped(dy, k)
        dv = product("bgmts,btgmk->bsgk", weights.astype(dy.dtype), dy_BTGMK)
        dweights = product("btgmk,bsgk->bgmts", dy_BTGMK, v)
        dscores = (weights * (dweights - by_group(delta)) / math.sqrt(q.shape[-1])).astype(q.dtype)
        dq = product("bgmts,bsgk->btgmk", dscores, k).reshape(q.shape)
        dk = product("bgmts,btgmk->bsgk", dscores, _grouped(q, k))
        return (sums[0] + dk, sums[1] + dv), dq

    zeros = tuple(jnp.zeros(x.shape, _dtype(x)) for x in keys.arrays)
    (dk, dv), dq = _in_parts(part, zeros, queries, keys)
    return dq, dk, dv


PLAIN = Products(forward, gradient)


def _in_parts(part: Callable, carry: Any, queries: Any, keys: Any) -> tuple[Any, Any]:
    """part(carry, queries) -> (carry, results [B, T, …]), of as many queries at a time as SCORES allows."""
    (B, T, H, _), S = queries.arrays[0].shape, keys.arrays[0].shape[1]
    count = next(n for n in range(1, T + 1) if T % n == 0 and (B * H * T // n * S * 4 <= SCORES or n == T))
    if count == 1:
        return part(carry, queries)
    cut = lambda x: jnp.moveaxis(x.reshape(B, count, T // count, *x.shape[2:]), 1, 0)
    carry, found = lax.scan(part, carry, jax.tree.map(cut, queries))
    return carry, jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(B, T, *x.shape[3:]), found)


def _scores(queries: Any, keys: Any, window: int | None) -> jax.Array:
    q, k = queries.arrays[0], keys.arrays[0]
    scores = _product(q)("btgmk,bsgk->bgmts", _grouped(q, k), k)
    distance_BTS = queries.numbers_BT[:, :, None] - keys.numbers_BT[:, None, :]
    visible_BTS = distance_BTS >= 0
    if window is not None:
        visible_BTS &= distance_BTS < window
    if queries.ids_BT is not None:
        visible_BTS &= queries.ids_BT[:, :, None] == keys.ids_BT[:, None, :]
    return jnp.where(visible_BTS[:, None, None], scores / math.sqrt(q.shape[-1]), HIDDEN)


def _grouped(x: jax.Array, k_BSGK: jax.Array) -> jax.Array:
    """[B, T, H, …] -> [B, T, G, M, …]."""
    groups = k_BSGK.shape[2]
    return x.reshape(*x.shape[:2], groups, x.shape[2] // groups, *x.shape[3:])


def _product(x: jax.Array) -> Callable:
    return functools.partial(jnp.einsum, preferred_element_type=_dtype(x))


def _dtype(x: jax.Array) -> Any:
    return jnp.promote_types(jnp.float32, x.dtype)

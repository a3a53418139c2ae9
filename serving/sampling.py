"""Which token comes next, of logits: for each row by its own request alone.

Nothing is sorted: how much is kept is the largest threshold above which there is enough, found bit by bit. Sums are of
whole numbers, so that their order does not matter.

N rows, V vocabulary.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from serving.forward import tree_sum
from serving.requests import MOST_TOP

FIELDS = {"temperature": jnp.float32, "top_k": jnp.int32, "top_p": jnp.float32, "min_p": jnp.float32,
          "repetition_penalty": jnp.float32, "seed": jnp.uint32}  # fmt: skip
WHOLE = 1 << 30  # in which probabilities are counted

Rows = Mapping[str, jax.Array]  # of each field [N]


def next_tokens(logits_NV: jax.Array, seen_NV: jax.Array, positions_N: jax.Array, how: Rows) -> jax.Array:
    """ids [N]. seen_NV: what stands in prompt or answer. A row's randomness is of its seed and its position alone."""
    penalty_N1 = how["repetition_penalty"][:, None]
    penalised = jnp.where(logits_NV > 0, logits_NV / penalty_N1, logits_NV * penalty_N1)
    logits_NV = jnp.where(seen_NV, penalised, logits_NV)
    likeliest_N = jnp.argmax(logits_NV, axis=-1).astype(jnp.int32)
    is_drawn_N = how["temperature"] > 0

    def draw() -> jax.Array:
        scaled_NV = logits_NV / jnp.where(is_drawn_N, how["temperature"], 1)[:, None]
        noise_NV = jax.vmap(_noise, (0, 0, None))(how["seed"], positions_N, logits_NV.shape[1])
        some = (how["top_k"] > 0) | (how["top_p"] < 1) | (how["min_p"] > 0)
        kept_NV = lax.cond(
            jnp.any(some & is_drawn_N),
            lambda: jnp.where(some[:, None], kept(scaled_NV, how), True),
            lambda: jnp.ones_like(seen_NV),
        )
        return jnp.argmax(jnp.where(kept_NV, scaled_NV + noise_NV, -jnp.inf), axis=-1).astype(jnp.int32)

    drawn_N = lax.cond(jnp.any(is_drawn_N), draw, lambda: likeliest_N)
    return jnp.where(is_drawn_N, drawn_N, likeliest_N)


def _noise(seed: jax.Array, position: jax.Array, size: int) -> jax.Array:
    """Gumbel's: the largest of logits plus it is a draw from their softmax."""
    return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), position), (size,), jnp.float32)


def kept(logits_NV: jax.Array, how: Rows) -> jax.Array:
    """bool [N, V]: top-k, of these top-p, of these min-p. As likely as the last that is kept is kept, too."""
    order_NV = _order(logits_NV)
    most = logits_NV.shape[1]
    wanted_N = jnp.where(how["top_k"] > 0, jnp.minimum(how["top_k"], most), most)
    kept_NV = order_NV >= _threshold(order_NV, jnp.ones_like(order_NV), wanted_N)[:, None]
    weight_NV = jnp.where(kept_NV, jnp.exp(logits_NV - jnp.max(logits_NV, axis=-1, keepdims=True)), 0)
    counted_NV = (weight_NV / tree_sum(weight_NV)[:, None] * WHOLE).astype(jnp.int32)
    wanted_N = jnp.maximum(1, jnp.ceil(how["top_p"] * jnp.sum(counted_NV, axis=-1)).astype(jnp.int32))
    enough_N = jnp.where(how["top_p"] < 1, _threshold(order_NV, counted_NV, wanted_N), jnp.iinfo(jnp.int32).min)
    return kept_NV & (order_NV >= enough_N[:, None]) & (weight_NV >= how["min_p"][:, None])


def _order(x: jax.Array) -> jax.Array:
    """int32 in the order of these float32."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)


def _threshold(order_NV: jax.Array, weight_NV: jax.Array, wanted_N: jax.Array) -> jax.Array:
    """int32 [N]: the largest x such that what is at least x weighs as much as wanted, or more."""
    is_enough = lambda x_N: jnp.sum(jnp.where(order_NV >= x_N[:, None], weight_NV, 0), axis=-1) >= wanted_N

    def bit(i: jax.Array, x_N: jax.Array) -> jax.Array:
        more_N = x_N + (jnp.int32(1) << (30 - i))
        return jnp.where(is_enough(more_N), more_N, x_N)

    lowest_N = jnp.where(is_enough(jnp.zeros_like(wanted_N)), 0, jnp.iinfo(jnp.int32).min)
    return lax.fori_loop(0, 31, bit, lowest_N)


def logprobs(logits_NV: jax.Array, ids_N: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(of the ids [N], the likeliest ids [N, MOST_TOP], theirs), natural logarithms."""
    shifted_NV = logits_NV - jnp.max(logits_NV, axis=-1, keepdims=True)
    log_total_N = jnp.log(tree_sum(jnp.exp(shifted_NV)))
    top_NJ, ids_NJ = lax.top_k(shifted_NV, min(MOST_TOP, logits_NV.shape[1]))
    own_N = jnp.take_along_axis(shifted_NV, ids_N[:, None], axis=1)[:, 0]
    return own_N - log_total_N, ids_NJ.astype(jnp.int32), top_NJ - log_total_N[:, None]

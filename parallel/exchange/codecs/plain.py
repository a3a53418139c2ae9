"""Codecs without scales: float32 as it is, and bfloat16."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Message = dict[str, jax.Array]
HOP_DIMS = {"psum": 0, "gather": 1, "two_stage": 2}  # what the first hop moves: […], [k, …], [k, R, …] of messages


def is_round(codec: Any) -> bool:
    return hasattr(codec, "mean")


def in_turn(count: int, code: Any, owed: Any, dims: int) -> tuple[Any, Any]:
    """code(i, owed) -> (owed, found) for one piece after another, in the memory of one: (owed [k, count, …], found
    [dims…, count, …]). What piece i + 1 owes is read when i has been written: read in the same turn as it is written,
    XLA:CPU would read it several times, and copy all pieces first."""
    empty = lambda x: jnp.zeros((*x.shape[:dims], count, *x.shape[dims:]), x.dtype)
    mine = pick(owed, 0, 1)
    if count == 1:
        mine, found = code(0, mine)
        return jax.tree.map(lambda x: x[:, None], mine), jax.tree.map(lambda x: jnp.expand_dims(x, dims), found)

    def step(i: jax.Array, carry: tuple) -> tuple:
        owed, mine, found = carry
        mine, new = code(i, mine)
        owed = put(owed, mine, i, 1)
        return owed, pick(owed, i + 1, 1), put(found, new, i, dims)

    found = jax.tree.map(empty, jax.eval_shape(lambda: code(0, mine)[1]))
    owed, _, found = lax.fori_loop(0, count, step, (owed, mine, found))
    return owed, found


def pick(tree: Any, i: Any, dims: int) -> Any:
    """Piece i of arrays [dims…, pieces, …]."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, dims, keepdims=False), tree)


def put(tree: Any, piece: Any, i: Any, dims: int) -> Any:
    return jax.tree.map(lambda x, y: lax.dynamic_update_index_in_dim(x, y, i, dims), tree, piece)


@dataclass(frozen=True)
class Identity:
    """float32 as it is: the exchange without a codec. 4 bytes an element, exact."""

    wants_error_feedback = False
    sparse = False
    uses_key = False
    block = 1

    def wire(self, n: int) -> dict[str, int]:
        return {"f32": 4 * n}

    def encode(self, x_N: jax.Array, key: jax.Array | None) -> Message:
        return {"values": x_N}

    def decode(self, message: Message) -> jax.Array:
        return message["values"]


@dataclass(frozen=True)
class BF16:
    """bfloat16, rounded to nearest even: 2 bytes an element, relative error up to 2^-8, unbiased over many values."""

    wants_error_feedback = False
    sparse = False
    uses_key = False
    block = 1

    def wire(self, n: int) -> dict[str, int]:
        return {"u16": 2 * n}

    def encode(self, x_N: jax.Array, key: jax.Array | None) -> Message:
        return {"values": lax.bitcast_convert_type(x_N.astype(jnp.bfloat16), jnp.uint16)}

    def decode(self, message: Message) -> jax.Array:
        return lax.bitcast_convert_type(message["values"], jnp.bfloat16).astype(jnp.float32)

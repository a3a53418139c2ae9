"""What codecs are made of: their two forms, described in __init__.py, and pieces in turn."""

from collections.abc import Callable, Generator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

Message = dict[str, jax.Array]
HOP_DIMS = {"psum": 0, "gather": 1, "two_stage": 2}  # what the first hop moves: […], [k, …], [k, R, …] of messages


class BlockCodec:
    """Each message stands for itself. What a codec does not say otherwise: it is for any vector, draws nothing, adds up
    on the way, and loses something."""

    block: Any = 1
    sparse: ClassVar[bool] = False
    uses_key: Any = False
    wants_error_feedback: ClassVar[bool] = False
    exact: ClassVar[bool] = False  # nothing is lost, so nothing can be owed

    def wire(self, n: int) -> dict[str, int]:
        raise NotImplementedError

    def encode(self, x_N: jax.Array, key: jax.Array | None) -> Message:
        raise NotImplementedError

    def decode(self, message: Message) -> jax.Array:
        raise NotImplementedError


class RoundCodec:
    """The mean is found in rounds. What a codec does not say otherwise: it is for any array, and keeps no state."""

    per_matrix: ClassVar[bool] = False
    wants_error_feedback: ClassVar[bool] = False

    def check(self, shards: Sequence[Any]) -> None:
        """Raises ValueError, with the config's keys, where it would do nothing for any of these arrays."""

    def takes(self, leaf: Any) -> bool:
        return True

    def init(self, leaf: Any, key: jax.Array) -> Any:
        return {}

    def wire(self, leaf: Any, send: Callable) -> dict[str, float]:
        raise NotImplementedError

    def mean(self, p_kN: jax.Array, state: Any, key: Any, leaf: Any, net: Any) -> Generator[Any, Any, Any]:
        raise NotImplementedError


def is_round(codec: Any) -> bool:
    """Of a codec, or of its class."""
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

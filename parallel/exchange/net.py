"""The wire: what the exchange asks of the mesh axis `replica`, for one flat vector per replica.

R replicas on D devices of that axis, k = R/D of them on each. N elements of one device's shard of what is encoded
together, C = N/R of one chunk.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from parallel.exchange.codecs.base import is_round, pick
from parallel.exchange.codecs.plain import Identity
from parallel.layout.axes import SLOW

ALGORITHMS = ("auto", "gather", "two_stage", "psum")
FLOAT32 = Identity()
TOGETHER = 2**22  # bytes: larger messages travel by themselves


def check(algorithm: str, codec: Any) -> None:
    """Raises ValueError, with the config's keys, where messages of this codec cannot travel in this way."""
    name = type(codec).__name__
    if algorithm not in ALGORITHMS:
        raise ValueError(f"sync.algorithm={algorithm!r} is none of {', '.join(ALGORITHMS)}")
    if algorithm == "psum" and (is_round(codec) or not codec.exact):
        raise ValueError("sync.algorithm=psum adds up on the wire and knows no codec: set sync.codec=none")
    if algorithm == "two_stage" and not is_round(codec) and codec.sparse:
        raise ValueError(
            f"sync.algorithm=two_stage adds messages on the way, and those of {name} name different places: "
            "set sync.algorithm=auto"
        )


@dataclass(frozen=True)
class Net:
    """The wire, for one flat vector per replica. Inside a shard_map only.

    gather: every device gets all messages and adds them up. R−k messages sent, one quantisation, one hop.
    two_stage: each device adds up one R-th of the vector and sends the sum on: all_to_all, sum, all_gather. About two
    messages sent whatever R, two quantisations, two hops.
    psum: XLA's all-reduce, without a codec: for comparison.
    auto: gather for 2 replicas (the same bytes in one hop), else two_stage. Sparse messages are gathered always.
    """

    algorithm: str
    replicas: int
    devices: int
    all_gather: Callable = lax.all_gather  # or as in parallel/exchange/pairwise.py
    all_to_all: Callable = lax.all_to_all

    def form(self, codec: Any) -> str:
        if codec.sparse:
            return "gather"
        return self.algorithm if self.algorithm != "auto" else "gather" if self.replicas <= 2 else "two_stage"

    def encode(self, x_kN: jax.Array, codec: Any, key: jax.Array | None) -> tuple[Any, jax.Array, jax.Array]:
        """(message of the first hop; decoded, [k, N]: what this device's replicas send with it, and still owe)."""
        k, n = x_kN.shape
        if (form := self.form(codec)) == "psum":
            return jnp.sum(x_kN, axis=0), x_kN, jnp.zeros_like(x_kN)
        x_kN = jnp.pad(x_kN, ((0, 0), (0, self.padded(n, codec) - n)))
        keys_k = None if key is None else self._keys(key, 1)
        if form == "gather":
            message, sent_k = jax.vmap(functools.partial(round_trip, codec))(x_kN, keys_k)
        else:
            x_kRC = x_kN.reshape(k, self.replicas, -1)  # chunk c is owned by the device of replica c
            keys_kR = None if keys_k is None else jax.vmap(lambda key: jax.random.split(key, self.replicas))(keys_k)
            message, sent_k = jax.vmap(jax.vmap(functools.partial(round_trip, codec)))(x_kRC, keys_kR)
        sent_kN = sent_k.reshape(x_kN.shape)
        owed_kN = jax.vmap(codec.subtract)(x_kN, message) if codec.sparse else x_kN - sent_kN
        if self.devices == 1:  # nothing crosses a wire, so nothing need be packed for it
            message = {"values": sent_k}
        return message, sent_kN[:, :n], owed_kN[:, :n]

    def first_hop(self, messages: dict[str, Any], codec: Any) -> dict[str, Any]:
        """Of every replica, R of each: the messages (gather), or of the k chunks that this device owns, [R, k, …]."""
        if (form := self.form(codec)) == "psum":
            return _together(lambda x: lax.psum(x, SLOW), messages, 0)
        if form == "gather" or self.devices == 1:
            return self.second_hop(messages)
        return _together(lambda m: self.all_to_all(m, SLOW, split_axis=1, concat_axis=0, tiled=True), messages, 2)

    def round_sum(self, received: Any, n: int, codec: Any, key: Any, server_kC: Any, decay: float) -> tuple[Any, Any]:
        """Two-stage only: (message of the second hop, the mean of the chunks that this device owns; server residual).

        server_kC: what the owners of the chunks still owe from rounding the sum; None without error feedback.
        """
        mean_kC = jax.vmap(lambda m: self._sum_in_order(m, codec), in_axes=1)(received) / self.replicas
        if server_kC is not None:
            mean_kC = mean_kC + decay * server_kC.astype(jnp.float32)
        keys_k = None if key is None else self._keys(key, 2)
        message, sent_kC = jax.vmap(functools.partial(round_trip, codec))(mean_kC, keys_k)
        if server_kC is not None:
            k, C = mean_kC.shape
            place_kC = (lax.axis_index(SLOW) * k + jnp.arange(k))[:, None] * C + jnp.arange(C)
            owed_kC = jnp.where(place_kC < n, mean_kC - sent_kC, 0.0)  # padding owes nothing
            server_kC = owed_kC.astype(server_kC.dtype)
        return {"values": sent_kC} if self.devices == 1 else message, server_kC

    def second_hop(self, messages: dict[str, Any]) -> dict[str, Any]:
        """[k, …] of each device -> [R, …]."""
        if self.devices == 1:
            return messages
        return _together(lambda m: self.all_gather(m, SLOW, tiled=True), messages, 1)

    def decode(self, received: Any, n: int, codec: Any) -> jax.Array:
        """The mean [N] out of what the last hop brought."""
        if (form := self.form(codec)) == "two_stage":
            return jax.vmap((FLOAT32 if self.devices == 1 else codec).decode)(received).reshape(-1)[:n]
        total_N = received if form == "psum" else self._sum_in_order(received, codec)
        return (total_N / self.replicas)[:n]

    def _sum_in_order(self, message_R: Any, codec: Any) -> jax.Array:
        """Decodes and adds replica 0, 1, …, R−1. The barriers keep XLA from reassociating or fusing the chain: a
        plain mean differs in the last bit between layouts."""
        codec = FLOAT32 if self.devices == 1 else codec
        total, *others = [jax.tree.map(lambda m, r=r: m[r], message_R) for r in range(self.replicas)]
        total = lax.optimization_barrier(codec.decode(total))
        for message in others:
            if codec.sparse:
                total = lax.optimization_barrier(codec.add(total, message))
            else:
                total = lax.optimization_barrier(total + lax.optimization_barrier(codec.decode(message)))
        return total

    def _keys(self, key: jax.Array, hop: int) -> jax.Array:
        """One key for each replica of this device."""
        k = self.replicas // self.devices
        replicas_k = lax.axis_index(SLOW) * k + jnp.arange(k)
        return jax.vmap(lambda r: jax.random.fold_in(jax.random.fold_in(key, hop), r))(replicas_k)

    def padded(self, n: int, codec: Any) -> int:
        """n rounded up so that each of the R chunks (two-stage) or the vector (gather) is a whole number of blocks."""
        unit = codec.block * (self.replicas if self.form(codec) == "two_stage" else 1)
        return -(-n // unit) * unit


def round_trip(codec: Any, x_N: jax.Array, key: jax.Array | None) -> tuple[Any, jax.Array]:
    """(message, what it decodes to). A codec may know a way that unpacks nothing: XLA:CPU would fuse packing and
    unpacking into one loop that takes longer than the two."""
    if hasattr(codec, "round_trip"):
        return codec.round_trip(x_N, key)
    message = codec.encode(x_N, key)
    return message, codec.decode(message)


def _together(across: Any, messages: dict[str, Any], lead: int) -> dict[str, Any]:
    """Sends messages of one codec, small ones in one array: a collective costs a round trip of the link, and TPUs widen
    short ones. lead: how many of their leading dimensions count messages."""
    arrays, treedef = jax.tree.flatten(messages)
    views, bits = arrays, lambda x: jnp.dtype(f"uint{8 * x.itemsize}")
    if len(arrays) > len(messages):  # a message has several: they travel as bytes, of wider words all lower ones first
        words = [lax.bitcast_convert_type(x, bits(x)) for x in arrays]
        views = [jnp.stack([x >> 8 * b for b in range(x.itemsize)], lead).astype(jnp.uint8) for x in words]
    groups: list[list[jax.Array]] = []
    for x in views:
        if not groups or sum(y.nbytes for y in groups[-1]) + x.nbytes > TOGETHER:
            groups.append([])
        groups[-1].append(x)
    parts = []
    for group in groups:
        flat = [x.reshape(*x.shape[:lead], -1) for x in group] if len(group) > 1 else group
        parts += jnp.split(across(jnp.concatenate(flat, -1)), np.cumsum([x.shape[-1] for x in flat])[:-1], -1)
    own = [part.reshape(*part.shape[:lead], *x.shape[lead:]) for part, x in zip(parts, views, strict=True)]
    if views is not arrays:
        word = lambda bytes_, x: sum(pick(bytes_, b, lead).astype(bits(x)) << 8 * b for b in range(x.itemsize))
        own = [lax.bitcast_convert_type(word(y, x), x.dtype) for y, x in zip(own, arrays, strict=True)]
    return treedef.unflatten(own)

"""Codecs that send few of the elements.

Shapes: N elements of a vector, M = N / chunk chunks, C elements of a chunk, K of them sent.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from parallel.exchange.codecs import rounds
from parallel.exchange.codecs.base import BlockCodec, Message, RoundCodec, pick
from parallel.exchange.codecs.plain import Identity
from parallel.exchange.codecs.quantized import bf16_bits, from_bf16_bits, pack, round_up_to_bf16, unpack


def kept(density: float, chunk: int) -> int:
    if not 0 < density < 1:
        raise ValueError(f"sync.density={density}: must lie between 0 and 1 (it is the share of elements sent)")
    return max(1, round(density * chunk))


@dataclass(frozen=True)
class TopK(BlockCodec):
    """The K largest of each chunk with their places (Aji & Heafield 2017; by chunks as in SparseLoCo 2025).

    bits 16: bfloat16 values and uint16 places, 4 bytes an entry. bits 8, 4, 2: values of so many bits with one scale a
    chunk (levels between the least and the largest size sent, which are close together), and places of 12 bits.
    Messages of different replicas name different places, so they are gathered and never summed on the wire.
    """

    density: float = 1 / 64
    bits: int = 16
    chunk: int = 4096
    sparse: ClassVar[bool] = True
    wants_error_feedback: ClassVar[bool] = True

    def __post_init__(self):
        kept(self.density, self.chunk)
        if self.bits not in (2, 4, 8, 16):
            raise ValueError(f"sync.bits={self.bits}: values of the sparse codecs have 2, 4, 8 or 16 bits")
        if self.bits != 16 and self.chunk > 4096:
            raise ValueError(f"chunks of {self.chunk} elements have places of more than 12 bits")

    @property
    def block(self) -> int:
        return self.chunk

    @property
    def k(self) -> int:
        """Entries a chunk; a whole number of bytes when they are packed."""
        k = kept(self.density, self.chunk)
        return k if self.bits == 16 else -(-k // 8) * 8

    def wire(self, n: int) -> dict[str, int]:
        entries = n // self.chunk * self.k
        if self.bits == 16:
            return {"u8": 4 * entries}
        return {"u8": entries * self.bits // 8 + entries * 3 // 2 + 4 * n // self.chunk}

    def encode(self, x_N: jax.Array, key: jax.Array | None) -> Message:
        x_MC = x_N.reshape(-1, self.chunk)
        _, places_MK = lax.top_k(jnp.abs(x_MC), self.k)  # of equal sizes the first
        values_MK = jnp.take_along_axis(x_MC, places_MK, axis=1)
        if self.bits == 16:
            return {"values": bf16_bits(values_MK), "places": places_MK.astype(jnp.uint16)}
        size_MK = jnp.abs(values_MK)
        low_M, high_M = jnp.min(size_MK, axis=1), round_up_to_bf16(jnp.max(size_MK, axis=1))
        low_M = low_M.astype(jnp.bfloat16).astype(jnp.float32)
        levels = 2 ** (self.bits - 1) - 1  # one bit is the sign
        span_M = jnp.where(high_M > low_M, high_M - low_M, 1.0)
        level_MK = jnp.clip(jnp.round((size_MK - low_M[:, None]) / span_M[:, None] * levels), 0, levels)
        codes_MK = level_MK.astype(jnp.uint8) + (values_MK < 0).astype(jnp.uint8) * jnp.uint8(levels + 1)
        scales_M2 = bf16_bits(jnp.stack([low_M, high_M], axis=1))
        return {"values": pack(codes_MK, self.bits), "places": _pack12(places_MK), "scales": scales_M2}

    def decode(self, message: Message) -> jax.Array:
        values_MK, places_MK = self._entries(message)
        return _scatter(values_MK, places_MK, self.chunk)

    def add(self, total_N: jax.Array, message: Message) -> jax.Array:
        """total + decode(message), to the bit, without an array of zeros: no decoded value is -0.0."""
        values_MK, places_MK = lax.optimization_barrier(self._entries(message))
        return total_N.at[_flat(places_MK, self.chunk)].add(values_MK.reshape(-1), **DISTINCT)

    def subtract(self, x_N: jax.Array, message: Message) -> jax.Array:
        """x - decode(message), in the same way."""
        values_MK, places_MK = lax.optimization_barrier(self._entries(message))
        return x_N.at[_flat(places_MK, self.chunk)].add(-values_MK.reshape(-1), **DISTINCT)

    def _entries(self, message: Message) -> tuple[jax.Array, jax.Array]:
        if self.bits == 16:
            values_MK, places_MK = from_bf16_bits(message["values"]), message["places"].astype(jnp.int32)
        else:
            codes_MK, places_MK = unpack(message["values"], self.bits), _unpack12(message["places"])
            low_M, high_M = jnp.moveaxis(from_bf16_bits(message["scales"]), -1, 0)
            levels = 2 ** (self.bits - 1) - 1
            level_MK = (codes_MK & jnp.uint8(levels)).astype(jnp.float32)
            size_MK = low_M[:, None] + (high_M - low_M)[:, None] * level_MK / levels
            values_MK = jnp.where(codes_MK > levels, -size_MK, size_MK)
        return jnp.where(values_MK == 0, 0.0, values_MK), places_MK


DISTINCT: dict[str, Any] = {"unique_indices": True, "mode": "promise_in_bounds"}


def _scatter(values_MK: jax.Array, places_MK: jax.Array, chunk: int) -> jax.Array:
    """Zeros [M·chunk] with these values; places are distinct within a chunk."""
    zeros = jnp.zeros((values_MK.shape[0] * chunk,), jnp.float32)
    return zeros.at[_flat(places_MK, chunk)].set(values_MK.reshape(-1), **DISTINCT)


def _flat(places_MK: jax.Array, chunk: int) -> jax.Array:
    """Places in the vector, of places in its chunks."""
    return (places_MK + chunk * jnp.arange(places_MK.shape[0], dtype=jnp.int32)[:, None]).reshape(-1)


def _pack12(places_MK: jax.Array) -> jax.Array:
    """Places below 4096, two to three bytes."""
    first, second = jnp.moveaxis(places_MK.reshape(places_MK.shape[0], -1, 2), -1, 0)
    triple = jnp.stack([first & 255, (first >> 8) | ((second & 15) << 4), second >> 4], axis=-1)
    return triple.astype(jnp.uint8).reshape(places_MK.shape[0], -1)


def _unpack12(packed: jax.Array) -> jax.Array:
    a, b, c = jnp.moveaxis(packed.astype(jnp.int32).reshape(packed.shape[0], -1, 3), -1, 0)
    return jnp.stack([a | ((b & 15) << 8), (b >> 4) | (c << 4)], axis=-1).reshape(packed.shape[0], -1)


@dataclass(frozen=True)
class RandomK(RoundCodec):
    """K elements of each chunk, the same places on every replica, so that no place is sent and values can be averaged.

    Places are offset + stride·j modulo the chunk with offset and odd stride drawn from a shared key, anew at each
    step: distinct, and no permutation of the array. The elements not drawn are left to error feedback.
    """

    density: float = 1 / 64
    chunk: int = 4096
    wants_error_feedback: ClassVar[bool] = True

    def __post_init__(self):
        kept(self.density, self.chunk)

    def wire(self, leaf: Any, send: Callable) -> dict[str, float]:
        M = self._chunks(leaf.size)
        return send(M * kept(self.density, self.chunk), Identity(), rounds.pieces((M,), self.chunk))

    def mean(self, p_kN: jax.Array, state: Any, key: jax.Array, leaf: Any, net: Any) -> Generator[Any, Any, Any]:
        k, n = p_kN.shape
        M, K = self._chunks(n), kept(self.density, self.chunk)
        P = rounds.pieces((M,), self.chunk)
        p_kPMC = jnp.pad(p_kN, ((0, 0), (0, M * self.chunk - n))).reshape(k, P, -1, self.chunk)
        draw_PM2 = jax.random.bits(key, (P, M // P, 2), jnp.uint32)

        def places_MK(i: Any) -> jax.Array:
            draw_M2 = pick(draw_PM2, i, 0)
            places = draw_M2[:, :1] + (draw_M2[:, 1:] | 1) * jnp.arange(K, dtype=jnp.uint32)
            return (places % self.chunk).astype(jnp.int32)

        take = lambda x_MC, i: jnp.take_along_axis(x_MC, places_MK(i), axis=1).reshape(-1)
        spread = lambda x_N, i: _scatter(x_N.reshape(-1, K), places_MK(i), self.chunk).reshape(-1, self.chunk)
        mean, owed_k = yield from rounds.mean_in_pieces(net, p_kPMC, take, spread, Identity())
        return mean.reshape(-1)[:n], owed_k.reshape(k, -1)[:, :n], state

    def _chunks(self, n: int) -> int:
        return -(-n // self.chunk)

"""Codecs with few bits an element and one scale a block: integers, and what floats.py and sign.py share with them.

A scale is a bfloat16, sent as uint16. It is rounded *up* to bfloat16 before anything is encoded with it: rounded to
nearest, the largest value of a block could lie beyond the last level, and stochastic rounding would be biased there.
A block of zeros has the scale 0 and decodes to zeros.

Shapes: N elements of a vector, M = N / block blocks, B elements of a block.
"""

import functools
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from parallel.exchange.codecs.base import BlockCodec, Message


@dataclass(frozen=True)
class Scaled(BlockCodec):
    """Quantises x / scale, scale = max|x| / `largest` of each block of `block` elements.

    stochastic: round up with the probability that makes the decoded value unbiased, instead of to nearest.
    """

    block: int = 256
    stochastic: bool = False
    bits: ClassVar[int] = 8
    largest: ClassVar[float] = 1.0  # of the values that can be told apart

    def __post_init__(self):
        check_block(self.block, 8 // self.bits)

    @property
    def uses_key(self) -> bool:
        return self.stochastic

    def wire(self, n: int) -> dict[str, int]:
        return {"u8": n * self.bits // 8 + 2 * n // self.block}

    def encode(self, x_N: jax.Array, key: jax.Array | None) -> Message:
        return self.round_trip(x_N, key)[0]

    def round_trip(self, x_N: jax.Array, key: jax.Array | None) -> tuple[Message, jax.Array]:
        """(message, what it decodes to, without packing and unpacking)."""
        x_MB = x_N.reshape(-1, self.block)
        scale_M = round_up_to_bf16(jnp.max(jnp.abs(x_MB), axis=1) / self.largest)
        scaled_MB = x_MB / jnp.where(scale_M > 0, scale_M, 1.0)[:, None]
        # What is added before rounding down: half for rounding to nearest, else uniform in [0, 1).
        dither = 0.5 if key is None else jax.random.uniform(key, x_MB.shape)
        codes_MB = self.to_codes(scaled_MB, dither)
        decoded_N = (self.from_codes(codes_MB) * scale_M[:, None]).reshape(-1)
        return {"values": pack(codes_MB, self.bits), "scales": bf16_bits(scale_M)}, decoded_N

    def decode(self, message: Message) -> jax.Array:
        values_MB = self.from_codes(unpack(message["values"], self.bits))
        return (values_MB * from_bf16_bits(message["scales"])[:, None]).reshape(-1)

    def to_codes(self, scaled: jax.Array, dither: jax.Array | float) -> jax.Array:
        raise NotImplementedError

    def from_codes(self, codes: jax.Array) -> jax.Array:
        raise NotImplementedError


@dataclass(frozen=True)
class _Integer(Scaled):
    def to_codes(self, scaled: jax.Array, dither: jax.Array | float) -> jax.Array:
        q = jnp.clip(jnp.floor(scaled + dither), -self.largest, self.largest)
        return (q + 2 ** (self.bits - 1)).astype(jnp.uint8)

    def from_codes(self, codes: jax.Array) -> jax.Array:
        return codes.astype(jnp.float32) - 2 ** (self.bits - 1)


@dataclass(frozen=True)
class Int8(_Integer):
    """−127 … 127 times the block's scale: 1 byte an element and 2 a block. Error up to max|x| / 254 of the block."""

    largest: ClassVar[float] = 127.0


@dataclass(frozen=True)
class Int4(_Integer):
    """−7 … 7 times the block's scale, two to a byte. Error up to max|x| / 14 of the block: biased, wants feedback."""

    block: int = 128
    bits: ClassVar[int] = 4
    largest: ClassVar[float] = 7.0
    wants_error_feedback: ClassVar[bool] = True


@dataclass(frozen=True)
class Int2(_Integer):
    """−1, 0, 1 times the block's largest, four to a byte. Rounded to nearest an element's error is never more than the
    element: contractive, whatever the distribution, which levels without a zero are not."""

    block: int = 128
    bits: ClassVar[int] = 2
    largest: ClassVar[float] = 1.0
    wants_error_feedback: ClassVar[bool] = True


# ── bits ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_block(block: int, multiple: int) -> None:
    if block < 1 or block % multiple:
        raise ValueError(f"sync.block={block}: must be a positive multiple of {multiple}, so that blocks fill bytes")


def pack(codes: jax.Array, bits: int) -> jax.Array:
    """uint8 codes below 2^bits [..., n] -> bytes [..., n·bits/8]: of 8/bits parts of the codes, the first in the lowest
    bits. Not of neighbours: a last dimension of 2 would be padded to 128 lanes on a TPU, 64 times the memory."""
    parts = jnp.split(codes, 8 // bits, axis=-1)
    return functools.reduce(jnp.bitwise_or, [part << jnp.uint8(bits * i) for i, part in enumerate(parts)])


def unpack(packed: jax.Array, bits: int) -> jax.Array:
    """The inverse of pack."""
    mask = jnp.uint8(2**bits - 1)
    return jnp.concatenate([(packed >> jnp.uint8(bits * i)) & mask for i in range(8 // bits)], axis=-1)


def round_up_to_bf16(x: jax.Array) -> jax.Array:
    """The smallest bfloat16 that is not less than x ≥ 0, as float32."""
    raised = lax.bitcast_convert_type(x, jnp.uint32) + jnp.uint32(0xFFFF)
    return lax.bitcast_convert_type(raised & jnp.uint32(0xFFFF0000), jnp.float32)


def bf16_bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)


def from_bf16_bits(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.bfloat16).astype(jnp.float32)

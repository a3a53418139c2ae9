"""Codecs whose few bits are a small float, times one scale a block. Shapes as in quantized.py."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from parallel.exchange.codecs.quantized import Scaled


@dataclass(frozen=True)
class FP8(Scaled):
    """float8 e4m3 (4 bits of exponent, 3 of mantissa) times the block's scale: relative error up to 2^-4 over five
    decades, where int8's error is relative to the block's largest."""

    largest: ClassVar[float] = 448.0

    def to_codes(self, scaled: jax.Array, dither: jax.Array | float) -> jax.Array:
        if not self.stochastic:
            return lax.bitcast_convert_type(scaled.astype(jnp.float8_e4m3fn), jnp.uint8)
        # The distance between neighbours: 2^(exponent − 3), and 2^-9 below 2^-6, where they are equally spaced.
        # From the bits: log2 and exp2 are not exact, and not the same in every vectorisation.
        power = lax.bitcast_convert_type(lax.bitcast_convert_type(scaled, jnp.uint32) & 0x7F800000, jnp.float32)
        step = jnp.maximum(power, 2.0**-6) / 8
        rounded = jnp.clip(jnp.floor(scaled / step + dither) * step, -self.largest, self.largest)
        return lax.bitcast_convert_type(rounded.astype(jnp.float8_e4m3fn), jnp.uint8)

    def from_codes(self, codes: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)


@dataclass(frozen=True)
class FP4(Scaled):
    """E3M0, a sign and 3 exponent bits: 0 or ±2^-6 … ±1 times the block's largest, two to a byte
    (Douillard et al. 2025, Streaming DiLoCo, §3.4)."""

    block: int = 128
    bits: ClassVar[int] = 4
    wants_error_feedback: ClassVar[bool] = True
    levels: ClassVar[tuple[float, ...]] = (0.0, *(2.0**e for e in range(-6, 1)))

    def to_codes(self, scaled: jax.Array, dither: jax.Array | float) -> jax.Array:
        size, magnitude = jnp.abs(scaled), jnp.zeros(scaled.shape, jnp.uint8)
        for low, high in zip(self.levels, self.levels[1:], strict=False):
            magnitude += size >= low + (1 - dither) * (high - low)
        return magnitude + 8 * (scaled < 0).astype(jnp.uint8)

    def from_codes(self, codes: jax.Array) -> jax.Array:
        # 2^(code − 7) put together from its bits: exp2 is not exact, and a product with it would depend on whether a
        # compiler rounds it before it is subtracted from what was to be sent.
        exponent = (codes & 7).astype(jnp.uint32)
        size = lax.bitcast_convert_type(jnp.where(exponent, exponent + (127 - 7), 0) << 23, jnp.float32)
        return jnp.where(codes & 8, -size, size)

"""One bit an element, and one scale a block. Shapes as in quantized.py."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from parallel.exchange.codecs.base import BlockCodec, Message
from parallel.exchange.codecs.quantized import bf16_bits, check_block, from_bf16_bits, pack, unpack


@dataclass(frozen=True)
class Sign(BlockCodec):
    """1 bit an element and one scale a block, the mean of |x|: of all multiples of the signs the nearest to x
    (Seide et al. 2014; Karimireddy et al. 2019). Biased: without error feedback it can stand still far from the
    optimum. It cannot say 0: in a block that is not all zeros, a zero gets a random sign.

    stochastic: for votes. The scale is the largest |x|, so that ±1 is carried exactly beside zeros, and zeros without
    bias.
    """

    block: int = 256
    stochastic: bool = False
    uses_key: ClassVar[bool] = True
    wants_error_feedback: ClassVar[bool] = True

    def __post_init__(self):
        check_block(self.block, 8)

    def wire(self, n: int) -> dict[str, int]:
        return {"u8": n // 8 + 2 * n // self.block}

    def encode(self, x_N: jax.Array, key: jax.Array | None) -> Message:
        return self.round_trip(x_N, key)[0]

    def round_trip(self, x_N: jax.Array, key: jax.Array | None) -> tuple[Message, jax.Array]:
        """(message, what it decodes to, without packing and unpacking)."""
        assert key is not None
        x_MB = x_N.reshape(-1, self.block)
        scale_M = (jnp.max if self.stochastic else jnp.mean)(jnp.abs(x_MB), axis=1)
        coins_MB = unpack(jax.random.bits(key, (x_MB.shape[0], self.block // 8), jnp.uint8), 1) > 0
        positive_MB = (x_MB > 0) | ((x_MB == 0) & coins_MB)
        bits_M = bf16_bits(scale_M)
        scale_M1 = from_bf16_bits(bits_M)[:, None]
        decoded_N = jnp.where(positive_MB, scale_M1, -scale_M1).reshape(-1)
        return {"values": pack(positive_MB.astype(jnp.uint8), 1), "scales": bits_M}, decoded_N

    def decode(self, message: Message) -> jax.Array:
        scale_M1 = from_bf16_bits(message["scales"])[:, None]
        return jnp.where(unpack(message["values"], 1) > 0, scale_M1, -scale_M1).reshape(-1)

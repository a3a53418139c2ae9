"""Codecs: what a tensor looks like on the wire.

A codec is a small frozen dataclass of pure functions over flat float32 vectors. `encode` returns the message, a
pytree of arrays whose bytes are exactly the bytes sent; `decode` gives a float32 vector back.

Narrow floats travel as unsigned integers of their width: left as bf16, XLA:CPU would widen them to float32 inside
the collective and send twice the bytes.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

Message = dict[str, jax.Array]


@dataclass(frozen=True)
class Identity:
    """float32 as it is: the exchange without a codec."""

    bytes_per_element = 4
    block = 1  # a message encodes a multiple of this many elements
    wire_dtype = "f32"

    def encode(self, x_N: jax.Array) -> Message:
        return {"values": x_N}

    def decode(self, message: Message) -> jax.Array:
        return message["values"]


@dataclass(frozen=True)
class BF16:
    """bfloat16, rounded to nearest even: 2 bytes an element, relative error up to 2^-8, unbiased over many values."""

    bytes_per_element = 2
    block = 1
    wire_dtype = "u16"

    def encode(self, x_N: jax.Array) -> Message:
        return {"values": lax.bitcast_convert_type(x_N.astype(jnp.bfloat16), jnp.uint16)}

    def decode(self, message: Message) -> jax.Array:
        return lax.bitcast_convert_type(message["values"], jnp.bfloat16).astype(jnp.float32)


CODECS = {"none": Identity, "bf16": BF16}

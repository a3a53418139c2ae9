"""Codecs without scales: float32 as it is, and bfloat16."""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from parallel.exchange.codecs.base import BlockCodec, Message


@dataclass(frozen=True)
class Identity(BlockCodec):
    """float32 as it is: the exchange without a codec. 4 bytes an element, exact."""

    exact: ClassVar[bool] = True

    def wire(self, n: int) -> dict[str, int]:
        return {"f32": 4 * n}

    def encode(self, x_N: jax.Array, key: jax.Array | None) -> Message:
        return {"values": x_N}

    def decode(self, message: Message) -> jax.Array:
        return message["values"]


@dataclass(frozen=True)
class Gathered(Identity):
    """The same beside sparse messages, which are gathered, whatever the number of replicas."""

    sparse: ClassVar[bool] = True

    def add(self, x_N: jax.Array, message: Message) -> jax.Array:
        return x_N + message["values"]

    def subtract(self, x_N: jax.Array, message: Message) -> jax.Array:
        return x_N - message["values"]


@dataclass(frozen=True)
class BF16(BlockCodec):
    """bfloat16, rounded to nearest even: 2 bytes an element, relative error up to 2^-8, unbiased over many values."""

    def wire(self, n: int) -> dict[str, int]:
        return {"u16": 2 * n}

    def encode(self, x_N: jax.Array, key: jax.Array | None) -> Message:
        return {"values": lax.bitcast_convert_type(x_N.astype(jnp.bfloat16), jnp.uint16)}

    def decode(self, message: Message) -> jax.Array:
        return lax.bitcast_convert_type(message["values"], jnp.bfloat16).astype(jnp.float32)

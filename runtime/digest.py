"""A 128-bit digest of each array, computed where the array lives.

Four sums, modulo 2^32, of the array's elements, each scrambled first: its bits are mixed with its position and passed
through a bijection (as murmur3's finaliser, four variants). Whatever changes in one element changes all four sums; of
changes by chance in several, about one case in 2^128 goes unnoticed. What collides: a position is 32 bits, hashed one
dimension after the other, so two places of one array may share it, and to exchange the values of those two changes no
sum. Arrays of two and three dimensions (2048², 4096², 32×512×512) have no such places, one of 4×1024×8×128 has 1,920
among its 4.2 million, and more than 2^32 elements cannot be without. Scrambling matters: plain sums weighted by odd
numbers miss every even number of flipped sign bits. The digest is of the logical array: the same on every mesh, and
nothing is gathered but 16 bytes.

It finds damage, not tampering: whoever can change an array on purpose can also change it so that the sums agree.
"""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_MIX = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D, 0x27D4EB2F)


def digest(x: jax.Array) -> jax.Array:
    """uint32 [4]. Traceable; x has any dtype of 1, 2, 4 or 8 bytes."""
    bits = _bits(x)
    hashed = jnp.full(bits.shape, 0x165667B1, jnp.uint32)
    for dim in range(bits.ndim):
        # One hash a dimension: a linear index would overflow 32 bits for large arrays.
        hashed = (hashed ^ lax.broadcasted_iota(jnp.uint32, bits.shape, dim)) * jnp.uint32(_MIX[dim % 4])
        hashed = hashed ^ (hashed >> 15)
    mixed = (bits ^ hashed) * jnp.uint32(_MIX[0])
    mixed = mixed ^ (mixed >> 15)
    terms = [(mixed * jnp.uint32(odd)) ^ ((mixed * jnp.uint32(odd)) >> 16) for odd in _MIX]
    zeros = (jnp.uint32(0),) * 4
    # One variadic reduction reads the array once; four separate sums would read it, and mix it, each for itself.
    sums = lax.reduce(terms, list(zeros), lambda a, b: [x + y for x, y in zip(a, b, strict=True)], range(bits.ndim))
    return jnp.stack(sums)


def _bits(x: jax.Array) -> jax.Array:
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    size = x.dtype.itemsize
    if size >= 4:
        return lax.bitcast_convert_type(x, jnp.uint32)  # 8 bytes: one more dimension, of 2
    return lax.bitcast_convert_type(x, {1: jnp.uint8, 2: jnp.uint16}[size]).astype(jnp.uint32)


@jax.jit
def digest_all(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    return {name: digest(x) for name, x in arrays.items()}


def to_hex(sums: np.ndarray) -> str:
    return "".join(f"{int(x):08x}" for x in sums)


def fingerprint(arrays: Mapping[str, Any], digests: Mapping[str, str]) -> str:
    """SHA-256 over name, shape, dtype and digest of every array, in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        shape = "x".join(map(str, arrays[name].shape))
        total.update(f"{name} {shape} {arrays[name].dtype} {digests[name]}\n".encode())
    return total.hexdigest()


def named_arrays(state: Any) -> dict[str, Any]:
    """The leaves of a state by path ("params/blocks/attention/q"), in the order of the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def params_digest(params: Any) -> str:
    """One SHA-256 for all parameters: equal for equal bits, on every mesh."""
    arrays = named_arrays(params)
    sums = jax.device_get(digest_all(arrays))
    return fingerprint(arrays, {name: to_hex(x) for name, x in sums.items()})

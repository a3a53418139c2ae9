"""The exchange's collectives made of all-reduces between pairs of devices, for hosts that talk through gloo.

gloo asks for what a host wants to receive on the same connection as it sends, and after what it sends. So of two hosts
that send to each other one waits until the other is done, and their link carries one direction at a time. Its
all-reduce asks first and uses both. In integers it carries messages, too: the sum of two, minus one's own, is the
other's to the bit, and an all-reduce of two devices sends the same bytes as an exchange between them. Short messages
stay with XLA's own all_to_all: they are over at once, and three swaps with four hosts are three round trips.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

SHORT = 2**18  # bytes; 100 Mbit/s send as many in 20 ms


def collectives(devices: int) -> dict[str, Callable]:
    """Those that are faster than XLA's own. In a ring of three or more a connection carries one direction anyway."""
    if devices == 2:
        return {"all_gather": all_gather, "all_to_all": all_to_all}
    return {"all_to_all": all_to_all} if devices.bit_count() == 1 else {}


def all_gather(x_k: jax.Array, axis: str, *, tiled: bool) -> jax.Array:
    """[k, …] of each of 2 devices -> [2k, …]."""
    assert tiled
    x_2k = jnp.stack([x_k, _swap(x_k, 1, axis)])  # by distance
    return x_2k[lax.axis_index(axis) ^ jnp.arange(2)].reshape(-1, *x_k.shape[1:])


def all_to_all(x_kR: jax.Array, axis: str, *, split_axis: int, concat_axis: int, tiled: bool) -> jax.Array:
    """[k, R, …] of each of D = R/k devices -> [R, k, …]: from every replica, this device's part."""
    assert (split_axis, concat_axis, tiled) == (1, 0, True)
    if x_kR.nbytes < SHORT:
        return lax.all_to_all(x_kR, axis, split_axis=1, concat_axis=0, tiled=True)
    here, D, (k, R) = lax.axis_index(axis), lax.axis_size(axis), x_kR.shape[:2]
    x_Dkk = jnp.moveaxis(x_kR.reshape(k, D, k, *x_kR.shape[2:]), 1, 0)  # by the device that it is for
    received = [_swap(x_Dkk[here ^ distance], distance, axis) for distance in range(1, D)]
    x_Dkk = jnp.stack([x_Dkk[here], *received])  # by distance
    return x_Dkk[here ^ jnp.arange(D)].reshape(R, k, *x_kR.shape[2:])


def _swap(x: jax.Array, distance: int, axis: str) -> jax.Array:
    """x of the device whose number is this one's, exclusive or `distance`."""
    devices = range(lax.axis_size(axis))
    pairs = [[device, device ^ distance] for device in devices if device < device ^ distance]
    own = lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    return lax.bitcast_convert_type(lax.psum(own, axis, axis_index_groups=pairs) - own, x.dtype)

"""Products of groups of rows with the weights of their expert, by JAX's Mosaic kernels for Hopper chips, where XLA has
only a dense product over all experts (moe.dispatch=mosaic).

No chip has checked them. Groups may be empty, and begin and end anywhere. What the kernels leave to their caller:
- Rows after the last group are never written, and hold whatever lay there, NaN even: here they become zeros. The kernel
  of the weights' gradient needs that of its operands, for of a block it multiplies the rows of other groups with zeros.
- Rows are multiples of 8, features of MOSAIC_STEP.

S rows, E experts, X and Y features.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu.ragged_dot_mgpu import ragged_dot
from jax.experimental.pallas.ops.gpu.transposed_ragged_dot_mgpu import transposed_ragged_dot

from parallel.layout.experts import MOSAIC_STEP, with_gradients

ROWS = 128  # of a block
# Four steps of two blocks under way, beside a block of the result, fit into the 227 KiB that a program gets.
STEPS = {"block_k": MOSAIC_STEP, "max_concurrent_steps": 4, "grid_block_n": 4}


def _block(features: int) -> int:
    return MOSAIC_STEP if features % (2 * MOSAIC_STEP) else 2 * MOSAIC_STEP


def _padded(x_SX: jax.Array) -> jax.Array:
    return jnp.pad(x_SX, ((0, -x_SX.shape[0] % 8), (0, 0)))


def _multiplied(x_SX: jax.Array, w: jax.Array, sizes_E: jax.Array, features: int, **how: Any) -> jax.Array:
    blocks = {"block_m": ROWS, "block_n": _block(features)}
    y_SY = ragged_dot(_padded(x_SX), w, group_sizes=sizes_E, **blocks, **STEPS, **how)[: x_SX.shape[0]]
    return jnp.where((jnp.arange(y_SY.shape[0]) < jnp.sum(sizes_E))[:, None], y_SY, 0)


def _times(x_SX: jax.Array, w_EXY: jax.Array, sizes_E: jax.Array) -> jax.Array:
    return _multiplied(x_SX, w_EXY, sizes_E, w_EXY.shape[2])


def _times_turned(dy_SY: jax.Array, w_EXY: jax.Array, sizes_E: jax.Array) -> jax.Array:
    return _multiplied(dy_SY, w_EXY, sizes_E, w_EXY.shape[1], transpose_rhs=True)


def _outer(x_SX: jax.Array, dy_SY: jax.Array, sizes_E: jax.Array) -> jax.Array:
    blocks = {"block_m": _block(x_SX.shape[1]), "block_n": _block(dy_SY.shape[1])}
    with jax.numpy_dtype_promotion("standard"):  # its loop over a group's blocks mixes types of integers
        return transposed_ragged_dot(_padded(x_SX), _padded(dy_SY), group_sizes=sizes_E, **blocks, **STEPS)


product = with_gradients(_times, _times_turned, _outer)

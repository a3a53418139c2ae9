"""Tokens on their way to experts of other devices (the logical axis `experts`) and back.

- grouped: the rows of each expert one after another, multiplied group by group. Over several devices each gets the
  rows of its own experts: by an all-to-all, in which a device has so many slots for every other; or, where a token
  chooses at least as many experts as there are devices, all tokens, for that is less to send. Slots and rows are
  bounded, for shapes are.
- capacity: each expert has so many slots for the tokens of every device, and all of them are multiplied, full or not.

What finds no slot is left out for this layer, and counted. moe.rows bounds slots and rows, in multiples of what they
would be if all experts were chosen alike; "worst": nothing is ever left out.

N tokens of one device, k experts of a token, A = N·k choices, D model, E experts, n devices, C slots.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import sequential_vmap

from parallel.layout.rules import RULES, Constrain, over

(OVER,) = RULES["experts"]
SCOPE = "over_expert"  # in the compiled program, of what is sent here
WORST = "worst"
MOSAIC_STEP = 64  # what Mosaic's kernels take features in
WEIGHTS = ("experts", "embed", "mlp")
ROWS = ("batch", "positions")  # over which tokens are cut


class Experts:
    """On the mesh of `constrain`, of one device, inside of `manual`. dispatch: moe.dispatch (grouped, capacity, mosaic)
    and moe.rows."""

    def __init__(self, constrain: Constrain, dispatch: tuple[str, str]):
        self.constrain, (self.way, self.rows) = constrain, dispatch
        self.count, self.product = constrain.size("experts"), _product
        if self.way == "mosaic":
            from parallel.layout import mosaic  # which no other way reads

            self.product = mosaic.product

    def gathered(self, w: jax.Array, dim: int) -> jax.Array:
        """These experts' weights, whole along the model dimension; its gradient is scattered."""
        axes = tuple(axis for axis in over(WEIGHTS, 1) if axis not in self.constrain.apart)
        return lax.all_gather(w, axes, axis=dim, tiled=True) if self.constrain.mesh is not None and axes else w

    def add_up(self, tree: Any) -> Any:
        for axis in ROWS:
            tree = jax.tree.map(lambda x, axis=axis: self.constrain.sum(x, axis), tree)
        return tree

    def through(
        self, x_ND: jax.Array, ids_Nk: jax.Array, gates_Nk: jax.Array, network: Callable, experts: int
    ) -> tuple[jax.Array, jax.Array]:
        """(Σ gates · expert(x) over a token's experts [N, D], how many choices found no slot). network(rows, gates,
        product): product multiplies rows with their own experts' weights [E/n, …]. Gates go along with the rows: what
        comes back is needed for no gradient, and neither sent nor made a second time."""
        N, k = ids_Nk.shape
        own = experts // self.count
        if goes_to_all(self.way, k, self.count):
            return self._all_tokens(x_ND, ids_Nk, gates_Nk, network, own)
        slots = slots_of(self.way, self.rows, N, k, experts, self.count)
        if self.way == "capacity":
            groups, ids_A = experts, ids_Nk.reshape(-1)
        else:
            groups, ids_A = self.count, ids_Nk.reshape(-1) // own
        slot_A, choice_S = _slots(ids_A, groups, slots)
        rows_SD, gates_S = _taken(x_ND, choice_S, k), _of_choices(gates_Nk, choice_S, 0)
        if self.way == "capacity":
            y_SD = self._by_slots(rows_SD, gates_S, network, own)
        else:
            numbers_S = jnp.where(choice_S < N * k, _of_choices(ids_Nk, choice_S, 0) % own, own)
            y_SD = self._in_groups(rows_SD, gates_S, numbers_S, network, own)
        kept_A = slot_A < groups * slots
        y_AD = jnp.where(kept_A[:, None], y_SD[jnp.where(kept_A, slot_A, 0)], 0)
        return jnp.sum(y_AD.reshape(N, k, -1), axis=1), jnp.sum(~kept_A).astype(gates_Nk.dtype)

    def _by_slots(self, rows_SD: jax.Array, gates_S: jax.Array, network: Callable, own: int) -> jax.Array:
        """Slots [E, C] of this device -> the same, from slots [E/n, n·C] of these experts."""

        def here(x: jax.Array) -> jax.Array:
            x = self._swapped(x.reshape(self.count, own, -1, *x.shape[1:]))
            return jnp.moveaxis(x, 0, 1).reshape(own, -1, *x.shape[3:])

        y = network(here(rows_SD), here(gates_S), lambda x, w: jnp.einsum("ecx,exy->ecy", x, w))
        y = jnp.moveaxis(y.reshape(own, self.count, -1, y.shape[-1]), 1, 0)
        return self._swapped(y).reshape(rows_SD.shape)

    def _in_groups(
        self, rows_SD: jax.Array, gates_S: jax.Array, numbers_S: jax.Array, network: Callable, own: int
    ) -> jax.Array:
        """Slots [n, C] of this device -> the same. numbers_S: of the expert there; E/n: nothing is in this slot."""
        swapped = lambda x: self._swapped(x.reshape(self.count, -1, *x.shape[1:])).reshape(x.shape)
        return swapped(self._grouped(swapped(rows_SD), swapped(gates_S), swapped(numbers_S), network, own))

    def _all_tokens(
        self, x_ND: jax.Array, ids_Nk: jax.Array, gates_Nk: jax.Array, network: Callable, own: int
    ) -> tuple[jax.Array, jax.Array]:
        N, k = ids_Nk.shape
        with jax.named_scope(SCOPE):
            x_ND, ids_Nk, gates_Nk = (lax.all_gather(x, OVER, tiled=True) for x in (x_ND, ids_Nk, gates_Nk))
        choices, rows = self.count * N * k, rows_of(self.rows, N, k, own * self.count, self.count)
        local_A = ids_Nk.reshape(-1) - lax.axis_index(OVER) * own
        mine_A = (local_A >= 0) & (local_A < own)
        slot_A = jnp.where(mine_A, jnp.cumsum(mine_A) - 1, rows)
        choice_S = jnp.full((rows,), choices).at[slot_A].set(jnp.arange(choices), mode="drop")
        numbers_S, gates_S = _of_choices(local_A, choice_S, own), _of_choices(gates_Nk, choice_S, 0)
        y_SD = self._grouped(_taken(x_ND, choice_S, k), gates_S, numbers_S, network, own)
        token_S = jnp.where(choice_S < choices, choice_S // k, self.count * N)
        y_ND = jnp.zeros_like(x_ND).at[token_S].add(y_SD, mode="drop")
        with jax.named_scope(SCOPE):
            y_ND = lax.psum_scatter(y_ND, OVER, scatter_dimension=0, tiled=True)
        return y_ND, jnp.sum(mine_A & (slot_A >= rows)).astype(gates_Nk.dtype)

    def _grouped(
        self, rows_SD: jax.Array, gates_S: jax.Array, numbers_S: jax.Array, network: Callable, own: int
    ) -> jax.Array:
        """Rows through the experts of these numbers; zeros for the number E/n."""
        order_S = jnp.argsort(numbers_S, stable=True)
        sizes_E = jnp.bincount(numbers_S, length=own + 1)[:own].astype(jnp.int32)
        y_SD = network(rows_SD[order_S], gates_S[order_S], functools.partial(self.product, sizes_E))
        y_SD = jnp.where((jnp.arange(y_SD.shape[0]) < jnp.sum(sizes_E))[:, None], y_SD, 0)
        return jnp.zeros_like(y_SD).at[order_S].set(y_SD)

    def _swapped(self, x: jax.Array) -> jax.Array:
        """[n, …] for each device -> [n, …] from each."""
        if self.count == 1:
            return x
        with jax.named_scope(SCOPE):
            return lax.all_to_all(x, OVER, 0, 0, tiled=True)


def goes_to_all(way: str, chosen: int, count: int) -> bool:
    """Whether all tokens go to all devices."""
    return way != "capacity" and 1 < count <= chosen


def slots_of(way: str, rows: str, tokens: int, chosen: int, experts: int, count: int) -> int:
    """C: capacity's of an expert for each device, grouped's of a device for each other. tokens: N."""
    groups, most = (experts, tokens) if way == "capacity" else (count, tokens * min(chosen, experts // count))
    has_all = rows == WORST or groups == 1  # where nothing is sent, and no slot is multiplied in vain
    return most if has_all else min(most, math.ceil(float(rows) * tokens * chosen / groups))


def rows_of(rows: str, tokens: int, chosen: int, experts: int, count: int) -> int:
    """Of a device that has all tokens."""
    most = count * tokens * min(chosen, experts // count)
    return most if rows == WORST else min(most, math.ceil(float(rows) * tokens * chosen))


def _slots(groups_A: jax.Array, groups: int, slots: int) -> tuple[jax.Array, jax.Array]:
    """(the slot of every choice, groups · slots where its group is full; the choice in every slot, A in empty ones).
    Who comes first has one."""
    choices, end = groups_A.shape[0], groups * slots
    order_A = jnp.argsort(groups_A, stable=True)
    sorted_A = groups_A[order_A]
    first_G = jnp.searchsorted(sorted_A, jnp.arange(groups))
    place_A = jnp.arange(choices) - first_G[sorted_A]
    slot_A = jnp.where(place_A < slots, sorted_A * slots + place_A, end)
    choice_S = jnp.full((end,), choices).at[slot_A].set(order_A, mode="drop")
    return jnp.zeros_like(slot_A).at[order_A].set(slot_A), choice_S


def _taken(x_ND: jax.Array, choice_S: jax.Array, k: int) -> jax.Array:
    """The rows of these choices, zeros where there is none."""
    token_S = jnp.minimum(choice_S // k, x_ND.shape[0] - 1)
    return jnp.where((choice_S < x_ND.shape[0] * k)[:, None], x_ND[token_S], 0)


def _of_choices(x_A: jax.Array, choice_S: jax.Array, nothing: int) -> jax.Array:
    """What each of them has, `nothing` where there is none."""
    x_A = x_A.reshape(-1)
    return jnp.where(choice_S < x_A.shape[0], x_A[jnp.minimum(choice_S, x_A.shape[0] - 1)], nothing)


# ── products of groups of rows with the weights of their expert. JAX has no `vmap` of a weight's gradient: one by one ─

_PAIRS = lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def _in_dtype(f: Callable, x: jax.Array, *more: Any) -> jax.Array:
    return f(x, *more, preferred_element_type=x.dtype)


def with_gradients(times: Callable, times_turned: Callable, outer: Callable) -> Callable:
    """product(how many rows each expert has [E], rows [S, X], weights [E, X, Y]) -> [S, Y], zeros for the rows of none.
    Its parts take the sizes last: rows [S, Y] times turned weights are [S, X], outer products of rows [E, X, Y]."""
    times, times_turned, outer = map(sequential_vmap, (times, times_turned, outer))

    @jax.custom_vjp
    def product(sizes_E: jax.Array, x_SX: jax.Array, w_EXY: jax.Array) -> jax.Array:
        return times(x_SX, w_EXY, sizes_E)

    def forward(sizes_E: jax.Array, x_SX: jax.Array, w_EXY: jax.Array) -> tuple:
        return times(x_SX, w_EXY, sizes_E), (sizes_E, x_SX, w_EXY)

    def backward(kept: tuple, dy_SY: jax.Array) -> tuple:
        sizes_E, x_SX, w_EXY = kept
        return None, times_turned(dy_SY, w_EXY, sizes_E), outer(x_SX, dy_SY, sizes_E)

    product.defvjp(forward, backward)
    return product


_product = with_gradients(
    lambda *x: _in_dtype(lax.ragged_dot, *x),
    lambda x, w, sizes: _in_dtype(lax.ragged_dot, x, w.swapaxes(1, 2), sizes),
    lambda *x: _in_dtype(lax.ragged_dot_general, *x, _PAIRS),
)

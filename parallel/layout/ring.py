"""Attention over sequences that are cut over devices (the logical axis `positions`), in three ways.

- ring: keys and values go round, a device to the next (Liu et al. 2023). What a device has seen is merged by its
  log-sum-exp; the backward pass is its own, with the log-sum-exp over all keys.
- gather: the same products, with all keys and values gathered at first, and their gradients scattered at last.
- heads: an all-to-all turns whole heads of cut sequences into whole sequences of fewer heads (Jacobs et al. 2023), for
  which any kernel will do.

Ring and gather hold positions in zig-zag order: of 2C pieces device i has the i-th and the i-th from the end, so that
under a causal mask all work alike. A hop is two products of half a device's positions, whichever they are, in one call.

B batch, T one device's queries, S one device's keys, P = T / 2, H query heads, G key/value heads, M = H / G, K head
size, C devices.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from parallel.layout.rules import RULES, Constrain

HEADS = ("batch", "positions", "heads", "head_dim")
KV_HEADS = ("batch", "positions", "kv_heads", "head_dim")
SUMS, IDS = HEADS[:3], ("batch", None)
OVER = RULES["positions"]
SCOPE = "over_context"  # in the compiled program, of what is sent here
NOTHING = -1e30  # the log-sum-exp of no keys


class Sequences:
    """On the mesh of `constrain`. way: attention.context."""

    def __init__(self, constrain: Constrain, way: str):
        self.constrain, self.way, self.count = constrain, way, constrain.size("positions")

    def spread(self, x: jax.Array) -> jax.Array:
        """[B, T, …] with its positions in the order in which devices have them, each its own."""
        return self._cut(self._ordered(x))

    def known(self, x: jax.Array | None) -> jax.Array | None:
        """In that order, and whole on each device: of documents, whose numbers need not be sent then."""
        return None if x is None else self._ordered(x)

    def back(self, x: jax.Array) -> jax.Array:
        """The inverse of `spread`."""
        return self._cut(self._ordered(x, np.argsort))

    def attention(self, kernel: Callable, products: Any) -> Callable:
        """What stands for a kernel of model/attention.py's. products: of hops, as model/products.py has them."""
        if self.way == "heads":
            return functools.partial(heads, kernel=kernel)
        return functools.partial(by_hops, way=WAYS[self.way], products=products)

    def _ordered(self, x: jax.Array, of: Callable = np.asarray) -> jax.Array:
        return jnp.take(x, of(zig_zag(x.shape[1], self.count)), axis=1) if self.way in WAYS else x

    def _cut(self, x: jax.Array) -> jax.Array:
        return self.constrain(x, ("batch", "positions", *[None] * (x.ndim - 2)))


def zig_zag(length: int, count: int) -> np.ndarray:
    """Position numbers, device after device."""
    pieces = np.arange(length).reshape(2 * count, -1)
    return pieces[[p for i in range(count) for p in (i, 2 * count - 1 - i)]].reshape(-1)


def heads(q_BTHK, k_BSGK, v_BSGK, segments_BT, window, constrain, *, kernel: Callable) -> jax.Array:
    @jax.named_scope(SCOPE)
    def local(q, k, v, *ids) -> jax.Array:
        turn = lambda x: lax.all_to_all(x, OVER, 2, 1, tiled=True)
        y = kernel(turn(q), turn(k), turn(v), ids[0] if ids else None, window, Constrain(None))
        return lax.all_to_all(y, OVER, 1, 2, tiled=True)

    ids = () if segments_BT is None else (segments_BT,)
    run = constrain.manual(local, (HEADS, KV_HEADS, KV_HEADS, *[IDS] * len(ids)), HEADS)
    return checkpoint_name(run(q_BTHK, k_BSGK, v_BSGK, *ids), "context")


def by_hops(q_BTHK, k_BSGK, v_BSGK, segments_BT, window, constrain, *, way: type, products: Any) -> jax.Array:
    ids = () if segments_BT is None else (segments_BT,)
    given = (HEADS, KV_HEADS, KV_HEADS, *[IDS] * len(ids))
    on_device = lambda *arrays: _Device(way, products, constrain, window, *arrays)
    forward = jax.named_scope(SCOPE)(lambda *arrays: on_device(*arrays).forward())
    backward = jax.named_scope(SCOPE)(lambda y, lse, dy, *arrays: on_device(*arrays).backward(y, lse, dy))
    forward = constrain.manual(forward, given, (HEADS, SUMS))
    backward = constrain.manual(backward, (HEADS, SUMS, HEADS, *given), given[:3])

    @jax.custom_vjp
    def attend(*arrays) -> jax.Array:
        return forward(*arrays)[0]

    def kept(*arrays) -> tuple:
        y, lse = (checkpoint_name(x, "context") for x in forward(*arrays))
        return y, (y, lse, arrays)

    def gradient(kept, dy) -> tuple:
        y, lse, arrays = kept
        return (*backward(y, lse, dy, *arrays), *[None] * len(ids))

    attend.defvjp(kept, gradient)
    return attend(q_BTHK, k_BSGK, v_BSGK, *ids)


class Side(NamedTuple):
    """Of a product, queries or keys: arrays [B, T, …], the numbers of their positions and of their documents [B, T]."""

    arrays: tuple
    numbers_BT: jax.Array
    ids_BT: jax.Array | None

    def halves(self, pick: Callable) -> "Side":
        """[2B, P, …]: what `pick` takes of each array's two halves."""
        two = lambda x: jnp.concatenate(pick(*jnp.split(x, 2, axis=1)))
        return jax.tree.map(two, self)


class _Device:
    """One device's part, inside `manual`. Sums are float32 at least; what is sent of keys and values is as it came."""

    def __init__(self, way: type, products: Any, constrain: Constrain, window: int | None, q, k, v, ids=None):
        self.products, self.constrain, self.window, self.q, self.ids = products, constrain, window, q, ids
        self.count, self.me = constrain.size("positions"), constrain.index("positions")
        self.dtype = jnp.promote_types(jnp.float32, q.dtype)
        self.way = way(self, (k, v))

    def forward(self) -> tuple[jax.Array, jax.Array]:
        """(y [B, T, H, K], log-sum-exp [B, T, H])."""
        own = self._side(self.me, (self.q,))
        y, lse = self.products.forward(own, self._side(self.me, self.way.first), self.window, True)

        def hop(carry: tuple, i: Any, last: bool) -> tuple:
            (y, lse), held = carry
            earlier, keys, held = self._met(held, i, last)
            y2, lse2 = self.products.forward(own.halves(_queries(earlier)), keys, self.window, False)
            (y_high, y_it), (lse_high, lse_it) = jnp.split(y2, 2), jnp.split(lse2, 2)
            low, high = zip(jnp.split(y, 2, axis=1), jnp.split(lse, 2, axis=1), strict=True)
            low = _merged(*low, y_it, jnp.where(earlier, lse_it, NOTHING))
            high = _merged(*_merged(*high, y_high, lse_high), y_it, jnp.where(earlier, NOTHING, lse_it))
            return tuple(jnp.concatenate(x, 1) for x in zip(low, high, strict=True)), held

        y, lse = self._hops(hop, ((y, lse), self.way.held))[0]
        return y.astype(self.q.dtype), lse

    def backward(self, y: jax.Array, lse: jax.Array, dy: jax.Array) -> tuple[jax.Array, ...]:
        """Gradients of q, k and v. y, lse: of all keys."""
        own = self._side(self.me, (self.q, y, lse, dy))
        dq, *dkv = self.products.gradient(own, self._side(self.me, self.way.first), self.window, True)

        def hop(carry: tuple, i: Any, last: bool) -> tuple:
            (low, high), dkv, held = carry
            earlier, keys, held = self._met(held, i, last)
            dkv = self.way.follow(dkv)
            dq2, *dkv2 = self.products.gradient(own.halves(_queries(earlier)), keys, self.window, False)
            one, other = jnp.split(dq2, 2)
            dq = low + jnp.where(earlier, other, 0), high + one + jnp.where(earlier, 0, other)
            pairs = (jnp.split(x, 2) for x in dkv2)
            mine = [jnp.concatenate([a + jnp.where(earlier, b, 0), jnp.where(earlier, 0, b)], 1) for a, b in pairs]
            return dq, self.way.add(dkv, mine, self._source(i)), held

        halves, dkv, _ = self._hops(hop, (tuple(jnp.split(dq, 2, axis=1)), self.way.begin(dkv), self.way.held))
        dq = jnp.concatenate([x.astype(self.q.dtype) for x in halves], 1)
        return dq, *self.way.home([x.astype(self.q.dtype) for x in dkv])

    def _hops(self, hop: Callable, carry: Any) -> Any:
        """The last one sends no keys on."""
        if self.count > 2:
            several = jnp.arange(1, self.count - 1)
            carry = lax.scan(lambda carry, i: (hop(carry, i, False), None), carry, several)[0]
        return hop(carry, self.count - 1, True)

    def _met(self, held: tuple, i: Any, last: bool) -> tuple[jax.Array, Side, tuple]:
        """(whether the keys of hop i are of a device that comes before, they, what is held for the next)."""
        kv, held = self.way.at(held, i, last)
        earlier = self.me >= i
        keys = self._side(self._source(i), kv).halves(lambda low, high: [low, jnp.where(earlier, low, high)])
        return earlier, keys, held

    def _source(self, i: Any) -> jax.Array:
        return (self.me - i) % self.count

    def _side(self, device: Any, arrays: tuple) -> Side:
        """Of what a device holds."""
        B, T = self.q.shape[:2]
        pieces = jnp.stack([jnp.asarray(device), 2 * self.count - 1 - device])
        numbers_T = (pieces[:, None] * (T // 2) + jnp.arange(T // 2)).reshape(-1)
        ids = None if self.ids is None else lax.dynamic_slice_in_dim(self.ids, device * T, T, 1)
        return Side(arrays, jnp.broadcast_to(numbers_T, (B, T)), ids)


def _queries(earlier: jax.Array) -> Callable:
    """Of a hop's two products: the later half with the earlier half of the keys; and, where they are of a device that
    comes before, the earlier half with the same keys, else the later halves of both."""
    return lambda low, high: [high, jnp.where(earlier, low, high)]


def _merged(y1: jax.Array, lse1: jax.Array, y2: jax.Array, lse2: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Attention to the keys of both, from attention to either."""
    lse = jnp.logaddexp(lse1, lse2)
    return y1 * jnp.exp(lse1 - lse)[..., None] + y2 * jnp.exp(lse2 - lse)[..., None], lse


# ── how keys and values come, and their gradients go home ────────────────────────────────────────────────────────────


class _Ring:
    """held: those of the next hop, which are under way while this one is computed. Gradients follow their keys."""

    def __init__(self, device: _Device, kv: tuple):
        to_next = [(i, (i + 1) % device.count) for i in range(device.count)]
        self._next = lambda tree: jax.tree.map(lambda x: lax.ppermute(x, OVER, to_next), tree)
        self.first, self.held = kv, self._next(kv)

    def at(self, held: tuple, i: Any, last: bool) -> tuple[tuple, tuple]:
        """(keys and values of hop i, what is held for the next)."""
        return held, held if last else self._next(held)

    def begin(self, dkv: list) -> list:
        return dkv

    def follow(self, dkv: list) -> list:
        return self._next(dkv)

    def add(self, dkv: list, mine: list, source: Any) -> list:
        return jax.tree.map(jnp.add, dkv, mine)

    def home(self, dkv: list) -> list:
        return self._next(dkv)


class _Gather:
    """held: nothing, for all are here. Gradients are added up where they belong, and scattered at last."""

    def __init__(self, device: _Device, kv: tuple):
        self._device, self.first, self.held = device, kv, ()
        self._all = tuple(device.constrain.gather(x, "positions", 1) for x in kv)

    def at(self, held: tuple, i: Any, last: bool) -> tuple[tuple, tuple]:
        size = self.first[0].shape[1]
        first = self._device._source(i) * size
        return tuple(lax.dynamic_slice_in_dim(x, first, size, 1) for x in self._all), ()

    def begin(self, dkv: list) -> list:
        empty = [jnp.zeros(x.shape, x.dtype) for x in self._all]
        return self.add(empty, dkv, self._device.me)

    def follow(self, dkv: list) -> list:
        return dkv

    def add(self, dkv: list, mine: list, source: Any) -> list:
        put = lambda all_, x: lax.dynamic_update_slice_in_dim(all_, x.astype(all_.dtype), source * x.shape[1], 1)
        return [put(all_, x) for all_, x in zip(dkv, mine, strict=True)]

    def home(self, dkv: list) -> list:
        return [self._device.constrain.scatter(x, "positions", 1) for x in dkv]


WAYS = {"ring": _Ring, "gather": _Gather}

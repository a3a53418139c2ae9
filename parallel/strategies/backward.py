"""Synchronous training whose exchange runs inside the backward pass: a layer's gradient is sent while those of the
layers below it are computed.

The weights of a layer go through a *tap*, an identity whose backward encodes their gradient. The message goes down the
scan with what is carried from layer to layer, and crosses the slow axis one layer later, hidden by that layer's
products: in the turn that encodes it, nothing would be left to hide it. The first turn sends a message of zeros, and
the last layer's is sent after the loop: L + 1 messages for L layers.

The loss is vmapped over replicas, and from inside of that the others cannot be reached. `Layer.send` and `receive` are
those of one replica, and are batched by rules of their own, which get the arrays of all and are manual over the mesh.

R replicas, k of them on each device, L layers, N elements of a message.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from parallel.exchange import residuals
from parallel.exchange.codecs.base import is_round
from parallel.exchange.exchange import Exchange
from parallel.exchange.net import FLOAT32, Net
from parallel.exchange.units import Leaf
from parallel.layout.axes import FAST, SLOW
from parallel.layout.rules import Constrain, of
from parallel.strategies.base import Batch, State, divisor, means, part, per_step, take
from parallel.strategies.sync import Sync

BLOCKS = "blocks"  # the parameters that have a leading dimension of layers


def check(algorithm: str, codec: Any) -> None:
    """Raises ValueError, with the config's keys, for messages that cannot travel from layer to layer."""
    if is_round(codec):
        raise ValueError(
            f"sync.exchange=backward sends one message of a layer, and {type(codec).__name__} needs several rounds: "
            "set sync.exchange=after, or another sync.codec"
        )
    if algorithm not in ("auto", "gather"):
        raise ValueError(
            f"sync.exchange=backward gathers each layer's messages in one hop, not with sync.algorithm={algorithm}: "
            "leave sync.algorithm out, or set sync.exchange=after"
        )


@dataclass(frozen=True)
class Backward(Sync):
    """Sync, but for two things: every layer's arrays are encoded by themselves, and what the guard allows is known when
    everything is sent. What it refuses is left out as ever, with all residuals as they were; of what it allows a part
    of, the exchanged mean is scaled, and what is cut off is not owed.

    layer, rest: the exchanges of one layer and of what is no layer. `exchange` is of both, for what is remembered.
    """

    layer: Any = None
    rest: Any = None

    @classmethod
    def divide(cls, leaves: Any, **own: Any) -> dict[str, Any]:
        one = lambda leaf: replace(leaf, shape=leaf.shape[1:], spec=P(*leaf.spec[1:]), batch_dims=leaf.batch_dims - 1)
        return {"exchange": leaves, "layer": jax.tree.map(one, leaves[BLOCKS]), "rest": _rest(leaves)}

    def exchanges(self) -> dict[str, tuple[Exchange, ...]]:
        messages = (replace(self.layer) for _ in range(self._layers + 1))
        return {"step": (*messages, self.rest)}

    @property
    def _layers(self) -> int:
        return jax.tree.leaves(self.exchange.leaves[BLOCKS])[0].shape[0]

    def step(self, state: State, batch_KRBT: Batch) -> tuple[State, dict[str, jax.Array]]:
        batch_RBT = take(batch_KRBT, 0)
        # Tokens are counted before the gradient, which is weighted by them when it is sent. XLA keeps the count alone.
        weigh = lambda batch_BT: self.loss(state.params, batch_BT)[1][0]
        # A barrier: else XLA:GPU adds up over all axes at once, under no name.
        weights_R = lax.optimization_barrier(jax.vmap(weigh, spmd_axis_name=SLOW)(batch_RBT))
        factor = self.replicas / divisor(self.exchange.scalars([weights_R], "weight")[0])
        sums_R, sizes_R, mean, codec = self._exchanged(state, batch_RBT, factor)
        sums, size = self.agree(sums_R, sizes_R)
        loss, weight, *_ = sums
        sound = (weight > 0) & jnp.isfinite(loss)
        new = self.guard.judge(state.guard, state.guard.norms_W, factor * size, sound)
        mean = jax.tree.map(lambda g: jnp.where(new.applied, g * new.scale, 0), mean)
        state, used, more = self.update(state, mean, codec, new.applied)
        state.guard = self.guard.count(state.guard, new, used)
        return state, per_step(means(*sums) | more | self.guard.report(state.guard, new, used))

    def _exchanged(self, state: State, batch_RBT: Batch, factor: jax.Array) -> tuple[tuple, Any, Any, Any]:
        """(sums [R], a tree [R, …] with the norms of the gradients, their exchanged mean, what that leaves owed)."""
        layer, owed, step = Layer(**vars(self.layer)), state.codec["worker"], state.step
        steps_L = step * self._layers + jnp.arange(self._layers)  # for what a codec draws
        tap = functools.partial(layer.tap, factor)
        one = functools.partial(self._of_replica, layer, tap, steps_L)
        grads_axes = {name: None if name == BLOCKS else 0 for name in state.params}
        every = jax.vmap(one, (None, 0, 0), (0, grads_axes, 0, 0, 0), spmd_axis_name=SLOW)
        sums_R, grads, slot_R, squares_RL, owed_RL = every(state.params, owed.get(BLOCKS, {}), batch_RBT)
        # The gradient of each turn is the mean of the layer above; that of the last one is still to come.
        last = layer.received(slot_R)
        blocks = jax.tree.map(lambda x, x_L: jnp.concatenate([x[None], x_L[:-1]]), last, grads[BLOCKS])
        rest_R, nothing = _rest(grads), residuals.nothing()
        weighted_R = jax.tree.map(lambda g: g * factor, rest_R)
        mean, codec = self.rest.mean(weighted_R, nothing | {"worker": _rest(owed)}, step)
        worker = codec["worker"] | ({BLOCKS: owed_RL} if owed else {})
        return sums_R, (rest_R, jnp.sqrt(squares_RL)), mean | {BLOCKS: blocks}, nothing | {"worker": worker}

    def _of_replica(self, layer: Any, tap: Callable, steps_L: Any, params: Any, owed_L: Any, batch_BT: Batch) -> tuple:
        """(sums; the gradient, of layers exchanged; the last layer's message; squares and residuals of all layers)."""
        batch_ABT, sums, earlier = self.micro_batches(batch_BT), None, {}
        if self.accumulate > 1:
            sums, earlier = self.add_micro_steps(params, part(batch_ABT, 0, self.accumulate - 1), None)

        def loss(params: Any, slot: Any, squares_L: jax.Array, owed_L: Any) -> tuple:
            more_L = (squares_L, owed_L, earlier.get(BLOCKS, {}), steps_L)
            return self.loss(params, take(batch_ABT, -1), Tapped(self.mesh, tap, slot, more_L))

        squares_L = jnp.zeros((self._layers, *layer.squares.shape))
        gradient = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
        (total, beside), (grads, slot, squares_L, owed_L) = gradient(params, layer.empty, squares_L, owed_L)
        put = lambda x, spec: lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))
        rest, total = jax.tree.map(put, _rest(grads), _rest(self.specs)), (total, *beside)
        if sums is not None:
            rest, total = jax.tree.map(jnp.add, (_rest(earlier), sums), lax.optimization_barrier((rest, total)))
        return total, rest | {BLOCKS: grads[BLOCKS]}, slot, squares_L, owed_L


def _rest(tree: Any) -> Any:
    """Embedding, head, final norm: everything but the layers."""
    return {name: x for name, x in tree.items() if name != BLOCKS}


class Tapped(Constrain):
    """For a model whose layers' weights go through `tap`, uncast: half of a gradient's bits would be lost."""

    def __init__(self, mesh: Any, tap: Callable, slot: Any, more_L: tuple):
        super().__init__(mesh)
        self.tap, self.slot, self.more_L = tap, slot, more_L

    def scan(self, layer: Callable, x: Any, weights_L: Any, cast: Callable) -> Any:
        def tapped(carry: tuple, xs: tuple) -> tuple:
            (x, slot), (weights, *more) = carry, xs
            weights, slot = self.tap(weights, slot, *more)
            x, found = layer(x, weights)
            return (x, slot), found

        (x, _), found_L = lax.scan(tapped, (x, self.slot), (weights_L, *self.more_L))
        return x, found_L


class _Unsent(Net):
    """Messages stay where they were encoded: their hop comes later."""

    def first_hop(self, messages: dict[str, Any], codec: Any) -> dict[str, Any]:
        return messages


class Layer(Exchange):
    """The exchange of a layer in two halves. Between them its messages are in a *slot*, {unit: words [*fast, N]} of a
    replica: float32 by name only, for nothing else is carried through a backward pass."""

    def tap(
        self, factor: jax.Array, weights: Any, slot: Any, squares: Any, owed: Any, earlier: Any, step: Any
    ) -> tuple[Any, Any]:
        """(weights, slot) as they are. Backwards, what comes for them are the gradient of one replica, to which that of
        `earlier` micro-steps is added, and the message of the layer above; what goes on are the mean of that layer, and
        the own message. The "gradient" of squares is the gradient's sum of squares by device, that of owed what is owed
        now."""

        def backward(saved: tuple, cotangents: tuple) -> tuple:
            (owed, earlier, factor, step), (gradient, arrived) = saved, cotangents
            gradient = jax.tree.map(jnp.add, earlier, gradient) if earlier else gradient
            slot, squares, owed = self.send(gradient, owed, factor, step)
            nothing = jax.tree.map(jnp.zeros_like, earlier)
            return self.receive(arrived), slot, squares, owed, nothing, None, None

        through = jax.custom_vjp(lambda weights, slot, *_: (weights, slot))
        forward = lambda weights, slot, squares, *saved: ((weights, slot), saved)
        through.defvjp(forward, backward)
        return through(weights, slot, squares, owed, earlier, factor, step)

    # ── of one replica, inside of the vmap ───────────────────────────────────────────────────────────────────────

    def send(self, gradient: Any, owed: Any, factor: jax.Array, step: jax.Array) -> tuple[Any, jax.Array, Any]:
        """(slot, squares, owed)."""
        one = custom_vmap(lambda gradient, owed, factor, step: (self.empty, self.squares, owed))
        one.def_vmap(lambda size, batched, *args: (found := self.sent(*args), jax.tree.map(lambda _: True, found)))
        return one(gradient, owed, factor, step)

    def receive(self, slot: Any) -> Any:
        """The mean, the same for all replicas."""
        one = custom_vmap(lambda slot: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), self.leaves))
        one.def_vmap(lambda size, batched, slot_R: (self.received(slot_R), jax.tree.map(lambda _: False, self.leaves)))
        return one(slot)

    @property
    def squares(self) -> jax.Array:
        return jnp.zeros([self.mesh.shape[axis] for axis in FAST])

    @property
    def empty(self) -> Any:
        """A message of zeros."""
        sizes = [self.mesh.shape[axis] for axis in FAST]
        words = lambda x: jnp.zeros((*sizes, -(-math.prod(x.shape[1:]) * x.dtype.itemsize // 4)))
        return jax.tree.map(words, self._messages())

    # ── of all replicas ──────────────────────────────────────────────────────────────────────────────────────────

    def sent(self, tree_R: Any, owed_R: Any, factor: jax.Array, step: jax.Array) -> tuple[Any, jax.Array, Any]:
        """`send` of all replicas: encoded, and not under way yet."""
        unsent = replace(self, net=_Unsent(**vars(self.net)))

        def body(tree_k: Any, state: Any, of_all: tuple) -> tuple[Any, Any]:
            factor, step = of_all
            squares_k = sum(jax.tree.leaves(jax.tree.map(_square, tree_k, self.leaves)))
            weighted_k = jax.tree.map(lambda g: g * factor, tree_k)
            messages, state = unsent._start(weighted_k, state, step)
            return residuals.put_back((jax.tree.map(_to_words, messages), squares_k), 1), state

        on_devices = self._on_devices(body, self._sharded(SLOW), P(SLOW, *FAST))
        state = residuals.nothing() | {"worker": owed_R}
        (slot_R, squares_R), state = on_devices(tree_R, state, (factor, step))
        return slot_R, squares_R, state["worker"]

    def received(self, slot_R: Any) -> Any:
        """The mean of all replicas' messages, which cross the slow axis here."""

        def body(slot_k: Any) -> Any:
            with jax.named_scope("exchange"):
                messages = jax.tree.map(_from_words, residuals.here(slot_k, 1), self._messages())
                arrived = self.net.first_hop(messages, self.units[0].codec)
                return self._finish(arrived, residuals.nothing(), jnp.int32(0))[0]

        specs = {"in_specs": P(SLOW, *FAST), "out_specs": self._sharded()}
        return jax.shard_map(body, mesh=self.mesh, check_vma=False, **specs)(slot_R)

    def _messages(self) -> dict[str, Any]:
        """What a device sends, abstract: {unit: arrays [k, pieces, …]}."""
        k, found = self.net.replicas // self.net.devices, {}
        for unit in self.units:
            codec = FLOAT32 if self.net.devices == 1 else unit.codec
            x_N = jax.ShapeDtypeStruct((self.net.padded(unit.size // unit.pieces, unit.codec),), jnp.float32)
            message = jax.eval_shape(lambda x_N, codec=codec: codec.encode(x_N, jax.random.key(0)), x_N)
            several = lambda x, unit=unit: jax.ShapeDtypeStruct((k, unit.pieces, *x.shape), x.dtype)
            found[unit.name] = jax.tree.map(several, message)
        return found


def _square(x_k: jax.Array, leaf: Leaf) -> jax.Array:
    """This device's part of the sum of squares: copies count on the first of their holders."""
    copy = sum(lax.axis_index(axis) for axis in FAST if axis not in of(leaf.spec))
    return jnp.where(copy == 0, jnp.sum(jnp.square(x_k), axis=tuple(range(1, x_k.ndim))), 0)


def _to_words(x: jax.Array) -> jax.Array:
    """[k, …] -> float32 [k, N] of the same bits: parts of the array side by side, not neighbours, for TPUs pad a last
    dimension of four to 128."""
    size, x_kN = x.dtype.itemsize, lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    x_kN = x_kN.reshape(x.shape[0], -1)
    x_kN = jnp.pad(x_kN, ((0, 0), (0, -x_kN.shape[1] % (4 // size))))
    parts = [p.astype(jnp.uint32) << 8 * size * i for i, p in enumerate(jnp.split(x_kN, 4 // size, 1))]
    return lax.bitcast_convert_type(functools.reduce(jnp.bitwise_or, parts), jnp.float32)


def _from_words(words_kN: jax.Array, like: Any) -> jax.Array:
    """The inverse of `_to_words`, for an array like this one."""
    size, bits_kN = like.dtype.itemsize, lax.bitcast_convert_type(words_kN, jnp.uint32)
    kind = jnp.dtype(f"uint{8 * size}")
    x_kN = jnp.concatenate([(bits_kN >> 8 * size * i).astype(kind) for i in range(4 // size)], axis=1)
    return lax.bitcast_convert_type(x_kN[:, : math.prod(like.shape[1:])].reshape(like.shape), like.dtype)

"""A batch through layers that are cut over devices (the logical axis `layers`): a pipeline.

Every stage has the layers that follow those of the stage before it, and works on another micro-batch (Huang et al.
2019). All stages run one program, `vmap`ped over them: in a tick each computes its layers and hands the result to the
next. Micro-batches lie cut over the stages, too, in slots: in tick t stage 0 takes one from slot t mod n, and all hand
what they have in that slot to the stage before, so that the next is there when its turn comes; into the last one's goes
what is through. So nothing is held, computed or sent twice, and a device sends two activations a tick and pass. Outputs
end at other places than inputs begin: `start` and `end` say where.

S stages, M micro-batches, n = ceil(M / S) slots of a stage, B rows of all micro-batches, N = S · n · B / M rows of all
slots, F shards of the batch, T sequence, D model, L layers.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from parallel.layout.axes import STAGE
from parallel.layout.rules import RULES, Constrain, names, spec, without

BUFFER = ("layers", "batch", "sequence", None)  # one micro-batch of each stage
SLOTS = ("layers", None, "batch", "sequence", None)
SCOPE = "over_stage"  # in the compiled program, of what is handed on
NONE = -1  # instead of a micro-batch's number
SHARD = RULES["batch"]


class Stages:
    """On the mesh of `constrain`, for a batch of so many rows. remat, gather: pipeline.remat, pipeline.gather."""

    def __init__(self, constrain: Constrain, rows: int, remat: str, gather: str):
        self.constrain, self.remat, self.count = constrain, remat, constrain.size("layers")
        self.shards = constrain.size("batch")
        self.once = gather == "step" and self.shards > 1
        self.micro = constrain.micro or math.gcd(rows // self.shards, self.count)
        self.slots, self.ticks = -(-self.micro // self.count), ticks(self.micro, self.count)
        numbers, size = np.arange(self.micro), self.count * self.slots
        ends = (self.count - 1 - (self.micro - 1 - numbers) // self.slots) * self.slots
        ends += (numbers + self.count - 1) % self.slots
        self._ends, self._order = ends, np.full(size, NONE)
        self._order[ends] = numbers

    # ── rows of a batch ──────────────────────────────────────────────────────────────────────────────────────────

    def start(self, x_BT: jax.Array, axes: Sequence[str | None]) -> jax.Array:
        """[B, …] -> [N, …], where stages take them from; zeros where there is no micro-batch. axes: of the others."""
        numbers = np.arange(self.count * self.slots)
        return self._laid(x_BT, np.where(numbers < self.micro, numbers, NONE), axes)

    def end(self, x_BT: jax.Array, axes: Sequence[str | None]) -> jax.Array:
        """The same for what is compared with what has gone through."""
        return self._laid(x_BT, self._order, axes)

    def back(self, x_N: jax.Array, axes: Sequence[str | None]) -> jax.Array:
        """[N, …] of what has gone through -> [B, …]."""
        x_SnB = self._slots(x_N)
        x_MB = x_SnB.reshape(-1, *x_SnB.shape[2:])[self._ends]
        return self.constrain(x_MB.swapaxes(0, 1).reshape(-1, *x_N.shape[1:]), ("batch", *axes))

    def _laid(self, x_BT: jax.Array, order: np.ndarray, axes: Sequence[str | None]) -> jax.Array:
        x_MBT = self._micro(x_BT)
        x_MBT = jnp.where((order >= 0).reshape(-1, *[1] * (x_MBT.ndim - 1)), x_MBT[np.maximum(order, 0)], 0)
        x_SnBT = x_MBT.reshape(self.count, self.slots, *x_MBT.shape[1:])
        x_SnBT = self.constrain(x_SnBT, ("layers", None, "batch", *axes))
        return self._rows(x_SnBT, axes)

    def _micro(self, x_BT: jax.Array) -> jax.Array:
        """[B, …] -> [M, B/M, …]. Row b goes to micro-batch b mod M, as without stages."""
        return x_BT.reshape(-1, self.micro, *x_BT.shape[1:]).swapaxes(0, 1)

    def _rows(self, x_SnBT: jax.Array, axes: Sequence[str | None]) -> jax.Array:
        """[S, n, F·b, …] -> [F·S·n·b, …]: every device's own rows are the same before and after."""
        (S, n, B), F = x_SnBT.shape[:3], self.shards
        x = x_SnBT.reshape(S, n, F, B // F, *x_SnBT.shape[3:])
        return self.constrain(jnp.moveaxis(x, 2, 0).reshape(S * n * B, *x_SnBT.shape[3:]), ("rows", *axes))

    def _slots(self, x_N: jax.Array) -> jax.Array:
        """The inverse of `_rows`."""
        x = x_N.reshape(self.shards, self.count, self.slots, -1, *x_N.shape[1:])
        return jnp.moveaxis(x, 0, 2).reshape(self.count, self.slots, -1, *x_N.shape[1:])

    # ── the layers ───────────────────────────────────────────────────────────────────────────────────────────────

    def run(
        self, layer_of: Callable, known: Any, x_NTD: jax.Array, weights_L: Any, axes: Any, cast: Callable
    ) -> tuple[jax.Array, Any]:
        """What has started, through all layers -> (what has ended, what layers found in each micro-batch [M, L]).
        layer_of(constrain, known): a layer, (x, weights) -> (x, {name: a number} or None), for rows of which
        that is known. known: of the whole batch, [B, …] each. axes: of weights_L. In every tick weights are cast (or
        are there, cast and gathered); their gradients add up in float32 in either case."""
        weights_SL = jax.tree.map(lambda w: w.reshape(self.count, -1, *w.shape[1:]), weights_L)
        known_MB, S = jax.tree.map(self._micro, known), jnp.arange(self.count)
        inside = Constrain(self.constrain.mesh, apart=(STAGE, *SHARD) if self.once else (STAGE,))

        def stage(weights: Any, x_BTD: jax.Array, known_MB: Any, number: jax.Array) -> tuple[jax.Array, Any]:
            own = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, number, keepdims=False), known_MB)
            weights = jax.tree.map(_used, *weights) if self.once else cast(weights)
            return lax.scan(layer_of(inside, own), x_BTD, weights)

        if self.remat == "stage":
            stage = jax.checkpoint(stage, policy=jax.checkpoint_policies.nothing_saveable)
        if self.once:
            weights_SL, known_MB = self._gathered(weights_SL, cast(weights_SL), axes), self._by_shard(known_MB, 1)
            stage = jax.vmap(stage, in_axes=(0, 0, 1, None), spmd_axis_name=SHARD)
        stages = jax.vmap(stage, in_axes=(0, 0, None, 0), spmd_axis_name=STAGE)
        is_first, is_last = (jnp.equal(S, i)[:, None, None, None] for i in (0, self.count - 1))

        def tick(carry: tuple, t: jax.Array) -> tuple[tuple, Any]:
            x_SBTD, io = carry
            slot = t % self.slots
            own = lax.dynamic_index_in_dim(io, slot, 1, keepdims=False)
            x_SBTD = self.constrain(jnp.where(is_first, own, x_SBTD), BUFFER)
            given = self._by_shard(x_SBTD, 1) if self.once else x_SBTD
            made, found = stages(weights_SL, given, known_MB, jnp.clip(t - S, 0, self.micro - 1))
            x_SBTD = self.constrain(made.reshape(x_SBTD.shape), BUFFER)
            new = self.constrain(jnp.where(is_last, x_SBTD, self._handed_on(own, -1)), BUFFER)
            io = self.constrain(lax.dynamic_update_index_in_dim(io, new, slot, 1), SLOTS)
            return (self._handed_on(x_SBTD, 1), io), found

        io = self.constrain(self._slots(x_NTD), SLOTS)
        empty = self.constrain(jnp.zeros_like(io[:, 0]), BUFFER)
        (_, io), found = lax.scan(tick, (empty, io), jnp.arange(self.ticks))
        at = jnp.arange(self.micro)[:, None] + S  # the tick in which a stage works on a micro-batch
        found = jax.tree.map(lambda x_tSL: x_tSL[at, S].reshape(self.micro, -1), found)
        return self._rows(io, SLOTS[3:]), found

    def _by_shard(self, tree: Any, dim: int) -> Any:
        """[…, F·b, …] -> […, F, b, …]."""
        return jax.tree.map(lambda x: x.reshape(*x.shape[:dim], self.shards, -1, *x.shape[dim + 1 :]), tree)

    def _gathered(self, weights_SL: Any, cast_SL: Any, axes: Any) -> tuple[Any, Any]:
        """Weights [S, F, L/S, …] for each shard of the batch, cut over other axes only: gathered once. Products with
        them are a shard's own, so that their gradients add up there, in the second of the two trees, and cross the
        mesh once."""
        mesh: Any = self.constrain.mesh
        specs = jax.tree.map(lambda x, a: spec(a), weights_SL, axes, is_leaf=lambda x: isinstance(x, tuple))

        def put(x: jax.Array, at: Any, *leading: Any) -> jax.Array:
            return lax.with_sharding_constraint(x, NamedSharding(mesh, P(*leading, *at)))

        def own(w: jax.Array, at: Any) -> jax.Array:
            w = jnp.broadcast_to(w[:, None], (self.count, self.shards, *w.shape[1:]))
            return put(w, without(at, (STAGE, *SHARD)), STAGE, SHARD)

        @jax.custom_vjp
        def taps(weights_SL: Any) -> Any:
            return jax.tree.map(lambda w, at: own(jnp.zeros_like(w), at), weights_SL, specs)

        def home(g: jax.Array, w: jax.Array, at: Any) -> jax.Array:
            place = next((i + 1 for i, entry in enumerate(at) if set(SHARD) & set(names(entry))), None)
            ends, g = P(STAGE, *without(at, (STAGE,))), g.astype(w.dtype)
            if place and self.constrain.size("positions") > 1:  # over which it is cut, too
                return lax.with_sharding_constraint(jnp.sum(g, 1), NamedSharding(mesh, ends))

            def add_up(g: jax.Array) -> jax.Array:  # left to XLA:GPU, it would be sent in float32
                if place is None:
                    return lax.psum(g[:, 0], SHARD)
                return lax.psum_scatter(g[:, 0], SHARD, scatter_dimension=place, tiled=True)

            begins = P(STAGE, SHARD, *without(at, (STAGE, *SHARD)))
            return jax.shard_map(add_up, mesh=mesh, in_specs=begins, out_specs=ends, check_vma=False)(g)

        def back(_: None, grads: Any) -> tuple[Any]:
            return (jax.tree.map(lambda g, *more: home(g, *more).astype(g.dtype), grads, cast_SL, specs),)

        taps.defvjp(lambda weights_SL: (taps(weights_SL), None), back)
        return lax.stop_gradient(jax.tree.map(own, cast_SL, specs)), taps(weights_SL)

    def _handed_on(self, x_SBTD: jax.Array, by: int) -> jax.Array:
        """To the stage after, or before: a permute of its own, whose backward pass is one, too."""
        pairs = [(i, i + by) for i in range(self.count) if 0 <= i + by < self.count]

        @jax.named_scope(SCOPE)
        def permute(x: jax.Array) -> jax.Array:
            return lax.ppermute(x, STAGE, pairs)

        return self.constrain.manual(permute, (BUFFER,), BUFFER)(x_SBTD)


@jax.custom_vjp
def _used(w: jax.Array, tap: jax.Array) -> jax.Array:
    """w, whose gradient is that of the tap."""
    return w


_used.defvjp(lambda w, tap: (w, jnp.zeros((), tap.dtype)), lambda like, g: (None, g.astype(like.dtype)))


def ticks(micro: int, stages: int) -> int:
    """Until the last micro-batch has gone through all stages."""
    return micro + stages - 1

"""A batch through layers that are cut over devices (the logical axis `layers`): a pipeline.

Every stage has the layers that follow those of the stage before it, and works on another micro-batch (Huang et al.
2019). All stages run one program, `vmap`ped over them: in a tick each computes its layers and hands the result to the
next. Micro-batches lie cut over the stages, too, in slots: in tick t stage 0 takes one from slot t mod n, and all hand
what they have in that slot to the stage before, so that the next is there when its turn comes; into the last one's goes
what is through. So nothing is held, computed or sent twice, and a device sends two activations a tick and pass. Outputs
end at other places than inputs begin: `start` and `end` say where.

With V repeats (circular, or interleaved: Narayanan et al. 2021, §2.2) a stage has V runs of l = L / (V · S) layers, and
a micro-batch goes through all stages V times: a tick is shorter, and so are the S - 1 of them that stages wait. Groups
of S micro-batches make all their rounds before the next one begins, so that the last stage hands each to the first in
the tick in which it is due. Micro-batches come and go in the ticks in which stage 0 takes one; what the last stage has
made when a group ends goes into the place that the last one taken has left. Weights are [V, L / V, …], cut over stages
by their second dimension: no layer ever leaves its stage, and the order of all is that of a model without stages.

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
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from parallel.layout.axes import STAGE
from parallel.layout.rules import RULES, Axes, Constrain, names, spec, without

BUFFER = ("layers", "batch", "sequence", None)  # one micro-batch of each stage
SLOTS = ("layers", None, "batch", "sequence", None)
SCOPE = "over_stage"  # in the compiled program, of what is handed on
ENTERED = "entered"  # what a layer begins with
NONE = -1  # instead of a micro-batch's number
SHARD = RULES["batch"]


class _Outside(Constrain):
    """Rows are cut over stages, too."""

    def _spec(self, axes: Axes) -> P:
        return super()._spec(tuple("rows" if axis == "batch" else axis for axis in axes))


class Stages:
    """On the mesh of `constrain`, for a batch of so many rows. remat, gather, repeats: of the config's `pipeline`, the
    last as pipeline.interleave."""

    def __init__(self, constrain: Constrain, rows: int, remat: str, gather: str, repeats: int = 1):
        self.constrain, self.remat, self.count, self.repeats = constrain, remat, constrain.size("layers"), repeats
        self.shards = constrain.size("batch")
        self.once = gather == "step" and self.shards > 1
        self.micro = constrain.micro or math.gcd(rows // self.shards, self.count)
        self.slots, self.ticks = -(-self.micro // self.count), ticks(self.micro, self.count, repeats)
        numbers, size = np.arange(self.micro), self.count * self.slots
        through = self.micro if repeats == 1 else size  # of whole groups
        ends = (self.count - 1 - (through - 1 - numbers) // self.slots) * self.slots
        ends += (numbers + self.count - 1) % self.slots
        self._ends, self._order = ends, np.full(size, NONE)
        self._order[ends] = numbers

    @property
    def outside(self) -> Constrain:
        """For layers that are no part of the pipeline."""
        return _Outside(self.constrain.mesh)

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
        self, layer_of: Callable, known: Any, x_NTD: jax.Array, weights_L: Any, axes: Any, cast: Callable, policy: Any
    ) -> tuple[jax.Array, Any]:
        """What has started, through all layers -> (what has ended, what layers found in each micro-batch [M, L]).
        layer_of(constrain, known): a layer, (x, weights) -> (x, {name: a number} or None), for rows of which
        that is known. known: of the whole batch, [B, …] each. axes: of weights_L. In every tick weights are cast (or
        are there, cast and gathered); their gradients add up in float32 in either case. policy: what is kept of a layer
        for the backward pass (of jax.checkpoint; None: everything)."""
        weights_SL = jax.tree.map(self._by_stage, weights_L)
        known_MB, S, M = jax.tree.map(self._micro, known), jnp.arange(self.count), np.arange(self.micro)
        inside = Constrain(self.constrain.mesh, apart=(STAGE, *SHARD) if self.once else (STAGE,))

        def stage(weights: Any, x_BTD: jax.Array, known_MB: Any, number: jax.Array) -> tuple[jax.Array, Any]:
            own = jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, number, keepdims=False), known_MB)
            weights = jax.tree.map(_used, *weights) if self.once else cast(weights)
            layer = layer_of(inside, own)
            return lax.scan(lambda x, w: layer(checkpoint_name(x, ENTERED), w), x_BTD, weights)

        if self.once:
            weights_SL, known_MB = self._gathered(weights_SL, cast(weights_SL), axes), self._by_shard(known_MB, 1)
            stage = jax.vmap(stage, in_axes=(0, 0, 1, None), spmd_axis_name=SHARD)
        stages = jax.vmap(stage, in_axes=(0, 0, None, 0), spmd_axis_name=STAGE)

        def work(x_SBTD: jax.Array, u_S: jax.Array) -> tuple[jax.Array, Any]:
            number_S, repeat_S = self._at_work(u_S)
            weights = self._of_repeat(weights_SL, repeat_S, axes) if self.repeats > 1 else weights_SL
            return stages(weights, x_SBTD, known_MB, number_S)

        if self.remat == "stage":
            work = jax.checkpoint(work)
        elif self.repeats > 1 and policy:  # what a tick picks of its weights would be kept for every tick
            work = jax.checkpoint(work, policy=_and_entered(policy))
        is_first, is_last = (jnp.equal(S, i)[:, None, None, None] for i in (0, self.count - 1))

        def tick(carry: tuple, t: jax.Array) -> tuple[tuple, Any]:
            x_SBTD, io = carry
            taken, takes = self._taken(t)
            slot = taken % self.slots
            own = lax.dynamic_index_in_dim(io, slot, 1, keepdims=False)
            x_SBTD = self.constrain(_either(is_first & takes, own, x_SBTD), BUFFER)
            given = self._by_shard(x_SBTD, 1) if self.once else x_SBTD
            made, found = work(given, t - S)
            x_SBTD = self.constrain(made.reshape(x_SBTD.shape), BUFFER)
            left = self._handed_on(own, -1)
            left = _either(jnp.asarray(takes), left, own) if self.repeats > 1 else left
            new = self.constrain(jnp.where(is_last, x_SBTD, left), BUFFER)
            io = self.constrain(lax.dynamic_update_index_in_dim(io, new, slot, 1), SLOTS)
            return (self._handed_on(x_SBTD, 1), io), found

        io = self.constrain(self._slots(x_NTD), SLOTS)
        empty = self.constrain(jnp.zeros_like(io[:, 0]), BUFFER)
        (_, io), found = lax.scan(tick, (empty, io), jnp.arange(self.ticks))
        at_MVS = self._begins(M[:, None], np.arange(self.repeats))[..., None] + S  # the tick in which a stage has it
        found = jax.tree.map(lambda x_tSL: x_tSL[at_MVS, S].reshape(self.micro, -1), found)
        return self._rows(io, SLOTS[3:]), found

    def _by_stage(self, w: jax.Array) -> jax.Array:
        """[L, …] -> [S, L/S, …], or of several repeats [V, L/V, …] -> [S, V, l, …]."""
        if self.repeats == 1:
            return w.reshape(self.count, -1, *w.shape[1:])
        return w.reshape(self.repeats, self.count, -1, *w.shape[2:]).swapaxes(0, 1)

    def _of_repeat(self, weights_SV: Any, repeat_S: jax.Array, axes: Any) -> Any:
        """Of each stage the layers of one repeat. Each device picks its own: left to XLA, they might be gathered."""
        leading = (STAGE, SHARD) if self.once else (STAGE,)
        apart, dim = (STAGE, *SHARD) if self.once else (STAGE,), len(leading)

        def pick(w: jax.Array, axes: Any) -> jax.Array:
            repeats, *rest = without(spec(axes), apart)
            there, here = P(*leading, repeats, *rest), P(*leading, *rest)
            own = lambda w, repeat_S: lax.dynamic_index_in_dim(w, repeat_S[0], dim, keepdims=False)
            mesh = self.constrain.mesh
            manual = jax.shard_map(own, mesh=mesh, in_specs=(there, P(STAGE)), out_specs=here, check_vma=False)
            return manual(w, repeat_S)

        pick_all = lambda tree: jax.tree.map(pick, tree, axes)
        return tuple(map(pick_all, weights_SV)) if self.once else pick_all(weights_SV)

    # ── the schedule: which tick is what ─────────────────────────────────────────────────────────────────────────

    def _begins(self, number: Any, repeat: Any) -> Any:
        """The tick in which stage 0 works on a micro-batch for a repeat."""
        return number // self.count * self._group + repeat * self.count + number % self.count

    def _at_work(self, u: Any) -> tuple[Any, Any]:
        """(micro-batch, repeat) that a stage works on in its u-th tick; any, where there is none."""
        u = jnp.maximum(u, 0)
        number = u // self._group * self.count + u % self.count if self.repeats > 1 else u
        return jnp.minimum(number, self.micro - 1), u % self._group // self.count

    def _taken(self, t: Any) -> tuple[Any, Any]:
        """(The number of the micro-batch that stage 0 takes in a tick, or has taken last; whether it takes one.)"""
        if self.repeats == 1:
            return t, True
        place = t % self._group
        return t // self._group * self.count + jnp.minimum(place, self.count - 1), place < self.count

    @property
    def _group(self) -> int:
        """Ticks of stage 0 for a group of micro-batches, in all repeats."""
        return self.repeats * self.count

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
        """To the stage after (with repeats from the last to the first, too), or before: a permute of its own, whose
        backward pass is one, too."""
        is_ring = self.repeats > 1 and by > 0
        pairs = [(i, (i + by) % self.count) for i in range(self.count) if is_ring or 0 <= i + by < self.count]

        @jax.named_scope(SCOPE)
        def permute(x: jax.Array) -> jax.Array:
            return lax.ppermute(x, STAGE, pairs)

        return self.constrain.manual(permute, (BUFFER,), BUFFER)(x_SBTD)


@jax.custom_vjp
def _either(is_first: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """As jnp.where, which would keep for the backward pass a condition for every element and tick."""
    return jnp.where(is_first, x, y)


_either.defvjp(
    lambda *given: (_either(*given), given[0]), lambda at, g: (None, *(jnp.where(c, g, 0) for c in (at, ~at)))
)


@jax.custom_vjp
def _used(w: jax.Array, tap: jax.Array) -> jax.Array:
    """w, whose gradient is that of the tap."""
    return w


_used.defvjp(lambda w, tap: (w, jnp.zeros((), tap.dtype)), lambda like, g: (None, g.astype(like.dtype)))


def _and_entered(policy: Any) -> Any:
    """As layers are kept by a policy: what they begin with, and what it says."""
    return lambda primitive, *x, **params: params.get("name") == ENTERED or policy(primitive, *x, **params)


def ticks(micro: int, stages: int, repeats: int = 1) -> int:
    """Until the last micro-batch has gone through all stages; repeats begin and end in groups of as many as stages."""
    return repeats * (micro if repeats == 1 else -(-micro // stages) * stages) + stages - 1

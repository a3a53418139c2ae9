"""Strategies: when the replicas exchange what, and how the result is applied. What they share.

A strategy has `init(params) -> state`, `declare(state)`, what each of its arrays is, and one or more programs, pure
functions `(state, batch[K, R, B, T]) -> (state, metrics[K])`, each compiled once; the host's step counter says which is
next. The per-replica computation is vmapped over the leading axis R with `spmd_axis_name="replica"`, so the loss never
learns that replicas exist; what crosses `replica` is what the exchange sends, and a few named scalars.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from parallel.exchange.exchange import Exchange
from parallel.layout import roles
from parallel.layout.axes import SLOW
from parallel.layout.rules import Constrain, of

Batch = dict[str, jax.Array]
TINY = 1e-30  # instead of a rate of 0


@jax.tree_util.register_dataclass
@dataclass
class State:
    """Everything that influences training, and nothing else: what is saved is what is needed to go on."""

    step: jax.Array  # updates, refused ones included: int32
    params: Any  # what is evaluated, saved and exported
    opt: Any
    strategy: Any  # the strategy's own: local parameters, pending messages
    guard: Any  # counters of refused updates, and the windows it judges by
    codec: Any  # residuals, and the codec's own state (parallel/exchange/residuals.py)
    fixed: Any = field(default_factory=dict)  # weights that are saved with the others, and not trained


@dataclass(frozen=True)
class Strategy:
    """What all strategies share. loss_fn(params, batch, constrain) -> (sum, its weight) or (sum, weight, {name: further
    sum}); a token counts 1. optimizer: message and apply (optim/optimizer.py). specs: of the params. accumulate:
    micro-steps per update. guard: what is applied (optim/guard.py)."""

    loss_fn: Callable
    optimizer: Any
    exchange: Exchange
    mesh: Mesh
    specs: Any
    accumulate: int
    guard: Any

    interval: ClassVar[int] = 1  # steps between two exchanges of the same parameter
    fragments: ClassVar[int] = 1  # parts of the model that are exchanged in turn
    hidden_steps: ClassVar[int] = 0  # whole steps that an exchange may hide behind

    @property
    def steps_per_call(self) -> int:
        """K."""
        return 1

    @property
    def replicas(self) -> int:
        """R."""
        return self.exchange.net.replicas

    @property
    def pipelined(self) -> bool:
        """Whether micro-steps go through stages, all of them together."""
        return Constrain(self.mesh).size("layers") > 1

    @classmethod
    def divide(cls, leaves: Any, **own: Any) -> dict[str, Any]:
        """{the field of an exchange: what of the tree of units.Leaf it exchanges}. own: the fields of this class."""
        return {"exchange": leaves}

    def init(self, params: Any) -> State:
        raise NotImplementedError

    def declare(self, state: State) -> Any:
        """The Role of every array of the (abstract) state: of what all strategies have, and nothing of their own."""
        return State(
            step=roles.each(roles.SHARED, state.step),
            params=roles.like(roles.SHARED, self.specs),
            opt=roles.of_optimizer(self.optimizer, state.opt, self.specs, SLOW),
            strategy={},
            guard=roles.of_guard(state.guard),
            codec=self.exchange.declared,
        )

    def programs(self) -> dict[str, Callable]:
        raise NotImplementedError

    def program_at(self, step: int, last: int) -> str:
        """Which program makes the updates after `step`; the run ends at `last`."""
        raise NotImplementedError

    def exchanges(self) -> dict[str, tuple[Exchange, ...]]:
        """What each program exchanges, in full."""
        return dict.fromkeys(self.programs(), (self.exchange,))

    def loss(self, params: Any, batch_BT: Batch, constrain: Constrain | None = None) -> tuple[jax.Array, tuple]:
        """(summed loss, what else `loss_fn` gives)."""
        loss, *beside = self.loss_fn(params, batch_BT, constrain or Constrain(self.mesh, self.accumulate))
        return loss, tuple(jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), beside))

    def loss_and_gradient(self, params: Any, batch_BT: Batch) -> tuple[tuple, Any]:
        """One replica's sums, as `loss_fn` gives them, and the gradient of the first, over all its micro-steps."""
        return self.add_micro_steps(params, self.micro_batches(batch_BT), None)

    def micro_batches(self, batch_BT: Batch) -> Batch:
        """[B, …] -> [A, B/A, …]. Row b goes to micro-step b mod A: with contiguous cuts, rows would have to cross the
        mesh."""
        constrain = Constrain(self.mesh)

        def split(x_BT: jax.Array) -> jax.Array:
            x_BAT = x_BT.reshape(-1, self.accumulate, *x_BT.shape[1:])
            return constrain(x_BAT.swapaxes(0, 1), (None, "batch", *[None] * (x_BT.ndim - 1)))

        return jax.tree.map(split if self.accumulate > 1 else lambda x: x[None], batch_BT)

    def add_micro_steps(self, params: Any, batch_ABT: Batch, total: Any) -> tuple[tuple, Any]:
        """total (None: zeros) plus the sums and the gradient of these micro-steps, each whole before it is added:
        libtpu 0.0.52 fails on a head's gradient that a loop adds up where it is summed over devices."""
        constrain = Constrain(self.mesh, length(batch_ABT))
        if self.pipelined:  # they go through the stages together
            batch_ABT = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(1, -1, *x.shape[2:]), batch_ABT)

        def micro_step(batch_BT: Batch) -> tuple[tuple, Any]:
            (loss, beside), grads = jax.value_and_grad(self.loss, has_aux=True)(params, batch_BT, constrain)
            return (loss, *beside), self.constrain_to_specs(grads)

        add = lambda sums, x_BT: (jax.tree.map(jnp.add, sums, lax.optimization_barrier(micro_step(x_BT))), None)
        first = take(batch_ABT, 0)
        if total is None and length(batch_ABT) == 1:
            return micro_step(first)
        if total is None:
            total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(micro_step, first))
        return lax.scan(add, total, batch_ABT)[0]

    def constrain_to_specs(self, tree: Any) -> Any:
        put = lambda x, spec: lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))
        return jax.tree.map(put, tree, self.specs)

    def agree(self, sums_R: tuple, tree_R: Any, name: str = "step") -> tuple[tuple, jax.Array]:
        """Over all replicas: (these sums [R], the root mean square of the replicas' norms), before anything is
        encoded. One message of a few scalars: nothing else crosses `replica` but the exchange, and every device decides
        by the same bits."""
        squares_R = jax.vmap(lambda tree: optax.tree.norm(tree, squared=True), spmd_axis_name=SLOW)(tree_R)
        found_R, treedef = jax.tree.flatten((sums_R, squares_R))
        found = [x_R[0] for x_R in found_R] if self.replicas == 1 else self.exchange.scalars(found_R, name)
        sums, squares = treedef.unflatten(found)
        return sums, jnp.sqrt(squares / self.replicas)

    def mean(self, tree_R: Any, codec: Any, step: jax.Array) -> tuple[Any, Any]:
        """Exchanges a tree [R, …] like the parameters: (its mean, what the exchange remembers)."""
        if self.replicas == 1:  # there is nobody to exchange with
            return take(tree_R, 0), codec
        return self.exchange.mean(tree_R, codec, step)

    def settle(
        self, counters: Any, apply: Callable, specs: Any, mean: Any, before: tuple, ready: Any, rate: Any, judged: bool
    ) -> tuple[tuple, jax.Array, Any, Any]:
        """What an exchanged mean does to `before`, (params, an optimizer's state), as far as the guard allows.

        apply(mean, before, norm) -> (params, state). ready: whether the mean may be used at all. rate: the learning
        rate, by which the size of an update is measured. judged: whether sizes differ. What residuals have no part in
        was judged when it was new.

        Returns ((params, state), the norm of the mean, the verdict on whether it may be used, that on its update)."""
        norm = norms(self.mesh, (specs, mean))[0]
        usable = used = self.guard.judge(counters, None, norm, ready)
        if self.exchange.feedback and judged:
            # Worked out here for its size alone, and again where it is kept: from here it would be one more copy.
            moved = jax.tree.map(jnp.subtract, apply(mean, before, norm)[0], before[0])
            size, whole = norms(self.mesh, (specs, moved), (specs, before[0]))
            ratio = size / (divisor(whole) * jnp.maximum(rate, TINY))
            used = self.guard.judge(counters, counters.ratios_W, ratio, usable.applied)

        def after() -> tuple[Any, Any]:
            params, state = apply(mean, before, norm)
            part = lambda x, y: jnp.where(used.scale < 1, x + used.scale * (y - x), y)
            return jax.tree.map(part, before[0], params), state

        return self.guard.commit(used, after, before), norm, usable, used


def divisor(x: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, 1)


def means(loss: jax.Array, weight: jax.Array, further: dict[str, jax.Array] | None = None) -> dict[str, jax.Array]:
    """Metrics of what `loss_fn` gives."""
    per_weight = {name: x / divisor(weight) for name, x in {"loss": loss, **(further or {})}.items()}
    return per_weight | {"weight": weight}


def take(batch: Any, i: int) -> Any:
    return jax.tree.map(lambda x: x[i], batch)


def part(batch: Any, first: int, last: int) -> Any:
    return jax.tree.map(lambda x: x[first:last], batch)


def length(batch: Any) -> int:
    return jax.tree.leaves(batch)[0].shape[0]


def per_step(metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Of one step, [1]."""
    return jax.tree.map(lambda x: x[None], metrics)


def norms(mesh: Mesh, *trees: tuple[Any, Any]) -> tuple[jax.Array, ...]:
    """The L2 norm of each (specs, tree), float32, the same bits on every device. Left to XLA, each group of replicas
    would add up its own devices' parts, in an order of its own, and replicas might decide differently on the last bit.
    Here the parts of the fast axes are gathered and added up in one order everywhere; nothing crosses `replica`."""
    fast = tuple(axis for axis in mesh.axis_names if axis != SLOW and mesh.shape[axis] > 1)

    def share(x: jax.Array, spec: P) -> jax.Array:
        """This device's part of the sum of squares: copies count on the first of their holders."""
        copies = [lax.axis_index(axis) for axis in fast if axis not in of(spec)]
        square = jnp.sum(jnp.square(x.astype(jnp.float32)))
        return jnp.where(sum(copies) == 0, square, 0.0) if copies else square

    def body(*found: Any) -> jax.Array:
        sums = [sum(jax.tree.leaves(jax.tree.map(share, x, specs))) for x, (specs, _) in zip(found, trees, strict=True)]
        parts_DM = jnp.stack(sums)[None]
        for axis in fast:
            parts_DM = lax.all_gather(parts_DM, axis, tiled=True)
        return jnp.sqrt(jnp.sum(parts_DM, axis=0))

    in_specs = tuple(specs for specs, _ in trees)
    found_M = jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=P(), check_vma=False)(*(t for _, t in trees))
    return tuple(found_M)

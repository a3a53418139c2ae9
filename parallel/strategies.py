"""Strategies: when the replicas exchange what, and how the result is applied. This is the synchronous one.

A strategy has `init(params) -> state` and one or more programs, pure functions `(state, batch[K, R, B, T]) ->
(state, metrics[K])`, each compiled once; the host's step counter says which one is next. The per-replica computation
is vmapped over the leading axis R with `spmd_axis_name="replica"`, so the loss never learns that replicas exist; what
crosses `replica` is what the exchange sends, and a few named scalars.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding

from parallel import residuals
from parallel.exchange import AXIS, Exchange
from parallel.rules import Constrain

Batch = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclass
class State:
    """Everything that influences training, and nothing else: what is saved is what is needed to go on."""

    step: jax.Array  # calls made, int32: times steps_per_call are updates
    params: Any  # what is evaluated, saved and exported
    opt_state: Any
    strategy: Any  # the strategy's own: local parameters, pending messages
    guard: Any  # counters of skipped updates, and the window of norms
    codec: Any  # residuals, and the codec's own state (parallel/residuals.py)


@dataclass(frozen=True)
class Strategy:
    """What all strategies share.

    loss_fn(params, batch, constrain) -> (sum over tokens, number of tokens). optimizer: message and apply
    (model/optimizer.py). specs: of the params. accumulate: micro-steps per update. guard: which gradients are applied
    (model/optimizer.py).
    """

    loss_fn: Callable
    optimizer: Any
    exchange: Exchange
    mesh: Mesh
    specs: Any
    accumulate: int
    guard: Any

    @property
    def steps_per_call(self) -> int:
        """K."""
        return 1

    def init(self, params: Any) -> State:
        raise NotImplementedError

    def programs(self) -> dict[str, Callable]:
        raise NotImplementedError

    def program_at(self, step: int, last: int) -> str:
        """Which program makes the updates after `step`; the run ends at `last`."""
        raise NotImplementedError

    def exchanges(self) -> dict[str, tuple[Exchange, ...]]:
        """What each program exchanges, in full."""
        return dict.fromkeys(self.programs(), (self.exchange,))

    def codec_specs(self) -> Any:
        return self.exchange.state_specs

    def loss_and_gradient(self, params: Any, batch_BT: Batch) -> tuple[jax.Array, Any]:
        """One replica's summed loss and the gradient of the sum, over all its micro-steps."""
        return self.add_micro_steps(params, self.micro_batches(batch_BT), None)

    def micro_batches(self, batch_BT: Batch) -> Batch:
        """[B, T] -> [A, B/A, T]. Row b goes to micro-step b mod A: with contiguous cuts, rows would have to cross the
        mesh."""
        constrain = Constrain(self.mesh)

        def split(x_BT: jax.Array) -> jax.Array:
            x_BAT = x_BT.reshape(-1, self.accumulate, *x_BT.shape[1:])
            return constrain(x_BAT.swapaxes(0, 1), (None, "batch", None))

        return jax.tree.map(split if self.accumulate > 1 else lambda x: x[None], batch_BT)

    def add_micro_steps(self, params: Any, batch_ABT: Batch, total: Any) -> tuple[jax.Array, Any]:
        """total (None: zeros) plus the loss and gradient of these micro-steps."""
        constrain = Constrain(self.mesh)

        def micro_step(batch_BT: Batch) -> tuple[jax.Array, Any]:
            value, grads = jax.value_and_grad(lambda params: self.loss_fn(params, batch_BT, constrain)[0])(params)
            return value, self.constrain_to_specs(grads)

        add = lambda total, batch_BT: (jax.tree.map(jnp.add, total, micro_step(batch_BT)), None)
        first = jax.tree.map(lambda x: x[0], batch_ABT)
        if total is None and batch_ABT["tokens"].shape[0] == 1:
            return micro_step(first)
        if total is None:
            total = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(micro_step, first))
        return lax.scan(add, total, batch_ABT)[0]

    def constrain_to_specs(self, tree: Any) -> Any:
        put = lambda x, spec: lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))
        return jax.tree.map(put, tree, self.specs)

    def agree(self, loss_R: jax.Array, tokens_R: jax.Array, tree_R: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Over all replicas: summed loss, number of tokens, and whether everything is finite, before it is encoded.
        One message of three scalars, after the gradient: nothing else of a step crosses `replica` but the exchange."""
        if self.exchange.replicas == 1:
            return loss_R[0], tokens_R[0], jnp.isfinite(loss_R[0])  # nothing is encoded: the norm sees the rest
        norm_R = jax.vmap(optax.tree.norm, spmd_axis_name=AXIS)(tree_R)
        bad_R = 1.0 - jnp.isfinite(norm_R).astype(jnp.float32)
        loss, tokens, bad = self.exchange.scalars(jnp.stack([loss_R, tokens_R, bad_R], axis=1), "step")
        return loss, tokens, bad == 0

    def update(self, state: State, mean: Any, opt_state: Any, codec: Any, finite: jax.Array) -> tuple[State, Any]:
        """Applies an exchanged mean, unless the guard forbids: then parameters, optimizer, residuals and the codec's
        state stay as they were. Returns (state, what the metrics say about it)."""
        norm = optax.tree.norm(mean)
        allowed = self.guard.allows(state.guard, norm, finite & jnp.isfinite(norm))
        params, opt_state, codec = lax.cond(  # a where over all arrays would hold the old and the new ones at once
            allowed,
            lambda: (*self.optimizer.apply(mean, opt_state, state.params), codec),
            lambda: (state.params, state.opt_state, state.codec),
        )
        guard = self.guard.update(state.guard, norm, allowed)
        metrics = {
            "grad_norm": norm,
            "param_norm": optax.tree.norm(params),
            "lr": jnp.asarray(self.optimizer.schedule(state.guard.applied), jnp.float32),
            "skipped": guard.skipped,
            "skipped_in_a_row": guard.in_a_row,
        }
        return State(state.step + 1, params, opt_state, state.strategy, guard, codec), metrics


@dataclass(frozen=True)
class Sync(Strategy):
    """Synchronous data parallelism: every step applies the mean gradient over all tokens of all replicas."""

    def init(self, params: Any) -> State:
        zero = jnp.zeros((), jnp.int32)
        opt_state = self.optimizer.init(params, self.exchange.replicas)
        return State(zero, params, opt_state, {}, self.guard.init(), residuals.init(self.exchange))

    def programs(self) -> dict[str, Callable]:
        return {"step": self.step}

    def program_at(self, step: int, last: int) -> str:
        return "step"

    def step(self, state: State, batch_KRBT: Batch) -> tuple[State, dict[str, jax.Array]]:
        batch_RBT = jax.tree.map(lambda x: x[0], batch_KRBT)
        messages_R, opt_state, loss, tokens, finite = self.messages(state, batch_RBT)
        mean, codec = self.exchange.mean(messages_R, state.codec, state.step)
        state, metrics = self.update(state, mean, opt_state, codec, finite)
        return state, jax.tree.map(lambda x: x[None], metrics | {"loss": loss, "tokens": tokens})

    def messages(self, state: State, batch_RBT: Batch) -> tuple[Any, Any, jax.Array, jax.Array, jax.Array]:
        """(messages [R, …], opt_state, mean loss, tokens, whether all is finite)."""
        per_replica = jax.vmap(self.loss_and_gradient, in_axes=(None, 0), spmd_axis_name=AXIS)
        return self.weighted(state, batch_RBT, *per_replica(state.params, batch_RBT))

    def weighted(
        self, state: State, batch_RBT: Batch, loss_R: jax.Array, grads_R: Any
    ) -> tuple[Any, Any, jax.Array, jax.Array, jax.Array]:
        loss, tokens, finite = self.agree(loss_R, jnp.sum(batch_RBT["mask"], axis=(1, 2)), grads_R)
        tokens = jnp.maximum(tokens, 1)
        # Weighted by n_i / mean(n) before a codec sees it, so that the mean over replicas is the mean over tokens.
        grads_R = jax.tree.map(lambda g: g * (self.exchange.replicas / tokens), grads_R)
        messages_R, opt_state = self.optimizer.message(grads_R, state.opt_state)
        return messages_R, opt_state, loss / tokens, tokens, finite

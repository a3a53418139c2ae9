"""Strategies: when the replicas exchange what, and how the result is applied.

A strategy builds (init, step). `step(state, batch[K, R, B, T]) -> (state, metrics[K])` is one pure function, jitted
once. The per-replica computation is vmapped over the leading axis R with `spmd_axis_name="replica"`, so the loss never
learns that replicas exist; what crosses `replica` is what the exchange sends, and two handfuls of named scalars.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from parallel.exchange import AXIS, Exchange
from parallel.rules import Constrain, path_name

Batch = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclass
class State:
    """Everything that influences training, and nothing else: what is saved is what is needed to go on."""

    step: jax.Array  # calls made, int32
    params: Any  # what is evaluated, saved and exported
    opt_state: Any
    strategy: Any  # the strategy's own: local parameters, pending messages, residuals
    guard: Any  # counters of skipped updates, and the window of norms


@dataclass(frozen=True)
class Sync:
    """Synchronous data parallelism: every step applies the mean gradient over all tokens of all replicas.

    loss_fn(params, batch, constrain) -> (sum over tokens, number of tokens). optimizer: message and apply
    (model/optimizer.py). accumulate: micro-steps per update. guard: which
    gradients are applied (model/optimizer.py).
    """

    loss_fn: Callable
    optimizer: Any
    exchange: Exchange
    mesh: Mesh
    specs: Any
    accumulate: int
    guard: Any

    def init(self, params: Any) -> State:
        return State(jnp.zeros((), jnp.int32), params, self.optimizer.init(params), {}, self.guard.init())

    def step(self, state: State, batch_KRBT: Batch) -> tuple[State, dict[str, jax.Array]]:
        batch_RBT = jax.tree.map(lambda x: x[0], batch_KRBT)
        grads, opt_state, loss, tokens, finite = self.gradient(state.params, state.opt_state, batch_RBT)
        grad_norm = optax.tree.norm(grads)
        allowed = self.guard.allows(state.guard, grad_norm, finite & jnp.isfinite(grad_norm))
        params, opt_state = lax.cond(  # a where over all arrays would hold the old and the new ones at once
            allowed,
            lambda: self.optimizer.apply(grads, opt_state, state.params),
            lambda: (state.params, state.opt_state),
        )
        counters = self.guard.update(state.guard, grad_norm, allowed)
        metrics = {
            "loss": loss,
            "grad_norm": grad_norm,
            "param_norm": optax.tree.norm(params),
            "lr": jnp.asarray(self.optimizer.schedule(state.guard.applied), jnp.float32),
            "tokens": tokens,
            "skipped": counters.skipped,
            "skipped_in_a_row": counters.in_a_row,
        }
        state = State(state.step + 1, params, opt_state, state.strategy, counters)
        return state, jax.tree.map(lambda x: x[None], metrics)

    def gradient(
        self, params: Any, opt_state: Any, batch_RBT: Batch
    ) -> tuple[Any, Any, jax.Array, jax.Array, jax.Array]:
        """(exchanged gradient of the mean over all tokens, opt_state, mean loss, tokens, whether all is finite)."""
        loss_R, grads_R = jax.vmap(self._gradient, in_axes=(None, 0), spmd_axis_name=AXIS)(params, batch_RBT)
        tokens_R = jnp.sum(batch_RBT["mask"], axis=(1, 2))
        loss, tokens, finite = self._agree(loss_R, tokens_R, grads_R)
        tokens = jnp.maximum(tokens, 1)
        # Weighted by n_i / mean(n) before a codec sees it, so that the mean over replicas is the mean over tokens.
        grads_R = jax.tree.map(lambda g: g * (self.exchange.replicas / tokens), grads_R)
        messages_R, opt_state = self.optimizer.message(grads_R, opt_state)
        return self.exchange.mean(messages_R), opt_state, loss / tokens, tokens, finite

    def _gradient(self, params: Any, batch_BT: Batch) -> tuple[jax.Array, Any]:
        """One replica's summed loss and the gradient of the sum, over all its micro-steps."""
        constrain = Constrain(self.mesh)

        def micro_step(batch_BT: Batch) -> tuple[jax.Array, Any]:
            value, grads = jax.value_and_grad(lambda params: self.loss_fn(params, batch_BT, constrain)[0])(params)
            grads = jax.tree.map(
                lambda g, spec: lax.with_sharding_constraint(g, NamedSharding(self.mesh, spec)), grads, self.specs
            )
            return value, grads

        if self.accumulate == 1:
            return micro_step(batch_BT)

        def split(x_BT: jax.Array) -> jax.Array:
            # Row b goes to micro-step b mod A: with contiguous cuts, rows would have to cross the mesh.
            x_BAT = x_BT.reshape(-1, self.accumulate, *x_BT.shape[1:])
            return constrain(x_BAT.swapaxes(0, 1), (None, "batch", None))

        def add(total, batch_BT):
            return jax.tree.map(jnp.add, total, micro_step(batch_BT)), None

        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(micro_step, batch_BT))
        return lax.scan(add, zero, jax.tree.map(split, batch_BT))[0]

    def _agree(self, loss_R: jax.Array, tokens_R: jax.Array, grads_R: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Over all replicas: summed loss, number of tokens, and whether every gradient is finite, before it is
        encoded. One message of three scalars, after the gradient: nothing else of a step crosses `replica` but the
        exchange."""
        if self.exchange.replicas == 1:
            return loss_R[0], tokens_R[0], jnp.isfinite(loss_R[0])  # nothing is encoded: the norm sees the rest
        norm_R = jax.vmap(optax.tree.norm, spmd_axis_name=AXIS)(grads_R)
        bad_R = 1.0 - jnp.isfinite(norm_R).astype(jnp.float32)
        loss, tokens, bad = self.exchange.scalars(jnp.stack([loss_R, tokens_R, bad_R], axis=1), "step")
        return loss, tokens, bad == 0


def evaluation(loss_fn: Callable, mesh: Mesh) -> Callable:
    """evaluate(params, batch[D, B, T]) -> (summed loss, tokens), D the size of the `replica` axis."""

    def evaluate(params: Any, batch_DBT: Batch) -> tuple[jax.Array, jax.Array]:
        one = lambda params, batch_BT: loss_fn(params, batch_BT, Constrain(mesh))
        loss_D, tokens_D = jax.vmap(one, in_axes=(None, 0), spmd_axis_name=AXIS)(params, batch_DBT)
        return jnp.sum(loss_D), jnp.sum(tokens_D)

    return evaluate


def state_specs(abstract_state: State, param_specs: Any) -> State:
    """PartitionSpecs of the whole state. An optimizer's array that mirrors a parameter (same path, same shape) is
    sharded like it; everything else is replicated."""
    params = {
        path_name(path): (leaf.shape, spec)
        for (path, leaf), spec in zip(
            jax.tree_util.tree_leaves_with_path(abstract_state.params), _leaves(param_specs), strict=True
        )
    }

    def spec_of(path, leaf):
        parts = path_name(path).split("/")
        for start in range(len(parts)):
            shape, spec = params.get("/".join(parts[start:]), (None, None))
            if shape == leaf.shape:
                return spec
        return P()

    return jax.tree_util.tree_map_with_path(spec_of, abstract_state)


def _leaves(specs: Any) -> list[P]:
    return jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P))


STRATEGIES = {"sync": Sync}

"""Local strategies: replicas train by themselves and exchange the way they have gone, not the gradient of each step.

DiLoCo (Douillard et al. 2023, algorithm 1), and what it shares with parallel/streaming.py and parallel/eager.py.
Replicas count equally, whatever their numbers of tokens. `params` are the global parameters: they are what is evaluated
(2.67 against 2.77 for a replica's own, in the Streaming paper), and they only change where something is exchanged.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from parallel import overlap, residuals
from parallel.exchange import AXIS, Exchange
from parallel.strategies import Batch, State, Strategy

LOCAL_METRICS = ("loss", "grad_norm", "tokens", "skipped", "skipped_in_a_row")  # [K, R]: not added up over the link


def outer_optimizer(optimizer: str, lr: float, momentum: float) -> optax.GradientTransformation:
    """What is done with the mean pseudo-gradient: nesterov, sgd (without momentum), adam."""
    if optimizer == "adam":
        return optax.adam(lr, b1=momentum, b2=0.95)
    return optax.sgd(lr, momentum=momentum if optimizer == "nesterov" else None, nesterov=True)


@dataclass(frozen=True)
class Local(Strategy):
    """interval: H inner steps from exchange to exchange. outer: of the pseudo-gradients."""

    interval: int = 30
    outer: Any = None

    def init(self, params: Any) -> State:
        R = self.exchange.replicas
        copies = lambda tree: jax.tree.map(lambda x: jnp.broadcast_to(x, (R, *x.shape)), tree)
        inner = {"params": params, "opt_state": self.optimizer.init(params), "guard": self.guard.init()}
        zero = jnp.zeros((), jnp.int32)
        return State(
            zero,
            params,
            self.outer.init(params),
            {"replicas": copies(inner)},
            self.guard.init(),
            residuals.init(self.exchange),
        )

    def inner_step(self, inner_R: Any, batch_RBT: Batch) -> tuple[Any, dict[str, jax.Array]]:
        """One step of every replica by itself: nothing crosses `replica`, not even the loss."""
        gradient = lambda params, batch_BT, _: (*self.loss_and_gradient(params, batch_BT), None)
        return self._inner_step(gradient, inner_R, batch_RBT, None)[:2]

    def _inner_step(self, gradient: Callable, inner_R: Any, batch_RBT: Batch, between: Any) -> tuple[Any, Any, Any]:
        """The same, and `between`. gradient(params, batch, between) -> (loss, gradient, between), of one replica."""

        def one(inner: Any, batch_BT: Batch, between: Any) -> tuple[Any, Any, Any]:
            loss, grads, between = gradient(inner["params"], batch_BT, between)
            tokens = jnp.maximum(jnp.sum(batch_BT["mask"]), 1)
            grads = jax.tree.map(lambda g: g / tokens, grads)
            norm, guard = optax.tree.norm(grads), inner["guard"]
            allowed = self.guard.allows(guard, norm, jnp.isfinite(norm) & jnp.isfinite(loss))
            params, opt_state = self.optimizer.apply(grads, inner["opt_state"], inner["params"])
            keep = lambda new, old: jnp.where(allowed, new, old)
            after = self.guard.update(guard, norm, allowed)
            metrics = (loss / tokens, norm, tokens, after.skipped, after.in_a_row)
            inner = {
                "params": jax.tree.map(keep, params, inner["params"]),
                "opt_state": jax.tree.map(keep, opt_state, inner["opt_state"]),
                "guard": after,
            }
            return inner, dict(zip(LOCAL_METRICS, metrics, strict=True)), between

        per_replica = jax.vmap(one, in_axes=(0, 0, None), out_axes=(0, 0, None), spmd_axis_name=AXIS)
        return per_replica(inner_R, batch_RBT, between)

    def inner_steps(self, inner_R: Any, batch_KRBT: Batch) -> tuple[Any, dict[str, jax.Array]]:
        if batch_KRBT["tokens"].shape[0] == 1:
            inner_R, metrics = self.inner_step(inner_R, jax.tree.map(lambda x: x[0], batch_KRBT))
            return inner_R, jax.tree.map(lambda x: x[None], metrics)
        return lax.scan(self.inner_step, inner_R, batch_KRBT)

    def exchange_meanwhile(self, step: jax.Array, exchanges: Any, codec: Any, inner_R: Any, batch_KRBT: Batch) -> tuple:
        """Exchanges {name: (exchange, tree)} during these inner steps: the first hop during the first half, the second
        during the rest; of a single step, of its halves. Without the barriers a compiler may wait for the first hop
        before it computes anything.

        Returns ({name: (mean, codec state)}, inner_R, metrics or None without steps)."""
        K = batch_KRBT["tokens"].shape[0]
        if not K or self.exchange.replicas == 1:
            done = {name: exchange.mean(tree, codec[name], step) for name, (exchange, tree) in exchanges.items()}
            return done, *((inner_R, None) if not K else self.inner_steps(inner_R, batch_KRBT))
        half = -(-K // 2)
        part = lambda a, b: jax.tree.map(lambda x: x[a:b], batch_KRBT)
        flights: Any = {name: exchange.start(tree, codec[name], step) for name, (exchange, tree) in exchanges.items()}
        if K == 1:
            gradient = functools.partial(overlap.loss_and_gradient, self)
            batch_RBT = jax.tree.map(lambda x: x[0], batch_KRBT)
            inner_R, metrics, flights = self._inner_step(gradient, inner_R, batch_RBT, flights)
            metrics = jax.tree.map(lambda x: x[None], metrics)
        else:
            inner_R, metrics = self.inner_steps(inner_R, part(0, half))
            flights, inner_R = lax.optimization_barrier((flights, inner_R))
        done = {name: exchanges[name][0].finish(flight, own, step) for name, (flight, own) in flights.items()}
        if half < K:
            inner_R, more = self.inner_steps(inner_R, part(half, K))
            metrics = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), metrics, more)
        done, inner_R = lax.optimization_barrier((done, inner_R))
        return done, inner_R, metrics

    def all_finite(self, tree_R: Any) -> jax.Array:
        """Agreed by all replicas, before anything is encoded."""
        norm_R = jax.vmap(optax.tree.norm, spmd_axis_name=AXIS)(tree_R)
        bad_R = 1.0 - jnp.isfinite(norm_R).astype(jnp.float32)
        return self.exchange.scalars(bad_R[:, None], "round")[0] == 0

    def report(self, calls: jax.Array, params: Any, guard: Any, metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """[K, R] of each replica, and [K] of what all share. calls: made before this one; guard: of the rounds."""
        K = metrics["loss"].shape[0]
        lr = jnp.asarray(self.optimizer.schedule(K * calls + jnp.arange(K)), jnp.float32)
        return metrics | {
            "param_norm": jnp.broadcast_to(optax.tree.norm(params), (K,)),
            "lr": jnp.broadcast_to(lr, (K,)),
            "rounds_skipped": jnp.broadcast_to(guard.skipped, (K,)),
        }

    def spread(self, tree: Any, specs: Any) -> Any:
        """One copy for each replica, laid where the replica is."""
        R = self.exchange.replicas

        def copies(x: jax.Array, spec: P) -> jax.Array:
            x_R = jnp.broadcast_to(x, (R, *x.shape))
            return lax.with_sharding_constraint(x_R, NamedSharding(self.mesh, P(AXIS, *spec)))

        return jax.tree.map(copies, tree, specs)


@dataclass(frozen=True)
class DiLoCo(Local):
    """H inner steps; Δ = mean over replicas of θ_global − θ_i; θ_global ← outer(θ_global, Δ); θ_i ← θ_global.

    Inner optimizer states stay with their replicas. A last round of fewer steps is exchanged like the others. With
    H = 1, SGD inside and outside (rate 1, no momentum) it is synchronous SGD.
    """

    def programs(self) -> dict[str, Callable]:
        inner = {"inner": self.inner} if self.interval > 1 else {}
        return inner | {"inner+exchange": self.inner_and_exchange}

    def exchanges(self) -> dict[str, tuple[Exchange, ...]]:
        return {"inner": (), "inner+exchange": (self.exchange,)}

    def program_at(self, step: int, last: int) -> str:
        return "inner+exchange" if (step + 1) % self.interval == 0 or step + 1 == last else "inner"

    def inner(self, state: State, batch_KRBT: Batch) -> tuple[State, dict[str, jax.Array]]:
        inner_R, metrics = self.inner_steps(state.strategy["replicas"], batch_KRBT)
        metrics = self.report(state.step, state.params, state.guard, metrics)
        return State(
            state.step + 1, state.params, state.opt_state, {"replicas": inner_R}, state.guard, state.codec
        ), metrics

    def inner_and_exchange(self, state: State, batch_KRBT: Batch) -> tuple[State, dict[str, jax.Array]]:
        state, metrics = self.inner(state, batch_KRBT)
        inner_R = state.strategy["replicas"]
        delta_R = jax.tree.map(lambda ours, theirs_R: ours - theirs_R, state.params, inner_R["params"])
        finite = self.all_finite(delta_R)
        mean, codec = self.exchange.mean(delta_R, state.codec, state.step)

        def applied() -> tuple:
            updates, opt_state = self.outer.update(mean, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            return params, opt_state, codec, self.spread(params, self.specs)

        def kept() -> tuple:
            return state.params, state.opt_state, state.codec, inner_R["params"]

        params, opt_state, codec, params_R = lax.cond(finite, applied, kept)
        counters = self.guard.update(state.guard, optax.tree.norm(mean), finite)
        strategy = {"replicas": inner_R | {"params": params_R}}
        metrics |= {"rounds_skipped": counters.skipped[None]}
        return State(state.step, params, opt_state, strategy, counters, codec), metrics

"""Local strategies: replicas train by themselves and exchange the way they have gone, not the gradient of each step.

DiLoCo (Douillard et al. 2023, algorithm 1), and what it shares with streaming.py and eager.py. Replicas count equally,
whatever their numbers of tokens. `params` are the global parameters: they are what is evaluated
(2.67 against 2.77 for a replica's own, in the Streaming paper), and they only change where something is exchanged.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from parallel.exchange import residuals
from parallel.exchange.exchange import Exchange
from parallel.layout import roles
from parallel.layout.axes import SLOW
from parallel.strategies import overlap
from parallel.strategies.base import TINY, Batch, State, Strategy, divisor, length, means, norms, part, per_step, take


@dataclass(frozen=True)
class Outer:
    """What is done with the mean pseudo-gradient: nesterov, sgd (without momentum), adam. As an optimizer of
    optim/optimizer.py: `init`, and `apply`, which needs no norm. averaged: the last keys of weights that become the
    mean of all replicas."""

    optimizer: str
    lr: float
    momentum: float
    averaged: tuple[str, ...] = ()
    b2: ClassVar[float] = 0.95
    eps: ClassVar[float] = 1e-8

    def init(self, params: Any) -> dict[str, Any]:
        slots = {"nesterov": ("momentum",), "adam": ("first", "second")}.get(self.optimizer, ())
        beside = jax.tree.map(lambda x: {slot: jnp.zeros_like(x) for slot in slots}, params) if slots else {}
        return beside | ({"count": jnp.zeros((), jnp.int32)} if self.optimizer == "adam" else {})

    def apply(self, mean: Any, before: tuple, norm: Any = None) -> tuple[Any, dict[str, Any]]:
        """(params, state) after one step from `before`."""
        after, state = self._apply(mean, *before)
        averaged = lambda path, moved, x, d: x - d if path[-1].key in self.averaged else moved
        return jax.tree_util.tree_map_with_path(averaged, after, before[0], mean), state

    def _apply(self, mean: Any, params: Any, state: Any) -> tuple[Any, dict[str, Any]]:
        if self.optimizer == "sgd":
            return jax.tree.map(lambda x, d: x - self.lr * d, params, mean), state
        beside = {name: own for name, own in state.items() if name != "count"}
        slot = lambda name: jax.tree.map(lambda _, own: own[name], params, beside)
        if self.optimizer == "nesterov":
            m = jax.tree.map(lambda d, m: d + self.momentum * m, mean, slot("momentum"))
            after = jax.tree.map(lambda x, d, m: x - self.lr * (d + self.momentum * m), params, mean, m)
            return after, jax.tree.map(lambda m: {"momentum": m}, m)
        count = state["count"] + 1
        mix = lambda b: lambda old, new: (1 - b) * new + b * old
        first = jax.tree.map(mix(self.momentum), slot("first"), mean)
        second = jax.tree.map(mix(self.b2), slot("second"), jax.tree.map(jnp.square, mean))
        unbiased = lambda x, b: x / (1 - b ** count.astype(jnp.float32))
        step = lambda m, v: unbiased(m, self.momentum) / (jnp.sqrt(unbiased(v, self.b2)) + self.eps)
        after = jax.tree.map(lambda x, m, v: x - self.lr * step(m, v), params, first, second)
        return after, jax.tree.map(lambda m, v: {"first": m, "second": v}, first, second) | {"count": count}


@dataclass(frozen=True)
class Local(Strategy):
    """interval: H inner steps from exchange to exchange. outer: of the pseudo-gradients."""

    interval: int = 30
    outer: Any = None

    def init(self, params: Any) -> State:
        inner = {"params": params, "opt": self.optimizer.init(params), "guard": self.guard.init()}
        outer = {"shared": self.outer.init(params)}
        strategy = {"replicas": self.copies(inner), "outer": outer, "rounds": self.guard.init()}
        codec = residuals.init(self.exchange)
        return State(step=jnp.int32(0), params=params, opt={}, strategy=strategy, guard={}, codec=codec)

    def declare(self, state: State) -> Any:
        outer = {"shared": roles.of_optimizer(self.outer, state.strategy["outer"]["shared"], self.specs, SLOW)}
        rounds = roles.of_guard(state.strategy["rounds"])
        strategy = {"replicas": self.declare_replicas(state), "outer": outer, "rounds": rounds}
        return replace(super().declare(state), opt={}, strategy=strategy, guard={})

    def declare_replicas(self, state: State) -> Any:
        """Of what each replica has of its own."""
        own = state.strategy["replicas"]
        return {
            "params": roles.like(roles.REPLICA, self.specs, SLOW),
            "opt": roles.of_optimizer(self.optimizer, own["opt"], self.specs, SLOW, own=True),
            "guard": roles.of_guard(own["guard"], SLOW),
        }

    def copies(self, tree: Any) -> Any:
        """One for each replica."""
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (self.replicas, *x.shape)), tree)

    def inner_step(self, inner_R: Any, batch_RBT: Batch) -> tuple[Any, dict[str, jax.Array]]:
        """One step of every replica by itself: nothing crosses `replica`, not even the loss."""
        one = jax.vmap(self.loss_and_gradient, spmd_axis_name=SLOW)
        return self._update(inner_R, *one(inner_R["params"], batch_RBT))

    def _update(self, inner_R: Any, sums_R: tuple, grads_R: Any) -> tuple[Any, dict[str, jax.Array]]:
        """sums, grads: of every replica, as loss_and_gradient gives them."""

        def one(inner: Any, sums: tuple, grads: Any) -> tuple[Any, Any]:
            loss, weight, *further = sums
            factor = 1 / divisor(weight)
            counters, norm = inner["guard"], factor * optax.tree.norm(grads)
            sound = (weight > 0) & jnp.isfinite(loss)
            verdict = self.guard.judge(counters, counters.norms_W, norm, sound)
            grads = jax.tree.map(lambda g: g * (factor * verdict.scale), grads)
            params, opt = self.optimizer.apply(grads, inner["opt"], inner["params"], norm * verdict.scale)
            before = {"params": inner["params"], "opt": inner["opt"]}
            after = self.guard.commit(verdict, {"params": params, "opt": opt}, before)
            guard = self.guard.count(counters, verdict)
            metrics = means(loss, weight, *further) | {"grad_norm": norm} | self.guard.report(guard, verdict)
            return after | {"guard": guard}, metrics

        return jax.vmap(one, spmd_axis_name=SLOW)(inner_R, sums_R, grads_R)

    def inner_steps(self, inner_R: Any, batch_KRBT: Batch) -> tuple[Any, dict[str, jax.Array]]:
        if length(batch_KRBT) == 1:
            inner_R, metrics = self.inner_step(inner_R, take(batch_KRBT, 0))
            return inner_R, per_step(metrics)
        return lax.scan(self.inner_step, inner_R, batch_KRBT)

    def exchange_meanwhile(self, step: jax.Array, exchanges: Any, codec: Any, inner_R: Any, batch_KRBT: Batch) -> tuple:
        """Exchanges {name: (exchange, tree)} during these inner steps: the first hop during the first half, the second
        during the rest; of a single step, of its halves.

        Returns ({name: (mean, codec state)}, inner_R, metrics or None without steps)."""
        K, half = length(batch_KRBT), length(batch_KRBT) // 2
        if not K or self.replicas == 1:
            done = {name: exchange.mean(tree, codec[name], step) for name, (exchange, tree) in exchanges.items()}
            return done, *((inner_R, None) if not K else self.inner_steps(inner_R, batch_KRBT))
        finish = lambda flights: {name: exchanges[name][0].finish(x, own, step) for name, (x, own) in flights.items()}
        # What is sent is there before anything is computed, else a compiler may compute first what should hide it.
        trees, inner_R = lax.optimization_barrier(({name: tree for name, (_, tree) in exchanges.items()}, inner_R))
        flights: Any = {name: exchanges[name][0].start(tree, codec[name], step) for name, tree in trees.items()}
        if K == 1:
            return self._steps_and(
                inner_R, batch_KRBT, flights, functools.partial(overlap.loss_and_gradient, self), finish
            )
        flights, inner_R, metrics = self._steps_and(inner_R, part(batch_KRBT, 0, half), flights)
        done, inner_R, more = self._steps_and(inner_R, part(batch_KRBT, half, K), finish(flights))
        return done, inner_R, jax.tree.map(joined, metrics, more)

    def _steps_and(
        self,
        inner_R: Any,
        batch_KRBT: Batch,
        between: Any,
        gradient: Callable | None = None,
        finish: Callable = lambda x: x,
    ) -> tuple[Any, Any, Any]:
        """finish(between), inner_R and metrics after these steps. It is waited for when the last gradient is there, and
        before it is applied: a compiler would let an optimizer's many small operations pass for what hides a hop, and
        without a barrier wait before it computes anything. gradient(params, batch, between) -> (sums, gradient,
        between), of one replica."""
        K, metrics, last_RBT = length(batch_KRBT), None, take(batch_KRBT, -1)
        if K > 1:
            inner_R, metrics = self.inner_steps(inner_R, part(batch_KRBT, 0, K - 1))
        gradient = gradient or (lambda params, batch_BT, between: (*self.loss_and_gradient(params, batch_BT), between))
        one = jax.vmap(gradient, in_axes=(0, 0, None), out_axes=(0, 0, None), spmd_axis_name=SLOW)
        sums_R, grads_R, between = one(inner_R["params"], last_RBT, between)
        between, sums_R, grads_R = lax.optimization_barrier((finish(between), sums_R, grads_R))
        inner_R, last = self._update(inner_R, sums_R, grads_R)
        # Updated before anything that follows: else XLA keeps the old optimizer's state beside the new one.
        between, inner_R = lax.optimization_barrier((between, inner_R))
        return between, inner_R, jax.tree.map(joined, metrics, per_step(last)) if metrics else per_step(last)

    def judge_round(self, counters: Any, delta_R: Any, rate: jax.Array) -> tuple[Any, Any]:
        """(pseudo-gradients as they may be encoded, the verdict on them), agreed by all replicas before anything is.
        Their size is measured by the learning rate that made them. Of refused ones zeros are sent."""
        _, size = self.agree((), delta_R, "round")
        verdict = self.guard.judge(counters, counters.norms_W, size / jnp.maximum(rate, TINY))
        sent = lambda x: jnp.where(verdict.applied, jnp.where(verdict.scale < 1, verdict.scale * x, x), 0)
        return jax.tree.map(sent, delta_R), verdict

    def rate(self, step: jax.Array) -> jax.Array:
        """The mean learning rate of the round that ends before `step`."""
        steps = jnp.maximum(step - 1 - jnp.arange(self.interval), 0)
        return jnp.mean(jax.vmap(self.optimizer.rate)(steps))

    def report(self, state: State, K: int, metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """[K, R] of each replica, and [K] of what all share, of the K steps that led to this state."""
        rounds = state.strategy["rounds"]
        rate = jax.vmap(self.optimizer.rate)(state.step - K + jnp.arange(K))
        shared = {
            "param_norm": norms(self.mesh, (self.specs, state.params))[0],
            **({"lr": rate} if self.optimizer.schedule else {}),
            "rounds_skipped": jnp.sum(rounds.skipped),
            "rounds_clipped": jnp.sum(rounds.clipped),
        }
        worst = jnp.maximum(metrics["skipped_in_a_row"], jnp.max(rounds.in_a_row))
        shared = {name: jnp.broadcast_to(x, (K,)) for name, x in shared.items()}
        return metrics | shared | {"skipped_in_a_row": worst}

    def spread(self, tree: Any, specs: Any) -> Any:
        """One copy for each replica, laid where the replica is."""
        put = lambda x_R, spec: lax.with_sharding_constraint(x_R, NamedSharding(self.mesh, P(SLOW, *spec)))
        return jax.tree.map(put, self.copies(tree), specs)


def joined(a: jax.Array, b: jax.Array) -> jax.Array:
    """Of steps that follow each other, [K]."""
    return jnp.concatenate([a, b])


@dataclass(frozen=True)
class DiLoCo(Local):
    """H inner steps; Δ = mean over replicas of θ_global − θ_i; θ_global ← outer(θ_global, Δ); θ_i ← θ_global.

    Inner optimizer states stay with their replicas. A last round of fewer steps is exchanged like the others. With
    H = 1, SGD inside and outside (rate 1, no momentum) it is synchronous SGD. A round that is refused is left out: the
    replicas begin the next one where they began it.
    """

    def programs(self) -> dict[str, Callable]:
        inner = {"inner": self.inner} if self.interval > 1 else {}
        return inner | {"inner+exchange": self.inner_and_exchange}

    def exchanges(self) -> dict[str, tuple[Exchange, ...]]:
        return {"inner": (), "inner+exchange": (self.exchange,)}

    def program_at(self, step: int, last: int) -> str:
        return "inner+exchange" if (step + 1) % self.interval == 0 or step + 1 == last else "inner"

    def inner(self, state: State, batch_KRBT: Batch) -> tuple[State, dict[str, jax.Array]]:
        state, metrics = self._inner(state, batch_KRBT)
        return state, self.report(state, 1, metrics)

    def _inner(self, state: State, batch_KRBT: Batch) -> tuple[State, dict[str, jax.Array]]:
        inner_R, metrics = self.inner_steps(state.strategy["replicas"], batch_KRBT)
        return replace(state, step=state.step + 1, strategy=state.strategy | {"replicas": inner_R}), metrics

    def inner_and_exchange(self, state: State, batch_KRBT: Batch) -> tuple[State, dict[str, jax.Array]]:
        state, metrics = self._inner(state, batch_KRBT)
        own, rate = state.strategy, self.rate(state.step)
        delta_R = jax.tree.map(jnp.subtract, state.params, own["replicas"]["params"])
        delta_R, new = self.judge_round(own["rounds"], delta_R, rate)
        mean, codec = self.exchange.mean(delta_R, state.codec, state.step)
        before = (state.params, own["outer"]["shared"])
        (params, outer), _, usable, used = self.settle(
            own["rounds"], self.outer.apply, self.specs, mean, before, new.applied, rate, judged=True
        )
        strategy = {
            "replicas": own["replicas"] | {"params": self.spread(params, self.specs)},
            "outer": {"shared": outer},
            "rounds": self.guard.count(own["rounds"], new, used),
        }
        codec = self.guard.commit(usable, codec, state.codec)
        state = replace(state, params=params, strategy=strategy, codec=codec)
        return state, self.report(state, 1, metrics)

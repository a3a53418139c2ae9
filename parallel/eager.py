"""Eager updates: DiLoCo whose exchange has a whole round to hide behind (Kale, Douillard & Donchev 2025)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax

from parallel.exchange import AXIS, Exchange
from parallel.local import Local
from parallel.strategies import Batch, State


@dataclass(frozen=True)
class Eager(Local):
    """A call is a round t of H inner steps, during which the last round's pseudo-gradients Δ_i^{t−1} are exchanged.
    Then every replica takes an outer step of its own, with the late mean in which its own part is replaced by the
    fresh one: Δ̂_i = Δ̄^{t−1} + (Δ_i^t − Δ_i^{t−1}) / R, and starts the next round from there.

    With a linear outer optimizer (sgd, nesterov) what replicas add eagerly is taken back a round later, so they stay
    one round apart. `params` is the fold of the means alone, θ ← outer(θ, Δ̄): a round late, but for the last call,
    which exchanges its own round too.
    """

    @property
    def steps_per_call(self) -> int:
        return self.interval

    def init(self, params: Any) -> State:
        state, R = super().init(params), self.exchange.replicas
        copies = lambda tree: jax.tree.map(lambda x: jnp.broadcast_to(x, (R, *x.shape)), tree)
        state.strategy |= {
            "outer": {"replicas": copies({"params": params, "opt_state": state.opt_state})},
            "pending": copies(jax.tree.map(jnp.zeros_like, params)),
            "finite": jnp.array(False),  # there is nothing to apply yet
        }
        return state

    def programs(self) -> dict[str, Callable]:
        return {
            "round": lambda state, batch: self._round(state, batch),
            "last round": lambda state, batch: self._flush(*self._round(state, batch)),
        }

    def exchanges(self) -> dict[str, tuple[Exchange, ...]]:
        return {"round": (self.exchange,), "last round": (self.exchange, self.exchange)}

    def program_at(self, step: int, last: int) -> str:
        return "last round" if step + self.interval >= last else "round"

    def _round(self, state: State, batch_KRBT: Batch) -> tuple[State, dict[str, jax.Array]]:
        own = state.strategy
        exchanges = {"own": (self.exchange, own["pending"])}
        done, inner_R, metrics = self.exchange_meanwhile(
            state.step, exchanges, {"own": state.codec}, own["replicas"], batch_KRBT
        )
        mean, codec = done["own"]
        state = self._apply(state, mean, codec, own["finite"])
        mean = jax.tree.map(lambda x: jnp.where(own["finite"], x, 0.0), mean)
        outer_R = own["outer"]["replicas"]
        fresh_R = jax.tree.map(jnp.subtract, outer_R["params"], inner_R["params"])
        finite, R = self.all_finite(fresh_R), self.exchange.replicas

        def step(outer: Any, fresh: Any, pending: Any) -> dict[str, Any]:
            eager = jax.tree.map(lambda late, new, old: late + (new - old) / R, mean, fresh, pending)
            updates, opt_state = self.outer.update(eager, outer["opt_state"], outer["params"])
            return {"params": optax.apply_updates(outer["params"], updates), "opt_state": opt_state}

        keep = lambda new, old: jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, old)
        after_R = keep(jax.vmap(step, spmd_axis_name=AXIS)(outer_R, fresh_R, own["pending"]), outer_R)
        state.strategy = {
            "replicas": inner_R | {"params": keep(after_R["params"], inner_R["params"])},
            "outer": {"replicas": after_R},
            "pending": jax.tree.map(lambda x: jnp.where(finite, x, 0.0), fresh_R),
            "finite": finite,
        }
        state.step += 1
        return state, self.report(state.step - 1, state.params, state.guard, metrics)

    def _flush(self, state: State, metrics: dict[str, jax.Array]) -> tuple[State, dict[str, jax.Array]]:
        """The last round's pseudo-gradients, with nothing left to hide behind."""
        own = state.strategy
        mean, codec = self.exchange.mean(own["pending"], state.codec, state.step)
        state = self._apply(state, mean, codec, own["finite"])
        state.strategy = own | {"finite": jnp.array(False), "pending": jax.tree.map(jnp.zeros_like, own["pending"])}
        own = {"param_norm": optax.tree.norm(state.params), "rounds_skipped": state.guard.skipped}
        return state, metrics | {name: jnp.broadcast_to(x, metrics[name].shape) for name, x in own.items()}

    def _apply(self, state: State, mean: Any, codec: Any, finite: jax.Array) -> State:
        """The outer step of what all replicas share; none, and nothing forgotten, if the message was not finite."""
        updates, opt_state = self.outer.update(mean, state.opt_state, state.params)
        new = (optax.apply_updates(state.params, updates), opt_state, codec)
        old = (state.params, state.opt_state, state.codec)
        params, opt_state, codec = jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, old)
        guard = self.guard.update(state.guard, optax.tree.norm(mean), finite)
        # Before the first round there was no message: none was skipped.
        guard = jax.tree.map(lambda new, old: jnp.where(state.step > 0, new, old), guard, state.guard)
        return State(state.step, params, opt_state, state.strategy, guard, codec)

"""Eager updates: DiLoCo whose exchange has a whole round to hide behind (Kale, Douillard & Donchev 2025)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from parallel.exchange.exchange import Exchange
from parallel.layout import roles
from parallel.layout.axes import SLOW
from parallel.strategies.base import Batch, State
from parallel.strategies.local import Local


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
    def hidden_steps(self) -> int:
        return self.interval

    @property
    def steps_per_call(self) -> int:
        return self.interval

    def init(self, params: Any) -> State:
        state = super().init(params)
        shared = state.strategy["outer"]["shared"]
        outer = {"shared": shared, "replicas": self.copies({"params": params, "opt": shared})}
        pending = self.copies(jax.tree.map(jnp.zeros_like, params))
        flight = {"pending": pending, "finite": jnp.array(False)}  # there is nothing to apply yet
        return replace(state, strategy=state.strategy | {"outer": outer} | flight)

    def declare(self, state: State) -> Any:
        declared, own = super().declare(state), state.strategy["outer"]["replicas"]
        outer = declared.strategy["outer"] | {
            "replicas": {
                "params": roles.like(roles.REPLICA, self.specs, SLOW),
                "opt": roles.of_optimizer(self.outer, own["opt"], self.specs, SLOW, own=True),
            }
        }
        flight = {
            "pending": roles.like(roles.IN_FLIGHT, self.specs, SLOW),
            "finite": roles.Role(roles.FLAG, roles.P()),
        }
        return replace(declared, strategy=declared.strategy | {"outer": outer} | flight)

    def programs(self) -> dict[str, Callable]:
        return {"round": self._round, "last round": self._last_round}

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
        state = replace(state, step=state.step + self.interval)
        way_R = jax.tree.map(jnp.subtract, own["outer"]["replicas"]["params"], inner_R["params"])
        fresh_R, new = self.judge_round(own["rounds"], way_R, self.rate(state.step))
        mean, codec = done["own"]
        state = self._apply(replace(state, strategy=own | {"replicas": inner_R}), mean, codec, fresh_R, new, True)
        return state, self.report(state, self.interval, metrics)

    def _last_round(self, state: State, batch_KRBT: Batch) -> tuple[State, dict[str, jax.Array]]:
        """A round, and then its pseudo-gradients, with nothing left to hide behind: after it the replicas are together,
        so that a run that is extended goes on like one that was never ended."""
        state, metrics = self._round(state, batch_KRBT)
        mean, codec = self.exchange.mean(state.strategy["pending"], state.codec, state.step)
        nothing_R = jax.tree.map(jnp.zeros_like, state.strategy["pending"])
        none = self.guard.judge(state.strategy["rounds"], None, jnp.zeros(()))
        state = self._apply(state, mean, codec, nothing_R, none, False)
        return state, self.report(state, self.interval, metrics)

    def _apply(self, state: State, mean: Any, codec: Any, fresh_R: Any, new: Any, fresh: bool) -> State:
        """The outer step of what all replicas share, and each replica's own. A mean that is refused is left out of
        both. new: the verdict on the fresh pseudo-gradients, if there are any."""
        own, due, R = state.strategy, state.strategy["finite"], self.replicas
        before = (state.params, own["outer"]["shared"])
        (params, shared), _, usable, used = self.settle(
            own["rounds"], self.outer.apply, self.specs, mean, before, due, self.rate(state.step), judged=True
        )
        late = jax.tree.map(lambda x: jnp.where(used.applied, x, 0), mean)
        # Where the shared step was scaled, the replicas' are shortened by as much: they stay around it.
        whole = self.outer.apply(mean, before)[0]
        short = jax.tree.map(lambda x, y: jnp.where(used.applied & (used.scale < 1), x - y, 0), params, whole)

        def step(outer: Any, fresh: Any, pending: Any) -> dict[str, Any]:
            eager = jax.tree.map(lambda late, new, old: late + (new - old) / R, late, fresh, pending)
            after, opt = self.outer.apply(eager, (outer["params"], outer["opt"]))
            return {"params": jax.tree.map(jnp.add, after, short), "opt": opt}

        after_R = jax.vmap(step, spmd_axis_name=SLOW)(own["outer"]["replicas"], fresh_R, own["pending"])
        strategy = {
            "replicas": own["replicas"] | {"params": after_R["params"]},
            "outer": {"shared": shared, "replicas": after_R},
            "pending": fresh_R,
            "finite": new.applied & fresh,
            "rounds": self.guard.count(own["rounds"], new, used, due=due),
        }
        return replace(state, params=params, strategy=strategy, codec=self.guard.commit(usable, codec, state.codec))

"""An island: one replica that trains by itself. What it has gone is folded by all islands of a run from a log
(islands/), outside of every compiled program: nothing crosses `replica`.

`params` are those of the version that its round began with: they are what is evaluated. Between two rounds the host
takes what has been gone, and puts the next version in its place (recipes/island.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from parallel.exchange import residuals
from parallel.exchange.exchange import Exchange
from parallel.layout import roles
from parallel.strategies.base import Batch, State, Strategy, norms
from parallel.strategies.local import Local


@dataclass(frozen=True)
class Island(Local):
    """feedback: whether it keeps what its codec has dropped. Of a round `strategy` has which it is (clock), the version
    that it began with, its first step, its steps, and how many rounds were left out before it."""

    feedback: bool = False

    def init(self, params: Any) -> State:
        inner = {"params": params, "opt": self.optimizer.init(params), "guard": self.guard.init()}
        numbers = {"clock": 0, "version": -1, "first": 0, "length": self.interval, "skipped": 0}
        strategy = {
            "replicas": self.copies(inner),
            "owed": jax.tree.map(jnp.zeros_like, params) if self.feedback else {},
            "round": {name: jnp.int32(x) for name, x in numbers.items()},
        }
        codec = residuals.init(self.exchange)
        return State(step=jnp.int32(0), params=params, opt={}, strategy=strategy, guard={}, codec=codec)

    def declare(self, state: State) -> Any:
        owed = roles.like(roles.SHARED, self.specs) if self.feedback else {}
        round = roles.each(roles.SHARED, state.strategy["round"])
        strategy = {"replicas": self.declare_replicas(state), "owed": owed, "round": round}
        return replace(Strategy.declare(self, state), opt={}, strategy=strategy, guard={})

    def programs(self) -> dict[str, Callable]:
        return {"inner": self.inner}

    def exchanges(self) -> dict[str, tuple[Exchange, ...]]:
        return {"inner": ()}

    def program_at(self, step: int, last: int) -> str:
        return "inner"

    def inner(self, state: State, batch_KRBT: Batch) -> tuple[State, dict[str, jax.Array]]:
        inner_R, metrics = self.inner_steps(state.strategy["replicas"], batch_KRBT)
        state = replace(state, step=state.step + 1, strategy=state.strategy | {"replicas": inner_R})
        return state, self.report(state, 1, metrics)

    def report(self, state: State, K: int, metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
        own = state.strategy["round"]
        shared = {
            "param_norm": norms(self.mesh, (self.specs, state.params))[0],
            **({"lr": self.optimizer.rate(state.step - 1)} if self.optimizer.schedule else {}),
            "rounds_skipped": own["skipped"],
            "version": own["version"],
        }
        return metrics | {name: jnp.broadcast_to(x, (K,)) for name, x in shared.items()}

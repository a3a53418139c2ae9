"""Synchronous training in two phases: exact first, then compressed."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax

from parallel.exchange import residuals
from parallel.exchange.exchange import Exchange
from parallel.strategies.base import Batch, State
from parallel.strategies.sync import Sync


@dataclass(frozen=True)
class Warmed(Sync):
    """`warm` for the first steps, then this. Two programs, each compiled once; warm's exchange remembers nothing."""

    warm: Any = None
    warm_steps: int = 0

    def programs(self) -> dict[str, Callable]:
        return {"warm-up": self.warm_up, "step": self.step}

    def exchanges(self) -> dict[str, tuple[Exchange, ...]]:
        return {"warm-up": (self.warm.exchange,), "step": (self.exchange,)}

    def program_at(self, step: int, last: int) -> str:
        return "warm-up" if step < self.warm_steps else "step"

    def warm_up(self, state: State, batch_KRBT: Batch) -> tuple[State, dict[str, jax.Array]]:
        after, metrics = self.warm.step(replace(state, codec=residuals.nothing()), batch_KRBT)
        return replace(after, codec=state.codec), metrics

"""Stale-synchronous: the update of step t uses the exchanged gradients of step t−s, so that their exchange may take as
long as a step's computation."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from parallel import overlap
from parallel.exchange import AXIS
from parallel.strategies import Batch, State, Sync


@dataclass(frozen=True)
class Stale(Sync):
    """θ_{t+1} = update(θ_t, exchange of the gradients at θ_{t−s}) (PipeDream-2BW's one-step-stale rule, for s = 1).

    The s pending *local* gradients are state; a call exchanges the oldest, which does not depend on its own gradient,
    so that the compiler can run both at once. More than one step only changes the mathematics: there is one call to
    hide in. The first s calls make no update (AdamW would decay and count); pending gradients are kept at the end.

    compensation: λ of delay compensation, ĝ + λ ĝ⊙ĝ⊙(θ_t − θ_{t−s}) on the exchanged gradient (DC-ASGD, Zheng et al.
    2017, equation 10); 0: off.
    """

    staleness: int = 1
    compensation: float = 0.0

    def init(self, params: Any) -> State:
        R, state = self.exchange.replicas, super().init(params)
        zeros_R = lambda: jax.tree.map(lambda x: jnp.zeros((R, *x.shape), x.dtype), params)
        pending = [{"messages": zeros_R(), "finite": jnp.array(False)} for _ in range(self.staleness)]
        if self.compensation:
            pending = [entry | {"params": jax.tree.map(jnp.zeros_like, params)} for entry in pending]
        state.strategy = {"pending": pending}
        return state

    def step(self, state: State, batch_KRBT: Batch) -> tuple[State, dict[str, jax.Array]]:
        batch_RBT = jax.tree.map(lambda x: x[0], batch_KRBT)
        if self.staleness and self.exchange.replicas > 1:
            mean, codec, (messages_R, opt_state, loss, tokens, finite) = self._overlapped(state, batch_RBT)
            own = self._entry(state, messages_R, finite)
            oldest, *pending = [*state.strategy["pending"], own]
        else:
            messages_R, opt_state, loss, tokens, finite = self.messages(state, batch_RBT)
            own = self._entry(state, messages_R, finite)
            oldest, *pending = [*state.strategy["pending"], own]
            mean, codec = self.exchange.mean(oldest["messages"], state.codec, state.step)
        if self.compensation:
            moved = jax.tree.map(jnp.subtract, state.params, oldest["params"])
            mean = jax.tree.map(lambda g, d: g + self.compensation * g * g * d, mean, moved)
        before = state.guard
        state, metrics = self.update(state, mean, opt_state, codec, oldest["finite"])
        # The first calls have nothing to apply: no update is made, and none was skipped either.
        state.guard = jax.tree.map(
            lambda new, old: jnp.where(state.step > self.staleness, new, old), state.guard, before
        )
        metrics |= {"skipped": state.guard.skipped, "skipped_in_a_row": state.guard.in_a_row}
        state.strategy = {"pending": pending}
        return state, jax.tree.map(lambda x: x[None], metrics | {"loss": loss, "tokens": tokens})

    def _entry(self, state: State, messages_R: Any, finite: jax.Array) -> dict[str, Any]:
        entry = {"messages": messages_R, "finite": finite}
        return entry | {"params": state.params} if self.compensation else entry

    def _overlapped(self, state: State, batch_RBT: Batch) -> tuple[Any, Any, tuple]:
        """The exchange of the oldest messages during the gradient: the first hop during its first half, the second
        during the rest."""
        oldest_R = state.strategy["pending"][0]["messages"]
        flight, codec = self.exchange.start(oldest_R, state.codec, state.step)
        one = functools.partial(overlap.loss_and_gradient, self)
        gradient = jax.vmap(one, in_axes=(None, 0, None), out_axes=(0, 0, None), spmd_axis_name=AXIS)
        loss_R, grads_R, (flight, codec) = gradient(state.params, batch_RBT, (flight, codec))
        mean, codec = self.exchange.finish(flight, codec, state.step)
        mean, codec, loss_R, grads_R = lax.optimization_barrier((mean, codec, loss_R, grads_R))
        return mean, codec, self.weighted(state, batch_RBT, loss_R, grads_R)

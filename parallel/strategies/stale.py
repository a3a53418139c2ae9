"""Stale-synchronous: the update of step t uses the exchanged gradients of step t−s, so that their exchange may take as
long as a step's computation."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from parallel.layout import roles
from parallel.layout.axes import SLOW
from parallel.strategies import overlap
from parallel.strategies.base import Batch, State, per_step, take
from parallel.strategies.sync import Sync


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

    @property
    def hidden_steps(self) -> int:
        return self.staleness

    def init(self, params: Any) -> State:
        R, state = self.replicas, super().init(params)
        zeros_R = lambda: jax.tree.map(lambda x: jnp.zeros((R, *x.shape), x.dtype), params)
        pending = [{"messages": zeros_R(), "finite": jnp.array(False)} for _ in range(self.staleness)]
        if self.compensation:
            pending = [entry | {"params": jax.tree.map(jnp.zeros_like, params)} for entry in pending]
        return replace(state, strategy={"pending": pending})

    def declare(self, state: State) -> Any:
        entry = {"messages": roles.like(roles.IN_FLIGHT, self.specs, SLOW), "finite": roles.Role(roles.FLAG, roles.P())}
        if self.compensation:
            entry |= {"params": roles.like(roles.FLAG, self.specs)}
        return replace(super().declare(state), strategy={"pending": [entry] * self.staleness})

    def step(self, state: State, batch_KRBT: Batch) -> tuple[State, dict[str, jax.Array]]:
        """Each gradient is judged when it is new, and that verdict travels with it: `finite` says that there is
        something to apply."""
        batch_RBT, overlapped = take(batch_KRBT, 0), self.staleness and self.replicas > 1
        done, judged = self._overlapped(state, batch_RBT) if overlapped else (None, self.messages(state, batch_RBT))
        messages_R, opt, new, metrics = judged
        own = {"messages": messages_R, "finite": new.applied} | ({"params": state.params} if self.compensation else {})
        oldest, *pending = [*state.strategy["pending"], own]
        mean, codec = done or self.mean(oldest["messages"], state.codec, state.step)
        if self.compensation:
            moved = jax.tree.map(jnp.subtract, state.params, oldest["params"])
            mean = jax.tree.map(lambda g, d: g + self.compensation * g * g * d, mean, moved)
        state, used, more = self.update(replace(state, opt=opt), mean, codec, oldest["finite"])
        state.guard = self.guard.count(state.guard, new, used, due=oldest["finite"])
        state.strategy = {"pending": pending}
        return state, per_step(metrics | more | self.guard.report(state.guard, new, used))

    def _overlapped(self, state: State, batch_RBT: Batch) -> tuple[tuple, tuple]:
        """The exchange of the oldest messages during the gradient: the first hop during its first half, the second
        during the rest. ((mean, codec), what `messages` returns)."""
        oldest_R = state.strategy["pending"][0]["messages"]
        flight, codec = self.exchange.start(oldest_R, state.codec, state.step)
        one = functools.partial(overlap.loss_and_gradient, self)
        gradient = jax.vmap(one, in_axes=(None, 0, None), out_axes=(0, 0, None), spmd_axis_name=SLOW)
        sums_R, grads_R, (flight, codec) = gradient(state.params, batch_RBT, (flight, codec))
        mean, codec = self.exchange.finish(flight, codec, state.step)
        mean, codec, sums_R, grads_R = lax.optimization_barrier((mean, codec, sums_R, grads_R))
        return (mean, codec), self.judged(state, sums_R, grads_R)

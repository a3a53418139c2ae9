"""The synchronous strategy."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from parallel.exchange import residuals
from parallel.layout.axes import SLOW
from parallel.strategies.base import Batch, State, Strategy, divisor, means, norms, per_step, take


@dataclass(frozen=True)
class Sync(Strategy):
    """Synchronous data parallelism: every step applies the mean gradient over all tokens of all replicas."""

    def init(self, params: Any) -> State:
        opt = self.optimizer.init(params, self.replicas)
        guard, codec = self.guard.init(), residuals.init(self.exchange)
        return State(step=jnp.int32(0), params=params, opt=opt, strategy={}, guard=guard, codec=codec)

    def programs(self) -> dict[str, Callable]:
        return {"step": self.step}

    def program_at(self, step: int, last: int) -> str:
        return "step"

    def step(self, state: State, batch_KRBT: Batch) -> tuple[State, dict[str, jax.Array]]:
        messages_R, opt, new, metrics = self.messages(state, take(batch_KRBT, 0))
        mean, codec = self.mean(messages_R, state.codec, state.step)
        state, used, more = self.update(replace(state, opt=opt), mean, codec, new.applied)
        state.guard = self.guard.count(state.guard, new, used)
        return state, per_step(metrics | more | self.guard.report(state.guard, new, used))

    def messages(self, state: State, batch_RBT: Batch) -> tuple[Any, Any, Any, dict[str, jax.Array]]:
        """(messages [R, …], opt, the verdict on the gradient, metrics)."""
        per_replica = jax.vmap(self.loss_and_gradient, in_axes=(None, 0), spmd_axis_name=SLOW)
        return self.judged(state, *per_replica(state.params, batch_RBT))

    def judged(self, state: State, sums_R: tuple, grads_R: Any) -> tuple[Any, Any, Any, dict[str, jax.Array]]:
        """What is sent, and what it leaves in the optimizer's state, by the verdict on the gradient that makes both:
        of a refused one, zeros, and nothing."""
        sums, size = self.agree(sums_R, grads_R)
        loss, weight, *_ = sums
        # Weighted by n_i / mean(n) before a codec sees it, so that the mean over replicas is the mean over tokens.
        factor = self.replicas / divisor(weight)
        sound = (weight > 0) & jnp.isfinite(loss)
        new = self.guard.judge(state.guard, state.guard.norms_W, factor * size, sound)
        grads_R = jax.tree.map(lambda g: g * (factor * new.scale), grads_R)
        messages_R, opt = self.optimizer.message(grads_R, state.opt)
        messages_R = jax.tree.map(lambda m: jnp.where(new.applied, m, 0), messages_R)
        return messages_R, self.guard.commit(new, opt, state.opt), new, means(*sums)

    def update(self, state: State, mean: Any, codec: Any, ready: Any) -> tuple[State, Any, dict[str, jax.Array]]:
        """(state, the verdict on the mean, metrics). If it is not ready, or not finite, residuals and the codec's state
        stay as they were. If it is only too large it is cut off, and they follow the exchange: nothing comes back."""
        rate = self.optimizer.rate(state.guard.applied)
        apply = lambda mean, before, norm: self.optimizer.apply(mean, before[1], before[0], norm)
        (params, opt), norm, usable, used = self.settle(
            *(state.guard, apply, self.specs, mean, (state.params, state.opt), ready, rate),
            judged=not self.optimizer.constant_size,
        )
        codec = self.guard.commit(usable, codec, state.codec)
        metrics = {"grad_norm": norm, "param_norm": norms(self.mesh, (self.specs, params))[0]}
        metrics |= {"lr": rate} if self.optimizer.schedule else {}
        return replace(state, step=state.step + 1, params=params, opt=opt, codec=codec), used, metrics

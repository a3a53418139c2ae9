"""The guard: what is applied of a gradient that is not finite, or a spike."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

PATIENCE = 3  # refusals in a row of what is finite; after them it is applied, scaled to the limit
FLOOR = 0.5  # of the deviation, as a share of the mean: training's own norms have long tails


@jax.tree_util.register_dataclass
@dataclass
class Counters:
    """State of the guard; part of every checkpoint. Of the windows the newest value is the last; -1: none yet."""

    applied: jax.Array  # updates made
    skipped: jax.Array  # updates left out
    clipped: jax.Array  # of those made: scaled to the limit
    in_a_row: jax.Array  # left out or scaled since the last one that was neither
    norms_W: jax.Array  # the last W norms of new gradients that were let through
    ratios_W: jax.Array  # the last W sizes of updates, relative to the parameters'


@jax.tree_util.register_dataclass
@dataclass
class Verdict:
    """What becomes of something of this size: nothing, or all of it, or `scale` of it."""

    applied: jax.Array
    scale: jax.Array
    size: jax.Array
    limit: jax.Array | None  # None: not judged by its size

    @property
    def troubled(self) -> jax.Array:
        return ~self.applied | (self.scale < 1)


@dataclass(frozen=True)
class Guard:
    """Judges what is new (a gradient, the way that replicas have gone) and what will be applied (with what residuals
    add to it), each by its own window of the last sizes. Not finite: nothing is applied. A spike, more than `zscore`
    standard deviations above the mean of the window: it is refused; after 3 refusals in a row applied, scaled to that
    limit. So a change that stays, or a lump that residuals hold, is not refused for ever: the limit moves with what
    was applied."""

    zscore: float  # 0: only what is not finite is refused
    window: int

    def init(self) -> Counters:
        zero, empty_W = jnp.zeros((), jnp.int32), jnp.full((self.window,), -1.0, jnp.float32)
        return Counters(zero, zero, zero, zero, empty_W, empty_W)

    def judge(self, counters: Counters, window_W: jax.Array | None, size: jax.Array, sound: Any = True) -> Verdict:
        """By this window of the counters; None: only whether it is finite. sound: False for what must not be applied
        whatever its size is."""
        sound, limit = sound & jnp.isfinite(size), None if window_W is None else self._limit(window_W)
        spike = jnp.array(False) if limit is None else sound & (size > limit)
        applied = sound & (~spike | (counters.in_a_row >= PATIENCE))
        return Verdict(applied, jnp.where(spike, limit / size, 1.0) if limit is not None else jnp.ones(()), size, limit)

    def _limit(self, window_W: jax.Array) -> jax.Array:
        """Infinite until the window is full."""
        if not self.zscore:
            return jnp.array(jnp.inf)
        mean = jnp.mean(window_W)
        limit = mean + self.zscore * jnp.maximum(jnp.std(window_W), FLOOR * mean)
        return jnp.where(jnp.min(window_W) < 0, jnp.inf, limit)

    def commit(self, verdict: Verdict, new: Any, old: Any) -> Any:
        """`new` if it is applied, else `old`. new: arrays, or a function that makes them: then the old and the new
        ones need not exist at once."""
        if callable(new):
            return lax.cond(verdict.applied, new, lambda: old)
        return jax.tree.map(lambda x, y: jnp.where(verdict.applied, x, y), new, old)

    def count(self, counters: Counters, new: Verdict, used: Verdict | None = None, due: Any = True) -> Counters:
        """The counters after a step. new: of the new gradient. used: of what was applied, if it was judged by itself.
        due: whether there was anything to apply."""
        used = new if used is None else used
        made = due & used.applied
        refused = ~new.applied | (due & ~used.applied)
        scaled = ~refused & ((new.scale < 1) | (due & (used.scale < 1)))
        calm = jnp.where(made, 0, counters.in_a_row)
        return Counters(
            applied=counters.applied + made,
            skipped=counters.skipped + refused,
            clipped=counters.clipped + scaled,
            in_a_row=jnp.where(refused | scaled, counters.in_a_row + 1, calm),
            norms_W=_push(counters.norms_W, new, True),
            ratios_W=_push(counters.ratios_W, used, due) if used is not new else counters.ratios_W,
        )

    def report(self, counters: Counters, new: Verdict, used: Verdict | None = None) -> dict[str, Any]:
        """Metrics: what was left out or scaled so far, and of this step the size that was judged and its limit."""
        worst = new
        if used is not None and used.limit is not None:
            choose = lambda x, y: jnp.where(new.troubled, x, y)
            worst = Verdict(*map(choose, (new.applied, new.scale, new.size, new.limit), vars(used).values()))
        return {
            "skipped": counters.skipped,
            "clipped": counters.clipped,
            "skipped_in_a_row": counters.in_a_row,
            "judged": worst.size,
            "limit": worst.limit,
        }


def _push(window_W: jax.Array, verdict: Verdict, there: Any) -> jax.Array:
    """What was applied joins the window that it was judged by."""
    if verdict.limit is None:
        return window_W
    return jnp.where(there & verdict.applied, jnp.append(window_W[1:], verdict.size * verdict.scale), window_W)

"""One gradient, and one exchange of it, by themselves: what a codec does to it, without a loop around."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.loader import Batches
from parallel.cost.bytes import exchange_bytes
from parallel.exchange import residuals
from parallel.layout import placement, rules
from parallel.layout.axes import SLOW
from parallel.strategies.base import divisor, take
from recipes import programs
from recipes.build import Parts
from runtime.config import UsageError
from runtime.digest import named_arrays


class Once:
    """Of the parts of a run. Programs are compiled when they are first asked for."""

    def __init__(self, parts: Parts, seed: int):
        self.parts, self.seed = parts, seed

    @property
    def exchange(self) -> Any:
        """Raises UsageError for a strategy whose exchange is of a part of the model."""
        shape = lambda tree: {name: tuple(x.shape) for name, x in named_arrays(tree).items()}
        if shape(self.parts.strategy.exchange.leaves) != shape(self.parts.param_shapes):
            raise UsageError(
                f"{type(self.parts.strategy).__name__} exchanges one part of the model at a time: sync.strategy=sync "
                "sends a whole gradient through the same codec"
            )
        return self.parts.strategy.exchange

    @property
    def bytes(self) -> float:
        """That a device sends over `replica` in one exchange, in closed form."""
        return sum(exchange_bytes(self.exchange).values())

    def gradients(self, loader: Batches, params: Any = None, step: int = 0) -> Any:
        """Each replica's gradient [R, …] of its mean loss over its rows of the batch of a step, as in training.
        params: None for those that the seed gives.

        Raises UsageError for an adapter, whose gradient is one beside weights that are not here."""
        if self.parts.frozen:
            raise UsageError("gradients: of an adapter (lora.rank) there is none without its base; fit trains it")
        params = programs.compile_init(self.parts)(np.uint32(self.seed)).params if params is None else params
        rows = functools.partial(loader.rows, step)
        batch = placement.place_train(self.parts.mesh, self.parts.replicas, loader.batch_size, [rows])
        return self._gradients(params, take(batch, 0))

    def mean(self, tree_R: Any, memory: Any = None, step: int = 0) -> tuple[Any, Any]:
        """(the mean of what replicas send each other of a tree like the parameters, [R, …]; what the exchange remembers
        of it). memory: what it remembered before; None: nothing.

        Raises UsageError for a tree of other names or shapes.
        """
        self._check(tree_R)
        memory = self._nothing if memory is None else memory
        return self._mean(tree_R, memory, jnp.int32(step))

    def _check(self, tree_R: Any) -> None:
        R, given = self.exchange.replicas, named_arrays(tree_R)
        for name, x in named_arrays(self.parts.param_shapes).items():
            found = list(np.shape(given[name])) if name in given else "nothing"
            if found != [R, *x.shape]:
                raise UsageError(f"{name}: expected {[R, *x.shape]}, one for each of {R} replicas, and found {found}")

    def _jit(self, f: Callable, out_shardings: Any) -> Any:
        return jax.jit(f, out_shardings=out_shardings, compiler_options=self.parts.xla_options)

    # ── compiled ─────────────────────────────────────────────────────────────────────────────────────────────────

    @functools.cached_property
    def _gradients(self) -> Any:
        strategy = self.parts.strategy

        def gradients(params: Any, batch_RBT: Any) -> Any:
            per_replica = jax.vmap(strategy.loss_and_gradient, in_axes=(None, 0), spmd_axis_name=SLOW)
            (_, weight_R, *_), grads_R = per_replica(params, batch_RBT)
            return jax.tree.map(lambda g: g / divisor(weight_R).reshape(-1, *[1] * (g.ndim - 1)), grads_R)

        specs = jax.tree.map(lambda spec: jax.sharding.PartitionSpec(SLOW, *spec), strategy.specs)
        return self._jit(gradients, rules.shardings(self.parts.mesh, specs))

    @functools.cached_property
    def _nothing(self) -> Any:
        shardings = rules.shardings(self.parts.mesh, self.exchange.state_specs)
        return self._jit(lambda: residuals.init(self.exchange), shardings)()

    @functools.cached_property
    def _mean(self) -> Any:
        mesh, strategy = self.parts.mesh, self.parts.strategy
        shardings = [rules.shardings(mesh, specs) for specs in (strategy.specs, self.exchange.state_specs)]
        return self._jit(strategy.mean, tuple(shardings))

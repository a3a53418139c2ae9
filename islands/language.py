"""A language model on text, as a task of the laboratory: the model, the text, the optimizer and the step with which
train.py trains one replica. What is compiled is shared by all islands and by all runs of a config.
"""

import functools
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from parallel.layout import mesh as meshes
from parallel.layout.axes import SLOW
from recipes import fit
from recipes.build import build
from recipes.programs import compile_evaluation, compile_init, compile_steps
from runtime.digest import named_arrays

Params = dict[str, np.ndarray]


class Programs:
    """Of a config with one replica, on the first device."""

    def __init__(self, config: Any):
        self.config, self.parts = config, build(config, meshes.build({SLOW: 1}, jax.devices()[:1]))
        self.data = self.parts.task.read(config)
        self.steps, self.init = compile_steps(self.parts), compile_init(self.parts)
        evaluation = functools.cache(functools.partial(compile_evaluation, self.parts))
        self.evaluate = fit.make_evaluator(config, self.parts, self.data, evaluation)

    def vectors(self, params: Any) -> Params:
        return {name: np.asarray(x).reshape(-1) for name, x in named_arrays(params).items()}

    def params(self, vectors: Params) -> Any:
        """On the device, in memory of their own: a step takes its state over, and others begin with these, too."""
        wanted = named_arrays(self.parts.state.params)
        put = lambda name, x: jax.device_put(vectors[name].reshape(x.shape), x.sharding, may_alias=False)
        return jax.tree.structure(self.parts.state.params).unflatten([put(name, x) for name, x in wanted.items()])


@dataclass(frozen=True)
class Language:
    """seed: of the first weights, and of the orders in which islands read the text, each in its own."""

    programs: Programs
    seed: int = 0

    @property
    def tokens(self) -> int:
        return self.programs.config.data.batch_size * self.programs.parts.task.units

    def init(self) -> Params:
        return self.programs.vectors(self._fresh().params)

    def begin(self, island: int) -> Any:
        """A fresh state but for its parameters: the optimizer's moments and count, and the guard's."""
        return replace(self._fresh(), params=None)

    def steps(self, params: Params, own: Any, island: int, done: int, count: int) -> tuple[Params, Any, float]:
        programs, first = self.programs, replace(own, params=self.programs.params(params))
        updates = fit.Steps(programs.parts, programs.steps, first, self._loader(island), done, done + count)
        losses = jax.device_get([metrics["loss"] for _, metrics in updates])
        after = updates.state
        return programs.vectors(after.params), replace(after, params=None), float(np.mean(losses))

    def loss(self, params: Params) -> float:
        """Per token, of the first `eval_batches` batches of what is held out: always the same."""
        return self.programs.evaluate(self.programs.params(params)).loss

    def _fresh(self) -> Any:
        return self.programs.init(np.uint32(self.seed))

    def _loader(self, island: int) -> Any:
        return _loader(self.programs, self.seed, island)


@functools.lru_cache(64)
def _loader(programs: Programs, seed: int, island: int) -> Any:
    of_island = int(np.random.SeedSequence([seed, island]).generate_state(1)[0])
    return programs.data.loader(of_island, programs.config.data.batch_size)

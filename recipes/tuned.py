"""A language model of which an adapter alone is trained (model/lora.py), as what a run trains (recipes/task.py)."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
from jax.sharding import Mesh

from model.lora import Lora
from model.lora import Tuned as Network
from recipes import language
from recipes.language import Language
from runtime import config as configuration
from runtime.console import human_count


@dataclass(frozen=True)
class AdapterOnly(Language):
    """A language model on text, of which an adapter alone is trained."""

    lora: Lora
    model: Network

    @property
    def axes(self) -> Any:
        return self.lora.axes(self.lora.trained)

    @property
    def fixed_axes(self) -> Any:
        return self.lora.axes(self.lora.fixed)

    @cached_property
    def frozen(self) -> Any:
        weights = jax.eval_shape(lambda: self.model.frozen(self.model.init(jax.random.key(0))))
        return ((weights, self.model.axes),)

    @cached_property
    def plain(self) -> Network:
        return Network(self.model.config, self.model.compute, 0.0, (0.0, 0.0), self.lora)

    def init(self, key: jax.Array) -> Any:
        return self.lora.init(key, self.lora.trained)

    def fixed(self, key: jax.Array) -> Any:
        return self.lora.init(key, self.lora.fixed)

    def whole(self, params: Any, fixed: Any, *frozen: Any) -> Any:
        return self.lora.join(*frozen, params, fixed)

    def about(self) -> list[tuple[str, str]]:
        ((weights, _),) = self.frozen
        count = sum(math.prod(x.shape) for x in jax.tree.leaves(weights))
        kind = f"rank {self.lora.rank}, scale {self.lora.scale:g}{', A as it is drawn' if self.lora.freeze_a else ''}"
        names = ", ".join(name.removeprefix("blocks/") for name in self.lora.sites)
        frozen = f"{human_count(count)} parameters, {self.model.compute.dtype}, not trained"
        return [("adapter", f"{kind}, of {names}"), ("base", frozen), *super().about()]


def build(c: Any, mesh: Mesh) -> Language:
    """What config c describes. Raises UsageError."""
    task = language.build(c, mesh)
    if not c.lora.rank:
        return task
    with configuration.bad_input():
        lora = _lora(c, task)
    model = task.model
    network = Network(model.config, model.compute, model.z_loss, model.router, lora)
    return AdapterOnly(model=network, attention=task.attention, row=task.row, least=task.least, lora=lora)


def _lora(c: Any, task: Language) -> Lora:
    shapes = jax.eval_shape(task.model.init, jax.eval_shape(lambda: jax.random.key(0)))
    return Lora.of(c.lora, shapes, task.model.axes, c.model.tie_embeddings)

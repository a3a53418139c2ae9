"""What is planned for: a model, a machine, a link; and what follows of them for every mesh."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from jax.sharding import Mesh

from parallel.cost.link import Link
from parallel.cost.network import Network
from parallel.cost.targets import Target
from parallel.layout.axes import AXES
from recipes import build, predicted
from recipes.gaps import Gaps
from runtime.config import changed


@dataclass(frozen=True)
class Place:
    """Stands for a device in a mesh that nothing is compiled for."""

    id: int
    process_index: int
    platform: str
    device_kind: str


@dataclass(frozen=True)
class Case:
    """typed: keys that are not for choosing. gaps: by which time to a loss is ranked by; None: tokens per second.
    taken: (key, value) of `config` that are not the user's, and have to be said."""

    config: Any
    target: Target
    link: Link | None
    typed: tuple[str, ...] = ()
    gaps: Gaps | None = None
    taken: tuple[tuple[str, Any], ...] = ()

    @cached_property
    def base(self) -> build.Parts:
        """On one device, synchronous: shapes and shardings, of which sizes on any mesh follow."""
        alone = dict.fromkeys((f"mesh.{axis}" for axis in AXES), 1) | {"sync.strategy": "sync", "sync.codec": "none"}
        alone |= {"optimizer.accumulate": 1, "data.batch_size": 1, "sync.warm_steps": 0, "sync.algorithm": "auto"}
        alone |= {"sync.replicas": 0, "compute.xla_options": ""}  # which a place has no compiler for
        alone |= {"pipeline.gather": "tick", "pipeline.interleave": 1}  # nothing to gather, or to repeat, on one device
        return build.build(changed(self.config, alone), self.mesh(dict.fromkeys(AXES, 1)))

    @cached_property
    def checked(self) -> Any:
        """The config by which a mesh is judged: how weights go through stages is chosen on each."""
        chosen = {"pipeline.gather": "tick", "pipeline.interleave": 1, "compute.remat": "full"}
        return changed(self.config, {key: self.fixed(key, (value,))[0] for key, value in chosen.items()})

    @cached_property
    def network(self) -> Network:
        return predicted.network(self.base)

    def mesh(self, sizes: Mapping[str, int]) -> Mesh:
        """Of places in place of devices."""
        chip = self.target.chip
        platform, host = ("tpu", 4) if chip.is_tpu else ("gpu", self.target.sides[1])
        places = np.empty(math.prod(sizes.values()), dtype=object)
        for i in range(places.size):
            places[i] = Place(i, i // host, platform, chip.kind)
        return Mesh(places.reshape([sizes[axis] for axis in AXES]), AXES)

    def taking(self, key: str, value: Any) -> "Case":
        return replace(self, config=changed(self.config, {key: value}), taken=(*self.taken, (key, value)))

    def value(self, key: str) -> Any:
        """That the config has."""
        found = self.config
        for name in key.split("."):
            found = found[name]
        return found

    def fixed(self, key: str, tried: Sequence[Any]) -> Sequence[Any]:
        """What is tried of a key: what was typed, if it was."""
        return (self.value(key),) if key in self.typed else tried

"""Layers that are cut over mesh.stage: what cannot be, and what the pipeline costs (parallel/layout/pipeline.py)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from parallel.cost.pipeline import Pipeline
from parallel.layout.axes import STAGE
from parallel.layout.mesh import legal
from recipes import context
from runtime.config import UsageError
from runtime.console import human_bytes

KEY = f"mesh.{STAGE}"


def check(c: Any, sizes: Mapping[str, int]) -> None:
    """Raises UsageError. sizes: of the mesh."""
    count, layers, said = sizes[STAGE], c.model.num_layers, f"{KEY}={sizes[STAGE]}"
    if count == 1:
        return
    if layers % count:
        raise UsageError(f"model.num_layers={layers} cannot be cut over {said}. {legal(layers, KEY, count)}")
    if c.sync.exchange == "backward":
        raise UsageError(
            f"sync.exchange=backward with {said}: no layer's gradient is whole before the last micro-batch has gone "
            "through all stages, so that nothing can be sent earlier: set sync.exchange=after"
        )
    if c.compute.unroll:
        raise UsageError(f"compute.unroll with {said}: the layers of a stage are one loop: leave it out")
    if c.pipeline.gather == "step" and sizes["fsdp"] == 1:
        raise UsageError("pipeline.gather=step with mesh.fsdp=1: there is nothing to gather over it: leave it out")
    if c.lora.rank and c.pipeline.gather == "step":
        raise UsageError("pipeline.gather=step with lora.rank: adapters are gathered in every tick: leave it out")
    if c.sync.strategy == "streaming" and layers // count % c.sync.fragments:
        raise UsageError(
            f"sync.fragments={c.sync.fragments} with {said}: every fragment has as many layers of each stage, and a "
            f"stage has {layers // count}: set sync.fragments to a number that divides them"
        )


def described(c: Any, sizes: Mapping[str, int], itemsize: int) -> Pipeline:
    """Of all replicas that a device has. itemsize: of the compute dtype."""
    activation = context.tokens(c, sizes) // sizes["tensor"] * c.model.model_dim * itemsize
    return Pipeline(sizes[STAGE], c.optimizer.accumulate, activation)


def rows(c: Any, parts: Any) -> list[tuple[str, str]]:
    """Of the start-up table."""
    sizes = parts.mesh.shape
    if sizes[STAGE] == 1:
        return []
    own = described(c, sizes, parts.task.model.compute.dtype.itemsize)
    layers, ending = c.model.num_layers // own.stages, "es" * (own.micro > 1)
    why = f"{own.stages} stages of {layers} layer{'s' * (layers > 1)}, {own.micro} micro-batch{ending}"
    why += f" (optimizer.accumulate) in {own.ticks} ticks"
    more = replace(own, micro=own.stages)
    few = f"; with {more.micro} of them {more.idle:.0%}" if own.micro < own.stages else ""
    sent = f"{human_bytes(own.sent)} handed on by each device in a step"
    return [("bubble", f"{own.idle:.0%} of the time: {why}{few}"), ("", sent)]

"""Layers that are cut over mesh.stage: what cannot be, and what the pipeline costs (parallel/layout/pipeline.py)."""

from collections.abc import Mapping
from typing import Any

from parallel.layout.axes import STAGE
from parallel.layout.pipeline import ticks
from runtime.config import UsageError, nearest_multiples

KEY = f"mesh.{STAGE}"


def check(c: Any, sizes: Mapping[str, int], is_own_task: bool) -> None:
    """Raises UsageError. sizes: of the mesh."""
    count, layers, said = sizes[STAGE], c.model.num_layers, f"{KEY}={sizes[STAGE]}"
    if count == 1:
        return
    if is_own_task:
        raise UsageError(f"{said}: layers are cut over it, and it knows none of a task of your own: leave it at 1")
    if layers % count:
        nearest = nearest_multiples(layers, count)
        raise UsageError(f"model.num_layers={layers} cannot be cut over {said}. Nearest legal sizes: {nearest}")
    if c.sync.exchange == "backward":
        raise UsageError(
            f"sync.exchange=backward with {said}: no layer's gradient is whole before the last micro-batch has gone "
            "through all stages, so that nothing can be sent earlier: set sync.exchange=after"
        )
    if c.compute.unroll:
        raise UsageError(f"compute.unroll with {said}: the layers of a stage are one loop: leave it out")
    if c.lora.rank and c.pipeline.gather == "step":
        raise UsageError("pipeline.gather=step with lora.rank: adapters are gathered in every tick: leave it out")
    if c.sync.strategy == "streaming" and layers // count % c.sync.fragments:
        raise UsageError(
            f"sync.fragments={c.sync.fragments} with {said}: every fragment has as many of each stage's "
            f"{layers // count} layers: set sync.fragments to a number that divides them"
        )


def rows(c: Any, sizes: Mapping[str, int]) -> list[tuple[str, str]]:
    """Of the start-up table."""
    count, micro = sizes[STAGE], c.optimizer.accumulate
    if count == 1:
        return []
    number = ticks(micro, count)
    idle = f"{(count - 1) / number:.0%} of the time"
    layers = "1 layer" if c.model.num_layers == count else f"{c.model.num_layers // count} layers"
    why = f"{count} stages of {layers}, {micro} micro-batches (optimizer.accumulate)"
    few = f"; with {count} of them {(count - 1) / ticks(count, count):.0%}" if micro < count else ""
    return [("bubble", f"{idle}: {why} in {number} ticks{few}")]

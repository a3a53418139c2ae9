"""Layers that are cut over mesh.stage: what cannot be, and what the pipeline costs (parallel/layout/pipeline.py)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from parallel.cost.pipeline import Pipeline
from parallel.layout.axes import STAGE
from parallel.layout.mesh import cut, legal
from parallel.layout.pipeline import ticks
from runtime.config import UsageError
from runtime.console import human_bytes

KEY, REPEATS = f"mesh.{STAGE}", "pipeline.interleave"


def check(c: Any, sizes: Mapping[str, int]) -> None:
    """Raises UsageError. sizes: of the mesh."""
    count, layers, said, repeats = sizes[STAGE], c.model.num_layers, f"{KEY}={sizes[STAGE]}", c.pipeline.interleave
    if count == 1:
        return
    if layers % count:
        raise UsageError(f"model.num_layers={layers} cannot be cut over {said}. {legal(layers, KEY, count)}")
    if layers % (count * repeats):
        raise UsageError(
            f"model.num_layers={layers} cannot be cut into {said} × {REPEATS}={repeats} runs of layers. "
            f"{legal(layers, f'{KEY} × {REPEATS}', count * repeats)}"
        )
    if repeats > 1 and not may_repeat(c):
        key, what = ("lora.rank", "adapters") if c.lora.rank else ("sync.strategy=streaming", "fragments")
        raise UsageError(f"{REPEATS}={repeats} with {key}: {what} lie by layers, one after another: leave it out")
    if c.sync.exchange == "backward":
        raise UsageError(
            f"sync.exchange=backward with {said}: no layer's gradient is whole before the last micro-batch has gone "
            "through all stages, so that nothing can be sent earlier: set sync.exchange=after"
        )
    if c.compute.remat == "offload":
        raise UsageError(
            f"compute.remat=offload with {said}: the compilers do not take what ticks keep to the host (XLA:GPU fails, "
            "XLA:TPU keeps all of it): set compute.remat=full, or matmuls"
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


def may_repeat(c: Any) -> bool:
    """Whether a stage may have several runs of layers."""
    return not c.lora.rank and takes_repeats(c.sync.strategy)


def takes_repeats(strategy: str) -> bool:
    return strategy != "streaming"  # whose fragments are of layers that follow each other


def repeats(c: Any, sizes: Mapping[str, int]) -> int:
    """Runs of layers of a stage."""
    return c.pipeline.interleave if sizes[STAGE] > 1 else 1


def turns(c: Any, sizes: Mapping[str, int]) -> int:
    """In which a device computes a layer, in a step."""
    count, V = sizes[STAGE], repeats(c, sizes)
    return c.model.num_layers // (count * V) * ticks(c.optimizer.accumulate, count, V)


def slots(c: Any, sizes: Mapping[str, int]) -> int:
    """Micro-batches that a device takes through layers that are no part of a pipeline."""
    return -(-c.optimizer.accumulate // sizes[STAGE])


def sends_again(c: Any, sizes: Mapping[str, int]) -> bool:
    """Whether layers send once more in the backward pass, for their stage is worked out again: XLA leaves that out
    where it has one layer in a tick."""
    layers = c.model.num_layers // (sizes[STAGE] * repeats(c, sizes))
    return sizes[STAGE] > 1 and layers > 1 and c.pipeline.remat == "stage"


def tokens(c: Any, sizes: Mapping[str, int]) -> int:
    """Of a micro-step, on one device."""
    rows = c.data.batch_size // (sizes["replica"] * cut("batch", sizes)[1] * c.optimizer.accumulate)
    return max(rows, 1) * c.data.seq_len // sizes["context"]


def described(c: Any, sizes: Mapping[str, int], itemsize: int) -> Pipeline:
    """Of all replicas that a device has. itemsize: of the compute dtype."""
    activation = tokens(c, sizes) // sizes["tensor"] * c.model.model_dim * itemsize
    return Pipeline(sizes[STAGE], c.optimizer.accumulate, activation, repeats(c, sizes))


def rows(c: Any, parts: Any) -> list[tuple[str, str]]:
    """Of the start-up table."""
    sizes = parts.mesh.shape
    if sizes[STAGE] == 1:
        return []
    own = described(c, sizes, parts.task.model.compute.dtype.itemsize)
    layers, ending = c.model.num_layers // (own.stages * own.repeats), "es" * (own.micro > 1)
    runs = f"{own.repeats} × " if own.repeats > 1 else ""
    why = f"{own.stages} stages of {runs}{layers} layer{'s' * (layers > 1)}, {own.micro} micro-batch{ending}"
    why += f" (optimizer.accumulate) in {own.ticks} ticks"
    more = replace(own, micro=-(-own.micro // own.stages) * own.stages)
    is_short = own.micro < own.stages or own.repeats > 1
    few = f"; with {more.micro} of them {more.idle:.0%}" if is_short and more.micro > own.micro else ""
    sent = f"{human_bytes(own.sent)} handed on by each device in a step"
    return [("bubble", f"{own.idle:.0%} of the time: {why}{few}"), ("", sent)]

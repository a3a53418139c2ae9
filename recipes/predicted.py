"""What the planner's model (parallel/cost/) says of a run, beside what its compiled programs say: so every
start tests the model. Closed form: it takes a few milliseconds."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from parallel.cost import work
from parallel.cost.held import Flight, held
from parallel.cost.network import Layout, Network
from parallel.cost.sent import habits, sent
from parallel.layout.axes import CONTEXT, SLOW, STAGE
from parallel.layout.mesh import cut
from recipes import exchanged
from recipes.build import Parts
from recipes.language import Language
from runtime.console import human_bytes, human_count

REMAT = ("matmuls", "offload", "full")  # what is counted of compute.remat


def network(parts: Parts) -> Network:
    """Of a language model's run."""
    task: Any = parts.task
    trained = (parts.param_shapes, task.axes)
    weights = task.frozen[0] if task.frozen else trained
    is_narrow = any(x.dtype == jnp.bfloat16 for x in jax.tree.leaves(parts.state.opt))
    return Network.of(weights, trained, task.model.config, task.units, task.model.compute, is_narrow)


@dataclass(frozen=True)
class Predicted:
    """Of one device and step. wire: bytes by axis. temporary, flops: NaN where attention holds its scores, which are
    not counted."""

    wire: dict[str, float]
    temporary: float
    flops: float


def of(config: Any, parts: Parts) -> Predicted | None:
    """None: the model does not cover this run."""
    task, sizes = parts.task, dict(parts.mesh.shape)
    if not isinstance(task, Language) or task.model.compute.remat not in REMAT or task.model.compute.unroll:
        return None
    if parts.replicas != sizes[SLOW] or config.optimizer.name == "muon":  # several on a device; products of its own
        return None
    if config.sync.exchange != "after":  # one message in flight after another
        return None
    if sizes[STAGE] > 1 and sizes[CONTEXT] > 1 and config.pipeline.gather == "step":  # gathered in two ways
        return None
    net, compute, platform = network(parts), task.model.compute, parts.mesh.devices.flat[0].platform
    if sizes[STAGE] > 1 and platform == "cpu":  # whose XLA sends for a few ticks what others send for all
        return None
    accumulate, shards = config.optimizer.accumulate, cut("batch", sizes)[1]
    rows = config.data.batch_size // (sizes[SLOW] * shards * accumulate)
    chunk, how = compute.loss_chunk_mib << 20, (platform == "tpu", compute.context, compute.pipeline)
    layout = Layout(sizes, rows, accumulate, compute.remat, chunk, *how)
    wire: dict[str, float] = {}
    for row in sent(net, layout, habits(platform)):
        if platform != "cpu" or row.axis != "tensor":  # whose sums XLA's program for CPUs sends otherwise
            wire[row.axis] = wire.get(row.axis, 0.0) + row.bytes
    if compute.attention == "reference":
        return Predicted(wire, math.nan, math.nan)
    moments = held(net, layout, exchanged.held(parts) if parts.replicas > 1 else Flight())
    temporary = max(sum(arrays.values()) for arrays in moments.values())
    return Predicted(wire, temporary, sum(work.flops(net, layout).values()))


def rows(
    config: Any, parts: Parts, wire: Mapping[str, float], temporary: float, flops: float = math.nan
) -> list[tuple[str, str]]:
    """A row of a table: what is predicted, and by how much it is more or less than what the compiled programs say, of
    a device and step; no row where nothing is. wire: bytes by axis."""
    found = of(config, parts)
    if found is None:
        return []
    sides = [(axis, human_bytes, size, wire.get(axis, math.nan)) for axis, size in found.wire.items()]
    sides += [("temporary", human_bytes, found.temporary, temporary), ("FLOPs", human_count, found.flops, flops)]
    said = [
        f"{name} {say(ours)} ({round(100 * (ours / theirs - 1)):+d}%)"
        for name, say, ours, theirs in sides
        if math.isfinite(ours) and math.isfinite(theirs) and theirs > 0
    ]
    return [("planner, a step", ", ".join(said))] if said else []

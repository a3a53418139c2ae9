"""What bench/plan.py and bench/picks.py measure: rows of (config, mesh, machine), each predicted and compiled."""

import math
import multiprocessing
import time
from dataclasses import dataclass, field
from typing import Any

from bench import common

GIB = 2**30
B1, B8, B70 = "llama3_1b", "llama3_8b", "llama3_70b"
MIXTRAL, QWEN3 = "mixtral_8x7b", "qwen3_30b_a3b"
TYPED = ("mesh.replica", "mesh.stage", "mesh.fsdp", "mesh.expert", "mesh.context", "mesh.tensor",
         "optimizer.accumulate", "compute.remat", "pipeline.remat", "pipeline.gather", "pipeline.interleave",
         "data.batch_size", "sync.strategy", "sync.codec", "sync.interval", "sync.fragments",
         "sync.overlap")  # fmt: skip


@dataclass(frozen=True)
class Row:
    """held_out: first compiled when the model was frozen (docs/planner.md)."""

    target: str
    config: str
    changes: dict[str, Any] = field(default_factory=dict)
    held_out: bool = False

    @property
    def name(self) -> str:
        said = (f"{key.rpartition('.')[2]}={value}" for key, value in self.changes.items())
        return " ".join([self.target, self.config, *said])


def mesh(replica: int, fsdp: int, tensor: int, batch: int, **more: Any) -> dict[str, Any]:
    """more: keys with __ for dots."""
    sizes = {"mesh.replica": replica, "mesh.fsdp": fsdp, "mesh.tensor": tensor, "data.batch_size": batch}
    return {key: size for key, size in sizes.items() if size > 1 or key == "data.batch_size"} | {
        key.replace("__", "."): value for key, value in more.items()
    }


LIGHT = {"compute__remat": "matmuls"}
AWAY = {"compute__remat": "offload"}
INT4 = {"sync__codec": "int4"}
REPEATED, ONCE = {"pipeline__remat": "stage"}, {"pipeline__gather": "step"}
TWICE = {"pipeline__interleave": 2}
RING = {"attention__context": "ring"}
EXPERTS = {"mesh__expert": 8, "model__num_layers": 2, "data__seq_len": 4096}
ALL_AXES = {"mesh__stage": 2, "mesh__expert": 4, "mesh__context": 2}
STREAMING = INT4 | {"sync__strategy": "streaming", "sync__interval": 30, "sync__fragments": 2, "sync__overlap": 2}
STREAMING |= {"steps": 90_000}  # whole calls
ROWS = (
    Row("h100:8x8", B8, mesh(1, 64, 1, 64)),
    Row("h100:8x8", B8, mesh(1, 64, 1, 128)),
    Row("h100:8x8", B8, mesh(1, 64, 1, 64, **LIGHT)),
    Row("h100:8x8", B8, mesh(1, 16, 4, 64)),
    Row("h100:8", B8, mesh(1, 8, 1, 16, optimizer__accumulate=2)),
    Row("h100:8x8", B70, mesh(1, 8, 8, 16)),
    Row("h100:4x8", B8, mesh(4, 8, 1, 32, **INT4)),
    Row("h100:8x8", B8, mesh(2, 8, 4, 64, sync__strategy="diloco", **INT4)),
    Row("h100:8", B1, mesh(1, 8, 1, 64)),
    Row("h100:8", B8, mesh(1, 2, 4, 16)),
    Row("h100:2x8", B8, mesh(2, 8, 1, 16)),
    Row("h100:2x8", B8, mesh(2, 8, 1, 16, sync__codec="bf16")),
    Row("h100:2x8", B8, mesh(2, 8, 1, 16, sync__codec="int8")),
    Row("h100:2x8", B8, mesh(2, 8, 1, 16, sync__strategy="stale", **INT4)),
    Row("h100:4x8", B8, mesh(4, 8, 1, 32)),
    Row("h100:2x8", B8, mesh(2, 8, 1, 16, sync__strategy="stale", sync__codec="bf16")),
    Row("h100:2x8", B8, mesh(2, 8, 1, 16, sync__strategy="eager", sync__interval=25, **INT4)),
    Row("h100:2x8", B8, mesh(2, 8, 1, 16, **STREAMING)),
    Row("h100:8x8", B1, mesh(1, 8, 8, 64)),
    Row("h100:8x8", B1, mesh(8, 8, 1, 64)),
    Row("v5p-128", B8, mesh(1, 64, 1, 64)),
    Row("v5p-128", B8, mesh(1, 16, 4, 64)),
    Row("2xv5p-64", B8, mesh(2, 32, 1, 64, **INT4)),
    Row("v5p-512", B70, mesh(1, 64, 4, 256)),
    *(
        Row("h100:8x8", B8, mesh(1, 16, 1, 64, mesh__stage=4, optimizer__accumulate=4, **how))
        for how in ({}, REPEATED, ONCE, REPEATED | ONCE)
    ),
    Row("h100:8x8", B8, mesh(1, 4, 4, 64, mesh__stage=4, optimizer__accumulate=8)),
    Row("h100:8x8", B8, mesh(1, 32, 1, 64, mesh__stage=2, optimizer__accumulate=2)),
    Row("h100:4x8", B8, mesh(1, 1, 8, 32, mesh__stage=4, optimizer__accumulate=8)),
    Row("h100:8x8", B8, mesh(1, 32, 1, 64, mesh__context=2)),
    Row("h100:8x8", B8, mesh(1, 16, 1, 64, mesh__context=4)),
    Row("h100:8x8", B8, mesh(1, 16, 1, 64, mesh__context=4, **RING)),
    Row("h100:8x8", B8, mesh(1, 4, 4, 16, mesh__context=4, **RING)),
    Row("h100:8x8", B8, mesh(1, 8, 1, 8, mesh__context=8, data__seq_len=65_536)),
    Row("h100:8x8", MIXTRAL, mesh(1, 64, 1, 128)),
    Row("h100:8x8", MIXTRAL, mesh(1, 16, 1, 128, mesh__expert=4)),
    Row("h100:8x8", MIXTRAL, mesh(1, 8, 1, 128, mesh__expert=8)),
    Row("h100:8x8", MIXTRAL, mesh(1, 8, 1, 128, mesh__expert=8, **LIGHT)),
    Row("h100:8x8", MIXTRAL, mesh(1, 4, 2, 128, mesh__expert=8)),
    Row("h100:8x8", MIXTRAL, mesh(1, 2, 2, 64, optimizer__accumulate=4, **ALL_AXES)),
    Row("v5p-128", B8, mesh(1, 16, 1, 64, mesh__stage=4, optimizer__accumulate=4)),
    Row("v5p-128", B8, mesh(1, 16, 1, 64, mesh__stage=4, optimizer__accumulate=4, **ONCE)),
    Row("v5p-128", B8, mesh(1, 4, 4, 64, mesh__stage=4, optimizer__accumulate=8, **REPEATED)),
    Row("v5p-128", B8, mesh(1, 16, 1, 64, mesh__context=4)),
    Row("v5p-128", B8, mesh(1, 16, 1, 64, mesh__context=4, **RING)),
    Row("v5p-128", MIXTRAL, mesh(1, 16, 1, 128, mesh__expert=4)),
    Row("v5p-128", QWEN3, mesh(1, 8, 1, 128, mesh__expert=8, data__seq_len=4096)),
    Row("h100:8x8", B8, mesh(1, 16, 1, 64, mesh__stage=4, optimizer__accumulate=4, **TWICE)),
    Row("v5p-128", B8, mesh(1, 16, 1, 64, mesh__stage=4, optimizer__accumulate=4, **TWICE)),
    Row("v5p-128", B8, mesh(1, 32, 1, 64, mesh__context=2)),
    Row("v5p-128", MIXTRAL, mesh(1, 64, 1, 512)),
    *(  # What a bound of experts' rows holds (moe.rows).
        Row("h100:2x8", config, mesh(1, 2, 1, 32, **EXPERTS, moe__rows=rows))
        for config in (MIXTRAL, QWEN3)
        for rows in ("2", "worst")
    ),
    # What is kept with the host.
    *(
        Row(target, config, mesh(1, fsdp, 1, batch, **AWAY))
        for target, config, fsdp, batch in (
            ("h100:8", B1, 8, 32), ("h100:8x8", B8, 64, 64), ("v5p-16", B1, 8, 32), ("v5p-64", B8, 32, 64),
        )
    ),
    # First compiled after the model was frozen.
    Row("h100:4x8", B8, mesh(1, 32, 1, 64), True),
    Row("h100:4x8", B8, mesh(1, 8, 4, 32, **LIGHT), True),
    Row("h100:8x8", B8, mesh(1, 32, 2, 64), True),
    Row("h100:8x8", B8, mesh(2, 32, 1, 64, sync__codec="bf16"), True),
    Row("h100:8x8", B1, mesh(1, 16, 4, 128, optimizer__accumulate=2), True),
    Row("h100:32x8", B70, mesh(1, 64, 4, 128), True),
    Row("h200:8", B8, mesh(1, 8, 1, 16, **LIGHT), True),
    Row("b200:2x8", B8, mesh(2, 8, 1, 32, **INT4), True),
    Row("a100:4x8", B1, mesh(1, 32, 1, 64), True),
    Row("h100:2x8", "qwen3_600m", mesh(1, 8, 2, 64), True),
    Row("v5p-32", B8, mesh(1, 16, 1, 32), True),
    Row("v6e-16", B1, mesh(1, 8, 2, 16), True),
    Row("v5p-64", B1, mesh(1, 32, 1, 64), True),
    Row("v5p-64", B8, mesh(1, 8, 4, 32), True),
    Row("v5e-64", B1, mesh(1, 64, 1, 64), True),
    # The same, of what is kept with the host.
    Row("h100:4x8", B8, mesh(1, 8, 4, 32, **AWAY), True),
    Row("v5p-32", B8, mesh(1, 16, 1, 16, **AWAY), True),
    # The same, after it knew of stages, sequences and experts.
    Row("h100:8x8", B8, mesh(1, 8, 4, 64, mesh__stage=2, optimizer__accumulate=4), True),
    Row("h100:16x8", B70, mesh(1, 4, 8, 64, mesh__stage=4, optimizer__accumulate=8, **REPEATED), True),
    Row("h100:4x8", B8, mesh(1, 8, 1, 64, mesh__stage=4, optimizer__accumulate=8, **LIGHT, **REPEATED), True),
    Row("h100:8x8", B8, mesh(1, 8, 1, 8, mesh__context=8, data__seq_len=32_768, **RING), True),
    Row("h100:8x8", B8, mesh(2, 16, 1, 64, mesh__context=2, **INT4), True),
    Row("h100:8x8", B1, mesh(2, 16, 1, 64, mesh__stage=2, optimizer__accumulate=2, **INT4), True),
    Row("h100:4x8", MIXTRAL, mesh(1, 8, 1, 64, mesh__expert=4), True),
    Row("h100:4x8", MIXTRAL, mesh(1, 4, 1, 64, mesh__expert=4, mesh__stage=2, optimizer__accumulate=4), True),
    Row("h100:8x8", QWEN3, mesh(1, 8, 1, 128, mesh__expert=8, data__seq_len=4096), True),
    Row("v5p-64", B8, mesh(1, 16, 1, 64, mesh__stage=2, optimizer__accumulate=4), True),
    Row("v5p-64", B8, mesh(1, 16, 1, 32, mesh__context=2), True),
    Row("v5p-64", MIXTRAL, mesh(1, 4, 1, 64, mesh__expert=8), True),
    Row("h100:8x8", B8, mesh(1, 32, 1, 64, mesh__stage=2, optimizer__accumulate=2, pipeline__interleave=4), True),
    Row("h100:16x8", B70, mesh(1, 4, 8, 64, mesh__stage=4, optimizer__accumulate=8, **REPEATED | TWICE), True),
    Row("v5p-256", B8, mesh(1, 64, 1, 128, mesh__context=2), True),
    Row("v5p-256", B8, mesh(1, 32, 1, 128, mesh__context=4), True),
)  # fmt: skip


# ── one row ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def measured(row: Row) -> dict[str, Any]:
    """What is predicted and what was compiled, in a process that does nothing else."""
    from bench import compiled
    from parallel.cost import compilers, hardware, targets
    from recipes import aot, methods, programs
    from recipes import target as recipe

    target = targets.parse(row.target, hardware.by_name(hardware.CHIPS))
    compilers.prepare(target.chip)
    flags = [f"--config.{key}={value}" for key, value in row.changes.items()]
    config, _ = methods.parse(["bench/plan.py", f"--config=configs/{row.config}.py", *flags], "")
    recipe.fitted(config, target, list(row.changes))
    said, began = predicted(config, target), time.process_time()
    parts = recipe.make(config, target)
    salt = f"{compilers.compiler(target.chip)} for {target.said()}"
    readings, digests = {}, {}
    for name, lower in programs.steps(parts).items():
        program, digests[name] = compiled.compiled(lower(), parts, salt)
        readings[name] = aot.read(name, program, parts, target, config)
    return {
        "predicted": said,
        "compiled": together(readings) | {"fits": max(x.peak_bytes for x in readings.values()) <= target.memory},
        "largest": {name: [(b.bytes / GIB, b.where) for b in x.largest] for name, x in readings.items()},
        "wire": {name: [s._asdict() for s in x.wire] for name, x in readings.items()},
        "played": {name: x.played for name, x in readings.items()},
        "digests": digests,
        "compiler": compilers.compiler(target.chip),
        "cpu_seconds": time.process_time() - began,
    }  # fmt: skip


def predicted(config: Any, target: Any) -> dict[str, Any]:
    from parallel.layout import mesh as meshes
    from recipes import plan
    from recipes.case import Case

    case = Case(config, target, None, TYPED)
    sizes = meshes.fill_sizes(config.mesh, target.chips)
    found = list(plan.without_exchange(case, sizes))
    if sizes["replica"] > 1:
        found, notes = plan.over_slow(case, found)
        assert found, notes
    (c,) = found
    exchange = config.sync.interval if c.strategy not in ("sync", "stale") else 1
    return {
        "peak": c.peak_bytes,
        "temporaries": c.temporary_bytes,
        "FLOPs": c.step.flops,
        "bytes": c.sent | {"replica": c.sent["replica"] / exchange},
        "seconds": c.seconds,
        "computing": c.step.compute,
        "waiting": c.step.exposed,
        "moments": c.moments,
        "fits": c.fits,
    }


def together(readings: dict[str, Any]) -> dict[str, Any]:
    """Of a step: the most that a program holds; what all of them do, as often as they run."""
    runs = [(x, x.runs_per_step) for x in readings.values()]
    bytes_: dict[str, float] = {}
    waiting: dict[str, float] = {}
    for x, times in runs:
        for s in x.wire:
            bytes_[s.axis] = bytes_.get(s.axis, 0.0) + times * s.bytes
        for axis, seconds in x.played.get("exposed", {}).items():
            waiting[axis] = waiting.get(axis, 0.0) + times * seconds
    return {
        "peak": max(x.peak_bytes for x, _ in runs),
        "temporaries": max(x.temporary_bytes for x, _ in runs),
        "FLOPs": sum(times * x.flops for x, times in runs),
        "bytes": bytes_,
        "seconds": sum(times * x.played.get("seconds", math.nan) for x, times in runs),
        "computing": sum(times * x.played.get("compute", math.nan) for x, times in runs),
        "waiting": waiting,
    }


class Workers:
    """Each compiler in a process of its own, whose memory is its own."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")

    def isolated(self, function: Any, *arguments: Any) -> Any:
        pool = self._context.Pool(1, common.begin_worker)
        found = pool.apply(function, arguments)
        pool.close()  # to end it by a signal makes libtpu print its stack
        pool.join()
        return found

    def row(self, row: Row) -> dict[str, Any]:
        print(row.name, flush=True)
        found = self.isolated(measured, row)
        print(line(found), flush=True)
        return found


def line(x: dict[str, Any]) -> str:
    said, is_ = x["predicted"], x["compiled"]
    sides = [f"{name} {said[name] / GIB:.2f} / {is_[name] / GIB:.2f} GiB" for name in ("peak", "temporaries")]
    sides += [f"{axis} {said['bytes'][axis] / GIB:.2f} / {size / GIB:.2f} GiB" for axis, size in is_["bytes"].items()]
    sides += [f"step {said['seconds']:.3f} / {is_['seconds']:.3f} s"]
    return "  predicted / compiled: " + ", ".join(sides) + f" ({x['cpu_seconds']:.0f} CPU s)"

"""The planner beside the compilers: what it predicts of a step, and what compiled programs hold, send, multiply, and
take when their schedule is played at the same rates (parallel/cost/play.py).

python bench/plan.py                          all rows (needs requirements-targets.txt), in bench/results/plan.json
python bench/plan.py --only=h100              rows whose name contains this
python bench/plan.py --held-out               those alone that were first compiled after the model was frozen
python bench/plan.py --pick=llama3_8b --hardware=h100:8x8     judges a pick: what is predicted to be nearly as fast

Each program is kept in runs/compiled/ under the digest of what was compiled, so that a run that was stopped goes on,
and a second one reads what is there. A row's figures are of one device and step.
"""

import json
import math
import multiprocessing
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import common  # noqa: E402
from runtime import usage  # noqa: E402

GIB = 2**30
RESULT = common.RESULTS / "plan.json"
NEAR = 0.10  # what misses by more is listed
WITHIN, MOST = 1.5, 24  # of a pick's predicted time, candidates that are judged beside it
CLOSE = 1.05  # of the best's time, what a pick may take
B1, B8, B70 = "llama3_1b", "llama3_8b", "llama3_70b"
TYPED = ("mesh.replica", "mesh.fsdp", "mesh.tensor", "optimizer.accumulate", "compute.remat", "data.batch_size",
         "sync.strategy", "sync.codec", "sync.interval", "sync.fragments", "sync.overlap")  # fmt: skip


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
INT4 = {"sync__codec": "int4"}
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
)  # fmt: skip


# ── one row ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def measured(row: Row) -> dict[str, Any]:
    """What is predicted and what was compiled, in a process that does nothing else."""
    from bench import compiled
    from parallel.cost import compilers, hardware, targets
    from recipes import aot, methods, programs
    from recipes import target as recipe
    from runtime import library_log

    target = targets.parse(row.target, hardware.by_name(hardware.CHIPS))
    compilers.prepare(target.chip)
    library_log.begin()  # compilers print by themselves
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

    case = plan.Case(config, target, None, TYPED)
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


# ── tables ────────────────────────────────────────────────────────────────────────────────────────────────────────────

SMALL = 64 * 2**20  # bytes over an axis that nobody waits for: no miss


def errors(found: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """(quantity, predicted / compiled − 1)."""
    said, is_ = found["predicted"], found["compiled"]
    for name in ("peak", "temporaries", "FLOPs", "seconds"):
        if math.isfinite(is_[name]) and is_[name]:
            yield name, said[name] / is_[name] - 1
    for axis, size in is_["bytes"].items():
        if max(size, said["bytes"][axis]) > SMALL or axis == "replica":
            yield f"bytes over {axis}", said["bytes"][axis] / size - 1


def table(found: dict[str, dict[str, Any]]) -> list[str]:
    """Of each quantity the median and the worst error, then each miss with what it comes from."""
    rows = [(name, what, error) for name, x in found.items() for what, error in errors(x)]
    lines = []
    for what in dict.fromkeys(what for _, what, _ in rows):
        these = sorted(abs(error) for _, own, error in rows if own == what)
        near = sum(error <= NEAR for error in these)
        middle, worst = statistics.median(these), these[-1]
        lines.append(f"{what:<20} median {middle:6.1%}  worst {worst:6.1%}  within 10 %: {near} of {len(these)}")
    for name, what, error in rows:
        if abs(error) > NEAR:
            lines.append(f"MISS {name}: {what} {error:+.1%}: {because(found[name], what)}")
    lines += [f"FITS NOT, as predicted it would: {n}" for n, x in found.items() if claims_too_much(x)]
    return [*lines, *order(found)]


def claims_too_much(x: dict[str, Any]) -> bool:
    return x["predicted"]["fits"] and not x["compiled"]["fits"]


def because(x: dict[str, Any], what: str) -> str:
    said, is_ = x["predicted"], x["compiled"]
    if what == "seconds":
        parts = [f"computing {said['computing']:.3f} / {is_['computing']:.3f} s"]
        parts += [f"{axis} {said['waiting'].get(axis, 0):.3f} / {s:.3f} s" for axis, s in is_["waiting"].items() if s]
        return ", ".join(parts)
    if what.startswith("bytes"):
        axis = what.rpartition(" ")[2]
        own = [s for wire in x["wire"].values() for s in wire if s["axis"] == axis]
        return ", ".join(f"{s['kind']} {s['dtype']} {s['bytes'] / GIB:.2f} GiB" for s in own)
    moment = max(said["moments"], key=lambda name: sum(said["moments"][name].values()))
    arrays = [f"{a} {size / GIB:.2f}" for a, size in said["moments"][moment].items() if size > GIB / 10]
    largest = [f"{size:.2f} {where}" for size, where in next(iter(x["largest"].values()))]
    return f"predicted {moment}: {', '.join(arrays)} GiB; compiled, largest: {', '.join(largest)}"


def order(found: dict[str, dict[str, Any]]) -> list[str]:
    """Of every two rows whose played times differ by more than 10 %, whether the predicted ones stand in that order."""
    rows = [(name, x["predicted"]["seconds"], x["compiled"]["seconds"]) for name, x in found.items()]
    rows = [row for row in rows if math.isfinite(row[2])]
    pairs = [(a, b) for a in rows for b in rows if b[2] > (1 + NEAR) * a[2]]
    wrong = [(a[0], b[0]) for a, b in pairs if a[1] >= b[1]]
    lines = [f"order: right in {len(pairs) - len(wrong)} of {len(pairs)} pairs that differ by more than 10 %"]
    return lines + [f"WRONG ORDER {a} is faster than {b}" for a, b in wrong]


def line(x: dict[str, Any]) -> str:
    said, is_ = x["predicted"], x["compiled"]
    sides = [f"{name} {said[name] / GIB:.2f} / {is_[name] / GIB:.2f} GiB" for name in ("peak", "temporaries")]
    sides += [f"{axis} {said['bytes'][axis] / GIB:.2f} / {size / GIB:.2f} GiB" for axis, size in is_["bytes"].items()]
    sides += [f"step {said['seconds']:.3f} / {is_['seconds']:.3f} s"]
    return "  predicted / compiled: " + ", ".join(sides) + f" ({x['cpu_seconds']:.0f} CPU s)"


# ── a pick ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def rivals(config: str, machine: str) -> tuple[list[Row], int]:
    """(the pick and what is predicted to take at most 1.5 times as long, fastest first; how many more there are)."""
    from parallel.cost import hardware, targets
    from recipes import methods, plan

    own, _ = methods.parse(["bench/plan.py", f"--config=configs/{config}.py"], "")
    found = plan.search(plan.Case(own, targets.parse(machine, hardware.by_name(hardware.CHIPS)), None))
    near = [c for c in found.fitting if c.seconds <= WITHIN * found.pick.seconds and c is not found.pick]
    judged = [found.pick, *near][:MOST]
    return [Row(machine, config, c.changes) for c in judged], len(near) + 1 - len(judged)


def judge(config: str, machine: str, workers: Any) -> dict[str, Any]:
    """Prints how the pick does among its rivals, played."""
    rows, left_out = workers.isolated(rivals, config, machine)
    print(f"{config} on {machine}: the pick and {len(rows) - 1} rivals; {left_out} more were left out", flush=True)
    found = {row.name: workers.row(row) for row in rows}
    seconds = {name: x["compiled"]["seconds"] for name, x in found.items() if x["compiled"]["fits"]}
    pick, best = rows[0].name, min(seconds, key=lambda name: seconds[name], default="")
    slower = seconds[pick] / seconds[best] - 1 if pick in seconds else math.inf
    said = f"{slower:+.1%} beside the best, {best}" if pick in seconds else "does not fit"
    print(f"  pick {pick}: {said}; {'met' if slower <= CLOSE - 1 else 'MISSED'}; {len(rows) - len(seconds)} do not fit")
    return {"pick": pick, "best": best, "slower": slower, "left_out": left_out, "rows": found}


# ── running ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Workers:
    """Each compiler in a process of its own, whose memory is its own."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("spawn")

    def isolated(self, function: Any, *arguments: Any) -> Any:
        pool = self._context.Pool(1)
        found = pool.apply(function, arguments)
        pool.close()  # to end it by a signal makes libtpu print its stack
        pool.join()
        return found

    def row(self, row: Row) -> dict[str, Any]:
        print(row.name, flush=True)
        found = self.isolated(measured, row)
        print(line(found), flush=True)
        return found


def kept() -> dict[str, Any]:
    return json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": {}, "picks": {}}


def keep(found: dict[str, Any]) -> None:
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(found | {"versions": common.versions(), "machine": common.machine()}, indent=1) + "\n")


def chosen(only: str, held_out: bool) -> Sequence[Row]:
    return [row for row in ROWS if only in row.name and (row.held_out or not held_out)]


def main() -> None:
    parser = usage.parser(__doc__, "python bench/plan.py")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--held-out", action="store_true", help="those alone")
    parser.add_argument(
        "--pick", default="", metavar="CONFIG", help="judge what is picked for this model, as llama3_8b"
    )
    parser.add_argument("--hardware", default="", metavar="MACHINE", help="on this machine")
    args = parser.parse_args()
    workers, result = Workers(), kept()
    if args.pick:
        result["picks"][f"{args.pick} {args.hardware}"] = judge(args.pick, args.hardware, workers)
        return keep(result)
    found = {}
    for row in chosen(args.only, args.held_out):
        found[row.name] = workers.row(row) | {"held_out": row.held_out}
        result["rows"] |= found
        keep(result)
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()

"""What the train step of large models needs and sends, as the chips' own compilers say, beside MaxText's.

python bench/aot.py                    all rows: 30 minutes of processor time (needs requirements-targets.txt)
python bench/aot.py --only=h100        rows whose name contains this: 6 seconds each; writes no result

GiB of one device and step. Bars of bytes are those that a study of the same compilers found to be within reach; a peak
is at most MaxText's (0.2.5, JAX 0.12.0.1, libtpu 0.0.52; at its defaults, the same model, batch, mesh and precision).
"hidden": bytes under way while matrix products are computed.
"""

import multiprocessing
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import common  # noqa: E402
from runtime import usage  # noqa: E402

GIB = 2**30
SMALL = 16 * 2**20  # bytes of float32 that nobody minds: all else is sent in the compute dtype
B8, B70 = "llama3_8b", "llama3_70b"
F64, T4, TWO = {"mesh.fsdp": 64}, {"mesh.fsdp": 16, "mesh.tensor": 4}, {"mesh.fsdp": 32}
DOUBLE = {"data.batch_size": 128}
LIGHT = {"compute.remat": "matmuls"}
INT4 = {"sync.codec": "int4"}
BF16_RESIDUAL = {"sync.residual_dtype": "bfloat16"}
DILOCO = INT4 | {"sync.strategy": "diloco", "sync.interval": 30}
STREAMING = INT4 | {"sync.strategy": "streaming", "sync.interval": 30, "sync.fragments": 2, "sync.overlap": 2}
STREAMING |= {"steps": 90_000}  # whole calls


@dataclass(frozen=True)
class Row:
    """sent, peak: bars, GiB. maxtext: its (bytes, peak), where it has such a run."""

    target: str
    config: str
    changes: dict[str, Any]
    sent: float | None = None
    peak: float | None = None
    maxtext: tuple[float, float] | None = None

    @property
    def name(self) -> str:
        said = " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in self.changes.items())
        return f"{self.target} {self.config} {said}"


ROWS = (
    Row("v5p-128", B8, F64, 54.2, 8.57, (54.2, 8.57)),
    Row("v5p-128", B8, F64 | DOUBLE, None, 14.54, (54.3, 14.54)),
    Row("v5p-128", B8, F64 | LIGHT, None, 27.60, None),
    Row("v5p-128", B8, T4, 80.9, 8.11, (91.3, 8.11)),
    Row("v5p-128", B8, T4 | DOUBLE, None, 16.08, (172.5, 16.08)),
    Row("2xv5p-64", B8, TWO, None, 11.21, (53.8, 11.21)),
    Row("2xv5p-64", B8, TWO | DOUBLE | {"sync.codec": "bf16"}, None, 17.48, (53.9, 17.48)),
    Row("2xv5p-64", B8, TWO | INT4, 41.7, 10.2),
    Row("2xv5p-64", B8, TWO | INT4 | {"sync.strategy": "stale"}, None, 12.1),
    Row("2xv5p-64", B8, TWO | DILOCO, None, 12.8),
    Row("2xv5p-64", B8, TWO | DILOCO | BF16_RESIDUAL, None, 12.12, (45.0, 12.12)),
    Row("2xv5p-64", B8, TWO | STREAMING, None, 16.0),
    Row("v5p-512", B70, {"mesh.fsdp": 64, "mesh.tensor": 4, "data.batch_size": 256}, 487.6, 22.31, (540.1, 22.31)),
    Row("h100:8x8", B8, F64, 40.4, 6.95, (40.4, 6.95)),
    Row("h100:8x8", B8, F64 | DOUBLE, None, 11.11, (40.6, 11.11)),
    Row("h100:8x8", B8, F64 | LIGHT, None, 26.55, (40.4, 26.55)),
    Row("h100:8x8", B8, T4, 76.5, 8.31, (118.9, 8.31)),
    # What waits for an exchange keeps no second copy of the optimizer's state: 49.2 GiB with one.
    Row("h100:4x8", B8, STREAMING | {"mesh.replica": 4, "mesh.fsdp": 8, "data.batch_size": 32}, None, 40.0),
    Row("h100:8x8", B70, {"mesh.fsdp": 8, "mesh.tensor": 8, "data.batch_size": 16}, 235.7, 25.45, (323.7, 25.45)),
)


def compiled(row: Row) -> dict[str, Any]:
    """{program of the step: what it needs and sends}, of a process that compiles nothing else."""
    from parallel.cost import compilers, hardware, targets
    from parallel.layout.axes import SLOW
    from recipes import aot, methods, programs
    from recipes import target as recipe

    target = targets.parse(row.target, hardware.by_name(hardware.CHIPS))
    compilers.prepare(target.chip)
    flags = [f"--config.{key}={value}" for key, value in row.changes.items()]
    config, _ = methods.parse(["bench/aot.py", f"--config=configs/{row.config}.py", *flags], "")
    recipe.fitted(config, target, list(row.changes))
    parts, found, before = recipe.make(config, target), {}, time.process_time()
    K = parts.strategy.steps_per_call
    for name, lower in programs.steps(parts).items():
        reading = aot.read(name, aot.compiled(lower, parts.xla_options), parts, target, config)
        found[name] = {
            "peak": reading.peak_bytes / GIB,
            "temporary": reading.temporary_bytes / GIB,
            "sent": sum(x.bytes for x in reading.wire) / GIB / K,
            "hidden": sum(x.hidden_bytes for x in reading.wire) / GIB / K,
            "float32": sum(x.bytes for x in reading.wire if x.dtype == "f32" and x.axis != SLOW) / K,
            "wire": [x._asdict() for x in reading.wire],
            "largest": [(b.bytes / GIB, b.dtype, b.shape, b.where) for b in reading.largest],
            "not_counted": reading.not_counted,
        }
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {"programs": found, "cpu_seconds": time.process_time() - before, "rss": used.ru_maxrss * 1024 / GIB}


def main() -> None:
    parser = usage.parser(__doc__, "python bench/aot.py")
    parser.add_argument("--only", default="", help="rows whose name contains this; writes no result")
    args = parser.parse_args()
    report, context = common.Report("aot"), multiprocessing.get_context("spawn")
    for row in ROWS:
        if args.only not in row.name:
            continue
        with context.Pool(1, common.begin_worker) as pool:  # of its own, and its memory, too
            found = pool.apply(compiled, (row,))
        report.details[row.name] = found | {"maxtext": row.maxtext}
        steps = found["programs"].values()
        peak, sent = max(x["peak"] for x in steps), max(x["sent"] for x in steps)
        # To the rounding of the figures that they are held against.
        report.row(f"{row.name}: sent", round(sent, 1), "GiB", at_most=row.sent)
        report.row(f"{row.name}: peak", round(peak, 2), "GiB", at_most=row.peak)
        report.row(f"{row.name}: hidden", max(x["hidden"] for x in steps), "GiB")
        report.row(f"{row.name}: float32 within a slice", max(x["float32"] for x in steps), "bytes", at_most=SMALL)
        report.row(f"{row.name}: CPU seconds", found["cpu_seconds"], "s", at_most=180)
        report.row(f"{row.name}: memory of the compiler", found["rss"], "GiB", at_most=4)
    if not args.only:
        report.finish()


if __name__ == "__main__":
    main()

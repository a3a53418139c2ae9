"""What it costs to average adapters: held-out loss of a tiny model that is tuned on other text than it was trained on,
with all weights, with an adapter, and with an adapter whose A is frozen; synchronously and with DiLoCo.

python bench/lora.py --seeds=3        (prints a table in Markdown)

The base reads Python's standard library, what is tuned on is this repository's documents as they are when it begins.
Without a codec: nothing but what is averaged differs. RATES are the best of three each (1, 3 and 10 thousandths for all
weights, 3, 10 and 30 for adapters), tried with `sync`, 2 replicas and seed 0.
"""

import contextlib
import io
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import slackline as sl  # noqa: E402
from parallel.cost.bytes import bytes_per_step  # noqa: E402
from runtime import usage  # noqa: E402

STEPS, H = 120, 30
SHARED: dict[str, Any] = {
    "data.batch_size": 32, "data.seq_len": 64, "log_every": 10, "sample.tokens": 0, "optimizer.warmup_steps": 10,
    "eval_batches": 16,
}  # fmt: skip
KINDS = {"all weights": {}, "adapter": {"lora.rank": 4}, "adapter, A frozen": {"lora.rank": 4, "lora.freeze_a": True}}
RATES = {"all weights": 3e-3, "adapter": 3e-3, "adapter, A frozen": 1e-2}
STRATEGIES = {"sync": {}, "diloco": {"sync.strategy": "diloco", "sync.interval": H}}


def fit(workdir: Path, **changes: Any) -> Any:
    """A run of this name, which is not made twice."""
    with contextlib.redirect_stdout(io.StringIO()):
        return sl.fit("tiny", workdir=workdir, **SHARED | changes)


def tuned(folder: Path, kind: str, strategy: str, replicas: int, lr: float, seed: int) -> tuple[float, float]:
    """(held-out loss in nats per byte, bytes that a replica sends a step)."""
    name = f"{kind}-{strategy}-{replicas}-{lr}-{seed}".replace(", ", "-").replace(" ", "-")
    keys = KINDS[kind] | STRATEGIES[strategy] | {"sync.replicas": replicas, "optimizer.lr": lr, "seed": seed}
    docs = {"init.workdir": str(folder / "base"), "data.path": str(folder / "text"), "data.suffixes": ".md"}
    run = fit(folder / name, steps=STEPS, **docs | keys)
    sent = bytes_per_step(run.parts.strategy, STEPS, a_device_per_replica=True)
    return run.summary["final_eval_loss"], sent


def main() -> None:
    parser = usage.parser(__doc__, "python bench/lora.py")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="of which means are taken")
    parser.add_argument("--workdir", type=Path, default=Path("runs/lora"), metavar="PATH", help="where runs are kept")
    args = parser.parse_args()
    if not (args.workdir / "text").exists():
        shutil.copytree(ROOT / "docs", args.workdir / "text")
    base = fit(args.workdir / "base", steps=600, **{"optimizer.lr": 3e-3})
    with contextlib.redirect_stdout(io.StringIO()):
        untuned = fit(args.workdir / "untuned", steps=1, **{
            "optimizer.lr": 0.0, "optimizer.warmup_steps": 0, "init.workdir": str(base.workdir),
            "data.path": str(args.workdir / "text"), "data.suffixes": ".md",
        })  # fmt: skip
    print(f"before: {untuned.summary['final_eval_loss']:.3f}")
    cases = [f"{name}, R = {R}" for name in STRATEGIES for R in (2, 4)]
    print(f"| | bytes a step, R = 2 | {' | '.join(cases)} |\n|---|---|---|---|---|---|")
    for kind in KINDS:
        cells, sizes = [], []
        for strategy in STRATEGIES:
            for replicas in (2, 4):
                found = [tuned(args.workdir, kind, strategy, replicas, RATES[kind], n) for n in range(args.seeds)]
                losses = [loss for loss, _ in found]
                spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
                cells.append(f"{statistics.mean(losses):.3f}{spread}")
                sizes.append(found[0][1])
        print(f"| {kind} | {sizes[0]:,.0f}; {sizes[2]:,.0f} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

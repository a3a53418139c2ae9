"""Published training steps beside what the planner predicts of them, and beside one constant MFU.

python bench/published.py

Rows that say the chips, the mesh, the batch, the precision and the length: MaxText's are of NVIDIA's dgxc-benchmarking
(v25.03, maxtext/README_70b.md), JAX-Toolbox's of its own README. What rematerialisation MaxText's ran with is not said.
Neither cuts the logits into chunks, so here they are one.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from runtime import usage  # noqa: E402

MFU = 0.49  # of bf16 products, attention's causal half
WHOLE = {"compute.loss_chunk_mib": 1 << 20}
LLAMA2_7B = WHOLE | {
    "model.mlp_dim": 11_008, "model.num_kv_heads": 32, "model.rope_scaling.factor": 0.0, "data.vocab_size": 32_000,
    "data.seq_len": 4096, "compute.remat": "matmuls", "data.batch_size": 16,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    name: str
    target: str
    config: str
    changes: dict[str, Any]
    seconds: float


ROWS = (
    Row("MaxText 70B, fsdp 128", "h100:16x8", "llama3_70b", WHOLE | {"data.batch_size": 256}, 15.563),
    Row("MaxText 70B, fsdp 512", "h100:64x8", "llama3_70b", WHOLE | {"data.batch_size": 1024}, 15.519),
    Row("MaxText 70B, fsdp 2,048", "h100:256x8", "llama3_70b", WHOLE | {"data.batch_size": 4096}, 15.898),
    Row("JAX-Toolbox Llama 2 7B, fsdp 8", "h100:8", "llama3_8b", LLAMA2_7B, 0.721),
)


def main() -> None:
    usage.parser(__doc__, "python bench/published.py").parse_args()
    import jax

    from bench import planned
    from parallel.cost import flops, hardware, targets
    from recipes import methods
    from recipes.case import Case

    jax.config.update("jax_platforms", "cpu")  # nothing is run
    for row in ROWS:
        target = targets.parse(row.target, hardware.by_name(hardware.CHIPS))
        typed = row.changes | {"mesh.fsdp": target.chips, "mesh.replica": 1, "mesh.tensor": 1}
        flags = [f"--config.{key}={value}" for key, value in typed.items()]
        config, _ = methods.parse(["bench/published.py", f"--config=configs/{row.config}.py", *flags], "")
        found, case = planned.predicted(config, target), Case(config, target, None)
        task: Any = case.base.task
        token = flops.per_token(case.base.param_shapes, task.axes, task.model.config, config.data.seq_len, causal=True)
        constant = token * config.data.batch_size * config.data.seq_len / (MFU * target.chips * target.chip.bf16)
        own, other = found["seconds"] / row.seconds - 1, constant / row.seconds - 1
        print(f"{row.name:<32} {row.seconds:7.3f} s  predicted {found['seconds']:7.3f} ({own:+.0%})", end="")
        print(f"  at an MFU of {MFU} {constant:7.3f} ({other:+.0%})", flush=True)


if __name__ == "__main__":
    main()

"""Training speed on one accelerator, and beside it a torch.compile script of the same model. Needs a GPU.

python bench/gpu.py
python bench/gpu.py --models=gpt2_124m --lengths=1024 --torch=VENV/bin/python

tokens/s counts whole steps with the read of their loss. Model FLOPs per token, training:
  full   6 · (weights of matrix products, the head once) + 12 · L · H · K · T
  causal the same with 6 · L · H · K · T: only the half of the T × T scores that is needed
MFU is tokens/s times one of them, over the bf16 peak of parallel/cost/hardware.py. The batch is halved until it fits.
bf16 compute, float32 weights and AdamW, no accumulation.
"""

import contextlib
import importlib
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import jax  # noqa: E402

from bench import common, step  # noqa: E402
from bench.torch_gpt import OutOfMemory, TorchChild  # noqa: E402
from configs import base  # noqa: E402
from parallel.cost import flops  # noqa: E402
from parallel.cost.hardware import peak_flops  # noqa: E402
from parallel.layout import mesh as meshes  # noqa: E402
from recipes import build, language  # noqa: E402
from runtime import usage  # noqa: E402

TOKENS = 2**17  # of the largest batch that is tried


def llama_1b5() -> Any:
    """A Llama of 1.5 B parameters, tied head."""
    c = base.get_config()
    c.model.num_layers = 28
    c.model.model_dim = 2048
    c.model.num_heads = c.model.num_kv_heads = 16
    c.model.head_dim = 128
    c.model.mlp_dim = 5632
    c.data.vocab_size = 50_304
    return c


def load(name: str, length: int) -> Any:
    config = llama_1b5() if name == "llama_1b5" else importlib.import_module(f"configs.{name}").get_config()
    config.compute.dtype = "bfloat16"
    config.data.seq_len = length
    config.data.document_mask = False
    config.optimizer.lr = 1e-4
    config.optimizer.warmup_steps = 50
    config.steps = 1000
    return config


def largest(run: Any, config: Any) -> dict[str, Any]:
    """run(config) at the largest batch size that fits in memory, with that size."""
    size = max(1, TOKENS // config.data.seq_len)
    while size:
        config.data.batch_size = size
        with contextlib.suppress(OutOfMemory):
            return run(config) | {"batch size": size}
        size //= 2
    raise SystemExit("not even one sequence fits in this accelerator's memory")


def ask_ours(config: Any, name: str, steps: int) -> dict[str, Any]:
    """time_ours in a process of its own, which gives back its memory whatever happens."""
    command = [sys.executable, "bench/gpu.py", f"--models={name}", f"--lengths={config.data.seq_len}"]
    found = common.run_json([*command, f"--steps={steps}", f"--batch={config.data.batch_size}"])
    if "error" in found:
        raise OutOfMemory(found["error"])
    return found


def time_ours(config: Any, steps: int) -> dict[str, Any]:
    parts = build.build(config, meshes.build({}, jax.devices()[:1]))
    assert isinstance(parts.task, language.Language)
    model, weights = parts.task.model, (parts.param_shapes, parts.task.axes)
    try:
        start, ours = common.clock(step.Ours, parts, step.random_batches(config))
        for _ in range(3):
            ours()
        seconds = [common.clock(ours)[0] for _ in range(steps)]
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return {"error": str(error)}
    memory = ours.compiled.memory_analysis()
    return {
        "seconds": common.spread(seconds),
        "start": start,
        "parameters": build.num_parameters(parts),
        "attention": model.compute.attention,
        "bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes,
        "flops per token": {
            "full": flops.per_token(*weights, model.config, config.data.seq_len, causal=False),
            "causal": flops.per_token(*weights, model.config, config.data.seq_len, causal=True),
        },
    }


def time_torch(config: Any, steps: int, python: str) -> dict[str, Any]:
    with TorchChild(python, config, device="cuda") as child:
        first = child.step()
        for _ in range(3):
            child.step()
        return {"seconds": common.spread([child.step() for _ in range(steps)]), "start": first, "torch": child.version}


def measure(report: common.Report, name: str, length: int, steps: int, torch: str | None, peak: float | None) -> None:
    config = load(name, length)
    found = {"ours": largest(lambda c: ask_ours(c, name, steps), config)}
    if torch:
        found["torch"] = largest(lambda c: time_torch(c, steps, torch), config)
    flops = found["ours"]["flops per token"]
    speed = {who: one["batch size"] * length / one["seconds"]["median"] for who, one in found.items()}
    for who, one in found.items():
        what = f"{name}, T={length}, {who}"
        report.row(f"{what}: batch size that fits", one["batch size"], "sequences")
        report.row(f"{what}: speed", speed[who], "tokens/s")
        for kind, per_token in flops.items():
            if peak:
                report.row(f"{what}: MFU, {kind} attention", 100 * speed[who] * per_token / peak, "%")
    if torch:
        report.row(f"{name}, T={length}: ours / torch, tokens/s", speed["ours"] / speed["torch"])
    report.details[f"{name}, T={length}"] = found


def torch_python(asked: str | None) -> str | None:
    """The interpreter for the PyTorch script, or None if there is none."""
    python = asked or sys.executable
    test = subprocess.run([python, "-c", "import torch; assert torch.cuda.is_available()"], capture_output=True)
    if test.returncode and asked:
        raise SystemExit(f"--torch={asked}: that interpreter has no torch that sees a GPU")
    return None if test.returncode else python


def main() -> None:
    parser = usage.parser(__doc__, "python bench/gpu.py")
    parser.add_argument("--models", default="gpt2_124m,llama_1b5", help="with commas between")
    parser.add_argument("--lengths", default="1024,4096", help="tokens in a sequence")
    parser.add_argument("--steps", type=int, default=20, help="in each timing")
    parser.add_argument("--torch", metavar="PYTHON", help="an interpreter that has torch; default: this one, if it has")
    parser.add_argument("--batch", type=int, help="time ours at this batch size alone, print JSON, write nothing")
    args = parser.parse_args()
    models, lengths = args.models.split(","), [int(length) for length in args.lengths.split(",")]
    if args.batch:
        config = load(models[0], lengths[0])
        config.data.batch_size = args.batch
        print(json.dumps(time_ours(config, args.steps)))
        return
    # Asked of another process: the one that asks reserves most of the accelerator's memory for itself.
    probe = "import jax, json; d = jax.devices()[0]; print(json.dumps([d.platform, d.device_kind]))"
    platform, kind = common.run_json([sys.executable, "-c", probe])
    if platform == "cpu":
        raise SystemExit("bench/gpu.py needs a GPU or a TPU, and JAX sees only CPUs on this machine")
    report, torch, peak = common.Report("gpu"), torch_python(args.torch), peak_flops(kind)
    report.details["device"], report.details["bf16 peak"] = kind, peak
    print(f"{kind}, beside {'torch.compile' if torch else 'nothing: no interpreter with torch and a GPU was found'}")
    for name, length in itertools.product(models, lengths):
        measure(report, name, length, args.steps, torch, peak)
    report.finish()


if __name__ == "__main__":
    main()

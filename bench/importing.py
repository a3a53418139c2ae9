"""How much memory an import of 2 GB of safetensors takes: at its peak, above what the process held before.

python bench/importing.py

The bar is this process's share of the weights and 1.2 times the largest array as a run holds it, all layers in one:
Orbax copies an array that it writes.
"""

import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models

sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import common  # noqa: E402
from model import safetensors  # noqa: E402
from runtime import usage  # noqa: E402

D, F, LAYERS, HEADS, VOCAB = 1536, 6144, 13, 12, 320
SQUARES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
CONFIG = {
    "model_type": "llama", "hidden_size": D, "intermediate_size": F, "num_hidden_layers": LAYERS, "hidden_act": "silu",
    "num_attention_heads": HEADS, "num_key_value_heads": HEADS, "head_dim": D // HEADS, "vocab_size": VOCAB,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_word_embeddings": True,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
FLOAT32 = np.dtype("float32")

# As `python -m model.huggingface import`, watched.
CHILD = """
import sys, threading, time
from pathlib import Path
from runtime import early
early.one_arena()
from parallel.layout import mesh
from recipes import imported
import runtime.checkpoint
mesh.simulate(int(sys.argv[1]))
import jax
jax.numpy.zeros(8).block_until_ready()
held = lambda: 4096 * int(Path("/proc/self/statm").read_text().split()[1])
before = peak = held()
def watch():
    global peak
    while True:
        peak = max(peak, held())
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
imported.import_model(Path(sys.argv[2]), Path(sys.argv[3]), lambda line: print(line, file=sys.stderr))
print(peak - before)
"""


def shapes() -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, D), "model.norm.weight": (D,)}
    for layer in range(LAYERS):
        own = dict.fromkeys(SQUARES, (D, D)) | {"mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
        own |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (D,))
        found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in own.items()}
    return {name: (FLOAT32, shape) for name, shape in found.items()}


def write_model(folder: Path) -> int:
    """Bytes of its weights."""
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tokenizer = Tokenizer(models.BPE({f"t{i}": i for i in range(VOCAB - 1)}, []))
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    draw, wanted = np.random.default_rng(0), shapes()
    arrays = (draw.standard_normal(shape, FLOAT32) for _, shape in wanted.values())
    safetensors.write(folder / "model.safetensors", wanted, arrays)
    return sum(4 * math.prod(shape) for _, shape in wanted.values())


def main() -> None:
    usage.parser(__doc__, "python bench/importing.py").parse_args()
    report = common.Report("importing")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made) / "model"
        folder.mkdir()
        share, largest = write_model(folder), 4 * LAYERS * D * F
        report.row("weights", share / 1e9, "GB")
        report.row("the largest array", largest / 1e9, "GB")
        for devices in (1, 4):
            command = [sys.executable, "-c", CHILD, str(devices), str(folder), f"{made}/run-{devices}"]
            done = subprocess.run(command, cwd=common.ROOT, stdout=subprocess.PIPE, text=True, check=True)
            bar = (share + 1.2 * largest) / 1e9
            report.row(f"peak above before, devices: {devices}", int(done.stdout) / 1e9, "GB", at_most=bar)
    report.finish()


if __name__ == "__main__":
    main()

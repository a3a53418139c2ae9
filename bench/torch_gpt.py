"""GPT-2 and Llama in plain PyTorch, as in nanoGPT: the figure beside ours, on a CPU (eager) or a GPU (torch.compile).

python bench/torch_gpt.py --config='{…}'      (bench/step.py and bench/gpu.py run it; it needs torch and nothing else)

It answers each line on stdin with one JSON line: the seconds of a step, the first of which compiles.
Same sizes, float32 weights, AdamW with clipping at 1, tied head, no dropout. Weights are its own random ones.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from typing import Any

SHAPE = ("vocab_size", "seq_len", "batch_size")


class OutOfMemory(RuntimeError):
    """The model does not fit at this batch size."""


class TorchChild:
    """A PyTorch process that makes a step when asked. Imported by scripts that have no torch themselves."""

    def __init__(self, python: str, config: Any, **options: Any):
        settings = {**config.model, **{name: config.data[name] for name in SHAPE}, **options}
        settings = {k: v for k, v in settings.items() if isinstance(v, (int, float, str, bool))}
        command = [python, __file__, f"--config={json.dumps(settings)}"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version = self._answer()["version"]

    def step(self) -> float:
        """Makes a step. Returns its seconds."""
        assert self.process.stdin
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self._answer()["seconds"]

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the PyTorch process ended with status {self.process.wait()}; see its message above")
        answer = json.loads(line)
        if "error" in answer:
            raise OutOfMemory(answer["error"])
        return answer

    def __enter__(self) -> "TorchChild":
        return self

    def __exit__(self, *_: Any) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def rotate(torch: Any, x: Any, theta: float) -> Any:
    """Rotary positions of heads [B, H, T, K]."""
    T, K = x.shape[2:]
    freq = theta ** (-torch.arange(0, K, 2, device=x.device) / K)
    angle = torch.arange(T, device=x.device)[:, None] * freq
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def build_model(torch: Any, c: dict[str, Any]) -> Any:
    """The network of config c."""
    nn, F = torch.nn, torch.nn.functional
    D, H, G, K, M = c["model_dim"], c["num_heads"], c["num_kv_heads"], c["head_dim"], c["mlp_dim"]
    bias, llama = c["bias"], c["mlp"] == "swiglu"

    def norm() -> Any:
        return nn.LayerNorm(D, eps=c["norm_eps"]) if c["norm"] == "layer" else nn.RMSNorm(D, eps=c["norm_eps"])

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = norm(), norm()
            self.qkv = nn.Linear(D, (H + 2 * G) * K, bias)
            self.out = nn.Linear(H * K, D, bias)
            self.up = nn.Linear(D, 2 * M if llama else M, bias)
            self.down = nn.Linear(M, D, bias)

        def forward(self, x: Any) -> Any:
            B, T, _ = x.shape
            heads = self.qkv(self.norm1(x)).view(B, T, H + 2 * G, K).transpose(1, 2)
            q, k, v = heads.split([H, G, G], 1)
            if c["position"] == "rope":
                q, k = (rotate(torch, x, c["rope_theta"]) for x in (q, k))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=G != H)
            x = x + self.out(y.transpose(1, 2).reshape(B, T, H * K))
            h = self.up(self.norm2(x))
            if llama:
                gate, up = h.chunk(2, -1)
                return x + self.down(F.silu(gate) * up)
            return x + self.down(F.gelu(h, approximate="tanh"))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(c["vocab_size"], D)
            self.position = nn.Embedding(c["seq_len"], D) if c["position"] == "learned" else None
            self.blocks = nn.ModuleList(Block() for _ in range(c["num_layers"]))
            self.final_norm = norm()
            for name, w in self.named_parameters():
                if w.ndim > 1:
                    scale = math.sqrt(2 * c["num_layers"]) if name.endswith(("out.weight", "down.weight")) else 1
                    nn.init.normal_(w, std=c["init_std"] / scale)

        def forward(self, tokens: Any, targets: Any) -> Any:
            x = self.embed(tokens)
            if self.position is not None:
                x = x + self.position.weight
            for block in self.blocks:
                x = block(x)
            logits = F.linear(self.final_norm(x), self.embed.weight)
            return F.cross_entropy(logits.view(-1, logits.shape[-1]).float(), targets.view(-1))

    return Net()


def make_step(torch: Any, c: dict[str, Any]) -> Any:
    """A function that makes one step, the reading of its loss included."""
    gpu = torch.cuda.is_available() and c.get("device") == "cuda"
    device = "cuda" if gpu else "cpu"
    torch.manual_seed(0)
    torch.set_num_threads(os.cpu_count() or 1)
    torch.set_float32_matmul_precision("high")
    model = build_model(torch, c).to(device)
    matrices = [w for w in model.parameters() if w.ndim > 1]
    vectors = [w for w in model.parameters() if w.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), fused=True)
    run = torch.compile(model) if gpu else model
    ids = torch.randint(c["vocab_size"], (c["batch_size"], c["seq_len"] + 1), device=device)

    def step() -> float:
        with torch.autocast("cuda", torch.bfloat16, enabled=gpu):
            loss = run(ids[:, :-1], ids[:, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="sizes of the model, as JSON")
    c = json.loads(parser.parse_args().config)
    try:
        import torch
    except ImportError:
        sys.exit(f"{sys.executable} has no torch: pip install torch there, or name another interpreter")
    try:
        step = make_step(torch, c)
        print(json.dumps({"version": torch.__version__}), flush=True)
        for _ in sys.stdin:
            start = time.perf_counter()
            loss = step()
            print(json.dumps({"seconds": time.perf_counter() - start, "loss": loss}), flush=True)
    except torch.OutOfMemoryError as error:
        print(json.dumps({"error": str(error)}), flush=True)


if __name__ == "__main__":
    main()

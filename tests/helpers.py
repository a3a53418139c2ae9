"""What several test files need: small runs in this process, and real runs of train.py in others."""

import contextlib
import dataclasses
import io
import os
import re
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import recipes.build
from data import corpus as corpora
from data.loader import Loader
from parallel.cost import wire
from parallel.layout import mesh as meshes
from parallel.layout import placement
from recipes import describe, methods
from recipes.build import Parts
from recipes.programs import compile_init, compile_sample, compile_steps, shardings_of
from runtime.progress import on_host

ROOT = Path(__file__).resolve().parent.parent


def name(mesh: tuple[int, ...]) -> str:
    said = {3: "r{}f{}t{}", 4: "r{}f{}c{}t{}", 5: "r{}s{}f{}c{}t{}", 6: "r{}s{}f{}e{}c{}t{}"}
    return said[len(mesh)].format(*mesh)


def sizes(mesh: tuple[int, ...]) -> dict[str, int]:
    """replica × fsdp × tensor; with context before the last; with stage after the first, too; or all."""
    few = {3: ("stage", "expert", "context"), 4: ("stage", "expert"), 5: ("expert",), 6: ()}[len(mesh)]
    return dict(zip((axis for axis in meshes.AXES if axis not in few), mesh, strict=True))


def tiny(**overrides: Any):
    """The tiny config with overrides: tiny(optimizer__lr=1e-3)."""
    from configs import tiny as module

    config = module.get_config()
    for key, value in overrides.items():
        config.update_from_flattened_dict({key.replace("__", "."): value})
    methods.validate(config)
    return config


def dropless(experts: int) -> dict[str, Any]:
    """Overrides of a model whose loss no mesh may change; 0: without experts."""
    return {"model__experts": experts, "moe__balance_weight": 0.0, "moe__rows": "worst"} if experts else {}


def build(config, mesh: tuple[int, ...]) -> Parts:
    """On the first of this process's devices."""
    return recipes.build.build(config, meshes.build(sizes(mesh), jax.devices()[: int(np.prod(mesh))]))


def replaced(parts: Parts, **fields: Any) -> Parts:
    """With other fields of their last phase, and without those before."""
    return dataclasses.replace(parts, phases=(dataclasses.replace(parts.phases[-1], first=0, **fields),))


def messages(text: str, mesh: Any) -> list[wire.Collective]:
    """Of a compiled program, over `replica`, without the named scalars, which a TPU widens to its 128 lanes."""
    return [c for c in wire.collectives(text, mesh) if c.axis == "replica" and "/scalars_" not in c.scope]


def exchanged(text: str, mesh: Any) -> dict[str, float]:
    """Their bytes by dtype."""
    found: dict[str, float] = {}
    for c in messages(text, mesh):
        found[c.dtype] = found.get(c.dtype, 0) + c.sent
    return found


@cache
def text() -> np.ndarray:
    """Training tokens: bytes of the standard library."""
    return corpora.load(
        corpus="stdlib", path="", tokenizer="bytes", vocab_size=256, eval_fraction=0.05,
        cache_dir=corpora.cache_directory(), seq_len=32,
    ).train_N  # fmt: skip


def batch(config, parts: Parts, step: int, uneven: bool = False) -> dict[str, jax.Array]:
    """The batch of one step. uneven: row b keeps only b mod 5 fifths of its targets, so that replicas and
    micro-steps have different numbers of tokens. Masked documents are lines."""
    lines = {"document_mask": True, "eos": ord("\n")} if config.data.document_mask else {}
    loader = Loader(text(), seq_len=config.data.seq_len, batch_size=config.data.batch_size, seed=config.seed, **lines)

    def rows(ids: np.ndarray) -> dict[str, np.ndarray]:
        found = loader.rows(step, ids.tolist())
        if uneven:
            kept = ids % 5 * config.data.seq_len // 5
            found["mask"] = (np.arange(config.data.seq_len)[None, :] < kept[:, None]).astype(np.float32)
        return found

    return placement.place_train(parts.mesh, parts.replicas, config.data.batch_size, [rows])


# Of every family one, for what a mesh must not change.
EXCHANGES = {
    "sync int4": {"sync__codec": "int4"},
    "sync powersgd": {"sync__codec": "powersgd"},
    "stale topk": {"sync__codec": "topk", "sync__strategy": "stale"},
    "diloco int4": {"sync__codec": "int4", "sync__strategy": "diloco", "sync__interval": 2},
}
QUICKLY = {"xla_backend_optimization_level": 0}  # half the compile time; the collectives are the same


def compile_quickly(parts: Parts) -> Any:
    """The dearest of the compiled programs (an exchange's), for reading its text."""
    program = list(parts.strategy.programs().values())[-1]
    step = jax.jit(program, out_shardings=(shardings_of(parts.state), None), donate_argnums=0)
    return step.lower(parts.state, parts.batch).compile(compiler_options=QUICKLY)


def check_exchange_alone(config, parts: Parts) -> None:
    """Over `replica` goes the exchange alone, and the loss falls."""
    found = describe.traffic(parts, compile_steps(parts, QUICKLY))
    assert all(x.stray == 0 and not x.not_counted for x in found.values()), found
    losses = train_here(config, parts, 12, uneven=True, quickly=True)[0]
    assert losses[-1] < losses[0] - 0.1


def sampled(mesh: tuple[int, ...], **overrides: Any) -> list[int]:
    """Greedy tokens; past the window's end, too. Nothing crosses `replica`."""
    config = tiny(**overrides)
    parts = build(config, mesh)
    program = compile_sample(parts, 30, 0.0)
    (found,) = describe.traffic_beside(parts, {"sample": program}).values()
    assert found.stray == 0
    window_T = np.arange(config.data.seq_len, dtype=np.int32)
    ids = program(init_state(config, parts).params, window_T, np.int32(10), np.uint32(0))
    return np.asarray(ids.addressable_shards[0].data)[0, 0].tolist()


def init_state(config, parts: Parts) -> Any:
    return compile_init(parts)(np.uint32(config.seed))


def losses(config, parts: Parts, steps: int, uneven: bool = False) -> np.ndarray:
    return train_here(config, parts, steps, uneven)[0]


def train_here(config, parts: Parts, steps: int, uneven: bool = False, quickly: bool = False) -> tuple[np.ndarray, Any]:
    """(losses, state) of some steps in this process."""
    programs = compile_steps(parts, QUICKLY if quickly else None)
    state, found = init_state(config, parts), []
    strategy = parts.strategy
    for n in range(0, steps, strategy.steps_per_call):
        batches = [batch(config, parts, n + i, uneven) for i in range(strategy.steps_per_call)]
        stacked = jax.tree.map(lambda *x: jnp.concatenate(x), *batches)
        stacked = jax.device_put(stacked, shardings_of(parts.batch))
        state, metrics = programs[strategy.program_at(n, steps)](state, stacked)
        found += on_host(metrics)["loss"].tolist()
    return np.array(found), state


def first_gradients(config, parts: Parts, uneven: bool = False) -> dict[str, np.ndarray]:
    """The exchanged mean gradient of step 0, by parameter; whole on every process."""
    from jax.experimental import multihost_utils

    from runtime.digest import named_arrays

    state = init_state(config, parts)

    def gradient(state, batch_RBT):
        messages_R, *_ = parts.strategy.messages(state, batch_RBT)
        return parts.strategy.exchange.mean(messages_R, state.codec, state.step)[0]

    grads = jax.jit(gradient, compiler_options=QUICKLY)(
        state, jax.tree.map(lambda x: x[0], batch(config, parts, 0, uneven))
    )
    return {k: multihost_utils.process_allgather(g, tiled=True) for k, g in named_arrays(grads).items()}


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.max(np.abs(a - b) / np.abs(b)))


# ── real runs ────────────────────────────────────────────────────────────────────────────────────────────────────


def command(workdir: Path, *options: str, simulate: int = 8, processes: int = 1, config: str = "tiny") -> list[str]:
    launcher = ["-m", "runtime.launch", f"--processes={processes}", "--"] if processes > 1 else []
    flags = [f"--config=configs/{config}.py", f"--simulate={simulate}", f"--workdir={workdir}"]
    return [sys.executable, *launcher, "train.py", *flags, *options]


def train(workdir: Path, *options: str, check: bool = True, **kwargs) -> subprocess.CompletedProcess:
    """Runs train.py as a user would; returns what it printed. The default run counts how often (tests/counting.py)."""
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    done = subprocess.run(
        command(workdir, *options, **kwargs), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    assert not check or done.returncode == 0, f"rc {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def run_here(
    workdir: Path, *options: str, check: bool = True, config: str | None = "tiny"
) -> subprocess.CompletedProcess:
    """As `train`, in this process, on its 8 devices: a third of the time, for what needs no signal and no second
    process. config=None: what the workdir says."""
    import train  # the trainer, not the function above

    chosen = [f"--config={ROOT}/configs/{config}.py"] if config else []
    argv = ["train.py", *chosen, f"--workdir={workdir}", *options]
    out, err, before = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGTERM)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = train.run(argv)
    signal.signal(signal.SIGTERM, before)
    done = subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())
    assert not check or code == 0, f"rc {code}\n{done.stdout}\n{done.stderr}"
    return done


def metric_losses(workdir: Path) -> dict[int, float]:
    from runtime.metrics import read

    return {row["step"]: row["loss"] for row in read(workdir / "metrics.jsonl") if "loss" in row}


def without_gloo(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not re.search(r"\[Gloo\]", line))

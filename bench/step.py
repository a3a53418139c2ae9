"""What our train step costs beside a hand-written one, and what emulating replicas costs when there is one.

python bench/step.py                        12 pairs of each; about 10 minutes on 2 cores
python bench/step.py --parts=overhead --models=quickstart --pairs=4
python bench/step.py --torch=VENV/bin/python     also times a PyTorch step, for context

The mathematics, weights and batches are the same: the first 5 losses must agree to 5e-6. Everything is timed in turn in
one process, each step with the read of its loss; only the ratios of neighbours mean something on a shared machine.
"""

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

import recipes.build  # noqa: E402
from bench import common, handwritten  # noqa: E402
from bench.torch_gpt import TorchChild  # noqa: E402
from parallel.layout import mesh as meshes  # noqa: E402
from parallel.layout import placement  # noqa: E402
from parallel.strategies.base import per_step, take  # noqa: E402
from parallel.strategies.sync import Sync  # noqa: E402
from recipes import programs  # noqa: E402
from recipes.build import Parts  # noqa: E402
from runtime import usage  # noqa: E402

MODELS = {"quickstart": "configs.quickstart", "gpt12m": "bench.gpt12m"}
NUM_BATCHES = 8
SAME = 5e-6


class NoReplicas(Sync):
    """Sync's step as it would be written if there were no replicas: no vmap, no exchange."""

    def step(self, state, batch_KRBT):
        (loss, tokens), grads = self.loss_and_gradient(state.params, take(take(batch_KRBT, 0), 0))
        tokens = jnp.maximum(tokens, 1)
        grads = jax.tree.map(lambda g: g / tokens, grads)
        new = self.guard.judge(state.guard, state.guard.norms_W, optax.tree.norm(grads), jnp.isfinite(loss))
        state, used, metrics = self.update(state, grads, state.codec, new.applied)
        state.guard = self.guard.count(state.guard, new, used)
        return state, per_step(metrics | {"loss": loss / tokens, "tokens": tokens})


class Ours:
    """Our compiled step, with its state and batches. Calling it makes a step and returns the loss."""

    def __init__(self, parts: Parts, batches: np.ndarray, seed: int = 0):
        self.compiled = programs.compile_steps(parts)["step"]
        self.state = programs.compile_init(parts)(np.uint32(seed))
        self.batches = [place(parts, batch) for batch in batches]
        self.count = 0

    def __call__(self) -> float:
        batch = self.batches[self.count % len(self.batches)]
        self.count += 1
        self.state, metrics = self.compiled(self.state, batch)
        return float(metrics["loss"][0])


class Hand:
    """The hand-written step, from the same weights on the same batches."""

    def __init__(self, config: Any, params: Any, batches: np.ndarray, policy: str):
        optimizer = handwritten.make_optimizer(recipe(config))
        self.params = jax.tree.map(jnp.copy, handwritten.from_ours(params))
        self.opt_state = jax.jit(optimizer.init)(self.params)
        self.batches = [(jnp.asarray(b[:, :-1]), jnp.asarray(b[:, 1:])) for b in batches]
        step = jax.jit(handwritten.make_step(optimizer, policy), donate_argnums=(0, 1))
        self.compiled = step.lower(self.params, self.opt_state, *self.batches[0]).compile()
        self.count = 0

    def __call__(self) -> float:
        batch = self.batches[self.count % len(self.batches)]
        self.count += 1
        self.params, self.opt_state, metrics = self.compiled(self.params, self.opt_state, *batch)
        return float(metrics["loss"])


def place(parts: Parts, batch: np.ndarray) -> dict[str, jax.Array]:
    """[B, T + 1] tokens as the batch of our step."""

    def rows(ids: np.ndarray) -> dict[str, np.ndarray]:
        mask = np.ones((len(ids), batch.shape[1] - 1), np.float32)
        return {"tokens": batch[ids, :-1], "targets": batch[ids, 1:], "mask": mask}

    return placement.place_train(parts.mesh, parts.replicas, len(batch), [rows])


def load(name: str) -> Any:
    config = importlib.import_module(MODELS[name]).get_config()
    config.steps = 1000  # of the schedule: none of the timed steps is at the end of the decay
    config.optimizer.warmup_steps = 50
    return config


def recipe(config: Any) -> handwritten.Recipe:
    o = config.optimizer
    names = ("lr", "warmup_steps", "b1", "b2", "eps", "weight_decay", "clip_norm")
    return handwritten.Recipe(
        steps=config.steps, final_fraction=o.final_lr_fraction, **{name: o[name] for name in names}
    )


def random_batches(config: Any) -> np.ndarray:
    shape = (NUM_BATCHES, config.data.batch_size, config.data.seq_len + 1)
    return np.random.default_rng(0).integers(0, config.data.vocab_size, shape, np.int32)


def build(config: Any, **sizes: int) -> Parts:
    return recipes.build.build(config, meshes.build(sizes))


def check_same_losses(name: str, a: Any, b: Any, num: int = 5) -> float:
    """Makes `num` steps of both. Returns the largest relative difference of their losses, which must be small."""
    losses = np.array([(a(), b()) for _ in range(num)])
    worst = float(np.max(np.abs(losses[:, 0] - losses[:, 1]) / losses[:, 1]))
    assert worst <= SAME, f"{name}: the two are not the same mathematics; losses\n{losses}"
    return worst


def measure_overhead(report: common.Report, name: str, pairs: int, policy: str) -> None:
    config = load(name)
    batches = random_batches(config)
    ours = Ours(build(config), batches)
    hand = Hand(config, ours.state.params, batches, policy)
    worst = check_same_losses(name, ours, hand)
    timing = common.in_turn(lambda: common.clock(ours)[0], lambda: common.clock(hand)[0], pairs)
    temporary = [common.temporary_bytes(x.compiled) for x in (ours, hand)]
    report.row(f"{name}: first 5 losses differ at most by", worst, "relative", at_most=SAME)
    report.row(f"{name}: ours", timing["a_seconds"]["median"] * 1e3, "ms")
    report.row(f"{name}: hand-written", timing["b_seconds"]["median"] * 1e3, "ms")
    report.row(f"{name}: ours / hand-written, median of pairs", timing["ratio"], at_most=1.03)
    report.row(f"{name}: temporary memory, ours", temporary[0] / 2**20, "MiB")
    report.row(f"{name}: temporary memory, hand-written", temporary[1] / 2**20, "MiB")
    report.details[f"{name} overhead"] = {"remat of the hand-written": policy, **timing}


def measure_replicas(report: common.Report, name: str, pairs: int) -> None:
    config = load(name)
    batches = random_batches(config)
    parts = build(config)
    strategy = parts.strategy
    plain = NoReplicas(**{f.name: getattr(strategy, f.name) for f in dataclasses.fields(strategy)})
    phase = dataclasses.replace(parts.phases[0], strategy=plain)
    ours, without = Ours(parts, batches), Ours(dataclasses.replace(parts, phases=(phase,)), batches)
    check_same_losses(name, ours, without)
    timing = common.in_turn(lambda: common.clock(ours)[0], lambda: common.clock(without)[0], pairs)
    report.row(f"{name}: with the vmap over replicas / without", timing["ratio"], at_most=1.02)
    report.details[f"{name} replicas"] = timing


def measure_sharded(report: common.Report, names: list[str], policy: str) -> None:
    """In a process of its own: the number of devices is fixed when JAX starts."""
    command = [sys.executable, "bench/sharded.py", f"--models={','.join(names)}", f"--policy={policy}"]
    for found in common.run_json(command):
        what = f"{found['model']}, {found['mesh']}"
        report.row(f"{what}: temporary per device, ours", found["ours"]["temporary"] / 2**20, "MiB")
        report.row(f"{what}: temporary per device, hand-written", found["hand"]["temporary"] / 2**20, "MiB")
        ratio = found["ours"]["temporary"] / found["hand"]["temporary"]
        report.row(f"{what}: temporary, ours / hand-written", ratio, at_most=1.05)
        for axis in ("fsdp", "tensor"):
            ours, hand = (found[who]["wire"][axis] / 1e6 for who in ("ours", "hand"))
            if ours or hand:
                report.row(f"{what}: wire over {axis}, ours", ours, "MB")
                report.row(f"{what}: wire over {axis}, hand-written", hand, "MB")
        report.details[what] = found


def measure_torch(report: common.Report, name: str, pairs: int, python: str) -> None:
    config = load(name)
    ours = Ours(build(config), random_batches(config))
    with TorchChild(python, config) as child:
        timing = common.in_turn(lambda: common.clock(ours)[0], child.step, pairs)
    report.row(f"{name}: PyTorch {child.version}, eager, fused attention", timing["b_seconds"]["median"] * 1e3, "ms")
    report.row(f"{name}: ours / PyTorch (for context)", timing["ratio"])
    report.details[f"{name} torch"] = {"torch": child.version, **timing}


def main() -> None:
    parser = usage.parser(__doc__, "python bench/step.py")
    parser.add_argument("--pairs", type=int, default=12, help="of timings, each in turn")
    parser.add_argument("--models", default=",".join(MODELS), help="of quickstart, gpt12m")
    parser.add_argument("--parts", default="overhead,replicas,sharded", help="of overhead, replicas, sharded")
    parser.add_argument("--policy", default="matmuls", choices=handwritten.POLICIES, help="what the hand-written keeps")
    parser.add_argument("--torch", metavar="PYTHON", help="an interpreter that has torch; times its step too")
    args = parser.parse_args()
    names, parts = args.models.split(","), args.parts.split(",")
    report = common.Report("step")
    for name in names:
        if "overhead" in parts:
            measure_overhead(report, name, args.pairs, args.policy)
        if "replicas" in parts:
            measure_replicas(report, name, args.pairs)
        if args.torch:
            measure_torch(report, name, args.pairs, args.torch)
    if "sharded" in parts:
        measure_sharded(report, names, args.policy)
    report.finish()


if __name__ == "__main__":
    main()

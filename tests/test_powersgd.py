"""PowerSGD against code we did not write, PyTorch's DDP hook, and against matrices that it can send without a loss.

PyTorch runs in an interpreter of its own (tests/powersgd_torch.py): SLACKLINE_TORCH_PYTHON names it, else it is this
one if it has PyTorch, else the comparison is skipped.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import helpers
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from parallel.exchange import exchange as exchanges
from parallel.exchange import residuals
from parallel.exchange.codecs import PowerSGD
from parallel.exchange.exchange import Exchange, Feedback
from parallel.exchange.units import Leaf
from parallel.layout import mesh as meshes

# PyTorch's layout [out, in]: rows first. Two of the weights are the layers of one array of ours.
LEAVES = {
    "layers": Leaf("layers", (2, 48, 40), P(None, None, None), 1, 1),
    "tall": Leaf("tall", (160, 24), P(None, None), 0, 1),
    "wide": Leaf("wide", (32, 96), P(None, None), 0, 1),
}
REPLICAS, START, STEPS = 2, 2, 12  # START: of the hook's compression; the steps before are plain means


def make(rank: int, feedback: Feedback | None, replicas: int = REPLICAS) -> Exchange:
    """On a replica-only mesh, one device a replica."""
    mesh = meshes.build({"replica": replicas, "fsdp": 1, "tensor": 1}, jax.devices()[:replicas])
    exchange = exchanges.build(PowerSGD(rank), "auto", mesh, replicas, LEAVES, feedback)
    assert all(isinstance(unit.codec, PowerSGD) for unit in exchange.units), "not every matrix is compressed"
    return exchange


def place(exchange: Exchange, tree_R: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return jax.device_put(tree_R, NamedSharding(exchange.mesh, P("replica")))


def largest_difference(ours: jax.Array, theirs: np.ndarray) -> float:
    """Relative to the matrix's largest number: of those next to zero nothing can be asked."""
    ours = np.asarray(ours)
    assert ours.shape == theirs.shape and np.all(np.isfinite(theirs))
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


# ── PyTorch's hook ───────────────────────────────────────────────────────────────────────────────────────────────


def torch_python() -> str:
    if named := os.environ.get("SLACKLINE_TORCH_PYTHON"):
        return named
    if importlib.util.find_spec("torch") is None:
        pytest.skip(
            "no PyTorch here: set SLACKLINE_TORCH_PYTHON to the python of an environment that has it "
            "(python3.11 -m venv DIR && DIR/bin/pip install numpy torch==2.13.0)"
        )
    return sys.executable


def split_layers(tree: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Ours -> PyTorch's names: [steps, R, 2, out, in] as two weights."""
    layers, rest = tree["layers"], {name: x for name, x in tree.items() if name != "layers"}
    return {"layer0": layers[:, :, 0], "layer1": layers[:, :, 1]} | rest


def join_layers(found: dict[str, np.ndarray], what: str) -> dict[str, np.ndarray]:
    """PyTorch's names -> ours, of one kind of result: [steps, …]."""
    layers = np.stack([found[f"{what} layer0"], found[f"{what} layer1"]], axis=1)
    return {"layers": layers} | {name: found[f"{what} {name}"] for name in ("tall", "wide")}


def run_hook(gradients: dict[str, np.ndarray], rank: int, directory: Path) -> list[dict[str, dict[str, np.ndarray]]]:
    """For each replica {"mean", "q", "owed": {name: [steps, …]}}."""
    python = torch_python()
    np.savez(directory / "gradients.npz", **split_layers(gradients))
    script = str(helpers.ROOT / "tests" / "powersgd_torch.py")
    done = subprocess.run(
        [python, script, str(directory / "gradients.npz"), str(directory), str(rank)],
        capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    assert done.returncode == 0, f"{python}: rc {done.returncode}\n{done.stdout}\n{done.stderr}"
    files = [dict(np.load(directory / f"replica{r}.npz")) for r in range(REPLICAS)]
    return [{what: join_layers(found, what) for what in ("mean", "q", "owed")} for found in files]


@pytest.mark.prove
@pytest.mark.parametrize("rank", [2, 4])  # the hook orthogonalises two columns by Gram-Schmidt, more by QR
def test_every_step_is_that_of_pytorchs_own_hook(rank, tmp_path):
    """Q and the residuals are copied from the hook's memory once, after its first compressed step; from there on the
    two go their own ways, and agree on every mean and on what every replica owes."""
    rng = np.random.default_rng(rank)
    gradients = {
        name: rng.standard_normal((STEPS, REPLICAS, *leaf.shape), np.float32) for name, leaf in LEAVES.items()
    }  # fmt: skip
    theirs = run_hook(gradients, rank, tmp_path)
    for name, x in gradients.items():  # PyTorch had these gradients
        np.testing.assert_allclose(theirs[0]["mean"][name][:START], x[:START].mean(axis=1), rtol=1e-6, atol=1e-7)

    exchange = make(rank, Feedback())
    state = residuals.init(exchange)
    owed = lambda name, step: np.stack([replica["owed"][name][step] for replica in theirs])
    for name, leaf in LEAVES.items():
        q = theirs[0]["q"][name][START].reshape(state["rounds"][name]["q"].shape)
        state["rounds"][name]["q"] = jax.numpy.asarray(q)
        state["worker"][name] = jax.numpy.asarray(owed(name, START))
        assert state["worker"][name].shape == (REPLICAS, *leaf.shape)
    is_spec = lambda x: isinstance(x, P)
    put = lambda spec: NamedSharding(exchange.mesh, spec)
    state = jax.device_put(state, jax.tree.map(put, exchange.state_specs, is_leaf=is_spec))

    mean_of = jax.jit(exchange.mean)
    worst = {"mean": 0.0, "owed": 0.0}
    for step in range(START + 1, STEPS):
        given = place(exchange, {name: x[step] for name, x in gradients.items()})
        ours, state = mean_of(given, state, np.int32(step))
        for name in LEAVES:
            for replica in theirs:
                worst["mean"] = max(worst["mean"], largest_difference(ours[name], replica["mean"][name][step]))
            worst["owed"] = max(worst["owed"], largest_difference(state["worker"][name], owed(name, step)))
            assert max(worst.values()) <= 1e-5, (name, step, worst)
    print(f"rank {rank}: largest differences {worst}")


# ── matrices of low rank ─────────────────────────────────────────────────────────────────────────────────────────


def outer_products(count: int, replicas: int) -> dict[str, np.ndarray]:
    """Sums of so many outer products: the same columns and rows on every replica, each with weights of its own, so that
    their mean has this rank too."""
    rng = np.random.default_rng(count)

    def draw(leaf: Leaf) -> np.ndarray:
        L, m, n = leaf.matrix
        u, v = rng.standard_normal((L, m, count)), rng.standard_normal((L, n, count))
        weights = rng.uniform(0.5, 1.5, (replicas, L, 1, count))
        return ((u * weights) @ v.mT).astype(np.float32).reshape(replicas, *leaf.shape)

    return {name: draw(leaf) for name, leaf in LEAVES.items()}


def errors(count: int, rank: int, feedback: Feedback | None, steps: int = 4, replicas: int = 4) -> list[float]:
    """The largest difference from the exact mean, step by step, of the same matrices again and again."""
    exchange, given = make(rank, feedback, replicas), outer_products(count, replicas)
    state, mean_of, found = residuals.init(exchange), jax.jit(exchange.mean), []
    for step in range(steps):
        mean, state = mean_of(place(exchange, given), state, np.int32(step))
        exact = {name: x.astype(np.float64).mean(axis=0) for name, x in given.items()}
        found.append(max(largest_difference(mean[name], exact[name]) for name in LEAVES))
    return found


@pytest.mark.parametrize("feedback", [None, Feedback()], ids=["plain", "feedback"])
@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow), 4])
def test_a_mean_of_no_higher_rank_is_sent_without_a_loss(count, feedback):
    """With fewer outer products than the rank too, where QR is given columns that depend on each other."""
    assert max(errors(count, 4, feedback)) <= 1e-5


def test_a_mean_of_higher_rank_is_not():
    assert min(errors(6, 4, None)) > 0.01

"""PyTorch's own PowerSGD on given gradients, by two gloo processes: what tests/test_powersgd.py compares ours to.

    python tests/powersgd_torch.py GRADIENTS.npz DIRECTORY RANK

Needs only PyTorch and NumPy. GRADIENTS.npz: {name: [steps, replicas, out, in]}, every replica's own gradient of each
weight. Each process writes DIRECTORY/replica{r}.npz: {"mean name", "q name", "owed name": [steps, …]}, which are what
DDP left in the weight's .grad, and the hook's memory after each step: Q [in, rank], and this replica's residual. Both
are NaN until the hook compresses, from step START on.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

START = 2  # the hook's least: DDP rebuilds its buckets after the first step
COMPRESSION = 2  # compresses what becomes less than half as large: our rule too


class Weights(torch.nn.Module):
    """Linear layers without biases, and the loss Σ weight · given: its gradient is what was given."""

    def __init__(self, shapes: dict[str, tuple[int, int]]):
        super().__init__()
        linear = lambda out, into: torch.nn.Linear(into, out, bias=False)
        self.layers = torch.nn.ModuleDict({name: linear(*shape) for name, shape in shapes.items()})

    def forward(self, given: dict[str, torch.Tensor]) -> torch.Tensor:
        return sum((self.layers[name].weight * g).sum() for name, g in given.items())


def memory(state: PowerSGDState, shapes: dict[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    """The hook's flat Q and residual, by weight. shapes: in the bucket's order, as the residual is; Q is further
    grouped by shape."""
    grouped: dict[tuple[int, int], list[str]] = {}
    for name, shape in shapes.items():
        grouped.setdefault(shape, []).append(name)
    pieces = {f"owed {name}": shape for name, shape in shapes.items()}
    found = split(state.error_dict[0], pieces)
    rank = state.matrix_approximation_rank
    pieces = {f"q {name}": (shape[1], rank) for shape, names in grouped.items() for name in names}
    return found | split(state.q_memory_dict[0], pieces)


def split(flat: torch.Tensor, pieces: dict[str, tuple[int, int]]) -> dict[str, np.ndarray]:
    parts = flat.split([rows * columns for rows, columns in pieces.values()])  # raises if they do not add up
    return {
        name: part.reshape(shape).numpy().copy()
        for (name, shape), part in zip(pieces.items(), parts, strict=True)
    }  # fmt: skip


def replica(r: int, gradients: Path, directory: Path, rank: int) -> None:
    torch.set_num_threads(1)
    given = dict(np.load(gradients))
    steps, replicas = next(iter(given.values())).shape[:2]
    dist.init_process_group("gloo", init_method=f"file://{directory / 'meeting'}", rank=r, world_size=replicas)
    shapes = {name: g.shape[2:] for name, g in given.items()}
    weights = Weights(shapes)
    parameters = {name: layer.weight for name, layer in weights.layers.items()}
    model = DistributedDataParallel(weights, bucket_cap_mb=1000)
    state = PowerSGDState(
        None, matrix_approximation_rank=rank, start_powerSGD_iter=START, min_compression_rate=COMPRESSION,
        use_error_feedback=True, warm_start=True,
    )  # fmt: skip
    names = {p.data_ptr(): name for name, p in parameters.items()}
    order: list[str] = []

    def hook(state, bucket):
        order[:] = [names[p.data_ptr()] for p in bucket.parameters()]
        assert len(order) == len(names), "more than one bucket"
        return powerSGD_hook(state, bucket)

    model.register_comm_hook(state, hook)
    found: list[dict[str, np.ndarray]] = []
    for step in range(steps):
        model.zero_grad()
        model({name: torch.from_numpy(g[step, r]) for name, g in given.items()}).backward()
        found.append({f"mean {name}": p.grad.numpy().copy() for name, p in parameters.items()})
        if step >= START:
            found[-1] |= memory(state, {name: shapes[name] for name in order})
    assert state.compression_stats()[1:] == expected_stats(shapes, rank, steps - START), (
        "not every weight is compressed"
    )
    for key in found[-1]:
        nothing = np.full_like(found[-1][key], np.nan)
        given[key] = np.stack([row.get(key, nothing) for row in found])
    np.savez(directory / f"replica{r}.npz", **{key: given[key] for key in found[-1]})
    dist.barrier()  # nobody leaves while another still receives


def expected_stats(shapes: dict[str, tuple[int, int]], rank: int, steps: int) -> tuple[int, int]:
    """Numbers before and after compression, if every weight is compressed in every one of so many steps."""
    before, after = (sum(f(*shape) for shape in shapes.values()) for f in (lambda m, n: m * n, lambda m, n: m + n))
    return steps * before, steps * rank * after


if __name__ == "__main__":
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    gradients, directory, rank = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    # By fork: PyTorch is imported once, and children end without taking the interpreter down beside gloo's threads: a
    # spawned one was seen to abort once ("terminate called without an active exception"), most likely there.
    torch.multiprocessing.start_processes(replica, (gradients, directory, rank), nprocs=2, start_method="fork")

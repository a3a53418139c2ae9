"""The mesh, the processes, the micro-steps and the replicas change nothing: the same losses, the same gradients."""

import subprocess
import sys
from functools import cache

import helpers
import numpy as np
import pytest

from parallel.layout import mesh as meshes

STEPS = 20
SLOW = pytest.mark.slow
BOTH = pytest.mark.parametrize("uneven", [True, pytest.param(False, marks=SLOW)], ids=["uneven", "full"])


@cache
def one_device(uneven: bool, masked: bool, experts: int, layers: int):
    """Losses and first gradients on one device: what everything else is compared with."""
    config = helpers.tiny(data__document_mask=masked, model__num_layers=layers, **helpers.dropless(experts))
    parts = helpers.build(config, (1, 1, 1))
    return helpers.losses(config, parts, STEPS, uneven), helpers.first_gradients(config, parts, uneven)


def check(mesh, uneven: bool, **overrides):
    config = helpers.tiny(**overrides)
    parts = helpers.build(config, mesh)
    found = helpers.losses(config, parts, STEPS, uneven), helpers.first_gradients(config, parts, uneven)
    compare(*found, uneven, config.data.document_mask, config.model.experts, config.model.num_layers)


def compare(losses, gradients, uneven: bool, masked: bool = False, experts: int = 0, layers: int = 2):
    """With one device's. masked: documents."""
    wanted, wanted_gradients = one_device(uneven, masked, experts, layers)
    assert wanted[-1] < 0.9 * wanted[0], "the loss must fall, else equal losses show nothing"
    assert helpers.relative(losses, wanted) <= 5e-6
    total = np.sqrt(sum(np.sum(g**2) for g in wanted_gradients.values()))
    assert set(gradients) == set(wanted_gradients)
    for name, wanted in wanted_gradients.items():
        bound = 1e-5 * max(np.linalg.norm(wanted), 1e-3 * total)
        assert np.linalg.norm(gradients[name].reshape(wanted.shape) - wanted) <= bound, name


QUICK = [(2, 2, 2)]


@BOTH
@pytest.mark.parametrize(
    "mesh",
    [pytest.param(mesh, marks=[] if mesh in QUICK else [SLOW]) for mesh in meshes.factorings(8)],
    ids=helpers.name,
)
def test_every_mesh_of_eight_devices_trains_like_one_device(mesh, uneven):
    check(mesh, uneven)


@SLOW
@pytest.mark.parametrize(("processes", "mesh"), [(2, (2, 1, 2)), (2, (1, 2, 1)), (4, (2, 2, 1))])
def test_several_processes_train_like_one_device(processes, mesh, tmp_path):
    script = [f"{helpers.ROOT}/tests/one_of_several.py", f"{tmp_path}/out.npz", ",".join(map(str, mesh))]
    launch = [sys.executable, "-m", "runtime.launch", f"--processes={processes}", "--", *script]
    done = subprocess.run(launch, cwd=helpers.ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    found = dict(np.load(tmp_path / "out.npz"))
    compare(found.pop("losses"), found, uneven=True)


@SLOW  # in the default run: a loss of a caller's, test_task.py
@BOTH
@pytest.mark.parametrize(
    ("accumulate", "mesh"),
    [(4, (2, 2, 2)), (2, (1, 1, 1)), (4, (1, 1, 1)), (2, (2, 2, 2))],
)
def test_micro_steps_add_up_to_the_same_update(mesh, accumulate, uneven):
    check(mesh, uneven, optimizer__accumulate=accumulate)


@SLOW  # in the default run: exchanges of several replicas on a device, test_exchange.py
@BOTH
@pytest.mark.parametrize(
    ("replicas", "mesh"),
    [
        (8, (2, 2, 2)),
        (4, (1, 1, 1)),
        (4, (2, 2, 1)),
        (8, (1, 1, 1)),
        (8, (4, 1, 1)),
    ],
)
def test_several_replicas_on_one_device_train_like_one_device(replicas, mesh, uneven):
    check(mesh, uneven, sync__replicas=replicas)


@SLOW
@pytest.mark.parametrize("algorithm", ["psum", "gather", "two_stage"])
def test_every_algorithm_of_the_exchange_trains_like_one_device(algorithm):
    check((4, 2, 1), True, sync__algorithm=algorithm)


def test_a_mean_of_means_would_be_noticed():
    """The uneven masks do make replicas' mean losses differ from the mean over tokens."""
    config = helpers.tiny()
    parts = helpers.build(config, (4, 1, 1))
    mask = np.asarray(helpers.batch(config, parts, 0, uneven=True)["mask"])[0]
    tokens = mask.sum(axis=(1, 2))
    assert tokens.max() > 1.2 * tokens.min()


@pytest.mark.slow  # in the default run: test_model.py, where layers are unrolled and recomputed for one gradient
def test_unrolled_layers_and_remat_train_like_scanned_ones():
    check((2, 2, 2), False, compute__unroll=True, compute__remat="full")

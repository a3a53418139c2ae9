"""On every mesh of eight devices, whatever its axes, tiny trains like one device, and so it does with experts: with
another way to keep activations, to accumulate, to attend, to go through stages and to come to experts on each, and with
documents by turns."""

import os
import subprocess
import sys

import helpers
import numpy as np
import pytest
from test_parity import check

from parallel.layout import mesh as meshes

LAYERS, EXPERTS, SEED = 2, 8, 3
# replica × stage × fsdp × expert × context × tensor; the tiny model has no more layers to cut
ROUTED = [mesh for mesh in meshes.factorings(8, len(meshes.AXES)) if mesh[1] <= LAYERS]
DENSE = [mesh for mesh in ROUTED if mesh[3] == 1]
OPTIONS = {
    "compute__remat": ("none", "matmuls", "dots", "full"),
    "optimizer__accumulate": (1, 2, 4),
    "data__document_mask": (False, True),
    "attention__context": ("ring", "gather", "heads"),
    "pipeline__remat": ("layer", "stage"),
}
OF_DENSE = OPTIONS | {"pipeline__gather": ("tick", "step")}
OF_ROUTED = OPTIONS | {"moe__dispatch": ("grouped", "capacity")}
PROVE = [pytest.mark.slow, pytest.mark.prove]


def options(number: int, choices: dict, mesh: tuple[int, ...]) -> dict:
    """Of a mesh: drawn, so that any two options meet somewhere."""
    draw = np.random.default_rng([SEED, number])
    found = {key: values[draw.integers(len(values))] for key, values in choices.items()}
    nothing_to_gather = "pipeline__gather" in found and mesh[2] == 1
    return found | ({"pipeline__gather": "tick"} if nothing_to_gather else {})


@pytest.mark.parametrize(("meshes", "choices"), [(DENSE, OF_DENSE), (ROUTED, OF_ROUTED)], ids=["dense", "experts"])
def test_any_two_options_meet(meshes, choices):
    every = [options(i, choices, mesh) for i, mesh in enumerate(meshes)]
    keys = list(choices)
    for i, one in enumerate(keys):
        for other in keys[i + 1 :]:
            met = {(found[one], found[other]) for found in every}
            assert len(met) == len(choices[one]) * len(choices[other]), (one, other)


@pytest.mark.parametrize("number", [pytest.param(i, marks=PROVE, id=helpers.name(m)) for i, m in enumerate(DENSE)])
def test_every_factoring_of_eight_devices_trains_like_one_device(number):
    check(DENSE[number], True, **options(number, OF_DENSE, DENSE[number]))


@pytest.mark.parametrize("number", [pytest.param(i, marks=PROVE, id=helpers.name(m)) for i, m in enumerate(ROUTED)])
def test_with_experts_too(number):
    check(ROUTED[number], True, **helpers.dropless(EXPERTS), **options(number, OF_ROUTED, ROUTED[number]))


@pytest.mark.parametrize("name", ["", *(pytest.param(name, marks=pytest.mark.slow) for name in helpers.EXCHANGES)])
def test_all_six_axes_at_once(name):
    """On 64 devices, for which a process of its own is needed."""
    command = [sys.executable, str(helpers.ROOT / "tests" / "six_axes.py"), name]
    environment = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "NPROC")}
    done = subprocess.run(command, cwd=helpers.ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr

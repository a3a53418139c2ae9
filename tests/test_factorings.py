"""On every mesh of eight devices, whatever its axes, tiny trains like one device: with another way to keep activations,
to accumulate, to attend and to go through stages on each, and with documents by turns."""

import helpers
import numpy as np
import pytest
from test_parity import check

from parallel.layout import mesh as meshes

LAYERS, SEED = 2, 3
# replica × stage × fsdp × context × tensor; the tiny model has no more layers to cut
MESHES = [mesh for mesh in meshes.factorings(8, len(meshes.USED)) if mesh[1] <= LAYERS]
OPTIONS = {
    "compute__remat": ("none", "matmuls", "dots", "full"),
    "optimizer__accumulate": (1, 2, 4),
    "data__document_mask": (False, True),
    "attention__context": ("ring", "gather", "heads"),
    "pipeline__remat": ("layer", "stage"),
    "pipeline__gather": ("tick", "step"),
}


def options(number: int) -> dict:
    """Of a mesh: drawn, so that any two options meet somewhere."""
    draw = np.random.default_rng([SEED, number])
    return {key: values[draw.integers(len(values))] for key, values in OPTIONS.items()}


def test_any_two_options_meet():
    every = [options(i) for i in range(len(MESHES))]
    keys = list(OPTIONS)
    for i, one in enumerate(keys):
        for other in keys[i + 1 :]:
            met = {(found[one], found[other]) for found in every}
            assert len(met) == len(OPTIONS[one]) * len(OPTIONS[other]), (one, other)


@pytest.mark.slow
@pytest.mark.prove
@pytest.mark.parametrize("number", range(len(MESHES)), ids=lambda i: helpers.name(MESHES[i]))
def test_every_factoring_of_eight_devices_trains_like_one_device(number):
    check(MESHES[number], True, **options(number))

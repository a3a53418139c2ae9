"""Checkpoints of format 2, of meshes of three axes, are read with all that owners of chunks owe."""

import pytest
from test_format1 import gone_on

from runtime import format2

LAST_RELEASE = "778b886"  # that wrote format 2


def test_what_lies_by_device_gets_a_dimension_for_each_axis():
    shapes = {
        "params/embed": [256, 64],
        "codec/worker/embed": [2, 256, 64],
        "codec/server/embed": [2, 4, 8, 3, 16],
        "codec/rest/server/embed": [2, 4, 8, 3, 16],
        "codec/fragments/server/small fsdp": [5, 2, 4, 1, 1, 16],
        "codec/rounds/embed/q": [4, 8, 64, 2],
    }
    record = {"format": 2, "step": 8, "arrays": {name: {"shape": shape, "kind": "x"} for name, shape in shapes.items()}}
    found = format2.translate(record)
    assert found["format"] == 3 and found["step"] == 8
    assert {name: x["shape"] for name, x in found["arrays"].items()} == shapes | {
        "codec/server/embed": [2, 1, 4, 1, 1, 8, 3, 16],
        "codec/rest/server/embed": [2, 1, 4, 1, 1, 8, 3, 16],
        "codec/fragments/server/small fsdp": [5, 2, 1, 4, 1, 1, 1, 1, 16],
        "codec/rounds/embed/q": [1, 4, 1, 1, 8, 64, 2],
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        "codec=int4 algorithm=two_stage",
        "codec=powersgd",
        "codec=int4 algorithm=two_stage strategy=streaming interval=4 fragments=2 overlap=1",
    ],
)
def test_runs_of_the_release_before_go_on_with_all_that_they_owed(tmp_path, options):
    said = gone_on(LAST_RELEASE, tmp_path, options)
    assert "begun anew" not in said and "folded" not in said

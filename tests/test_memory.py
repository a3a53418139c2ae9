"""What an exchange needs of memory besides arguments and results, by the compiler's own figure: two arrays at most,
however many there are, and what is in flight. Two of 64 MiB, so that constants do not count. And what the programs
beside the step need."""

import helpers
import jax
import pytest
from ml_collections import ConfigDict

from bench.codecs import temporaries
from parallel.exchange.codecs import CODECS
from parallel.exchange.codecs.base import is_round
from recipes import programs

FORMS = [
    pytest.param(
        name, form, marks=[] if (name, form) in {("int8", "two_stage"), ("topk", "gather")} else pytest.mark.slow
    )
    for name, kind in CODECS.items()
    for form in (("gather",) if not is_round(kind) and kind.sparse else ("gather", "two_stage"))
]


@pytest.mark.parametrize("arrays", [1, 4])
@pytest.mark.parametrize(("codec", "form"), FORMS)
def test_an_exchange_needs_two_arrays_of_memory_and_what_is_in_flight(codec, form, arrays):
    used, in_flight = temporaries(jax.devices(), codec, form, arrays)
    assert used <= 2 + in_flight


# The others with scales are coded like int8 and int4, and compile as long: bench/codecs.py --tpu has them all.
@pytest.mark.prove
@pytest.mark.parametrize("codec", ["none", "int8", "int4", "topk", "randk", "powersgd", "demo"])
def test_on_a_tpu_too(codec):
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install -r requirements-prove.txt")
    from jax.experimental import topologies

    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
    used, in_flight = temporaries(chips, codec, "auto", 4)
    assert used <= 2 + in_flight


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 4, 2), (2, 4, 1)], ids=helpers.name)
def test_evaluation_and_the_sample_need_no_more_than_the_step(mesh):
    """With micro-steps, and sequences and a vocabulary that make activations and logits larger than the weights."""
    sizes = {"data__batch_size": 128, "optimizer__accumulate": 16, "data__seq_len": 128, "data__vocab_size": 2048}
    parts = helpers.build(helpers.tiny(**sizes), mesh)
    need = lambda program: program.memory_analysis().temp_size_in_bytes
    step = need(helpers.compile_quickly(parts))
    others = programs.compile_beside(parts, ConfigDict({"tokens": 8, "temperature": 0.8}), options=helpers.QUICKLY)
    assert need(others["evaluation"]) <= step and need(others["sample"]) <= step

"""What an exchange needs of memory besides arguments and results, by the compiler's own figure: two arrays at most,
however many there are, and what is in flight. Two of 64 MiB, so that constants do not count."""

import jax
import pytest

from bench.codecs import temporaries
from parallel.codecs import CODECS
from parallel.exchange import is_round

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
@pytest.mark.slow
@pytest.mark.parametrize("codec", ["none", "int8", "int4", "topk", "randk", "powersgd", "demo"])
def test_on_a_tpu_too(codec):
    pytest.importorskip("libtpu", reason="libtpu is not installed: pip install -r requirements-dev.txt")
    from jax.experimental import topologies

    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1").devices
    used, in_flight = temporaries(chips, codec, "auto", 4)
    assert used <= 2 + in_flight

"""Bytes of large models' programs, as the compiler for H100s makes them: the counter and another, written apart from
it (tests/byte_oracle.py), agree to the byte on every axis."""

from typing import Any

import byte_oracle
import pytest

from bench import aot
from parallel.cost import compilers, hardware, targets, wire
from recipes import aot as compiling
from recipes import methods, programs
from recipes import target as recipe

ROWS = [
    aot.Row("h100:8x8", aot.B8, aot.F64),
    aot.Row("h100:8x8", aot.B8, aot.T4),
]


def test_the_other_counter_reads_what_it_is_made_for():
    """By hand: 5 turns of a gather of 4 times 32 bytes to three others, and one sum of 16 bytes, twice 3/4 of it."""
    text = """HloModule m

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %g = f32[32]{0} all-gather(%x), channel_id=1, replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %a = f32[4]{0} parameter(0)
  %w = (s32[], f32[8]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %r = f32[4]{0} all-reduce(%a), channel_id=1, replica_groups=mesh['a'=4,'b'=2] {'b'}, to_apply=%add
}
"""
    assert byte_oracle.count(text, {"fsdp": 4, "tensor": 2}) == {"fsdp": 5 * 3 * 32.0, "tensor": 2 * 0.5 * 16}


@pytest.mark.slow
@pytest.mark.prove
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_two_counters_agree_to_the_byte(row):
    target = targets.parse(row.target, hardware.by_name(hardware.CHIPS))
    try:
        compilers.check_compiler(target.chip)
    except ImportError as error:
        pytest.skip(str(error))
    compilers.prepare(target.chip)
    flags = [f"--config.{key}={value}" for key, value in row.changes.items()]
    config, _ = methods.parse(["train.py", f"--config=configs/{row.config}.py", *flags], "")
    recipe.fitted(config, target, list(row.changes))
    parts = recipe.make(config, target)
    text = compiling.compiled(programs.steps(parts)["step"], parts).as_text()
    found: dict[str, float] = {}
    for c in wire.collectives(text, parts.mesh):
        found[c.axis] = found.get(c.axis, 0.0) + c.sent
    ours: dict[str, Any] = {axis: size for axis, size in found.items() if size}
    assert ours == byte_oracle.count(text, dict(parts.mesh.shape))

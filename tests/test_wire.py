"""Bytes counted in HLO text: every syntax that compilers write, loops, async pairs, branches."""

from types import SimpleNamespace

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from parallel.cost import wire
from parallel.layout import mesh as meshes
from parallel.layout.axes import AXES


@pytest.fixture(scope="module")
def mesh():
    return meshes.build({"replica": 2, "fsdp": 4, "tensor": 1}, jax.devices())


def program(*lines: str, others: str = "") -> str:
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule m\n\n{others}\nENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n"


@pytest.mark.parametrize(
    ("groups", "axis", "n"),
    [
        ("{{0,4},{1,5},{2,6},{3,7}}", "replica", 2),
        ("{{0,1,2,3},{4,5,6,7}}", "fsdp", 4),
        ("[4,2]<=[2,4]T(1,0)", "replica", 2),
        ("[2,4]<=[8]", "fsdp", 4),
        ("{}", "replica", 8),
        ("{{0,1,2,3,4,5,6,7}}", "replica", 8),
        ("mesh['replica'=2,'fsdp'=4,'tensor'=1] {'replica'}", "replica", 2),
        ("mesh['replica'=2,'fsdp'=4,'tensor'=1] {'replica','fsdp'}", "replica", 8),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", "replica", 2),
        ("mesh['a'=8] {'a':(1)2}", "replica", 2),
        ("mesh['a'=8] {'a':(2)4}", "fsdp", 4),
    ],
)
def test_groups_of_every_syntax_are_laid_to_the_right_axis(mesh, groups, axis, n):
    hlo = program(f"%a = f32[100]{{0}} all-reduce(%p), replica_groups={groups}, to_apply=%add")
    assert wire.count(hlo, mesh) == {axis: {"f32": 2 * (n - 1) / n * 400}}


@pytest.mark.parametrize(
    ("instruction", "sent"),
    [
        ("%a = f32[100]{0} all-reduce(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add", 600),
        ("%a = u16[100]{0} all-gather(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}", 150),
        ("%a = f32[25]{0} reduce-scatter(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add", 300),
        ("%a = (u8[25]{0}, u8[25]{0}, u8[25]{0}, u8[25]{0}) all-to-all(%a, %b, %c, %d), "
         "replica_groups={{0,1,2,3},{4,5,6,7}}", 75),
        ("%a = s8[4,25]{1,0} all-to-all(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}", 75),
        ("%a = bf16[100]{0} collective-permute(%p), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}", 200),
        ("%a = bf16[100]{0} collective-permute(%p), source_target_pairs={{0,0},{1,1}}", 0),
        ("%a = (f32[25]{0}, f32[100]{0}) all-gather-start(%p), replica_groups={{0,1,2,3},{4,5,6,7}}", 300),
        ("%a = (f32[9]{0}, f32[9]{0}, u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1}}", 36),
        ("%a = (f32[100]{0}, bf16[100]{0}) all-reduce-start(%p, %q), replica_groups={{0,1,2,3},{4,5,6,7}}", 900),
        ("%a = ((f32[100]{0}, bf16[100]{0}), (f32[100]{0}, bf16[100]{0})) all-reduce-start(%p, %q), "
         "replica_groups={{0,1,2,3},{4,5,6,7}}", 900),
        ("%a = f32[100]{0} all-gather-done(%s)", 0),
        ("%a = s4[100]{0} all-gather(%p), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}", 37.5),
        ("%a = f32[100]{0} all-reduce(%p), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add", 0),
    ],
)  # fmt: skip
def test_bytes_that_one_device_sends(mesh, instruction, sent):
    assert sum(sum(d.values()) for d in wire.count(program(instruction), mesh).values()) == sent


def test_loops_multiply_branches_take_the_dearest_and_calls_are_followed(mesh):
    gather = "%g = f32[100]{0} all-gather(%x), replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}"
    others = "\n".join(
        f"%{name} (x: f32[100]) -> f32[100] {{\n  {body}\n}}\n"
        for name, body in {
            "inner": gather,
            "cond": "%c = pred[] constant(true)",
            "outer": '%w = f32[100] while(%x), condition=%cond, body=%inner, '
                     'backend_config={"known_trip_count":{"n":"3"}}',
            "cheap": "%n = f32[100] negate(%x)",
        }.items()
    )  # fmt: skip
    hlo = program(
        '%a = f32[100] while(%p), condition=%cond, body=%outer, backend_config={"known_trip_count":{"n":"5"}}',
        "%b = f32[100] conditional(%i, %p, %p), branch_computations={%cheap, %inner}",
        "%c = f32[100] call(%p), to_apply=%inner",
        "%d = (f32[50], f32[100]) async-start(%p), calls=%inner",
        others=others,
    )
    assert wire.count(hlo, mesh) == {"replica": {"f32": 200 * (15 + 1 + 1 + 1)}}


@pytest.mark.parametrize("instruction", [
    "%a = f32[100]{0} all-reduce(%p), replica_groups=@something_new, to_apply=%add",
    "%a = f32[100] while(%p), condition=%cond, body=%body",
])  # fmt: skip
def test_what_cannot_be_counted_is_an_error_not_zero(mesh, instruction):
    body = "%body (x: f32[9]) -> f32[9] {\n  %g = f32[9] all-reduce(%x), replica_groups={}, to_apply=%add\n}\n"
    with pytest.raises(ValueError, match="syntax|trip count"):
        wire.count(program(instruction, others=body), mesh)


def test_a_real_loop_of_collectives_is_counted_with_its_trips(mesh):
    def loop(x):
        return lax.scan(lambda x, _: (lax.psum(x, "replica") * 0.5, None), x, None, length=5)[0]

    f = jax.jit(jax.shard_map(loop, mesh=mesh, in_specs=P("replica"), out_specs=P(), check_vma=False))
    hlo = f.lower(jnp.zeros((2, 1000))).compile().as_text()
    assert wire.count(hlo, mesh) == {"replica": {"f32": 5 * 4000}}


def test_per_axis_names_every_axis(mesh):
    assert wire.per_axis(program("%a = f32[1] negate(%p)"), mesh) == dict.fromkeys(AXES, 0)


def test_fsdp_and_tensor_parallel_bytes_are_counted_too():
    parts = helpers.build(helpers.tiny(), (1, 4, 2))
    sizes = wire.per_axis(helpers.compile_quickly(parts).as_text(), parts.mesh)
    shards = sum(np.prod(x.shape) for x in jax.tree.leaves(parts.param_shapes)) * 4 / 2
    assert sizes["fsdp"] > 2 * 3 / 4 * shards, "weights are gathered for both passes, gradients scattered"
    assert sizes["tensor"] > 0 and sizes["replica"] == 0


def loop_of_a_tpu(start: str, step: str, bound: str) -> str:
    """A product in parts of the 8B model's, as XLA:TPU wrote it for a v5p of 64 chips, cut to what counts: there it
    begins at 0, goes by 2, and ends at 8."""
    counters = "(f32[100]{0:T(128)}, u32[]{:T(128)}, /*index=2*/u32[]{:T(128)})"
    others = f"""%body (wide.param.3: (f32[100], u32[], u32[])) -> (f32[100], u32[], /*index=2*/u32[]) {{
  %constant.415.clone.1..sunk2 = u32[]{{:T(128)}} constant({step})
  %wide.param.3 = {counters} parameter(0)
  %get-tuple-element.3427 = u32[]{{:T(128)}} get-tuple-element(%wide.param.3), index=1
  %get-tuple-element.3428 = u32[]{{:T(128)}} get-tuple-element(%wide.param.3), index=2
  %g = f32[100]{{0}} all-gather(%x), replica_groups={{{{0,4}},{{1,5}},{{2,6}},{{3,7}}}}, dimensions={{0}}
  %add.1441 = u32[]{{:T(128)}} add(%get-tuple-element.3427, %constant.415.clone.1..sunk2), metadata={{stack_frame_id=2}}
  ROOT %tuple.482 = {counters} tuple(%g, %add.1441, /*index=2*/%get-tuple-element.3428)
}}

%cond (wide.param.144: (f32[100], u32[], u32[])) -> pred[] {{
  %constant.1963 = u32[]{{:T(128)}} constant({bound})
  %wide.param.144 = {counters} parameter(0)
  %get-tuple-element.2752 = u32[]{{:T(128)}} get-tuple-element(%wide.param.144), index=1
  %get-tuple-element.2753 = u32[]{{:T(128)}} get-tuple-element(%wide.param.144), index=2
  ROOT %compare.38 = pred[]{{:T(512)}} compare(%get-tuple-element.2752, %constant.1963), direction=LT
}}
"""
    return program(
        f"%constant.2132..sunk = u32[]{{:T(128)}} constant({start})",
        f"%limit = u32[]{{:T(128)}} constant({bound})",
        "%copy.850 = u32[]{:T(128)} copy(%constant.2132..sunk)",
        f"%tuple.540 = {counters} tuple(%p, %copy.850, /*index=2*/%limit)",
        f"%while.119 = {counters} while(%tuple.540), condition=%cond, body=%body",
        others=others,
    )


@pytest.mark.parametrize(
    ("start", "step", "bound", "trips"),
    [("0", "2", "8", 4), ("0", "1", "7", 7), ("1", "2", "8", 4), ("2", "3", "8", 2)],
)
def test_a_loop_of_a_tpu_runs_from_its_counter_s_start_to_its_bound_by_its_step(mesh, start, step, bound, trips):
    hlo = loop_of_a_tpu(start, step, bound)
    assert wire.count(hlo, mesh) == {"replica": {"f32": trips * 200}}
    handed_on = hlo.replace("2752, %constant.1963", "2752, %get-tuple-element.2753")
    assert wire.count(handed_on, mesh) == {"replica": {"f32": trips * 200}}, "the bound may come with the counter"


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ("direction=LT", "direction=NE"),
        ("copy(%constant.2132..sunk)", "copy(%p)"),
        ("add(%get-tuple-element.3427, ", "add(%get-tuple-element.3428, "),
        ("add(%get-tuple-element.3427, ", "multiply(%get-tuple-element.3427, "),
    ],
)
def test_a_loop_whose_trips_cannot_be_read_is_an_error(mesh, was, now):
    hlo = loop_of_a_tpu("0", "2", "8")
    assert was in hlo
    with pytest.raises(ValueError, match="no known trip count"):
        wire.count(hlo.replace(was, now), mesh)


def test_a_bound_that_the_loop_changes_is_an_error(mesh):
    hlo = loop_of_a_tpu("0", "2", "8").replace("2752, %constant.1963", "2752, %get-tuple-element.2753")
    with pytest.raises(ValueError, match="no known trip count"):
        wire.count(hlo.replace("/*index=2*/%get-tuple-element.3428)", "/*index=2*/%add.1441)"), mesh)


def test_bytes_of_gpu_hosts_are_laid_to_the_right_axis():
    """A GPU's slice_index is its host; its program is one over all hosts. A TPU's is one over its slice."""
    device = lambda i: SimpleNamespace(id=i, slice_index=i // 4, platform="gpu")
    mesh = SimpleNamespace(devices=np.array([device(i) for i in range(8)]).reshape(2, 4, 1), axis_names=meshes.COMMON)
    line = "%a = f32[100]{0} all-reduce(%p), replica_groups=GROUPS, use_global_device_ids=true, to_apply=%add"
    for groups, axis, sent in (
        ("{{0,4},{1,5},{2,6},{3,7}}", "replica", 400), ("[4,2]<=[2,4]T(1,0)", "replica", 400),
        ("[2,4]<=[8]", "fsdp", 600),
    ):  # fmt: skip
        assert wire.count(program(line.replace("GROUPS", groups)), mesh) == {axis: {"f32": sent}}


def test_a_kernel_whose_attributes_span_lines_hides_nothing_behind_it(mesh):
    kernel = '%k = f32[100]{0} custom-call(%p), backend_config={"body": {\n}}, metadata={op_name="kernel"}'
    gather = "%g = f32[100]{0} all-gather(%k), replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}"
    assert wire.count(program(kernel, gather), mesh) == {"replica": {"f32": 200}}

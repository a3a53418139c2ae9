"""What is read in a compiled program: loops, products, what overlaps, and the lines that arrays come from. The texts
are those of XLA's compilers for TPUs and GPUs, cut to a few instructions."""

import pytest

from parallel.cost import hlo, loops, schedule

HEAD = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8,16]{1,0})->f32[8,16]{1,0}}

FileNames
1 "ROOT/train.py"
2 "ROOT/model/layers.py"
3 "ROOT/parallel/layout/rules.py"
4 "/usr/lib/jax/pallas/kernel.py"

FunctionNames
1 "main"
2 "MLP.__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=44 end_line=44 column=1 end_column=2}
2 {file_name_id=2 function_name_id=2 line=86 end_line=86 column=1 end_column=2}
3 {file_name_id=3 function_name_id=2 line=99 end_line=99 column=1 end_column=2}
4 {file_name_id=4 function_name_id=2 line=7 end_line=7 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}
4 {file_location_id=4 parent_frame_id=4}

""".replace("ROOT/", hlo.ROOT)

# A loop of 5 turns by 2 from 4 (a TPU's, of XLA's own making), a gather around its product, one that nothing covers.
LOOP = """%condition.1 (carry.1: (u32[], f32[8,16])) -> pred[] {
  %carry.1 = (u32[], f32[8,16]{1,0}) parameter(0)
  %counter.1 = u32[]{:T(128)} get-tuple-element(%carry.1), index=0
  %bound.1 = u32[]{:T(128)} constant(14)
  ROOT %less.1 = pred[]{:T(512)} compare(%counter.1, %bound.1), direction=LT
}

%product.1 (a: f32[8,16], b: f32[16,16]) -> f32[8,16] {
  %a = f32[8,16]{1,0} parameter(0)
  %b = f32[16,16]{1,0} parameter(1)
  ROOT %dot.1 = f32[8,16]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body.1 (carry.2: (u32[], f32[8,16])) -> (u32[], f32[8,16]) {
  %carry.2 = (u32[], f32[8,16]{1,0}) parameter(0)
  %counter.2 = u32[]{:T(128)} get-tuple-element(%carry.2), index=0
  %x.2 = f32[8,16]{1,0} get-tuple-element(%carry.2), index=1
  %weights.2 = f32[16,16]{1,0} broadcast(%x.2), dimensions={}
  %all-gather-start.1 = (f32[4,16]{1,0}, f32[8,16]{1,0}) all-gather-start(%x.2), channel_id=1, replica_groups={{0,1}}, dimensions={0}
  %fusion.1 = f32[8,16]{1,0} fusion(%x.2, %weights.2), kind=kOutput, calls=%product.1, metadata={op_name="jit(step)/dot_general" stack_frame_id=3}
  %all-gather-done.1 = f32[8,16]{1,0} all-gather-done(%all-gather-start.1)
  %all-gather-start.2 = (f32[4,16]{1,0}, f32[8,16]{1,0}) all-gather-start(%fusion.1), channel_id=2, replica_groups={{0,1}}, dimensions={0}
  %all-gather-done.2 = f32[8,16]{1,0} all-gather-done(%all-gather-start.2)
  %two.2 = u32[]{:T(128)} constant(2)
  %next.2 = u32[]{:T(128)} add(%counter.2, %two.2)
  ROOT %out.2 = (u32[], f32[8,16]{1,0}) tuple(%next.2, %all-gather-done.2)
}

"""  # noqa: E501

ENTRY = """ENTRY %main.1 (p.1: f32[8,16]) -> f32[8,16] {
  %p.1 = f32[8,16]{1,0} parameter(0)
  %four = u32[]{:T(128)} constant(4)
  %all-to-all-start.1 = (f32[8,16]{1,0}, f32[8,16]{1,0}) all-to-all-start(%p.1), channel_id=9, replica_groups={{0,1}}
  %carry.3 = (u32[], f32[8,16]{1,0}) tuple(%four, %p.1)
  %while.1 = (u32[], f32[8,16]{1,0}) while(%carry.3), condition=%condition.1, body=%body.1, metadata={op_name="jit(step)/while" stack_frame_id=1}
  %all-to-all-done.1 = f32[8,16]{1,0} all-to-all-done(%all-to-all-start.1)
  %stack.1 = f32[5,8,16]{2,1,0} broadcast(%p.1), dimensions={}, metadata={op_name="broadcast.7"}
  %filled.1 = f32[5,8,16]{2,1,0} fusion(%stack.1), kind=kLoop, calls=%product.1, metadata={op_name="jit(step)/dynamic_update_slice" stack_frame_id=2}
  %kernel.1 = f32[16,16]{1,0} custom-call(%p.1), custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
}}, metadata={op_name="jit(step)/pallas_call" stack_frame_id=4}
  ROOT %out.1 = f32[8,16]{1,0} get-tuple-element(%while.1), index=1
}
"""  # noqa: E501
TEXT = HEAD + LOOP + ENTRY


@pytest.fixture(scope="module")
def program():
    return hlo.Program.read(TEXT)


def turns(text: str) -> int:
    program = hlo.Program.read(text)
    (loop,) = [x for x in program.computations[program.entry] if x.op == "while"]
    return loops.Loops(program).trips(program.entry, loop)


def test_a_loop_runs_from_its_counters_start_by_its_step_to_its_bound():
    assert turns(TEXT) == 5 and turns(TEXT.replace("constant(2)", "constant(1)")) == 10
    written = ', backend_config={"known_trip_count":{"n":"3"}}'
    assert turns(TEXT.replace("body=%body.1", f"body=%body.1{written}")) == 3


def test_what_runs_nobody_knows_how_often_is_not_counted_as_once():
    unknown = TEXT.replace("direction=LT", "direction=NE")
    for count in (schedule.flops, schedule.bytes_moved):
        with pytest.raises(ValueError, match="no known trip count"):
            count(hlo.Program.read(unknown))
    without = hlo.Program.read(unknown.replace(" dot(%a, %b)", " add(%a, %a)"))
    assert schedule.flops(without) == 0, "nor need it be known where nothing is multiplied"


def test_what_has_a_result_in_memory_is_inside_of_loops_and_not_of_fusions(program):
    found = {x.name for _, x in schedule.executed(program)}
    assert {"fusion.1", "while.1", "kernel.1"} <= found and "dot.1" not in found


def test_products_count_as_often_as_their_loop_runs(program):
    product = 2 * 8 * 16 * 16
    assert schedule.flops(program) == 5 * product + product  # and the one that fills the stack


def test_what_is_under_way_while_matrices_are_multiplied_is_hidden_and_nothing_else(program):
    """In the loop's body one of two gathers, and what the whole loop lies in."""
    assert schedule.hidden(program) == {"all-gather-start.1", "all-to-all-start.1"}
    without = hlo.Program.read(TEXT.replace(" dot(%a, %b)", " add(%a, %a)"))
    assert schedule.hidden(without) == set()


def test_arrays_come_from_lines_of_ours(program):
    """Of helpers the line that calls them, of a kernel the line below JAX's own, of a stack the line that fills it."""
    found = {buffer.shape: (buffer.where, buffer.bytes) for buffer in schedule.largest(program, 9)}
    assert found[5, 8, 16] == ("model/layers.py:86", 4 * 5 * 8 * 16)
    assert found[8, 16][0] == "model/layers.py:86"
    kernel = next(x for _, x in schedule.executed(program) if x.name == "kernel.1")
    assert program.where("main.1", kernel) == "model/layers.py:86"
    assert [b.bytes for b in schedule.largest(program)] == sorted(b.bytes for b in schedule.largest(program))[::-1]


STACKS = """HloModule x

%one_layer (stack: f32[5,8,16], weights: f32[5,16], turn: s32[], x: f32[8,16]) -> (f32[8,16], f32[5,16]) {
  %stack = f32[5,8,16]{2,1,0} parameter(0)
  %weights = f32[5,16]{1,0} parameter(1)
  %turn = s32[] parameter(2)
  %x = f32[8,16]{1,0} parameter(3)
  %zero = s32[] constant(0)
  %slice = f32[1,8,16]{2,1,0} dynamic-slice(%stack, %turn, %zero, %zero), dynamic_slice_sizes={1,8,16}
  %layer = f32[8,16]{1,0} bitcast(%slice)
  %sum = f32[8,16]{1,0} add(%layer, %x)
  %row = f32[1,16]{1,0} slice(%x), slice={[0:1], [0:16]}
  %filled = f32[5,16]{1,0} dynamic-update-slice(%weights, %row, %turn, %zero)
  ROOT %both = (f32[8,16]{1,0}, f32[5,16]{1,0}) tuple(%sum, %filled)
}

ENTRY %main (stack: f32[5,8,16], weights: f32[5,16], turn: s32[], x: f32[8,16]) -> (f32[8,16], f32[5,16]) {
  %p.0 = f32[5,8,16]{2,1,0} parameter(0)
  %p.1 = f32[5,16]{1,0} parameter(1)
  %p.2 = s32[] parameter(2)
  %p.3 = f32[8,16]{1,0} parameter(3)
  ROOT %fusion = (f32[8,16]{1,0}, f32[5,16]{1,0}) fusion(%p.0, %p.1, %p.2, %p.3), kind=kLoop, calls=%one_layer
}
"""


def test_of_a_stack_of_layers_one_is_read_and_one_written():
    layer, row, turn = 4 * 8 * 16, 4 * 16, 4
    read, written = layer + turn + layer, layer + row
    assert schedule.bytes_moved(hlo.Program.read(STACKS)) == read + written


def test_a_fusion_inside_of_a_fusion_reads_and_writes_what_it_needs():
    """As TPUs have them: the same, one computation deeper."""
    call = "fusion(%p.0, %p.1, %p.2, %p.3), kind=kLoop, calls="
    stacks = "(stack: f32[5,8,16], weights: f32[5,16], turn: s32[], x: f32[8,16])"
    given = "".join(
        f"  %p.{n} = {kind} parameter({n})\n"
        for n, kind in enumerate(["f32[5,8,16]", "f32[5,16]", "s32[]", "f32[8,16]"])
    )
    one = STACKS.replace(
        "ROOT %both = (f32[8,16]{1,0}, f32[5,16]{1,0}) tuple(%sum, %filled)",
        "ROOT %out = f32[5,16]{1,0} bitcast(%filled)",
    )
    one = one.replace("-> (f32[8,16], f32[5,16])", "-> f32[5,16]").replace(
        "(f32[8,16]{1,0}, f32[5,16]{1,0}) fusion", "f32[5,16]{1,0} fusion"
    )
    outer = f"%outer {stacks} -> f32[5,16] {{\n{given}  ROOT %f = f32[5,16]{{1,0}} {call}%one_layer\n}}\n\nENTRY"
    two = one.replace("calls=%one_layer", "calls=%outer").replace("ENTRY", outer)
    moved = [schedule.bytes_moved(hlo.Program.read(text)) for text in (one, two)]
    assert moved == [4 * 8 * 16 + 4 + 4 * 8 * 16 + 4 * 16] * 2


def test_what_lies_in_a_tpus_fast_memory_is_not_read_from_its_large_one():
    fast = STACKS.replace("%p.3 = f32[8,16]{1,0} ", "%p.3 = f32[8,16]{1,0:T(8,128)S(1)} ")
    less = schedule.bytes_moved(hlo.Program.read(STACKS)) - schedule.bytes_moved(hlo.Program.read(fast))
    assert less == 4 * 8 * 16


def test_older_texts_have_the_line_beside_the_instruction():
    text = TEXT.replace("stack_frame_id=2", f'source_file="{hlo.ROOT}model/loss.py" source_line=63')
    found = {buffer.shape: buffer.where for buffer in schedule.largest(hlo.Program.read(text), 9)}
    assert found[5, 8, 16] == "model/loss.py:63"


def test_parents_of_frames_that_are_counted_right_are_read_too():
    text = TEXT
    for n in range(1, 5):
        text = text.replace(f"parent_frame_id={n}}}", f"parent_frame_id={n - 1}}}", 1)
    x = next(x for _, x in schedule.executed(hlo.Program.read(text)) if x.name == "kernel.1")
    frames = [frame.rpartition("/")[2] for frame in hlo.Program.read(text).frames(x)]
    assert frames == ["kernel.py:7", "rules.py:99", "layers.py:86", "train.py:44"]


def line(text: str) -> float:
    """FLOPs of a program of one instruction."""
    operands = "\n".join(
        f"  %{name} = {kind} parameter({n})"
        for n, (name, kind) in enumerate([("q", "bf16[8,512,256]{2,1,0}"), ("w", "bf16[256,64]{1,0}")])
    )
    body = f"ENTRY %main (q: bf16[8,512,256], w: bf16[256,64]) -> f32[] {{\n{operands}\n  ROOT {text}\n}}\n"
    return schedule.flops(hlo.Program.read(f"HloModule x\n\n{body}"))


@pytest.mark.parametrize(
    ("instruction", "flops"),
    [
        (
            "%c = f32[4096,64]{1,0} custom-call(%q, %w), custom_call_target=\"__cublas$lt$matmul\", "
            'backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"]}}}',
            2 * 4096 * 64 * 256,
        ),
        (
            "%c = (bf16[8,2,512,128]{3,1,2,0}, u8[0]{0}) custom-call(%q), custom_call_target=\"__cudnn$fmhaSoftmax\", "
            'backend_config={"x":{"intermediate_tensor_shape": {"element_type": "BF16", "dimensions": '
            '["8", "2", "512", "512"]}, "mask_type": "CAUSAL"}}',
            2 * (8 * 2 * 512 * 512) * 128 * 2 / 2,
        ),
        (
            "%splash_mha_dkv_no_residuals.1 = (bf16[8,2,512,128]{3,2,1,0}) custom-call(%q), "
            'custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,4,4]{2,1,0}, '
            "bf16[8,2,512,128]{3,2,1,0}, bf16[8,2,512,128]{3,2,1,0}, s32[512,128]{1,0}}, frontend_attributes={kernel={",
            2 * (8 * 2 * 512 * 128) * 512 * 4 / 2,
        ),
        (  # of keys that are all before the queries, as in a ring
            "%splash_mha_fwd_residuals.1 = (bf16[8,2,512,128]{3,2,1,0}) custom-call(%q), "
            'custom_call_target="tpu_custom_call", operand_layout_constraints={s8[1,4,4]{2,1,0}, '
            "bf16[8,2,512,128]{3,2,1,0}, bf16[8,2,256,128]{3,2,1,0}}, frontend_attributes={kernel_metadata={",
            2 * (8 * 2 * 512 * 128) * 256 * 2,
        ),
        (  # rows in groups, times their own weights
            "%mpmd_map.3 = bf16[1280,64]{1,0} custom-call(%q, %w), custom_call_target=\"mosaic_gpu_v2\", "
            "operand_layout_constraints={s32[2]{0}, bf16[1280,128]{1,0}, bf16[2,64,128]{2,1,0}}, "
            "api_version=API_VERSION_TYPED_FFI, backend_config={module = \"ML\\EFR f32[4]\"}",
            2 * 1280 * 128 * 64,
        ),
        (  # the gradient of weights
            "%mpmd_map.4 = bf16[2,128,64]{2,1,0} custom-call(%q, %w), custom_call_target=\"mosaic_gpu_v2\", "
            "operand_layout_constraints={s32[2]{0}, s32[2]{0}, bf16[1280,128]{1,0}, bf16[1280,64]{1,0}}, "
            "api_version=API_VERSION_TYPED_FFI",
            2 * 1280 * 128 * 64,
        ),
        ("%c = bf16[8,512,256]{2,1,0} add(%q, %q)", 0),
    ],
)  # fmt: skip
def test_kernels_say_what_they_multiply(instruction, flops):
    assert line(instruction) == flops


@pytest.mark.parametrize(
    ("left", "right", "result", "rest", "flops"),
    [
        ("8,512,256", "256,64,1", "8,512,64", "window={size=1}, dim_labels=0bf_io0->0bf", 2 * 8 * 512 * 256 * 64),
        # Two heads, made of a window of 2 that is padded by one on each side: half of its places hold nothing.
        (
            "8,512,256,1", "256,2,128,1", "8,512,2,128",
            "window={size=1x2 pad=0_0x1_1 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f", 2 * 8 * 512 * 256 * 2 * 128,
        ),
        ("8,512,2,128", "2,128,256,1", "8,512,256,1", "window={size=1x2}, dim_labels=0b1f_1io0->0bf1",
         2 * 8 * 512 * 2 * 128 * 256),
    ],
)  # fmt: skip
def test_products_as_tpus_write_them_count_what_they_multiply(left, right, result, rest, flops):
    text = (
        f"ENTRY %main (q: bf16[{left}], w: bf16[{right}]) -> bf16[{result}] {{\n"
        f"  %q = bf16[{left}]{{2,1,0}} parameter(0)\n  %w = bf16[{right}]{{2,1,0}} parameter(1)\n"
        f"  ROOT %c = bf16[{result}]{{2,1,0}} convolution(%q, %w), {rest}\n}}\n"
    )
    assert schedule.flops(hlo.Program.read(f"HloModule x\n\n{text}")) == flops


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        hlo.Program.read("HloModule x\n")

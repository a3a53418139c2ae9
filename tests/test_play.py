"""A program's schedule, played: texts made by hand, on a machine where a product takes 1 s, a pass over an array 1/6 s,
and a gather over an axis 2 s."""

import dataclasses

import jax
import pytest

from parallel.cost import hardware, play, targets
from parallel.cost.hlo import Program
from parallel.cost.link import Link
from parallel.cost.rates import DEFAULT as SHARE
from parallel.layout import mesh as meshes

N = 64
ARRAY = 2 * N * N  # bytes of bf16
T = f"bf16[{N},{N}]{{1,0}}"
OVER = {  # devices; of a gather over two, a half is sent
    "tensor": "{{0,1},{2,3},{4,5},{6,7}}",
    "fsdp": "{{0,2},{1,3},{4,6},{5,7}}",
    "replica": "{{0,4},{1,5},{2,6},{3,7}}",
    "fsdp and tensor": "{{0,1,2,3},{4,5,6,7}}",
}
MESH = {"replica": 2, "fsdp": 2, "tensor": 2}


def machine(text: str = "h100:2x4", **rates: float) -> targets.Target:
    found, part = targets.parse(text, hardware.catalogue()), SHARE
    sent = ARRAY / 2 / 2 / part.links  # bytes a second, nominal
    own = {"bf16": 2 * N**3 / part.products, "bandwidth": 6 * ARRAY / part.memory, "outside": sent}
    own["link" if found.chip.is_tpu else "inside"] = sent
    own["host"] = 2 * sent  # an array in 2 s
    chip = dataclasses.replace(found.chip, **(own | {"name": "mine"} | rates))
    return dataclasses.replace(found, chip=chip)


def played(lines: str, more: str = "", on: targets.Target | None = None, link: Link | None = None) -> play.Played:
    """lines: of the entry; its parameters are a and b."""
    text = (
        f"HloModule x\n\n{more}\nENTRY %main (a: {T}, b: {T}) -> {T} {{\n  %a = {T} parameter(0)\n"
        f"  %b = {T} parameter(1)\n{lines}\n  ROOT %out = {T} bitcast(%a)\n}}\n"
    )
    mesh = meshes.build(MESH, jax.devices())
    return play.play(Program.read(text), mesh, on or machine(), link)


def product(name: str, of: str = "%a, %b") -> str:
    return f"  %{name} = {T} dot({of}), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}\n"


def start(name: str, axis: str) -> str:
    half = T.replace(f"[{N},", f"[{N // 2},")
    kind = f"({half}, {T}) all-gather-start(%a), channel_id=1, replica_groups={OVER[axis]}, dimensions={{0}}"
    return f"  %{name} = {kind}\n"


def done(name: str, of: str) -> str:
    return f"  %{name} = {T} all-gather-done(%{of})\n"


def close(found: play.Played, compute: float, **exposed: float) -> None:
    assert found.compute == pytest.approx(compute, abs=1e-4)
    for axis, seconds in ({"replica": 0.0, "fsdp": 0.0, "tensor": 0.0} | exposed).items():
        assert found.exposed[axis] == pytest.approx(seconds, abs=1e-4), axis
    assert found.seconds == pytest.approx(compute + sum(exposed.values()), abs=1e-4)


def test_products_take_what_they_multiply_and_all_else_what_it_reads_and_writes():
    close(played(product("c")), 1.0)
    close(played(product("c"), on=machine(bf16=1e30)), 3 / 6)  # or what they read and write, if that is longer
    close(played(f"  %c = {T} add(%a, %b)\n  %d = {T} bitcast(%c)\n"), 3 / 6)


def test_what_stands_between_a_start_and_its_done_hides_it():
    close(played(start("s", "tensor") + product("c") + done("d", "s")), 1.0, tensor=1.0)
    three = "".join(map(product, ("c", "d", "e")))
    close(played(start("s", "tensor") + three + done("f", "s")), 3.0)
    close(played(start("s", "tensor") + done("f", "s") + product("c")), 1.0, tensor=2.0)


def test_a_collective_without_a_start_is_waited_for():
    gather = f"  %g = {T} all-gather(%a), channel_id=1, replica_groups={OVER['fsdp']}, dimensions={{0}}\n"
    close(played(gather + product("c")), 1.0, fsdp=2.0)


def test_an_axis_carries_one_message_after_another_and_two_axes_two_at_a_time():
    """Of GPUs, fsdp and tensor have the same links inside a host; of TPUs each its own."""
    same = start("s", "fsdp") + start("t", "fsdp") + done("d", "s") + done("e", "t")
    close(played(same), 0.0, fsdp=4.0)
    both = start("s", "fsdp") + start("t", "tensor") + done("d", "s") + done("e", "t")
    close(played(both), 0.0, fsdp=2.0, tensor=2.0)
    close(played(both, on=machine("2xv5p-8")), 0.0, fsdp=2.0)
    slow = start("s", "replica") + start("t", "tensor") + done("d", "s") + done("e", "t")
    close(played(slow), 0.0, replica=2.0)


def test_a_group_over_several_axes_leaves_a_host_over_all_its_members_adapters_there():
    """Hosts of two, each with an adapter of half the speed: together as fast as the links inside."""
    hosts = machine("h100:4x2", outside=ARRAY / 2 / 4 / SHARE.links)
    gather = start("s", "fsdp and tensor") + done("d", "s")
    close(played(gather, on=hosts), 0.0, fsdp=3.0)
    close(played(start("s", "fsdp") + done("d", "s"), on=hosts), 0.0, fsdp=4.0)


def test_a_link_that_is_given_is_that_of_replica():
    """Four chips of a host share it."""
    link = Link("x", 8 * ARRAY / 2 * 4 * 1514 / 1448 / 3, latency=0.5)
    close(played(start("s", "replica") + done("d", "s"), link=link), 0.0, replica=3.5)


def loop(body: str, turns: int) -> tuple[str, str]:
    """(its line, its computations): a product and what is given, so many times."""
    carry = f"({T}, {T})"
    inside = (
        f"%body (p: {carry}) -> {carry} {{\n  %p = {carry} parameter(0)\n  %a = {T} get-tuple-element(%p), index=0\n"
        f"  %b = {T} get-tuple-element(%p), index=1\n{body}  ROOT %o = {carry} tuple(%a, %b)\n}}\n"
    )
    line = (
        f"  %carry = {carry} tuple(%a, %b)\n  %w = {carry} while(%carry), condition=%body, body=%body, "
        f'backend_config={{"known_trip_count":{{"n":"{turns}"}}}}\n'
    )
    return line, inside


def test_a_loop_takes_as_long_as_its_turns():
    line, inside = loop(start("s", "tensor") + product("c") + done("d", "s"), 5)
    close(played(line, inside), 5.0, tensor=5.0)


def test_what_travels_around_a_loop_hides_behind_it_and_keeps_its_axis_busy():
    """The first turn's message waits for the one around the loop: 2 s more, of which its product hides none."""
    line, inside = loop(start("s", "tensor") + product("c") + done("d", "s"), 5)
    close(played(start("r", "replica") + line + done("q", "r"), inside), 5.0, tensor=5.0)
    close(played(start("r", "tensor") + line + done("q", "r"), inside), 5.0, tensor=7.0)


def test_a_loop_played_in_part_is_the_loop_played_out(monkeypatch):
    line, inside = loop(start("s", "tensor") + product("c") + done("d", "s") + start("t", "fsdp") + done("u", "t"), 50)
    outside = start("r", "replica") + line + done("q", "r")
    short = played(outside, inside)
    monkeypatch.setattr(play, "_alike", lambda a, b: False)
    whole = played(outside, inside)
    assert short.seconds == pytest.approx(whole.seconds) and short.exposed == pytest.approx(whole.exposed)


def test_of_a_conditional_the_longest_branch_is_played():
    given = f"  %a = {T} parameter(0)\n  %b = {T} bitcast(%a)\n"
    short, long = (f"%{n} (a: {T}) -> {T} {{\n{given}{product('c') * k}}}\n" for n, k in (("short", 1), ("long", 2)))
    line = f"  %k = {T} conditional(%p, %a, %a), true_computation=%short, false_computation=%long\n"
    close(played(line, short + "\n" + long), 2.0)


# ── TPUs ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def fused(name: str, body: str) -> str:
    return f"%{name} (a: {T}, b: {T}) -> {T} {{\n  %a = {T} parameter(0)\n  %b = {T} parameter(1)\n{body}}}\n\n"


def test_an_asynchronous_collective_in_several_fusions_travels_from_the_first_to_the_last():
    gather = f"  %g = {T} all-gather(%a), channel_id=7, replica_groups={OVER['tensor']}, dimensions={{0}}\n"
    parts = "".join(fused(f"async_collective_fusion.{n}", gather + product("c")) for n in range(2))
    call = lambda n: f"  %f.{n} = {T} fusion(%a, %b), kind=kOutput, calls=%async_collective_fusion.{n}\n"
    close(played(call(0) + call(1), parts), 2.0)
    slower = machine("2xv5p-8", link=ARRAY / 2 / 5 / SHARE.links)
    close(played(call(0) + product("d") + call(1), parts, on=slower), 3.0, tensor=2.0)


def test_a_collective_inside_of_a_fusion_is_waited_for():
    body = f"  %g = {T} all-reduce(%a), channel_id=7, replica_groups={OVER['tensor']}, to_apply=%add\n"
    line = f"  %f = {T} fusion(%a, %b), kind=kCustom, calls=%all-reduce-scatter.1\n"
    close(played(line, fused("all-reduce-scatter.1", body)), 0.0, tensor=4.0 / 2)


def test_copies_into_fast_memory_travel_and_what_lies_there_is_not_read_from_memory():
    fast = T.replace("1,0}", "1,0:T(8,128)S(1)}")
    copy = f"  %s = ({fast}, {T}, u32[]) copy-start(%a)\n"
    end = f"  %f = {fast} copy-done(%s)\n"
    close(played(copy + product("c") + end + f"  %d = {T} add(%f, %b)\n"), 1.0 + 2 / 6)
    close(played(copy + end), 1 / 6)


@pytest.mark.parametrize(("put", "get"), [("fusion", "fusion"), ("dynamic-update-slice", "dynamic-slice")])
def test_what_goes_to_the_host_and_what_comes_from_it_travel_beside_each_other(put, get):
    """A part of what lies there, as a GPU's programs write and read it, and a TPU's."""
    stack, part = f"bf16[4,{N},{N}]{{2,1,0:S(5)}}", f"bf16[1,{N},{N}]{{2,1,0}}"
    here = f"  %h = {stack} bitcast(%a)\n  %i = s32[] constant(0)\n"
    there = f"  %s = (({stack}, {part}, s32[]), {stack}, u32[]) {put}-start(%h, %a, %i)\n"
    back = f"  %t = (({stack}, s32[]), {part}, u32[]) {get}-start(%h, %i)\n"
    ends = [f"  %d = {stack} {put}-done(%s)\n", f"  %e = {part} {get}-done(%t)\n"]
    close(played(here + there + product("c") + ends[0]), 1.0, host=1.0)
    close(played(here + back + product("c") + ends[1]), 1.0, host=1.0)
    close(played(here + there + there.replace("%s", "%r") + "".join(ends[:1])), 0.0, host=2.0)
    close(played(here + there + back + "".join(ends)), 0.0, host=2.0)

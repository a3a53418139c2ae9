"""plan.py: what is counted without compiling, beside what compilers made of it; the order of candidates; its words."""

import contextlib
import dataclasses
import itertools
import json
import math
import re
from types import SimpleNamespace
from typing import Any

import helpers
import numpy as np
import pytest

import plan as command
from configs import llama3_8b, llama3_70b, mixtral_8x7b, qwen3_30b_a3b, tiny, tiny_moe
from parallel.cost import flops, hardware, network, pace, rates, sent, targets, work
from parallel.cost.bytes import exchange_bytes
from parallel.cost.hardware import GiB
from parallel.cost.link import Link
from parallel.layout.axes import AXES, COMMON
from recipes import build, candidate, describe, gaps, memory, methods, plan, planned, predicted, sharding, sites, tried
from recipes.case import Case
from runtime.config import UsageError, changed, flatten

CHIPS = hardware.catalogue()
CONFIGS = {"8b": llama3_8b, "70b": llama3_70b, "tiny": tiny, "tiny_moe": tiny_moe}
CONFIGS |= {"mixtral": mixtral_8x7b, "qwen3": qwen3_30b_a3b}
WHOLE = dict.fromkeys((f"mesh__{axis}" for axis in AXES if axis not in COMMON), 1)  # sequences and layers
ALONE = WHOLE | {"mesh__replica": 1, "mesh__tensor": 1, "optimizer__accumulate": 1}
ALONE |= {"sync__strategy": "sync", "sync__codec": "none"}


def case(config: str, machine: str, link: str | None = None, **typed) -> Case:
    """typed: keys with __ for dots."""
    found = CONFIGS[config].get_config()
    keys = {key.replace("__", "."): value for key, value in typed.items()}
    found.update_from_flattened_dict(keys)
    return Case(found, targets.parse(machine, CHIPS), Link.parse(link) if link else None, tuple(keys))


def only(config: str, machine: str, remat: str, **typed) -> candidate.Candidate:
    """The one candidate where everything is typed."""
    keys = ALONE | {"compute__remat": remat, "compute__loss_chunk_mib": 512}
    found = plan.search(case(config, machine, **(keys | typed)))
    assert len(found.fitting) == 1
    return found.fitting[0]


# ── beside compiled programs ──────────────────────────────────────────────────────────────────────────────────────────

INT4 = {"sync__codec": "int4"}
# Of `train.py --target=… --dry_run`, JAX 0.12.0.1, cuDNN's attention, compute.loss_chunk_mib=512: temporaries in GiB,
# TFLOP, GiB sent by axis.
H100 = {
    "8b fsdp 64": (("8b", "h100:8x8", "full", {}), 6.08, 531.6, {"fsdp": 40.44}),
    "8b fsdp 64, two rows": (("8b", "h100:8x8", "full", {"data__batch_size": 128}), 8.46, 1063.2, {"fsdp": 40.57}),
    "8b fsdp 64, matmuls": (("8b", "h100:8x8", "matmuls", {}), 25.07, 456.8, {"fsdp": 40.44}),
    "8b 16 × 4": (("8b", "h100:8x8", "full", {"mesh__tensor": 4}), 5.50, 531.6, {"fsdp": 9.72, "tensor": 66.75}),
    "8b fsdp 8, two micro-steps": (
        ("8b", "h100:8", "full", {"optimizer__accumulate": 2, "data__batch_size": 16}), 12.75, 1063.2, {"fsdp": 71.90},
    ),
    "70b 8 × 8": (
        ("70b", "h100:8x8", "full", {"mesh__tensor": 8, "data__batch_size": 16}),
        8.94, 1156.4, {"fsdp": 42.33, "tensor": 193.38},
    ),
    "8b 4 × 8, int4": (
        ("8b", "h100:4x8", "full", INT4 | {"mesh__replica": 4, "data__batch_size": 32}),
        8.87, 531.6, {"fsdp": 35.95, "replica": 0.7232},
    ),
    "70b 16 × 8 × 8, int4": (
        ("70b", "h100:128x8", "full", INT4 | {"mesh__replica": 16, "mesh__tensor": 8}),
        8.96, 1156.4, {"fsdp": 42.33, "tensor": 193.38, "replica": 0.9938},
    ),
    "8b 2 × 8 × 4, diloco int4": (
        ("8b", "h100:8x8", "full", INT4 | {"mesh__replica": 2, "mesh__tensor": 4, "sync__strategy": "diloco"}),
        5.88, 531.6, {"fsdp": 9.07, "tensor": 66.75},
    ),
}  # fmt: skip


@pytest.mark.parametrize("row", H100)
def test_what_is_counted_is_what_was_compiled_for_h100(row):
    """Bytes of every axis to the rounding of the figures, products to theirs, temporaries within 10 %."""
    (config, machine, remat, typed), temporary, products, wire = H100[row]
    found = only(config, machine, remat, **typed)
    assert found.temporary_bytes / GiB == pytest.approx(temporary, rel=0.10)
    assert found.step.flops / 1e12 == pytest.approx(products, rel=0.001)
    for axis, size in wire.items():
        assert found.sent[axis] / GiB == pytest.approx(size, rel=0.001), axis


# Of other axes: what was compiled for (config, machine, keys); temporaries, TFLOP, GiB by axis, head and embeddings on
# the slowest of theirs. 8B of 64 windows, Mixtral and Qwen3 of 128 (of 4,096 tokens).
IN_TICKS = {"mesh__stage": 4, "mesh__fsdp": 16, "optimizer__accumulate": 4}
BY_STAGE, ONCE = {"pipeline__remat": "stage"}, {"pipeline__gather": "step"}
TWICE = {"pipeline__interleave": 2}
OTHERS = {
    "4 stages": (("8b", "h100:8x8", IN_TICKS), 9.48, 910.9, {"stage": 3.80, "fsdp": 45.71}),
    "4 stages, repeated": (("8b", "h100:8x8", IN_TICKS | BY_STAGE), 5.75, 1141.8, {"stage": 3.80, "fsdp": 85.32}),
    "4 stages, gathered once": (("8b", "h100:8x8", IN_TICKS | ONCE), 19.91, 910.9, {"stage": 3.80, "fsdp": 6.09}),
    "4 stages, both": (("8b", "h100:8x8", IN_TICKS | BY_STAGE | ONCE), 16.82, 1141.8, {"stage": 3.80, "fsdp": 6.09}),
    "4 stages × tensor 4": (
        ("8b", "h100:8x8", {"mesh__stage": 4, "mesh__fsdp": 4, "mesh__tensor": 4, "optimizer__accumulate": 8}),
        5.94, 721.3, {"stage": 1.95, "fsdp": 14.02, "tensor": 91.50},
    ),
    "context 4 by heads": (("8b", "h100:8x8", {"mesh__context": 4}), 6.09, 531.6, {"context": 11.34, "fsdp": 40.44}),
    "context 4 as a ring": (
        ("8b", "h100:8x8", {"mesh__context": 4, "attention__context": "ring"}), 6.27, 531.6, {"context": 15.09},
    ),
    "Mixtral, expert 8": (("mixtral", "h100:8x8", {"mesh__expert": 8}), 9.59, 980.7, {"expert": 21.88, "fsdp": 35.56}),
    "Qwen3, expert 8": (("qwen3", "h100:8x8", {"mesh__expert": 8}), 5.84, 271.0, {"expert": 65.64, "fsdp": 24.05}),
    "Qwen3, expert 8, every row": (
        ("qwen3", "h100:2x8", {"mesh__expert": 8, "mesh__fsdp": 2, "data__batch_size": 32, "model__num_layers": 2,
                               "moe__rows": "worst"}), 26.64, 92.87, {},
    ),
    "v5p, 4 stages": (("8b", "v5p-128", IN_TICKS), 9.63, 941.7, {"stage": 4.76, "fsdp": 48.55}),
    "v5p, 4 stages × 2 runs": (("8b", "v5p-128", IN_TICKS | TWICE), 8.58, 745.4, {"stage": 5.76, "fsdp": 52.51}),
    "v5p, context 2": (("8b", "v5p-128", {"mesh__context": 2}), 6.34, 549.2, {"context": 7.56, "fsdp": 80.76}),
    "v5p-256, context 4": (
        ("8b", "v5p-256", {"mesh__context": 4, "data__batch_size": 128}), 6.07, 549.2, {"fsdp": 54.63},
    ),
    "v5p, context 4 as a ring": (
        ("8b", "v5p-128", {"mesh__context": 4, "attention__context": "ring"}),
        6.23, 549.2, {"context": 15.09, "fsdp": 54.20},
    ),
    "v5p, Qwen3, expert 8": (("qwen3", "v5p-128", {"mesh__expert": 8}), 7.55, 284.2, {"expert": 52.99, "fsdp": 30.31}),
}  # fmt: skip


@pytest.mark.parametrize("row", OTHERS)
def test_stages_sequences_and_experts_are_counted_as_they_were_compiled(row):
    """Bytes of every axis within 1 %, products 0.1 %, temporaries within 10 %."""
    (config, machine, keys), temporary, products, wire = OTHERS[row]
    batch = {"data__batch_size": 64 if config == "8b" else 128}
    more = {"data__seq_len": 4096} if config == "qwen3" else {}
    pipelines = {"pipeline__remat": "layer", "pipeline__gather": "tick", "pipeline__interleave": 1}
    found = only(config, machine, "full", **(pipelines | batch | more | keys))
    assert found.temporary_bytes / GiB == pytest.approx(temporary, rel=0.10)
    assert found.step.flops / 1e12 == pytest.approx(products, rel=0.001)
    for axis, size in wire.items():
        assert found.sent[axis] / GiB == pytest.approx(size, rel=0.01), axis


def test_experts_gradients_are_added_up_whole_over_many_chips():
    """As compiled: four times what gathering them once sends, where 32 chips would scatter them."""
    assert only("mixtral", "v5p-128", "full", data__batch_size=512).sent["fsdp"] / GiB == pytest.approx(
        341.83, rel=0.001
    )


@pytest.mark.parametrize("config", ["tiny", "tiny_moe"])
def test_every_mesh_that_can_be_built_is_tried_and_no_other(config):
    """Sequences are cut where that is asked for: a tiny model's are too short to be worth it."""
    of = case(config, "h100:1x4", mesh__context=-1, data__batch_size=8)
    built = set()
    for sizes in itertools.product((1, 2, 4), repeat=len(AXES)):
        keys = {f"mesh.{axis}": size for axis, size in zip(AXES, sizes, strict=True)}
        if math.prod(sizes) == 4 and sizes[0] == 1:
            with contextlib.suppress(UsageError):
                build.build(changed(of.config, keys), of.mesh(dict(zip(AXES, sizes, strict=True))))
                built.add(sizes)
    assert {tuple(sizes[axis] for axis in AXES) for sizes in tried.legal(of)} == built
    assert {sizes[3] for sizes in built} == ({1, 2, 4} if config == "tiny_moe" else {1})
    assert all(c["context"] == 1 for c in tried.legal(case(config, "h100:1x4")))


# What libtpu made of the same programs sends. Over tensor it makes some scatters in parts, which send more, and of them
# one of the 70B model's in fewer; over 64 chips of fsdp it scatters some of that model's gradients, and adds up others.
@pytest.mark.parametrize(
    ("typed", "gib", "off"),
    [
        (("8b", "v5p-128", {}), 54.2, 0.002),
        (("8b", "v5p-128", {"mesh__tensor": 4}), 80.9, 0.01),
        (("70b", "v5p-512", {"mesh__tensor": 4}), 487.6, 0.06),
    ],
)
def test_on_a_tpu_gradients_are_added_up_whole_over_more_than_32_chips(typed, gib, off):
    config, machine, keys = typed
    found = only(config, machine, "full", **keys)
    assert (found.sent["fsdp"] + found.sent["tensor"]) / GiB == pytest.approx(gib, rel=off)


# ── beside the programs of a run ──────────────────────────────────────────────────────────────────────────────────────


def test_a_start_tests_the_model_by_what_its_programs_send():
    """XLA's program for CPUs adds gradients up whole; its attention holds scores, so temporaries are not compared."""
    config = helpers.tiny(compute__remat="full")
    parts = helpers.build(config, (1, 8, 1))
    programs = {"step": helpers.compile_quickly(parts)}
    rows, _, per_step = describe.read(config, parts, programs, {}, {})
    (said,) = [value for name, value in rows if name == "planner, a step"]
    found = predicted.of(config, parts)
    assert found and list(found.wire) == ["fsdp"]
    assert found.wire["fsdp"] == pytest.approx(per_step["fsdp"], rel=0.05)
    off = round(100 * (found.wire["fsdp"] / per_step["fsdp"] - 1))
    assert re.fullmatch(r"fsdp [0-9.]+ .iB", said.removesuffix(f" ({off:+d}%)"))


def test_where_attention_is_fused_temporaries_and_products_are_compared_too():
    config = llama3_8b.get_config()
    config.update_from_flattened_dict({"compute.remat": "full", "compute.attention": "cudnn", "sync.codec": "int4"})
    config.update_from_flattened_dict({"mesh.replica": 4, "data.batch_size": 32, "compute.loss_chunk_mib": 512})
    same = only("8b", "h100:4x8", "full", **INT4, mesh__replica=4, data__batch_size=32)
    parts = build.build(config, case("8b", "h100:4x8").mesh(dict.fromkeys(AXES, 1) | {"replica": 4, "fsdp": 8}))
    found = predicted.of(config, parts)
    assert found == predicted.Predicted({"fsdp": same.sent["fsdp"]}, same.temporary_bytes, same.step.flops)
    compiled = {"fsdp": 0.5 * same.sent["fsdp"]}, same.temporary_bytes, same.step.flops / 1.1
    (row,) = predicted.rows(config, parts, *compiled)
    assert re.fullmatch(r"fsdp 35.95 GiB \(\+100%\), temporary .* GiB \(\+0%\), FLOPs 531.6 T \(\+10%\)", row[1])


@pytest.mark.parametrize(
    "changes",
    [{"compute.remat": "none"}, {"compute.unroll": True}, {"optimizer.name": "muon"}, {"sync.replicas": 2}],
)
def test_what_the_model_does_not_cover_is_not_compared(changes):
    config = helpers.tiny(**{key.replace(".", "__"): value for key, value in changes.items()})
    parts = helpers.build(config, (1, 8, 1))
    assert predicted.of(config, parts) is None
    assert not predicted.rows(config, parts, {"fsdp": 1e6}, 1e6)


# ── identities ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mesh", [(1, 8, 1), (1, 4, 2), (2, 2, 2), (4, 2, 1)])
@pytest.mark.parametrize("codec", ["none", "int4"])
def test_the_state_is_that_of_the_shardings_and_bytes_on_replica_are_the_closed_form(mesh, codec):
    """On places as on devices."""
    if mesh[0] == 1 and codec != "none":
        return
    sizes = dict(zip(("mesh__replica", "mesh__fsdp", "mesh__tensor"), mesh, strict=True))
    found = only("tiny", "h100:4x2", "full", **(sizes | {"sync__codec": codec}))
    parts = helpers.build(helpers.tiny(sync__codec=codec, **sizes), mesh)
    assert found.state_bytes == memory.state_bytes(parts, parts.mesh.shape)
    assert found.sent["replica"] == sum(exchange_bytes(parts.strategy.exchange).values())


def test_products_are_those_of_the_closed_form():
    """A third of training's is the forward pass; what is worked out again comes on top."""
    of = case("8b", "h100:8x8")
    task: Any = of.base.task
    layout = network.Layout({"replica": 1, "fsdp": 64, "tensor": 1}, 1, 1, "matmuls", 2**29)
    found = work.flops(of.network, layout)
    once = flops.per_token(of.base.param_shapes, task.axes, task.model.config, 8192, causal=True) / 3 * 8192
    assert found["forward"] + found["ends"] / 3 == pytest.approx(once)
    again = work.flops(of.network, dataclasses.replace(layout, remat="full"))
    assert again["forward"] == found["forward"] and again["backward"] > found["backward"] > 2 * found["forward"]


def test_micro_steps_send_weights_again_and_hold_less():
    one, two = (only("8b", "h100:8", "full", optimizer__accumulate=n, data__batch_size=16) for n in (1, 2))
    assert two.sent["fsdp"] == pytest.approx(2 * one.sent["fsdp"], rel=0.02)
    assert two.temporary_bytes < one.temporary_bytes and two.step.flops == one.step.flops


def test_a_network_with_a_tied_head_gathers_its_embedding():
    network = case("tiny", "h100:8").network
    assert network.head.name == "embed" and network.head.shape == (256, 64)
    assert case("8b", "h100:8").network.head.shape == (4096, 128256)


# ── a picture of it ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_picture_shows_what_the_first_device_has_of_each_array(tmp_path):
    """Each cut as the shardings of the run cut it, to the byte; what lies alike is drawn once."""
    of = case("tiny_moe", "h100:8x2")
    sizes = dict.fromkeys(AXES, 1) | {"stage": 2, "expert": 2, "context": 2, "tensor": 2}
    more = {f"mesh.{axis}": size for axis, size in sizes.items()} | {"optimizer.accumulate": 2}
    config = changed(of.config, more)
    parts = build.build(config, of.mesh(sizes))
    found = sharding.weights(parts, sizes)
    (down,) = [array for array in found if array.names[0].endswith("mlp/down")]
    assert down.dims == ("layers", "experts", "mlp", "embed") and down.cuts == (
        ("stage",),
        ("expert",),
        ("tensor",),
        ("context",),
    )
    for array in found:
        assert array.bytes * math.prod(sizes[a] for cut in array.cuts for a in cut) == 4 * math.prod(array.shape)
    assert [array.names[0].split("/")[-1] for array in found].count("scale") == 1
    inside = sharding.activations(config, sizes)[1]
    assert inside.cuts == (("expert",), ("context",), ("tensor",), ())
    sharding.draw(config, parts, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# ── links ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("machine", "sizes", "axis", "rate"),
    [
        ("h100:8x8", (1, 64, 1), "fsdp", 8 * 50e9),  # one ring, which leaves a host over 8 adapters
        ("h100:8x8", (1, 16, 4), "tensor", 450e9),
        ("h100:8x8", (1, 16, 4), "fsdp", 2 * 50e9),
        ("h100:8x8", (1, 8, 8), "fsdp", 50e9),
        ("h100:8x8", (8, 8, 1), "replica", 50e9),
        ("v5p-128", (1, 64, 1), "fsdp", 6 * 90e9),
        ("v5p-128", (1, 16, 4), "tensor", 2 * 90e9),
        ("v5p-128", (1, 16, 4), "fsdp", 4 * 90e9),
        ("v5p-128", (1, 32, 2), "tensor", 90e9),  # half a side: its ends are not joined
        ("2xv5p-64", (2, 32, 1), "fsdp", 3 * 90e9),  # no links around
    ],
)
def test_the_rate_of_an_axis_follows_from_where_its_chips_lie(machine, sizes, axis, rate):
    """By the mesh's sizes alone, and by where each device is: the planner's answer and a dry run's are one."""
    names = ("replica", "fsdp", "tensor")
    named: dict[str, int] = dict(zip(names, sizes, strict=True))
    target = targets.parse(machine, CHIPS)
    assert rates.rate(target, named, (axis,)) == rate
    each = math.prod(target.sides)
    coords = [tuple(int(n) for n in np.unravel_index(i % each, target.sides)) for i in range(target.chips)]
    placed = [SimpleNamespace(id=i, slice_index=i // each, coords=where) for i, where in enumerate(coords)]
    devices = np.moveaxis(np.array(placed).reshape(sizes), names.index(axis), -1)
    assert target.rate(devices.reshape(-1, devices.shape[-1])) == rate


def test_an_exchange_waits_unless_its_strategy_has_steps_to_hide_it_behind():
    """On a link on which it takes longer than nothing and less than a step."""
    target, sizes, link = (
        targets.parse("h100:8x8", CHIPS),
        {"replica": 2, "fsdp": 32, "tensor": 1},
        Link.parse("10gbit"),
    )
    of = case("8b", "h100:8x8")
    layout = network.Layout(sizes, 1, 1, "full", 2**29)
    rows = sent.sent(of.network, layout, sent.Habits())
    waits = lambda **how: pace.step(
        of.network, layout, target, rows, pace.Exchange(40e6, **how), link, 0.0
    ).exposed["replica"]  # fmt: skip
    wire = pace.exchange_seconds(pace.Exchange(40e6), target, sizes, link)
    assert wire == pytest.approx(8 * link.seconds(40e6))  # the GPUs of a host share its link
    assert waits() == pytest.approx(wire) and waits(hidden=1) == 0
    assert waits(interval=10) == pytest.approx(wire / 10)
    assert waits(interval=10, fragments=2, hidden=1) == 0


def stepped(config: str, machine: str, **typed) -> tuple[plan.Candidate, dict[str, float]]:
    """(the one candidate, seconds on the wire by what is sent)."""
    found = only(config, machine, "full", **typed)
    target, wire = targets.parse(machine, CHIPS), {}
    network = case(config, machine).network
    for row in sent.sent(network, found.layout, pace.habits(network, found.layout, target)):
        wire[row.what] = rates.seconds(target, found.layout.sizes, row.axes, row.bytes, row.hops)
    return found, wire


def test_on_gpus_gradients_are_waited_for_and_weights_but_for_a_layers_first():
    found, wire = stepped("8b", "h100:8x8")
    first = (4096 + 2 * 1024) * 4096 / ((4096 + 2 * 1024 + 4096 + 3 * 14336) * 4096)
    least = wire["gradients"] + first * (wire["weights"] + wire["weights again"])
    assert least < found.step.exposed["fsdp"] < 1.02 * least


def test_on_tpus_collectives_are_waited_for_but_gradients_in_parts():
    found, wire = stepped("8b", "v5p-64")
    assert found.step.exposed["fsdp"] == pytest.approx(found.step.wire["fsdp"] - wire[sent.BY_PARTS], rel=1e-6)
    whole = only("8b", "v5p-128", "full")
    assert whole.step.exposed["fsdp"] == whole.step.wire["fsdp"]
    alone = {"mesh__fsdp": 8, "pipeline__remat": "layer", "pipeline__interleave": 1}
    by_hand = only("8b", "v5p-64", "full", **IN_TICKS | alone | ONCE)
    assert by_hand.step.exposed["fsdp"] == by_hand.step.wire["fsdp"] > 0  # once, after all products
    scattered = only("70b", "v5p-512", "full", mesh__tensor=4)  # some of its gradients fill a TPU's lanes
    assert scattered.sent["fsdp"] / GiB == pytest.approx(116.14, rel=0.001)


def test_smaller_chunks_of_logits_read_and_write_the_heads_gradient_more_often():
    small, large = (
        only("8b", "h100:8x8", "full", compute__loss_chunk_mib=mib).step.compute for mib in (128, 512)
    )  # fmt: skip
    head = 4096 * 128256 * 4 * 2  # bytes: read and written
    often = (32 - 8) * head / (0.7 * 3.35232e12)
    assert 0.8 * often < small - large < 1.2 * often


# ── order ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


ONE_MESH = WHOLE | {"mesh__replica": 2, "mesh__tensor": 1}  # with every exchange


@pytest.mark.slow
def test_a_slower_link_never_makes_anything_faster():
    found = [plan.search(case("tiny", "h100:4x2", link, **ONE_MESH)) for link in ("100gbit", "1gbit", "100mbit")]
    times = [{c.flags: c.seconds for c in [*f.fitting, *f.others]} for f in found]
    for faster, slower in zip(times, times[1:], strict=False):
        assert all(faster[flags] <= slower[flags] for flags in faster.keys() & slower.keys())
    best = [f.pick.seconds for f in found]
    assert best == sorted(best)


def test_of_those_that_are_as_good_as_the_fastest_the_mildest_is_picked():
    found = plan.search(case("8b", "h100:8x8", "3200gbit", **ONE_MESH))
    assert [c.seconds for c in found.fitting] == sorted(c.seconds for c in found.fitting)
    shortest = found.fitting[0].seconds
    assert found.pick.seconds <= plan.CLOSE * shortest
    close = [c for c in found.fitting if c.seconds <= plan.CLOSE * shortest]
    assert found.pick.mildness == min(c.mildness for c in close)
    assert (found.pick.strategy, found.fitting[0].strategy) == ("sync", "stale")
    assert {c.strategy for c in found.fitting} == {"sync", "stale", "diloco", "streaming", "eager"}


def test_what_is_typed_is_not_chosen():
    found = plan.search(case("8b", "h100:8x8", mesh__tensor=2, compute__remat="full", **WHOLE))
    assert {(c.layout.sizes["tensor"], c.layout.remat) for c in [*found.fitting, *found.others]} == {(2, "full")}
    signs = plan.search(case("tiny", "2xh100:4", sync__strategy="sync", sync__codec="sign", **WHOLE))
    assert {(c.strategy, c.codec) for c in signs.fitting} == {("sync", "sign")}
    free = plan.search(case("8b", "h100:8x8", mesh__fsdp=-1, **WHOLE))
    assert len({c.layout.sizes["fsdp"] for c in free.fitting}) > 1


def test_what_fits_leaves_a_margin_and_one_slice_is_one_replica():
    found = plan.search(case("70b", "v6e-256", **WHOLE))
    assert found.others and {c.layout.sizes["replica"] for c in found.fitting} == {1}
    for c in found.fitting:
        assert c.state_bytes + candidate.MARGIN * c.temporary_bytes <= targets.parse("v6e-256", CHIPS).memory
    several = plan.search(case("tiny", "2xv5p-8", sync__codec="int4", **WHOLE)).fitting
    assert {c.layout.sizes["replica"] for c in several} == {2}


# ── time to a loss ────────────────────────────────────────────────────────────────────────────────────────────────────


def compared(folder, *rows):
    """table.json. rows: (name, strategy, codec, losses at steps 100 … 400 of two seeds' mean, further values)."""
    made = [
        {
            "name": name, "floor": False, "steps": [100, 200, 300, 400], "final_losses": [losses[-1]] * 2,
            "eval_losses": [[x - 0.1 for x in losses], [x + 0.1 for x in losses]],
            "config": {"sync.strategy": strategy, "sync.codec": codec, "sync.warm_steps": further.get("warm", 0)},
        }
        | further
        for name, strategy, codec, losses, further in rows
    ]  # fmt: skip
    (folder / "table.json").write_text(json.dumps({"about": {}, "rows": made}).replace("NaN", "null"))
    return folder


EXACT = ("sync none", "sync", "none", [5.0, 4.0, 3.0, 2.0], {})


def test_a_row_that_ends_worse_needs_so_many_times_the_steps(tmp_path):
    found = gaps.read(
        compared(
            tmp_path,
            EXACT,
            ("no worse", "sync", "int8", [5.0, 4.0, 3.0, 1.9], {}),
            ("late", "diloco", "int4", [6.0, 5.0, 4.0, 3.0], {}),
            ("later", "diloco", "int4", [6.0, 5.0, 4.5, 3.5], {}),
            ("warm", "diloco", "int4", [5.0, 4.0, 3.0, 2.1], {"warm": 200}),
            ("again", "diloco", "int4", [5.0, 4.0, 3.0, 2.2], {"floor": True}),
            ("never", "eager", "int4", [9.0, 8.0, 7.0, 6.0], {}),
            ("ended", "stale", "none", [5.0, 4.0, 3.0, math.nan], {}),
        )
    )
    assert found.of("sync", "none") == gaps.Delay(1.0, "sync none")
    assert found.of("sync", "int8") == gaps.Delay(1.0, "no worse")  # no claim that it would be faster
    assert found.of("diloco", "int4") == gaps.Delay(400 / 300, "late")
    for method, why in (("eager", "int4"), "no better than"), (("stale", "none"), "did not end"):
        assert not found.has(*method) and why in found.of(*method).row
    said = found.unknown([("sync", "int8"), ("sync", "int4"), ("stale", "int8"), ("eager", "int4")])
    assert said[0] == "left out, as no row of the comparison has it: sync int4, stale int8" and len(said) == 2


def test_plans_are_ranked_by_the_time_to_a_loss_where_a_comparison_is_given(tmp_path):
    """On a slow link rounds win by tokens, until they are said to need twice the steps that rare exchanges save."""
    rows = ("late", "diloco", "int4", [9.0, 8.0, 6.0, 4.9], {}), ("int4", "sync", "int4", [5.0, 4.0, 3.0, 2.0], {})
    of = case("8b", "2xh100:8", "100gbit", mesh__tensor=1, **WHOLE)
    free = plan.search(dataclasses.replace(of, gaps=None))
    assert {c.delay for c in free.fitting} == {1.0} and not free.by_loss
    found = plan.search(dataclasses.replace(of, gaps=gaps.read(compared(tmp_path, EXACT, *rows))))
    late = 400 / 110
    assert {(c.strategy, c.codec, round(c.delay, 6)) for c in found.fitting} == {
        ("sync", "none", 1.0), ("sync", "int4", 1.0), ("diloco", "int4", round(late, 6)),
    }  # fmt: skip
    assert [c.to_loss for c in found.fitting] == sorted(c.seconds * c.delay for c in found.fitting)
    fastest = min(found.fitting, key=lambda c: c.seconds)
    assert fastest.strategy == "diloco" and (found.pick.strategy, found.pick.codec) == ("sync", "int4")
    assert "× 3.64" in planned.table(found) or "× 1.00" in planned.table(found)
    assert planned.as_json(found, {})["candidates"][0]["steps_to_loss"] == 1.0
    assert any(note.startswith("left out, as no row of the comparison has it: ") for note in found.notes)
    with pytest.raises(UsageError, match=r"no exchange can be planned for: left out, as no row .*: sync sign"):
        typed = case("8b", "2xh100:8", mesh__tensor=1, sync__strategy="sync", sync__codec="sign", **WHOLE)
        plan.search(dataclasses.replace(typed, gaps=gaps.read(tmp_path)))


@pytest.mark.parametrize(
    ("kept", "said"),
    [(None, "FileNotFoundError"), ("{}", "KeyError: 'rows'"), ('{"rows": []}', "IndexError"), ("x", "JSONDecodeError")],
)
def test_what_is_no_comparison_is_refused(kept, said, tmp_path):
    if kept:
        (tmp_path / "table.json").write_text(kept)
    with pytest.raises(UsageError, match=r"--gaps=.*: expected the folder of a comparison, or its table.json") as error:
        gaps.read(tmp_path)
    assert said in str(error.value)
    with pytest.raises(UsageError, match="its first row is stale none, and delays are behind sync none"):
        gaps.read(compared(tmp_path, ("stale", "stale", "none", [5.0, 4.0, 3.0, 2.0], {})))


# ── unequal sites ─────────────────────────────────────────────────────────────────────────────────────────────────────


def joined(config: str, machine: str, link: str | None, **typed) -> sites.Found:
    named = [targets.parse(text, CHIPS) for text in machine.split("+")]
    return sites.search(sites.cases(case(config, named[0].text, link, **typed), named))


def test_rows_and_steps_are_shared_so_that_the_slowest_is_fastest():
    timed: Any = lambda each: {n: SimpleNamespace(bare_seconds=each * n) for n in range(4, 61, 4)}
    assert sites.by_rows([timed(1.0), timed(3.0)], 64) == [48, 16]
    assert sites.by_rows([timed(1.0), timed(1.0), timed(2.0)], 60) == [24, 24, 12]
    assert sites.by_rows([timed(1.0), timed(3.0)], 63) is None  # which is not cut into fours
    assert sites.by_steps([1.0, 3.0], 30, False) == [30, 10]
    assert sites.by_steps([0.6, 11.7], 30, False) == [39, 2] and sites.by_steps([0.6, 11.7], 30, True) == [30, 1]


@pytest.mark.slow
def test_unequal_sites_share_the_work_by_their_speed_and_each_by_its_memory():
    found = joined("8b", "h100:8+a100:8", "10gbit", mesh__tensor=1)
    assert {x.strategy for x in found.rounds} == {"sync", "stale", "diloco", "streaming", "eager"}
    for x in found.rounds:
        fast, slow = x.shares
        assert fast.steps * fast.rows > slow.steps * slow.rows
        if x.strategy in ("sync", "stale"):
            assert fast.rows + slow.rows == 64 and fast.steps == slow.steps == 1
        assert x.seconds == max(fast.busy, slow.busy) + x.waits
        assert all(0 <= x.idle(share) < 1 and share.candidate.fits for share in x.shares)
        assert fast.candidate.memory != slow.candidate.memory
    most = found.rounds[0].tokens_per_second
    assert found.pick.tokens_per_second * plan.CLOSE >= most
    assert found.pick.mildness == min(x.mildness for x in found.rounds if x.tokens_per_second * plan.CLOSE >= most)
    slower = joined("8b", "h100:8+a100:8", "1gbit", mesh__tensor=1)
    speeds = [{(x.strategy, x.codec): x.tokens_per_second for x in f.rounds} for f in (found, slower)]
    assert all(speeds[0][name] >= speeds[1][name] for name in speeds[1])


def test_equal_sites_are_planned_as_what_they_are():
    """By either way the same step of the same exchange."""
    typed = {"sync__strategy": "sync", "sync__codec": "int8"}
    (x,) = joined("tiny", "h100:4+h100:4", "10gbit", **typed).rounds
    assert [share.rows for share in x.shares] == [16, 16]
    same = plan.search(case("tiny", "2xh100:4", "10gbit", **typed))
    assert x.seconds == pytest.approx(same.fitting[0].seconds)


def test_a_plan_of_unequal_sites_says_who_is_idle_and_promises_no_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(helpers.ROOT)
    kept = tmp_path / "plan.json"
    given = ["--config=configs/tiny.py", "--hardware=h100:4+l4:4", "--link=1gbit", "--config.sync.strategy=diloco"]
    assert command.main([*given, f"--json={kept}"]) == 0
    said = capsys.readouterr().out
    for line in ("h100:4 = one host of 4", "l4:4 = one host of 4 L4", "2 replicas, one a site", "; idle: h100:4 "):
        assert line in said, line
    assert "no command trains unequal ones together yet" in said
    looks = [line for line in said.splitlines() if line.startswith("python train.py")]
    assert len(looks) == 1 and " --target=h100:4 --dry_run " in looks[0]  # an L4 is planned for, not compiled for
    own, _ = methods.parse(looks[0].split()[1:], "")
    methods.validate(own)
    found = json.loads(kept.read_text())
    assert found.keys() == {"candidates", "pick", "considered"}
    pick = next(c for c in found["candidates"] if c["flags"] == found["pick"])
    assert [part["site"] for part in pick["sites"]] == ["h100:4", "l4:4"]
    assert pick["sites"][0]["steps"] > pick["sites"][1]["steps"] and 0 <= pick["sites"][0]["idle"] < 1


# ── bad input ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--hardware=h1000:8"], "hardware=h1000:8: 'h1000' is no chip that is known: did you mean h100:8?"),
        (["--hardware=v5e-1024"], "hardware=v5e-1024: 1024 chips are no slice that can be rented"),
        (["--hardware=h100:8+h1000:4"], "hardware=h1000:4: 'h1000' is no chip that is known: did you mean h100:8?"),
        (["--hardware=h100:8+"], "hardware=: '' is no chip that is known"),
        (["--hardware=h100:8+l4:4", "--compile"], "--compile: one program runs on equal sites"),
        (["--hardware=h100:8+l4:4", "--write=a.py"], "--write: one program runs on equal sites"),
        (["--hardware=h100:8+l4:4", "--link=0gbit"], "link=0gbit: expected a rate above 0"),
        (["--hardware=h100:8+l4:4", "--config.mesh.replica=3"], "mesh.replica=3: 2 sites are named"),
        (["--hardware=h100:4x2", "--link=0gbit"], "link=0gbit: expected a rate above 0"),
        (["--hardware=h100:8", "--link=1gbit"], "h100:8 is one host: name several, as 2xh100:8"),
        (["--hardware=v5p-8", "--link=1gbit"], "v5p-8 is one slice: name several, as 2xv5p-8"),
        (["--hardware=h100:8", "--config.mesh.tensor=3"], "mesh.tensor=3 will do for this model: the product of these"),
        (["--hardware=h100:8", "--config.mesh.replica=2"], "a replica is one slice or site; of a single site, whole"),
        (
            ["--hardware=h100:8", "--config.mesh.stage=8"],
            "model.num_layers=2 cannot be cut over mesh.stage=8",
        ),
        (["--hardware=h100:8", "--config.mesh.expert=2"], "this model has no experts (model.experts=0)"),
        (["--hardware=h100:8", "--config.mesh.context=8", "--config.data.seq_len=20"], "data.seq_len=20 cannot be cut"),
        (["--hardware=h100:8", "--config.data.batch_size=3", "--config.mesh.fsdp=8"], "data.batch_size=8 is"),
        (["--hardware=h100:8", "--config.compute.remat=none"], "compute.remat=none cannot be planned with"),
        (["--hardware=h100:8+l4:4", "--config.compute.remat=none"], "compute.remat=none cannot be planned with"),
        (
            ["--hardware=h100:8", "--config.compute.attention=reference"],
            "compute.attention=reference cannot be planned",
        ),
        (["--hardware=h100:8", "--config.sync.exchange=backward"], "sync.exchange=backward cannot be planned with"),
        (["--hardware=h100:8", "--config.mesh.tensr=3"], "mesh.tensr"),
        (["--hardware=h100:8", "--steps=3"], "--steps=3: not an option of plan.py"),
        (["--hardware=h100:8", "--write=plan.txt"], "name it plan.py"),
        (["--hardware=h100:8", "--write=plan.py"], "is there already"),
        (["--hardware=h100:8", "--write=nowhere/a.py"], "there is no folder nowhere"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(arguments, said, monkeypatch):
    monkeypatch.chdir(helpers.ROOT)
    with pytest.raises(UsageError) as error:
        command.main(["--config=configs/tiny.py", *arguments])
    assert said in str(error.value) and "\n" not in str(error.value).strip()


def test_a_machine_that_is_too_small_is_refused_with_the_smallest_that_is_not():
    with pytest.raises(UsageError) as error:
        plan.search(case("70b", "h100:8"))
    said = str(error.value)
    assert "147.40 GiB of each chip's 71.20 GiB" in said and "optimizer.moment_dtype=bfloat16" in said
    named = said.split("--hardware=")[1].split(" ")[0]
    assert named == "h100:4x8" and plan.search(case("70b", named)).fitting


@pytest.mark.parametrize(
    ("typed", "never"),
    [
        ({"compute__unroll": True}, {"stage"}),
        ({"compute__remat": "offload"}, {"stage"}),
        ({"data__seq_len": 24, "attention__context": "heads", "mesh__context": -1}, set()),
        ({"mesh__stage": 2, "pipeline__gather": "step"}, set()),
        ({"data__document_mask": True, "mesh__context": -1, "attention__context": "ring"}, {"context"}),
    ],
)
def test_meshes_that_cannot_be_are_left_out_and_the_others_planned(typed, never):
    found = plan.search(case("tiny", "h100:4", **typed))
    sizes = [c.layout.sizes for c in found.fitting]
    assert all(s[axis] == 1 for s in sizes for axis in never)
    assert "mesh__stage" not in typed or {s["stage"] for s in sizes} == {2}
    assert "pipeline__gather" not in typed or {c.layout.pipeline[1] for c in found.fitting} == {"step"}


def test_a_command_has_no_key_that_its_mesh_does_not_read(monkeypatch, capsys):
    """Typed for meshes with stages, of which the pick is none."""
    monkeypatch.chdir(helpers.ROOT)
    assert command.main(["--config=configs/tiny.py", "--hardware=h100:2", "--config.pipeline.remat=stage"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("python train.py")]
    config, _ = methods.parse(line.split()[1:], "")
    methods.validate(config)
    assert ("mesh.stage" in line) == ("pipeline.remat" in line)


def test_a_hop_is_one_of_a_permute_and_all_but_one_of_a_collective():
    layout = only("8b", "h100:8x8", "full", mesh__context=8, attention__context="ring").layout
    of = case("8b", "h100:8x8")
    hops = {(row.axis, row.what, row.part): row.hops for row in sent.sent(of.network, layout, sent.Habits())}
    assert hops["context", sent.ATTENTION, "forward"] == 32 * 7
    assert hops["fsdp", sent.WEIGHTS, "forward"] == 32 * 63


def test_moments_are_bfloat16_where_nothing_else_fits():
    found = plan.search(case("8b", "h100:2", data__batch_size=4, **WHOLE))
    assert found.notes == ["optimizer.moment_dtype=bfloat16: nothing fits with float32"]
    assert {c.changes["optimizer.moment_dtype"] for c in found.fitting} == {"bfloat16"}
    assert found.pick.state_bytes == pytest.approx(8 * 8.03e9 / 2, rel=0.01)  # of a parameter 4 + 2 + 2
    smaller = plan.search(case("8b", "h100:2", data__batch_size=2, **WHOLE))
    assert all("optimizer.moment_dtype" not in c.changes for c in smaller.fitting)
    with pytest.raises(UsageError, match="is the smallest of these chips"):
        plan.search(case("8b", "h100:2", data__batch_size=4, optimizer__moment_dtype="float32", **WHOLE))


# ── the host's memory ─────────────────────────────────────────────────────────────────────────────────────────────────


def reaching(of: Case, host: float) -> Case:
    """On chips that reach their hosts' memory at so many bytes a second."""
    return dataclasses.replace(
        of, target=dataclasses.replace(of.target, chip=dataclasses.replace(of.target.chip, host=host))
    )


@pytest.mark.parametrize("machine", ["h100:2x8", "v5p-32"])
def test_what_is_kept_with_the_host_is_planned_where_it_is_typed_and_takes_what_it_takes_there_and_back(machine):
    of = case("8b", machine, compute__remat="offload", data__batch_size=32)
    found = plan.search(of)
    assert {c.layout.remat for c in [*found.fitting, *found.others]} == {"offload"} and found.offloaded is None
    for c in found.fitting:
        there_and_back = 2 * c.layout.accumulate * c.host_bytes / of.target.chip.host
        assert c.step.compute + c.step.exposed["host"] >= there_and_back > 0
        assert c.step.wire["host"] >= there_and_back
    said, each = "\n".join(planned.explained(found, of)), of.target.chips // of.target.hosts
    assert "waiting for host " in said
    assert f"besides, {found.pick.host_bytes * each / GiB:.2f} GiB of each host's memory" in said


def test_what_is_kept_with_the_host_is_what_matmuls_keeps_on_the_device():
    here, away = (only("8b", "h100:2x8", remat, data__batch_size=16) for remat in ("matmuls", "offload"))
    kept = 32 * 8192 * (2 * (4096 + 1024) + 2 * 14336) * 2  # layers, tokens; queries, keys, values, context, hidden
    assert (here.host_bytes, away.host_bytes) == (0, kept)
    assert here.temporary_bytes - away.temporary_bytes == kept
    assert here.seconds < away.seconds and "host" not in here.step.exposed


# Of `python bench/plan.py --only=offload`: temporaries in GiB, seconds of the schedule, played.
AWAY = {
    ("8b", "h100:8x8", 64): (5.52, 1.430),
    ("8b", "v5p-64", 64): (10.64, 9.434),
}


@pytest.mark.parametrize("row", AWAY)
def test_what_is_kept_with_the_host_is_counted_as_it_was_compiled(row):
    (config, machine, batch), (temporary, seconds) = row, AWAY[row]
    found = only(config, machine, "offload", data__batch_size=batch, compute__loss_chunk_mib=0)
    assert found.temporary_bytes / GiB == pytest.approx(temporary, rel=0.10)
    assert found.seconds == pytest.approx(seconds, rel=0.10)


@pytest.mark.parametrize("machine", ["h100:8x8", "v5p-128"])
def test_what_is_kept_with_the_host_lets_nothing_fit_that_does_not_without(machine):
    """Which is why it is not what is tried there, as narrow moments are."""
    full, away = (only("8b", machine, remat) for remat in ("full", "offload"))
    assert away.peak_bytes >= full.peak_bytes


def test_a_host_that_is_reached_fast_is_said_to_gain_and_the_plan_stays_as_it_was():
    of = case("70b", "h100:8x8", **WHOLE)
    slow, fast = plan.search(of), plan.search(reaching(of, 450e9))
    assert slow.pick == fast.pick and slow.fitting == fast.fitting
    texts = ["\n".join(planned.explained(found, of)) for found in (slow, fast)]
    assert "offload" not in texts[0]
    best = fast.offloaded
    assert best and best.fits and best.seconds < fast.pick.seconds
    assert "remat offload would be" in texts[1] and "--config.compute.remat=offload plans it" in texts[1]
    typed = plan.search(reaching(case("70b", "h100:8x8", compute__remat="offload", **WHOLE), 450e9))
    assert typed.pick.seconds == pytest.approx(best.seconds, rel=plan.CLOSE - 1)


def test_a_host_that_nobody_knows_how_fast_is_reached_is_not_planned_with():
    assert plan.search(reaching(case("tiny", "h100:4", **WHOLE), 0.0)).offloaded is None
    typed = reaching(case("tiny", "h100:4", compute__remat="offload"), 0.0)
    with pytest.raises(UsageError, match="how fast h100 reaches its host's memory is not in the catalogue"):
        plan.search(typed)
    with pytest.raises(UsageError, match="how fast h100 reaches its host's memory"):
        sites.cases(case("tiny", "l4:4", compute__remat="offload"), [targets.parse("l4:4", CHIPS), typed.target])


# ── batches ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_batch_that_no_mesh_cuts_is_replaced_by_the_nearest():
    found = plan.search(case("8b", "h100:128x8", **WHOLE))
    assert found.notes[0].startswith("data.batch_size=128: 64 windows cannot be cut")
    assert found.pick.changes["data.batch_size"] == 128


# ── what is kept ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_plan_is_printed_and_kept_and_the_config_it_writes_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(helpers.ROOT)
    kept, written = tmp_path / "plan.json", tmp_path / "planned.py"
    given = ["--config=configs/tiny.py", "--config.optimizer.lr=0.5", "--hardware=2xh100:2x2", "--link=10gbit"]
    assert command.main([*given, f"--json={kept}", f"--write={written}"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("2xh100:2x2 = 2 sites of 2 hosts of 2 NVIDIA H100 80GB HBM3")
    for line in ("replicas are joined by 10gbit", "pick: replica 2 × ", "time: computing ", "memory: ", "binds"):
        assert line in said, line

    found = json.loads(kept.read_text())
    assert found.keys() == {"candidates", "pick", "considered"} and found["considered"] >= len(found["candidates"])
    for c in found["candidates"]:
        assert c.keys() == {
            "flags", "mesh", "fits", "peak_bytes", "seconds", "tokens_per_second", "steps_to_loss", "binds", "compiled",
        }  # fmt: skip
        assert math.prod(c["mesh"].values()) == 8 and c["compiled"] is None
    (pick,) = [c for c in found["candidates"] if c["flags"] == found["pick"]]
    assert pick["fits"] and pick["tokens_per_second"] * pick["seconds"] == pytest.approx(32 * 32)

    own, _ = methods.parse(["train.py", f"--config={written}"], "")
    methods.validate(own)
    typed, _ = methods.parse(["train.py", *given[:2], *found["pick"].split()], "")
    assert dict(flatten(own)) == dict(flatten(typed))


def test_what_does_not_fit_and_would_be_faster_is_said():
    found = plan.search(case("70b", "v6e-256", **WHOLE))
    text = "\n".join(planned.explained(found, case("70b", "v6e-256", **WHOLE)))
    assert "memory binds, too" in text and "remat matmuls would be" in text
    found = plan.search(case("8b", "h100:8x8", **WHOLE))
    assert "more of it would gain nothing" in planned.explained(found, case("8b", "h100:8x8"))[2]


def test_predicted_stands_beside_compiled_and_what_does_not_fit_is_not_picked():
    found = plan.search(case("8b", "h100:8x8", **WHOLE))
    best = command.best_few(found)
    assert best[0] is found.pick and len({tuple(c.layout.sizes.values()) for c in best}) == len(best) == command.BEST
    fits = planned.Compiled(2 * GiB, True, 5e14, {"fsdp": 40 * GiB})
    line = planned.beside(best[0], fits)
    assert line.startswith("  fits; predicted / compiled: memory ") and "fsdp 40.44 GiB / 40.00 GiB" in line
    too_large = dataclasses.replace(fits, fits=False)
    assert planned.confirmed(found, best, {0: fits, 1: fits, 2: fits}).pick is best[0]
    assert planned.confirmed(found, best, {0: too_large, 1: fits, 2: fits}).pick is best[1]
    kept = planned.as_json(found, {id(best[1]): fits})["candidates"]
    assert [c["compiled"]["peak_bytes"] for c in kept if c["compiled"]] == [2 * GiB]


def test_streaming_is_offered_for_stages_of_one_run_alone():
    """Its fragments are of layers that follow each other: train.py would refuse the command."""
    found = plan.search(case("8b", "2xh100:4x8", "1gbit", mesh__stage=4, mesh__tensor=8, mesh__replica=2))
    runs = lambda streams: {c.layout.repeats for c in found.fitting if (c.strategy == "streaming") == streams}
    assert runs(True) == {1} and runs(False) > {1}


@pytest.mark.parametrize("keys", [{"compute__remat": "offload"}, {"pipeline__interleave": 2, "model__num_layers": 2}])
def test_what_is_chosen_is_no_reason_against_a_mesh(keys):
    """A config's own value of a key that was not typed, which stages could not have."""
    of = dataclasses.replace(case("tiny", "h100:4", **keys), typed=())
    assert {sizes["stage"] for sizes in tried.legal(of)} == {1, 2}
    assert {c.layout.stages for c in plan.search(of).fitting} == {1, 2}


def test_unequal_sites_may_have_stages_of_several_runs(monkeypatch, capsys):
    """Typed, so that streaming, which would have no stage of one run, is left out."""
    monkeypatch.chdir(helpers.ROOT)
    typed = ["mesh.stage=2", "pipeline.interleave=2", "model.num_layers=4"]
    machine = ["--config=configs/tiny.py", "--hardware=h100:4+l4:4", "--link=1gbit"]
    assert command.main([*machine, *(f"--config.{key}" for key in typed)]) == 0
    assert "--config.pipeline.interleave=2" in capsys.readouterr().out

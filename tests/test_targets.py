"""Machines that nobody has here: their names, what is understood and refused, and what is said of programs that were
compiled for them. What needs a compiler's package is slow."""

import dataclasses
import functools
import gzip
import importlib.metadata
import json
import logging
import math
import os
import re
import subprocess
import sys
import types

import helpers
import jax
import pytest

import train
from parallel.cost import compilers, hardware, targets
from parallel.cost.hlo import Program
from parallel.cost.schedule import Buffer
from parallel.layout import mesh as meshes
from recipes import aot, memory, summary, verdict
from recipes import target as target_recipe
from runtime.config import RunError, UsageError

CHIPS = hardware.catalogue()


def target(text):
    return targets.parse(text, CHIPS)


# ── names ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v5p-128", "v5p-128 = 64 chips 4×4×4, wrapped, 95.7 GiB each"),
        ("v5p:4x4x4", "v5p:4x4x4 = 64 chips 4×4×4, wrapped, 95.7 GiB each"),
        ("2xv5p-64", "2xv5p-64 = 2 slices of 32 chips 2×4×4, not wrapped, 95.7 GiB each"),
        ("v5p-2304", "v5p-2304 = 1152 chips 8×12×12, wrapped, 95.7 GiB each"),
        ("v5litepod-16", "v5litepod-16 = 16 chips 4×4, not wrapped, 15.8 GiB each"),
        ("v6e-128", "v6e-128 = 128 chips 8×16, wrapped along 16, 31.2 GiB each"),
        ("4xv5e-256", "4xv5e-256 = 4 slices of 256 chips 16×16, wrapped, 15.8 GiB each"),
        ("v6e-1", "v6e-1 = 1 chip 1×1, not wrapped, 31.2 GiB each"),
        ("h100:8", "h100:8 = one host of 8 NVIDIA H100 80GB HBM3, 79.1 GiB each, of which a program gets 90%"),
        ("2xb200:4x8", "2xb200:4x8 = 2 sites of 4 hosts of 8 NVIDIA B200, 178.4 GiB each, of which a program gets 90%"),
    ],
)
def test_a_machine_is_read_from_its_name(text, said, monkeypatch):
    for key in meshes.SHARE_KEYS:
        monkeypatch.delenv(key, raising=False)
    assert target(text).said() == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("v5-128", "did you mean v5p-128"),
        ("h1000:8", "did you mean h100:8"),
        ("gb200:4", "gb200 is known by its speed alone: did you mean b200:8"),
        ("", "is no chip that is known"),
        ("128x8", "is no chip that is known"),
        ("h100", "as in h100:8"),
        ("h100:0", "as in h100:8"),
        ("0xh100:8", "as in h100:8"),
        ("h100-8", "h100:4x8 (hosts × devices of each)"),
        ("h100:16", "h100:2x8"),
        ("v5p-100", "v5p-64 (32 chips) and v5p-128 (64 chips)"),
        ("v5p-127", "v5p-64 (32 chips) and v5p-128 (64 chips)"),
        ("v5p:4x4", "has 3 sides, as 64 chips are 4×4×4"),
        ("v5p:4x4x5", "v5p-128 (64 chips)"),
        ("v5e:8x3", "v5e-16 (16 chips) and v5e-32 (32 chips)"),
        ("v5e-1024", "the largest is v5e-256. 4xv5e-256"),
        ("v6e:16x32", "the largest is v6e-256. 2xv6e-256"),
        ("h100:8+l4:4", "+ joins unequal sites"),
    ],
)
def test_what_is_no_machine_is_refused_with_the_nearest_one(text, said):
    with pytest.raises(ValueError) as error:
        target(text)
    assert str(error.value).startswith(f"target={text}: ") and said in str(error.value)


def test_every_slice_that_is_named_in_a_refusal_can_be_had():
    for name in ("v4", "v5e", "v5p", "v6e"):
        chip = CHIPS[name]
        for chips in targets.sizes(chip):
            found = target(f"{name}-{chips * chip.cores}")
            assert found.chips == chips and len(found.sides) == chip.sides
            assert target(f"{name}:{'x'.join(map(str, found.sides))}").sides == found.sides


def test_links_wrap_around_where_a_slice_has_them():
    """Clouds' topologies: v5e and v6e along sides of 16, v5p from one cube of 64 chips."""
    wraps = lambda text: [target(text).wrap, target(text).hosts]
    assert wraps("v5e-64") == [(False, False), 16] and wraps("v5e-128") == [(False, True), 32]
    assert wraps("v6e-256") == [(True, True), 64] and wraps("v5p-64") == [(False,) * 3, 8]
    assert wraps("v5p-128") == [(True,) * 3, 16] and wraps("h100:4x8") == [(), 4]


# ── the catalogue ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_chip_that_can_be_rented_has_what_is_counted_with():
    for chip in CHIPS.values():
        assert chip.bf16 and chip.source
        if chip.largest:
            assert chip.memory > 10 * hardware.GiB and chip.bandwidth > 1e11 and chip.outside and chip.host
            assert bool(chip.link) == chip.is_tpu and bool(chip.inside) != chip.is_tpu
            assert chip.peak("fp8") >= chip.peak("bf16") == chip.bf16


def test_a_file_of_the_user_adds_chips_and_changes_values(tmp_path):
    file = tmp_path / "chips.toml"
    file.write_text('[h100]\noutside = 25e9\n[mine]\nkind = "MINE 1"\nbf16 = 1e15\nmemory = 64000000000\nlargest = 4\n')
    found = hardware.catalogue(str(file))
    assert found["h100"].outside == 25e9 and found["h100"].bf16 == CHIPS["h100"].bf16
    assert targets.parse("mine:2x4", found).chips == 8 and "mine" not in CHIPS


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[h100\n", "chips.toml"),
        ("[h100]\nspeed = 1", "[h100] has 'speed'; a chip has kind, bf16"),
        ("[h100]\nbf16 = 0", "bf16=0: expected a number above 0"),
        ("[h100]\nmemory = 1.5", "memory=1.5: expected a whole number above 0"),
        ("[h100]\nbf16 = '1'", "bf16='1': expected a number above 0"),
        ("[h100]\nkind = 1", "kind=1: expected text in quotes"),
        ("[mine]\nbf16 = 1", "[mine] is a new chip, which needs at least kind and bf16"),
        ("h100 = 3", "h100=3 stands outside of a chip's table"),
    ],
)
def test_a_wrong_file_of_the_user_is_refused_by_name(text, said, tmp_path):
    file = tmp_path / "chips.toml"
    file.write_text(text)
    with pytest.raises(ValueError) as error:
        hardware.catalogue(str(file))
    assert str(file) in str(error.value) and said in str(error.value)


# ── compilers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("name", "installed", "said"),
    [
        ("h100", {}, "needs jax-cuda13-plugin, which is not installed: `pip install --no-deps jax-cuda13-plugin==9.9"),
        ("h100", {"jax-cuda13-plugin": "9.9"}, "needs jax-cuda13-pjrt, which is not installed"),
        ("a100", {"jax-cuda13-plugin": "9.8", "jax-cuda13-pjrt": "9.9"}, "jax-cuda13-plugin 9.8 is not of JAX 9.9"),
        ("v5p", {}, "needs libtpu, which is not installed: `pip install --no-deps libtpu`"),
        ("v5e", {"libtpu": "0.0.9"}, "libtpu 0.0.9 is not of JAX 9.9, which wants 0.0.10"),
        ("l4", {}, "XLA has no description of l4"),
    ],
)
def test_a_compiler_that_is_missing_or_of_another_jax_is_told_with_the_command(name, installed, said, monkeypatch):
    def version(package):
        if package not in installed | {"jax": "9.9"}:
            raise importlib.metadata.PackageNotFoundError(package)
        return ({"jax": "9.9"} | installed)[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", lambda package: ['libtpu==0.0.10.*; extra == "tpu"', "numpy"])
    with pytest.raises((ImportError, ValueError)) as error:
        compilers.check_compiler(CHIPS[name])
    assert said in str(error.value)


def test_a_newer_libtpu_and_the_same_plugins_will_do(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "0.0.52" if package == "libtpu" else "9.9")
    monkeypatch.setattr(importlib.metadata, "requires", lambda package: ['libtpu==0.0.50.*; extra == "tpu"'])
    compilers.check_compiler(CHIPS["v5p"])
    compilers.check_compiler(CHIPS["h100"])


def test_a_description_for_xla_is_whole():
    for name in ("h100", "h200", "a100", "a100-40gb", "b200"):
        text = compilers.description(CHIPS[name])
        assert text.count("{") == text.count("}") and f"device_memory_size: {CHIPS[name].memory}" in text
        for key in ("core_count", "memory_bandwidth", "cuda_compute_capability", "shared_memory_per_block_optin"):
            assert f"{key}" in text


# ── the front door ────────────────────────────────────────────────────────────────────────────────────────────────────

TINY = "--config=configs/tiny.py"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--target=v5p-128"], "nothing is trained on it: add --dry_run"),
        (["--save=out"], "--save=out keeps what --target compiles: add --target"),
        (["--target=v5p-100", "--dry_run"], "the nearest are v5p-64 (32 chips) and v5p-128 (64 chips)"),
        (["--target=x100:8", "--dry_run"], "did you mean h100:8"),
        (["--target=h100:8", "--dry_run", "--simulate=8"], "--simulate=8 is of devices that run"),
        (["--target=h100:8", "--dry_run", "--num_processes=2"], "--num_processes=2 is of devices that run"),
        (["--target=h100:8", "--dry_run", "--memory=80GiB"], "--memory=80GiB is of devices that run"),
        (
            ["--target=h100:8", "--dry_run", "--config.mesh.tensor=3"],
            "tensor 3 does not divide the 8 devices there are",
        ),
        (["--target=h100:8", "--dry_run", "--config.data.batch_size=30"], "Nearest legal sizes: 24 or 32"),
        (
            ["--target=h100:8", "--dry_run", "--config.compute.attention=cudnn"],
            "pip install --no-deps nvidia-cudnn-cu13",
        ),
        (["--target=2xh100:4", "--dry_run", "--link=0gbit"], "link=0gbit: expected a rate above 0"),
    ],
)
def test_bad_input_is_one_sentence_before_anything_is_compiled(flags, said, monkeypatch, capsys):
    """On a machine that has the plugin and no cuDNN, whose topology is this process's devices."""
    monkeypatch.chdir(helpers.ROOT)
    monkeypatch.setattr(compilers, "check_compiler", lambda chip: None)
    monkeypatch.setattr(compilers, "has_cudnn", lambda: False)
    monkeypatch.setattr(compilers, "prepare", lambda chip: None)
    monkeypatch.setattr(compilers, "devices", lambda target: jax.devices()[: target.chips])
    monkeypatch.setattr(aot, "compiled", lambda *_: pytest.fail("it compiles"))
    assert train.run(["train.py", TINY, *flags]) == 2
    assert said in capsys.readouterr().err


def fitted(target_text, typed=(), **overrides):
    """(the config for this target, what is said of changes)."""
    config = helpers.tiny(**overrides)
    return config, target_recipe.fitted(config, target(target_text), list(typed))


def test_slices_are_replicas_unless_the_mesh_says_otherwise():
    config, notes = fitted("2xv5p-8")
    assert config.mesh.replica == 2 and notes == ["mesh.replica=2: a replica for each slice"]
    config, notes = fitted("2xv5p-8", ["mesh.replica"])
    assert config.mesh.replica == 1 and notes == []


def test_a_batch_that_the_mesh_does_not_divide_is_the_nearest_that_it_does_and_said():
    config, notes = fitted("v5p-128")
    assert config.data.batch_size == 64
    assert notes == ["data.batch_size=64: 32 cannot be cut into the mesh's 64 parts"]
    assert fitted("v5p-8")[1] == []
    with pytest.raises(UsageError, match="tensor 3 does not divide the 64 devices there are.*v5p-128 has 64 chips"):
        fitted("v5p-128", mesh__tensor=3)


def test_without_cudnn_the_plain_attention_is_compiled_and_said(monkeypatch):
    monkeypatch.setattr(compilers, "has_cudnn", lambda: False)
    config, notes = fitted("h100:8")
    assert config.compute.attention == "reference" and "nvidia-cudnn-cu13" in notes[0]
    monkeypatch.setattr(compilers, "has_cudnn", lambda: True)
    assert fitted("h100:8")[0].compute.attention == "auto" and fitted("v5p-8")[0].compute.attention == "auto"


# ── the verdict ───────────────────────────────────────────────────────────────────────────────────────────────────────

GiB = hardware.GiB


@functools.cache
def parts():
    return helpers.build(helpers.tiny(data__batch_size=64), (1, 8, 1))


def reading(peak, **about):
    largest = [Buffer(2 * GiB, "f32", (4096, 128256), "model/loss.py:63"), Buffer(GiB, "bf16", (8192,), "x.py:1")]
    return aot.Reading(1.0, 5 * GiB, peak * GiB - 5 * GiB, peak * GiB, 1e15, largest, **about)


def small(memory, text="h100:8"):
    """This machine with chips of so many GiB."""
    found = target(text)
    return dataclasses.replace(found, chip=dataclasses.replace(found.chip, memory=int(memory * GiB)))


def test_a_program_that_fits_says_how_much_is_to_spare():
    said = verdict.sentence(target("v5p-8"), {"step": reading(20), "evaluation": reading(7)}, [])
    assert said == "fits: step needs 20.00 GiB of 95.73 GiB; 75.73 GiB to spare, 70.73 GiB while a checkpoint is copied"
    said = verdict.sentence(target("v5p-8"), {"step": reading(93)}, [])
    assert said.endswith("2.73 GiB to spare, while a checkpoint is copied, 2.27 GiB too little")


def test_a_gpu_lends_the_share_that_the_run_takes(monkeypatch):
    for key in meshes.SHARE_KEYS:
        monkeypatch.delenv(key, raising=False)
    assert target("h100:8").memory == int(0.9 * CHIPS["h100"].memory)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", ".75")
    assert target("h100:8").memory == int(0.75 * CHIPS["h100"].memory) and "gets 75%" in target("h100:8").said()
    assert target("v5p-8").memory == CHIPS["v5p"].memory
    meshes.take_gpu_memory()
    assert not os.environ.get("XLA_CLIENT_MEM_FRACTION"), "the user has said it by the other name, and both are refused"
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION")
    meshes.take_gpu_memory()
    assert float(os.environ["XLA_CLIENT_MEM_FRACTION"]) == meshes.gpu_share() == 0.9
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "80%")
    with pytest.raises(ValueError, match="XLA_CLIENT_MEM_FRACTION=80%: expected a share"):
        target("h100:8").said()


def test_a_plugin_for_gpus_elsewhere_is_no_error_here(monkeypatch, caplog, tmp_path):
    """As where requirements-targets.txt is installed without cuDNN: JAX printed a traceback at every start."""
    meshes.take_gpu_memory()
    complain = lambda: logging.getLogger("jax._src.xla_bridge").error("Jax plugin configuration error: of %s", "cuda")
    monkeypatch.setattr(meshes, "DRIVER", (str(tmp_path / "none"),))
    complain()
    assert not caplog.records
    monkeypatch.setattr(meshes, "DRIVER", (str(tmp_path),))
    complain()
    assert len(caplog.records) == 1


def test_a_group_over_several_axes_is_rated_by_all_its_members_in_a_host():
    """Of hosts of four: a pair of devices of a host has two adapters, four have four."""
    target = targets.parse("h100:2x4", hardware.by_name(hardware.CHIPS))
    run = helpers.build(helpers.tiny(data__batch_size=64), (1, 4, 2))
    seconds = lambda *axes: aot.group_seconds(1e9, target, run, axes)
    assert seconds("fsdp") == pytest.approx(1e9 / (2 * target.chip.outside))
    assert seconds("fsdp", "tensor") == pytest.approx(1e9 / (4 * target.chip.outside))
    assert seconds("tensor") == pytest.approx(1e9 / target.chip.inside)


def test_the_whole_state_lies_beside_what_reads_the_parameters_alone():
    """Of AdamW two more arrays for each: the evaluation's own peak knows nothing of them."""
    analysis = types.SimpleNamespace(temp_size_in_bytes=10, peak_memory_in_bytes=10**6)
    program = types.SimpleNamespace(memory_analysis=lambda: analysis)
    state = memory.state_bytes(parts(), parts().mesh.shape)
    params = sum(memory.shard_bytes(x, parts().mesh.shape) for x in jax.tree.leaves(parts().state.params))
    assert state > 2.9 * params
    assert aot.peak(program, parts(), "evaluation") == (10, 10**6 + state - params)
    assert aot.peak(program, parts(), "step") == (10, 10**6)
    assert aot.peak(aot.Refused("RESOURCE_EXHAUSTED", 7.0), parts(), "step") == (7, state + 7)


def test_a_row_says_what_is_sent_by_dtype_and_what_nothing_hides_by_kind():
    sent = [
        aot.Sent("fsdp", "bf16", "all-gather", 8.0 * GiB, 6.0 * GiB),
        aot.Sent("fsdp", "bf16", "all-reduce", 3.0 * GiB, 0.0),
        aot.Sent("fsdp", "f32", "all-reduce", 1.0 * GiB, 0.0),
        aot.Sent("replica", "u8", "all-to-all", 1.0 * GiB, 1.0 * GiB),
    ]
    seconds = {"compute": 2.0, "memory": 1.0, "wire": {"fsdp": 3.0, "replica": 0.5}}
    played = {"seconds": 2.5, "compute": 2.0, "exposed": {"fsdp": 0.5, "replica": 0.0}}
    read = reading(20, wire=sent, seconds=seconds, played=played)
    found = dict(verdict.rows(helpers.tiny(), parts(), target("v5p-8"), {"step": read}))
    assert found["wire, fsdp"] == (
        "12.00 GiB (bf16 11.00 GiB, f32 1.00 GiB); 6.00 GiB behind matrix products; exposed: all-reduce 4.00 GiB, "
        "all-gather 2.00 GiB"
    )
    assert found["wire, replica"] == "1.00 GiB (u8 1.00 GiB); 1.00 GiB behind matrix products; exposed: none"
    assert found["at nominal rates"] == "compute 2.0 s, memory 1.0 s, fsdp 3.0 s, replica 500 ms: fsdp binds"
    assert found["played"] == (
        "2.5 s at the shares of these rates that programs reach: computing 2.0 s, waiting for fsdp 500 ms"
    )
    assert found["largest"] == "2.00 GiB f32[4096,128256] model/loss.py:63"
    assert verdict.over_slow({"step": reading(20, wire=sent, seconds=seconds)}) == GiB


def searched(machine, now, model):
    """(the remedies, what was compiled). model: GiB by the changes and the number of chips."""
    compiled = []

    def predict(changes, on):
        compiled.append((changes, on.text))
        return model(changes, on.chips) * GiB

    config = helpers.tiny(data__batch_size=64)
    found = verdict.search(config, parts(), machine, {"step": reading(now)}, predict)
    return found, compiled


def test_what_does_not_fit_names_the_remedy_that_was_compiled_mildest_first():
    """Micro-steps leave 6 GiB and a share of 24: 4 of 8 are the fewest that leave room in 14.4."""
    machine = small(16)
    found, compiled = searched(machine, 30, lambda changes, _: 6 + 24 / changes.get("optimizer.accumulate", 1))
    assert found[-1] == verdict.Remedy("--config.optimizer.accumulate=4", 12 * GiB, True)
    assert [changes for changes, _ in compiled] == [{"optimizer.accumulate": 8}, {"optimizer.accumulate": 4}]
    said = verdict.sentence(machine, {"step": reading(30)}, found)
    assert said == (
        "does not fit: step needs 30.00 GiB of 14.40 GiB; largest: 2.00 GiB from model/loss.py:63, 1.00 GiB from "
        "x.py:1; try --config.optimizer.accumulate=8 (9.00 GiB) or --config.optimizer.accumulate=4 (12.00 GiB)"
    )


def test_where_one_key_is_not_enough_all_are_tried_and_then_more_chips():
    found, compiled = searched(small(16), 30, lambda changes, chips: 30 - 4 * len(changes) - 12 * (chips > 8))
    assert [remedy.fits for remedy in found] == [False] * 3 + [True]
    assert found[2].flags.count("--config.") == 3 and found[-1].flags.startswith("--target=h100:2x8 ")
    assert compiled[-1][1] == "h100:2x8" and "--config.mesh.fsdp=16" in found[-1].flags
    said = verdict.sentence(small(16), {"step": reading(30)}, found)
    assert "; try --target=h100:2x8 " in said and "; not enough: --config.optimizer.accumulate=8 (26.00 GiB), " in said


def test_what_a_compiler_fails_on_is_no_remedy():
    def fails(changes, chips):
        if "optimizer.accumulate" in changes:
            raise RunError("the compiler fails: INTERNAL: RET_CHECK")
        return 12.0

    found, _ = searched(small(16), 30, fails)
    assert [(remedy.flags, remedy.fits) for remedy in found] == [("--config.compute.remat=full", True)]


def test_where_nothing_is_enough_that_is_said():
    found, _ = searched(small(8), 30, lambda changes, chips: 30 - len(changes))
    assert found and not any(remedy.fits for remedy in found)
    assert "; nothing that was tried is enough: " in verdict.sentence(small(8), {"step": reading(30)}, found)


def test_a_state_that_does_not_fit_is_refused_with_the_smallest_machine_that_holds_it():
    state = memory.state_bytes(parts(), parts().mesh.shape)
    machine = small(state / 3 / 0.9 / GiB)
    with pytest.raises(UsageError, match=r"target=h100:8: the state alone takes .*--target=h100:4x8 is the smallest"):
        target_recipe.check_state(parts(), machine)
    target_recipe.check_state(parts(), target("h100:8"))


@pytest.mark.parametrize(
    ("sentence", "found"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (372.65G) exceeds available HBM (15.75G). HLO module: jit_f.\nSee https://x",
            (372.65 * GiB, 15.75 * GiB),
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 23.43G "
            "of 15.75G hbm. Exceeded hbm capacity by 7.68G.",
            (23.43 * GiB, 15.75 * GiB),
        ),
        ("RESOURCE_EXHAUSTED: no number", (None, None)),
        ("INTERNAL: something else", None),
    ],
)
def test_a_refusal_of_the_compiler_is_read(sentence, found):
    assert compilers.refused(RuntimeError(sentence)) == found


def test_what_is_refused_is_read_from_as_many_chips_of_the_next_larger_kind():
    names = lambda text: [x.text for x in [targets.larger(target(text), CHIPS)] if x]
    assert names("v5e-16") == ["v6e-16"] and names("4xv5e-256") == ["4xv6e-256"]
    assert names("v6e-64") == ["v5p-128"] and names("v5e-1") == ["v6e-1"]
    assert names("v6e-1") == names("v5p-8") == names("h100:8") == []


def test_summary_json_has_the_shape_that_others_read(tmp_path):
    sent = [aot.Sent("fsdp", "bf16", "all-gather", 2.0**30, 2.0**29)]
    seconds = {"compute": 1.0, "memory": 0.1, "wire": {"fsdp": 0.2}}
    readings = {
        "step": reading(80, wire=sent, predicted_wire={}, seconds=seconds),
        "sample": aot.Reading(0.0, 5.0, math.inf, math.inf),
    }
    remedies = [verdict.Remedy("--config.optimizer.accumulate=4", 12.0, True)]
    machine, folder = target("h100:8"), summary.folder(str(tmp_path / "a" / "b"))
    summary.keep(folder, "warm step", "HloModule x")
    summary.write(folder, summary.describe(machine, parts(), readings, remedies, "1.2"))
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {"summary.json", "warm_step.hlo.txt.gz"}
    assert gzip.decompress((folder / "warm_step.hlo.txt.gz").read_bytes()) == b"HloModule x"
    found = json.loads((tmp_path / "a" / "b" / "summary.json").read_text())
    assert found["target"] == {
        "name": "h100:8", "chip": "h100", "chips": 8, "slices": 1, "hosts": 1, "memory_bytes": machine.chip.memory,
        "usable_bytes": machine.memory, "wrap": [],
    }  # fmt: skip
    assert found["mesh"] == {"replica": 1, "fsdp": 8, "tensor": 1} and found["versions"]["compiler"] == "1.2"
    assert not found["fits"] and found["remedies"] == [
        {"flags": "--config.optimizer.accumulate=4", "peak_bytes": 12.0, "fits": True}
    ]
    step = found["programs"]["step"]
    assert step["largest"][0] == {
        "bytes": 2 * GiB, "dtype": "f32", "shape": [4096, 128256], "where": "model/loss.py:63",
    }  # fmt: skip
    assert step["wire"] == [sent[0]._asdict()] and step["seconds"] == seconds
    assert {"runs_per_step", "state_bytes", "temporary_bytes", "peak_bytes", "flops", "predicted_wire"} <= step.keys()
    assert found["programs"]["sample"]["peak_bytes"] is None and found["spare_bytes"] is None


# ── with the compilers ────────────────────────────────────────────────────────────────────────────────────────────────


def run(out, text, *flags):
    """(exit code, what was printed, summary.json) of a dry run in a process of its own."""
    command = [sys.executable, "train.py", TINY, f"--target={text}", "--dry_run", f"--save={out}", *flags]
    done = subprocess.run(command, cwd=helpers.ROOT, capture_output=True, text=True, timeout=900)
    file = out / "summary.json"
    return done.returncode, done.stdout + done.stderr, json.loads(file.read_text()) if file.exists() else {}


def needs(name):
    try:
        compilers.check_compiler(CHIPS[name])
    except ImportError as error:
        pytest.skip(str(error))


SHAPE = (
    "--config.model.model_dim=256 --config.model.head_dim=128 --config.model.num_heads=4 --config.model.num_kv_heads=2 "
    "--config.model.mlp_dim=512 --config.data.seq_len=512"
).split()


@pytest.mark.slow
@pytest.mark.parametrize("text", ["h100:8", "h200:2x4", "a100:8", "b200:8", "v5e-8", "v5p-16", "v6e-8"])
def test_the_programs_of_a_run_are_compiled_for_every_kind_of_chip(text, tmp_path):
    needs(target(text).chip.name)
    code, said, found = run(tmp_path, text, *SHAPE, "--config.mesh.tensor=2")
    assert code == 0 and found["fits"], said
    assert {"step", "evaluation", "sample", "init", "restore"} == found["programs"].keys()
    step = found["programs"]["step"]
    tokens, weights = 32 * 512, 2 * (256 * 512 * 2 + 256 * 2 * 128 * 2 + 3 * 256 * 512) + 256 * 256
    assert step["flops"] >= 6 * weights * tokens / 8, "no less than is trained"
    assert step["peak_bytes"] >= step["state_bytes"] and len(step["largest"]) == 5
    assert {sent["axis"] for sent in step["wire"]} == {"fsdp", "tensor"}, step
    lines = [buffer["where"] for buffer in step["largest"]]
    assert sum(re.fullmatch(r"[a-z_/]+\.py:\d+", line) is not None for line in lines) >= 4, lines


@pytest.mark.slow
@pytest.mark.parametrize("text", ["2xh100:4", "2xv5p-8"])
def test_what_crosses_slices_is_the_closed_form(text, tmp_path):
    """And takes its time on the link that is told."""
    needs(target(text).chip.name)
    _, said, found = run(tmp_path, text, *SHAPE, "--config.sync.codec=int8", "--link=1mbit")
    step = found["programs"]["step"]
    assert found["mesh"]["replica"] == 2 and "a replica for each slice" in said
    slow = {
        sent["dtype"]: sent["bytes"] for sent in step["wire"] if sent["axis"] == "replica" and sent["dtype"] == "u8"
    }
    assert slow == step["predicted_wire"]["replica"]
    sent = sum(sent["bytes"] for sent in step["wire"] if sent["axis"] == "replica")
    assert step["seconds"]["wire"]["replica"] == pytest.approx(8 * 1514 / 1448 * 4 * sent / 1e6)  # 4 chips share it
    assert step["played"]["exposed"]["replica"] == pytest.approx(step["seconds"]["wire"]["replica"], rel=0.05)


@pytest.mark.slow
def test_a_tpu_compilers_refusal_is_a_verdict_with_a_remedy_that_compiles(tmp_path):
    """Of a model whose logits and activations are larger than a v5e: never a traceback."""
    needs("v5e")
    flags = ["--config.data.batch_size=8192", "--config.data.seq_len=1024", "--config.compute.attention=reference"]
    code, said, found = run(tmp_path, "v5e-4", *flags, "--config.sample.tokens=0")
    assert code == 1 and "Traceback" not in said, said
    assert re.search(r"^does not fit: step needs .* GiB of 15\.75 GiB; ", said, re.MULTILINE), said
    assert not found["fits"] and any(remedy["fits"] for remedy in found["remedies"]), said


def test_what_stages_sequences_and_experts_cost_is_said_of_a_machine_too():
    config = helpers.tiny(data__batch_size=64, model__experts=4, optimizer__accumulate=4)
    built = helpers.build(config, (1, 2, 1, 2, 2, 1))
    seconds = {"compute": 2.0, "memory": 1.0, "wire": {}}
    found = dict(verdict.rows(config, built, target("v5p-16"), {"step": reading(20, seconds=seconds)}))
    assert found["bubble"].startswith("20% of the time: 2 stages of 1 layer, 4 micro-batches")
    assert {"ring", "experts"} <= found.keys()


def test_what_cannot_be_counted_is_said_and_binds_nothing():
    seconds = {"compute": math.nan, "memory": 1.0, "wire": {"fsdp": 3.0}}
    step = dataclasses.replace(reading(20, seconds=seconds), flops=math.nan)
    found = dict(verdict.rows(helpers.tiny(), parts(), target("v5p-8"), {"step": step}))
    assert found["FLOPs"] == "not known" and found["at nominal rates"] == "compute not known, memory 1.0 s, fsdp 3.0 s"


def test_a_loop_of_unknown_length_leaves_its_products_unknown():
    def unknown(_):
        raise ValueError("a loop has no known trip count")

    assert math.isnan(aot._or_nan(unknown, Program({}, ""))) and aot._or_nan(lambda _: 2.0, Program({}, "")) == 2.0

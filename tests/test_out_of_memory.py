"""What does not fit into a device: which keys to turn, and by how much."""

import math
import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slackline as sl
from recipes import memory, programs
from recipes.memory import Need, Turn
from runtime.config import RunError, UsageError
from runtime.console import Console

CONSOLE = Console(1, 1, quiet=True)


@pytest.mark.parametrize(("text", "size"), [("80GiB", 80 * 2**30), ("1.5 gb", 1.5e9), (None, None)])
def test_a_stated_memory_is_read_with_its_unit(text, size):
    assert memory.read(text) == size


@pytest.mark.parametrize("text", ["80", "GiB", "0GiB", "-1GiB", "80 furlongs", "", "nanGiB"])
def test_a_memory_without_size_or_unit_is_one_sentence(text):
    with pytest.raises(UsageError, match=f"--memory={text}: expected a device's memory with its unit .*, as in 80GiB"):
        memory.read(text)


# ── the search ───────────────────────────────────────────────────────────────────────────────────────────────────


def needs(changes: dict) -> float:
    """Of a run of 100 bytes, of which each key saves some."""
    (key, value), *_ = changes.items()
    if value == "illegal":
        raise UsageError("no")
    return {"halves": 100 / value, "little": 100 - value, "none": 100, "more": 100 + value}[key]


@pytest.mark.parametrize(
    ("limit", "found"),
    [
        (60, [Turn("halves", 2, 50, True), Turn("little", 4, 96, False)]),
        (30, [Turn("halves", 4, 25, True), Turn("little", 4, 96, False)]),
        (97, [Turn("halves", 2, 50, True), Turn("little", 4, 96, True)]),
        (10, [Turn("halves", 8, 12.5, False), Turn("little", 4, 96, False)]),
        (None, [Turn("halves", 2, 50, None), Turn("little", 2, 98, None)]),
    ],
)
def test_each_key_is_turned_as_far_as_it_must_be(limit, found):
    tried = {"halves": ["illegal", 2, 4, 8], "little": [0.5, 2, 4], "none": [1, 2], "more": [1, 2]}
    assert memory.search(tried, 100, limit, needs) == found


def test_where_nothing_would_compile_as_it_is_whatever_compiles_is_of_use():
    found = memory.search({"halves": [2, 4]}, math.inf, None, needs)
    assert found == [Turn("halves", 2, 50, None)]


def test_values_are_legal_ones_that_are_not_yet_in_use():
    config = helpers.tiny(optimizer__accumulate=2, data__batch_size=48, compute__remat="dots")
    found = memory.values(config, helpers.build(config, (1, 2, 1)))
    assert found == {  # 24 rows a device
        "optimizer.accumulate": [3, 6, 12, 24],
        "compute.remat": ("full",),
        "compute.loss_chunk_mib": [8, 2],
    }
    for n in found["optimizer.accumulate"]:
        helpers.build(helpers.tiny(optimizer__accumulate=n, data__batch_size=48), (1, 2, 1))


def state_bytes(mesh: tuple[int, int, int]) -> int:
    parts = helpers.build(helpers.tiny(data__batch_size=16), mesh)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(parts.state))


def test_a_state_on_more_devices_is_predicted_as_it_would_lie():
    config = helpers.tiny(data__batch_size=16)
    parts, rest = helpers.build(config, (1, 2, 1)), 1000.0
    need = Need(state_bytes((1, 2, 1)), state_bytes((1, 2, 1)) + rest, 0.0)
    for fsdp in (4, 8):
        (turn,) = memory.wider(config, parts, need, state_bytes((1, fsdp, 1)) + rest)
        assert turn == Turn("mesh.fsdp", fsdp, state_bytes((1, fsdp, 1)) + rest, True, devices=fsdp)
    narrow = helpers.tiny(data__batch_size=2)  # whose batch cannot be cut further
    assert memory.wider(narrow, helpers.build(narrow, (1, 2, 1)), need, 1.0) == []


def test_what_is_said_has_a_row_for_each_key_and_says_what_is_not_enough():
    turns = [Turn("a.b", 2, 2**20, False), Turn("c", "full", 2**21, False), Turn("mesh.fsdp", 8, 2**22, False, 16)]
    assert memory.say(["a.b"], turns, 100, 2**19).splitlines()[1:-1] == [
        "  a.b=2: 1.00 MiB, not enough alone",
        "  c=full: 2.00 MiB, not enough alone",
        "  mesh.fsdp=8, on 16 devices: at most 4.00 MiB, not enough alone",
        "  all of them on the devices there are: 512.00 KiB, not enough either",
    ]
    assert "not enough" not in memory.say(["a.b"], [Turn("a.b", 2, 2**20, True)], 2**20, None)
    assert memory.say(["a.b", "c"], [], 100, None).startswith("No value of a.b, c saves memory here")


@pytest.mark.parametrize("error", [ValueError("RESOURCE is fine"), RunError("stop"), KeyError("x")])
def test_errors_of_another_kind_pass(error):
    with pytest.raises(type(error)) as caught, memory.explained(None, None, CONSOLE):  # type: ignore[arg-type]
        raise error
    assert caught.value is error


def test_one_of_several_processes_compiles_nothing_and_names_the_command_that_does(monkeypatch):
    """The others may be anywhere: a compilation could wait for them for ever."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(memory, "compile_steps", lambda *_: pytest.fail("compiled"))
    config = helpers.tiny()
    parts = helpers.build(config, (1, 2, 1))
    with pytest.raises(RunError) as caught, memory.explained(config, parts, CONSOLE):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes.\nMore of it")
    said = str(caught.value)
    assert said.startswith("out of memory (Out of memory allocating 5 bytes): a device holds ") and "\n" not in said
    assert "--dry_run --simulate=2 --memory=" in said


# ── real ones ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow  # compiles the step with each value that is tried
def test_what_a_refused_dry_run_advises_fits(tmp_path):
    asked = ("--dry_run", "--config.mesh.fsdp=8", "--memory=1500KiB", "--config.data.batch_size=32")
    done = helpers.run_here(tmp_path / "never", *asked, check=False)
    assert done.returncode == 2 and "a step does not fit: a device needs" in done.stderr, done.stderr
    advised = dict(re.findall(r"^  ([a-z_.]+)=(\w+): [\d.]+ [KM]iB$", done.stderr, re.MULTILINE))
    assert "optimizer.accumulate" in advised, done.stderr
    for key, value in advised.items():
        helpers.run_here(tmp_path / "never", *asked, f"--config.{key}={value}")
    assert not (tmp_path / "never").exists()
    done = helpers.run_here(tmp_path / "run", *asked[1:], check=False)
    assert done.returncode == 2 and "a step does not fit" in done.stderr, "before there is a state"
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and "before the first step" not in done.stdout


class Vast:
    """A program of a step that asks XLA for more than a machine can address, else as the one given."""

    def __init__(self, program):
        self.program = program
        self.vast = jax.jit(lambda: jnp.zeros((2**48,), jnp.uint8)).lower().compile()

    def __getattr__(self, name):
        return getattr(self.program, name)

    def __call__(self, *arguments):
        return self.vast()


@pytest.fixture
def vast(monkeypatch):
    """Every step finds no memory: XLA's own error."""
    compiled = programs.compile_steps
    monkeypatch.setattr(programs, "compile_steps", lambda parts: {k: Vast(p) for k, p in compiled(parts).items()})


@pytest.mark.slow
def test_the_command_line_says_what_to_turn_where_a_step_finds_no_memory(tmp_path, vast):
    done = helpers.run_here(tmp_path, "--config.data.batch_size=16", "--config.mesh.fsdp=8", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"^error: out of memory \(Out of memory allocating \d+ bytes\): a device needs", done.stderr)
    assert re.search(r"^  optimizer.accumulate=2: [\d.]+ [KM]iB$", done.stderr, re.MULTILINE), done.stderr


@pytest.mark.slow
def test_python_says_what_to_turn_and_of_a_task_only_what_it_reads(tmp_path, vast):
    def loss(params, batch, constrain):
        return ((params["w"].sum() - batch["y"]) ** 2).sum(), jnp.float32(len(batch["y"]))

    data = {"y": np.zeros((64,), np.float32)}
    init = lambda key: {"w": jnp.zeros((4,), jnp.float32)}
    task = sl.Task(init, {"w": ("embed",)}, loss, lambda batch: np.float32(len(batch["y"])), data, data)
    with pytest.raises(
        RunError, match=r"^out of memory \(Out of memory allocating \d+ bytes\): a device needs"
    ) as found:
        sl.fit("tiny", task=task, mesh={"fsdp": 2}, workdir=tmp_path / "run")
    assert "optimizer.accumulate" in str(found.value) and "compute." not in str(found.value)

"""What does not fit into a device: which keys to turn, and by how much."""

import math
import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import slackline as sl
from recipes import memory
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
    assert memory.say(turns, 100, 2**19).splitlines()[1:-1] == [
        "  a.b=2: 1.00 MiB, not enough alone",
        "  c=full: 2.00 MiB, not enough alone",
        "  mesh.fsdp=8, on 16 devices: at most 4.00 MiB, not enough alone",
        "  all of them on the devices there are: 512.00 KiB, not enough either",
    ]
    assert "not enough" not in memory.say([Turn("a.b", 2, 2**20, True)], 2**20, None)
    assert memory.say([], 100, None).startswith("No value of optimizer.accumulate, compute.remat")


@pytest.mark.parametrize("error", [ValueError("RESOURCE is fine"), RunError("stop"), KeyError("x")])
def test_errors_of_another_kind_pass(error):
    with pytest.raises(type(error)) as caught, memory.explained(None, None, CONSOLE):  # type: ignore[arg-type]
        raise error
    assert caught.value is error


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


@pytest.mark.slow
def test_the_command_line_says_what_to_turn_where_a_step_finds_no_memory(tmp_path):
    """XLA's own error: the scores of attention over half a million tokens."""
    long = ("--config.data.seq_len=524288", "--config.data.batch_size=16", "--config.mesh.fsdp=8")
    done = helpers.run_here(tmp_path, *long, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert re.search(r"^error: out of memory \(Out of memory allocating \d+ bytes\): a device needs", done.stderr)
    assert re.search(r"^  optimizer.accumulate=2: [\d.]+ TiB$", done.stderr, re.MULTILINE), done.stderr


@pytest.mark.slow
def test_an_allocation_that_fails_says_what_to_turn(tmp_path):
    """XLA's own error: a loss that sorts a TiB for each row."""

    def loss(params, batch, constrain):
        off_B = (params["w"].sum() - batch["y"]) ** 2
        vast = jnp.sort(jnp.broadcast_to(off_B[:, None, None], (*off_B.shape, 2**18, 2**20)), axis=-1)
        return vast[:, 0, 0].sum(), jnp.float32(len(off_B))

    data = {"y": np.zeros((64,), np.float32)}
    init = lambda key: {"w": jnp.zeros((4,), jnp.float32)}
    task = sl.Task(init, {"w": ("embed",)}, loss, lambda batch: np.float32(len(batch["y"])), data, data)
    with pytest.raises(RunError) as caught:
        sl.fit("tiny", task=task, mesh={"fsdp": 2}, workdir=tmp_path / "run")
    said = str(caught.value)
    assert re.match(r"out of memory \(Out of memory allocating \d+ bytes\): a device needs [\d.]+ TiB", said), said
    before, after = (
        float(x) for x in re.findall(r"([\d.]+) TiB \(state|accumulate=2: ([\d.]+) TiB", said)[0:2] for x in x if x
    )
    assert after < 0.6 * before
    assert "compute." not in said  # a task has none of these keys

"""Two TPU slices joined by a data-centre network, compiled without hardware: the bytes between them are those of the
closed form, and what should be hidden behind compute is."""

import re

import helpers
import jax
import pytest
from jax import lax

import recipes.build
from parallel.cost.bytes import exchange_bytes
from parallel.exchange.codecs import rounds
from parallel.layout import mesh as meshes
from parallel.strategies import local, overlap, stale
from recipes import programs

pytest.importorskip(
    "libtpu", reason="libtpu is not installed: pip install -r requirements-prove.txt on Python 3.12 or newer"
)
pytestmark = pytest.mark.prove
SIZES = {"replica": 2, "fsdp": 2, "tensor": 2}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """So that arrays are coded in several, as those of large models are."""
    monkeypatch.setattr(rounds, "PIECE", 2**15)


@pytest.fixture(scope="module")
def chips():
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x1", num_slices=2).devices


def build(chips, **overrides):
    """A million parameters and more: large enough that TPUs do not widen what is sent of an array. The plain attention,
    which compiles in a quarter of the kernel's time."""
    config = helpers.tiny(
        model__model_dim=256, model__head_dim=128, model__num_heads=4, model__num_kv_heads=2, model__mlp_dim=512,
        data__seq_len=256, data__batch_size=32, compute__attention="reference", **overrides,
    )  # fmt: skip
    return recipes.build.build(config, meshes.build(SIZES, chips))


def compiled(parts, name: str) -> str:
    step = jax.jit(
        parts.strategy.programs()[name],
        out_shardings=(programs.shardings_of(parts.state), None), donate_argnums=0,
    )  # fmt: skip
    return step.lower(parts.state, parts.batch).compile().as_text()


def test_stages_lie_over_slices_where_replicas_do_not(chips):
    """And nothing else of a replica but its weights does."""
    of = lambda sizes: meshes.build(sizes, chips).devices.reshape(2, -1)
    slices = lambda devices: [{chip.slice_index for chip in row} for row in devices]
    assert slices(of({"stage": 2, "tensor": 4})) == [{0}, {1}] == slices(of({"fsdp": 2, "tensor": 4}))
    with pytest.raises(ValueError, match="tensor 8 cannot be laid over 2 slices"):
        meshes.build({"tensor": 8}, chips)


OVERLAPPING: dict = {
    "stale": ("step", {"sync__strategy": "stale", "optimizer__accumulate": 4}),
    "stale, one micro-step": ("step", {"sync__strategy": "stale"}),
    "streaming": ("fragment", {"sync__strategy": "streaming", "sync__interval": 8, "sync__overlap": 4}),
    "streaming, one step": ("fragment", {"sync__strategy": "streaming", "sync__interval": 8, "sync__overlap": 1}),
    "eager": ("round", {"sync__strategy": "eager", "sync__interval": 4}),
}


def exposed(text: str) -> tuple[list[str], int]:
    """(transfers between slices, other than the named scalars, with no loop between send and recv-done; all of them).
    The program is a schedule: its lines run in their order. Its loops are those over layers and micro-steps; the
    exchange's own, over the pieces of an array, hide nothing."""
    assert "is_scheduled=true" in text.partition("\n")[0]
    entry = text[text.index("\nENTRY ") :].splitlines()
    place: dict[tuple[str, str], int] = {}
    loops, meeting_of = [], {}
    for number, line in enumerate(entry):
        if " while(" in line and "/exchange/" not in line:
            loops.append(number)
        elif match := re.search(r"%([\w.\-]+) = .* (send|recv)\(.*rendezvous=\"([^\"]+)\"", line):
            if "f32[1,1,128]" not in line:  # the scalars
                place[match[2], match[3]] = number
                meeting_of[match[1]] = match[3]
        elif (match := re.search(r" recv-done\(%([\w.\-]+)\)", line)) and match[1] in meeting_of:
            place["recv-done", meeting_of[match[1]]] = number
    meetings = set(meeting_of.values())
    hidden = lambda m: any(place["send", m] < loop < place["recv-done", m] for loop in loops)
    return sorted(m for m in meetings if not hidden(m)), len(meetings)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", OVERLAPPING)
def test_every_transfer_of_each_hop_runs_while_something_is_computed(chips, strategy, monkeypatch):
    name, options = OVERLAPPING[strategy]
    parts = build(chips, sync__codec="int8", sync__algorithm="two_stage", **options)
    text = compiled(parts, name)
    found, transfers = exposed(text)
    assert transfers >= 2 and not found  # all small messages in one transfer a hop
    assert helpers.exchanged(text, parts.mesh) == exchange_bytes(parts.strategy.exchange)
    # Without the barriers the compiler is free to wait for the first hop before it computes anything.
    for module in (stale, local, overlap):
        free = type("free", (), {**vars(lax), "optimization_barrier": staticmethod(lambda x: x)})
        monkeypatch.setattr(module, "lax", free)
    found, transfers = exposed(compiled(parts, name))
    assert len(found) >= transfers // 2, "are the barriers needed at all?"


@pytest.mark.slow
def test_diloco_sends_nothing_between_slices_but_at_its_exchange(chips):
    parts = build(chips, sync__strategy="diloco", sync__codec="int4", sync__interval=10)
    assert helpers.exchanged(compiled(parts, "inner"), parts.mesh) == {}
    assert helpers.exchanged(compiled(parts, "inner+exchange"), parts.mesh) == exchange_bytes(parts.strategy.exchange)

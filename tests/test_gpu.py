"""The train step compiled for H100s, on a machine without a GPU: what an exchange should hide behind is between its
messages' starts and their ends."""

from collections.abc import Callable
from typing import Any

import helpers
import pytest
from jax import lax

import recipes.build
from bench import aot
from parallel.cost import compilers, hardware, schedule, targets
from parallel.cost.bytes import exchange_bytes
from parallel.cost.hlo import Program
from parallel.layout import mesh as meshes
from parallel.strategies import local, overlap, stale
from recipes import programs

pytest.importorskip(
    "jax_cuda13_plugin", reason="the CUDA plugin is not installed: pip install -r requirements-prove.txt"
)
pytestmark = [pytest.mark.prove, pytest.mark.slow]
SIZES = {"replica": 2, "fsdp": 2, "tensor": 2}
OVERLAPPING: dict[str, tuple[str, dict[str, Any]]] = {
    "stale": ("step", {"sync__strategy": "stale", "optimizer__accumulate": 4}),
    "stale, one micro-step": ("step", {"sync__strategy": "stale"}),
    "streaming": ("fragment", {"sync__strategy": "streaming", "sync__interval": 8, "sync__overlap": 4}),
    "streaming, one step": ("fragment", {"sync__strategy": "streaming", "sync__interval": 8, "sync__overlap": 1}),
    "eager": ("round", {"sync__strategy": "eager", "sync__interval": 4}),
}


@pytest.fixture(scope="module")
def cards():
    target = targets.parse("h100:2x4", hardware.by_name(hardware.CHIPS))
    compilers.prepare(target.chip)
    return compilers.devices(target)


def build(cards, **overrides) -> Any:
    """Large enough that XLA gathers weights in loops of their own, and small enough to compile in seconds."""
    config = helpers.tiny(
        model__model_dim=512, model__head_dim=128, model__num_heads=4, model__num_kv_heads=2, model__mlp_dim=2048,
        model__num_layers=6, data__seq_len=256, data__batch_size=32, compute__attention="reference",
        compute__dtype="bfloat16", compute__remat="full", **overrides,
    )  # fmt: skip
    return recipes.build.build(config, meshes.build(SIZES, cards))


def compiled(parts, name: str) -> str:
    return programs.steps(parts)[name]().compile(compiler_options=parts.xla_options).as_text()


def exposed(text: str, mesh) -> tuple[list[str], int]:
    """(messages over `replica` with no matrix product between their start and their end; all of them)."""
    found, hidden = helpers.messages(text, mesh), schedule.hidden(Program.read(text))
    return [c.name for c in found if c.name not in hidden], len(found)


@pytest.mark.parametrize("strategy", OVERLAPPING)
def test_every_message_of_each_hop_stands_around_matrix_products(cards, strategy, monkeypatch):
    name, options = OVERLAPPING[strategy]
    parts = build(cards, sync__codec="int8", sync__algorithm="two_stage", **options)
    text = compiled(parts, name)
    found, messages = exposed(text, parts.mesh)
    assert messages >= 2 and not found
    assert helpers.exchanged(text, parts.mesh) == exchange_bytes(parts.strategy.exchange)
    # Without the option no loop over sharded layers may stand between; without the barriers nothing has to.
    default = recipes.build.dataclasses.replace(parts, xla_options={})
    assert len(exposed(compiled(default, name), parts.mesh)[0]) >= messages // 2, "is the option needed?"
    if strategy == "eager":
        return  # today's compiler hides it without the barriers, which it shares with streaming, too
    for module in (stale, local, overlap):
        free: Callable = type("free", (), {**vars(lax), "optimization_barrier": staticmethod(lambda x: x)})
        monkeypatch.setattr(module, "lax", free)
    assert len(exposed(compiled(parts, name), parts.mesh)[0]) >= messages // 2, "are the barriers needed?"


@pytest.mark.parametrize("row", [row for row in aot.ROWS if row.target.startswith("h100")], ids=lambda row: row.name)
def test_large_models_send_and_hold_no_more_than_their_bars(row):
    if not compilers.has_cudnn():
        pytest.skip("attention that holds its scores needs more: pip install --no-deps nvidia-cudnn-cu13")
    for step in aot.compiled(row)["programs"].values():
        assert not step["not_counted"] and step["float32"] <= aot.SMALL
        assert row.sent is None or round(step["sent"], 1) <= row.sent
        assert row.peak is None or round(step["peak"], 2) <= row.peak

"""How sequences that are cut over mesh.context attend: `attention.context`. `auto` is heads, whose whole sequences a
fused kernel takes, where there are heads enough; else the ring, which holds one device's keys beside its own and sends
the next while it computes."""

from collections.abc import Mapping
from typing import Any

from model import fused
from parallel.cost.context import Cut
from parallel.layout import ring
from parallel.layout.mesh import cut
from parallel.layout.ring import WAYS
from recipes import pipeline
from runtime.config import UsageError, nearest_multiples
from runtime.console import human_bytes

HEADS = "heads"
PLAIN = "reference"  # of compute.attention


def choose(c: Any, sizes: Mapping[str, int], itemsize: int) -> tuple[str, str]:
    """(way, why that one); ("", "") where sequences are whole. sizes: of the mesh. Raises UsageError."""
    if cut("positions", sizes)[1] == 1:
        return "", ""
    asked, reasons = c.attention.context, {way: unfit(way, c, sizes) for way in (HEADS, *WAYS)}
    fit = {way: described(c, sizes, itemsize).sent(way) for way, reason in reasons.items() if not reason}
    if asked == "auto" and not fit:
        raise UsageError(f"mesh.context={sizes['context']}: {reasons[HEADS]}; and {reasons['ring']}")
    way = next(iter(fit)) if asked == "auto" else asked
    if reasons[way]:
        raise UsageError(f"attention.context={way}: {reasons[way]}")
    sent = ", ".join(f"{name} {human_bytes(size)}" for name, size in fit.items())
    auto = ", by auto" if asked == "auto" else ""
    return way, f"over mesh.context {way}{auto} (a layer sends, in a micro-step: {sent})"


def kernel(c: Any, way: str, sizes: Mapping[str, int]) -> tuple[str, int]:
    """(what is asked for of compute.attention, positions that it sees at a time). Raises UsageError."""
    if way not in WAYS:
        return c.compute.attention, c.data.seq_len
    asked = c.compute.attention
    if c.data.document_mask or c.model.sliding_window:
        if asked not in ("auto", PLAIN):
            raise UsageError(
                f"compute.attention={asked} with attention.context={way}: documents and windows are hidden by plain "
                "products there: set compute.attention=auto, or attention.context=heads"
            )
        asked = PLAIN
    return asked, c.data.seq_len // (2 * cut("positions", sizes)[1])


def check_products(parts: Any) -> None:
    """Raises UsageError where the fused kernel of a ring finds something else than plain products do. Before a run."""
    model, device = getattr(parts.task, "model", None), parts.mesh.devices.flat[0]
    if model is None or device.platform == "cpu" or model.compute.context not in WAYS:
        return
    net, name, dtype = model.config, model.compute.attention, model.compute.dtype
    if wrong := fused.check(name, net.num_heads, net.num_kv_heads, net.head_dim, dtype, ring.Side):
        raise UsageError(
            f"compute.attention={name} with attention.context={model.compute.context}: {wrong} on this device, by this "
            f"version of JAX. Set compute.attention={PLAIN}, or attention.context={HEADS}"
        )


def unfit(way: str, c: Any, sizes: Mapping[str, int]) -> str:
    """Why a way cannot be taken; "": it can."""
    over, count = cut("positions", sizes)
    if way != HEADS:
        nearest = nearest_multiples(c.data.seq_len, 2 * count)
        said = f"data.seq_len={c.data.seq_len} cannot be cut into 2 × {over} = {2 * count} pieces. Nearest legal sizes:"
        return f"{said} {nearest}" if c.data.seq_len % (2 * count) else ""
    for key in ("num_heads", "num_kv_heads"):
        parts = count * sizes["tensor"]
        if c.model[key] % parts:
            return f"model.{key}={c.model[key]} cannot be cut over {over} × mesh.tensor = {parts}"
    return ""


def rows(c: Any, parts: Any) -> list[tuple[str, str]]:
    """Of the start-up table."""
    sizes = parts.mesh.shape
    if cut("positions", sizes)[1] == 1:
        return []
    way, size = parts.task.model.compute.context, human_bytes(sent(c, parts))
    return [("ring", f"{way}: {size} sent by attention over mesh.context in a step, predicted")]


def sent(c: Any, parts: Any) -> int:
    """Bytes of a step. A pipeline's stages attend in every tick."""
    sizes, compute = parts.mesh.shape, parts.task.model.compute
    cut, way = described(c, sizes, compute.dtype.itemsize, compute.attention == "cudnn"), compute.context
    own = (cut.sent(way) + cut.forward(way) * pipeline.sends_again(c, sizes)) * pipeline.turns(c, sizes)
    return own + cut.sent(way) * c.model.dense_layers * pipeline.slots(c, sizes)


def described(c: Any, sizes: Mapping[str, int], itemsize: int, as_made: bool = False) -> Cut:
    """A layer's attention on one device, of all its replicas. as_made: as Cut has it."""
    heads, kv_heads = (c.model[key] // sizes["tensor"] for key in ("num_heads", "num_kv_heads"))
    return Cut(
        pipeline.tokens(c, sizes), heads, kv_heads, c.model.head_dim, itemsize, sizes["context"], c.compute.remat,
        as_made,
    )  # fmt: skip

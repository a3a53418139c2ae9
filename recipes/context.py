"""How sequences that are cut over mesh.context attend: `attention.context`. `auto` is heads, whose whole sequences a
fused kernel takes, where there are heads enough; else the ring, which holds one device's keys beside its own and sends
the next while it computes."""

from collections.abc import Mapping
from typing import Any

from parallel.cost.context import Cut
from parallel.layout.mesh import cut
from parallel.layout.ring import WAYS
from runtime.config import UsageError, nearest_multiples
from runtime.console import human_bytes

HEADS = "heads"
PLAIN = "reference"  # of compute.attention: what the others are made of, so far


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
    if way != HEADS and c.compute.attention not in ("auto", PLAIN):
        raise UsageError(
            f"compute.attention={c.compute.attention} with attention.context={way}, which is made of plain products, "
            "so far: set attention.context=heads, or compute.attention=auto"
        )
    sent = ", ".join(f"{name} {human_bytes(size)}" for name, size in fit.items())
    auto = ", by auto" if asked == "auto" else ""
    return way, f"over mesh.context {way}{auto} (a layer sends, in a micro-step: {sent})"


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


def described(c: Any, sizes: Mapping[str, int], itemsize: int) -> Cut:
    """A layer's attention on one device."""
    rows = c.data.batch_size // ((c.sync.replicas or sizes["replica"]) * sizes["fsdp"] * c.optimizer.accumulate)
    tokens = max(rows, 1) * c.data.seq_len // sizes["context"]
    heads, kv_heads = (c.model[key] // sizes["tensor"] for key in ("num_heads", "num_kv_heads"))
    return Cut(tokens, heads, kv_heads, c.model.head_dim, itemsize, sizes["context"], c.compute.remat)

"""Experts: what config c makes of them, what cannot be, and how tokens come to them (parallel/layout/experts.py)."""

import re
from collections.abc import Mapping
from typing import Any

from parallel.cost.experts import Routed
from parallel.layout.axes import EXPERT
from parallel.layout.experts import MOSAIC_STEP, WORST
from parallel.layout.mesh import cut, legal
from recipes import pipeline
from runtime.config import UsageError, nearest_multiples
from runtime.console import human_bytes

KEYS = (  # of model.*
    *("experts", "experts_per_token", "shared_experts", "router", "normalise_gates", "balance"),
    *("dense_layers", "dense_dim"),
)

HOPPER = r"\bH[12]00\b"  # in the kind of a device
MANY = 0.05  # of what tokens choose, dropped


def of(c: Any) -> Any:
    """model/moe.py's Moe, None without experts."""
    if not c.model.experts:
        return None
    from model.moe import Moe  # which a model without them does not read

    return Moe(*(c.model[key] for key in KEYS))


def dispatch(c: Any, device_kind: str) -> tuple[str, str]:
    """(moe.dispatch, moe.rows). Raises UsageError. device_kind: of the chip."""
    if not c.model.experts:
        return "", ""
    is_gpu = device_kind != "cpu" and "TPU" not in device_kind
    if c.moe.dispatch == "grouped" and is_gpu:
        raise UsageError(
            "moe.dispatch=grouped on a GPU: XLA makes one dense product over all experts of it there: set "
            "moe.dispatch=capacity"
        )
    if c.moe.dispatch == "mosaic" and not re.search(HOPPER, device_kind):
        raise UsageError(
            f"moe.dispatch=mosaic on {device_kind}: its kernels are for Hopper chips (H100, H200): set "
            "moe.dispatch=auto"
        )
    if c.moe.dispatch == "mosaic" and c.compute.dtype == "float32":
        raise UsageError("moe.dispatch=mosaic with compute.dtype=float32: its kernels take bfloat16, which auto is")
    auto = "capacity" if is_gpu else "grouped"
    return auto if c.moe.dispatch == "auto" else c.moe.dispatch, c.moe.rows


def check(c: Any, sizes: Mapping[str, int]) -> None:
    """Raises UsageError. sizes: of the mesh."""
    count = sizes[EXPERT]
    if count > 1 and not c.model.experts:
        raise UsageError(f"mesh.{EXPERT}={count}: this model has no experts (model.experts=0): use mesh.fsdp")
    if c.model.experts % count:
        said = legal(c.model.experts, f"mesh.{EXPERT}", count)
        raise UsageError(f"model.experts={c.model.experts} cannot be cut over mesh.{EXPERT}={count}. {said}")
    if c.model.experts and c.moe.dispatch == "mosaic":
        _check_features(c, sizes)
    if c.model.experts and c.pipeline.gather == "step":
        raise UsageError("pipeline.gather=step with model.experts: they are gathered in every tick: leave it out")


def _check_features(c: Any, sizes: Mapping[str, int]) -> None:
    """Of Mosaic's kernels."""
    key, parts = cut("mlp", sizes)
    for name, size, unit in (
        ("model.model_dim", c.model.model_dim, MOSAIC_STEP),
        ("model.mlp_dim", c.model.mlp_dim, MOSAIC_STEP * parts),
    ):
        if size % unit:
            over = f" over {key}={parts}" * (unit > MOSAIC_STEP)
            raise UsageError(
                f"moe.dispatch=mosaic with {name}={size}{over}: its kernels take multiples of {unit}: set "
                f"{nearest_multiples(size, unit)}, or moe.dispatch=capacity"
            )


def notable(moe: Any, layers: int, rows: str, means: Mapping[str, float]) -> str:
    """Of the metrics' means over some steps. moe: model/moe.py's."""
    said, fullest = [], means["expert_load_max"]
    if (idle := means["experts_idle"]) >= 1:
        said.append(f"{idle:.1f} of {layers} × {moe.experts} experts get no token: balance them more")
    if fullest >= max(2.0, moe.experts / moe.chosen / 2):
        said.append(f"a layer's fullest expert has {fullest:.1f} times the mean: balance them more")
    if means["tokens_dropped"] >= MANY:
        dropped = f"{means['tokens_dropped']:.0%} of what tokens choose finds no room"
        said.append(f"{dropped} (moe.rows={rows}), and is left out: raise moe.rows, or balance more")
    return "; ".join(said)


def rows(c: Any, parts: Any) -> list[tuple[str, str]]:
    """Of the start-up table."""
    if not c.model.experts:
        return []
    own = described(c, parts.mesh.shape, parts.task.model.compute)
    kind = "" if c.model.balance == "none" else f", balanced by a {c.model.balance}"
    kind += " that is not trained" * (c.model.balance == "bias" and c.lora.rank > 0)
    shared = f", {c.model.shared_experts} for all" if c.model.shared_experts else ""
    if dense := c.model.dense_layers:
        shared += f", {dense} layer{'s' * (dense > 1)} before without"
    way = own.way + ", whose values no chip has checked" * (own.way == "mosaic")
    found = [("experts", f"{own.experts}, {own.chosen} of a token{shared}{kind}; {way}")]
    if own.count > 1:
        over = f"mesh.{EXPERT}={own.count}: {human_bytes(sent(c, parts))} sent for them in a step, predicted"
        found.append(("", over))
    is_bound = own.rows != WORST and (own.count > 1 or own.way == "capacity")
    room = f"room for {own.rows} × an even load (moe.rows); what finds none is dropped, and counted"
    return [*found, ("", room if is_bound else "none is ever dropped")]


def sent(c: Any, parts: Any) -> int:
    """Bytes of a step. A pipeline's stages send in every tick."""
    sizes = parts.mesh.shape
    own = described(c, sizes, parts.task.model.compute)
    return (own.sent + own.forward * pipeline.sends_again(c, sizes)) * pipeline.turns(c, sizes)


def described(c: Any, sizes: Mapping[str, int], compute: Any) -> Routed:
    """A layer's experts on one device, of all its replicas."""
    m, (way, rows), tokens = c.model, compute.dispatch, pipeline.tokens(c, sizes)
    size = compute.dtype.itemsize
    return Routed(tokens, m.model_dim, m.experts_per_token, m.experts, size, sizes[EXPERT], way, rows, compute.remat)

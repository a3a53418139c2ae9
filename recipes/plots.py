"""The pictures of a comparison, from the rows of its table: losses over steps and over bytes, and how busy a model of
10 B parameters would be. A panel has the first row and a group of others, in the same colours in all pictures."""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from parallel.cost.utilisation import GRID, WORKLOADS, Method, utilisation

MOST = 7  # rows of a panel, besides the first of all
FEW = 12  # points of a line that has fewer are marked
PANEL, NAMES, MARGIN, ABOVE, TOP = (600, 330), 340, 80, 92, 30  # pixels: of the axes, beside, between, above, of all
FOOT = 52
DPI, LINE, LETTERS = 100, 14, 41  # LINE: pixels between names; LETTERS: of a name
INK, MUTED = "#1f2430", "#6b7280"
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#6f4bb8")  # one for each row of a panel


class Curve(NamedTuple):
    """low, high: of the band; None: there is none."""

    x: Any
    y: Any
    low: Any = None
    high: Any = None


Rows = list[dict[str, Any]]


def draw(rows: Rows, folder: Path, of_text: bool) -> None:
    """loss_steps.png, loss_bytes.png, utilisation.png in this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    band = (
        "Mean of the seeds; the band is from the lowest to the highest. ↑ here a line leaves the frame; × it ends early"
    )
    limits = _loss_limits(rows)

    def sent(row: dict[str, Any]) -> Curve:
        found = _loss(row)
        return found._replace(x=found.x * row["wire_bytes_per_step"] / 2**20)

    loss = {"ylabel": "held-out loss" + ", nats per token" * of_text, "ylim": limits}
    picture(rows, _loss, "Loss against steps", band, xlabel="steps", **loss).savefig(folder / "loss_steps.png")
    title, label = "Loss against bytes over the slow link", "MiB sent by one replica"
    picture(rows, sent, title, band, xlabel=label, xscale="log", **loss).savefig(folder / "loss_bytes.png")
    title = "Share of the time spent computing, 10 B parameters, 0.8 s a step"
    axes = {"xlabel": "Gbit/s of the slow link", "xscale": "log", "ylabel": "computing, %", "ylim": (0, 103)}
    picture(rows, _busy, title, "Simulated, without latency", **axes).savefig(folder / "utilisation.png")


def _loss(row: dict[str, Any]) -> Curve:
    losses_SN = np.asarray(row["eval_losses"], float)
    return Curve(np.asarray(row["steps"], float), losses_SN.mean(0), losses_SN.min(0), losses_SN.max(0))


def _busy(row: dict[str, Any]) -> Curve:
    return Curve(np.asarray(GRID), 100 * np.asarray(utilisation(WORKLOADS["10B"], Method(**row["method"]), GRID)))


def _loss_limits(rows: Rows) -> tuple[float, float]:
    """Of all panels. Rows that end far above the others, and the beginning of all, leave the frame."""
    found = [_loss(row) for row in rows]
    means = [y for y in (c.y[np.isfinite(c.y)] for c in found) if len(y)]
    if not means:
        return 0.0, 1.0
    low, ends = min(np.nanmin(c.low) for c in found if np.isfinite(c.low).any()), [float(y[-1]) for y in means]
    near = [y for y, end in zip(means, ends, strict=True) if end - low <= 4 * (np.median(ends) - low) + 0.4]
    high = max(float(y[len(y) // 4]) for y in near)
    pad = 0.05 * (high - low) or 0.1
    return low - pad, high + pad


# ── panels ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def groups(rows: Rows) -> list[Rows]:
    """Of the rows after the first: neighbours of one strategy, in groups of at most MOST that are about as large."""
    parts = []
    for _, found in itertools.groupby(rows[1:], key=_strategy):
        same = list(found)
        parts += [[same[i] for i in part] for part in np.array_split(np.arange(len(same)), math.ceil(len(same) / MOST))]
    merged: list[Rows] = []
    for part in parts:
        if merged and len(merged[-1]) + len(part) <= MOST:
            merged[-1] = merged[-1] + part
        else:
            merged.append(part)
    return merged or [[]]


def picture(rows: Rows, curve_of: Callable[[dict], Curve], title: str, note: str, **axes_options: Any) -> Any:
    """A figure with a panel for each group, and the names of all lines at their ends."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # a second to import, only needed here
    from matplotlib.figure import Figure

    parts = groups(rows)
    columns = min(2, len(parts))
    lines = math.ceil(len(parts) / columns)
    one_width, one_height = MARGIN + PANEL[0] + NAMES, ABOVE + PANEL[1]
    width, height = columns * one_width, TOP + lines * one_height + FOOT
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    FigureCanvasAgg(figure)
    place: Any = {"ha": "left", "va": "top", "color": INK}
    figure.text(14 / width, 1 - 12 / height, title, fontsize=15, fontweight="bold", **place)
    figure.text(14 / width, 1 - 42 / height, note, fontsize=10, **place | {"color": MUTED})
    curves = [[curve_of(row) for row in (rows[0], *part)] for part in parts]
    shared = axes_options | {"xlim": _range([c.x for found in curves for c in found], axes_options.get("xscale"))}
    for i, (part, found) in enumerate(zip(parts, curves, strict=True)):
        left, bottom = MARGIN + i % columns * one_width, FOOT + (lines - 1 - i // columns) * one_height
        axes = figure.add_axes((left / width, bottom / height, PANEL[0] / width, PANEL[1] / height))
        axes.set(**shared)
        axes.grid(color="#e5e7eb")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        named = dict.fromkeys(_strategy(row) for row in part)
        axes.set_title(", ".join(filter(None, named)), loc="left", fontsize=11, color=INK, pad=18)
        _panel(axes, [rows[0]["name"], *(row["name"] for row in part)], found)
    return figure


def _strategy(row: dict[str, Any]) -> str:
    return row.get("config", {}).get("sync.strategy", "")


def _range(xs: Sequence[Any], scale: str | None) -> tuple[float, float]:
    x = np.concatenate([np.asarray(each, float) for each in xs])
    x = x[np.isfinite(x) & ((x > 0) | (scale != "log"))]
    low, high = (float(x.min()), float(x.max())) if len(x) else (1.0, 2.0)
    if scale == "log":
        return low / 1.1, high * 1.1
    pad = 0.02 * (high - low) or 1.0
    return low - pad, high + pad


def _panel(axes: Any, names: Sequence[str], curves: Sequence[Curve]) -> None:
    ends = []
    for i, (name, c) in reversed([*enumerate(zip(names, curves, strict=True))]):  # the first row above the others
        name = name if len(name) <= LETTERS else name[: LETTERS - 1] + "…"
        color = INK if i == 0 else COLORS[(i - 1) % len(COLORS)]
        mark = {"marker": "o", "markersize": 3.5} if len(c.x) < FEW else {}
        axes.plot(c.x, c.y, color=color, linewidth=2.4 if i == 0 else 1.4, **mark)
        if c.low is not None:
            axes.fill_between(c.x, c.low, c.high, color=color, alpha=0.13, linewidth=0)
        for x in _leaves(axes, c):
            axes.text(x, 1.005, "↑", color=color, transform=axes.get_xaxis_transform(), ha="center", va="bottom")
        known = np.flatnonzero(np.isfinite(c.y))
        if not len(known):
            ends.append((f"{name}: NaN", color, None, None))
            continue
        x, y = float(c.x[known[-1]]), float(c.y[known[-1]])
        if known[-1] < len(c.y) - 1:
            axes.plot(x, min(y, axes.get_ylim()[1]), color=color, marker="x", markersize=9, markeredgewidth=2)
        ends.append((f"{name} ↑" if y > axes.get_ylim()[1] else name, color, x, y))
    _name(axes, ends)


def _leaves(axes: Any, c: Curve) -> Iterator[float]:
    """Where the line crosses the upper end of the frame."""
    top, place = axes.get_ylim()[1], np.log if axes.get_xscale() == "log" else np.asarray
    for (x0, y0), (x1, y1) in itertools.pairwise(zip(c.x, c.y, strict=True)):
        if (y0 > top) != (y1 > top) and np.isfinite([y0, y1]).all():
            u0, u1 = place(np.maximum([x0, x1], 1e-9))
            u = u0 + (u1 - u0) * (top - y0) / (y1 - y0)
            yield float(np.exp(u)) if axes.get_xscale() == "log" else float(u)
    inside = [y <= top for y in c.y if np.isfinite(y)]
    if inside and not any(inside):  # not to be seen at all
        yield float(c.x[np.flatnonzero(np.isfinite(c.y))[-1]])


def _name(axes: Any, ends: Sequence[tuple[str, str, float | None, float | None]]) -> None:
    """Writes the names beside the frame, as high as the lines end, pushed apart; with a dotted line to each end."""
    width, height = PANEL
    high = axes.get_ylim()[1]
    fraction = lambda x, y: axes.transAxes.inverted().transform(axes.transData.transform((x, y)))
    at = [fraction(x, min(y, high)) if x is not None else (1.0, 1.0) for _, _, x, y in ends]
    order = sorted(range(len(ends)), key=lambda i: at[i][1])
    heights = apart([at[i][1] * height for i in order], LINE, height)
    for i, y in zip(order, heights, strict=True):
        name, color, x, _ = ends[i]
        options = {"color": color, "fontsize": 8.5, "va": "center", "transform": axes.transAxes}
        axes.text(1 + 16 / width, y / height, name, **options)
        if x is not None:
            to = {"transform": axes.transAxes, "clip_on": False, "color": color}
            axes.plot([at[i][0], 1 + 13 / width], [at[i][1], y / height], **to, linewidth=0.8, linestyle=":", alpha=0.7)


def apart(wanted: Sequence[float], gap: float, most: float) -> list[float]:
    """Ascending places, at least `gap` from each other, near the wanted ones, which ascend; none above `most`."""
    found: list[float] = []
    for place in wanted:
        found.append(max(place, found[-1] + gap) if found else place)
    for i in reversed(range(len(found))):
        found[i] = min(found[i], most)
        most = found[i] - gap
    return found

"""The laboratory's pictures: losses over simulated time, how stale pushes were, and the way of two weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from islands.laboratory import Outcome
from islands.toys import Textbook
from runtime.config import UsageError
from runtime.plot import GRID, INK, LABEL, MUTED

COLORS = ("#1f2430", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#b8860b", "#6f4bb8", "#56b4e9")
BINS = 20
Outcomes = Mapping[str, Sequence[Outcome]]


def losses(outcomes: Outcomes, path: Path) -> None:
    """Over simulated seconds: the mean of the seeds, in a band from the lowest to the highest."""
    figure, (axes,) = _figure(1, "Loss over simulated time")
    curves = {name: np.array([each.losses for each in found]) for name, found in outcomes.items()}
    for color, (name, y_SN) in zip(_colors(len(curves)), curves.items(), strict=True):
        x = outcomes[name][0].times
        axes.plot(x, y_SN.mean(axis=0), color=color, linewidth=1.8, label=name)
        axes.fill_between(x, y_SN.min(axis=0), y_SN.max(axis=0), color=color, alpha=0.13, linewidth=0)
    finite = np.concatenate([y.reshape(-1) for y in curves.values()])
    finite = finite[np.isfinite(finite)]
    start = max(float(np.nanmax(y[:, 0])) for y in curves.values())
    if len(finite):  # what diverges leaves the frame
        low = float(finite.min())
        axes.set_ylim(low - 0.04 * (start - low), start * 1.05)
    axes.set_xlabel("seconds of the laboratory's clock", **LABEL)
    axes.set_ylabel("loss of what is held out", **LABEL)
    _legend(axes)
    _save(figure, path)


def staleness(outcomes: Outcomes, path: Path) -> None:
    """How many pushes of others were folded between the beginning and the end of a round."""
    figure, (axes,) = _figure(1, "Staleness of pushes")
    stale = {name: np.array([x for each in found for x in each.staleness]) for name, found in outcomes.items()}
    last = max((int(x.max()) for x in stale.values() if len(x)), default=0)
    step = -(-(last + 1) // BINS)
    edges = np.arange(0, last + 1 + step, step) - 0.5
    wide = step * 0.8 / len(stale)  # bars of one bin stand side by side
    for i, (color, (name, x)) in enumerate(zip(_colors(len(stale)), stale.items(), strict=True)):
        share = np.histogram(x, edges)[0] / max(1, len(x)) * 100
        left = (edges[:-1] + edges[1:]) / 2 + (i - len(stale) / 2) * wide
        axes.bar(left, share, wide, align="edge", color=color, label=name)
    axes.set_xlabel("pushes folded since its round began", **LABEL)
    axes.set_ylabel("pushes, %", **LABEL)
    _legend(axes)
    _save(figure, path)


def paths(task: Textbook, found: Mapping[str, np.ndarray], path: Path) -> None:
    """Of each scheme a panel: the loss as contours, the weights after each push, the optimum as a cross."""
    figure, panels = _figure(len(found), "The way of two weights to the optimum")
    optimum = task.optimum()
    points = np.concatenate([*found.values(), optimum[None]])
    low, high = points.min(axis=0), points.max(axis=0)
    pad = 0.08 * (high - low)
    x, y = (np.linspace(a, b, 80) for a, b in zip(low - pad, high + pad, strict=True))
    grid = np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2).astype(np.float32)
    z = task.losses(grid).reshape(80, 80)
    levels = z.min() + (z.max() - z.min()) * np.linspace(0, 1, 18) ** 2
    for axes, color, (name, w_N2) in zip(panels, _colors(len(found)), found.items(), strict=True):
        axes.contour(x, y, z, levels=levels, colors=GRID, linewidths=0.9)
        axes.plot(w_N2[:, 0], w_N2[:, 1], color=color, linewidth=0.9)
        axes.plot(*optimum, marker="x", color="#dc2626", markersize=10, markeredgewidth=2.2)
        axes.set_title(f"{name}: {len(w_N2):,} pushes", loc="left", fontsize=11, color=INK)
        axes.set_xlabel("first weight", **LABEL)
    panels[0].set_ylabel("second weight", **LABEL)
    _save(figure, path)


def _figure(panels: int, title: str) -> tuple[Any, Sequence[Any]]:
    try:  # here and not above: slow to import, and only the end of a run needs it
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("pictures need matplotlib, which is not installed: pip install -r requirements.txt") from error

    figure = Figure(figsize=(max(10, 4.5 * panels), 6), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", w_pad=0.14, h_pad=0.1)
    figure.suptitle(title, x=0.02, ha="left", fontsize=15, fontweight="bold", color=INK)
    found = figure.subplots(1, panels, sharex=True, sharey=True, squeeze=False)[0]
    for axes in found:
        axes.grid(True, color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=MUTED, labelsize=10.5, length=0)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, found


def _colors(count: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]


def _legend(axes: Any) -> None:
    axes.legend(fontsize=11, frameon=False, labelcolor=INK)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, format="png")

"""The laboratory's pictures: losses over simulated time, how stale pushes were, what islands were at, the way of two
weights."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from islands.laboratory import Measured
from islands.toys import Textbook
from runtime.config import UsageError
from runtime.plot import GRID, INK, LABEL, MUTED

COLORS = ("#1f2430", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#b8860b", "#6f4bb8", "#56b4e9")
BINS = 20
SPELLS = {"steps that count": "#0072b2", "steps not pushed": "#d55e00", "link": "#b8860b", "away": "#d1d5db"}
Outcomes = Mapping[str, Sequence[Measured]]  # by scheme, of each seed
Panels = Mapping[str, Outcomes]  # by title, side by side


def losses(panels: Panels, path: Path) -> None:
    """Over simulated seconds: the mean of the seeds, in a band from the lowest to the highest."""
    figure, found = _figure(len(panels), "Loss over simulated time")
    tops, lows, colors = [], [], _by_name(panels)
    for axes, (title, outcomes) in zip(found, panels.items(), strict=True):
        curves = {name: np.array([each.losses for each in runs]) for name, runs in outcomes.items()}
        for name, y_SN in curves.items():
            x, color = outcomes[name][0].times, colors[name]
            axes.plot(x, y_SN.mean(axis=0), color=color, linewidth=1.8, label=name)
            axes.fill_between(x, y_SN.min(axis=0), y_SN.max(axis=0), color=color, alpha=0.13, linewidth=0)
        lows += [float(y[np.isfinite(y)].min()) for y in curves.values() if np.isfinite(y).any()]
        tops += [float(np.nanmax(y[:, 0])) for y in curves.values()]
        axes.set_title(title, loc="left", fontsize=11, color=INK)
        axes.set_xlabel("seconds of the laboratory's clock", **LABEL)
        _legend(axes)
    if lows:  # what diverges leaves the frame
        found[0].set_ylim(min(lows) - 0.04 * (max(tops) - min(lows)), max(tops) * 1.05)
    found[0].set_ylabel("loss of what is held out", **LABEL)
    _save(figure, path)


def staleness(panels: Panels, path: Path) -> None:
    """How many pushes of others were folded between the beginning and the end of a round."""
    figure, found = _figure(len(panels), "Staleness of pushes", one_scale=False)
    colors = _by_name(panels)
    for axes, (title, outcomes) in zip(found, panels.items(), strict=True):
        stale = {name: np.array([x for each in runs for x in each.staleness]) for name, runs in outcomes.items()}
        last = max((int(x.max()) for x in stale.values() if len(x)), default=0)
        step = -(-(last + 1) // BINS)
        edges = np.arange(0, last + 1 + step, step) - 0.5
        wide = step * 0.8 / len(stale)  # bars of one bin stand side by side
        for i, (name, x) in enumerate(stale.items()):
            share = np.histogram(x, edges)[0] / max(1, len(x)) * 100
            left = (edges[:-1] + edges[1:]) / 2 + (i - len(stale) / 2) * wide
            axes.bar(left, share, wide, align="edge", color=colors[name], label=name)
        axes.set_title(title, loc="left", fontsize=11, color=INK)
        axes.set_xlabel("pushes folded since its round began", **LABEL)
    found[0].set_ylabel("pushes, %", **LABEL)
    _shared_legend(figure, found, "outside lower center", 4)
    _save(figure, path)


def times(rows: Mapping[str, tuple[Measured, int]], path: Path) -> None:
    """What each island was at, and when, of one run of each row: (run, number of islands)."""
    figure, found = _figure(1, "What islands were at", len(rows))
    for axes, (title, (run, islands)) in zip(found, rows.items(), strict=True):
        spells: dict[str, list[tuple[int, float, float]]] = {kind: [] for kind in SPELLS}
        spells["away"] = list(run.away)
        for each in run.rounds:
            spells["link"] += [(each.island, each.began, each.first), (each.island, each.last, each.ended)]
            spells["steps that count" if each.counts else "steps not pushed"] += [(each.island, each.first, each.last)]
        for kind, color in SPELLS.items():
            at = [(island, a, b) for island, a, b in spells[kind] if b > a]
            if at:
                y, left, right = np.array(at, float).T
                axes.barh(y, right - left, 0.72, left, color=color, edgecolor="white", linewidth=0.4, label=kind)
        axes.set_title(title, loc="left", fontsize=11, color=INK)
        axes.set_yticks(range(islands), [f"island-{i}" for i in range(islands)])
        axes.set_ylim(islands - 0.5, -0.5)
        axes.set_xlim(0, run.times[-1])
        axes.grid(False)
    found[-1].set_xlabel("seconds of the laboratory's clock; white: it waits for others", **LABEL)
    _shared_legend(figure, found, "outside upper right", len(SPELLS))
    _save(figure, path)


def paths(task: Textbook, found: Mapping[str, np.ndarray], path: Path) -> None:
    """Of each scheme a panel: the loss as contours, the weights after each push, the optimum as a cross."""
    figure, panels = _figure(len(found), "The way of two weights to the optimum", wide=4.5)
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


def _figure(
    panels: int, title: str, rows: int = 1, wide: float = 6.5, one_scale: bool = True
) -> tuple[Any, Sequence[Any]]:
    try:  # here and not above: slow to import, and only the end of a run needs it
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("pictures need matplotlib, which is not installed: pip install -r requirements.txt") from error

    height = 6 if rows == 1 else 1.4 + 1.05 * rows
    figure = Figure(figsize=(max(10, wide * panels), height), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", w_pad=0.14, h_pad=0.1)
    figure.suptitle(title, x=0.02, ha="left", fontsize=15, fontweight="bold", color=INK)
    found = figure.subplots(rows, panels, sharex=one_scale, sharey=True, squeeze=False).reshape(-1).tolist()
    for axes in found:
        axes.grid(True, color=GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=MUTED, labelsize=10.5, length=0)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, found


def _by_name(panels: Panels) -> dict[str, str]:
    """A scheme has its color in all panels."""
    names = list(dict.fromkeys(name for outcomes in panels.values() for name in outcomes))
    return dict(zip(names, _colors(len(names)), strict=True))


def _colors(count: int) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(count)]


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, format="png")


def _legend(axes: Any) -> None:
    axes.legend(loc="upper right", fontsize=11, frameon=False, labelcolor=INK)


def _shared_legend(figure: Any, found: Sequence[Any], where: str, ncols: int) -> None:
    """One for all panels, beside them, where it hides nothing."""
    named = {kind: each for axes in found for each, kind in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc=where, ncols=ncols, fontsize=11, frameon=False, labelcolor=INK)

"""Draws the loss curve of a run from the rows of its metrics.jsonl."""

from pathlib import Path
from typing import Any

import numpy as np

INK, MUTED, GRID = "#1f2430", "#6b7280", "#e5e7eb"
TRAIN, RAW, EVAL, LR, SKIPPED = "#1d4ed8", "#93b4f5", "#d97706", "#0f766e", "#dc2626"
LABEL: dict[str, Any] = {"fontsize": 12, "color": INK}
BASELINES = ("#7c3aed", "#0891b2", "#be185d", "#4d7c0f")


def plot_loss(rows: list[dict], path: Path, title: str, baselines: dict[str, float] | None = None) -> None:
    """Writes `draw_loss` as a PNG."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    draw_loss(rows, title, baselines).savefig(path, format="png")


def draw_loss(rows: list[dict], title: str, baselines: dict[str, float] | None = None) -> Any:
    """A figure of 1200x700: train and eval loss with `baselines` (name -> nats per token), the learning rate below if
    the rows have one.

    A row may have loss, lr, eval_loss and skipped (updates skipped so far, so a red tick stands where it grows).
    Values that are missing or null are gaps.
    """
    # Here and not above: matplotlib is slow to import, and only the end of a run needs it. Figure with the Agg
    # canvas instead of pyplot: no display, no window, no global list of figures.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    figure.set_layout_engine("constrained", w_pad=0.14, h_pad=0.1)
    ratios = (5, 1) if any("lr" in row for row in rows) else (1,)
    loss_axes, *lr_axes = figure.subplots(len(ratios), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
    loss_axes.set_title(title, loc="left", fontsize=15, fontweight="bold", color=INK, pad=36, wrap=True)
    top = _draw_losses(loss_axes, rows)
    _draw_skipped(loss_axes, rows)
    _limit(loss_axes, rows, baselines or {}, top)
    _draw_baselines(loss_axes, baselines or {})
    for axes in lr_axes:
        _draw_learning_rate(axes, rows)
    all_axes = (loss_axes, *lr_axes)
    loss_axes.set_ylabel("loss (nats per token)" if any("tokens" in row for row in rows) else "loss", **LABEL)
    for axes in all_axes:
        _tidy(axes)
    all_axes[-1].set_xlabel("step", **LABEL)
    if loss_axes.get_legend_handles_labels()[0]:  # above the frame: inside it would cover a curve or a baseline
        place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.4, "ncols": 4}
        loss_axes.legend(**place, fontsize=11, frameon=False, labelcolor=INK, borderpad=0, handlelength=1.8)
    return figure


def smooth(steps: np.ndarray, values: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Centred running median over `width` rows, fewer at the ends, at no more points than the picture has pixels.

    A median and not a mean: one spike must leave the curve where it is. NaN is left out.
    """
    centres = np.unique(np.linspace(0, len(values) - 1, min(len(values), 1000)).astype(int))
    medians = np.full(len(centres), np.nan)
    for i, centre in enumerate(centres):
        window = values[max(0, centre - width // 2) : centre + width // 2 + 1]
        if np.isfinite(window).any():
            medians[i] = np.median(window[np.isfinite(window)])
    return steps[centres], medians


def _series(rows: list[dict], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of the rows that have `key`; null (not finite) becomes NaN."""
    found = [(row["step"], row[key]) for row in rows if key in row and "step" in row]
    values = [np.nan if value is None else float(value) for _, value in found]
    return np.array([step for step, _ in found], dtype=float), np.array(values, dtype=float)


def _draw_losses(axes, rows: list[dict]) -> float:
    """Draws train and eval loss; returns the highest loss the frame must show."""
    steps, loss = _series(rows, "loss")
    width = max(1, len(loss) // 50)
    if width >= 3:
        axes.plot(steps, loss, color=RAW, linewidth=0.7, label="train loss")
        axes.plot(*smooth(steps, loss, width), color=TRAIN, linewidth=2.2, label=f"median of {width} rows")
    elif np.isfinite(loss).any():
        axes.plot(steps, loss, color=TRAIN, linewidth=1.8, label="train loss", marker="." if len(loss) < 30 else None)
    eval_steps, eval_loss = _series(rows, "eval_loss")
    if np.isfinite(eval_loss).any():
        axes.plot(
            *(eval_steps, eval_loss),
            **{
                "color": EVAL,
                "linewidth": 1.2,
                "marker": "o",
                "markersize": 6,
                "markeredgecolor": "white",
                "zorder": 4,
            },
            label=f"eval loss (last {eval_loss[-1]:.3f})",
        )
    return max(_calm_maximum(loss), _calm_maximum(eval_loss))


def _calm_maximum(values: np.ndarray) -> float:
    """The maximum, unless a few spikes are so high that the rest would be a flat line: then without them."""
    values = values[np.isfinite(values)]
    if not len(values):
        return 0.0
    calm = max(np.percentile(values, 99), values[0])
    return float(values.max()) if values.max() < 2 * calm else float(calm)


def _limit(axes, rows: list[dict], baselines: dict[str, float], top: float) -> None:
    """Sets the loss range, and says so where spikes end above the frame."""
    values = np.concatenate([_series(rows, "loss")[1], _series(rows, "eval_loss")[1], [*baselines.values()]])
    values = values[np.isfinite(values)]
    if not len(values):
        axes.text(0.5, 0.5, "no finite loss in these rows", transform=axes.transAxes, ha="center", color=MUTED)
        return
    low, high = float(values.min()), max([top, *baselines.values()])
    margin = 0.06 * (high - low) or 0.1
    axes.set_ylim(low - margin, high + margin)
    beyond = int((values > high + margin).sum())
    if beyond:
        note = f"{beyond} higher point{'s' * (beyond > 1)} above the frame, up to {values.max():.3g}"
        axes.text(0.985, 1.02, note, transform=axes.transAxes, ha="right", fontsize=10, color=MUTED)


def _draw_skipped(axes, rows: list[dict]) -> None:
    steps, skipped = _series(rows, "skipped")
    where = steps[np.diff(np.nan_to_num(skipped), prepend=0.0) > 0]
    if len(where):  # along the bottom edge: the loss of a skipped update may not even be a number
        axes.plot(
            *(where, np.full(len(where), 0.02)),
            **{"transform": axes.get_xaxis_transform(), "linestyle": "none", "marker": "|", "color": SKIPPED},
            **{"markersize": 13, "markeredgewidth": 1.8, "label": "skipped update", "zorder": 5},
        )


def _draw_baselines(axes, baselines: dict[str, float]) -> None:
    """Dashed lines with their names on them, neighbours' names side by side so that they do not cover each other."""
    low, high = axes.get_ylim()
    slot, previous = 0, float("-inf")
    for i, (name, loss) in enumerate(sorted(baselines.items(), key=lambda item: item[1])):
        slot = (slot + 1) % 4 if loss - previous < 0.05 * (high - low) else 0
        previous = loss
        color = BASELINES[i % len(BASELINES)]
        axes.axhline(loss, color=color, linewidth=1.4, linestyle=(0, (6, 4)), zorder=3)
        axes.annotate(
            f"{name}  {loss:.3f}",
            xy=(0.985 - 0.2 * slot, loss),
            xycoords=axes.get_yaxis_transform(),
            **{"ha": "right", "va": "center", "fontsize": 10.5, "color": color, "zorder": 6},
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 2.5},
        )


def _draw_learning_rate(axes, rows: list[dict]) -> None:
    steps, lr = _series(rows, "lr")
    if len(lr):
        axes.plot(steps, lr, color=LR, linewidth=1.6)
        axes.fill_between(steps, lr, color=LR, alpha=0.10, linewidth=0)
        axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3), useMathText=True)
    axes.set_ylabel("learning rate", fontsize=11, color=INK)


def _tidy(axes) -> None:
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.01)
    axes.tick_params(colors=MUTED, labelsize=10.5, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#c4c9d4")

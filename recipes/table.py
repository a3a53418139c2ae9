"""The table and the plots of compare.py, from the summaries of its rows. The first row is the baseline."""

import csv
import io
import math
from pathlib import Path
from typing import Any

import numpy as np

from parallel.cost.utilisation import GRID, WORKLOADS, Method, bandwidth_for, utilisation
from runtime.console import human_bytes
from runtime.metrics import replace_file, write_json

TARGETS = (0.5, 0.8, 0.95)  # of compute utilisation
SHAPES = ("-", "--", ":", "-.")


def tabulate(rows: list[dict[str, Any]], about: dict[str, Any]) -> dict[str, Any]:
    """Gaps are paired: each seed's final loss less the baseline's of the same seed, in percent of the baseline's mean;
    with the 95 % interval of the mean over seeds (Student's t), and that by the deviation of all rows together, for
    rows whose gaps scatter alike: three seeds say little about how much they do."""
    final_RS = np.array([row["final_losses"] for row in rows], float)
    gap_RS = 100 * (final_RS - final_RS[0]) / final_RS[0].mean()
    finite = [gap for gap in gap_RS[1:] if np.isfinite(gap).all()]
    count = gap_RS.shape[1]
    pooled = math.sqrt(np.mean([gap.var(ddof=1) for gap in finite])) if finite else math.nan
    mean_half = student_t(max(1, len(finite)) * (count - 1)) * pooled / math.sqrt(count)
    table = []
    for i, (row, final, gap) in enumerate(zip(rows, final_RS, gap_RS, strict=True)):
        half = student_t(count - 1) * gap.std(ddof=1) / math.sqrt(count)
        together = mean_half if i else 0.0
        method = Method(**row["method"])
        table.append(
            row
            | {
                "eval_loss": final.mean(),
                "gap_percent": gap.mean(),
                "gap_low": gap.mean() - half,
                "gap_high": gap.mean() + half,
                "gap_low_pooled": gap.mean() - together,
                "gap_high_pooled": gap.mean() + together,
                "ratio": rows[0]["wire_bytes_per_step"] / row["wire_bytes_per_step"],
                "gbit_per_s": {name: [bandwidth_for(w, method, t) for t in TARGETS] for name, w in WORKLOADS.items()},
            }
        )
    return {"about": about, "rows": table}


def student_t(freedom: int) -> float:
    """The two-sided 95 % quantile of Student's t."""
    from scipy.special import stdtrit  # slow to import; JAX has it installed

    return float(stdtrit(freedom, 0.975))


def verdict(row: dict[str, Any], bound: float) -> str:
    """A claim "gap ≤ bound %": holds when the interval's upper end is below, fails when its lower end is above."""
    return "holds" if row["gap_high"] <= bound else "fails" if row["gap_low"] > bound else "unresolved"


COLUMNS = (
    "method",
    "eval loss",
    "gap %",
    "95 % interval",
    "pooled",
    "skipped",
    "clipped",
    "s/run",
    "bytes/step",
    "ratio",
)


def cells(row: dict[str, Any]) -> list[str]:
    found = [
        row["name"],
        f"{row['eval_loss']:.4f}",
        f"{row['gap_percent']:+.2f}",
        f"{row['gap_low']:+.2f} … {row['gap_high']:+.2f}",
        f"{row['gap_low_pooled']:+.2f} … {row['gap_high_pooled']:+.2f}",
        " / ".join(map(str, row["skipped"])),
        " / ".join(map(str, row["clipped"])),
        f"{np.median(row['seconds']):.0f}",
        human_bytes(row["wire_bytes_per_step"]),
        f"{row['ratio']:.1f} ×",
    ]
    return found + [" / ".join(f"{rate:.1f}" for rate in rates) for rates in row["gbit_per_s"].values()]


def header(table: dict[str, Any]) -> list[str]:
    goals = "/".join(f"{100 * t:.0f}" for t in TARGETS)
    return [*COLUMNS, *(f"{name}: Gbit/s for {goals} %" for name in table["rows"][0]["gbit_per_s"])]


def markdown(table: dict[str, Any]) -> str:
    about = table["about"]
    read = ", ".join(f"{about[unit]:,} {unit}" for unit in ("tokens", "examples") if unit in about)
    lines = [
        f"{about['replicas']} replicas, {about['steps']} steps, {read}, {about['seeds']} seeds. Loss: of all that is "
        "held out, at the end. Gap: to the first row, paired by seed; its interval by its own seeds, and by the "
        "deviation of all rows together. Skipped, clipped: updates that the guard left out, or made "
        "smaller, of each seed. s/run: the median. Bytes: sent by a replica over the slow link per step, on average. "
        "Gbit/s: the link that a model of this size needs for such a share of time spent computing (simulated, no "
        "latency, infinity: more than 1,000).",
        "",
        "| " + " | ".join(header(table)) + " |",
        "|" + "---|" * len(header(table)),
    ]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in table["rows"]]
    ended = [f"{row['name']}: {text}" for row in table["rows"] for text in row["ended"] if text]
    return "\n".join([*lines, *(["", "Runs that ended early:", "", *(f"- {line}" for line in ended)] if ended else [])])


def write(table: dict[str, Any], workdir: Path) -> None:
    """table.md, table.csv, table.json and plots/*.png; each file whole or not at all."""
    replace_file(workdir / "table.md", (markdown(table) + "\n").encode())
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(header(table))
    writer.writerows(cells(row) for row in table["rows"])
    replace_file(workdir / "table.csv", text.getvalue().encode())
    write_json(workdir / "table.json", table)
    _plots(table["rows"], workdir / "plots")


def _plots(rows: list[dict[str, Any]], folder: Path) -> None:
    """loss_steps.png, loss_bytes.png, utilisation.png: one line a row, of one colour and dash in all three."""
    folder.mkdir(parents=True, exist_ok=True)
    mean = lambda row: np.mean(row["eval_losses"], axis=0)
    floor = np.nanmin([mean(row) for row in rows]) - 0.02
    top = np.nanmax([mean(row)[len(mean(row)) // 3] for row in rows]) + 0.05

    def steps(axes, row, style):
        axes.plot(row["steps"], mean(row), **style)

    def sent(axes, row, style):
        axes.plot(np.array(row["steps"]) * row["wire_bytes_per_step"] / 2**20, mean(row), **style)

    def busy(axes, row, style):
        axes.plot(GRID, 100 * np.asarray(utilisation(WORKLOADS["10B"], Method(**row["method"]), GRID)), **style)

    loss = {"ylabel": "eval loss, nats per token", "ylim": (floor, top)}
    _plot(rows, steps, folder / "loss_steps.png", title="Loss against steps", xlabel="steps", **loss)
    _plot(
        *(rows, sent, folder / "loss_bytes.png"),
        title="Loss against bytes over the slow link",
        xlabel="MiB sent by one replica",
        xscale="log",
        **loss,
    )
    _plot(
        *(rows, busy, folder / "utilisation.png"),
        title="Share of the time spent computing, 10 B parameters, 0.8 s a step (simulated)",
        xlabel="Gbit/s of the slow link",
        xscale="log",
        ylabel="compute utilisation, %",
    )


def _plot(rows: list[dict[str, Any]], draw: Any, path: Path, title: str, **axes_options: Any) -> None:
    from matplotlib import colormaps  # a second to import, only needed here
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 7.5), dpi=100, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    colors = [colormaps["tab10"](i) for i in range(10)]
    for i, row in enumerate(rows):
        style = {"color": "black" if i == 0 else colors[i % 10], "linestyle": SHAPES[i // 10 % 4]}
        draw(axes, row, style | {"linewidth": 2.4 if i == 0 else 1.4, "label": row["name"]})
    axes.set(**axes_options)
    axes.set_title(title, loc="left", fontsize=14, fontweight="bold")
    axes.grid(color="#e5e7eb")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=10)
    figure.savefig(path, format="png")

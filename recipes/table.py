"""The table of compare.py, from the summaries of its rows. The first row is the baseline."""

import csv
import io
import math
from pathlib import Path
from typing import Any

import numpy as np

from parallel.cost.utilisation import WORKLOADS, Method, bandwidth_for
from recipes import plots
from runtime.console import human_bytes
from runtime.metrics import replace_file, write_json

TARGETS = (0.5, 0.8, 0.95)  # of compute utilisation
LITTLE = 3.0  # percent


def tabulate(rows: list[dict[str, Any]], about: dict[str, Any]) -> dict[str, Any]:
    """Gaps are paired: each seed's final loss less the baseline's of the same seed, in percent of the baseline's mean;
    with the 95 % interval of the mean over seeds (Student's t). Three seeds say little about how much gaps scatter, so
    rows that lose at most LITTLE have another one by the deviation of all of them together, but floor rows: those that
    lose more scatter more, and a floor row is one of them again."""
    final_RS = np.array([row["final_losses"] for row in rows], float)
    gap_RS = 100 * (final_RS - final_RS[0]) / final_RS[0].mean()
    count = gap_RS.shape[1]
    alike_R = np.isfinite(gap_RS).all(axis=1) & (np.abs(gap_RS.mean(axis=1)) <= LITTLE)
    alike_R &= [i > 0 and not row["floor"] for i, row in enumerate(rows)]
    pooled = math.sqrt(gap_RS[alike_R].var(axis=1, ddof=1).mean()) if alike_R.any() else math.nan
    mean_half = student_t(max(1, alike_R.sum()) * (count - 1)) * pooled / math.sqrt(count)
    table = []
    for i, (row, final, gap) in enumerate(zip(rows, final_RS, gap_RS, strict=True)):
        half = student_t(count - 1) * gap.std(ddof=1) / math.sqrt(count)
        together = mean_half if alike_R[i] else math.nan if i else 0.0
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
        "" if math.isnan(row["gap_low_pooled"]) else f"{row['gap_low_pooled']:+.2f} … {row['gap_high_pooled']:+.2f}",
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


# Of COLUMNS: those of the highest rank go first where a terminal is too narrow, and before them the links' rates.
RANKS = (0, 3, 0, 1, 5, 6, 7, 8, 2, 4)


def fitting(table: dict[str, Any], width: int) -> str:
    """The table for a terminal, in lines of at most `width` letters: without the columns that do not fit, which are
    named below it."""
    head, rows = header(table), [cells(row) for row in table["rows"]]
    rank = dict(enumerate([*RANKS, *range(len(COLUMNS), len(head))]))
    sizes = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    kept, over = list(rank), lambda: sum(sizes[i] + 2 for i in kept) - 2 - width
    while over() > 0 and any(rank[i] for i in kept):
        kept.remove(max(kept, key=rank.__getitem__))
    sizes[0] = max(8, sizes[0] - max(0, over()))  # of the names
    name = lambda text: text if len(text) <= sizes[0] else text[: sizes[0] - 1] + "…"
    ruled = [head, ["─" * size for size in sizes], *rows]
    lines = ["  ".join([f"{name(row[0]):<{sizes[0]}}", *(f"{row[i]:>{sizes[i]}}" for i in kept[1:])]) for row in ruled]
    left_out = [text for i, text in enumerate(head) if i not in kept]
    return "\n".join([*lines, *_ended(table), *(["", f"table.md also has: {', '.join(left_out)}"] if left_out else [])])


def _ended(table: dict[str, Any]) -> list[str]:
    ended = [f"- {row['name']}: {text}" for row in table["rows"] for text in row["ended"] if text]
    return ["", "Runs that ended early:", "", *ended] if ended else []


def markdown(table: dict[str, Any]) -> str:
    about = table["about"]
    read = ", ".join(f"{about[unit]:,} {unit}" for unit in ("tokens", "examples") if unit in about)
    lines = [
        f"{about['replicas']} replicas, {about['steps']} steps, {read}, {about['seeds']} seeds. Loss: of all that is "
        "held out, at the end. Gap: to the first row, paired by seed; its interval by its own seeds, and by the "
        f"deviation of all rows together that lose at most {LITTLE:g} %. Skipped, clipped: updates that the guard left "
        "out, or made smaller, of each seed. s/run: the median. Bytes: sent by a replica over the slow link per step, "
        "on average. "
        "Gbit/s: the link that a model of this size needs for such a share of time spent computing (simulated, no "
        "latency, infinity: more than 1,000).",
        "",
        "| " + " | ".join(header(table)) + " |",
        "|" + "---|" * len(header(table)),
    ]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in table["rows"]]
    return "\n".join([*lines, *_ended(table)])


def write(table: dict[str, Any], workdir: Path) -> None:
    """table.md, table.csv, table.json and plots/*.png; each file whole or not at all."""
    replace_file(workdir / "table.md", (markdown(table) + "\n").encode())
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(header(table))
    writer.writerows(cells(row) for row in table["rows"])
    replace_file(workdir / "table.csv", text.getvalue().encode())
    write_json(workdir / "table.json", table)
    plots.draw(table["rows"], workdir / "plots", of_text="tokens" in table["about"])

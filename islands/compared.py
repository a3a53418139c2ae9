"""What a comparison of islands shows: a table, and three plots. The first row of each sites is what the others of these
sites are compared with, seed by seed.
"""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from islands import pictures
from islands.experiments import interval
from islands.laboratory import Measured
from runtime.console import aligned
from runtime.metrics import replace_file, write_json

WIDTH = 5  # points of a curve that are averaged, so that a moment's luck does not count


@dataclass(frozen=True)
class Found:
    """A row whose runs are made, one of each seed. num_islands: of its sites."""

    name: str
    sites: str
    num_islands: int
    runs: Sequence[Measured]


def reached(run: Measured, loss: float) -> float:
    """Seconds after which the smoothed curve is at this loss, between two points by a straight line; infinity: never.
    Smoothed: each point is the mean of those around it, of fewer at the ends."""
    half = WIDTH // 2
    smooth = [float(np.mean(run.losses[max(0, i - half) : i + half + 1])) for i in range(len(run.losses))]
    for i, y in enumerate(smooth):
        if y <= loss:
            before, at = smooth[max(0, i - 1)], run.times[i]
            share = (before - loss) / (before - y) if before > y else 1.0
            return run.times[max(0, i - 1)] + share * (at - run.times[max(0, i - 1)])
    return math.inf


def busy(found: Found) -> list[float]:
    """Of each island, the share of the time that was spent on steps that counted: the mean of the seeds."""
    seconds = [
        sum(each.last - each.first for each in run.rounds if each.counts and each.island == island)
        for run in found.runs
        for island in range(found.num_islands)
    ]
    total = found.runs[0].times[-1]
    return [float(x) / total for x in np.reshape(seconds, (len(found.runs), -1)).mean(axis=0)]


def tabulate(rows: Sequence[Found]) -> list[dict[str, Any]]:
    """Losses are those of the last eighth of the time; the target is, of each seed, the first row's of the same
    sites. sooner: how many times sooner than that row it is reached. Intervals are of the mean of the seeds, 95 %."""
    first = {row.sites: row for row in reversed(rows)}
    table = []
    for row in rows:
        base = first[row.sites].runs
        seconds = [reached(run, other.loss) for run, other in zip(row.runs, base, strict=True)]
        sooner = [reached(other, other.loss) / s for s, other in zip(seconds, base, strict=True)]
        stale = [x for run in row.runs for x in run.staleness]
        table.append({
            "name": row.name, "sites": row.sites,
            "loss": interval([run.loss for run in row.runs]), "seconds": seconds, "sooner": interval(sooner),
            "steps": float(np.mean([run.steps for run in row.runs])),
            "pushes": float(np.mean([len(run.staleness) for run in row.runs])),
            "stale_mean": float(np.mean(stale)) if stale else 0.0, "stale_most": max(stale, default=0),
            "busy": busy(row), "times": row.runs[0].times, "losses": [run.losses for run in row.runs],
        })  # fmt: skip
    return table


HEAD = (
    "scheme",
    "sites",
    "loss",
    "95 % interval",
    "s to target",
    "× sooner",
    "95 % interval",
    "steps",
    "pushes",
    "stale: mean",
    "most",
    "computing, %",
)


def cells(row: dict[str, Any]) -> list[str]:
    (low, loss, high), (least, sooner, most) = row["loss"], row["sooner"]
    seconds = [f"{s:.0f}" if math.isfinite(s) else "never" for s in row["seconds"]]
    return [
        row["name"],
        row["sites"],
        f"{loss:.4f}",
        f"{low:.4f} … {high:.4f}",
        " / ".join(seconds),
        *(("", "") if "never" in seconds else (f"{sooner:.2f}", f"{least:.2f} … {most:.2f}")),
        f"{row['steps']:,.0f}",
        f"{row['pushes']:,.0f}",
        f"{row['stale_mean']:.1f}",
        f"{row['stale_most']}",
        " / ".join(f"{100 * share:.0f}" for share in row["busy"]),
    ]


def markdown(table: list[dict[str, Any]]) -> str:
    seconds, seeds = table[0]["times"][-1], len(table[0]["losses"])
    about = (
        f"{seconds:g} s of the laboratory's clock, {seeds} seeds. Loss: of what is held out, in the last eighth of the "
        "time. Target: with which the first row of the same sites ends, of the same seed. Sooner: than that row comes "
        "to it. Stale: pushes of others between the beginning and the end of a round. Computing: of each island's "
        "time, on steps that counted. Intervals: of the mean of the seeds."
    )
    rows = [HEAD, ["---"] * len(HEAD), *map(cells, table)]
    return "\n".join([about, "", *("| " + " | ".join(row) + " |" for row in rows)])


def write(rows: Sequence[Found], workdir: Path) -> str:
    """table.md, table.csv, table.json and plots/; the table for a terminal."""
    table = tabulate(rows)
    replace_file(workdir / "table.md", (markdown(table) + "\n").encode())
    text = io.StringIO()
    csv.writer(text).writerows([HEAD, *map(cells, table)])
    replace_file(workdir / "table.csv", text.getvalue().encode())
    write_json(workdir / "table.json", {"rows": table})
    (workdir / "plots").mkdir(exist_ok=True)
    panels = {sites: {row.name: row.runs for row in rows if row.sites == sites} for sites in {r.sites: 0 for r in rows}}
    pictures.losses(panels, workdir / "plots" / "loss.png")
    pictures.staleness(panels, workdir / "plots" / "staleness.png")
    pictures.times(
        {f"{row.name}, {row.sites}": (row.runs[0], row.num_islands) for row in rows}, workdir / "plots" / "time.png"
    )
    return aligned([HEAD, *map(cells, table)])

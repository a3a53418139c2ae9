"""What a method costs in steps, by the curves of a comparison (table.json of compare.py): so that plans can be ranked
by the time to a loss.

A row that ends worse than the baseline is late: where it ends after N steps, the baseline was after n. It is taken to
need N / n times the steps for any loss. docs/planner.md has what that leaves out.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime.config import UsageError

BASELINE = ("sync", "none")


@dataclass(frozen=True)
class Delay:
    """factor: of the baseline's steps; inf: the comparison does not say. row: its name, or why there is none."""

    factor: float
    row: str


@dataclass(frozen=True)
class Gaps:
    """delays: by (strategy, codec)."""

    delays: Mapping[tuple[str, str], Delay]

    def of(self, strategy: str, codec: str) -> Delay:
        return self.delays.get((strategy, codec), Delay(math.inf, "no row of the comparison has it"))

    def has(self, strategy: str, codec: str) -> bool:
        return math.isfinite(self.of(strategy, codec).factor)

    def unknown(self, methods: Iterable[tuple[str, str]]) -> list[str]:
        """Of each reason for which some of these are not known a sentence."""
        by_reason: dict[str, list[str]] = {}
        for method in methods:
            if not self.has(*method):
                by_reason.setdefault(self.of(*method).row, []).append(" ".join(method))
        return [f"left out, as {reason}: {', '.join(names)}" for reason, names in by_reason.items()]


def read(path: Path) -> Gaps:
    """Of a comparison's folder, or its table.json. Of several rows of one strategy and codec, the one that loses least.
    Raises UsageError."""
    file = path / "table.json" if path.is_dir() else path
    try:
        rows = json.loads(file.read_text())["rows"]
        methods = [(row["config"]["sync.strategy"], row["config"]["sync.codec"]) for row in rows]
        baseline, found = methods[0], [_delay(rows[0], row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UsageError(
            f"--gaps={path}: expected the folder of a comparison, or its table.json ({type(error).__name__}: {error})"
        ) from error
    if baseline != BASELINE:
        raise UsageError(
            f"--gaps={path}: its first row is {' '.join(baseline)}, and delays are behind {' '.join(BASELINE)}"
        )
    delays: dict[tuple[str, str], Delay] = {}
    for row, method, delay in zip(rows, methods, found, strict=True):
        if not _is_plain(row):
            continue
        if method not in delays or delay.factor < delays[method].factor:
            delays[method] = delay
    return Gaps(delays)


def _is_plain(row: Mapping[str, Any]) -> bool:
    """No repetition of another row, and of one strategy from its first step on."""
    return not row["floor"] and not row["config"]["sync.warm_steps"]


def _delay(baseline: Mapping[str, Any], row: Mapping[str, Any]) -> Delay:
    last = _mean(row)[-1]
    if not math.isfinite(last):
        return Delay(math.inf, f"a run of {row['name']!r} did not end")
    steps, curve = np.asarray(baseline["steps"], float), np.minimum.accumulate(_mean(baseline))
    if last >= curve[0]:
        return Delay(math.inf, f"{row['name']!r} ends no better than {baseline['name']!r} is at its first evaluation")
    reached = np.interp(-last, -curve, steps)  # where the baseline is as far; its end, if it never is worse
    return Delay(row["steps"][-1] / float(reached), row["name"])


def _mean(row: Mapping[str, Any]) -> np.ndarray:
    """Over seeds, of each evaluation; NaN where a run has none."""
    return np.array(row["eval_losses"], float).mean(axis=0)

"""Weights that no loss moves, but counts: their gradients say only in which direction."""

from typing import Any

COUNTS = "balance_bias"  # the bias by which experts are chosen (model/moe.py)


def follows_counts(path: Any) -> bool:
    return path[-1].key == COUNTS

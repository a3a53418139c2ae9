"""Several texts by weight: which of them each row of a batch is from.

Row number i belongs to place i mod M of a fixed pattern of M places, in which every part has its share of places at
even distances: any stretch of rows has about the asked shares, and any row is found without those before it.

Shapes: M places of the pattern, N tokens.
"""

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

PLACES = 10_000  # the smallest weight is one of them


@dataclass(frozen=True)
class Mixture:
    """Tokens of several parts, and the share of the rows that is from each; a lone part is the plain case.

    Attributes:
        arrays: token ids, each [N of its own].
        weights: as many, greater than 0; only their ratios count.
    """

    arrays: tuple[np.ndarray, ...]
    weights: tuple[float, ...]

    def __len__(self) -> int:
        return sum(map(len, self.arrays))

    def locate(self, row: int) -> tuple[int, int]:
        """(part, how many rows before this one are from it)."""
        block, place = divmod(row, PLACES)
        part = int(self._pattern[0][place])
        return part, block * int(self._pattern[2][part]) + int(self._pattern[1][place])

    @functools.cached_property
    def _pattern(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The part of each place [M], its rank among that part's places [M], and each part's number of places."""
        counts = shares(self.weights)
        part_M = np.repeat(np.arange(len(counts)), counts)
        rank_M = np.concatenate([np.arange(count) for count in counts])
        order_M = np.argsort((rank_M + 0.5) / counts[part_M], kind="stable")
        return part_M[order_M], rank_M[order_M], counts

    @classmethod
    def of(cls, tokens: "np.ndarray | Mixture") -> "Mixture":
        return tokens if isinstance(tokens, Mixture) else cls((tokens,), (1.0,))


def shares(weights: tuple[float, ...]) -> np.ndarray:
    """How many of PLACES each weight gets: rounded down, and what is left to the largest remainders."""
    exact = np.array(weights, np.float64) / math.fsum(weights) * PLACES
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: PLACES - counts.sum()]] += 1
    return counts


def parse(path: str) -> list[tuple[str, float]]:
    """data.path as [(path, weight)]: `a:0.7,b:0.3` is two, anything that exists as it stands is one.

    Raises:
        ValueError: weights that are not all given, not positive, or smaller than the pattern can hold.
    """
    if "," not in path and not re.search(r":[\d.eE+-]+$", path) or Path(path).expanduser().exists():
        return [(path, 1.0)]
    parts = [(name, weight) for name, _, weight in (part.strip().rpartition(":") for part in path.split(","))]
    wrong = f"data.path is {path!r}; several texts are given with a weight each, as in a:0.7,b:0.3"
    try:
        found = [(name, float(weight)) for name, weight in parts]
    except ValueError:
        raise ValueError(f"{wrong}. (No file or folder has this whole name.)") from None
    if any(not name or not 0 < weight < math.inf for name, weight in found):
        raise ValueError(f"{wrong}: a path, and a weight greater than 0.")
    weights = tuple(weight for _, weight in found)
    if len({name for name, _ in found}) < len(found):
        raise ValueError(f"{wrong}: here one path stands twice. Add its weights up.")
    if min(shares(weights)) < 1:
        raise ValueError(f"{wrong}; {min(weights)} is less than 1 part in {PLACES:,} of all, and would not be read.")
    return found


def rows_in_order(windows: tuple[int, ...], mixture: Mixture) -> Iterator[tuple[int, int]]:
    """(part, window) of every window once, in the order of the mixture; parts that have no more are passed over."""
    left, row = sum(windows), 0
    while left:
        part, window = mixture.locate(row)
        row += 1
        if window < windows[part]:
            left -= 1
            yield part, window

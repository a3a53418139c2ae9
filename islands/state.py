"""What the fold works on: float32 arrays by name, block by block; and sums over them that are the same everywhere."""

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from islands import record as records

STEP = 2**17  # elements of an array at a time, which stay in a core's cache
NORM_BLOCK = 4096  # elements of a canonical array whose squares are added up by themselves

Params = dict[str, np.ndarray]  # by leaf: float32 vectors
# (leaf, place in this process's part of it, at most STEP values there, to be overwritten)
Blocks = Iterable[tuple[str, int, np.ndarray]]


@dataclass
class State:
    """All that the fold depends on: what a snapshot holds. arrays: float32 vectors, `params/LEAF` and what a rule keeps
    beside them. numbers: counts."""

    arrays: dict[str, np.ndarray]
    numbers: dict[str, int] = field(default_factory=dict)

    def sizes(self) -> dict[str, int]:
        return {leaf: len(self.arrays[f"params/{leaf}"]) for leaf in self.leaves()}

    def leaves(self) -> list[str]:
        return [name.removeprefix("params/") for name in self.arrays if name.startswith("params/")]

    def add(self, kind: str) -> None:
        """Zeros beside every leaf."""
        self.arrays |= {f"{kind}/{leaf}": np.zeros(size, np.float32) for leaf, size in self.sizes().items()}

    def remove(self, kind: str) -> None:
        for leaf in self.leaves():
            del self.arrays[f"{kind}/{leaf}"]

    def has(self, kind: str) -> bool:
        return any(f"{kind}/{leaf}" in self.arrays for leaf in self.leaves())

    def copy(self, kind: str, source: str) -> None:
        for leaf in self.leaves():
            np.copyto(self.arrays[f"{kind}/{leaf}"], self.arrays[f"{source}/{leaf}"])

    def copied(self, kind: str) -> Params:
        """Copies of the arrays of a kind, by leaf."""
        return {leaf: self.arrays[f"{kind}/{leaf}"].copy() for leaf in self.leaves()}

    def count(self, name: str, more: int) -> int:
        self.numbers[name] = self.numbers.get(name, 0) + more
        return self.numbers[name]

    def blocks(self, kind: str) -> Blocks:
        """Copies of these arrays."""
        return in_blocks({leaf: self.arrays[f"{kind}/{leaf}"] for leaf in self.leaves()})

    def zeros(self) -> Blocks:
        return in_blocks({leaf: np.broadcast_to(np.float32(0), size) for leaf, size in self.sizes().items()})

    def at(self, kind: str, leaf: str, start: int, x: np.ndarray) -> np.ndarray:
        """The same elements of an array of the state."""
        return self.arrays[f"{kind}/{leaf}"][start : start + len(x)]

    def digest(self) -> str:
        """SHA-256 of names, sizes, bits and numbers."""
        found = {name: hashlib.sha256(np.asarray(x, "<f4").data).hexdigest() for name, x in self.arrays.items()}
        return records.digest(records.canonical({"arrays": found, "numbers": self.numbers, "sizes": self.sizes()}))


def in_blocks(arrays: Mapping[str, np.ndarray]) -> Blocks:
    """Copies, block by block in one buffer."""
    buffer = np.empty(STEP, np.float32)
    for leaf, values in arrays.items():
        for start in range(0, len(values), STEP):
            part = values[start : start + STEP]
            x = buffer[: len(part)]
            x[...] = part
            yield leaf, start, x


def check_denormals() -> None:
    """Raises RuntimeError in a thread that takes denormal numbers for zeros: its fold would not be everybody's."""
    made = np.full(8, 2.0**-126, np.float32) * np.float32(0.5)
    read = np.full(8, 2.0**-140, np.float32) * np.float32(2**20)
    if not made.all() or not read.all():
        raise RuntimeError(
            "this thread takes denormal floats for zeros, so it would fold to other parameters than other members: "
            "a library that is loaded was built with -ffast-math, or this is called from inside a JAX program"
        )


# ── sums that decide something ───────────────────────────────────────────────────────────────────────────────────


def squares(values: Iterable[np.ndarray]) -> np.ndarray:
    """Sums of squares, float64, of each NORM_BLOCK elements of float32 values that follow each other, from where such a
    block of a canonical array begins; the last one is filled up with zeros. Processes that have some of the blocks each
    lay theirs side by side."""
    found, waiting = [], np.zeros(0, np.float32)
    for x in values:
        waiting = np.concatenate([waiting, x])
        whole = len(waiting) // NORM_BLOCK * NORM_BLOCK
        found.append(_tree_sum(_squared(waiting[:whole])))
        waiting = waiting[whole:]
    if len(waiting):
        found.append(_tree_sum(_squared(np.pad(waiting, (0, NORM_BLOCK - len(waiting))))))
    return np.concatenate(found) if found else np.zeros(0)


def norm(squares_of: Mapping[str, np.ndarray]) -> float:
    """Of all leaves, from the `squares` of each."""
    blocks = np.concatenate([squares_of[leaf] for leaf in sorted(squares_of)])
    padded = np.zeros(1 << max(0, len(blocks) - 1).bit_length())
    padded[: len(blocks)] = blocks
    return math.sqrt(_tree_sum(padded[None])[0])


def _squared(x_N: np.ndarray) -> np.ndarray:
    x_MB = x_N.reshape(-1, NORM_BLOCK).astype(np.float64)
    return x_MB * x_MB


def _tree_sum(x_MB: np.ndarray) -> np.ndarray:
    """Of each row, whose length is a power of two: halves are added to each other until one number is left."""
    while x_MB.shape[1] > 1:
        half = x_MB.shape[1] // 2
        x_MB = x_MB[:, :half] + x_MB[:, half:]
    return x_MB[:, 0]

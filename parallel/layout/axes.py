"""The axes of the mesh, slowest first: the one place that names them all.

`replica` is the slow link between machines: only the exchange crosses it. The others are one machine's, or one fast
network's, own.
"""

from collections.abc import Iterable, Mapping
from typing import Any

# Every mesh has all of them, of 1 device or more.
AXES: tuple[str, ...] = ("replica", "stage", "fsdp", "expert", "context", "tensor")
SLOW = "replica"
STAGE = "stage"  # by layers
EXPERT = "expert"
CONTEXT = "context"
LATER = (STAGE, EXPERT)  # where they are 1, nothing is named, drawn or remembered otherwise than before they were
FAST = tuple(axis for axis in AXES if axis != SLOW)
# Always spoken of; the others are where they are not 1.
COMMON: tuple[str, ...] = ("replica", "fsdp", "tensor")


def first(spec: Iterable[Any], staged: bool) -> tuple[str, ...]:
    """By which axis each dimension is cut, in alphabetical order; of several the first. What is named by these keeps
    its name when a rule is given a further axis. staged: there are several stages; else none of them is a cut."""
    found = sorted(entry if isinstance(entry, str) else entry[0] for entry in spec if entry)
    return tuple(axis for axis in found if staged or axis != STAGE)


def shown(sizes: Mapping[str, int]) -> dict[str, int]:
    """Those worth a word: the common ones, and others that are not 1."""
    return {axis: sizes[axis] for axis in AXES if axis in COMMON or sizes[axis] != 1}

"""The axes of the mesh, slowest first, and what a PartitionSpec says of them: the one place that names them all.

`replica` is the slow link between machines: only the exchange crosses it. The others are one machine's, or one fast
network's, own.
"""

import math
from collections.abc import Mapping
from typing import Any

AXES = ("replica", "stage", "fsdp", "expert", "context", "tensor")
USED = ("replica", "fsdp", "tensor")  # those that a mesh has so far
SLOW = "replica"
FAST = tuple(axis for axis in USED if axis != SLOW)


def names(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec: None, an axis, or several."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def of(spec: Any) -> tuple[str, ...]:
    """All mesh axes of a PartitionSpec."""
    return tuple(axis for entry in spec for axis in names(entry))


def shards(entry: Any, sizes: Mapping[str, int]) -> int:
    """Into how many parts a dimension with this entry is cut, on a mesh of these sizes."""
    return math.prod(sizes[axis] for axis in names(entry))

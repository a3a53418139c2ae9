"""What the exchange knows of a tree of arrays: their shards, their matrices, and which of them travel together."""

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.tree_util import keystr

from parallel.exchange.codecs import rounds
from parallel.exchange.codecs.base import is_round
from parallel.exchange.codecs.plain import Gathered, Identity
from parallel.layout.axes import LATER, STAGE, first
from parallel.layout.rules import BATCH, of, shards, spec

SMALL = 2**14  # shards of fewer elements share one unit: a collective has a price of its own
SMALL_UNIT = "small"


@dataclass(frozen=True)
class Unit:
    """Arrays that are encoded together, or one that is encoded in pieces, one after another, and sent as a whole."""

    name: str
    leaves: tuple[int, ...]  # their places in the flattened tree
    shapes: tuple[tuple[int, ...], ...]  # of one device's shard of each
    axes: tuple[str, ...]  # the fast mesh axes they are sharded over: one unit never mixes
    size: int  # of one device's shard of the unit
    local: Any  # that shard as a Leaf, for the codecs that want matrices
    codec: Any
    pieces: int  # that follow each other in the array
    piece: tuple[int, ...]  # the shape of each

    @property
    def salt(self) -> int:
        """Of its random keys."""
        return zlib.crc32(self.name.encode())


@dataclass(frozen=True)
class Leaf:
    """An array. batch_dims: how many leading dimensions only count matrices (layers, experts). rows: how many of
    the next ones are their rows, the rest being the columns; 0: the array holds vectors. exact: whatever the codec."""

    name: str
    shape: tuple[int, ...]
    spec: P
    batch_dims: int = 0
    rows: int = 0
    exact: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def matrix(self) -> tuple[int, int, int] | None:
        """(how many matrices, rows, columns), None for vectors."""
        if not self.rows:
            return None
        first, second = self.batch_dims, self.batch_dims + self.rows
        return math.prod(self.shape[:first]), math.prod(self.shape[first:second]), math.prod(self.shape[second:])

    def shard(self, sizes: Mapping[str, int]) -> "Leaf":
        """One device's, on a mesh of these sizes."""
        entries = (*self.spec, *[None] * (len(self.shape) - len(self.spec)))
        shape = tuple(n // shards(entry, sizes) for n, entry in zip(self.shape, entries, strict=True))
        return replace(self, shape=shape)

    def with_layers(self, layers: int) -> "Leaf":
        return replace(self, shape=(layers, *self.shape[1:]))


def leaves(shapes_tree: Any, axes_tree: Any) -> Any:
    """A tree of Leaf. An array is a matrix if it has the model dimension and another one besides layers."""

    def leaf(path, x, axes) -> Leaf:
        rest, name = [axis for axis in axes if axis not in BATCH], keystr(path, simple=True, separator="/")
        is_matrix = "embed" in rest and len(rest) > 1
        rows = (len(rest) - 1 if rest[-1] == "embed" else 1) if is_matrix else 0
        return Leaf(name, tuple(x.shape), spec(axes), len(axes) - len(rest), rows, "counts" in axes)

    return jax.tree_util.tree_map_with_path(leaf, shapes_tree, axes_tree)


def plan(leaves_tree: Any, codec: Any, mesh: Mesh) -> tuple[Unit, ...]:
    """Large arrays, and matrices that a codec wants whole, each by itself: memory is bounded by the largest. The small
    ones together, by the mesh axes they are sharded over: a block that mixed sharded and replicated values would
    decode to different copies of the replicated ones."""
    known = [axis for axis in mesh.axis_names if axis not in LATER or mesh.shape[axis] > 1]
    units, buckets, exact = [], {}, Gathered() if not is_round(codec) and codec.sparse else Identity()
    for i, leaf in enumerate(jax.tree.leaves(leaves_tree)):
        local = leaf.shard(mesh.shape)
        axes = tuple(axis for axis in known if axis in of(leaf.spec))
        own: Any = codec if not leaf.exact and (not is_round(codec) or codec.takes(local)) else exact
        if local.size >= SMALL or (is_round(own) and own.per_matrix and local.matrix is not None):
            pieces = 1 if is_round(own) else rounds.pieces(local.shape)
            more = (local.size, local, own, pieces, _piece(local.shape, pieces))
            units.append(Unit(leaf.name, (i,), (local.shape,), axes, *more))
        else:
            buckets.setdefault((axes, first(leaf.spec, STAGE in known), own), []).append((i, local))
    for (axes, cut, own), found in buckets.items():
        name = " ".join([SMALL_UNIT, *cut] if own == codec else [SMALL_UNIT, "exact", *cut])
        numbers, locals_ = zip(*found, strict=True)
        whole = Leaf(name, (sum(local.size for local in locals_),), P(None))
        shapes = tuple(local.shape for local in locals_)
        units.append(Unit(name, numbers, shapes, axes, whole.size, whole, own, 1, whole.shape))
    return tuple(units)


def _piece(shape: tuple[int, ...], pieces: int) -> tuple[int, ...]:
    """The shape of each: single layers, rows, …, or several of them."""
    sizes = []
    for n in shape:
        sizes.append(n // min(n, pieces))
        pieces //= min(n, pieces)
    return tuple(sizes)

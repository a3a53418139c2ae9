"""The arrays of a tree as islands push and fold them: flat, and cut over all devices of the mesh in whole blocks of the
codec, so that each process encodes and folds what lies on its own devices. What crosses devices stays in the island."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from runtime.digest import named_arrays

Arrays = dict[str, np.ndarray]


class Flat:
    """shapes: of the parameters. block: elements of a codec's. share: {weight: [(first element, elements), …]} of this
    process, in their order."""

    def __init__(self, mesh: Mesh, shapes: Any, block: int):
        self.sizes = {name: x.size for name, x in named_arrays(shapes).items()}
        unit = block * mesh.size
        self._padded = {name: -(-size // unit) * unit for name, size in self.sizes.items()}
        self._sharding = NamedSharding(mesh, P(mesh.axis_names))
        self.share = {name: list(self._ranges(name)) for name in self.sizes}
        self._cut = jax.jit(self._flat, out_shardings=dict.fromkeys(self.sizes, self._sharding))

    def _spans(self, name: str) -> list[tuple[int, int]]:
        """(first, one after the last) of each of this process's shards, in their order."""
        size = self._padded[name]
        found = self._sharding.addressable_devices_indices_map((size,)).values()
        return sorted({index[0].indices(size)[:2] for index in found if index})

    def _ranges(self, name: str) -> Iterator[tuple[int, int]]:
        """The spans, joined where they touch, without what is padded."""
        joined: list[list[int]] = []
        for first, last in self._spans(name):
            if joined and joined[-1][1] == first:
                joined[-1][1] = last
            else:
                joined.append([first, last])
        for first, last in joined:
            if first < (end := min(last, self.sizes[name])):
                yield first, end - first

    def _flat(self, tree: Any) -> dict[str, jax.Array]:
        padded = lambda name, x: jnp.pad(x.reshape(-1), (0, self._padded[name] - x.size))
        return {name: padded(name, x) for name, x in named_arrays(tree).items()}

    def host(self, tree: Any) -> Arrays:
        """Of a tree like the parameters, or with a leading dimension of 1: the ranges of the share, side by side."""
        found = {}
        for name, x in self._cut(tree).items():
            shards = {shard.index[0].indices(x.size)[0]: shard for shard in x.addressable_shards}
            own = [(first, np.asarray(shards[first].data)) for first in sorted(shards)]
            found[name] = np.concatenate([data[: max(0, self.sizes[name] - first)] for first, data in own])
        return found

    def tree(self, arrays: Mapping[str, np.ndarray], like: Any) -> Any:
        """On the devices, in the shapes and shardings of a tree like the parameters."""
        flat = {name: self._placed(name, arrays[name]) for name in self.sizes}
        names, wanted = list(named_arrays(like)), jax.tree.leaves(like)

        def whole(flat: dict[str, jax.Array]) -> Any:
            back = [flat[name][: self.sizes[name]].reshape(x.shape) for name, x in zip(names, wanted, strict=True)]
            return jax.tree.structure(like).unflatten(back)

        return jax.jit(whole, out_shardings=jax.tree.map(lambda x: x.sharding, like))(flat)

    def _placed(self, name: str, x: np.ndarray) -> jax.Array:
        place, at = 0, {}
        for first, last in self._spans(name):
            count = max(0, min(last, self.sizes[name]) - first)
            at[first] = np.pad(x[place : place + count], (0, last - first - count))
            place += count
        size = self._padded[name]

        def part(index: Any) -> np.ndarray:
            return at[index[0].indices(size)[0]]

        return jax.make_array_from_callback((size,), self._sharding, part)

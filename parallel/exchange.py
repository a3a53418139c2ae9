"""The exchange: the mean over replicas of one tensor per replica, through a codec.

It is a shard_map that is manual over all mesh axes: every device encodes the shard it already holds, bytes move over
`replica` only, every device decodes. Nothing is gathered over a fast axis, whatever the model parallelism.

R replicas on D devices of the `replica` axis, k = R/D of them on each. n elements of one device's shard.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from parallel.codecs import BF16, Identity

AXIS = "replica"
SMALL = 2**14  # shards of fewer elements share one bucket: a collective costs about as much as 64 KiB more to send
ALGORITHMS = ("auto", "gather", "two_stage", "psum")


@dataclass(frozen=True)
class Exchange:
    """Mean over replicas of a tree of arrays [R, …], whose leaves are sharded as P("replica", *spec).

    gather: every device gets all messages and adds them up. R−k messages sent, one quantisation.
    two_stage: each device adds up one R-th of the vector and sends the sum on: all_to_all, sum, all_gather. Twice
    a message sent whatever R, two quantisations.
    psum: XLA's all-reduce, without a codec: for comparison.

    Sums are float32 in the order of the replicas whatever the layout, so that R replicas give the same bits on any
    number of devices.
    """

    codec: Identity | BF16
    algorithm: str
    mesh: Mesh
    replicas: int
    specs: Any

    def __post_init__(self):
        devices = self.mesh.shape[AXIS]
        if self.replicas % devices:
            raise ValueError(
                f"sync.replicas={self.replicas} is not a multiple of mesh.replica={devices}: "
                "each device of the slow axis holds the same number of replicas"
            )
        if self.algorithm not in ALGORITHMS:
            raise ValueError(f"sync.algorithm={self.algorithm!r} is none of {', '.join(ALGORITHMS)}")
        if self.algorithm == "psum" and not isinstance(self.codec, Identity):
            raise ValueError("sync.algorithm=psum adds up on the wire and knows no codec: set sync.codec=none")

    @property
    def resolved(self) -> str:
        """The algorithm that `auto` means: at R = 2 both send the same bytes, and gather rounds once, in one hop."""
        if self.algorithm != "auto":
            return self.algorithm
        return "gather" if self.replicas <= 2 else "two_stage"

    def mean(self, tree_R: Any) -> Any:
        """Leaves [R, …] float32 -> […], replicated over `replica`, sharded over the fast axes as before."""
        leaves, treedef = jax.tree.flatten(tree_R)
        specs = treedef.flatten_up_to(self.specs)
        if self.replicas == 1:
            return jax.tree.map(lambda x: x[0], tree_R)  # there is nobody to exchange with

        def body(*shards):
            with jax.named_scope("exchange"):
                return tuple(self._mean_shards(shards))

        in_specs = tuple(P(AXIS, *spec) for spec in specs)
        means = jax.shard_map(body, mesh=self.mesh, in_specs=in_specs, out_specs=tuple(specs), check_vma=False)(*leaves)
        return treedef.unflatten(means)

    def scalars(self, x_RM: jax.Array, name: str) -> jax.Array:
        """Sum over replicas of a few float32 scalars [R, M] -> [M], named in the compiled program."""

        def body(x_kM):
            with jax.named_scope(f"scalars_{name}"):
                return lax.psum(jnp.sum(x_kM, axis=0), AXIS)

        return jax.shard_map(body, mesh=self.mesh, in_specs=P(AXIS), out_specs=P(), check_vma=False)(x_RM)

    def _mean_shards(self, shards: Sequence[jax.Array]) -> list[jax.Array]:
        """Each large shard [k, …] by itself, so that memory is bounded by the largest; the small ones in one bucket."""
        small, large = self._plan([shard.size // shard.shape[0] for shard in shards])
        means: list[Any] = [None] * len(shards)
        for i in large:
            means[i] = self._mean_flat(shards[i].reshape(shards[i].shape[0], -1)).reshape(shards[i].shape[1:])
        if small:
            bucket_kN = jnp.concatenate([shards[i].reshape(shards[i].shape[0], -1) for i in small], axis=1)
            mean_N, start = self._mean_flat(bucket_kN), 0
            for i in small:
                size = math.prod(shards[i].shape[1:])
                means[i] = mean_N[start : start + size].reshape(shards[i].shape[1:])
                start += size
        return means

    def _plan(self, sizes: Sequence[int]) -> tuple[list[int], list[int]]:
        small = [i for i, size in enumerate(sizes) if size < SMALL]
        return small, [i for i in range(len(sizes)) if i not in set(small)]

    def _mean_flat(self, x_kN: jax.Array) -> jax.Array:
        n = x_kN.shape[1]
        if self.resolved == "psum":
            return lax.psum(jnp.sum(x_kN, axis=0), AXIS) / self.replicas
        x_kN = jnp.pad(x_kN, ((0, 0), (0, self._padded(n) - n)))
        return (self._gather(x_kN) if self.resolved == "gather" else self._two_stage(x_kN))[:n]

    def _gather(self, x_kN: jax.Array) -> jax.Array:
        message = jax.vmap(self.codec.encode)(x_kN)
        gathered = jax.tree.map(lambda m: lax.all_gather(m, AXIS, tiled=True), message)  # [R, …]
        return self._sum_in_order(gathered) / self.replicas

    def _two_stage(self, x_kN: jax.Array) -> jax.Array:
        R, (k, n) = self.replicas, x_kN.shape
        x_kRC = x_kN.reshape(k, R, n // R)  # chunk c is owned by the device of replica c
        message = jax.vmap(jax.vmap(self.codec.encode))(x_kRC)
        # [k, R, …] -> [R, k, …]: from every replica, the chunks that this device owns.
        received = jax.tree.map(
            lambda m: lax.all_to_all(m, AXIS, split_axis=1, concat_axis=0, tiled=True),
            message,
        )
        mean_kC = jax.vmap(self._sum_in_order, in_axes=1)(received) / R
        second = jax.vmap(self.codec.encode)(mean_kC)
        gathered = jax.tree.map(lambda m: lax.all_gather(m, AXIS, tiled=True), second)  # [R, …]
        return jax.vmap(self.codec.decode)(gathered).reshape(n)

    def _sum_in_order(self, message_R: Any) -> jax.Array:
        """Decodes and adds replica 0, 1, …, R−1. The barriers keep XLA from reassociating or fusing the chain: a
        plain mean differs in the last bit between layouts in a third of the outputs."""

        def decoded(r: int) -> jax.Array:
            return lax.optimization_barrier(self.codec.decode(jax.tree.map(lambda m: m[r], message_R)))

        total = decoded(0)
        for r in range(1, self.replicas):
            total = lax.optimization_barrier(total + decoded(r))
        return total

    def _padded(self, n: int) -> int:
        """n rounded up so that each of the R chunks (two-stage) or the vector (gather) is a whole number of blocks."""
        unit = self.codec.block * (self.replicas if self.resolved == "two_stage" else 1)
        return -(-n // unit) * unit

    # ── what it costs ────────────────────────────────────────────────────────────────────────────────────────────

    def wire_bytes(self, tree: Any) -> float:
        """Closed form of the bytes that one device sends over `replica` in one exchange of `tree` (shapes without R).

        two_stage (k+1)(D−1)/D · w · n; gather (R−k) · w · n; psum 2(D−1)/D · 4 · n, n padded; 0 when D = 1.
        """
        R, D = self.replicas, self.mesh.shape[AXIS]
        k, w = R // D, self.codec.bytes_per_element
        leaves, treedef = jax.tree.flatten(tree)
        sizes = [
            self._shard_size(leaf.shape, spec)
            for leaf, spec in zip(leaves, treedef.flatten_up_to(self.specs), strict=True)
        ]
        small, large = self._plan(sizes)
        vectors = [sizes[i] for i in large] + ([sum(sizes[i] for i in small)] if small else [])
        if self.resolved == "psum":
            return sum(2 * (D - 1) / D * 4 * n for n in vectors)
        if self.resolved == "gather":
            return sum((R - k) * w * self._padded(n) for n in vectors)
        return sum((k + 1) * (D - 1) / D * w * self._padded(n) for n in vectors)

    def _shard_size(self, shape: Sequence[int], spec: P) -> int:
        axes = [axis for axis in spec if axis is not None]
        return math.prod(shape) // math.prod(self.mesh.shape[axis] for axis in axes)

"""DeMo's codec: the largest coefficients of a cosine transform (Peng et al. 2024, Decoupled Momentum Optimization).

Shapes: k replicas on this device, L layers, m × n this device's shard of a layer, cut into tiles of s × s.
"""

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from parallel.exchange.codecs import rounds
from parallel.exchange.codecs.base import RoundCodec
from parallel.exchange.codecs.sparse import TopK, kept


@dataclass(frozen=True)
class DeMo(RoundCodec):
    """Each s × s tile of a matrix goes through a two-dimensional cosine transform (orthonormal, so its inverse is its
    transpose); the largest coefficients are sent as by TopK, averaged, and transformed back. What is not sent stays in
    the residual, which with a decay of 0.999 is DeMo's momentum. Vectors are cut into rows of s.

    Coefficients are added up in the order of the replicas: an addition in any order would let replicas drift apart.
    """

    density: float = 1 / 128  # 32 of 64 × 64
    tile: int = 64
    per_matrix: ClassVar[bool] = True  # each matrix is a unit by itself, however small
    wants_error_feedback: ClassVar[bool] = True

    def __post_init__(self):
        kept(self.density, self.tile**2)

    def wire(self, leaf: Any, send: Callable) -> dict[str, float]:
        return send(math.prod(self._tiles(leaf)) * self.tile**2, self._sparse, self._pieces(leaf))

    def mean(self, p_kN: jax.Array, state: Any, key: jax.Array, leaf: Any, net: Any) -> Generator[Any, Any, Any]:
        (L, rows, columns), s, k = self._tiles(leaf), self.tile, p_kN.shape[0]
        _, m, n = leaf.matrix or (1, -(-leaf.size // s), s)
        basis_ss = jnp.asarray(_cosines(s))

        def to_coefficients(x_Gsn: jax.Array, i: Any) -> jax.Array:
            tiles = x_Gsn.reshape(-1, s, columns, s).swapaxes(1, 2)
            return (basis_ss @ tiles @ basis_ss.T).reshape(-1)

        def from_coefficients(c_N: jax.Array, i: Any) -> jax.Array:
            tiles = basis_ss.T @ c_N.reshape(-1, columns, s, s) @ basis_ss
            return tiles.swapaxes(1, 2).reshape(-1, s, columns * s)

        def unpadded(x: jax.Array, leading: tuple[int, ...]) -> jax.Array:
            x_Lmn = x.reshape(*leading, L, rows * s, columns * s)[..., :m, :n]
            return x_Lmn.reshape(*leading, -1)[..., : leaf.size]

        x_kLmn = jnp.pad(p_kN, ((0, 0), (0, L * m * n - leaf.size))).reshape(k, L, m, n)
        x_kLmn = jnp.pad(x_kLmn, ((0, 0), (0, 0), (0, rows * s - m), (0, columns * s - n)))
        x_kPGsn = x_kLmn.reshape(k, self._pieces(leaf), -1, s, columns * s)  # G rows of tiles in a piece
        mean, owed_k = yield from rounds.mean_in_pieces(net, x_kPGsn, to_coefficients, from_coefficients, self._sparse)
        return unpadded(mean, ()), unpadded(owed_k, (k,)), state

    @property
    def _sparse(self) -> TopK:
        return TopK(density=self.density, chunk=self.tile**2)

    def _pieces(self, leaf: Any) -> int:
        L, rows, columns = self._tiles(leaf)
        return rounds.pieces((L * rows,), columns * self.tile**2)

    def _tiles(self, leaf: Any) -> tuple[int, int, int]:
        L, m, n = leaf.matrix or (1, -(-leaf.size // self.tile), self.tile)
        return L, -(-m // self.tile), -(-n // self.tile)


def _cosines(s: int) -> np.ndarray:
    """The orthonormal DCT-II as a matrix: row f is the cosine of frequency f."""
    frequency, place = np.mgrid[:s, :s]
    basis = np.cos(np.pi * (2 * place + 1) * frequency / (2 * s)) * np.sqrt(2 / s)
    basis[0] /= np.sqrt(2)
    return basis.astype(np.float32)

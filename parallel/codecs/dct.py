"""DeMo's codec: the largest coefficients of a cosine transform (Peng et al. 2024, Decoupled Momentum Optimization).

Shapes: k replicas on this device, L layers, m × n this device's shard of a layer, cut into G tiles of s × s.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from parallel.codecs.sparse import TopK, kept


@dataclass(frozen=True)
class DeMo:
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

    def takes(self, leaf: Any) -> bool:
        return True

    def init(self, leaf: Any, key: jax.Array) -> Any:
        return {}

    def wire(self, leaf: Any, send: Callable) -> dict[str, float]:
        return send(math.prod(self._tiles(leaf)) * self.tile**2, self._sparse)

    def mean(self, p_kN: jax.Array, state: Any, key: jax.Array, leaf: Any, net: Any) -> tuple[Any, Any, Any]:
        (L, rows, columns), s = self._tiles(leaf), self.tile
        _, m, n = leaf.matrix or (1, -(-leaf.size // s), s)
        basis_ss = jnp.asarray(_cosines(s))

        def to_coefficients(x_N: jax.Array) -> jax.Array:
            x_Lmn = jnp.pad(x_N, (0, L * m * n - x_N.size)).reshape(L, m, n)
            x_Lmn = jnp.pad(x_Lmn, ((0, 0), (0, rows * s - m), (0, columns * s - n)))
            tiles = x_Lmn.reshape(L, rows, s, columns, s).swapaxes(2, 3)
            return (basis_ss @ tiles @ basis_ss.T).reshape(-1)

        def from_coefficients(c_G: jax.Array) -> jax.Array:
            tiles = basis_ss.T @ c_G.reshape(L, rows, columns, s, s) @ basis_ss
            x_Lmn = tiles.swapaxes(2, 3).reshape(L, rows * s, columns * s)[:, :m, :n]
            return x_Lmn.reshape(-1)[: leaf.size]

        mean_G, sent_kG = net.mean(jax.vmap(to_coefficients)(p_kN), self._sparse, with_sent=True)
        return from_coefficients(mean_G), jax.vmap(from_coefficients)(sent_kG), state

    @property
    def _sparse(self) -> TopK:
        return TopK(density=self.density, chunk=self.tile**2)

    def _tiles(self, leaf: Any) -> tuple[int, int, int]:
        L, m, n = leaf.matrix or (1, -(-leaf.size // self.tile), self.tile)
        return L, -(-m // self.tile), -(-n // self.tile)


def _cosines(s: int) -> np.ndarray:
    """The orthonormal DCT-II as a matrix: row f is the cosine of frequency f."""
    frequency, place = np.mgrid[:s, :s]
    basis = np.cos(np.pi * (2 * place + 1) * frequency / (2 * s)) * np.sqrt(2 / s)
    basis[0] /= np.sqrt(2)
    return basis.astype(np.float32)

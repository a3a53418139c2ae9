"""PowerSGD: a matrix as the product of two thin ones (Vogels, Karimireddy & Jaggi 2019, algorithm 1).

Shapes: k replicas on this device, L layers, m rows, n columns of this device's shard, r the rank.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from parallel.exchange.codecs import rounds
from parallel.exchange.codecs.base import RoundCodec


@dataclass(frozen=True)
class PowerSGD(RoundCodec):
    """P = mean(M Q); P orthogonalised; Q = mean(Mᵀ P); M ≈ P Qᵀ, with Q kept for the next step (warm start).

    Linear: both factors are averaged on the wire, 4·r(m + n) bytes a matrix and stage. A device's shard of a layer is
    one matrix, so the quality depends on the mesh. Vectors, and matrices that it would not make half as large, are
    sent as they are. The residual is p minus the averaged reconstruction. By QR: Gram-Schmidt with an epsilon would
    stay dead for ever after one gradient of zeros.
    """

    rank: int = 4
    per_matrix: ClassVar[bool] = True  # each matrix is a unit by itself, however small
    wants_error_feedback: ClassVar[bool] = True

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"sync.rank={self.rank}: must be 1 or more")

    def check(self, shards: Sequence[Any]) -> None:
        if not any(self.takes(shard) for shard in shards):
            largest = max((min(shard.matrix[1:]) for shard in shards if shard.matrix), default=0)
            raise ValueError(
                f"sync.rank={self.rank}: no array becomes half as large by factors of this rank (the largest shard of "
                f"a matrix has {largest} rows or columns): choose a lower rank, or another codec"
            )

    def takes(self, leaf: Any) -> bool:
        if leaf.matrix is None:
            return False
        _, m, n = leaf.matrix
        return 2 * self.rank * (m + n) <= m * n

    def init(self, leaf: Any, key: jax.Array) -> Any:
        L, _, n = leaf.matrix
        return {"q": jax.random.normal(key, (L, n, self.rank))}

    def wire(self, leaf: Any, send: Callable) -> dict[str, float]:
        L, m, n = leaf.matrix
        first, second = send(L * m * self.rank), send(L * n * self.rank)
        return {dtype: first[dtype] + second[dtype] for dtype in first}

    def mean(self, p_kN: jax.Array, state: Any, key: jax.Array, leaf: Any, net: Any) -> Generator[Any, Any, Any]:
        L, m, n = leaf.matrix
        k, r = p_kN.shape[0], self.rank
        M_kLmn = p_kN.reshape(k, L, m, n)
        # Each replica's product by itself: the last bits of a larger one would depend on how many share a device.
        M_Q_k = jnp.stack([M_Lmn @ state["q"] for M_Lmn in M_kLmn])
        P_Lmr = (yield from rounds.mean(net, M_Q_k.reshape(k, -1))).reshape(L, m, r)
        P_Lmr = jnp.linalg.qr(P_Lmr)[0]
        Mt_P_k = jnp.stack([M_Lmn.mT @ P_Lmr for M_Lmn in M_kLmn])
        Q_Lnr = (yield from rounds.mean(net, Mt_P_k.reshape(k, -1))).reshape(L, n, r)
        mean_N = (P_Lmr @ Q_Lnr.mT).reshape(-1)
        return mean_N, p_kN - mean_N, {"q": Q_Lnr}

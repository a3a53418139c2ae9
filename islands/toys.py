"""Tasks small enough for a thousand islands in one process: NumPy alone, a step in some ten microseconds.

Shapes: K steps, B batch, D inputs, H hidden, C classes, N samples, P parameters.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from islands.state import Params

SHARDS = 8  # an island has, of every so many clusters, one of its own


@dataclass(frozen=True)
class Mixture:
    """A mixture of mixtures of Gaussians, as in Async Local-SGD (Liu et al. 2024, §4, the toy example): each class is
    several clusters in different places, and a network with one hidden layer learns which is which, with AdamW inside.
    Nobody sees a sample twice.

    seed: of the first weights and of what is sampled; where the clusters are, and what is held out, is always the same.
    skew: the share of an island's samples that are from clusters of its own alone; the others are from all.
    """

    seed: int = 0
    lr: float = 1e-3
    skew: float = 0.5
    noise: float = 0.35
    inputs: int = 32
    hidden: int = 64
    classes: int = 4
    clusters: int = 8  # of each class
    batch: int = 32

    @property
    def tokens(self) -> int:
        return self.batch

    @cached_property
    def _centres(self) -> np.ndarray:
        x = np.random.default_rng(1).standard_normal((self.classes * self.clusters, self.inputs))
        return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)

    @cached_property
    def _held_out(self) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(2)
        return self._samples(rng, rng.integers(len(self._centres), size=2048))

    def _samples(self, rng: np.random.Generator, cluster: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        noise = rng.standard_normal((*cluster.shape, self.inputs), np.float32)
        return self._centres[cluster] + np.float32(self.noise) * noise, cluster // self.clusters

    def init(self) -> Params:
        rng = np.random.default_rng([self.seed, 3])
        wide = rng.standard_normal((self.inputs, self.hidden)) / np.sqrt(self.inputs / 2)
        out = rng.standard_normal((self.hidden, self.classes)) / np.sqrt(self.hidden)
        parts = {"wide": wide, "wide_bias": np.zeros(self.hidden), "out": out, "out_bias": np.zeros(self.classes)}
        return {name: x.astype(np.float32).reshape(-1) for name, x in parts.items()}

    def begin(self, island: int) -> tuple[np.ndarray, np.ndarray, int]:
        return np.zeros(self._size, np.float32), np.zeros(self._size, np.float32), 0

    def steps(self, params: Params, own: tuple, island: int, done: int, count: int) -> tuple[Params, tuple, float]:
        rng = np.random.default_rng([self.seed, 4, island, done])
        x_KBD, label_KB = self._samples(rng, self._clusters_of(rng, island, (count, self.batch)))
        theta_P, g_P = np.concatenate(list(params.values())), np.empty(self._size, np.float32)
        theta, g, losses = self._split(theta_P), self._split(g_P), []
        first_P, second_P, updates = own[0].copy(), own[1].copy(), own[2]
        for x_BD, label_B in zip(x_KBD, label_KB, strict=True):
            losses.append(self._loss(theta, x_BD, label_B, g))
            updates += 1
            first_P += 0.1 * (g_P - first_P)
            second_P += 0.01 * (np.square(g_P) - second_P)
            step_P = np.sqrt(second_P * (1 / (1 - 0.99**updates)))
            step_P += 1e-8
            np.divide(first_P, step_P, out=step_P)
            step_P *= self.lr / (1 - 0.9**updates)
            theta_P -= step_P
        return theta, (first_P, second_P, updates), float(np.mean(losses))

    def loss(self, params: Params) -> float:
        return self._loss(params, *self._held_out)

    def _clusters_of(self, rng: np.random.Generator, island: int, shape: tuple[int, int]) -> np.ndarray:
        """Which cluster each sample of an island is from."""
        total = self.classes * self.clusters
        own = np.arange(island % SHARDS, total, SHARDS)
        from_all = rng.random(shape) >= self.skew
        return np.where(from_all, rng.integers(total, size=shape), own[rng.integers(len(own), size=shape)])

    @cached_property
    def _size(self) -> int:
        return sum(x.size for x in self.init().values())

    def _split(self, x_P: np.ndarray) -> Params:
        """Views of a vector of all parameters."""
        sizes = {name: x.size for name, x in self.init().items()}
        return dict(zip(sizes, np.split(x_P, np.cumsum(list(sizes.values()))[:-1]), strict=True))

    def _loss(self, params: Params, x_BD: np.ndarray, label_B: np.ndarray, gradient: Params | None = None) -> float:
        """The mean; where arrays are given for the gradient, it is written into them."""
        out_HC = params["out"].reshape(self.hidden, self.classes)
        h_BH = x_BD @ params["wide"].reshape(self.inputs, self.hidden)
        h_BH += params["wide_bias"]
        np.maximum(h_BH, 0, out=h_BH)
        p_BC = h_BH @ out_HC
        p_BC += params["out_bias"]
        p_BC -= p_BC.max(axis=1, keepdims=True)
        rows = np.arange(len(label_B))
        of_label_B = p_BC[rows, label_B]
        np.exp(p_BC, out=p_BC)
        total_B = p_BC.sum(axis=1)
        if gradient:
            p_BC /= total_B[:, None]
            p_BC[rows, label_B] -= 1
            p_BC *= 1 / len(label_B)
            back_BH = p_BC @ out_HC.T
            back_BH *= h_BH > 0
            np.matmul(x_BD.T, back_BH, out=gradient["wide"].reshape(self.inputs, self.hidden))
            np.matmul(h_BH.T, p_BC, out=gradient["out"].reshape(self.hidden, self.classes))
            np.sum(back_BH, axis=0, out=gradient["wide_bias"])
            np.sum(p_BC, axis=0, out=gradient["out_bias"])
        return float(np.mean(np.log(total_B) - of_label_B))


@dataclass(frozen=True)
class Textbook:
    """Binary classification of 1,000 samples in the plane by logistic regression: two weights, so that the way to the
    optimum is a line on paper. Plain stochastic gradient descent at a rate of 0.1."""

    seed: int = 0
    lr: float = 0.1
    batch: int = 10
    samples: int = 1000

    @property
    def tokens(self) -> int:
        return self.batch

    @cached_property
    def _data(self) -> tuple[np.ndarray, np.ndarray]:
        """(x [N, 2], y [N] of -1 and 1): two clouds that overlap, stretched, so that the loss is a valley."""
        rng = np.random.default_rng(1)
        y = np.repeat([-1.0, 1.0], self.samples // 2)
        x = rng.standard_normal((len(y), 2)) * [2.0, 0.5] + 0.6 * y[:, None] * [1.0, 0.6]
        return x.astype(np.float32), y.astype(np.float32)

    def init(self) -> Params:
        return {"w": np.array([-1.0, -1.0], np.float32)}

    def begin(self, island: int) -> None:
        return None

    def steps(self, params: Params, own: None, island: int, done: int, count: int) -> tuple[Params, None, float]:
        x, y = self._data
        rng = np.random.default_rng([self.seed, 2, island, done])
        w, losses = params["w"].copy(), []
        for rows in rng.integers(len(y), size=(count, self.batch)):
            margin = y[rows] * (x[rows] @ w)
            losses.append(float(np.mean(np.logaddexp(0, -margin))))
            w += self.lr * np.mean((y[rows] / (1 + np.exp(margin)))[:, None] * x[rows], axis=0)
        return {"w": w}, None, float(np.mean(losses))

    def loss(self, params: Params) -> float:
        return float(np.mean(self.losses(params["w"][None])))

    def losses(self, w_P2: np.ndarray) -> np.ndarray:
        """Of many points of the plane."""
        x, y = self._data
        return np.mean(np.logaddexp(0, -y * (w_P2 @ x.T)), axis=1)

    def optimum(self) -> np.ndarray:
        """By Newton's method."""
        x, y = (each.astype(np.float64) for each in self._data)
        w = np.zeros(2)
        for _ in range(30):
            p = 1 / (1 + np.exp(y * (x @ w)))
            hessian = (x * (p * (1 - p))[:, None]).T @ x
            w += np.linalg.solve(hessian, (x * (p * y)[:, None]).sum(axis=0))
        return w

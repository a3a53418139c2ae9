"""How fast islands are: what the laboratory plays, and how many steps of a round an island of some speed makes."""

import math
from dataclasses import dataclass

import numpy as np

LEAST = 1e-9  # of a step: what rounding may take off
SPEED = "speed"  # in the numbers of a push: the steps a second of its round


@dataclass(frozen=True)
class Site:
    """Where one island of the laboratory runs. Times are seconds since the beginning.

    speed: steps a second. spread: of the log-normal factor of each round's time, whose mean is 1; 0: it is constant.
    straggle: so often a round takes `slowdown` times as long. bandwidth: bytes a second, up and down. latency: seconds
    of each transfer. joins, leaves: when. fails: when it dies in the middle of what it does; away: seconds after which
    it is back.
    """

    speed: float = 1.0
    spread: float = 0.0
    straggle: float = 0.0
    slowdown: float = 10.0
    bandwidth: float = math.inf
    latency: float = 0.0
    joins: float = 0.0
    leaves: float = math.inf
    fails: tuple[float, ...] = ()
    away: float = math.inf

    def __post_init__(self):
        if not (self.speed > 0 and self.bandwidth > 0):
            raise ValueError(
                f"an island of {self.speed:g} steps and {self.bandwidth:g} bytes a second never ends a round"
            )

    def seconds(self, steps: int, rng: np.random.Generator) -> float:
        """Of a round of so many steps."""
        factor = math.exp(self.spread * rng.standard_normal() - self.spread**2 / 2) if self.spread else 1.0
        if self.straggle and rng.random() < self.straggle:
            factor *= self.slowdown
        return steps / self.speed * factor

    def transfer(self, size: float) -> float:
        """Seconds for so many bytes."""
        return self.latency + size / self.bandwidth


def local_steps(interval: int, speed: float, fastest: float) -> int:
    """Dynamic local updates (Liu et al. 2024, §5): ⌊H · v / max v⌋, at least one: all end a round at about the same
    time, and what the slowest sends is no older than what the fastest sends."""
    return max(1, int(interval * speed / fastest + LEAST))

"""What a planner weighs: a mesh, micro-steps, rematerialisation and an exchange, with what they take and hold."""

from dataclasses import dataclass
from typing import Any

from parallel.cost.network import Layout
from parallel.cost.pace import Step
from parallel.exchange.codecs import CODECS
from parallel.layout.axes import SLOW
from recipes import over_link

MARGIN = 1.2  # by which temporaries may be more than predicted, for what is called fitting


@dataclass(frozen=True)
class Candidate:
    """changes: of the config. moments: temporary bytes by moment and array (held.held). delay: so many times the
    steps of a synchronous run are needed to the same loss. host_bytes: of the host's memory, that a device takes."""

    changes: dict[str, Any]
    layout: Layout
    strategy: str
    codec: str
    step: Step
    state_bytes: float
    moments: dict[str, dict[str, float]]
    sent: dict[str, float]  # bytes by axis; over `replica` those of an exchange's dearest program
    tokens: int  # of a step, of all devices
    memory: int  # bytes that a program may have
    delay: float = 1.0
    host_bytes: float = 0.0

    @property
    def temporary_bytes(self) -> float:
        return max(sum(found.values()) for found in self.moments.values())

    @property
    def peak_bytes(self) -> float:
        return self.state_bytes + self.temporary_bytes

    @property
    def needed_bytes(self) -> float:
        """With the margin."""
        return self.state_bytes + MARGIN * self.temporary_bytes

    @property
    def fits(self) -> bool:
        return self.needed_bytes <= self.memory

    @property
    def seconds(self) -> float:
        return self.step.seconds

    @property
    def bare_seconds(self) -> float:
        """Without what the exchange takes."""
        return self.seconds - self.step.exposed[SLOW]

    @property
    def to_loss(self) -> float:
        """Seconds for what one synchronous step does."""
        return self.seconds * self.delay

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def flags(self) -> str:
        return " ".join(f"--config.{key}={value}" for key, value in self.changes.items())

    @property
    def mildness(self) -> tuple[int, int]:
        """How much of what is trained an exchange changes: less first."""
        return list(over_link.TRIED).index(self.strategy), list(CODECS).index(self.codec)

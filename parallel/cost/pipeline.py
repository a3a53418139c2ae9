"""What a pipeline costs, in closed form (parallel/layout/pipeline.py): idle time, and bytes from stage to stage."""

from dataclasses import dataclass

from parallel.layout.pipeline import ticks


@dataclass(frozen=True)
class Pipeline:
    """activation: bytes that one device holds of one micro-batch between two layers."""

    stages: int
    micro: int
    activation: int
    repeats: int = 1

    @property
    def ticks(self) -> int:
        return ticks(self.micro, self.stages, self.repeats)

    @property
    def idle(self) -> float:
        """The share of ticks in which a stage has nothing to do."""
        return 1 - self.repeats * self.micro / self.ticks

    @property
    def sent(self) -> int:
        """By one device in a step: in a tick and pass one activation to the next stage, and one of those that come and
        go."""
        return 4 * self.ticks * self.activation

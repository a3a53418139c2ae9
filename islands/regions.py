"""HALoS (Kim et al., ICML 2025, algorithm 1): between islands and their log each region has a server of its own.

The workers of a region begin their rounds with the model of its server, which folds their pseudo-gradients by Delayed
Nesterov; every so many of them it pushes what it has gone as one pseudo-gradient, and mixes the parameters that come
back into its own. For the laboratory: here an island is a region with one worker, and a round of the island is what
lies between two pushes of its server.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from islands import merge
from islands.laboratory import Task
from islands.record import PUSH, Record
from islands.state import Params, State, in_blocks
from islands.view import Verdict, View

ALONE = Verdict("", live=1, complete=0)  # of what a worker hands to its server


@dataclass(frozen=True)
class Region:
    """interval: steps of a worker between two pseudo-gradients. lr, momentum, buffer: of the server's Delayed Nesterov,
    as in merge.Nesterov. mixing: α, the weight of the log's parameters where they are mixed into the server's. Momentum
    and mixing are the paper's, where nothing else is said."""

    interval: int
    lr: float
    momentum: float = 0.9
    buffer: int = 1
    mixing: float = 0.25

    def __post_init__(self):
        if self.interval < 1 or self.buffer < 1:
            raise ValueError(f"interval={self.interval}, buffer={self.buffer}: expected 1 or more")
        if not 0 < self.mixing <= 1:
            raise ValueError(f"mixing={self.mixing}: expected more than 0, at most 1")

    @property
    def rule(self) -> merge.Nesterov:
        return merge.Nesterov(merge.Outer("nesterov", self.lr, self.momentum), self.buffer)


@dataclass(frozen=True)
class Regional:
    """A task as the laboratory sees it where each island has a server of its own."""

    task: Task
    region: Region

    @property
    def tokens(self) -> int:
        return self.task.tokens

    def init(self) -> Params:
        return self.task.init()

    def begin(self, island: int) -> tuple[State | None, Any]:
        """(its server, of which there is none yet, and what a worker keeps)."""
        return None, self.task.begin(island)

    def steps(self, params: Params, own: Any, island: int, done: int, count: int) -> tuple[Params, Any, float]:
        """params: of the log. What comes back is as far from them as the server has gone since it mixed them in."""
        (server, inner), losses = own, []
        server = self._mixed(server, params)
        begun = server.copied("params")
        for first in range(done, done + count, self.region.interval):
            part = min(self.region.interval, done + count - first)
            before = server.copied("params")
            after, inner, loss = self.task.steps(before, inner, island, first, part)
            delta = {leaf: before[leaf] - after[leaf] for leaf in after}
            record = Record(type=PUSH, island="worker", incarnation=1, nonce="", clock=first, steps=part)
            merge.fold(self.region.rule, server, record, ALONE, View(), in_blocks(delta))
            losses.append(loss * part / count)
        gone = {leaf: begun[leaf] - x for leaf, x in server.copied("params").items()}
        return {leaf: params[leaf] - gone[leaf] for leaf in params}, (server, inner), float(np.sum(losses))

    def loss(self, params: Params) -> float:
        return self.task.loss(params)

    def _mixed(self, server: State | None, params: Params) -> State:
        if server is None:
            return merge.start(self.region.rule, params)
        for leaf, x in params.items():
            own = server.arrays[f"params/{leaf}"]
            own += np.float32(self.region.mixing) * (x - own)
        return server

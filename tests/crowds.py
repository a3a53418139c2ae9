"""Requests that come together and one after another, are cancelled, and end: each answer has the bits it has alone."""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from serving.engine import Engine
from serving.requests import End, Request, Sampling

GREEDY = Sampling(temperature=0.0)
OCCUPANCIES = [1, 3, 4, 5, 8, 9, 16, 17]


@dataclass(frozen=True)
class Wish:
    """A request of the pool, by its place. cancel_after: so many of what is heard. pause: seconds after it came."""

    place: int
    cancel_after: int
    pause: float = 0.0


class Crowd:
    """pool: of requests, whose answers alone are asked for first. most: slots that there were at once."""

    def __init__(self, engine: Engine, pool: Sequence[Request]):
        self.engine, self.pool, self.most = engine, pool, 0
        self.alone = [[token.id for token in engine.answer(request)[0]] for request in pool]

    def run(self, together: Sequence[Wish], later: Sequence[Wish]) -> None:
        heard: list[tuple[int, list[Any], threading.Event]] = []
        with self.engine._changed:  # its thread waits
            for wish in together:
                heard.append(self._submit(wish))
        for wish in later:
            heard.append(self._submit(wish))
            time.sleep(wish.pause)
        for place, tokens, done in heard:
            assert done.wait(120)
            ids, reason = [token.id for token in tokens[:-1]], tokens[-1].reason
            assert reason in ("length", "stop", "cancelled"), reason
            assert ids == self.alone[place][: len(ids)]
            assert reason == "cancelled" or len(ids) == len(self.alone[place])

    def _submit(self, wish: Wish) -> Any:
        tokens, done, tickets = [], threading.Event(), []

        def receive(what: Any) -> None:
            tokens.append(what)
            self.most = max([self.most, *(len(lane.slots) for lane in self.engine._lanes.values())])
            if len(tokens) == wish.cancel_after and tickets:
                tickets[0].cancel()
            if isinstance(what, End):
                done.set()

        tickets.append(self.engine.submit(self.pool[wish.place], receive))
        return wish.place, tokens, done

    def drawn(self, draw: np.random.Generator, count: int) -> list[Wish]:
        """Of a seed."""
        places, ends = draw.integers(len(self.pool), size=count), draw.integers(1, 30, size=count)
        return [Wish(int(a), int(b), float(draw.choice([0, 0.002]))) for a, b in zip(places, ends, strict=True)]


def prompt(size: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, 256, size).tolist())


def pool_of(count: int, longest: int) -> list[Request]:
    """Prompts of up to so many tokens, and up to 16 of answer."""
    draw = np.random.default_rng(1)
    hows = [
        GREEDY,
        Sampling(1.0, seed=3),
        Sampling(0.7, top_k=20, top_p=0.8, seed=4),
        Sampling(1.2, min_p=0.05, repetition_penalty=1.3),
    ]
    found = []
    for i in range(count):
        size = int(draw.integers(1, longest))
        stops = frozenset(draw.integers(0, 256, 12).tolist()) if i % 3 == 0 else frozenset()
        found.append(Request(prompt(size, i), int(draw.integers(1, 16)), replace(hows[i % 4], seed=i), stops))
    return found

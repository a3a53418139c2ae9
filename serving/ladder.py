"""Which numbers of slots give a row the same bits: seen at start, on this mesh and machine."""

from typing import Any

import numpy as np

from serving.lane import Lane, Running, read
from serving.programs import ANSWER, Programs
from serving.requests import Request, Sampling

STEPS = 4


def agreeing(programs: Programs, weights: Any) -> tuple[int, ...]:
    """The rungs whose rows have the bits of the smallest rung's, whatever their slot and length of lane."""
    first: dict[int, Any] = {}
    return tuple(n for n in programs.rungs if all(_agrees(programs, weights, n, x, first) for x in programs.lengths))


def _agrees(programs: Programs, weights: Any, n: int, length: int, first: dict[int, Any]) -> bool:
    """first: {kind of request: what the first row of this kind gave}, which is filled in."""
    lane, kinds = Lane(programs, length, [None] * n, programs["init", n, length]()), _requests(programs, length)
    prompts = [read(programs, weights, request, length) for request in kinds]
    for slot in range(n):
        kept, size, _ = prompts[slot % len(kinds)]
        lane.admit(Running(kinds[slot % len(kinds)], None, STEPS), kept, size)
    steps = [lane.step(weights)[0] for _ in range(STEPS)]
    bits = [
        np.concatenate([np.asarray(step[name]).reshape(n, -1).view(np.int32) for name in ANSWER], 1) for step in steps
    ]
    rows = np.concatenate(bits, axis=1)
    expected = [first.setdefault(kind, rows[kind]) for kind in range(len(kinds))]
    return all(np.array_equal(rows[slot], expected[slot % len(kinds)]) for slot in range(n))


def _requests(programs: Programs, length: int) -> list[Request]:
    """Of several sizes, the likeliest token and drawn ones; the same for every length."""
    sizes = [size for size in (2, 7, programs.lengths[0] // 2) if size + STEPS <= length]
    draw = np.random.default_rng(0)
    vocab = programs.row["seen"].shape[0]
    prompts = [tuple(draw.integers(0, vocab, size).tolist()) for size in sizes]
    hows = [Sampling(0.0), Sampling(1.0, 40, 0.9, 0.01, 1.1, 1), Sampling(0.8)]
    return [Request(p, STEPS, how, top_logprobs=20) for p, how in zip(prompts, hows, strict=False)]

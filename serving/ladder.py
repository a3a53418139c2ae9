"""Which numbers of slots give a row the same bits: seen at start, on this mesh and machine."""

from typing import Any

import numpy as np

from serving.lane import Lane, Running, read
from serving.programs import ANSWER, Programs
from serving.requests import Request, Sampling

STEPS = 4


def agreeing(programs: Programs, weights: Any) -> tuple[int, ...]:
    """The rungs whose rows have the bits of the smallest rung's, whatever their slot. In which lane a request runs
    follows from it alone, so these need not agree."""
    first: dict[int, Any] = {length: {} for length in programs.lengths}
    return tuple(n for n in programs.rungs if all(_agrees(programs, weights, n, x, first[x]) for x in programs.lengths))


def _agrees(programs: Programs, weights: Any, n: int, length: int, first: dict[int, Any]) -> bool:
    """first: {kind of request: what the first row of this kind gave}, which is filled in."""
    kinds = _requests(programs, length)
    prompts = [read(programs, weights, request, length) for request in kinds]
    agrees = True
    for offset in range(0, len(kinds), n):
        lane = Lane(programs, length, [None] * n, programs["init", n, length]())
        of_slot = [(slot + offset) % len(kinds) for slot in range(n)]
        for kind in of_slot:
            kept, size, _ = prompts[kind]
            lane.admit(Running(kinds[kind], None, STEPS), kept, size)
        steps = [lane.step(weights)[0] for _ in range(STEPS)]
        answers = [np.asarray(step[name]).reshape(n, -1).view(np.int32) for step in steps for name in ANSWER]
        rows = np.concatenate(answers, axis=1)
        agrees &= all(np.array_equal(row, first.setdefault(kind, row)) for kind, row in zip(of_slot, rows, strict=True))
    return agrees


def _requests(programs: Programs, length: int) -> list[Request]:
    """Of several sizes, the likeliest token and drawn ones; the same for every length."""
    sizes = [size for size in (2, 7, programs.lengths[0] // 2) if size + STEPS <= length]
    draw = np.random.default_rng(0)
    vocab = programs.row["seen"].shape[0]
    prompts = [tuple(draw.integers(0, vocab, size).tolist()) for size in sizes]
    hows = [Sampling(0.0), Sampling(1.0, 40, 0.9, 0.01, 1.1, 1), Sampling(0.8)]
    return [Request(p, STEPS, how, top_logprobs=20) for p, how in zip(prompts, hows, strict=False)]

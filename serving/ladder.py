"""Which numbers of slots give a row the same bits: seen at start, on this mesh and machine."""

from typing import Any

import numpy as np

from serving.lane import Lane, Running, read
from serving.programs import ANSWER, Programs
from serving.requests import Request, Sampling

STEPS = 4


def agreeing(programs: Programs, weights: Any) -> tuple[int, ...]:
    """Rungs whose rows have the same bits, whatever their slot: as many as there are, and of as many the larger ones.
    None where not even two slots of one rung agree. In which lane a request runs follows from it alone, so lanes need
    not agree with each other."""
    groups: dict[bytes, list[int]] = {}
    for n in programs.rungs:
        found = [_bits(programs, weights, n, length) for length in programs.lengths]
        if None not in found:
            groups.setdefault(b"".join(bits for bits in found if bits), []).append(n)
    return tuple(max(groups.values(), key=lambda rungs: (len(rungs), rungs[-1]), default=()))


def _bits(programs: Programs, weights: Any, n: int, length: int) -> bytes | None:
    """What rows of so many slots answer; None where slots differ."""
    kinds = _requests(programs, length)
    prompts = [read(programs, weights, request, length) for request in kinds]
    first: dict[int, bytes] = {}
    for offset in range(0, len(kinds), n):
        lane = Lane(programs, length, [None] * n, programs["init", n, length]())
        of_slot = [(slot + offset) % len(kinds) for slot in range(n)]
        for kind in of_slot:
            kept, size, _ = prompts[kind]
            lane.admit(Running(kinds[kind], None, STEPS), kept, size)
        steps = [lane.step(weights)[0] for _ in range(STEPS)]
        answers = [np.asarray(step[name]).reshape(n, -1).view(np.int32) for step in steps for name in ANSWER]
        for kind, row in zip(of_slot, np.concatenate(answers, axis=1), strict=True):
            if first.setdefault(kind, row.tobytes()) != row.tobytes():
                return None
    return b"".join(first[kind] for kind in range(len(kinds)))


def _requests(programs: Programs, length: int) -> list[Request]:
    """Of several sizes, the likeliest token and drawn ones."""
    sizes = [size for size in (2, 7, length // 2) if size + STEPS <= length]
    draw = np.random.default_rng(0)
    vocab = programs.row["seen"].shape[0]
    prompts = [tuple(draw.integers(0, vocab, size).tolist()) for size in sizes]
    hows = [Sampling(0.0), Sampling(1.0, 40, 0.9, 0.01, 1.1, 1), Sampling(0.8)]
    return [Request(p, STEPS, how, top_logprobs=20) for p, how in zip(prompts, hows, strict=False)]

"""Slots of one length: which requests are in them, and their state on the devices."""

from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

from serving.programs import ANSWER, Programs, bucket
from serving.requests import Request, Token


@dataclass(eq=False)
class Running:
    """A request under way. ticket: whose it is. left: tokens that may still come."""

    request: Request
    ticket: Any
    left: int
    ended: bool = False


@dataclass
class Lane:
    """state: None while nothing runs. Its slots are as many as the smallest rung that holds what runs."""

    programs: Programs
    length: int
    slots: list[Running | None] = field(default_factory=list)
    state: Any = None

    @property
    def running(self) -> int:
        return sum(slot is not None for slot in self.slots)

    @property
    def has_room(self) -> bool:
        return self.running < self.programs.rungs[-1]

    def step(self, weights: Any) -> tuple[dict[str, jax.Array], list[Running | None]]:
        """(a token for every slot, not waited for; who is in them)."""
        self.state, answer = self.programs["decode", len(self.slots), self.length](weights, self.state)
        return answer, list(self.slots)

    def fit(self, more: int = 0) -> None:
        """Goes up to the rung that holds so many more, and down when a lower one would hold all and some."""
        rungs, want = self.programs.rungs, self.running + more
        if not want:
            self.slots, self.state = [], None
            return
        if not self.slots:
            n = next(rung for rung in rungs if rung >= want)
            self.slots, self.state = [None] * n, self.programs["init", n, self.length]()
        while len(self.slots) < want:
            self._resize(rungs[rungs.index(len(self.slots)) + 1])
        while (at := rungs.index(len(self.slots))) and 4 * want <= 3 * rungs[at - 1]:
            self._resize(rungs[at - 1])

    def _resize(self, m: int) -> None:
        taken = [i for i, slot in enumerate(self.slots) if slot is not None]
        of = np.resize(np.array([*taken, *([0] * m)], np.int32), m)
        program = self.programs["resize", len(self.slots), m, self.length]
        self.state = program(self.state, self.programs.put(of))
        self.slots = [self.slots[i] for i in taken] + [None] * (m - len(taken))

    # ── admission ────────────────────────────────────────────────────────────────────────────────────────────────────

    def admit(self, running: Running, kept: list[Any], size: int) -> None:
        """Into a free slot, which there is. kept: keys and values of the prompt's bucket, by layer."""
        programs, n, slot = self.programs, len(self.slots), self.slots.index(None)
        self.slots[slot], at = running, programs.put(np.int32(slot))
        if kept:
            insert = programs["insert", n, self.length, size]
            layers = zip(self.state["layers"], kept, strict=True)
            self.state["layers"] = [insert(cache, new, at) for cache, new in layers]
        values = jax.tree.map(programs.put, row_of(running.request, programs))
        self.state["rows"] = programs["admit", n](self.state["rows"], at, values)

    def free(self, running: Running) -> None:
        self.slots = [None if slot is running else slot for slot in self.slots]


def row_of(request: Request, programs: Programs) -> dict[str, Any]:
    """What a slot's row is at first: the prompt's last token is yet to be read."""
    values = vars(request.sampling) | {
        "token": request.prompt[-1],
        "position": len(request.prompt) - 1,
        "wants": request.top_logprobs >= 0,
        "seen": np.isin(np.arange(programs.row["seen"].shape[0]), request.prompt),
    }
    return {name: np.asarray(values[name], x.dtype) for name, x in programs.row.items()}


def read(programs: Programs, weights: Any, request: Request, length: int) -> tuple[list[Any], int, list[Token]]:
    """(keys and values of the prompt by layer, positions in its bucket, its tokens if they are asked for). The last
    token is read with the answer's first, so that all answers begin alike."""
    count = len(request.prompt) - (not request.echo)
    if not count:
        return [], 0, []
    size, ends = bucket(count, length), {name: x for name, x in weights.items() if name != "layers"}
    ids_T = np.zeros(size, np.int32)
    ids_T[:count] = request.prompt[:count]
    x_TD, kept = programs["read", size](ends, programs.put(ids_T)), []
    for number, layer_weights in enumerate(weights["layers"]):
        x_TD, new = programs["first" if number < programs.first else "layer", size](layer_weights, x_TD)
        kept.append(new)
    if not request.echo:
        return kept, size, []
    scored = map(np.asarray, programs["score", size](ends, x_TD, programs.put(np.roll(ids_T, -1))))
    rows = zip(request.prompt[1:], *scored, strict=False)
    tokens = [_token(request, id, own, ids_J, top_J, True) for id, own, ids_J, top_J in rows]
    return kept, size, [Token(request.prompt[0], None, (), True), *tokens]


def _token(request: Request, id: int, logprob: Any, ids_J: np.ndarray, top_J: np.ndarray, is_prompt: bool) -> Token:
    count = request.top_logprobs
    if count < 0:
        return Token(id, None, (), is_prompt)
    top = zip(ids_J[:count].tolist(), top_J[:count].tolist(), strict=True)
    return Token(id, float(logprob), tuple(top), is_prompt)


def fetched(answer: dict[str, jax.Array], slots: list[Running | None]) -> list[tuple[Running, Token]]:
    """Waits for a step. Logprobs are fetched if any slot wants them."""
    ids, taken = np.asarray(answer["token"]).tolist(), [(i, slot) for i, slot in enumerate(slots) if slot is not None]
    if all(slot.request.top_logprobs < 0 for _, slot in taken):
        return [(slot, Token(ids[i], None, (), False)) for i, slot in taken]
    logprobs, top_ids, top = (np.asarray(answer[name]) for name in ANSWER[1:])
    return [(slot, _token(slot.request, ids[i], logprobs[i], top_ids[i], top[i], False)) for i, slot in taken]

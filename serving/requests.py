"""What is asked of the engine, and what it answers: plain values."""

from dataclasses import dataclass
from typing import NamedTuple

MOST_TOP = 20  # logprobs of other tokens beside the chosen one's


class Full(Exception):
    """As many requests wait as may."""


@dataclass(frozen=True)
class Sampling:
    """temperature 0: the likeliest token. top_k 0: of all. top_p: of the likeliest that together have this probability.
    min_p: of those at least so many times as likely as the likeliest. repetition_penalty: what a token's logit is
    divided by (multiplied, if negative) that stands in prompt or answer already (Keskar et al. 2019, section 4.1)."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Request:
    """prompt: ids, at least one. stop_ids: the answer ends before one. top_logprobs: -1: no logprobs at all, 0: of the
    chosen token, n: of the n likeliest besides. echo: the prompt's own tokens come first, with their logprobs."""

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = Sampling()
    stop_ids: frozenset[int] = frozenset()
    top_logprobs: int = -1
    echo: bool = False

    def check(self, context: int, vocab_size: int) -> None:
        """Raises ValueError where it cannot be answered. context: tokens of prompt and answer, at most."""
        count, most = len(self.prompt), self.max_tokens
        if not count:
            raise ValueError("the prompt is empty: it needs one token at least")
        if min(self.prompt) < 0 or max(self.prompt) >= vocab_size:
            raise ValueError(f"a prompt's ids lie in [0, {vocab_size})")
        if most < (0 if self.echo else 1):
            raise ValueError(f"max_tokens={most}: an answer has one token at least")
        if count + most > context:
            raise ValueError(
                f"max_tokens={most}: after a prompt of {count} there is room for {max(0, context - count)}, as prompt "
                f"and answer have {context} tokens together"
            )
        if not -1 <= self.top_logprobs <= MOST_TOP:
            raise ValueError(f"top_logprobs={self.top_logprobs}: from -1 (none) to {MOST_TOP}")


class Token(NamedTuple):
    """logprob: natural logarithm, of the model's own distribution, whatever it was sampled from; None for a prompt's
    first token and where none was asked for. top: (id, logprob), likeliest first."""

    id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]
    is_prompt: bool


class End(NamedTuple):
    """reason: stop (a stop id, which is not handed out), length, cancelled, failed."""

    reason: str

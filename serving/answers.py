"""An answer as it is made, and what OpenAI's clients see of it: chunks of a stream, and whole ones.

Both come of the same pieces, so that a stream, joined, is the whole answer.
"""

import itertools
import math
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from data.tokenizer import Tokenizer
from serving.requests import End, Token
from serving.text import Detokenizer, StopStrings, vocabulary

LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's servers say this


class Entry(NamedTuple):
    """A token whose logprob is told. offset: characters of the text before it."""

    token: Token
    offset: int


class Piece(NamedTuple):
    """What one token has settled: no stop string can take it back."""

    text: str
    entries: tuple[Entry, ...]


class Choice:
    """One answer to one prompt, fed with what the engine hands out.

    finish: "" while it goes on, then stop or length, or why it could not be finished: cancelled, failed. stop_ids: a
    token of these that is handed out all the same, as the last one, is a stop, too.
    """

    def __init__(self, index: int, tokenizer: Tokenizer, stops: Sequence[str], stop_ids: frozenset[int], goes_on: bool):
        self.index, self.finish, self.made = index, "", 0
        self._stop_ids = stop_ids
        self._detokenizer, self._stops = Detokenizer(tokenizer, goes_on), StopStrings(stops)
        self._arrived = self._settled = 0  # characters
        self._textless: list[Entry] = []  # whose text is still to come
        self._waiting: list[tuple[Entry, int]] = []  # with the character at which the text of each ends
        self._last = -1

    def take(self, item: Token | End) -> Piece:
        if self.finish:  # it was cut by a stop string, and the engine has not heard it yet
            return Piece("", ())
        if isinstance(item, End):
            return self._end(item.reason)
        self._textless.append(Entry(item, self._arrived))
        text = self._arrive(self._detokenizer.push(item.id))
        if item.is_prompt:
            return self._settle(text)
        self.made, self._last = self.made + 1, item.id
        text, stopped = self._stops.push(text)
        self.finish = "stop" if stopped else ""
        return self._settle(text)

    def _end(self, reason: str) -> Piece:
        text, stopped = self._stops.push(self._arrive(self._detokenizer.end()))
        stopped_by_id = reason == "length" and self._last in self._stop_ids
        self.finish = "stop" if stopped or stopped_by_id else reason
        if stopped:
            return self._settle(text)
        piece = self._settle(text + self._stops.end())
        return Piece(piece.text, (*piece.entries, *self._textless))

    def _arrive(self, text: str) -> str:
        self._arrived += len(text)
        if text:
            self._waiting += [(entry, self._arrived) for entry in self._textless]
            self._textless = []
        return text

    def _settle(self, text: str) -> Piece:
        """Tokens go out when all of their text has: before, one may hold the beginning of a stop string."""
        self._settled += len(text)
        ready = list(itertools.takewhile(lambda waiting: waiting[1] <= self._settled, self._waiting))
        del self._waiting[: len(ready)]
        return Piece(text, tuple(entry for entry, _ in ready))


# ── their JSON ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Usage:
    prompt: int
    made: int = 0

    def json(self) -> dict[str, int]:
        total = self.prompt + self.made
        return {"prompt_tokens": self.prompt, "completion_tokens": self.made, "total_tokens": total}


@dataclass(frozen=True)
class Completion:
    """The form of /v1/completions. logprobs: whether they are wanted."""

    model: str
    tokenizer: Tokenizer
    logprobs: bool
    whole, part, prefix = "text_completion", "text_completion", "cmpl-"
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def chunks(self, choice: Choice, piece: Piece, begins: bool) -> Iterator[dict[str, Any]]:
        """The choices of a stream's chunks; begins: whether these are the first of this answer."""
        if piece.text or (piece.entries and self.logprobs):
            yield self._choice(choice, self._delta(piece.text), piece.entries, None)
        if choice.finish:
            yield self._choice(choice, self._delta(""), None, choice.finish)

    def complete(self, choice: Choice, pieces: Sequence[Piece]) -> dict[str, Any]:
        """A whole answer."""
        text, entries = "".join(piece.text for piece in pieces), [e for piece in pieces for e in piece.entries]
        return self._choice(choice, self._message(text), entries, choice.finish)

    def around(self, is_part: bool, choices: list[dict[str, Any]], fingerprint: str) -> dict[str, Any]:
        return {
            "id": self.prefix + self.id,
            "object": self.part if is_part else self.whole,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": fingerprint,
            "choices": choices,
        }

    def _choice(
        self, choice: Choice, said: dict[str, Any], entries: Sequence[Entry] | None, finish: str | None
    ) -> dict[str, Any]:
        found = None if entries is None or not self.logprobs else self._logprobs(entries)
        return {"index": choice.index, **said, "logprobs": found, "finish_reason": finish}

    def _delta(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _message(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _logprobs(self, entries: Iterable[Entry]) -> dict[str, Any]:
        tokens, logprobs, tops, offsets = [], [], [], []
        for token, offset in entries:
            tokens.append(self._name(token.id))
            logprobs.append(None if token.logprob is None else finite(token.logprob))
            pairs = [] if token.logprob is None else [*token.top, (token.id, token.logprob)]
            top: dict[str, float] = {}
            for id, logprob in pairs:  # two ids may have the same text: the likelier one counts
                top.setdefault(self._name(id), finite(logprob))
            tops.append(top or None)
            offsets.append(offset)
        return {"tokens": tokens, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}

    def _name(self, id: int) -> str:
        """A token's text; where it is no whole character, its bytes, as OpenAI writes them."""
        spelled = vocabulary(self.tokenizer).spelled(id)
        try:
            return spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


class Chat(Completion):
    """The form of /v1/chat/completions."""

    whole, part, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def chunks(self, choice: Choice, piece: Piece, begins: bool) -> Iterator[dict[str, Any]]:
        if begins:
            yield self._choice(choice, {"delta": {"role": "assistant", "content": ""}}, None, None)
        yield from super().chunks(choice, piece, begins)

    def _delta(self, text: str) -> dict[str, Any]:
        return {"delta": {"content": text} if text else {}}

    def _message(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _logprobs(self, entries: Iterable[Entry]) -> dict[str, Any]:
        content = [
            self._one(token.id, token.logprob) | {"top_logprobs": [self._one(*pair) for pair in token.top]}
            for token, _ in entries
        ]
        return {"content": content, "refusal": None}

    def _one(self, id: int, logprob: float | None) -> dict[str, Any]:
        spelled = vocabulary(self.tokenizer).spelled(id)
        text = spelled.decode("utf-8", "replace")
        return {"token": text, "logprob": finite(logprob or 0.0), "bytes": list(spelled)}


def finite(x: float) -> float:
    return max(x, LEAST_LOGPROB) if math.isfinite(x) else LEAST_LOGPROB

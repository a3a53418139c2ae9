"""What a client may ask for: every number and length within a bound, before anything is made of it.

One table of keys serves validation and the OpenAPI description. A key that is not in it is refused, and so is one that
would change an answer in a way that this server cannot; those that change none are accepted and not read.
"""

import json
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from serving.errors import ApiError
from serving.requests import MOST_TOP, Sampling

MOST_CHOICES = 128  # answers that one request may ask for: n of each prompt
MOST_N = 16
MOST_STOPS, LONGEST_STOP = 16, 256  # stop strings, and characters of each
MOST_MESSAGES = 1_024
MOST_PARTS = 256  # of a message's content
LONGEST_NAME = 256  # characters of a model's name, or of an author's
MOST_COMPLETION_LOGPROBS = 5  # OpenAI's bound of /v1/completions
ROLES = ("system", "developer", "user", "assistant")


class Number(NamedTuple):
    kind: type
    least: float
    most: float
    default: Any
    says: str


NUMBERS = {
    "temperature": Number(float, 0, 2, 1.0, "0: the likeliest token each time"),
    "top_p": Number(float, 0, 1, 1.0, "of the likeliest tokens that together have this probability"),
    "top_k": Number(int, 0, 2**31 - 1, 0, "of so many likeliest tokens; 0: of all"),
    "min_p": Number(float, 0, 1, 0.0, "of tokens at least so many times as likely as the likeliest"),
    "repetition_penalty": Number(float, 0.01, 100, 1.0, "what the logits of tokens that were there are divided by"),
    "seed": Number(int, -(2**63), 2**63 - 1, None, "the same request with the same seed has the same answer"),
    "n": Number(int, 1, MOST_N, 1, "answers to each prompt; the seeds of the further ones follow the first one's"),
    "max_tokens": Number(int, 0, 2**31 - 1, None, "of an answer"),
}
CHAT_NUMBERS = NUMBERS | {
    "max_tokens": Number(int, 1, 2**31 - 1, None, "of an answer; none: as many as the context holds"),
    "max_completion_tokens": Number(int, 1, 2**31 - 1, None, "the same as max_tokens"),
    "top_logprobs": Number(int, 0, MOST_TOP, 0, "logprobs of so many likeliest tokens beside the chosen one's"),
}
COMPLETION_NUMBERS = NUMBERS | {
    "logprobs": Number(int, 0, MOST_COMPLETION_LOGPROBS, None, "of the chosen tokens and of so many likeliest"),
}
# Accepted where they ask for nothing: each with what is as good as its absence.
NOTHING: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0,), "frequency_penalty": (0,), "logit_bias": ({},), "best_of": (1,), "suffix": ("",),
    "tools": ([],), "tool_choice": ("none", "auto"), "functions": ([],), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "modalities": (["text"],), "audio": (), "prediction": (),
}  # fmt: skip
UNREAD = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls")
COMMON = ("model", "stop", "stream", "stream_options", *NOTHING, *UNREAD)


@dataclass(frozen=True)
class Asked:
    """A request whose form is right. prompts: texts, or ids of tokens; of a chat none. max_tokens: None where it was
    not said. top_logprobs: -1: none, 0: of the chosen tokens."""

    model: str  # "": whichever there is
    prompts: tuple[str | tuple[int, ...], ...]
    messages: tuple[dict[str, Any], ...]
    n: int
    max_tokens: int | None
    sampling: Sampling
    stops: tuple[str, ...]
    top_logprobs: int
    echo: bool
    stream: bool
    include_usage: bool


def parse(body: bytes) -> dict[str, Any]:
    """Raises ApiError for what is no JSON object."""
    try:
        found = json.loads(body.decode(), parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise ApiError(400, "The body is not JSON: it is one object, in UTF-8.", "invalid_json") from None
    if not isinstance(found, dict):
        raise ApiError(400, 'The body is JSON, but not an object, as in {"model": …}.', "invalid_json")
    return found


def read_completion(body: Mapping[str, Any], vocab_size: int, context: int) -> Asked:
    """Of /v1/completions. vocab_size: ids of prompts lie below it. context: tokens of prompt and answer, at most."""
    _check_keys(body, ("prompt", "echo", *COMPLETION_NUMBERS, *COMMON))
    numbers = _numbers(body, COMPLETION_NUMBERS)
    prompts, echo = _prompts(body.get("prompt"), vocab_size, context), _switch(body, "echo")
    if len(prompts) * numbers["n"] > MOST_CHOICES:
        raise _wrong("n", f"prompts times n is at most {MOST_CHOICES}")
    max_tokens = 16 if numbers["max_tokens"] is None else numbers["max_tokens"]  # OpenAI's default
    if not max_tokens and not echo:
        raise _wrong("max_tokens", "it is 1 or more, or 0 with echo")
    logprobs = -1 if numbers["logprobs"] is None else numbers["logprobs"]
    return _asked(body, numbers, prompts=prompts, max_tokens=max_tokens, top_logprobs=logprobs, echo=echo)


def read_chat(body: Mapping[str, Any]) -> Asked:
    """Of /v1/chat/completions."""
    _check_keys(body, ("messages", "logprobs", *CHAT_NUMBERS, *COMMON))
    numbers, logprobs = _numbers(body, CHAT_NUMBERS), _switch(body, "logprobs")
    given = {numbers[key] for key in ("max_tokens", "max_completion_tokens")} - {None}
    if len(given) > 1:
        raise _wrong("max_tokens", "max_completion_tokens is another word for it, and has another value here")
    if numbers["top_logprobs"] and not logprobs:
        raise _wrong("top_logprobs", "it needs logprobs=true")
    top, max_tokens = numbers["top_logprobs"] if logprobs else -1, next(iter(given), None)
    return _asked(body, numbers, messages=_messages(body.get("messages")), max_tokens=max_tokens, top_logprobs=top)


def _asked(body: Mapping[str, Any], numbers: Mapping[str, Any], **fields: Any) -> Asked:
    seed = secrets.randbits(31) if numbers["seed"] is None else numbers["seed"] % 2**31
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    stream, options = _switch(body, "stream"), body.get("stream_options")
    if options is not None and (not stream or not isinstance(options, dict) or options.keys() - {"include_usage"}):
        raise _wrong("stream_options", 'it is {"include_usage": true or false}, with stream=true')
    return Asked(
        model=_text(body.get("model", ""), "model", LONGEST_NAME),
        n=numbers["n"],
        sampling=Sampling(**{name: numbers[name] for name in names}, seed=seed),
        stops=_stops(body.get("stop")),
        stream=stream,
        include_usage=_switch(options or {}, "include_usage"),
        **({"prompts": (), "messages": (), "echo": False} | fields),
    )


# ── parts ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _refuse(constant: str) -> None:
    raise ValueError("NaN and infinities are no JSON")


def _wrong(param: str, message: str) -> ApiError:
    return ApiError(400, f"{param}: {message}.", "invalid_value", param)


def _check_keys(body: Mapping[str, Any], known: Sequence[str]) -> None:
    if body.keys() - set(known):
        names = ", ".join(name for name in known if name not in UNREAD)
        raise ApiError(400, f"A key of the request is not known here. Known are {names}.", "unknown_parameter")
    for name, harmless in NOTHING.items():
        if body.get(name) is not None and not any(_same(body[name], x) for x in harmless):
            raise ApiError(400, f"{name}: this server has not got it.", "unsupported_parameter", name)


def _same(x: Any, y: Any) -> bool:
    return x == y and isinstance(x, bool) == isinstance(y, bool)


def _numbers(body: Mapping[str, Any], table: Mapping[str, Number]) -> dict[str, Any]:
    return {name: _number(body.get(name), name, how) for name, how in table.items()}


def _number(x: Any, name: str, how: Number) -> Any:
    if x is None:
        return how.default
    right = isinstance(x, int if how.kind is int else int | float) and not isinstance(x, bool)
    if not right or not how.least <= x <= how.most or not math.isfinite(x):
        kind = "a whole number" if how.kind is int else "a number"
        raise _wrong(name, f"it is {kind} from {how.least} to {how.most}")
    return how.kind(x)


def _switch(body: Mapping[str, Any], name: str) -> bool:
    x = body.get(name)
    if x is not None and not isinstance(x, bool):
        raise _wrong(name, "it is true or false")
    return bool(x)


def _text(x: Any, name: str, most: int | None = None) -> str:
    """Raises ApiError for what no UTF-8 holds, too: JSON may escape half a character."""
    if not isinstance(x, str) or (most is not None and len(x) > most):
        raise _wrong(name, "it is a text" + (f" of at most {most} characters" if most else ""))
    if not x.isascii():
        try:
            x.encode()
        except UnicodeEncodeError:
            raise _wrong(name, "half a character of UTF-16 is no text") from None
    return x


def _stops(x: Any) -> tuple[str, ...]:
    listed = [] if x is None else [x] if isinstance(x, str) else x
    if not isinstance(listed, list) or len(listed) > MOST_STOPS:
        raise _wrong("stop", f"it is a text, or a list of at most {MOST_STOPS}")
    found = tuple(_text(stop, "stop", LONGEST_STOP) for stop in listed)
    if "" in found:
        raise _wrong("stop", "an empty text would stop every answer")
    return found


def _prompts(x: Any, vocab_size: int, context: int) -> tuple[str | tuple[int, ...], ...]:
    """A text, a list of ids, or a list of either."""
    listed = x if isinstance(x, list) and x and isinstance(x[0], str | list) else [x]
    if len(listed) > MOST_CHOICES:
        raise _wrong("prompt", f"there are at most {MOST_CHOICES} in one request")
    return tuple(_prompt(prompt, vocab_size, context) for prompt in listed)


def _prompt(x: Any, vocab_size: int, context: int) -> str | tuple[int, ...]:
    if not isinstance(x, list):
        return _text(x, "prompt")
    if len(x) > context:
        raise too_long(context)
    if not x or not all(type(id) is int and 0 <= id < vocab_size for id in x):
        raise _wrong("prompt", f"a list of ids has one at least, and each lies from 0 to {vocab_size - 1}")
    return tuple(x)


def _messages(x: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(x, list) or not 1 <= len(x) <= MOST_MESSAGES:
        raise _wrong("messages", f"it is a list of 1 to {MOST_MESSAGES} messages")
    return tuple(_message(message) for message in x)


def _message(x: Any) -> dict[str, Any]:
    """Of a client's own library it may have further keys, without a value."""
    if not isinstance(x, dict) or x.get("role") not in ROLES:
        raise _wrong("messages", f"each is an object with role, one of {', '.join(ROLES)}, and content")
    if any(value not in (None, []) for key, value in x.items() if key not in ("role", "content", "name")):
        raise _wrong("messages", "each has role, content and name, and nothing else")
    named = {"name": _text(x["name"], "messages", LONGEST_NAME)} if x.get("name") is not None else {}
    role = "system" if x["role"] == "developer" else x["role"]  # a later word for it, which no template knows
    return {"role": role, "content": _content(x.get("content"))} | named


def _content(x: Any) -> str:
    if not isinstance(x, list):
        return _text(x, "messages")
    if len(x) > MOST_PARTS or not all(isinstance(part, dict) and part.get("type") == "text" for part in x):
        raise _wrong("messages", f"content is a text, or a list of at most {MOST_PARTS} parts of the type text")
    return "".join(_text(part.get("text"), "messages") for part in x)


def too_long(context: int) -> ApiError:
    message = f"Prompt and answer have at most {context} tokens together: a shorter prompt, or fewer max_tokens."
    return ApiError(400, message, "context_length_exceeded", "prompt")

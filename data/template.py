"""From a conversation to ids, by the chat template of its model: the same for training, chat and serving.

A template writes special tokens as text. Those that it writes itself become special ids; what a message spells out
stays plain text. Both stand in one text, so what messages say is marked where it could be taken for such a token.

Shapes: N tokens, V vocabulary.
"""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.reading import check_text
from data.render import Messages, Renderer
from data.subwords import JsonTokenizer
from data.tokenizer import Tokenizer

KEPT = "huggingface"  # a folder of the workdir: the small files of the model that the run, or one before it, began with
MARK = "\ufdd0"  # a noncharacter of Unicode, for use inside one program: no text has it
DAY = "2026-01-01"  # is today in training: the same rows are the same tokens on every day
_PROBE = tuple({"role": role, "content": text} for role, text in (
    ("user", "Is it?"), ("assistant", "Yes, it is."), ("user", "Sure?"), ("assistant", "Quite sure.")))  # fmt: skip


class Example(NamedTuple):
    """What is trained on: ids [N], and which of them are to be learned, bool [N]; the last one is."""

    ids_N: np.ndarray
    supervised_N: np.ndarray


class _Answer(NamedTuple):
    """What a template makes of an answer."""

    asked: str  # up to where it is asked for; marked, as the next two
    answered: str  # the same and the answer
    closed: str  # the same up to the end of the token that closes it
    begin: int  # in `closed` without marks: from here on it is to be learned
    closing: str  # that token


@dataclass(frozen=True)
class Template:
    """The chat template of a model.

    text: Jinja. variables: what it is given besides the messages: bos_token, eos_token and others. eos: ids that end an
    answer, by generation_config.json. origin: where it is from, for messages.
    """

    text: str
    variables: Mapping[str, str]
    eos: tuple[int, ...]
    origin: str

    @classmethod
    def read(cls, folder: Path) -> "Template | None":
        """Of the small files of a model of Hugging Face's, in a workdir the folder KEPT; None where there is no
        template. Raises ValueError for files that are damaged."""
        config = _json(folder / "tokenizer_config.json")
        named = _templates(folder, config)
        if not named:
            return None
        if "default" not in named:
            raise ValueError(f"{folder} has the chat templates {', '.join(named)}, and none that is the default.")
        tokens = {k: x for k, x in (_json(folder / "special_tokens_map.json") | config).items() if k.endswith("_token")}
        texts = {key: x["content"] if isinstance(x, dict) else x for key, x in tokens.items()}
        variables = {key: x for key, x in texts.items() if isinstance(x, str)}
        eos = _json(folder / "generation_config.json").get("eos_token_id") or []
        return cls(named["default"], variables, tuple(eos if isinstance(eos, list) else [eos]), str(folder))

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of all that decides the ids of what is trained on, besides the tokenizer."""
        return hashlib.sha256(json.dumps([self.text, dict(self.variables), DAY]).encode()).hexdigest()

    # ── what it gives ─────────────────────────────────────────────────────────────────────────────────────────────────

    def prompt(self, messages: Messages, tokenizer: Tokenizer) -> list[int]:
        """Ids of a conversation, [{"role": …, "content": …}, …], up to where the model begins its answer.

        Raises ValueError for what is no conversation, or none for this template.
        """
        check(messages, "The conversation")
        known = with_special(tokenizer)
        (text,) = self._marked([(messages, True)], known)
        return self._encode(text, known)[0].tolist()

    def supervised(self, messages: Messages, tokenizer: Tokenizer) -> list[Example]:
        """A conversation as it is trained on: to be learned are what the assistant says and the token that closes it.

        One example; where the template writes earlier messages otherwise once others follow (Qwen 3 leaves their
        thoughts out), one for each answer. What comes after the last answer is left out. A thought that is empty, and
        that the template adds, is not learned.

        Raises ValueError where there is no answer, or one that no special token closes.
        """
        check(messages, "The conversation")
        known = with_special(tokenizer)
        answers = self._answers(messages, known, DAY)
        groups = [[answer] for answer in answers] if _rewrites(answers) else [answers]
        return [self._example(group, known) for group in groups]

    def closing(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Ids of which each ends an answer: those of generation_config.json, and what the template closes one with."""
        known = with_special(tokenizer)
        (answer,) = self._answers(_PROBE[:2], known)
        return tuple(sorted({*self.eos, known.special[answer.closing]}))

    def verdict(self, tokenizer: Tokenizer) -> str:
        """What is to be known of it, for people."""
        known = with_special(tokenizer)
        answers = self._answers(_PROBE, known)
        (silent,) = self._marked([(_PROBE[:1], False)], known)
        how = "writes earlier answers otherwise: each is an example" if _rewrites(answers) else "only appends"
        asks = "; does not ask for an answer" if silent == answers[0].asked else ""
        return f"{self.origin}: closes an answer with {answers[0].closing}; {how}{asks}"

    # ── from messages to text ─────────────────────────────────────────────────────────────────────────────────────────

    @functools.cached_property
    def _render(self) -> Renderer:
        return Renderer(self.text, self.variables, self.origin)

    def _marked(
        self, conversations: Sequence[tuple[Messages, bool]], tokenizer: JsonTokenizer, day: str | None = None
    ) -> list[str]:
        """What the template makes of each, with a mark after the first character of every special token that a message
        spells out. Raises ValueError where one comes about all the same, as when a template cuts something out of the
        middle of a message and the ends join: then with all such first characters marked there are fewer."""
        special = tokenizer.special_pattern
        spelled = re.compile(f"(?=(?:{special.pattern}))(.)", re.DOTALL)
        firsts = re.compile(f"([{re.escape(''.join({token[0] for token in tokenizer.special}))}])")
        texts = self._render([(_with_marks(messages, spelled), ask) for messages, ask in conversations], day)
        safe = [(_with_marks(messages, firsts), ask) for messages, ask in conversations]
        found = [special.findall(text) for text in texts]
        may_join = any(MARK in message["content"] for messages, _ in safe for message in messages)
        if may_join and found != [special.findall(text) for text in self._render(safe, day)]:
            raise ValueError(f"{self.origin}: the chat template makes a special token of what a message says.")
        return texts

    def _answers(self, messages: Messages, tokenizer: JsonTokenizer, day: str | None = None) -> list[_Answer]:
        places = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
        if not places:
            raise ValueError("The conversation has no message of the assistant's: nothing would be learned.")
        prefixes = [part for n in places for part in ((messages[:n], True), (messages[: n + 1], False))]
        texts = iter(self._marked(prefixes, tokenizer, day))
        pairs = zip(texts, texts, strict=True)
        found = zip(places, pairs, strict=True)
        return [self._answer(*pair, messages[n]["content"], tokenizer.special_pattern) for n, pair in found]

    def _answer(self, asked: str, answered: str, content: str, special: re.Pattern[str]) -> _Answer:
        """content: what is said there, before the template trims it or writes a thought in its own way."""
        # Mistral's puts the system message into the question that comes last: no more, once there is an answer.
        tail = asked[max((token.start() for token in special.finditer(asked)), default=0) :]
        place = len(asked) if answered.startswith(asked) else answered.rfind(tail) + len(tail)
        if not answered[:place].endswith(tail):
            raise ValueError(f"{self.origin}: what the chat template asks for an answer with is not how one begins.")
        added = answered[place:]
        tokens = list(special.finditer(added))
        if not tokens:
            raise ValueError(f"{self.origin}: the chat template closes an answer with no special token.")
        said = ((token, _begin_of(content, _plain(added[: token.start()]))) for token in tokens)
        closing, begin = next(((token, n) for token, n in said if n is not None), (tokens[-1], 0))
        closed = asked + added[: closing.end()]
        return _Answer(asked, asked + added, closed, len(_plain(asked)) + begin, closing[0])

    # ── from text to ids ──────────────────────────────────────────────────────────────────────────────────────────────

    def _example(self, answers: Sequence[_Answer], tokenizer: JsonTokenizer) -> Example:
        """The last answer's text, in which the others stand."""
        text = answers[-1].closed
        ids_N, ends_N = self._encode(text, tokenizer)
        # A model is asked with the ids of `asked`: where the whole has others, a token of the answer reaches into it.
        asked = [(len(_plain(answer.asked)), self._encode(answer.asked, tokenizer)[0]) for answer in answers]
        cuts = frozenset(place for place, asked_N in asked if not np.array_equal(asked_N, ids_N[: len(asked_N)]))
        if cuts:
            ids_N, ends_N = self._encode(text, tokenizer, cuts)
        supervised_N = np.zeros(len(ids_N), bool)
        for answer in answers:
            first = np.searchsorted(ends_N, answer.begin, "right")
            last = np.searchsorted(ends_N, len(_plain(answer.closed)), "left")
            supervised_N[first : last + 1] = True
        return Example(ids_N, supervised_N)

    def _encode(
        self, text: str, tokenizer: JsonTokenizer, cuts: frozenset[int] = frozenset()
    ) -> tuple[np.ndarray, np.ndarray]:
        """(ids, where each ends in the text without marks) of a marked text. cuts: places that no token crosses."""
        marks = itertools.accumulate(len(part) for part in text.split(MARK)[:-1])
        ids_N, ends_N = tokenizer.encode_spelled(_plain(text), cuts.union(marks))
        meant = [tokenizer.special[token] for token in tokenizer.special_pattern.findall(text)]
        if [i for i in meant if tokenizer.reserved_V[i]] != ids_N[tokenizer.reserved_V[ids_N]].tolist():
            raise ValueError(f"{self.origin}: the tokenizer has other special tokens than the chat template writes.")
        return ids_N, ends_N


def check(messages: Any, where: str) -> None:
    """Raises ValueError for what is no list of messages. where: begins what is said."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"{where} is no list of messages.")
    for number, message in enumerate(messages, start=1):
        at = f"{where} has a message {number}"
        if not isinstance(message, Mapping):
            raise ValueError(f'{at} that is no object with "role" and "content".')
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                raise ValueError(f'{at} without a string under "{key}".')
        if more := [key for key in message if key not in ("role", "content") and message[key] is not None]:
            raise ValueError(f'{at} with the key "{more[0]}"; what is read is "role" and "content".')
        if not re.fullmatch(r"\w{1,32}", message["role"]):
            raise ValueError(f"{at} whose role is no word.")
        if MARK in check_text(message["content"], f"{where} in message {number}"):
            raise ValueError(f"{at} with U+FDD0, which is no character.")


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}).") from error
    return found if isinstance(found, dict) else {}


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """By name, where there are several."""
    if (folder / "chat_template.jinja").is_file():
        return {"default": (folder / "chat_template.jinja").read_text(encoding="utf-8")}
    found = config.get("chat_template") or _json(folder / "chat_template.json").get("chat_template") or {}
    if isinstance(found, list):
        return {one["name"]: one["template"] for one in found}
    return {"default": found} if isinstance(found, str) else found


def with_special(tokenizer: Tokenizer) -> JsonTokenizer:
    """The tokenizer, of the kind that has special tokens. Raises ValueError for another."""
    if not isinstance(tokenizer, JsonTokenizer):
        raise ValueError("A chat template writes special tokens, and this tokenizer has none: take the model's own.")
    return tokenizer


def _with_marks(messages: Messages, pattern: re.Pattern[str]) -> list[dict[str, Any]]:
    return [{**message, "content": pattern.sub(rf"\1{MARK}", message["content"])} for message in messages]


def _plain(marked: str) -> str:
    return marked.replace(MARK, "")


def _rewrites(answers: Sequence[_Answer]) -> bool:
    """Whether an answer stands otherwise before the next one."""
    return any(not b.answered.startswith(a.answered) for a, b in itertools.pairwise(answers))


def _begin_of(content: str, text: str) -> int | None:
    """Where in a text that ends with what was said, trimmed or not, that begins; blanks before it belong to it, as the
    model is to write them. None: the text ends otherwise."""
    for end, said in itertools.product((text, text.rstrip()), (content, content.lstrip("\n"), content.strip())):
        if end.endswith(said):
            begin = len(end) - len(said)
            return begin if text[:begin].strip() else 0
    return None

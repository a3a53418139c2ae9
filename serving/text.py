"""Text of token ids as they are made: whole characters only, and nothing of what a stop string cuts away."""

import codecs
import functools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from data import pieces
from data.tokenizer import Tokenizer

_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # how a vocabulary with byte fallback writes one
_WORD = re.compile(r"▁?[A-Za-z]+")


class Detokenizer:
    """Ids to text, one after another. What `push` and `end` give is, joined, the decoding of all ids, and each part of
    it is whole characters: U+FFFD stands only where bytes can no longer become one.

    goes_on: the text follows a prompt's, so that its first token keeps the blank before it.
    """

    def __init__(self, tokenizer: Tokenizer, goes_on: bool = False):
        self._vocabulary = vocabulary(tokenizer)
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._pending: list[int] = []  # ids whose text what follows may still change
        self._goes_on = goes_on

    def push(self, id: int) -> str:
        if self._vocabulary.bytes_of is not None:
            return self._characters.decode(self._vocabulary.bytes_of(id))
        if self._vocabulary.is_hidden(id):
            return ""
        self._pending.append(id)
        return "" if self._vocabulary.is_open(id) else self._settled()

    def end(self) -> str:
        return self._characters.decode(b"", final=True) if self._vocabulary.bytes_of is not None else self._settled()

    def _settled(self) -> str:
        text = self._vocabulary.decode(self._pending, self._goes_on)
        if text or self._goes_on:  # else these are still the ids that a text begins with
            self._goes_on, self._pending = True, []
        return text


class StopStrings:
    """Text as it is made, up to the stop string that is complete first; of several that end together, the longest."""

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held = tuple(stops), ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that no stop string can begin in any more, whether one was found). After that, nothing is asked."""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)[1]], True
        keep = max((self._begun(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def end(self) -> str:
        """What was held back."""
        text, self._held = self._held, ""
        return text

    @staticmethod
    def _begun(text: str, stop: str) -> int:
        """With how many characters of a stop string a text ends; not all of it."""
        return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


# ── what the ids of a tokenizer stand for ─────────────────────────────────────────────────────────────────────────────


class Vocabulary:
    """Of one tokenizer, read from its tokenizer.json.

    bytes_of: the bytes of each id, where a text is no more than these, one after another; None: it is not.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, described = tokenizer, json.loads(tokenizer.serialized)
        self.bytes_of: Callable[[int], bytes] | None = None
        self._tokens: dict[int, str] = {}  # an id's own spelling
        self._special: set[int] = set()
        if "slackline" in described:
            self.bytes_of = lambda id: _one_of_ours(tokenizer, described["slackline"], id)
            return
        vocab = (described.get("model") or {}).get("vocab") or {}
        named = vocab.items() if isinstance(vocab, dict) else ((token[0], id) for id, token in enumerate(vocab))
        added = described.get("added_tokens") or ()
        self._tokens = {id: token for token, id in named} | {token["id"]: token["content"] for token in added}
        special = {token["content"] for token in added if token["special"]}
        self._special = {id for id, token in self._tokens.items() if token in special}
        decoder = pieces.parts_of(described.get("decoder"), "decoders")
        if [part["type"] for part in decoder] == ["ByteLevel"]:
            of_character = {chr(character): byte for byte, character in _byte_level().items()}
            table = {
                id: _to_bytes(token, of_character) for id, token in self._tokens.items() if id not in self._special
            }
            self.bytes_of = lambda id: table.get(id, b"")
        self._falls_back = any(part["type"] == "ByteFallback" for part in decoder)
        self._anchor = self._find_anchor() if _adds_up(decoder) else None

    def _find_anchor(self) -> int | None:
        """A word that stands before a text that goes on: what begins a text loses its blank there."""
        for id, token in self._tokens.items():
            if id not in self._special and _WORD.fullmatch(token):
                word = self._tokenizer.decode([id])
                if word and self._tokenizer.decode([id, id]).startswith(word):
                    return id
        return None

    def is_hidden(self, id: int) -> bool:
        """Whether it gives no text, and changes none."""
        return id not in self._tokens or id in self._special

    def is_open(self, id: int) -> bool:
        """Whether what follows may change its text: bytes are broken, or not, all together."""
        return self._anchor is None or (self._falls_back and bool(_BYTE.fullmatch(self._tokens[id])))

    def decode(self, ids: Iterable[int], goes_on: bool) -> str:
        if not goes_on or self._anchor is None:
            return self._tokenizer.decode(ids)
        return self._tokenizer.decode([self._anchor, *ids])[len(self._tokenizer.decode([self._anchor])) :]

    def spelled(self, id: int) -> bytes:
        """One token by itself, for people: of a special token its name."""
        if id in self._special:
            return self._tokens[id].encode()
        if self.bytes_of is not None:
            return self.bytes_of(id)
        if self._falls_back and _BYTE.fullmatch(self._tokens.get(id, "")):
            return bytes([int(self._tokens[id][3:5], 16)])
        return self.decode([id], goes_on=True).encode()


vocabulary = functools.lru_cache(maxsize=4)(Vocabulary)


def _one_of_ours(tokenizer: Tokenizer, kind: str, id: int) -> bytes:
    """Of "bytes", the byte itself, which may be no character yet; of "ids", the number."""
    if kind == "bytes" and 0 < id < 256:
        return bytes([id])
    return tokenizer.decode([id]).encode()


def _byte_level() -> dict[int, int]:
    """{byte: code of its character} of GPT-2's alphabet: what cannot be seen lies from 256 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    unseen = [byte for byte in range(256) if byte not in set(seen)]
    return dict(zip(seen, seen, strict=True)) | {byte: 256 + n for n, byte in enumerate(unseen)}


def _to_bytes(token: str, of_character: dict[str, int]) -> bytes:
    """A token with a character that stands for no byte stands for itself, as an added one may."""
    if all(character in of_character for character in token):
        return bytes(of_character[character] for character in token)
    return token.encode()


def _adds_up(decoder: Iterable[dict[str, Any]]) -> bool:
    """Whether the text of ids is that of the first ones and then that of the others, after a word. What looks at the
    end of a text, or across tokens, makes it not so: such text is given when it is complete."""
    fused = False
    for part in decoder:
        kind = part["type"]
        fused = fused or kind == "Fuse"
        one_character = kind == "Replace" and len(part["pattern"].get("String", "")) == 1
        left = kind == "Strip" and not part["stop"]
        if kind != "Fuse" and not one_character and not left and (fused or kind not in _OF_ONE_TOKEN):
            return False
    return True


_OF_ONE_TOKEN = ("Replace", "Metaspace", "WordPiece", "ByteFallback", "Strip")

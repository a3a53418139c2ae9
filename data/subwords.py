"""Tokenizers of the Hugging Face `tokenizers` library, from the text of their tokenizer.json.

Shapes: V vocabulary, N tokens.
"""

import bisect
import functools
import hashlib
import itertools
import json
import re
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import numpy as np

from data import bpe, pieces
from data.waiting import interruptible

# In this order: chat tokenizers hold several, and the first ones end a document rather than a turn.
EOS_NAMES = (
    bpe.END_OF_DOCUMENT,
    "<|end_of_text|>",
    "<|endofdocument|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<｜end▁of▁sentence｜>",
    "<|eot_id|>",
    "<|im_end|>",
    "[SEP]",
)


class JsonTokenizer:
    """A tokenizer of the `tokenizers` library, ours or anyone's, given as the text of its tokenizer.json.

    Args:
        serialized: that text.
        origin: where it is from, for messages.
        end_of_document: the special token that ends a document; empty: the first of EOS_NAMES that it has.
    """

    def __init__(self, serialized: str, origin: str, end_of_document: str = ""):
        self._tokenizer = _open(serialized, origin)
        self.serialized, self._origin = serialized, origin
        self._json: dict[str, Any] = json.loads(serialized)
        self._places = pieces.places_to_cut(self._json)
        self._vocab: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocab.values(), default=-1) + 1
        self._dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32
        special = {token["content"]: token["id"] for token in self._json.get("added_tokens") or () if token["special"]}
        self.special = dict(special)
        special.pop(self._unknown(), None)  # what is not in the vocabulary becomes it: it says nothing of its own
        self.eos_name = _choose_end(special, end_of_document, origin)
        self.eos = special[self.eos_name]
        self.digest = hashlib.sha256(f"{serialized}\0{self.eos_name}".encode()).hexdigest()
        self.reserved_V = np.zeros(self.vocab_size, bool)  # special tokens, which no text may become
        self.reserved_V[list(special.values())] = True

    @functools.cached_property
    def _going_on(self) -> Any:
        """The same tokenizer for a text that goes on: it puts nothing before it."""
        changed = pieces.continuing(self._json)
        return self._tokenizer if changed == self._json else _open(json.dumps(changed), self._origin)

    @functools.cached_property
    def special_pattern(self) -> re.Pattern[str]:
        """Matches each special token, of several at a place the longest."""
        return re.compile("|".join(map(re.escape, sorted(self.special, key=len, reverse=True))) or "(?!)")

    @functools.cached_property
    def _spelled(self) -> tuple[Any, Any]:
        """For a text in which special tokens are spelled out and meant: one that begins, one that goes on."""
        found = _open(self.serialized, self._origin), _open(json.dumps(pieces.continuing(self._json)), self._origin)
        for tokenizer in found:
            tokenizer.encode_special_tokens = False
        return found

    def _unknown(self) -> str:
        model = self._json.get("model") or {}
        unk_id = model.get("unk_id")
        return model.get("unk_token") or "" if unk_id is None else model["vocab"][unk_id][0]

    def encode(self, text: str) -> np.ndarray:
        return np.concatenate(
            [np.zeros(0, self._dtype), *(ids for ids, _ in self.encode_spans([(text, 0, len(text))]))]
        )

    def encode_spans(self, spans: Iterable[pieces.Span]) -> Iterator[pieces.Piece]:
        batch: list[tuple[str, bool]] = []  # a piece, and whether a span goes on with it
        last: list[bool] = []
        size = 0
        for text, start, stop in spans:
            first = start
            for begin, end, inside in pieces.cut(text, start, stop, self._places):
                if size + end - begin > pieces.BATCH_CHARS and batch:
                    yield from zip(self._encode_batch(batch), last, strict=True)
                    batch, last, size = [], [], 0
                if inside:
                    _warn_of_long_word()
                batch.append((text[begin:end], begin > first))
                last.append(end == stop)
                size += end - begin
        yield from zip(self._encode_batch(batch), last, strict=True)

    def _encode_batch(self, batch: list[tuple[str, bool]]) -> list[np.ndarray]:
        encoded: list[Any] = [None] * len(batch)
        for goes_on in (False, True):
            numbers = [n for n, piece in enumerate(batch) if piece[1] == goes_on]
            if numbers:
                tokenizer = self._going_on if goes_on else self._tokenizer
                texts = [batch[n][0] for n in numbers]
                encode = functools.partial(tokenizer.encode_batch_fast, texts, add_special_tokens=False)
                try:
                    results = interruptible(encode)
                except Exception as error:  # the library raises bare Exception
                    raise ValueError(f"data.tokenizer {self._origin} cannot encode the text: {error}") from error
                for n, found in zip(numbers, results, strict=True):
                    encoded[n] = np.array(found.ids, self._dtype)
        return [
            self._without_reserved(text, goes_on) if self.reserved_V[ids].any() else ids
            for (text, goes_on), ids in zip(batch, encoded, strict=True)
        ]

    def _without_reserved(self, text: str, goes_on: bool) -> np.ndarray:
        """Ids of a text in which special tokens are spelled out: each spelling is cut after its first character."""
        found = (self._going_on if goes_on else self._tokenizer).encode(text, add_special_tokens=False)
        ids = np.array(found.ids, self._dtype)
        spans = [found.offsets[n] for n in np.flatnonzero(self.reserved_V[ids])]
        for begin, end in spans:
            if end - begin < 2:
                raise ValueError(
                    f"data.tokenizer: its vocabulary has the text {text[begin:end]!r} as a special token, so that a "
                    "text with it cannot be told from that. Leave it out of the text, or take another tokenizer."
                )
        if not spans:
            return ids
        edges = [0, *(begin + 1 for begin, _ in spans), len(text)]
        return np.concatenate(
            [self._without_reserved(text[a:b], goes_on or a > 0) for a, b in itertools.pairwise(edges)]
        )

    def encode_spelled(self, text: str, cuts: Collection[int] = ()) -> tuple[np.ndarray, np.ndarray]:
        """(ids, where in the text each ends) of a text whose special tokens are meant.

        cuts: places that no token crosses; a special token around one is plain text.
        """
        edges = {0: False} | dict.fromkeys(cuts, True)  # where a section begins, and whether it goes on
        if cuts:  # from a special token on, it does not matter where the section began
            meant = [m.start() for m in self.special_pattern.finditer(text) if m.start() + 1 not in cuts]
            edges |= dict.fromkeys((s for cut in cuts for s in meant[bisect.bisect(meant, cut) :][:1]), False)
        ids, ends = [], []
        for begin, end in itertools.pairwise([*sorted(edges), len(text)]):
            section = self._spelled[edges[begin]].encode(text[begin:end], add_special_tokens=False)
            ids += section.ids
            ends += [begin + stop for _, stop in section.offsets]
        return np.array(ids, np.int64), np.array(ends, np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def spell(self, ids: Iterable[int]) -> str:
        """As `decode`, with special tokens spelled out."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_bytes(self) -> np.ndarray:
        """Exact for byte-level BPE; for others the bytes of the token's own text, its space marker counted as one."""
        added = {token["id"]: token for token in self._json.get("added_tokens") or ()}
        length = self._token_length()
        bytes_V = np.zeros(self.vocab_size, np.int32)
        for token, i in self._vocab.items():
            if i in added:  # stands for its own spelling, or when special for no text at all
                bytes_V[i] = 0 if added[i]["special"] else len(token.encode("utf-8"))
            else:
                bytes_V[i] = length(token)
        return bytes_V

    def _token_length(self) -> Callable[[str], int]:
        parts = [
            *pieces.parts_of(self._json.get("pre_tokenizer"), "pretokenizers"),
            *pieces.parts_of(self._json.get("decoder"), "decoders"),
        ]
        kinds = {part["type"] for part in parts}
        model = self._json.get("model") or {}
        if "ByteLevel" in kinds:
            return len  # the byte-level alphabet has one character per byte
        if "WordPiece" in kinds or model.get("type") == "WordPiece":
            prefix = model.get("continuing_subword_prefix", "##")
            # A token that starts a word also stands for the space before it.
            return lambda t: len(t[len(prefix) :].encode()) if t.startswith(prefix) else len(t.encode()) + 1
        fallback = re.compile(r"<0x[0-9A-F]{2}>") if model.get("byte_fallback") else None
        return lambda t: 1 if fallback and fallback.fullmatch(t) else len(t.replace("▁", " ").encode())


def _open(serialized: str, origin: str) -> Any:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_str(serialized)
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{origin} is not a tokenizer.json that `tokenizers` can read: {error}") from error
    # A file saved for a fine-tuned model may cut or pad every text; and a text that spells out a special token must
    # not be able to end its document.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _choose_end(special: dict[str, int], wanted: str, origin: str) -> str:
    """The special token that ends a document. An ordinary token never does: a text could spell it."""
    known = ", ".join(map(repr, special)) or "none at all"
    if wanted:
        if wanted not in special:
            raise ValueError(f"data.end_of_document is {wanted!r}; the special tokens of {origin} are {known}.")
        return wanted
    found = next(iter(special)) if len(special) == 1 else next((name for name in EOS_NAMES if name in special), None)
    if found is None:
        raise ValueError(
            f"{origin} has no end-of-document token that is known here. Its special tokens are {known}: set "
            "data.end_of_document to the one that ends a document, or add one to the file as a special token."
        )
    return found


def _warn_of_long_word() -> None:
    warnings.warn(
        f"The text holds a run of more than {pieces.WORD_CHARS:,} characters without a place to cut it at; it is "
        "encoded in parts, so that there the ids may be others than those of the whole.",
        stacklevel=3,
    )

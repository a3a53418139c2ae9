"""Text to token ids and back: plain bytes, a byte-level BPE trained on the corpus, or any Hugging Face tokenizer.json.

Shapes: V vocabulary, N tokens.
"""

import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np

from data import bpe
from data.pieces import BATCH_CHARS, Piece, Span
from data.subwords import JsonTokenizer


class Tokenizer(Protocol):
    """What the rest of the code knows of a tokenizer. Ids lie in [0, vocab_size)."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id this tokenizer can produce; at most data.vocab_size."""
        ...

    @property
    def eos(self) -> int:
        """The id written after every document; -1 where none is known. No text becomes it."""
        ...

    @property
    def eos_name(self) -> str:
        """How that token is written, for people."""
        ...

    @property
    def digest(self) -> str:
        """sha256 hex of all that decides the ids."""
        ...

    @property
    def serialized(self) -> str:
        """What `from_text` makes the same tokenizer of: the text of a tokenizer.json."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, 1-D, uint16 (uint32 when vocab_size exceeds 65,536), without EOS."""
        ...

    def encode_spans(self, spans: Iterable[Span]) -> Iterator[Piece]:
        """Ids of parts of texts, one after another, in pieces: memory stays bounded, and all cores are used."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; EOS and other special tokens give none, broken UTF-8 gives U+FFFD."""
        ...

    def token_bytes(self) -> np.ndarray:
        """int32 [V]: UTF-8 bytes of text that each id stands for; 0 for EOS and other special tokens."""
        ...


class ByteTokenizer:
    """One token per UTF-8 byte; byte 0, which no text holds, is EOS."""

    vocab_size = 256
    eos = 0
    eos_name = "byte 0"
    digest = hashlib.sha256(b"slackline bytes, eos 0").hexdigest()
    serialized = json.dumps({"slackline": "bytes", "vocab_size": 256, "end_of_document": 0}) + "\n"

    def encode(self, text: str) -> np.ndarray:
        ids_N = np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint16)
        if "\0" in text:
            raise ValueError(
                f'The text is binary: it holds a NUL character at position {text.index(chr(0))}, which the "bytes" '
                "tokenizer keeps as its end-of-document token. Remove it from the text."
            )
        return ids_N

    def encode_spans(self, spans: Iterable[Span]) -> Iterator[Piece]:
        for text, start, stop in spans:
            for first in range(start, stop, BATCH_CHARS):
                last = min(first + BATCH_CHARS, stop)
                yield self.encode(text[first:last]), last == stop

    def decode(self, ids: Iterable[int]) -> str:
        # A model with a padded table may sample ids past 255: show them, rather than fail in the middle of a sample.
        parts = (bytes([i]) if i < 256 else "\ufffd".encode() for i in map(int, ids) if i != self.eos)
        return b"".join(parts).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        bytes_V = np.ones(self.vocab_size, np.int32)
        bytes_V[self.eos] = 0
        return bytes_V


class RawTokens:
    """Stands in for the tokenizer of a .bin that nobody gave: its ids can be trained on but not read as text."""

    def __init__(self, vocab_size: int, eos: int):
        self.vocab_size = vocab_size
        self.eos = eos
        self.eos_name = "none that is known" if eos < 0 else f"the id {eos}"
        self.digest = hashlib.sha256(f"slackline raw tokens {vocab_size} {eos}".encode()).hexdigest()
        self.serialized = json.dumps({"slackline": "ids", "vocab_size": vocab_size, "end_of_document": eos}) + "\n"

    def encode(self, text: str) -> np.ndarray:
        raise ValueError(
            "These tokens come from a .bin without its tokenizer, so no text can be encoded. Set data.tokenizer to the "
            "tokenizer.json that wrote them."
        )

    def encode_spans(self, spans: Iterable[Span]) -> Iterator[Piece]:
        return ((self.encode(text), True) for text, _, _ in spans)

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(f"<{int(i)}>" for i in ids)

    def token_bytes(self) -> np.ndarray:
        return np.ones(self.vocab_size, np.int32)  # bits per byte are then bits per token: whoever makes one says so


def build(
    name: str,
    vocab_size: int,
    documents: Callable[[], Iterator[str]],
    cache_dir: Path,
    corpus_digest: str | None = None,
    end_of_document: str = "",
) -> Tokenizer:
    """The tokenizer called `name`.

    Args:
        name: "bytes"; "bpe", trained on `documents()` and cached; or a path to a tokenizer.json.
        vocab_size: rows of the model's embedding table; "bpe" grows to at most this many ids.
        documents: gives the texts to train on; called for "bpe" only.
        cache_dir: where a trained BPE is kept, by corpus digest and vocab_size.
        corpus_digest: stands for `documents`, so that a cached BPE is found without reading them; None: hash them.
        end_of_document: the special token that ends a document; empty: the tokenizer's own.

    Raises:
        ValueError: unknown name, unreadable file, or ids that do not fit in vocab_size.
    """
    if name == "bytes":
        text, origin = ByteTokenizer.serialized, 'the tokenizer "bytes"'
    elif name == "bpe":
        text, origin = bpe.train(vocab_size, documents, cache_dir, corpus_digest)
    else:
        text, origin = read_file(name)
    tokenizer = from_text(text, origin, end_of_document)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"data.vocab_size is {vocab_size}, but the tokenizer {name!r} has ids up to {tokenizer.vocab_size - 1}. "
            f"Set data.vocab_size={tokenizer.vocab_size} or more."
        )
    return tokenizer


def from_text(serialized: str, origin: str, end_of_document: str = "") -> Tokenizer:
    """The tokenizer that a tokenizer.json describes: of the library, or of the two kinds that are ours."""
    try:
        described = json.loads(serialized)
    except ValueError as error:
        raise ValueError(f"{origin} is not a tokenizer.json that `tokenizers` can read: {error}") from error
    kind = described.get("slackline") if isinstance(described, dict) else None
    if kind == "bytes":
        if end_of_document:
            raise ValueError(f'data.end_of_document is {end_of_document!r}; with data.tokenizer="bytes" it is byte 0.')
        return ByteTokenizer()
    if kind == "ids":
        return RawTokens(described["vocab_size"], described["end_of_document"])
    return JsonTokenizer(serialized, origin, end_of_document)


def read_file(name: str) -> tuple[str, str]:
    """(text, where it is) of the tokenizer.json at a path, or in a folder."""
    path = Path(name).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        near = difflib.get_close_matches(name, ["bytes", "bpe"], n=1, cutoff=0.4)
        raise ValueError(
            f'data.tokenizer is {name!r}, which is neither "bytes" nor "bpe" nor the path of an existing '
            "tokenizer.json." + (f" Did you mean {near[0]!r}?" if near else "")
        )
    try:
        return path.read_bytes().decode("utf-8"), str(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a tokenizer.json: it is not UTF-8 text.") from error


def encode_prompt(tokenizer: Tokenizer, prompt: str) -> np.ndarray:
    """int32 ids [N ≥ 1] to begin a sample with: of the prompt, else the end of a document, after which one begins.

    Ids without a tokenizer have no prompt: their samples begin so, too.
    """
    ids_N = np.zeros(0, np.int32) if isinstance(tokenizer, RawTokens) else tokenizer.encode(prompt).astype(np.int32)
    return ids_N if len(ids_N) else np.array([max(tokenizer.eos, 0)], np.int32)

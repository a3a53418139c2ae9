"""Text to token ids and back: plain bytes, a byte-level BPE trained on the corpus, or any Hugging Face tokenizer.json.

Shapes: V vocabulary, N tokens.
"""

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np

from data.cache import cached

BPE_EOS = "<|endoftext|>"
BPE_TRAINING_BYTES = 2**28  # more text than this hardly changes the merges, and all of it sits in memory
# In this order: chat tokenizers hold several, and the first ones end a document rather than a turn.
EOS_NAMES = (
    BPE_EOS,
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
_PIECE_CHARS = 2**20
_PIECE_END = re.compile(r"\S\n(?=\S)")


class Tokenizer(Protocol):
    """What the rest of the code knows of a tokenizer. Ids lie in [0, vocab_size)."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id this tokenizer can produce; at most data.vocab_size."""
        ...

    @property
    def eos(self) -> int:
        """The id written after every document."""
        ...

    @property
    def digest(self) -> str:
        """sha256 hex of all that decides the ids."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Ids of `text`, 1-D, uint16 (uint32 when vocab_size exceeds 65,536), without EOS."""
        ...

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """`encode` of each text, on all cores where the tokenizer can."""
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
    digest = hashlib.sha256(b"slackline bytes, eos 0").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        ids_N = np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint16)
        if "\0" in text:
            raise ValueError(
                f'The text is binary: it holds a NUL character at position {text.index(chr(0))}, which the "bytes" '
                "tokenizer keeps as its end-of-document token. Remove it from the text."
            )
        return ids_N

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        # A model with a padded table may sample ids past 255: show them, rather than fail in the middle of a sample.
        parts = (bytes([i]) if i < 256 else "\ufffd".encode() for i in map(int, ids) if i != self.eos)
        return b"".join(parts).decode("utf-8", errors="replace")

    def token_bytes(self) -> np.ndarray:
        bytes_V = np.ones(self.vocab_size, np.int32)
        bytes_V[self.eos] = 0
        return bytes_V


class JsonTokenizer:
    """A tokenizer of the `tokenizers` library, ours or anyone's, given as the text of its tokenizer.json."""

    def __init__(self, serialized: str, origin: str):
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(serialized)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{origin} is not a tokenizer.json that `tokenizers` can read: {error}") from error
        self._serialized: dict[str, Any] = json.loads(serialized)
        # A file saved for a fine-tuned model may cut or pad every text; and a text that spells out a special token must
        # not be able to end its document.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self._vocab: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocab.values(), default=-1) + 1
        self.digest = hashlib.sha256(serialized.encode("utf-8")).hexdigest()
        self._dtype = np.uint16 if self.vocab_size <= 2**16 else np.uint32
        eos = next((name for name in EOS_NAMES if name in self._vocab), None)
        if eos is None:
            raise ValueError(
                f"{origin} has no end-of-document token: none of {', '.join(EOS_NAMES)} is in its vocabulary. "
                "Add one of them to the file as a special token."
            )
        self.eos = self._vocab[eos]

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        pieces = [list(_pieces(text)) for text in texts]
        encoded = iter(self._tokenizer.encode_batch_fast([p for ps in pieces for p in ps], add_special_tokens=False))
        empty = np.zeros(0, self._dtype)
        return [np.concatenate([empty, *(np.array(next(encoded).ids, self._dtype) for _ in ps)]) for ps in pieces]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray:
        """Exact for byte-level BPE; for others the bytes of the token's own text, its space marker counted as one."""
        added = {token["id"]: token for token in self._serialized.get("added_tokens", ())}
        length = self._token_length()
        bytes_V = np.zeros(self.vocab_size, np.int32)
        for token, i in self._vocab.items():
            if i in added:  # stands for its own spelling, or when special for no text at all
                bytes_V[i] = 0 if added[i]["special"] else len(token.encode("utf-8"))
            else:
                bytes_V[i] = length(token)
        bytes_V[self.eos] = 0
        return bytes_V

    def _token_length(self) -> Callable[[str], int]:
        parts = [self._serialized.get(key) or {} for key in ("pre_tokenizer", "decoder")]
        kinds = {part.get("type") for whole in parts for part in [whole, *_children(whole)]}
        model = self._serialized.get("model") or {}
        if "ByteLevel" in kinds:
            return len  # the byte-level alphabet has one character per byte
        if "WordPiece" in kinds or model.get("type") == "WordPiece":
            prefix = model.get("continuing_subword_prefix", "##")
            # A token that starts a word also stands for the space before it.
            return lambda t: len(t[len(prefix) :].encode()) if t.startswith(prefix) else len(t.encode()) + 1
        fallback = re.compile(r"<0x[0-9A-F]{2}>") if model.get("byte_fallback") else None
        return lambda t: 1 if fallback and fallback.fullmatch(t) else len(t.replace("▁", " ").encode())


def _children(part: dict[str, Any]) -> list[dict[str, Any]]:
    return part.get("pretokenizers") or part.get("decoders") or []


def _pieces(text: str) -> Iterator[str]:
    """Cut a long text at line ends, where byte-level BPE splits anyway: same ids, bounded memory, several cores."""
    start = 0
    while len(text) - start > _PIECE_CHARS and (cut := _PIECE_END.search(text, start + _PIECE_CHARS)):
        yield text[start : cut.end()]
        start = cut.end()
    if start < len(text):
        yield text[start:]


def build(
    name: str,
    vocab_size: int,
    documents: Callable[[], Iterator[str]],
    cache_dir: Path,
    corpus_digest: str | None = None,
) -> Tokenizer:
    """The tokenizer called `name`.

    Args:
        name: "bytes"; "bpe", trained on `documents()` (their first 256 MB) and cached; or a path to a tokenizer.json.
        vocab_size: rows of the model's embedding table; "bpe" grows to at most this many ids.
        documents: gives the texts to train on; called for "bpe" only.
        cache_dir: where a trained BPE is kept, by corpus digest and vocab_size.
        corpus_digest: stands for `documents`, so that a cached BPE is found without reading them; None: hash them.

    Raises:
        ValueError: unknown name, unreadable file, or ids that do not fit in vocab_size.
    """
    if name == "bytes":
        tokenizer: Tokenizer = ByteTokenizer()
    elif name == "bpe":
        tokenizer = _build_bpe(vocab_size, documents, cache_dir, corpus_digest)
    else:
        tokenizer = _build_from_file(name)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"data.vocab_size is {vocab_size}, but the tokenizer {name!r} has ids up to {tokenizer.vocab_size - 1}. "
            f"Set data.vocab_size={tokenizer.vocab_size} or more."
        )
    return tokenizer


def _build_from_file(name: str) -> JsonTokenizer:
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
        return JsonTokenizer(path.read_bytes().decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a tokenizer.json: it is not UTF-8 text.") from error


def _build_bpe(
    vocab_size: int, documents: Callable[[], Iterator[str]], cache_dir: Path, corpus_digest: str | None
) -> JsonTokenizer:
    if vocab_size < 257:
        raise ValueError(
            f"data.vocab_size is {vocab_size}, but a byte-level BPE holds 256 bytes and {BPE_EOS}: set it to 257 or "
            'more (4096 is a good start), or set data.tokenizer="bytes".'
        )
    digest = corpus_digest or _digest_texts(_first_bytes(documents()))
    key = hashlib.sha256(f"bpe 1:{digest}:{vocab_size}:{BPE_TRAINING_BYTES}".encode()).hexdigest()

    def read(path: Path) -> JsonTokenizer | None:
        try:
            checksum, _, serialized = path.read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None
        if hashlib.sha256(serialized).hexdigest().encode() != checksum:
            return None
        return JsonTokenizer(serialized.decode("utf-8"), str(path))

    def write(file: BinaryIO) -> None:
        serialized = _train_bpe(vocab_size, _first_bytes(documents())).encode("utf-8")
        file.write(hashlib.sha256(serialized).hexdigest().encode() + b"\n" + serialized)

    return cached(cache_dir / f"bpe-{vocab_size}-{key[:24]}.json", read, write)


def _train_bpe(vocab_size: int, texts: Iterator[str]) -> str:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BPE_EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def _first_bytes(texts: Iterator[str]) -> Iterator[str]:
    left = BPE_TRAINING_BYTES
    for text in texts:
        if left <= 0:
            return
        yield text[:left]
        left -= len(text)


def _digest_texts(texts: Iterator[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode("utf-8")).digest())
    return digest.hexdigest()

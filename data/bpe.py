"""A byte-level BPE, trained on the corpus and kept in the cache."""

import hashlib
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from data import pieces
from data.cache import cached
from data.waiting import interruptible

END_OF_DOCUMENT = "<|endoftext|>"
TRAINING_CHARS = 2**28  # more text than this hardly changes the merges
# Training takes time in the square of a word's length: what is longer than any word is cut, and a little is enough.
_WORD_CHARS, _LONG_WORDS_CHARS = 2**9, 2**20
_LONG_WORD = re.compile(
    "|".join(f"{kind}{{{_WORD_CHARS + 1},}}" for kind in (r"[^\W\d_]", r"\d", r"(?:[^\w\s]|_)", r"\s"))
)
_BLANKS = re.compile(rf"\s{{{_WORD_CHARS + 1},}}")
_PLACES = re.compile(r"(?<=\S\n)(?=\S)")


def train(
    vocab_size: int, documents: Callable[[], Iterator[str]], cache_dir: Path, corpus_digest: str | None
) -> tuple[str, str]:
    """(tokenizer.json, where it is kept) of a BPE of at most vocab_size ids.

    Args:
        documents: gives the texts to train on, of which the first TRAINING_CHARS characters are used.
        corpus_digest: stands for `documents`, so that a cached BPE is found without reading them; None: hash them.

    Raises:
        ValueError: vocab_size has no room for the 256 bytes and the end of a document.
    """
    if vocab_size < 257:
        raise ValueError(
            f"data.vocab_size is {vocab_size}, but a byte-level BPE holds 256 bytes and {END_OF_DOCUMENT}: set "
            'data.vocab_size=257 or more (4096 is a good start), or set data.tokenizer="bytes".'
        )
    digest = corpus_digest or _digest_texts(_first_chars(documents()))
    key = hashlib.sha256(f"bpe 2:{digest}:{vocab_size}:{TRAINING_CHARS}".encode()).hexdigest()
    path = cache_dir / f"bpe-{vocab_size}-{key[:24]}.json"

    def read(path: Path) -> str | None:
        try:
            checksum, _, serialized = path.read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None
        if hashlib.sha256(serialized).hexdigest().encode() != checksum:
            return None
        return serialized.decode("utf-8")

    def write(file: BinaryIO) -> None:
        serialized = interruptible(lambda: train_on(vocab_size, documents())).encode("utf-8")
        file.write(hashlib.sha256(serialized).hexdigest().encode() + b"\n" + serialized)

    return cached(path, read, write), str(path)


def train_on(vocab_size: int, texts: Iterator[str]) -> str:
    """The tokenizer.json of a BPE of these texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_words(_first_chars(texts)), trainer)
    return tokenizer.to_str()


def _words(texts: Iterator[str]) -> Iterator[str]:
    """The texts in pieces that have the same words, but for runs of letters, digits, other signs or blanks that are too
    long to be words."""
    left = _LONG_WORDS_CHARS
    for text in texts:
        for start, stop, _ in pieces.cut(text, 0, len(text), _PLACES):
            piece, at = text[start:stop], 0
            if max(map(len, piece.split()), default=0) <= _WORD_CHARS and not _BLANKS.search(piece):
                yield piece  # almost always, and much faster to see so
                continue
            for run in _LONG_WORD.finditer(piece):
                yield piece[at : run.start()]
                at = run.end()
                used = min(at, run.start() + left)
                yield from (piece[i : min(i + _WORD_CHARS, used)] for i in range(run.start(), used, _WORD_CHARS))
                left -= used - run.start()
            yield piece[at:]
    if left < _LONG_WORDS_CHARS:
        warnings.warn(
            f"The text holds words of more than {_WORD_CHARS} characters: the BPE is trained on the first "
            f"{_LONG_WORDS_CHARS - left:,} characters of them, in parts.",
            stacklevel=2,
        )


def _first_chars(texts: Iterator[str]) -> Iterator[str]:
    left = TRAINING_CHARS
    for text in texts:
        if left <= 0:
            return
        yield text if len(text) <= left else text[:left]
        left -= len(text)


def _digest_texts(texts: Iterator[str]) -> str:
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode("utf-8")).digest())
    return digest.hexdigest()

"""A corpus as two arrays of tokens, training and held-out, ready on disk after the first run.

Documents are joined with EOS after each. The held-out split is chosen by document, from a hash of its content, so that
the same text is never on both sides and adding a file does not reshuffle the rest by position.

Shapes: N tokens (of either split), V vocabulary, P distinct pairs of tokens.
"""

import functools
import hashlib
import json
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data import flat, sources
from data.cache import cache_directory, cached, file_digest
from data.tokenizer import Tokenizer, build

__all__ = ["Corpus", "cache_directory", "load", "ngram_bits_per_byte"]

_HEADER_BYTES = 4096  # one page, so that the memory map of the tokens behind it is aligned
_FORMAT = "slackline tokens 1"  # part of every digest: count it up when the layout or the split rule changes
_BATCH_CHARS = 2**22


@dataclass(frozen=True)
class Corpus:
    """Tokens of one corpus.

    Attributes:
        train_N, eval_N: token ids, uint16 or uint32, memory-mapped read-only.
        tokenizer: what made them, or for a .bin what decodes them.
        digest: sha256 of all that decides the tokens: equal digests mean equal arrays, on any machine.
        name: corpus or file name, for the log.
        num_documents: in both splits; for a .bin, its EOS tokens.
    """

    train_N: np.ndarray
    eval_N: np.ndarray
    tokenizer: Tokenizer
    digest: str
    name: str
    num_documents: int


def load(
    *,
    corpus: str,
    path: str,
    tokenizer: str,
    vocab_size: int,
    eval_fraction: float,
    cache_dir: Path,
    seq_len: int,
) -> Corpus:
    """Read, tokenise and split a corpus, or map the tokens that an earlier run or another process has written.

    Args:
        corpus: "stdlib" or "asv"; not read when `path` is given.
        path: a .txt, .jsonl or .parquet file, a folder of them, or a flat .bin of tokens (uint16; uint32 when the name
            ends in .u32.bin; little endian), whose held-out split is its tail.
        tokenizer: see `data.tokenizer.build`.
        vocab_size: rows of the model's table; no id reaches it.
        eval_fraction: about this part of the bytes is held out, in (0, 1).
        cache_dir: where tokens are kept.
        seq_len: both splits must hold one window of this many tokens and its target.

    Raises:
        FileNotFoundError, ValueError, ImportError: a sentence that names the path and what to change.
    """
    if not 0 < eval_fraction < 1:
        raise ValueError(f"data.eval_fraction is {eval_fraction}; it is the held-out part, between 0 and 1 (say 0.05).")
    if seq_len < 1:
        raise ValueError(f"data.seq_len is {seq_len}; it must be 1 or more.")
    if path and path.endswith(".bin") and not Path(path).expanduser().is_dir():
        loaded = _load_flat(path, tokenizer, vocab_size, eval_fraction, cache_dir)
    else:
        loaded = _load_documents(sources.find(corpus, path), tokenizer, vocab_size, eval_fraction, cache_dir)
    for split, tokens_N in (("training", loaded.train_N), ("held-out", loaded.eval_N)):
        if len(tokens_N) <= seq_len:
            raise ValueError(
                f"data.seq_len is {seq_len}, so a window takes {seq_len + 1} tokens, but the {split} split of "
                f"{path or corpus} holds {len(tokens_N)} (training {len(loaded.train_N)}, held-out "
                f"{len(loaded.eval_N)}). Give more text, lower data.seq_len, or change data.eval_fraction "
                f"({eval_fraction})."
            )
    return loaded


def _load_flat(path: str, tokenizer: str, vocab_size: int, eval_fraction: float, cache_dir: Path) -> Corpus:
    file = sources.existing(path)
    if tokenizer == "bpe":
        raise ValueError(
            f"data.path {path!r} already holds tokens, so there is no text to train data.tokenizer='bpe' on. Set "
            "data.tokenizer to the tokenizer.json that wrote these tokens, or to 'bytes'."
        )
    decoder = build(tokenizer, vocab_size, lambda: iter(()), cache_dir)
    tokens_N, decoder, num_documents = flat.open_tokens(file, decoder, vocab_size, cache_dir)
    with file.open("rb") as opened:
        digest = _digest(file_digest(opened), str(tokens_N.dtype), decoder.digest, str(eval_fraction))
    num_eval = max(1, round(len(tokens_N) * eval_fraction))
    return Corpus(tokens_N[:-num_eval], tokens_N[-num_eval:], decoder, digest, file.name, num_documents)


def _load_documents(
    source: sources.Source, tokenizer: str, vocab_size: int, eval_fraction: float, cache_dir: Path
) -> Corpus:
    # Everything that reads the documents is behind a cache miss: a second start maps the tokens and goes.
    split = functools.cache(lambda: choose_held_out(source.documents(), eval_fraction))

    def training_texts() -> Iterator[str]:
        return (train for train, _ in map(split().cut, _texts(source)) if train)

    corpus_digest = _digest(source.key, str(eval_fraction))
    encoder = build(tokenizer, vocab_size, training_texts, cache_dir, corpus_digest)
    key = _digest(_FORMAT, source.key, encoder.digest, str(eval_fraction))
    write = functools.partial(_write_tokens, source=source, split=split, tokenizer=encoder, key=key, folder=cache_dir)
    train_N, eval_N, num_documents = cached(
        cache_dir / f"tokens-{key[:32]}.bin", functools.partial(_read_tokens, key=key), write
    )
    digest = _digest(_FORMAT, source.digest, encoder.digest, str(eval_fraction))
    return Corpus(train_N, eval_N, encoder, digest, source.name, num_documents)


def _texts(source: sources.Source) -> Iterator[str]:
    return (document.text for document in source.documents())


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------- the held-out split


@dataclass(frozen=True)
class Split:
    """Which documents are held out: those whose content hash is in `held_out`, or the tail of a lone document."""

    held_out: frozenset[int]
    tail_fraction: float  # > 0 when all documents are the same text: then each is cut in two
    num_documents: int

    def cut(self, text: str) -> tuple[str, str]:
        """(training part, held-out part) of one document; one of them is empty unless the document is alone."""
        if self.tail_fraction:
            at = len(text) - max(1, round(len(text) * self.tail_fraction))
            return text[:at], text[at:]
        return ("", text) if _content_hash(text) in self.held_out else (text, "")


def choose_held_out(documents: Iterator[sources.Document], eval_fraction: float) -> Split:
    """Take documents in the order of their hash until about eval_fraction of the bytes is held out.

    A document that would overshoot is passed over; if none fits, the smallest one is taken. Copies
    of a text share its hash, hence its side.
    """
    hashes, sizes = array("Q"), array("Q")
    for document in documents:
        hashes.append(_content_hash(document.text))
        sizes.append(len(document.text.encode("utf-8")))
    distinct, inverse = np.unique(np.asarray(hashes, np.uint64), return_inverse=True)
    bytes_of = np.bincount(inverse, weights=np.asarray(sizes, np.float64))
    if len(distinct) == 1:
        return Split(frozenset(), eval_fraction, len(hashes))
    target = eval_fraction * bytes_of.sum()
    taken, size = [], 0.0
    for content_hash, num_bytes in zip(distinct.tolist(), bytes_of.tolist(), strict=True):
        if size + num_bytes <= 1.02 * target:
            taken.append(content_hash)
            size += num_bytes
        if size >= 0.98 * target:
            break
    if not taken:
        taken = [int(distinct[np.argmin(bytes_of)])]
    if len(taken) == len(distinct):
        taken.pop()  # something must be left to train on
    return Split(frozenset(taken), 0.0, len(hashes))


def _content_hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


# ---------------------------------------------------------------------------------------------- the token cache


def _write_tokens(
    file: BinaryIO,
    *,
    source: sources.Source,
    split: Callable[[], Split],
    tokenizer: Tokenizer,
    key: str,
    folder: Path,
) -> None:
    """One page of header, the training tokens, the held-out tokens."""
    dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
    file.write(bytes(_HEADER_BYTES))
    with tempfile.TemporaryFile(dir=folder) as held_out:  # beside the cache: /tmp may be a small disk in memory
        parts = map(split().cut, _texts(source))
        num_train, num_eval = _encode(parts, tokenizer, dtype, file, held_out)
        held_out.seek(0)
        shutil.copyfileobj(held_out, file, 2**20)
    file.flush()
    header = {
        "key": key,
        "dtype": dtype,
        "num_train": num_train,
        "num_eval": num_eval,
        "num_documents": split().num_documents,
        "payload": file_digest(file, offset=_HEADER_BYTES),
    }
    file.seek(0)
    file.write(json.dumps(header).encode().ljust(_HEADER_BYTES))


def _encode(
    parts: Iterator[tuple[str, str]], tokenizer: Tokenizer, dtype: str, train: BinaryIO, held_out: BinaryIO
) -> tuple[int, int]:
    counts = {train: 0, held_out: 0}
    batch: list[tuple[BinaryIO, str]] = []
    eos = np.array([tokenizer.eos], dtype)

    def flush() -> None:
        for (file, _), ids_N in zip(batch, tokenizer.encode_batch([text for _, text in batch]), strict=True):
            file.write(np.concatenate([ids_N.astype(dtype), eos]).tobytes())
            counts[file] += len(ids_N) + 1
        batch.clear()

    for part in parts:
        batch += [(file, text) for file, text in zip((train, held_out), part, strict=True) if text]
        if sum(len(text) for _, text in batch) >= _BATCH_CHARS:
            flush()
    flush()
    return counts[train], counts[held_out]


def _read_tokens(path: Path, key: str) -> tuple[np.ndarray, np.ndarray, int] | None:
    """The two splits as memory maps, or None when the file is missing or its length, header or checksum is wrong.

    The checksum covers all of a file of up to 64 MB, and 16 sampled blocks of a longer one.
    """
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(_HEADER_BYTES))
            payload = file_digest(file, offset=_HEADER_BYTES)  # covers the length too
        num_tokens = header["num_train"] + header["num_eval"]
        dtype = np.dtype(header["dtype"])
        if header["key"] != key or header["payload"] != payload:
            return None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    tokens_N = np.memmap(path, dtype, mode="r", offset=_HEADER_BYTES, shape=(num_tokens,))
    return tokens_N[: header["num_train"]], tokens_N[header["num_train"] :], header["num_documents"]


# ---------------------------------------------------------------------------------------------- baselines


def ngram_bits_per_byte(corpus: Corpus, max_tokens: int = 2**26) -> tuple[float, float]:
    """What counting alone achieves on the held-out split: (unigram, bigram) bits per UTF-8 byte.

    Counted on the first max_tokens of the training split, scored on the first max_tokens of the held-out split, with
    one pseudo-count so that unseen events stay finite: for the unigram spread over the vocabulary as add-one does,
    p(b) = (c(b) + 1) / (N + V); for the bigram one token spread as the unigram says,
    p(b|a) = (c(ab) + p(b)) / (c(a) + 1), since add-one over a whole row would drown the counts of a large vocabulary.
    (MacKay and Peto, 1995, eq. 12 with alpha = 1.) EOS is predicted as any token and stands for no byte.
    """
    vocab, eos = corpus.tokenizer.vocab_size, corpus.tokenizer.eos
    train_N = np.asarray(corpus.train_N[:max_tokens])
    eval_N = np.asarray(corpus.eval_N[:max_tokens])
    count_V = np.bincount(train_N, minlength=vocab)
    unigram_V = (count_V + 1) / (len(train_N) + vocab)

    # Both splits start a document, as if after EOS: every token has a token before it.
    pair_P, pair_count_P = np.unique(_pair_codes(train_N, eos, vocab), return_counts=True)
    context_V = np.bincount(train_N[:-1], minlength=vocab)
    context_V[eos] += 1
    seen_P, seen_count_P = np.unique(_pair_codes(eval_N, eos, vocab), return_counts=True)
    before_P, token_P = np.divmod(seen_P.astype(np.int64), vocab)
    at_P = np.minimum(np.searchsorted(pair_P, seen_P), len(pair_P) - 1)
    matched_P = np.where(pair_P[at_P] == seen_P, pair_count_P[at_P], 0)
    bigram_P = (matched_P + unigram_V[token_P]) / (context_V[before_P] + 1)

    num_bytes = int(corpus.tokenizer.token_bytes()[eval_N].sum(dtype=np.int64))
    unigram_bits = -np.log2(unigram_V[token_P]) @ seen_count_P
    bigram_bits = -np.log2(bigram_P) @ seen_count_P
    return float(unigram_bits / num_bytes), float(bigram_bits / num_bytes)


def _pair_codes(tokens_N: np.ndarray, eos: int, vocab: int) -> np.ndarray:
    """(token before) * V + token, in the narrowest type: sorting 32-bit numbers is several times faster."""
    dtype = np.uint32 if vocab <= 2**16 else np.uint64
    before_N = np.concatenate([np.array([eos], dtype), tokens_N[:-1].astype(dtype)])
    return before_N * dtype(vocab) + tokens_N.astype(dtype)

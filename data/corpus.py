"""A corpus as two arrays of tokens, training and held-out, ready on disk after the first run.

Documents are joined with EOS after each. Several sources make a mixture by weight, with one tokenizer.

Shapes: N tokens (of either split), V vocabulary, P distinct pairs of tokens.
"""

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data import flat, mixture, record, sources
from data.cache import cache_directory
from data.files import DEFAULT_SUFFIXES
from data.mixture import Mixture
from data.parts import Ids, Part, Texts, digest_of
from data.tokenizer import RawTokens, Tokenizer, build, encode_prompt

__all__ = ["KEYS", "Corpus", "cache_directory", "encode_prompt", "load", "ngram_bits_per_byte"]

# The keys of the config's group `data` that `load` takes.
KEYS = "corpus path suffixes text_key tokenizer vocab_size end_of_document eval_fraction seq_len changed".split()


@dataclass(frozen=True)
class Corpus:
    """Tokens of one corpus.

    Attributes:
        train_N, eval_N: token ids, uint16 or uint32, memory-mapped read-only; of several parts, a Mixture of such.
        tokenizer: what made them, or for a .bin what decodes them.
        digest: sha256 of all that decides the tokens: equal digests mean equal arrays, on any machine.
        name: corpus or file name, for the log.
        parts: the sources, one by one.
        record: what a run keeps of all this in its workdir (`data.record`).
    """

    train_N: np.ndarray | Mixture
    eval_N: np.ndarray | Mixture
    tokenizer: Tokenizer
    digest: str
    name: str
    parts: tuple[Part, ...]
    record: record.Record

    @property
    def num_documents(self) -> int:
        """In both splits; of a .bin, its EOS tokens."""
        return sum(part.tokens.num_documents for part in self.parts)

    def token_bytes(self) -> np.ndarray:
        """[V]: bytes of the text that was read that each token stands for. A tokenizer that changes the text, or lacks
        tokens for some of it, knows its own bytes only: these are scaled to what was counted in the held-out text."""
        read = sum(part.tokens.eval_bytes for part in self.parts)
        known = sum(part.tokens.eval_token_bytes for part in self.parts)
        bytes_V = self.tokenizer.token_bytes()
        return bytes_V if read == known or not known else bytes_V * (read / known)

    def keep(self, workdir: Path) -> None:
        """Writes tokenizer.json and data.json: what a resumed run goes on with, and compares its text with."""
        record.write(workdir, self.tokenizer, self.record)

    def describe(self, num_tokens: int) -> list[tuple[str, str]]:
        """Rows of the start-up table. num_tokens: how many a run of full length trains on."""
        rows = []
        weights = sum(part.weight for part in self.parts)
        for part in self.parts:
            share = f"; {part.weight / weights:.3g} of the rows" if len(self.parts) > 1 else ""
            rows.append(("  " * bool(rows) + "data", f"{part}{share}"))
        for part in self.parts:
            train, held_out = len(part.tokens.train_N), len(part.tokens.eval_N)
            epochs = num_tokens * part.weight / weights / train
            of = f" of {part.label}" if len(self.parts) > 1 else ""
            shown = f"{train:,} for training, {held_out:,} held out ({held_out / (train + held_out):.1%})"
            rows.append(("  tokens", f"{shown}{of}; {epochs:.3g} epochs"))
        name, ids = self.record["tokenizer"]["name"], self.tokenizer.vocab_size
        rows.append(("  tokenizer", f"{name}, {ids:,} ids; a document ends with {self.tokenizer.eos_name}"))
        return rows


def load(
    *,
    corpus: str,
    path: str,
    tokenizer: str,
    vocab_size: int,
    eval_fraction: float,
    cache_dir: Path,
    seq_len: int,
    suffixes: str = DEFAULT_SUFFIXES,
    text_key: str = "text",
    end_of_document: str = "",
    changed: str = "refuse",
    workdir: Path | None = None,
    origin: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Corpus:
    """Read, tokenise and split a corpus, or map the tokens that an earlier run or another process has written.

    Args:
        corpus: "stdlib" or "asv"; not read when `path` is given.
        path: a file of text, a folder of them, a flat .bin of tokens whose held-out split is its tail, or several of
            these with weights (`data.mixture.parse`).
        tokenizer: see `data.tokenizer.build`.
        vocab_size: rows of the model's table; no id reaches it.
        eval_fraction: about this part of the bytes is held out, in (0, 1).
        cache_dir: where tokens are kept.
        seq_len: both splits must hold one window of this many tokens and its target.
        suffixes: of the files that are read in a folder.
        text_key: what holds the text, in .jsonl and .parquet.
        end_of_document: the special token that ends a document; of a .bin its id; empty: the tokenizer's own.
        changed: "accept": text that is not what the run in `workdir` was trained on is taken, with a warning.
        workdir: of a run that goes on: its tokenizer is used, and its data compared.
        origin: the workdir of a run with whose parameters this one begins: its tokenizer is used.
        say: told what is being done when it takes long.

    Raises:
        FileNotFoundError, ValueError, ImportError: a sentence that names the path and what to change.
    """
    if not 0 < eval_fraction < 1:
        raise ValueError(f"data.eval_fraction is {eval_fraction}; it is the held-out part, between 0 and 1 (say 0.05).")
    if seq_len < 1:
        raise ValueError(f"data.seq_len is {seq_len}; it must be 1 or more.")
    opened = list(_open(corpus, path, suffixes, text_key, eval_fraction, say))
    facts = _facts(opened, eval_fraction, text_key)
    kept = record.read(workdir, tokenizer) if workdir else None
    if workdir and kept:
        compare(kept, facts, changed)
        encoder = record.tokenizer_of(workdir, kept, tokenizer, end_of_document, changed == "accept")
        tokenizer = kept["tokenizer"]["name"]
    else:
        which = record.kept(origin, tokenizer) if origin else tokenizer
        encoder = _build(opened, which, vocab_size, cache_dir, end_of_document)
    encoder = _decoder(opened, encoder, vocab_size, cache_dir)
    parts = tuple(one.part(encoder, cache_dir) for one in opened)
    for one, part in zip(opened, parts, strict=True):
        _check_lengths(one.name, part, seq_len, eval_fraction)
    name = " + ".join(one.name for one in opened)
    return _joined(parts, encoder, name, facts | {"tokenizer": record.entry(encoder, tokenizer)})


def _open(
    corpus: str, path: str, suffixes: str, text_key: str, eval_fraction: float, say: Callable[[str], None]
) -> Iterator[Texts | Ids]:
    if not path:
        yield Texts(sources.find(corpus, ""), corpus, 1.0, eval_fraction, say)
        return
    named = mixture.parse(path)
    for name, weight in named:
        label = Path(name).name if len(named) > 1 else ""
        if flat.is_flat(name):
            yield Ids(name, label, weight, eval_fraction)
        else:
            yield Texts(sources.find("", name, suffixes, text_key), label, weight, eval_fraction, say)


def _facts(opened: list[Texts | Ids], eval_fraction: float, text_key: str) -> record.Record:
    """What a run keeps of its text, to be compared when it goes on."""
    return {
        "data.eval_fraction": eval_fraction,
        "data.text_key": text_key,
        "sources": [record.source(one.name, one.weight, one.files) for one in opened],
    }


def _build(
    opened: list[Texts | Ids], tokenizer: str, vocab_size: int, cache_dir: Path, end_of_document: str
) -> Tokenizer:
    """The tokenizer of a fresh run; of several texts, trained on all of them."""
    texts = [one for one in opened if isinstance(one, Texts)]
    if not texts and tokenizer == "bpe":
        raise ValueError(
            f"data.path {opened[0].name!r} already holds tokens, so there is no text to train data.tokenizer='bpe' on. "
            "Set data.tokenizer to the tokenizer.json that wrote these tokens, or to 'bytes'."
        )
    if not texts and end_of_document.isdecimal():
        return RawTokens(vocab_size, int(end_of_document))
    training = lambda: itertools.chain.from_iterable(one.training_texts() for one in texts)
    return build(tokenizer, vocab_size, training, cache_dir, digest_of(*(one.key for one in texts)), end_of_document)


def _decoder(opened: list[Texts | Ids], tokenizer: Tokenizer, vocab_size: int, cache_dir: Path) -> Tokenizer:
    """`tokenizer`, or what stands in for it where a .bin holds ids that it does not know."""
    for one in opened:
        unknown = one.check_ids(tokenizer, vocab_size, cache_dir) if isinstance(one, Ids) else None
        if unknown is None:
            continue
        told = f"{one.name} holds ids up to {unknown}, and data.tokenizer knows {tokenizer.vocab_size}"
        if any(isinstance(other, Texts) for other in opened):
            raise ValueError(f"data.path: {told}: several texts have one tokenizer. Set it to the one that wrote it.")
        warnings.warn(
            f"{told}: it did not write them. Training goes on; samples are ids without a prompt, and bits per byte are "
            "bits per token. Set data.tokenizer to the tokenizer.json that wrote the file.",
            stacklevel=3,
        )
        return RawTokens(vocab_size, -1)
    return tokenizer


def compare(kept: record.Record, facts: record.Record, changed: str) -> None:
    """Raises ValueError when the text is not what the run was trained on; "accept" makes that a warning."""
    lines = record.differences(kept, facts)
    if lines and changed != "accept":
        raise ValueError(
            "\n".join(lines) + "\nPut it back as it was, or go on with it as it is now, with the tokenizer of the run: "
            "--config.data.changed=accept"
        )
    for line in lines:
        warnings.warn(f"{line}; accepted", stacklevel=3)


def _joined(parts: tuple[Part, ...], tokenizer: Tokenizer, name: str, facts: record.Record) -> Corpus:
    """One part as it is, several as a mixture."""
    lone = len(parts) == 1
    weights = tuple(part.weight for part in parts)
    splits = (tuple(getattr(part.tokens, split) for part in parts) for split in ("train_N", "eval_N"))
    train_N, eval_N = (arrays[0] if lone else Mixture(arrays, weights) for arrays in splits)
    digest = parts[0].digest if lone else digest_of("mixture", *(f"{part.digest} {part.weight}" for part in parts))
    return Corpus(train_N, eval_N, tokenizer, digest, name, parts, facts)


def _check_lengths(name: str, part: Part, seq_len: int, eval_fraction: float) -> None:
    """Raises ValueError when a split has no window; warns when the held-out part is far from what was asked."""
    lengths = len(part.tokens.train_N), len(part.tokens.eval_N)
    total, shortest = sum(lengths), min(lengths)
    if shortest <= seq_len:
        remedies = ["Give more text"]
        if shortest >= 2:
            remedies.append(f"set data.seq_len={shortest - 1} or less")
        enough = 1.6 * (seq_len + 1) / total  # the split is by document, so not exact
        if lengths[1] < lengths[0] and enough < 0.4:
            remedies.append(f"set data.eval_fraction={math.ceil(enough * 1000) / 1000}")
        raise ValueError(
            f"data.seq_len is {seq_len}, so a window takes {seq_len + 1} tokens, but the "
            f"{'held-out' if lengths[1] == shortest else 'training'} split of {name} holds {shortest} (training "
            f"{lengths[0]}, held-out {lengths[1]}). {', or '.join(remedies)}."
        )
    share = lengths[1] / total
    if not eval_fraction / 2 <= share <= eval_fraction * 2:
        warnings.warn(
            f"{share:.2%} of the tokens of {name} are held out, and data.eval_fraction={eval_fraction} asks for "
            f"{eval_fraction:.2%}: its documents are too few or too uneven to be shared out better.",
            stacklevel=3,
        )


# ---------------------------------------------------------------------------------------------- baselines


def ngram_bits_per_byte(
    corpus: Corpus, windows: Sequence[Mapping[str, np.ndarray]], max_tokens: int = 2**26
) -> tuple[float, float]:
    """What counting alone achieves on windows of the held-out split: (unigram, bigram) bits per UTF-8 byte.

    Counted on the first max_tokens of the training split, scored on the targets of these windows (batches as
    loader.eval_batches makes them), with one pseudo-count so that unseen events stay finite: for the unigram spread
    over the vocabulary as add-one does, p(b) = (c(b) + 1) / (N + V); for the bigram one token spread as the unigram
    says, p(b|a) = (c(ab) + p(b)) / (c(a) + 1), since add-one over a whole row would drown the counts of a large
    vocabulary. (MacKay and Peto, 1995, eq. 12 with alpha = 1.) EOS is predicted as any token and stands for no byte. Of
    a mixture, each part gives its share of the tokens.
    """
    vocab, eos = corpus.tokenizer.vocab_size, max(corpus.tokenizer.eos, 0)
    train_N = _head(corpus.train_N, max_tokens)
    count_V = np.bincount(train_N, minlength=vocab)
    unigram_V = (count_V + 1) / (len(train_N) + vocab)

    # The split starts a document, as if after EOS: every token has a token before it.
    before_N = np.concatenate([np.array([eos], train_N.dtype), train_N[:-1]])
    pair_P, pair_count_P = np.unique(_pair_codes(before_N, train_N, vocab), return_counts=True)
    context_V = np.bincount(train_N[:-1], minlength=vocab)
    context_V[eos] += 1
    scored = [batch["mask"] > 0 for batch in windows]
    before_E, eval_E = (
        np.concatenate([batch[name][rows] for batch, rows in zip(windows, scored, strict=True)])
        for name in ("tokens", "targets")
    )
    seen_P, seen_count_P = np.unique(_pair_codes(before_E, eval_E, vocab), return_counts=True)
    before_P, token_P = np.divmod(seen_P.astype(np.int64), vocab)
    at_P = np.minimum(np.searchsorted(pair_P, seen_P), len(pair_P) - 1)
    matched_P = np.where(pair_P[at_P] == seen_P, pair_count_P[at_P], 0)
    bigram_P = (matched_P + unigram_V[token_P]) / (context_V[before_P] + 1)

    num_bytes = float(corpus.token_bytes()[eval_E].sum(dtype=np.float64))
    unigram_bits = -np.log2(unigram_V[token_P]) @ seen_count_P
    bigram_bits = -np.log2(bigram_P) @ seen_count_P
    return float(unigram_bits / num_bytes), float(bigram_bits / num_bytes)


def _head(tokens: np.ndarray | Mixture, max_tokens: int) -> np.ndarray:
    """The first tokens of a split; of a mixture, as many of each part as its weight says and all parts have."""
    mixture = Mixture.of(tokens)
    share = np.array(mixture.weights) / sum(mixture.weights)
    total = min(max_tokens, *(len(part_N) / s for part_N, s in zip(mixture.arrays, share, strict=True)))
    return np.concatenate([part_N[: round(total * s)] for part_N, s in zip(mixture.arrays, share, strict=True)])


def _pair_codes(before_N: np.ndarray, token_N: np.ndarray, vocab: int) -> np.ndarray:
    """(token before) * V + token, in the narrowest type, in which they are sorted fastest."""
    dtype = np.uint32 if vocab <= 2**16 else np.uint64
    return before_N.astype(dtype) * dtype(vocab) + token_N.astype(dtype)

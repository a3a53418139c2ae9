"""One source of a corpus, from what data.path names to its tokens: text that is tokenised here, or a flat .bin.

Shapes: N tokens.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data import flat, sources, tokens
from data.cache import cached, file_digest
from data.split import Split, choose_held_out
from data.tokenizer import Tokenizer
from data.waiting import Progress

Say = Callable[[str], None]


@dataclass(frozen=True)
class Part:
    """The tokens of one source.

    Attributes:
        label: its name, where that is not plain from data.path.
        weight: its share of the rows, in ratio to the others'.
        tokens: both splits, and what was counted.
        files: what was read.
        left_out: what was not, by reason, for people.
        digest: sha256 of all that decides the tokens.
        about: what else is to be said of it.
    """

    label: str
    weight: float
    tokens: tokens.Tokens
    files: tuple[sources.FileFact, ...]
    left_out: str
    digest: str
    about: str = ""

    def __str__(self) -> str:
        """`3 files, 120 documents, 4567 bytes; left out: 2 .jpg (a.jpg, …)`"""
        documents = (
            _count(self.tokens.num_documents, "document") if self.tokens.num_documents else "documents not known"
        )
        text = f"{_count(len(self.files), 'file')}, {documents}, {self.tokens.num_bytes} bytes{self.about}"
        named = f"{self.label}: {text}" if self.label else text
        return named + (f"; left out: {self.left_out}" if self.left_out else "")


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def digest_of(*facts: str) -> str:
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()


class Texts:
    """Documents that are split and tokenised here. Everything that reads them is behind a cache miss: a second start
    maps the tokens and goes."""

    def __init__(self, source: sources.Source, label: str, weight: float, eval_fraction: float, say: Say):
        self.label, self.weight, self.files, self.name = label, weight, source.files, source.name
        self._source, self._eval_fraction, self._say = source, eval_fraction, say
        self.key = digest_of(tokens.FORMAT, source.key, str(eval_fraction))

    @functools.cached_property
    def _split(self) -> Split:
        return choose_held_out(self._source.documents(), self._eval_fraction, Progress(self._say, "reading the text"))

    def training_texts(self) -> Iterator[str]:
        for document in self._source.documents():
            place = self._split.place(document.text)
            if place:
                yield document.text if place == len(document.text) else document.text[:place]

    def part(self, tokenizer: Tokenizer, cache_dir: Path) -> Part:
        """Its tokens, from the cache or made now."""
        key = digest_of(self.key, tokenizer.digest)
        write = functools.partial(
            tokens.write,
            documents=self._source.documents,
            split=lambda: self._split,
            tokenizer=tokenizer,
            key=key,
            folder=cache_dir,
            say=self._say,
        )
        read = functools.partial(tokens.read, key=key)
        found = cached(cache_dir / f"tokens-{key[:32]}.bin", read, write)
        digest = digest_of(tokens.FORMAT, self._source.digest, tokenizer.digest, str(self._eval_fraction))
        return Part(self.label, self.weight, found, self.files, self._source.left_out, digest)


class Ids:
    """A flat .bin, whose held-out split is its tail."""

    def __init__(self, path: str, label: str, weight: float, eval_fraction: float):
        self.label, self.weight, self.name = label, weight, Path(path).name
        self._flat, self._eval_fraction = flat.layout(sources.existing(path)), eval_fraction
        with self._flat.file.open("rb") as opened:
            self._digest = file_digest(opened)
        size = self._flat.file.stat().st_size
        self.files = (sources.FileFact(self._flat.file.name, size, self._digest[:16]),)

    def check_ids(self, tokenizer: Tokenizer, vocab_size: int, cache_dir: Path) -> int | None:
        """The largest id if the tokenizer does not know it, else None. Raises ValueError if the model has no row for
        it."""
        max_id, position, _ = flat.scan(self._flat, tokenizer.eos, cache_dir)
        if max_id >= vocab_size:
            raise ValueError(
                f"data.path {self._flat.file} holds the token id {max_id} at position {position}, but data.vocab_size "
                f"is {vocab_size}. Set data.vocab_size={max_id + 1} or more, or check that the file holds "
                f"{self._flat.dtype.name}."
            )
        return max_id if max_id >= tokenizer.vocab_size else None

    def part(self, tokenizer: Tokenizer, cache_dir: Path) -> Part:
        """Its tokens: nothing is copied."""
        tokens_N = self._flat.tokens()
        _, _, num_eos = flat.scan(self._flat, tokenizer.eos, cache_dir)
        num_eval = max(1, round(len(tokens_N) * self._eval_fraction))
        num_documents = max(1, num_eos) if tokenizer.eos >= 0 else 0
        found = tokens.Tokens(tokens_N[:-num_eval], tokens_N[-num_eval:], num_documents, tokens_N.nbytes, 0, 0)
        facts = (self._digest, str(self._flat.dtype), tokenizer.digest, str(self._eval_fraction))
        about = f" of tokens ({self._flat.about or self._flat.dtype.name})"
        return Part(self.label, self.weight, found, self.files, "", digest_of(*facts), about)

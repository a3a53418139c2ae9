"""Which text is held out: chosen by document, from a hash of its content, so that the same text is never on both sides
and adding a file does not reshuffle the rest by position.
"""

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data.reading import Document
from data.waiting import Progress

_CHUNK_CHARS = 2**20


@dataclass(frozen=True)
class Split:
    """Held out are the documents whose content hash is in `held_out`, and the tail of the one whose hash is `cut`."""

    held_out: frozenset[int]
    cut: int | None
    tail_fraction: float  # of the characters of that one
    num_documents: int
    num_bytes: int  # of text, in UTF-8

    def place(self, text: str) -> int:
        """Where the held-out part of a document begins: 0 for all of it, its length for none of it."""
        if self.cut is None and not self.held_out:
            return len(text)
        content_hash, _ = _hash_and_size(text)
        if content_hash == self.cut:
            return max(1, len(text) - max(1, round(len(text) * self.tail_fraction)))
        return 0 if content_hash in self.held_out else len(text)


def choose_held_out(documents: Iterator[Document], eval_fraction: float, progress: Progress | None = None) -> Split:
    """Take documents in the order of their hash until about eval_fraction of the bytes is held out.

    A document that would overshoot is passed over. Where that leaves less than 0.7 of what was asked, because
    documents are few or of very different sizes, the tail of a large one makes up for it. Copies of a text share its
    hash, hence its side.
    """
    hashes, sizes = array("Q"), array("Q")
    for document in documents:
        content_hash, size = _hash_and_size(document.text)
        hashes.append(content_hash)
        sizes.append(size)
        if progress:
            progress.add(size)
    distinct, inverse = np.unique(np.asarray(hashes, np.uint64), return_inverse=True)
    bytes_of = np.bincount(inverse, weights=np.asarray(sizes, np.float64))
    total = float(bytes_of.sum())
    target = eval_fraction * total
    taken: set[int] = set()
    size = 0.0
    for content_hash, num_bytes in zip(distinct.tolist(), bytes_of.tolist(), strict=True):
        if size + num_bytes <= 1.02 * target and len(taken) < len(distinct) - 1:  # something is left to train on
            taken.add(content_hash)
            size += num_bytes
        if size >= 0.98 * target:
            break
    cut, tail_fraction = None, 0.0
    if size < 0.7 * target:
        left = [(num_bytes, h) for h, num_bytes in zip(distinct.tolist(), bytes_of.tolist(), strict=True)]
        # The first that is large enough to be missed little, else the largest.
        left = [(num_bytes, h) for num_bytes, h in left if h not in taken]
        enough = [(num_bytes, h) for num_bytes, h in left if num_bytes >= 4 * (target - size)]
        num_bytes, cut = enough[0] if enough else max(left)
        tail_fraction = min(1.0, (target - size) / num_bytes)
    return Split(frozenset(taken), cut, tail_fraction, len(hashes), int(total))


def num_utf8_bytes(text: str, start: int, stop: int) -> int:
    """UTF-8 bytes of text[start:stop], without a second copy of a long one."""
    if text.isascii():
        return stop - start
    chunks = range(start, stop, _CHUNK_CHARS)
    return sum(len(text[first : min(first + _CHUNK_CHARS, stop)].encode("utf-8")) for first in chunks)


def _hash_and_size(text: str) -> tuple[int, int]:
    """A hash of the text's UTF-8 bytes, and how many they are."""
    digest, size = hashlib.blake2b(digest_size=8), 0
    for first in range(0, len(text), _CHUNK_CHARS):
        content = text[first : first + _CHUNK_CHARS].encode("utf-8")
        digest.update(content)
        size += len(content)
    return int.from_bytes(digest.digest(), "little"), size

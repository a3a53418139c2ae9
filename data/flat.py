"""A flat .bin of tokens, memory-mapped: 100 GB start as fast as 100 kB, after one pass that checks the ids.

Shapes: N tokens, V vocabulary.
"""

import functools
import hashlib
import json
import warnings
from collections.abc import Iterable
from io import RawIOBase
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.cache import cached
from data.tokenizer import Tokenizer

_CHUNK_TOKENS = 2**20  # small enough to stay in the processor's cache between the three passes over it


class RawTokens:
    """Stands in for the tokenizer of a .bin that nobody gave: its ids can be trained on but not read as text."""

    def __init__(self, vocab_size: int, eos: int):
        self.vocab_size = vocab_size
        self.eos = eos
        self.digest = hashlib.sha256(f"slackline raw tokens {vocab_size} {eos}".encode()).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        raise ValueError(
            "These tokens come from a .bin without its tokenizer, so no text can be encoded. Set data.tokenizer to the "
            "tokenizer.json that wrote them."
        )

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(f"<{int(i)}>" for i in ids)

    def token_bytes(self) -> np.ndarray:
        return np.ones(self.vocab_size, np.int32)  # open_tokens warns: bits per byte are bits per token


def open_tokens(
    file: Path, tokenizer: Tokenizer, vocab_size: int, cache_dir: Path
) -> tuple[np.ndarray, Tokenizer, int]:
    """(token ids [N], a tokenizer for them, EOS tokens in them).

    The whole file is scanned once, in chunks, for its largest id; the result is kept by path, size and time of change.

    Raises:
        ValueError: a size that is no whole number of tokens, or an id that does not fit in vocab_size.
    """
    dtype = np.dtype("<u4" if file.name.endswith(".u32.bin") else "<u2")
    status = file.stat()
    if status.st_size % dtype.itemsize:
        raise ValueError(
            f"data.path {file} has {status.st_size:,} bytes, which is not a whole number of {dtype.itemsize}-byte "
            f"tokens (uint{8 * dtype.itemsize}): it was cut short, or its name should "
            + ("not end in .u32.bin." if dtype.itemsize == 4 else "end in .u32.bin if it holds uint32, or .txt.")
        )
    tokens_N = np.memmap(file, dtype, mode="r")
    identity = f"{file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0{dtype}\0{tokenizer.eos}"
    key = hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()
    max_id, position, num_eos = cached(
        cache_dir / f"scan-{key[:32]}.json", _read_scan, functools.partial(_write_scan, file, dtype, tokenizer.eos)
    )
    if max_id >= vocab_size:
        raise ValueError(
            f"data.path {file} holds the token id {max_id} at position {position}, but data.vocab_size is "
            f"{vocab_size}. Set data.vocab_size={max_id + 1} or more, or check that the file holds {dtype.name}."
        )
    if max_id >= tokenizer.vocab_size:
        warnings.warn(
            f"{file} holds ids up to {max_id}, and data.tokenizer knows {tokenizer.vocab_size}: it did not write them. "
            "Training goes on; samples print ids, and bits per byte are bits per token. Set data.tokenizer to the "
            "tokenizer.json that wrote the file.",
            stacklevel=2,
        )
        tokenizer = RawTokens(vocab_size, tokenizer.eos)
    return tokens_N, tokenizer, max(1, num_eos)


def _read_scan(path: Path) -> tuple[int, int, int] | None:
    try:
        max_id, position, num_eos = json.loads(path.read_bytes())
        return int(max_id), int(position), int(num_eos)
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _write_scan(source: Path, dtype: np.dtype, eos: int, file: BinaryIO) -> None:
    # Read, not mapped: pages of a map would count as this process's memory until the whole file were in it.
    max_id, position, num_eos, start = -1, 0, 0, 0
    buffer_N = np.empty(_CHUNK_TOKENS, dtype)
    with source.open("rb", buffering=0) as tokens:
        while num_bytes := _fill(tokens, buffer_N.view(np.uint8).data):
            chunk_N = buffer_N[: num_bytes // dtype.itemsize]
            chunk_max = int(chunk_N.max())
            if chunk_max > max_id:
                max_id, position = chunk_max, start + int(chunk_N.argmax())
            num_eos += int(np.count_nonzero(chunk_N == eos))
            start += len(chunk_N)
    file.write(json.dumps([max_id, position, num_eos]).encode())


def _fill(file: RawIOBase, buffer: memoryview) -> int:
    """Read until the buffer is full or the file ends: one read may stop anywhere, even inside a token."""
    filled = 0
    while num_bytes := file.readinto(buffer[filled:]):
        filled += num_bytes
    return filled

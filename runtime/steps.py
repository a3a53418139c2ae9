"""The folder checkpoints/: which steps are in it, which of them stay, what is set aside. Process 0's work alone."""

import itertools
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

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


def rotate(directory: Path, keep: int, keep_every: int, eval_loss: Callable[[Path], float | None]) -> None:
    """Deletes all steps but the newest `keep`, the best by eval loss, and every `keep_every` (0: none). They are
    renamed first: what a kill leaves of one is no step any more."""
    steps = committed(directory)
    losses = {step: loss for step, folder in steps.items() if (loss := eval_loss(folder)) is not None}
    kept = {*list(steps)[-keep:], *sorted(losses, key=lambda step: losses[step])[:1]}
    for step, folder in steps.items():
        if step not in kept and not (keep_every and step % keep_every == 0):
            doomed = folder.rename(folder.with_name(f"{step}{DELETED}"))
            shutil.rmtree(doomed)


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

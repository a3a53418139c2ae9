"""The folder of a run: a stable interface (docs/workdir.md)."""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from runtime import config as configuration
from runtime import steps
from runtime.config import UsageError
from runtime.metrics import write_json


def default_name(config_file: str, config: Any) -> str:
    """runs/<config>-<date>-<hash>"""
    text = json.dumps(config.to_dict(), sort_keys=True) + str(time.time_ns()) + str(os.getpid())
    return f"runs/{Path(config_file).stem}-{time.strftime('%Y%m%d')}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def choose(asked: str | None, config_file: str, config: Any) -> tuple[Path, bool]:
    """The workdir: the one asked for, or a new one; and whether it holds a run. Process 0 decides both and tells the
    others: looking for themselves, they could see what it, or one of them, has just made."""
    path = Path(asked or default_name(config_file, config))
    resuming = holds_run(path)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        name = f"{int(resuming)}{path}".encode()
        padded = np.zeros(4096, np.uint8)
        padded[: len(name)] = np.frombuffer(name, np.uint8)
        name = bytes(np.asarray(multihost_utils.broadcast_one_to_all(padded))).rstrip(b"\0").decode()
        path, resuming = Path(name[1:]), name[0] == "1"
    return path, resuming


def holds_run(path: Path) -> bool:
    """Whether training has begun there. A folder without a committed step or a row is what an early kill left."""
    written = any((path / name).exists() for name in ("summary.json", "metrics.jsonl"))
    return written or bool(steps.committed(path / "checkpoints"))


class Workdir:
    """`leader`: this process writes; the others only look."""

    def __init__(self, path: Path, resuming: bool, leader: bool):
        self.path, self.resuming, self.leader = path, resuming, leader
        self.checkpoints = path / "checkpoints"

    def open(self, config: Any, resume: bool) -> list[str]:
        """Checks that the folder can be made, or that this config may go on with the run in it: the changes, one line
        each. Writes nothing that stays: the data may yet turn out to be bad."""
        if self.resuming:
            if not resume:
                raise UsageError(f"{self.path} already holds a run and --noresume was given: choose another --workdir")
            if not (self.path / "config.json").is_file():
                raise UsageError(
                    f"{self.path} holds a run without its config.json, so it cannot be told what to resume: "
                    "restore config.json from a backup, or choose another --workdir"
                )
            return configuration.check_resume(configuration.read_json(self.path), config)
        if not self.leader:
            return []
        missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".writable"
            probe.write_text("")
            probe.unlink()
            for folder in missing:
                folder.rmdir()
        except OSError as error:
            raise UsageError(
                f"--workdir={self.path} cannot be written ({error.strerror or error}): choose another folder"
            ) from error
        return []

    def summary(self) -> dict[str, Any]:
        path = self.path / "summary.json"
        try:
            return json.loads(path.read_text()) if path.is_file() else {}
        except ValueError as error:
            raise UsageError(
                f"{path} is damaged ({error}). Restore it from a backup, or start a new run with another --workdir."
            ) from error

    def begin(self, config: Any, restored_step: int | None) -> None:
        """Writes config.json and notes this start of a process in summary.json."""
        starts = [*self.summary().get("starts", []), {"time": time.time(), "restored_step": restored_step}]
        if self.leader:
            write_json(self.path / "config.json", config.to_dict())
        self.update_summary(starts=starts)

    def seconds_since_first_start(self) -> float:
        return time.time() - self.summary()["starts"][0]["time"]

    def update_summary(self, **entries: Any) -> None:
        if self.leader:
            write_json(self.path / "summary.json", {**self.summary(), **entries})

    def must_restore(self, steps: list[int]) -> bool:
        """Whether there is something to go on from. Once a step was committed, only a restore may follow: a run that
        has lost its checkpoints must not begin again at step 0. Before that, nothing would be lost by it."""
        committed = self.summary().get("committed", False)  # read in any case: a damaged summary stops the run here
        return bool(steps) or committed

    def note_commit(self) -> None:
        if not self.summary().get("committed"):
            self.update_summary(committed=True)

"""The folder of a run: a stable interface (docs/workdir.md). Process 0 reads and writes it, but for checkpoints."""

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

from runtime import agree, lock, steps
from runtime import config as configuration
from runtime.config import UsageError
from runtime.metrics import write_json


def default_name(config_file: str, config: Any) -> str:
    """runs/<config>-<date>-<hash>"""
    text = json.dumps(config.to_dict(), sort_keys=True) + str(time.time_ns()) + str(os.getpid())
    return f"runs/{Path(config_file).stem}-{time.strftime('%Y%m%d')}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def choose(name: str) -> tuple[Path, bool]:
    """The workdir, by the name that process 0 has for it, and whether it holds a run. Held from now on by process 0,
    which decides both: looking for themselves, the others could see what it, or one of them, has just made.

    Raises UsageError where another run holds it, or where the processes do not see the same folder.
    """

    def decide() -> tuple[str, bool, str]:
        path = Path(name)
        nonce = lock.hold(path)
        return str(path), holds_run(path), nonce

    path, resuming, nonce = agree.decided("workdir", decide)
    agree.shared(Path(path), nonce)
    return Path(path), resuming


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
        """Checks that this config may go on with the run in the folder: the changes, one line each. Writes nothing:
        the data may yet turn out to be bad."""

        def changes() -> list[str]:
            if not self.resuming:
                return []
            if not resume:
                raise UsageError(f"{self.path} already holds a run and --noresume was given: choose another --workdir")
            if not (self.path / "config.json").is_file():
                raise UsageError(
                    f"{self.path} holds a run without its config.json, so it cannot be told what to resume: "
                    "restore config.json from a backup, or choose another --workdir"
                )
            if steps.parameters_only(self.checkpoints):
                raise UsageError(
                    f"{self.path} holds parameters only: start a new run from it with "
                    f"--config.init.workdir={self.path} and another --workdir"
                )
            return configuration.check_resume(configuration.read_json(self.path), config)

        return agree.decided("config of the run", changes)

    def summary(self) -> dict[str, Any]:
        path = self.path / "summary.json"
        try:
            return json.loads(path.read_text()) if path.is_file() else {}
        except ValueError as error:
            raise UsageError(
                f"{path} is damaged ({error}). Restore it from a backup, or start a new run with another --workdir."
            ) from error

    def begin(self, config: Any, restored_step: int | None, objects: dict[str, Any]) -> None:
        """Writes config.json and notes this start of a process in summary.json. objects: what is to be kept of those
        that the config names by their classes; {key: {class, …}}."""
        if self.leader:
            starts = [*self.summary().get("starts", []), {"time": time.time(), "restored_step": restored_step}]
            kept = {configuration.OBJECTS: objects} if objects else {}
            write_json(self.path / "config.json", config.to_dict() | kept)
            self.update_summary(starts=starts)

    def seconds_since_first_start(self) -> float:
        return time.time() - self.summary()["starts"][0]["time"]

    def update_summary(self, **entries: Any) -> None:
        if self.leader:
            write_json(self.path / "summary.json", {**self.summary(), **entries})

    def must_restore(self, steps: list[int]) -> bool:
        """Whether there is something to go on from. Once a step was committed, only a restore may follow: a run that
        has lost its checkpoints must not begin again at step 0. Before that, nothing would be lost by it."""
        # read in any case: a damaged summary stops the run here
        committed = agree.decided("committed", lambda: self.summary().get("committed", False))
        return bool(steps) or committed

    def note_commit(self) -> None:
        if self.leader and not self.summary().get("committed"):
            self.update_summary(committed=True)

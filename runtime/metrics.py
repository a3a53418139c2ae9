"""metrics.jsonl: one JSON object per step, the source of truth of a run and an interface other programs read.

float32 values are written with the fewest digits that read back to the same float32. JSON has no NaN: a value that is
not finite is written as null, and the row's key "nonfinite" lists where: "loss", or "wire_bytes.replica" in a dict.
TensorBoard and Weights & Biases get copies of the rows.
"""

import importlib.util
import json
import math
import os
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Writer(Protocol):
    """Gets a copy of every row."""

    def write(self, row: dict) -> None: ...
    def close(self) -> None: ...


class MetricsLog:
    """Appends rows to `workdir/metrics.jsonl`. Call `rewind` once before the first `write`.

    writers: get a copy of each row. One that fails is told of through `warn` and stands in `failed` from then on.
    """

    def __init__(self, workdir: Path, writers: Sequence[Writer] = (), warn: Callable[[str], None] = print):
        self.path = Path(workdir) / "metrics.jsonl"
        self.failed: list[str] = []
        self._writers, self._warn = list(writers), warn
        self._file = None

    def rewind(self, restored_step: int | None) -> int:
        """Makes the file end where the restored checkpoint ends, so that no step appears twice after a restart.

        Removes rows whose step is beyond `restored_step`, the torn last line of a killed run, and damaged lines.
        Replaces the file atomically: a crash leaves the old file or the new one. Returns how many damaged lines other
        than the torn last one were dropped. `None` means a fresh run: the file must be missing or empty.
        """
        self._close_file()
        content = self.path.read_bytes() if self.path.exists() else b""
        if restored_step is None:
            if content:
                raise FileExistsError(
                    f"{self.path} already holds the metrics of an earlier run, but this run starts from step 0. "
                    "Choose another --workdir, or delete this one if its run is no longer needed."
                )
            return 0
        rows, damaged = _parse(content)
        kept = [line for line, row in rows if not _is_after(row, restored_step)]
        replace_file(self.path, b"".join(line + b"\n" for line in kept))
        return len(damaged)

    def write(self, row: dict) -> None:
        """Appends one row and hands it to the operating system before returning."""
        line = (json.dumps(_standard_json(row), allow_nan=False) + "\n").encode()
        try:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                # Unbuffered: after a full disk a buffer would keep the line and fail a second time in close().
                self._file = self.path.open("ab", buffering=0)
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise _write_error(error, self.path) from error
        self._to_others(lambda writer: writer.write(row))

    def close(self) -> None:
        self._close_file()
        self._to_others(lambda writer: writer.close())

    def _to_others(self, tell: Callable[[Writer], None]) -> None:
        """A writer that fails is left out from then on: a service that is away costs its own rows, not the run."""
        for writer in self._writers:
            try:
                tell(writer)
            except Exception as error:  # of whatever type its library raises
                name = type(writer).__name__
                self._writers = [other for other in self._writers if other is not writer]
                self.failed.append(name)
                self._warn(f"{name} failed and gets no more rows ({type(error).__name__}: {error})")

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def read(path: Path) -> list[dict]:
    """Reads all rows of a metrics.jsonl; a torn last line (the run is alive, or was killed) is left out.

    Raises ValueError, with the line number, where a line before the last is damaged.
    """
    rows, damaged = read_sound(path)
    if damaged:
        raise ValueError(
            f"{path}: line {damaged[0]} is not a JSON object. Delete it, or resume the run, which drops damaged lines."
        )
    return rows


def read_sound(path: Path) -> tuple[list[dict], list[int]]:
    """The rows of a metrics.jsonl that are whole, and the numbers of the lines that are damaged, as in `read`."""
    rows, damaged = _parse(Path(path).read_bytes())
    return [row for _, row in rows], damaged


def write_json(path: Path, obj: dict) -> None:
    """Writes a small JSON file (config, summary) atomically; numpy scalars are welcome, keys keep their order."""
    replace_file(Path(path), (json.dumps(_standard_json(obj), indent=2, allow_nan=False) + "\n").encode())


class TensorBoardWriter:
    """Writes the numbers of each row to `workdir/tensorboard`; a nested number is named like `wire_bytes/replica`."""

    def __init__(self, workdir: Path):
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports]

        self._writer = SummaryWriter(str(Path(workdir) / "tensorboard"))

    def write(self, row: dict) -> None:
        for name, value in _numbers(row, "/"):
            if name != "step" and math.isfinite(value):  # tensorboardX prints a complaint for each NaN
                self._writer.add_scalar(name, float(value), int(row["step"]))

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """Logs each row to a Weights & Biases project; a restarted run continues the same W&B run."""

    def __init__(self, workdir: Path, project: str):
        import wandb  # pyright: ignore[reportMissingImports]

        workdir = Path(workdir)
        id_file = workdir / "wandb_id"
        if not id_file.exists():
            replace_file(id_file, uuid.uuid4().hex.encode())
        run_id = id_file.read_text().strip()
        self._run = wandb.init(project=project, name=workdir.name, id=run_id, resume="allow", dir=str(workdir))

    def write(self, row: dict) -> None:
        self._run.log({name: float(value) for name, value in _numbers(row, "/")}, step=int(row["step"]))

    def close(self) -> None:
        self._run.finish()


def optional_writers(workdir: Path, tensorboard: bool | None, wandb: str) -> list[Writer]:
    """Builds the writers asked for; on process 0 only.

    tensorboard: True, False, or None for "if tensorboardX is installed". wandb: a project name, "" for off.
    """
    writers: list[Writer] = []
    if tensorboard and not _installed("tensorboardX"):
        raise ModuleNotFoundError("TensorBoard output was asked for: run `pip install tensorboardX`, or turn it off.")
    if wandb and not _installed("wandb"):
        raise ModuleNotFoundError(f"W&B project {wandb!r} was asked for: run `pip install wandb`, or leave it empty.")
    if tensorboard is not False and _installed("tensorboardX"):
        writers.append(TensorBoardWriter(workdir))
    if wandb:
        writers.append(WandbWriter(workdir, wandb))
    return writers


def _installed(module: str) -> bool:
    # No origin means a bare folder of that name: wandb leaves a folder `wandb/` wherever it runs.
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None


def _numbers(row: dict, separator: str, prefix: str = ""):
    """Yields (name, value) for every number in `row`, inside dicts as well."""
    for key, value in row.items():
        if isinstance(value, dict):
            yield from _numbers(value, separator, f"{prefix}{key}{separator}")
        elif _is_scalar_array(value) or (isinstance(value, (int, float)) and not isinstance(value, bool)):
            yield f"{prefix}{key}", value


def _standard_json(row: dict) -> dict:
    nonfinite: list[str] = []
    plain = _plain(row, "", nonfinite)
    return {**plain, "nonfinite": nonfinite} if nonfinite else plain


def _plain(value: Any, name: str, nonfinite: list[str]) -> Any:
    """Turns `value` into what json writes, noting in `nonfinite` the names of the values that JSON cannot hold."""
    if isinstance(value, dict):
        prefix = f"{name}." if name else ""
        return {str(key): _plain(item, f"{prefix}{key}", nonfinite) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{name}.{i}", nonfinite) for i, item in enumerate(value)]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if _is_scalar_array(value):
        value = _python_scalar(value)
    if not isinstance(value, (bool, int, float)):
        raise TypeError(f"{name!r} is a {type(value).__name__}, which JSON cannot hold: pass a number, string or list.")
    if not math.isfinite(value):
        nonfinite.append(name)
        return None
    return value


def _is_scalar_array(value: Any) -> bool:
    return getattr(value, "shape", None) == () and hasattr(value, "dtype")  # of numpy or jax


def _python_scalar(value: Any) -> bool | int | float:
    value = np.asarray(value)[()]
    if isinstance(value, (np.bool_, np.integer, np.float64)):
        return value.item()
    value = np.float32(value)  # also float16 and bfloat16, whose values float32 holds exactly
    short = float(str(value))  # json writes a double with its fewest digits, here those of the float32
    return short if np.float32(short) == value else float(value)


def _parse(content: bytes) -> tuple[list[tuple[bytes, dict]], list[int]]:
    """Returns (line, row) of the sound lines and the numbers of damaged ones; a torn last line is in neither."""
    *whole, last = content.split(b"\n")  # after a clean end `last` is empty
    rows, damaged = [], []
    for line_number, line in enumerate(whole, start=1):
        if (row := _row(line)) is not None:
            rows.append((line, row))
        else:
            damaged.append(line_number)
    if (row := _row(last)) is not None:  # killed between the closing brace and the newline: the row is whole
        rows.append((last, row))
    return rows, damaged


def _row(line: bytes) -> dict | None:
    try:
        row = json.loads(line.decode())
    except ValueError:  # also what undecodable bytes raise
        return None
    is_sound = isinstance(row, dict) and isinstance(row.get("step", 0), (int, float))
    return row if is_sound else None


def _is_after(row: dict, step: int) -> bool:
    return row.get("step", step) > step


def replace_file(path: Path, content: bytes) -> None:
    """Writes a new file beside `path`, forces it to disk and renames it over: readers see the old or the new whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)  # the rename itself is only on disk after this
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _write_error(error, path) from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_error(error: OSError, path: Path) -> OSError:
    # OSError(errno, ...) picks the right subclass, so that `except PermissionError` keeps working.
    return OSError(error.errno, f"cannot write ({error.strerror}); check free space, quota and permissions", str(path))

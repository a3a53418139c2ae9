"""What the libraries below print by themselves (gloo's handshakes, C++ stacks of a dead peer) goes to a file.

They write to the process's own streams 1 and 2. From `begin` on those lead into a file, while Python prints where it
printed before; `keep` moves the file into the workdir, as library.log; `end` puts everything back. So does what Orbax
leaves to asyncio's logger: the failures of a damaged checkpoint's arrays, with their stacks, beside our sentence on it.
"""

import logging
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

STREAMS = {1: "stdout", 2: "stderr"}
SHOWN = 2000  # bytes of a log that has no workdir to be kept in


class _ToFile(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        note(self.format(record))


_tasks, _to_file = logging.getLogger("asyncio"), _ToFile()
_saved: dict[int, int] = {}  # {descriptor: a copy of what it was}
_python: dict[str, Any] = {}  # {name in sys: the stream that was there}
_file: Any = None
_path: Path | None = None


def begin() -> None:
    global _file
    if _saved:
        return
    _file = tempfile.TemporaryFile()  # noqa: SIM115  open until `end`
    _tasks.addHandler(_to_file)
    _tasks.propagate = False
    for descriptor, name in STREAMS.items():
        stream = getattr(sys, name)
        stream.flush()
        _saved[descriptor] = os.dup(descriptor)
        if _descriptor(stream) == descriptor:  # not in a notebook, nor where a test has replaced it
            _python[name] = stream
            copy = open(os.dup(descriptor), "w", 1, stream.encoding, stream.errors)  # noqa: SIM115  as above
            setattr(sys, name, copy)
        os.dup2(_file.fileno(), descriptor)


def keep(workdir: Path, process: int) -> None:
    """From now on in library.log of the workdir (library.N.log of another process than 0), after what it holds."""
    global _file, _path
    if not _saved:
        return
    _path = workdir / ("library.log" if process == 0 else f"library.{process}.log")
    workdir.mkdir(parents=True, exist_ok=True)
    said = _said()
    _file.close()
    _file = _path.open("ab+", buffering=0)
    _file.write(said)
    for descriptor in _saved:
        os.dup2(_file.fileno(), descriptor)


def end() -> None:
    global _file, _path
    _tasks.removeHandler(_to_file)
    _tasks.propagate = True
    for name, stream in _python.items():
        getattr(sys, name).close()
        setattr(sys, name, stream)
    for descriptor, copy in _saved.items():
        os.dup2(copy, descriptor)
        os.close(copy)
    if _file is not None:
        _file.close()
    _saved.clear()
    _python.clear()
    _file = _path = None


def hint() -> str:
    """Where to read more, for the end of a sentence about a failure; empty if there is nothing to read."""
    if _file is None or not (said := _said()):
        return ""
    if _path is not None:
        return f"\nMore is in {_path}"
    return f"\nThe libraries below said:\n{said[-SHOWN:].decode(errors='replace').strip()}"


def note(text: str) -> None:
    """Adds to the log, where there is one."""
    if _file is not None:
        os.write(_file.fileno(), f"{text}\n".encode(errors="replace"))


def _said() -> bytes:
    return os.pread(_file.fileno(), os.fstat(_file.fileno()).st_size, 0)


def _descriptor(stream: Any) -> int | None:
    try:
        return stream.fileno()
    except (AttributeError, OSError, ValueError):
        return None

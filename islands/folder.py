"""A log in a folder, of one machine or of several that share it. It needs no server, no account and no package."""

import contextlib
import errno
import os
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from islands.store import Away, Routine, StoreError, call

FOLDERS = "records", "payloads", "heartbeats"
OLD = 3600.0  # seconds after which what a writer has left is taken to be left


class Disk:
    """What a folder asks of the operating system: one method for each call between which a process may die."""

    def make(self, folder: str) -> None:
        """With those above it, synced."""
        path = Path(folder).absolute()
        missing = [above for above in (path, *path.parents) if not above.exists()]
        path.mkdir(parents=True, exist_ok=True)
        for above in missing:
            self.sync(str(above.parent))

    def write(self, path: str, data: bytes) -> None:
        with open(path, "xb") as file:
            file.write(data)

    def sync(self, path: str) -> None:
        """Of a file its bytes; of a folder its names."""
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)

    def link(self, source: str, target: str) -> None:
        os.link(source, target)

    def replace(self, source: str, target: str) -> None:
        os.replace(source, target)

    def remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)

    def read(self, path: str, first: int, count: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(first)
            return file.read(min(count, os.fstat(file.fileno()).st_size))  # else it makes room for what is asked for

    def names(self, folder: str) -> list[str]:
        return os.listdir(folder)

    def modified(self, path: str) -> float:
        return os.stat(path).st_mtime

    def now(self) -> float:
        return time.time()


class Folder:
    """An object is written under another name, synced, and then linked to its own: it is there as a whole, or not.
    Its name is synced before `create` returns, and by every reader before it makes use of it: what anybody has seen
    does not go with a power cut.
    """

    def __init__(self, root: Path, disk: Any = None):
        self.root, self._disk = root, disk or Disk()
        self._writer = f".{socket.gethostname()}-{os.getpid()}"

    def _path(self, key: str) -> str:
        return f"{self.root}/{key}"

    def _temporary(self, key: str) -> str:
        """Where nobody looks, in the same folder: a hard link does not lead out of a file system."""
        return f"{os.path.dirname(self._path(key))}/{self._writer}-{secrets.token_hex(8)}"

    def prepare(self) -> Routine[None]:
        """Makes the folders of a new log. Nothing else does: a disk that is not mounted is no new log."""
        with self._said(str(self.root)):
            for folder in FOLDERS:
                yield call("make", folder, self._disk.make, self._path(folder))

    def sweep(self) -> Routine[Sequence[str]]:
        """Removes what writers have left that are not there any more, or have been silent for an hour."""
        swept = []
        for folder in FOLDERS:
            with self._said(self._path(folder)):
                for name in (yield call("list", folder, self._disk.names, self._path(folder))):
                    with contextlib.suppress(FileNotFoundError):  # its writer has finished
                        path = f"{self._path(folder)}/{name}"
                        if name.startswith(".") and (_is_of_the_dead(name) or self._is_old(path)):
                            yield call("remove", folder, self._disk.remove, path)
                            swept.append(f"{folder}/{name}")
        return swept

    def create(self, key: str, data: bytes) -> Routine[bool]:
        path, created = self._path(key), True
        temporary = self._temporary(key)
        with self._said(path):
            try:
                yield call("write", key, self._disk.write, temporary, data)
                yield call("sync", key, self._disk.sync, temporary)
                yield call("link", key, self._link, temporary, path)
            except FileExistsError:
                created = False
            except Exception:
                with contextlib.suppress(OSError):
                    yield call("remove", key, self._disk.remove, temporary)
                raise
            yield call("remove", key, self._disk.remove, temporary)
            yield call("sync names", key, self._disk.sync, os.path.dirname(path))
        return created

    def _link(self, source: str, target: str) -> None:
        try:
            self._disk.link(source, target)
        except FileNotFoundError as error:
            raise Away(f"{target}: somebody has removed what was being written") from error
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS):
                raise
            raise StoreError(
                f"the file system of {self.root} has no hard links (exFAT and SMB have none), and without them two "
                "writers may both win: put the log on another one, or into a bucket"
            ) from error

    def get(self, key: str, most: int) -> Routine[bytes | None]:
        return (yield from self.get_range(key, 0, most))

    def get_range(self, key: str, first: int, count: int) -> Routine[bytes | None]:
        path = self._path(key)
        with self._said(path):
            try:
                data = yield call("read", key, self._disk.read, path, first, count)
            except FileNotFoundError:
                return None
            yield call("sync names", key, self._disk.sync, os.path.dirname(path))
        return data

    def list(self, prefix: str, after: str = "") -> Routine[list[str]]:
        with self._said(self._path(prefix)):
            names = yield call("list", prefix, self._disk.names, self._path(prefix))
        keys = (f"{prefix}/{name}" for name in names if not name.startswith("."))
        return sorted(key for key in keys if key > after)

    def put(self, key: str, data: bytes) -> Routine[None]:
        path = self._path(key)
        temporary = self._temporary(key)
        with self._said(path):
            yield call("write", key, self._disk.write, temporary, data)
            yield call("replace", key, self._disk.replace, temporary, path)

    def delete(self, key: str) -> Routine[None]:
        with self._said(self._path(key)):
            yield call("remove", key, self._disk.remove, self._path(key))

    def last_modified(self, key: str) -> Routine[float | None]:
        with self._said(self._path(key)):
            try:
                return (yield call("modified", key, self._disk.modified, self._path(key)))
            except FileNotFoundError:
                return None

    def _is_old(self, path: str) -> bool:
        return self._disk.now() - self._disk.modified(path) > OLD

    @contextlib.contextmanager
    def _said(self, path: str) -> Iterator[None]:
        """What the operating system reports, in a sentence."""
        try:
            yield
        except OSError as error:
            said = f"{path}: {error.strerror or error}"
            if isinstance(error, FileNotFoundError | NotADirectoryError):
                raise StoreError(f"{said}: is {self.root} a log, and its disk there?") from error
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise StoreError(f"{said}: whoever takes part must be allowed to write there") from error
            raise Away(said) from error


def _is_of_the_dead(name: str) -> bool:
    """Whether the writer of .HOST-PID-TOKEN was a process of this machine that is not there any more."""
    host, pid, _ = name[1:].rsplit("-", 2) if name.count("-") >= 2 else ("", "", "")
    if host != socket.gethostname() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # another user's
        pass
    return False

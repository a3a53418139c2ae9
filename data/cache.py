"""Files kept between runs: a private folder, one writer at a time, and no half-written file ever seen.

Every process of a run starts at the same moment and wants the same tokens. The first one to take the lock writes them;
the others wait, then read what it wrote. A reader never needs the lock: files appear by rename, complete or not at all.
"""

import atexit
import contextlib
import errno
import fcntl
import functools
import hashlib
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

T = TypeVar("T")

WHOLE_FILE_BYTES = 64 * 2**20  # up to here a file is hashed whole; beyond, only its sampled blocks are
SAMPLE_BLOCKS, SAMPLE_BLOCK_BYTES = 16, 16 * 2**10


def cache_directory() -> Path:
    """The folder for tokens and trained tokenizers, created with mode 0700.

    $SLACKLINE_CACHE, else $XDG_CACHE_HOME/slackline, else ~/.cache/slackline. When neither the cache home nor the home
    folder can be written, a private temporary folder, with a warning: it works, but nothing is kept for the next run.

    Raises:
        PermissionError: the folder belongs to, or may be written by, somebody else (who could swap your training
            data), or $SLACKLINE_CACHE was named explicitly and cannot be written.
    """
    named = os.environ.get("SLACKLINE_CACHE")
    if named:
        folder = Path(named)
    elif os.environ.get("XDG_CACHE_HOME"):
        folder = Path(os.environ["XDG_CACHE_HOME"]) / "slackline"
    else:
        folder = Path("~") / ".cache" / "slackline"
    try:
        folder = folder.expanduser()  # RuntimeError where there is no home folder at all
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
    except (OSError, RuntimeError) as error:
        if named:
            raise PermissionError(
                f"$SLACKLINE_CACHE is {folder}, which cannot be used as a folder to write in ({error}). "
                "Set it to a folder of yours, or unset it to use ~/.cache/slackline."
            ) from error
        return _temporary_directory(str(folder))
    _refuse_shared(folder)
    return folder


def _refuse_shared(folder: Path) -> None:
    status = folder.stat()
    if status.st_uid not in (os.geteuid(), 0):
        raise PermissionError(
            f"The cache folder {folder} belongs to another user (uid {status.st_uid}), who could swap your training "
            "data. Set SLACKLINE_CACHE to a folder of your own."
        )
    if status.st_mode & 0o022:
        raise PermissionError(
            f"The cache folder {folder} may be written by other users (mode {status.st_mode & 0o777:o}), who could "
            f"swap your training data. Run `chmod 700 {folder}` or set SLACKLINE_CACHE to another folder."
        )


@functools.cache
def _temporary_directory(wanted: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="slackline-"))  # mkdtemp makes it 0700
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    warnings.warn(
        f"Cannot write the cache folder {wanted}: using {folder} for this run only, so the data is prepared again "
        "every time. Set SLACKLINE_CACHE to a folder that lasts.",
        stacklevel=3,
    )
    return folder


def cached(path: Path, read: Callable[[Path], T | None], write: Callable[[BinaryIO], None]) -> T:
    """What `read` finds in `path`, written first when it is missing or damaged.

    Args:
        path: the file.
        read: returns its value, or None when the file is missing, short or damaged.
        write: fills an open temporary file, which is then synced to disk and renamed to `path`.
    """
    value = read(path)
    if value is not None:
        return value
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _locked(path.with_name(path.name + ".lock")) as alone:
        value = read(path)  # another process may have written it while this one waited for the lock
        if value is None:
            for left in path.parent.glob(f"{path.name}.*.tmp") if alone else ():
                left.unlink()  # half of the file, by a process that was killed: it may be as large as the whole
            write_atomically(path, write)
            value = read(path)
    if value is None:
        raise OSError(f"{path} was just written but does not read back: the disk under the cache folder is at fault.")
    return value


@contextlib.contextmanager
def _locked(lock: Path) -> Iterator[bool]:
    """Inside, no other process holds this lock; gives whether that is sure."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    alone = True
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                logging.getLogger(__name__).info("waiting for the process that is writing %s", lock.stem)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            elif error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            else:  # some network disks have no locks: then two may do the same work, and rename keeps it safe
                alone = False
        yield alone
    finally:
        os.close(descriptor)  # closing lets go of the lock, also when the process is killed


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    descriptor, name = tempfile.mkstemp(prefix=path.name + ".", suffix=".tmp", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            error.add_note(f"while writing {path}: set SLACKLINE_CACHE to a folder on a disk with more room.")
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself must survive a power cut
    finally:
        os.close(folder)


def file_digest(file: BinaryIO, offset: int = 0, whole_bytes: int = WHOLE_FILE_BYTES) -> str:
    """sha256 of a file from `offset`: of all of it up to `whole_bytes`, else of its length and 16 blocks of it.

    The sampled form exists so that a file of any size starts at once. It cannot see a change of equal length between
    the blocks; callers that need more add the modification time.
    """
    size = file.seek(0, os.SEEK_END) - offset
    digest = hashlib.sha256(f"{size}:".encode())
    if size <= whole_bytes:
        file.seek(offset)
        while block := file.read(2**20):
            digest.update(block)
    else:
        for number in range(SAMPLE_BLOCKS):
            file.seek(offset + (size - SAMPLE_BLOCK_BYTES) * number // (SAMPLE_BLOCKS - 1))
            digest.update(file.read(SAMPLE_BLOCK_BYTES))
    return digest.hexdigest()

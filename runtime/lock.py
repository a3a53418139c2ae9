"""One writer per folder. The file `lock` in it says who, for the message; that it is held is known to the file system
(flock), which forgets it when the process ends, however it ends.

Where a file system has no flock, the holder changes the file every few seconds. A lock of a process of this machine
that is no longer there is taken over at once, that of another machine when it has been silent for a minute.
"""

import contextlib
import fcntl
import json
import os
import secrets
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from runtime.config import UsageError

BEAT, SILENCE = 10.0, 60.0  # seconds
NAME = "lock"

_held: list["Lock"] = []


def hold(folder: Path, flock: bool = True, beat: float = BEAT, silence: float = SILENCE) -> str:
    """Makes the folder and holds its lock until `release`, or the end of this process; the nonce in its file.

    Raises UsageError where another process holds it, or the folder cannot be written.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    lock = Lock(folder / NAME, made, silence)
    _held.append(lock)  # also when it fails: the folders that it made go again
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not flock or not lock.by_flock():
            lock.by_heartbeat(beat)
    except OSError as error:
        raise UsageError(
            f"--workdir={folder} cannot be written ({error.strerror or error}): choose another folder"
        ) from error
    return lock.nonce


def release() -> None:
    """Lets go of all that this process holds. Folders that were made for it and stayed empty go, too."""
    while _held:
        _held.pop().release()


class Lock:
    def __init__(self, path: Path, made: list[Path], silence: float):
        self.path, self.nonce = path, secrets.token_hex(16)
        self._made, self._silence = made, silence
        self._file: int | None = None
        self._released = threading.Event()
        self._mine = False
        self._since = time.strftime("%Y-%m-%d %H:%M:%S")

    def by_flock(self) -> bool:
        """False where the file system has none."""
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                raise self._is_held(self._read()) from None
            except OSError:  # ENOLCK, ENOSYS, EOPNOTSUPP, EINVAL: as file systems put it
                os.close(file)
                return False
            if self._is_linked(file):
                break
            os.close(file)  # its holder has just deleted it
        self._file, self._mine = file, True
        os.ftruncate(file, 0)
        os.pwrite(file, self._text(), 0)
        return True

    def _is_linked(self, file: int) -> bool:
        try:
            return os.path.samestat(os.fstat(file), os.stat(self.path))
        except FileNotFoundError:
            return False

    def by_heartbeat(self, beat: float) -> None:
        while not self._create():
            before = self._read()
            if not self._is_dead(before) and not self._falls_silent(before):
                raise self._is_held(before)
            self._move_away(before)
        self._mine = True
        threading.Thread(target=self._beat, args=(beat,), name="lock", daemon=True).start()

    def _create(self) -> bool:
        try:
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        os.write(file, self._text())
        os.close(file)
        return True

    def _is_dead(self, holder: dict[str, Any]) -> bool:
        """Whether it was a process of this machine that is no longer there; nor is what has its number now the same."""
        if holder.get("host") != socket.gethostname():
            return False
        try:
            os.kill(holder["pid"], 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return holder.get("begun") != _begun(holder["pid"])

    def _falls_silent(self, before: dict[str, Any]) -> bool:
        """Watches the lock of another machine, by this machine's clock: False as soon as it changes."""
        if before.get("host") == socket.gethostname():
            return False
        who = before.get("host", "unknown")
        print(f"{self.path} is held by {who}: watching it for {self._silence:g} s", file=sys.stderr, flush=True)
        until = time.monotonic() + self._silence
        while time.monotonic() < until:
            time.sleep(min(1.0, self._silence / 10))
            if self._read() != before:
                return False
        print(f"{who} was silent for {self._silence:g} s: taking its lock over", file=sys.stderr, flush=True)
        return True

    def _move_away(self, dead: dict[str, Any]) -> None:
        """Of several that see it dead one moves it; what is moved by mistake, a newer one, is put back."""
        aside = self.path.with_name(f".{NAME}-{self.nonce}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        if _parse(aside) != dead:
            with contextlib.suppress(FileExistsError):
                os.link(aside, self.path)
        os.unlink(aside)

    def _beat(self, beat: float) -> None:
        count = 0
        while not self._released.wait(beat):
            count += 1
            if self._read().get("nonce") != self.nonce:
                print(f"error: {self.path} was taken over by another process, so this one ends", file=sys.stderr)
                sys.stderr.flush()
                os._exit(1)
            fresh = self.path.with_name(f".{NAME}-{self.nonce}")
            fresh.write_bytes(self._text(count))
            os.replace(fresh, self.path)

    def _text(self, beat: int = 0) -> bytes:
        who = {"host": socket.gethostname(), "pid": os.getpid(), "begun": _begun(os.getpid())}
        return json.dumps(who | {"since": self._since, "beat": beat, "nonce": self.nonce}).encode()

    def _read(self) -> dict[str, Any]:
        return _parse(self.path)

    def _is_held(self, holder: dict[str, Any]) -> UsageError:
        who = "another process"
        if "pid" in holder:
            who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
        return UsageError(
            f"workdir: {self.path.parent} is in use by {who}. Two writers would damage the run: wait for it, stop it, "
            "or choose another --workdir."
        )

    def release(self) -> None:
        self._released.set()
        if self._mine and self._read().get("nonce") == self.nonce:
            self.path.unlink(missing_ok=True)
        if self._file is not None:
            os.close(self._file)
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:  # something is in it
                break


def _parse(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
        return found if isinstance(found, dict) else {}
    except (OSError, ValueError):  # gone, or just being written
        return {}


def _begun(pid: int) -> str:
    """When a process of this machine began, in the kernel's ticks; empty where that is not known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""

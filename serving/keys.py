"""API keys of a server: a file of their hashes, read anew when it changes.

python -m serving.keys add keys.jsonl --name=alice --per_minute=60 --models=mine
python -m serving.keys remove keys.jsonl --name=alice

`add` shows the key, once: the file holds its SHA-256 only. A server that is given the file by --keys takes a key from
the next request on, and refuses one that was removed.
"""

import hashlib
import hmac
import json
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from runtime import exits, usage
from runtime.config import UsageError, bad_input

PREFIX = "sl-"  # so that a key is known for one where it should not be, as in a log
MOST_BYTES = 2**20  # of the file


@dataclass(frozen=True)
class Key:
    """name: whose it is. sha256: hex, of the key. per_minute: requests; 0: any number. models: that it may ask; none:
    all."""

    name: str
    sha256: str
    per_minute: int = 0
    models: tuple[str, ...] = ()


class UnreadableKeys(ValueError):
    """The file of keys is not there, or damaged: nobody is let in."""


class Keys:
    """Those of a file. clock: seconds, for rates. Raises UnreadableKeys where that is none.

    A key has 256 random bits: no list of likely ones can be tried, so that a fast hash is enough.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic):
        self.path, self._clock = path, clock
        self._seen: tuple[int, int, int] | None = None
        self._keys: tuple[Key, ...] = ()
        self._spent: dict[str, tuple[float, float]] = {}  # {hash: (requests left, when)}
        self._read_if_changed()

    def find(self, given: str) -> Key | None:
        """Whose key this is. The time that this takes says nothing about how near it is. Raises UnreadableKeys."""
        self._read_if_changed()
        digest, found = digest_of(given), None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found

    def wait(self, key: Key) -> float:
        """Seconds until this key may ask again; 0: now, which is counted. After a pause it may ask a minute's worth."""
        if not key.per_minute:
            return 0.0
        now = self._clock()
        left, when = self._spent.get(key.sha256, (float(key.per_minute), now))
        left = min(key.per_minute, left + (now - when) * key.per_minute / 60)
        allowed = left >= 1
        self._spent[key.sha256] = (left - allowed, now)
        return 0.0 if allowed else (1 - left) * 60 / key.per_minute

    def _read_if_changed(self) -> None:
        try:
            stat = self.path.stat()
            seen = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
            if seen != self._seen:
                self._keys, self._seen = (), None  # while it cannot be read
                self._keys, self._seen = read(self.path), seen
        except (OSError, ValueError) as error:
            raise UnreadableKeys(str(error)) from error


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def read(path: Path) -> tuple[Key, ...]:
    """Raises ValueError naming the line that is no key."""
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} has more than {MOST_BYTES:,} bytes: it is no file of keys")
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            fields = json.loads(line)
            key = Key(**fields | {"models": tuple(fields.get("models", ()))})
            if len(bytes.fromhex(key.sha256)) != 32 or type(key.per_minute) is not int or key.per_minute < 0:
                raise ValueError
        except (ValueError, TypeError, AttributeError):
            raise ValueError(f"{path}, line {number}: this is no key of `python -m serving.keys add`") from None
        found.append(key)
    return tuple(found)


def write(path: Path, keys: Sequence[Key]) -> None:
    """As a whole, readable by its owner alone: a server may be reading it."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}-", delete=False) as file:
        file.write("".join(json.dumps(asdict(key)) + "\n" for key in keys))
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def add(path: Path, name: str, per_minute: int, models: Sequence[str]) -> str:
    """The new key, which is kept nowhere. Raises UsageError for a name that has one."""
    kept = read(path) if path.exists() else ()
    if name in {key.name for key in kept}:
        raise UsageError(f"--name={name} has a key in {path}: remove that first, or choose another name")
    key = PREFIX + secrets.token_urlsafe(32)
    write(path, [*kept, Key(name, digest_of(key), per_minute, tuple(models))])
    return key


def remove(path: Path, name: str) -> None:
    kept = read(path)
    if name not in {key.name for key in kept}:
        names = ", ".join(key.name for key in kept) or "none"
        raise UsageError(f"--name={name} has no key in {path}; those that have one: {names}")
    write(path, [key for key in kept if key.name != name])


def main(argv: Sequence[str]) -> int:
    parser = usage.parser(__doc__, "python -m serving.keys")
    parser.add_argument("what", choices=["add", "remove"], metavar="add|remove", help="what is done to the file")
    parser.add_argument("file", type=Path, help="of keys; made when it is not there")
    parser.add_argument("--name", required=True, help="whose key it is")
    parser.add_argument("--per_minute", type=int, default=0, metavar="N", help="requests a minute; 0: any number")
    parser.add_argument("--models", default="", metavar="NAME,...", help="that it may ask; default: all")
    args = parser.parse_args(argv)
    if args.per_minute < 0:
        raise UsageError(f"--per_minute={args.per_minute}: expected 0 or more")
    with bad_input():
        if args.what == "add":
            print(add(args.file, args.name, args.per_minute, [name for name in args.models.split(",") if name]))
        else:
            remove(args.file, args.name)
    return 0


if __name__ == "__main__":
    sys.exit(exits.guarded(lambda: main(sys.argv[1:]), "nothing was changed"))

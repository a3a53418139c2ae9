"""Encryption of payloads with a key that all of a run's members have, and the store has not.

Whoever reads the store still sees which of two payloads are equal, how long they are, and all that records say: who has
pushed what when. A payload is known by the digest of its stored bytes, so all that this file gives is sealed bytes:

    salt (32 bytes) | chunk 0, tag (16 bytes) | chunk 1, tag | …

Chunks have CHUNK bytes, the last one the rest: so a range is read without what lies around it. Each is AES-256-GCM
under a key of this payload alone, which the run's key and the salt give; its nonce is its number, and whether it is the
last, so that none can be cut off or moved (as in STREAM, Hoang et al. 2015); the public key of the run's owner is
authenticated with it. The salt is a keyed hash of what is sealed: the same round sealed again, by a process that goes
on after a crash, is the same bytes, and a push that has landed already is recognised. No two payloads share a key,
whatever chance does.
"""

import hashlib
import hmac
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from islands import trust
from islands.decode import PayloadError
from islands.payload import Blob, Fetch
from islands.record import Run, digest
from runtime.config import UsageError

try:
    from cryptography.exceptions import InvalidTag
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
except ImportError as error:
    raise ImportError("payloads are encrypted with cryptography: `pip install -r requirements-islands.txt`") from error

FACT = "payload_key"  # in run.json's facts: the name of the key; a run without it is not encrypted
CHUNK = 1 << 20  # bytes
SALT, TAG, KEY = 32, 16, 32  # bytes


class RunKey:
    """32 bytes that stay with the members, and in their files. name: says which key it is, and nothing about it."""

    def __init__(self, secret: bytes):
        self._secret = secret
        self.name = self.part("name").hex()

    @classmethod
    def new(cls) -> "RunKey":
        return cls(secrets.token_bytes(KEY))

    @classmethod
    def read(cls, path: Path) -> "RunKey":
        """Raises UsageError where there is none, or others may read it."""
        text = trust.read_private(path, "the key of a run's payloads")
        try:
            secret = bytes.fromhex(text.decode().strip())
        except ValueError:  # and nothing of what is there is said
            secret = b""
        if len(secret) != KEY:
            raise UsageError(f"{path} is no key of payloads: these are {2 * KEY} hexadecimal digits")
        return cls(secret)

    def write(self, path: Path) -> None:
        """Into a new file that nobody else can read."""
        trust.write_private(path, self._secret.hex().encode() + b"\n")

    def part(self, purpose: str) -> bytes:
        return _mac(self._secret, b"slackline payloads, " + purpose.encode())


@dataclass(frozen=True)
class Secret:
    """A key in its run: what `seal` and `open_` take."""

    run: bytes
    salts: bytes = field(repr=False)
    keys: bytes = field(repr=False)


def of(run: Run, key: RunKey | None) -> Secret | None:
    """None for a run that is not encrypted. Raises UsageError where run and member do not fit: one with another key
    would take all that the others push for damaged, and fold something else.
    """
    wanted = run.facts.get(FACT)
    if wanted is None and key:
        raise UsageError("there is a key of payloads, and this run's are not encrypted: leave the key out")
    if wanted is not None and not key:
        raise UsageError("the payloads of this run are encrypted, and there is no key of them")
    if key is None:
        return None
    if wanted != key.name:
        raise UsageError(
            f"this key of payloads is {key.name[:16]}…, and the run's is {str(wanted)[:16]}…: give that one"
        )
    return made(run.owner, key)


def made(owner: str, key: RunKey) -> Secret:
    """owner: the public key of the run's, which no other run has."""
    return Secret(bytes.fromhex(owner), key.part("salts"), key.part("keys"))


def seal(secret: Secret, data: bytes) -> bytes:
    """What is stored. The same bytes give the same; `stored_bytes` says how many they are."""
    salt = _mac(secret.salts, secret.run, data)
    cipher, last = _cipher(secret, salt), _chunks(len(data)) - 1
    view = memoryview(data)
    chunks = (
        cipher.encrypt(_nonce(n, last), view[n * CHUNK : (n + 1) * CHUNK], secret.run) for n in range(last + 1)
    )  # fmt: skip
    return b"".join((salt, *chunks))


def open_(secret: Secret, data: bytes) -> bytes:
    """What was sealed. Raises PayloadError where it is not what a member of this run has sealed."""
    whole = fetching(secret, {"": len(data)}, lambda _, first, count: memoryview(data)[first : first + count])
    return bytes(whole("", 0, plain_bytes(len(data))))


def stored_bytes(count: int) -> int:
    """What so many bytes have when they are sealed."""
    return SALT + count + TAG * _chunks(count)


def plain_bytes(count: int) -> int:
    """What so many sealed bytes hold. Raises PayloadError for a number that no sealed bytes have."""
    chunks = max(1, -(-(count - SALT) // (CHUNK + TAG)))
    plain = count - SALT - TAG * chunks
    if plain < 0 or stored_bytes(plain) != count:
        raise PayloadError(f"{count} bytes are not what encrypted payloads have: this one is cut, or was not encrypted")
    return plain


# ── blobs ────────────────────────────────────────────────────────────────────────────────────────────────────────


def sealed(secret: Secret, blobs: Iterable[Blob]) -> Iterator[Blob]:
    """As they are stored, and their pieces, of which the manifest is made, with the new name; places and digests are
    those of what is sealed."""
    for blob in blobs:
        data = seal(secret, blob.data)
        name = digest(data)
        yield Blob(name, data, tuple(piece._replace(blob=name) for piece in blob.pieces))


def plain(sizes: Mapping[str, int]) -> dict[str, int]:
    """Of the blobs of a record, {digest: bytes stored}, what `payload.read_manifest` is given. Raises PayloadError."""
    return {name: plain_bytes(count) for name, count in sizes.items()}


def fetching(secret: Secret, sizes: Mapping[str, int], stored: Fetch) -> Fetch:
    """Ranges of what is sealed in blobs of so many stored bytes, of which `stored` gives ranges."""
    ciphers: dict[str, AESGCM] = {}

    def fetch(name: str, offset: int, length: int) -> bytes:
        count = plain_bytes(sizes[name])
        last = _chunks(count) - 1
        first, stop = offset // CHUNK, min(_chunks(offset + length), last + 1)
        if name not in ciphers:
            ciphers[name] = _cipher(secret, bytes(stored(name, 0, SALT)))
        wide = CHUNK + TAG
        end = min(stop * wide, count + TAG * (last + 1))
        data = memoryview(stored(name, SALT + first * wide, end - first * wide))
        opened = bytearray()
        for n in range(first, stop):
            chunk = data[(n - first) * wide : (n + 1 - first) * wide]
            try:
                opened += ciphers[name].decrypt(_nonce(n, last), chunk, secret.run)
            except (InvalidTag, ValueError) as error:
                raise PayloadError(
                    f"chunk {n} of an encrypted payload cannot be opened: it was altered, or sealed with another key "
                    "or for another run"
                ) from error
        return bytes(memoryview(opened)[offset - first * CHUNK :][:length])

    return fetch


def _chunks(count: int) -> int:
    return max(1, -(-count // CHUNK))


def _cipher(secret: Secret, salt: bytes) -> AESGCM:
    return AESGCM(_mac(secret.keys, salt))


def _nonce(number: int, last: int) -> bytes:
    return number.to_bytes(11, "big") + bytes([number == last])


def _mac(key: bytes, *parts: bytes) -> bytes:
    made = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        made.update(part)
    return made.digest()

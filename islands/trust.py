"""Who may write what: an Ed25519 key for each island, and the member list that the run's owner signs.

`why_refused` is asked before anything of a record but its JSON is looked at, and by the list that is in force at its
number. The owner's key is in run.json; nobody can take it from the list. What a member may still do is said in
docs/islands.md: within its norm bound it may lie.
"""

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from islands import record as records
from islands.record import OWNER, Record
from islands.view import ROLES, Member
from runtime.config import UsageError

try:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
except ImportError as error:
    raise ImportError(
        "islands sign their records with cryptography: `pip install -r requirements-islands.txt`"
    ) from error

LIST_LIMIT = 1 << 20  # bytes of a member list
MAY_WRITE = {
    "push": {records.PUSH, records.JOIN, records.LEAVE, records.EXPIRE, records.SNAPSHOT},
    "own": set(records.TYPES),
    "read": set(),
}


class Key:
    """Of an island. Its private half stays in this process and in its file."""

    def __init__(self, private: Ed25519PrivateKey):
        self._private = private
        self.public = private.public_key().public_bytes_raw().hex()

    @classmethod
    def new(cls) -> "Key":
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def read(cls, path: Path) -> "Key":
        """Raises UsageError where there is none, or others may read it."""
        data = read_private(path, "the private key of an island")
        try:
            private = serialization.load_pem_private_key(data, password=None)
        except (ValueError, TypeError) as error:
            raise UsageError(f"{path} is no private key in PEM: {error}") from error
        if not isinstance(private, Ed25519PrivateKey):
            raise UsageError(f"{path} is a key of another kind than Ed25519, the kind that islands sign with")
        return cls(private)

    def write(self, path: Path) -> None:
        """Into a new file that nobody else can read."""
        data = self._private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        write_private(path, data)

    def sign(self, record: Record) -> Record:
        message = records.unsigned(records.as_fields(record))
        return records.with_signature(record, self._private.sign(message).hex())


def read_private(path: Path, what: str) -> bytes:
    """Raises UsageError where there is no such file, or others may read it."""
    try:
        mode, data = path.stat().st_mode, path.read_bytes()
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}: the file with {what} is looked for there") from error
    if stat.S_IMODE(mode) & 0o077:
        raise UsageError(f"{path} can be read by others (mode {stat.S_IMODE(mode):o}): chmod 600 {path}")
    return data


def write_private(path: Path, data: bytes) -> None:
    """Into a new file that nobody else can read."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}: a key is written into a new file") from error
    with os.fdopen(file, "wb") as opened:
        opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())


def genuine(key: str, message: bytes, signature: str) -> bool:
    """Whether the private half of the key has made the signature."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(bytes.fromhex(signature), message)
    except (ValueError, InvalidSignature):
        return False
    return True


def why_refused(found: Mapping[str, Any], members: Mapping[str, Member]) -> str:
    """Why a record, as the object in its JSON, is not trusted; "" if it is. Nothing of it is known to be sound.

    Raises NewerFormat if a member has signed it: what nobody has signed tells nothing about the program that is needed.
    """
    name, type, signature = (found.get(key) for key in ("island", "type", "signature"))
    if not isinstance(name, str) or name not in members:
        return "its island is not on the member list"
    member = members[name]
    if member.revoked:
        return f"the key of {name} is revoked"
    if not isinstance(signature, str) or not signature:
        return f"it is not signed by {name}"
    if not genuine(member.key, records.unsigned(found), signature):
        return f"its signature is not that of {name}: it was altered, or another key has signed it"
    records.check_format(found)
    if not isinstance(type, str) or type not in MAY_WRITE[member.role]:
        return f"{name} has the role {member.role}, which writes no such record"
    return ""


# ── the member list ──────────────────────────────────────────────────────────────────────────────────────────────


def owner(key: str) -> dict[str, Member]:
    """The list before there is any."""
    return {OWNER: Member(key, "own")}


def write_list(members: Mapping[str, Member]) -> bytes:
    """The payload of a `members` record. The owner is not in it: its key is in run.json."""
    listed = {
        name: {"key": member.key, "role": member.role, "norm_bound": member.norm_bound, "revoked": member.revoked}
        for name, member in members.items()
        if name != OWNER
    }
    data = records.canonical({"format": records.FORMAT, "members": listed})
    read_list(data)
    return data


def read_list(data: bytes) -> dict[str, Member]:
    """Without the owner. Raises NewerFormat, or ValueError naming the member."""
    found = records.load(data)
    records.check_format(found)
    if found.keys() != {"format", "members"} or not isinstance(found["members"], dict):
        raise ValueError("a member list has the keys format and members")
    return {records.check_name(name): _member(name, fields) for name, fields in found["members"].items()}


def _member(name: str, found: Any) -> Member:
    if name == OWNER:
        raise ValueError(f"the key of {OWNER} is in run.json, and cannot be another one")
    if not isinstance(found, dict) or found.keys() != {"key", "role", "norm_bound", "revoked"}:
        raise ValueError(f"member {name} has not just the keys key, role, norm_bound and revoked")
    records.check_hex(found["key"], "key", f"the key of {name}")
    if found["role"] not in ROLES:
        raise ValueError(f"the role of {name} is none of {', '.join(ROLES)}")
    bound = found["norm_bound"]
    if bound != "" and (not records.is_number(bound) or bound.startswith("-")):
        raise ValueError(f"the norm bound of {name} is not what float.hex writes of a finite number from 0 on")
    if type(found["revoked"]) is not bool:
        raise ValueError(f"revoked of {name} is neither true nor false")
    return Member(**found)

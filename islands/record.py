"""What a log is made of: records, and the one file that says what the run is.

A record is canonical JSON: UTF-8, keys sorted, no spaces, no floats (a number is the text of `float.hex`), at most
64 KiB. Bytes that would be written differently are refused, so a record has one digest, and one signature fits it.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, NamedTuple

FORMAT = 1
LIMIT = 64 << 10  # bytes of a record
DEEPEST = 8  # objects and lists in each other
PUSH, JOIN, LEAVE, EXPIRE, MEMBERS, SNAPSHOT = TYPES = "push", "join", "leave", "expire", "members", "snapshot"
OWNER = "owner"  # the island whose key is in run.json

LARGEST = (1 << 63) - 1
NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")  # lower case: two names are never one file
DIGITS = {"digest": 64, "key": 64, "nonce": 32, "signature": 128}  # in hex


class NewerFormat(ValueError):
    """Its writer knows more than this program does."""


class Payload(NamedTuple):
    """digest: SHA-256 hex of the stored bytes. bytes: their number."""

    digest: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Record:
    """Its fields are the keys of the JSON.

    sequence: its number. previous: digest of the bytes of record sequence - 1; of run.json for the first.
    island: who wrote it. incarnation: 1, 2, …: how often an island of this name has joined. nonce: one per process.
    clock: of a push: which round of the island it is; of a join: which round the first push will be; else the next.
    base: the version that the round started from, or that a snapshot holds; of an expire: the last that the writer saw.
    A version is the sequence number of the last record folded; -1: the first parameters.
    steps, tokens: of this round. numbers: float.hex by name. payloads: all that it refers to. manifest: which of them
    says what is in the others; of a `members` record: the list. target: of an expire: who is taken to be gone.
    signature: Ed25519 over the canonical JSON in which it is empty.
    """

    type: str
    island: str
    incarnation: int
    nonce: str
    clock: int
    base: int = -1
    steps: int = 0
    tokens: int = 0
    numbers: Mapping[str, str] = field(default_factory=dict)
    payloads: tuple[Payload, ...] = ()
    manifest: str = ""
    target: str = ""
    sequence: int = 0
    previous: str = ""
    signature: str = ""
    format: int = FORMAT

    def number(self, name: str) -> float:
        return float.fromhex(self.numbers[name])

    def encode(self) -> bytes:
        """Its bytes in the log. Raises ValueError where it is none."""
        found = check(self)
        data = canonical(as_fields(found))
        if len(data) > LIMIT:
            raise ValueError(f"a record of {len(data)} bytes: at most {LIMIT}; put what is large into a payload")
        return data


@dataclass(frozen=True, kw_only=True)
class Run:
    """run.json. owner: public key, hex. budget: bytes that the payloads of one record may have together.
    facts: the model, the codec, the merge rule, the digest of the first parameters: what every island must agree on."""

    owner: str
    budget: int
    facts: Mapping[str, Any]
    format: int = FORMAT

    def encode(self) -> bytes:
        return canonical(asdict(self))


# ── bytes ────────────────────────────────────────────────────────────────────────────────────────────────────────


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


_encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, sort_keys=True, separators=(",", ":"))


def canonical(value: Any) -> bytes:
    return _encoder.encode(value).encode()


def load(data: bytes) -> dict[str, Any]:
    """The object in canonical JSON. Raises ValueError for everything else."""
    try:
        found = _decoder.decode(data.decode())
        if isinstance(found, dict) and _is_shallow(found) and canonical(found) == data:
            return found
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no canonical JSON ({error})") from error
    raise ValueError(f"no canonical JSON (it would be written differently, or is deeper than {DEEPEST})")


def _no_float(text: str) -> None:
    raise ValueError(f"{text[:20]} is a float, and these are written as hex")


_decoder = json.JSONDecoder(parse_float=_no_float, parse_constant=_no_float)


def _is_shallow(value: Any) -> bool:
    """So that whoever goes through it, at any depth of calls, comes to its end."""
    level = [value]
    for _ in range(DEEPEST):
        level = [
            child
            for outer in level
            if isinstance(outer, dict | list)
            for child in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return not level


def parse(data: bytes) -> Record:
    """Raises NewerFormat, or ValueError for what is no record."""
    if len(data) > LIMIT:
        raise ValueError(f"more than {LIMIT} bytes")
    return from_fields(load(data))


def parse_run(data: bytes) -> Run:
    """Raises NewerFormat, or ValueError for what is no run.json."""
    found = load(data)
    check_format(found)
    if found.keys() != {f.name for f in fields(Run)} or not isinstance(found["facts"], dict):
        raise ValueError("its keys are not format, owner, budget and facts")
    check_hex(found["owner"], "key", "owner")
    _check_count(found["budget"], "budget")
    return Run(**found)


# ── fields ───────────────────────────────────────────────────────────────────────────────────────────────────────

KEYS = {f.name for f in fields(Record)}


def as_fields(record: Record) -> dict[str, Any]:
    """As JSON has it."""
    found = {name: getattr(record, name) for name in KEYS}
    return found | {"payloads": [payload._asdict() for payload in record.payloads], "numbers": dict(record.numbers)}


def from_fields(found: Mapping[str, Any]) -> Record:
    """The record that a JSON object is. Raises NewerFormat, or ValueError naming the key."""
    check_format(found)
    if found.keys() != KEYS:
        unknown, missing = ", ".join(sorted(found.keys() - KEYS)), ", ".join(sorted(KEYS - found.keys()))
        raise ValueError(f"unknown keys: {unknown[:200] or 'none'}; missing keys: {missing or 'none'}")
    payloads = found["payloads"]
    if not isinstance(payloads, list) or any(
        not isinstance(payload, dict) or payload.keys() != {"digest", "bytes"} for payload in payloads
    ):
        raise ValueError("payloads is no list of {digest, bytes}")
    return check(Record(**{**found, "payloads": tuple(Payload(**payload) for payload in payloads)}))


def check(record: Record) -> Record:
    """The record itself, or ValueError naming a field and its value."""
    if record.type not in TYPES:
        raise ValueError(f"type {_shown(record.type)} is none of {', '.join(TYPES)}")
    for name in ("sequence", "incarnation", "clock", "steps", "tokens"):
        _check_count(getattr(record, name), name)
    _check_count(record.base, "base", least=-1)
    check_name(record.island)
    if record.target != "":
        check_name(record.target)
    check_hex(record.nonce, "nonce", "nonce")
    check_hex(record.previous, "digest", "previous")
    for name, kind in (("manifest", "digest"), ("signature", "signature")):
        if getattr(record, name) != "":
            check_hex(getattr(record, name), kind, name)
    for payload in record.payloads:
        check_hex(payload.digest, "digest", "a payload's digest")
        _check_count(payload.bytes, "a payload's bytes")
    if record.manifest and record.manifest not in {payload.digest for payload in record.payloads}:
        raise ValueError("manifest is none of the payloads")
    _check_numbers(record.numbers)
    return record


def unsigned(found: Mapping[str, Any]) -> bytes:
    """What a signature is over: of any object, so that a record of a newer format can be verified, too."""
    return canonical({**found, "signature": ""})


def with_signature(record: Record, signature: str) -> Record:
    return replace(record, signature=signature)


def check_name(name: Any) -> str:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ValueError(
            f"{_shown(name)} is no name of an island: 1 to 63 of a-z, 0-9, - and _, beginning with a letter or a digit"
        )
    return name


def check_format(found: Mapping[str, Any]) -> None:
    number = found.get("format")
    if type(number) is not int or number < 1:
        raise ValueError(f"format {_shown(number)} is no format")
    if number > FORMAT:
        raise NewerFormat(f"format {_shown(number)}, written by a newer Slackline: this one knows up to {FORMAT}")


def _check_count(value: Any, name: str, least: int = 0) -> None:
    if type(value) is not int or not least <= value <= LARGEST:
        raise ValueError(f"{name} is {_shown(value)}, and must be an integer from {least} to 2^63 - 1")


def check_hex(value: Any, kind: str, name: str) -> None:
    if not isinstance(value, str) or len(value) != DIGITS[kind] or not set(value) <= set("0123456789abcdef"):
        raise ValueError(f"{name} is {_shown(value)}, and must be {DIGITS[kind]} hexadecimal digits in lower case")


def _check_numbers(numbers: Any) -> None:
    if not isinstance(numbers, Mapping):
        raise ValueError(f"numbers is {_shown(numbers)}, and must be an object")
    for name, text in numbers.items():
        if not is_number(text):
            raise ValueError(
                f"number {_shown(name)} is {_shown(text)}, and must be what float.hex writes of a finite one"
            )


def is_number(text: Any) -> bool:
    try:
        value = float.fromhex(text)
    except (TypeError, ValueError, OverflowError):
        return False
    return math.isfinite(value) and value.hex() == text


def _shown(value: Any) -> str:
    """Of what anybody may have written, as much as fits into a sentence."""
    text = repr(value) if isinstance(value, str | int | None) else f"a {type(value).__name__}"
    return text if len(text) <= 40 else f"{text[:37]}…"

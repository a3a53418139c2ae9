"""Encryption of payloads: what the store sees, what is noticed of alterations, and that a round stays a round."""

import os
from dataclasses import replace
from random import Random

import numpy as np
import pytest

pytest.importorskip("cryptography", reason="pip install -r requirements-islands.txt")

from islands import decode, payload, secret
from islands.decode import PayloadError
from islands.log import Log
from islands.payload import Draw, Form, Part
from islands.record import PUSH, Run, digest
from islands.schedule import Memory
from islands.secret import CHUNK, FACT, SALT, TAG, RunKey, open_, seal
from islands.store import run
from islands.trust import Key
from islands.view import Member
from runtime.config import UsageError

KEY, OWNER = RunKey(bytes(range(32))), Key.new()
RUN = Run(owner=OWNER.public, budget=10_000_000, facts={FACT: KEY.name})
SECRET = secret.of(RUN, KEY)
assert SECRET
LENGTHS = (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, 3 * CHUNK + 7)


def other(key: RunKey = KEY, **fields) -> secret.Secret:
    made = secret.of(replace(RUN, facts={FACT: key.name}, **fields), key)
    assert made
    return made


@pytest.mark.parametrize("length", LENGTHS)
def test_what_was_sealed_is_opened_and_has_the_length_that_was_said(length):
    data = Random(length).randbytes(length)
    sealed = seal(SECRET, data)
    assert open_(SECRET, sealed) == data
    assert len(sealed) == secret.stored_bytes(length) == SALT + length + TAG * max(1, -(-length // CHUNK))
    assert secret.plain_bytes(len(sealed)) == length


def test_the_store_sees_nothing_of_what_is_sealed():
    sealed = seal(SECRET, bytes(3 * CHUNK))
    blocks = {sealed[n : n + 16] for n in range(SALT, len(sealed) - 16, 16)}
    assert len(blocks) == len(range(SALT, len(sealed) - 16, 16)), "blocks that are equal are not sealed alike"


def test_the_same_round_sealed_again_is_the_same_bytes_and_of_no_other_run_or_key():
    made = [SECRET, other(), other(owner=Key.new().public), other(RunKey.new())]
    sealed = [seal(each, b"round") for each in made]
    assert sealed[0] == sealed[1]
    assert len({*sealed[1:]}) == 3
    assert len({each[:SALT] for each in sealed}) == 3, "two runs have no key of a payload in common"
    assert seal(SECRET, b"rounds")[:SALT] != sealed[0][:SALT], "another payload has another key"


@pytest.mark.parametrize("length", [5, 2 * CHUNK + 5])
def test_a_bit_that_is_flipped_anywhere_is_noticed(length):
    sealed = seal(SECRET, bytes(length))
    places = [0, SALT - 1, SALT, SALT + 4, len(sealed) - TAG - 1, len(sealed) - 1]
    for place in places:
        altered = bytearray(sealed)
        altered[place] ^= 1
        with pytest.raises(PayloadError, match="cannot be opened: it was altered, or sealed with another key"):
            open_(SECRET, bytes(altered))


def test_chunks_that_are_cut_off_moved_or_added_are_noticed():
    wide = CHUNK + TAG
    sealed = seal(SECRET, Random(0).randbytes(3 * CHUNK))
    salt, chunks = sealed[:SALT], [sealed[SALT + n * wide : SALT + (n + 1) * wide] for n in range(3)]
    for kept in ((0, 1), (0, 2), (1, 0, 2), (0, 1, 1), (0, 1, 2, 2), (0,)):
        with pytest.raises(PayloadError, match="cannot be opened"):
            open_(SECRET, salt + b"".join(chunks[n] for n in kept))


@pytest.mark.parametrize("length", [0, 1, SALT, SALT + TAG - 1, SALT + CHUNK + TAG + 1, SALT + CHUNK + 2 * TAG])
def test_a_length_that_nothing_sealed_has_is_refused_before_anything_is_opened(length):
    with pytest.raises(PayloadError, match=f"{length} bytes are not what encrypted payloads have"):
        open_(SECRET, bytes(length))


def test_another_key_or_run_does_not_open_it():
    sealed = seal(SECRET, b"round")
    for each in (other(owner=Key.new().public), other(RunKey.new())):
        with pytest.raises(PayloadError, match="sealed with another key or for another run"):
            open_(each, sealed)


def test_a_range_is_read_without_what_lies_around_it():
    data = Random(0).randbytes(5 * CHUNK + 100)
    sealed, asked = seal(SECRET, data), []

    def stored(name, first, count):
        asked.append(count)
        return sealed[first : first + count]

    fetch = secret.fetching(SECRET, {"x": len(sealed)}, stored)
    for first, count in [(0, 1), (CHUNK - 1, 2), (2 * CHUNK, CHUNK), (5 * CHUNK, 100), (7, 0), (0, len(data))]:
        asked.clear()
        assert fetch("x", first, count) == data[first : first + count]
        assert sum(asked) <= SALT + count + 2 * (CHUNK + TAG)


def test_a_push_is_read_through_its_encryption_range_by_range():
    form = Form({"w": 3 * payload.PIECE // 2, "b": 100}, decode.build("int8"))
    drawn = np.random.default_rng(0)
    parts = [Part(leaf, 0, drawn.normal(size=size).astype(np.float32)) for leaf, size in form.sizes.items()]
    draw = Draw(0, "a", 0)
    open_blobs = list(payload.encode(form, parts, draw))
    blobs = list(secret.sealed(SECRET, payload.encode(form, parts, draw)))
    stored = {blob.digest: blob.data for blob in blobs}
    assert all(digest(data) == name for name, data in stored.items())
    sizes = {name: len(data) for name, data in stored.items()}
    assert sum(sizes.values()) == sum(secret.stored_bytes(len(blob.data)) for blob in open_blobs)

    written = payload.manifest(form, [piece for blob in blobs for piece in blob.pieces])
    found = payload.read_manifest(form, written, secret.plain(sizes))
    fetch = secret.fetching(SECRET, sizes, lambda name, first, count: stored[name][first : first + count])
    ranges = {"w": [(5000, 10), (payload.PIECE - 256, 512)], "b": [(0, 100)]}
    read = [(leaf, place, x.copy()) for leaf, place, x in payload.read(form, found, ranges, fetch)]

    plain = {blob.digest: blob.data for blob in open_blobs}
    written = payload.manifest(form, [piece for blob in open_blobs for piece in blob.pieces])
    found = payload.read_manifest(form, written, {name: len(data) for name, data in plain.items()})
    fetch = lambda name, first, count: plain[name][first : first + count]
    expected = [(leaf, place, x.copy()) for leaf, place, x in payload.read(form, found, ranges, fetch)]
    assert len(read) == len(expected) > 3
    for (leaf, place, x), (leaf_, place_, x_) in zip(read, expected, strict=True):
        assert (leaf, place) == (leaf_, place_)
        np.testing.assert_array_equal(x, x_)


def test_a_log_holds_what_is_sealed_under_the_digest_of_what_is_stored():
    """A push that is repeated after a time-out, by who seals again, is still one push."""
    store, key = Memory(lambda: 0.0), Key.new()
    run(Log.begin(store, RUN, {"a": Member(key.public)}, OWNER))
    log = run(Log.open(store, "a", key))
    run(log.read())
    run(log.join())
    ask = lambda: run(log.push([seal(SECRET, b"round")], clock=0, base=1))
    assert ask() == ask()
    (pushed,) = [entry.record for entry in run(log.read()) if entry.record and entry.record.type == PUSH]
    stored = run(log.download(*pushed.payloads))
    assert b"round" not in stored and open_(SECRET, stored) == b"round"


# ── the key ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_key_is_in_a_file_that_nobody_else_can_read(tmp_path):
    path, key = tmp_path / "key", RunKey.new()
    key.write(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert RunKey.read(path).name == key.name != RunKey.new().name
    with pytest.raises(UsageError, match="a key is written into a new file"):
        key.write(path)
    os.chmod(path, 0o640)
    with pytest.raises(UsageError, match=r"can be read by others \(mode 640\): chmod 600"):
        RunKey.read(path)
    with pytest.raises(UsageError, match="the file with the key of a run's payloads is looked for there"):
        RunKey.read(tmp_path / "none")


@pytest.mark.parametrize("data", [b"", b"word", b"0" * 63, b"0" * 66, b"\xff" * 64])
def test_a_file_that_holds_no_key_is_refused_and_nothing_of_it_said(tmp_path, data):
    path = tmp_path / "key"
    path.write_bytes(data)
    path.chmod(0o600)
    with pytest.raises(UsageError, match="these are 64 hexadecimal digits") as error:
        RunKey.read(path)
    assert len(str(error.value)) < len(str(path)) + 80


def test_a_member_without_the_runs_key_or_with_another_is_refused_at_once():
    open_run = replace(RUN, facts={})
    assert secret.of(open_run, None) is None
    for of_run, key, why in (
        (open_run, KEY, "this run's are not encrypted"),
        (RUN, None, "the payloads of this run are encrypted"),
        (RUN, RunKey.new(), f"the run's is {KEY.name[:16]}…: give that one"),
    ):
        with pytest.raises(UsageError, match=why):
            secret.of(of_run, key)


def test_no_key_shows_in_what_is_printed():
    text = f"{KEY!r} {SECRET!r} {KEY.name}"
    assert bytes(range(32)).hex() not in text and KEY.part("keys").hex() not in text
    assert repr(KEY.part("keys")) not in text and repr(KEY.part("salts")) not in text

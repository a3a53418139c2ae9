"""Who may write what into a log: an attack each, and what parsing makes of bytes that anybody may have written."""

import contextlib
import json
import stat
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace
from random import Random

import helpers
import pytest

pytest.importorskip("cryptography", reason="pip install -r requirements-islands.txt")

from islands import record as records
from islands import trust
from islands.log import Dropped, Log, LogError, payload_key, record_key
from islands.record import EXPIRE, JOIN, LEAVE, LIMIT, MEMBERS, OWNER, PUSH, SNAPSHOT, Payload, Record, Run, digest
from islands.schedule import Memory
from islands.store import run
from islands.trust import Key
from islands.view import Member
from runtime.config import UsageError

KEYS = {name: Key.new() for name in (OWNER, "a", "b", "reader", "second", "stranger")}
ROLES = {"a": "push", "b": "push", "reader": "read", "second": "own"}
LISTED = {name: Member(KEYS[name].public, role) for name, role in ROLES.items()}
RUN = Run(owner=KEYS[OWNER].public, budget=100, facts={})


class Scene:
    """A log with two islands that have pushed a round each, and somebody who may write into its store."""

    def __init__(self):
        self.store = Memory(time.time)
        self.owner = run(Log.begin(self.store, RUN, LISTED, KEYS[OWNER]))
        self.a, self.b = self.member("a"), self.member("b")
        for island in (self.a, self.b):
            run(island.push([b"round 0"], clock=0, base=island.view.version))
        run(self.a.read())
        self.reader = run(Log.open(self.store))
        run(self.reader.read())

    def member(self, name: str) -> Log:
        log = run(Log.open(self.store, name, KEYS[name]))
        run(log.read())
        run(log.join())
        return log

    def next(self, island: str = "a", **fields) -> Record:
        """What that island might write next, not signed."""
        plain = {"type": PUSH, "island": island, "incarnation": 1, "nonce": self.a.nonce, "clock": 1, "base": 4}
        return Record(**{**plain, "sequence": self.reader.view.next, "previous": self.reader.tail, **fields})

    def refused(self, data: bytes) -> str:
        """What a reader says of these bytes at the next number, which change nothing, and after which all go on."""
        before = self.reader.view
        assert run(self.store.create(record_key(before.next), data))
        (entry,) = run(self.reader.read())
        assert not entry.verdict.folded
        assert self.reader.view == replace(before, next=before.next + 1)
        clock = self.b.view.islands["b"].clock
        assert run(self.b.push([b"more"], clock=clock, base=before.version)).sequence == before.next + 1
        run(self.reader.read())
        return entry.verdict.why


@pytest.fixture
def scene():
    return Scene()


def altered(record: Record, key: str = "a", **fields) -> bytes:
    """Signed, then changed."""
    return replace(KEYS[key].sign(record), **fields).encode()


# ── attacks ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_would_be_folded_if_it_were_signed_is(scene):
    """The others fail for their own reason, and not for one that they share."""
    assert run(scene.store.create(record_key(scene.reader.view.next), altered(scene.next())))
    assert run(scene.reader.read())[0].verdict.folded


def test_an_island_that_is_not_listed_is_refused(scene):
    record = scene.next("stranger")
    assert scene.refused(KEYS["stranger"].sign(record).encode()) == "its island is not on the member list"


def test_a_record_that_is_not_signed_is_refused(scene):
    assert scene.refused(scene.next().encode()) == "it is not signed by a"


def test_a_record_that_another_key_has_signed_is_refused(scene):
    assert scene.refused(KEYS["b"].sign(scene.next()).encode()).startswith("its signature is not that of a")


@pytest.mark.parametrize(
    "fields",
    [
        {"base": 2},
        {"tokens": 10**6},
        {"island": "b"},
        {"clock": 2},
        {"type": SNAPSHOT},
        {"payloads": (Payload("0" * 64, 7),)},
        {"numbers": {"lr": (10.0).hex()}},
    ],
)
def test_an_altered_record_is_refused(scene, fields):
    assert "it was altered, or another key has signed it" in scene.refused(altered(scene.next(), **fields))


def test_one_flipped_bit_anywhere_is_refused(scene):
    data = bytearray(altered(scene.next()))
    for place in range(0, len(data), 7):
        changed = data.copy()
        changed[place] ^= 1
        record, _, why = scene.reader._trusted(bytes(changed))
        assert why, f"bit 0 of byte {place}"


def test_a_record_that_is_written_again_is_refused(scene):
    data = run(scene.store.get(record_key(3), LIMIT))
    assert scene.refused(data) == "it is a copy of record 3"


def test_a_record_of_another_log_is_a_fork(scene):
    """It is signed, and has the right number: only what is before it shows that it does not belong here."""
    run(scene.store.create(record_key(scene.reader.view.next), altered(scene.next(previous="0" * 64))))
    with pytest.raises(LogError, match="signed by a, follows another record 4 than the one that is there"):
        run(scene.reader.read())


def test_what_an_older_incarnation_has_sent_is_dropped_when_it_lands(scene):
    late = scene.next(sequence=scene.reader.view.next + 1)  # behind the join of the next incarnation
    scene.member("a")
    run(scene.reader.read())
    why = scene.refused(altered(replace(late, previous=scene.reader.tail)))
    assert why == "it is of incarnation 1 of a, whose newest is 2"


def test_an_oversized_record_is_refused_and_the_chain_goes_on(scene):
    fields = {"numbers": {f"n{i}": (1.0).hex() for i in range(10_000)}}
    with pytest.raises(ValueError, match="at most 65536; put what is large into a payload"):
        scene.next(**fields).encode()
    assert scene.refused(b"x" * (LIMIT + 1)) == "it has more than 65536 bytes"
    assert scene.refused(b"x" * 10_000_000) == "it has more than 65536 bytes"


def test_a_record_whose_payloads_are_over_the_budget_is_refused(scene):
    record = scene.next(payloads=(Payload("0" * 64, 60), Payload("1" * 64, 41)))
    assert scene.refused(altered(record)) == "its payloads have 101 bytes, and run.json allows 100"
    with pytest.raises(Dropped, match="its payloads have 101 bytes"):
        run(scene.a.push([b"x" * 101], clock=1, base=4))


@pytest.mark.parametrize("data", [b"", b"{}", b"\xff\xfe", b"null", b"[" * 60_000, b'{"island":"a"}'])
def test_what_is_no_record_takes_its_number_and_nothing_else(scene, data):
    assert scene.refused(data)


@pytest.mark.parametrize("name", ["A", "../a", "a\nb", "a" * 1000, 7, None, ["a"]])
def test_a_name_that_is_none_is_not_repeated(scene, name):
    run(scene.store.create(record_key(5), records.canonical({"island": name})))
    (entry,) = run(scene.reader.read())
    assert entry.island == "" and entry.verdict.why == "its island is not on the member list"


def test_who_only_reads_may_write_nothing(scene):
    for type in (PUSH, JOIN, LEAVE, EXPIRE, SNAPSHOT, MEMBERS):
        record = KEYS["reader"].sign(scene.next("reader", type=type))
        assert scene.refused(record.encode()) == "reader has the role read, which writes no such record"


# ── the member list ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_member_list_that_a_member_has_written_is_refused(scene):
    scene.a._key = KEYS["a"]
    with pytest.raises(Dropped, match="a has the role push, which writes no such record"):
        run(scene.a.write_members(lambda before: LISTED | {"stranger": Member(KEYS["stranger"].public)}))


def test_a_member_list_that_says_it_is_the_owners_is_refused(scene):
    record = scene.next(OWNER, type=MEMBERS, incarnation=0, clock=0)
    assert scene.refused(KEYS["stranger"].sign(record).encode()).startswith("its signature is not that of owner")


def test_the_owner_and_who_has_the_role_own_may_change_the_list(scene):
    run(scene.owner.read())
    run(scene.owner.write_members(lambda before: LISTED | {"stranger": Member(KEYS["stranger"].public)}))
    assert run(scene.member("stranger").push([b"one"], clock=1, base=4)).verdict.folded
    second = scene.member("second")
    run(second.write_members(lambda before: LISTED))
    run(scene.reader.read())
    assert "stranger" not in scene.reader.view.members and OWNER in scene.reader.view.members


def test_a_key_that_is_revoked_while_it_works_writes_nothing_more_and_holds_nobody_back(scene):
    run(scene.b.push([b"round 1"], clock=1, base=4))
    run(scene.owner.read())
    run(scene.owner.write_members(lambda before: LISTED | {"a": replace(LISTED["a"], revoked=True)}))
    with pytest.raises(Dropped, match="the key of a is revoked"):
        run(scene.a.push([b"round 1"], clock=1, base=4))
    run(scene.reader.read())
    assert scene.reader.view.live_minimum() == 2 and list(scene.reader.view.live()) == ["b"]
    assert scene.refused(altered(scene.next())) == "the key of a is revoked"
    assert scene.reader.view.islands["a"].clock == 1, "what it had pushed before stays folded"


def test_a_name_that_gets_another_key_is_not_the_old_key_any_more(scene):
    run(scene.owner.read())
    run(scene.owner.write_members(lambda before: LISTED | {"a": Member(KEYS["stranger"].public)}))
    run(scene.reader.read())
    assert scene.refused(altered(scene.next())).startswith("its signature is not that of a")


def test_nothing_of_a_member_list_is_believed_that_its_record_does_not_name(scene):
    run(scene.owner.read())
    entry = run(scene.owner.write_members(lambda before: LISTED | {"stranger": Member(KEYS["stranger"].public)}))
    key = payload_key(entry.record.manifest)
    data, _ = scene.store.objects[key]
    scene.store.objects[key] = data.replace(b"push", b"read"), 0.0
    with pytest.raises(LogError, match="it was altered"):
        run(scene.reader.read())


@pytest.mark.parametrize(
    "change, why",
    [
        (lambda listed: listed | {"owner": listed["a"]}, "the key of owner is in run.json"),
        (lambda listed: listed | {"A": listed["a"]}, "'A' is no name of an island"),
        (lambda listed: listed | {"a": {"key": "00"}}, "member a has not just the keys"),
        (lambda listed: listed | {"a": listed["a"] | {"key": "00"}}, "the key of a is '00', and must be 64"),
        (lambda listed: listed | {"a": listed["a"] | {"role": "rule"}}, "the role of a is none of push, read, own"),
        (lambda listed: listed | {"a": listed["a"] | {"norm_bound": "1.5"}}, "the norm bound of a is not"),
        (lambda listed: listed | {"a": listed["a"] | {"norm_bound": "-0x1.0000000000000p+0"}}, "the norm bound of a"),
        (lambda listed: listed | {"a": listed["a"] | {"revoked": 0}}, "revoked of a is neither"),
        (lambda listed: [], "a member list has the keys"),
    ],
)
def test_a_member_list_that_is_wrong_is_refused_though_the_owner_has_signed_it(scene, change, why):
    fields = json.loads(trust.write_list(LISTED))
    data = records.canonical(fields | {"members": change(fields["members"])})
    payload = run(scene.owner.upload(data))
    record = scene.next(OWNER, type=MEMBERS, incarnation=0, clock=0, payloads=(payload,), manifest=payload.digest)
    assert scene.refused(KEYS[OWNER].sign(record).encode()).startswith(why)


def test_a_member_list_without_or_with_an_enormous_payload_is_refused(scene):
    record = scene.next(OWNER, type=MEMBERS, incarnation=0, clock=0)
    huge = Payload("0" * 64, trust.LIST_LIMIT + 1)
    for fields in ({}, {"payloads": (huge,), "manifest": huge.digest}):
        data = KEYS[OWNER].sign(replace(record, previous=scene.reader.tail, sequence=scene.reader.view.next, **fields))
        assert scene.refused(data.encode()) == "it has no member list of at most 1048576 bytes"


def test_a_member_list_is_read_as_it_was_written():
    listed = {"a": Member("0" * 64, "own", (2.5).hex()), "b": Member("1" * 64, "read", revoked=True)}
    assert trust.read_list(trust.write_list(trust.owner("2" * 64) | listed)) == listed


# ── keys ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_key_file_is_for_its_owner_alone(tmp_path):
    path = tmp_path / "a.key"
    key = Key.new()
    key.write(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    again = Key.read(path)
    assert again.public == key.public
    record = Record(type=PUSH, island="a", incarnation=1, nonce="0" * 32, clock=0, previous="0" * 64)
    assert trust.genuine(key.public, records.unsigned(records.as_fields(record)), again.sign(record).signature)
    with pytest.raises(UsageError, match="File exists: a key is written into a new file"):
        key.write(path)
    path.chmod(0o640)
    with pytest.raises(UsageError, match=rf"can be read by others \(mode 640\): chmod 600 {path}"):
        Key.read(path)


def test_what_is_no_key_file_is_said(tmp_path):
    with pytest.raises(UsageError, match="No such file or directory: the file with the private key"):
        Key.read(tmp_path / "none")
    path = tmp_path / "key"
    path.write_bytes(b"nonsense")
    path.chmod(0o600)
    with pytest.raises(UsageError, match="is no private key in PEM"):
        Key.read(path)
    other = subprocess.run(["openssl", "genpkey", "-algorithm", "x25519"], capture_output=True).stdout
    path.write_bytes(other)
    with pytest.raises(UsageError, match="is a key of another kind than Ed25519"):
        Key.read(path)


def test_without_cryptography_it_is_said_what_to_install():
    code = "import sys; sys.modules['cryptography.exceptions'] = None; import islands.trust"
    done = subprocess.run([sys.executable, "-c", code], cwd=helpers.ROOT, capture_output=True, text=True)
    assert done.stderr.endswith(
        "islands sign their records with cryptography: `pip install -r requirements-islands.txt`\n"
    )


# ── what is read of bytes that anybody may have written ──────────────────────────────────────────────────────────

SOUND = Record(
    type=PUSH, island="a", incarnation=1, nonce="0" * 32, clock=1, base=4, steps=10, tokens=100, sequence=5,
    previous="1" * 64, numbers={"lr": (0.7).hex()}, payloads=(Payload("2" * 64, 7),), manifest="2" * 64,
)  # fmt: skip
ODD = (
    None, True, -1, 0, 1, 2**63, 10**400, 0.5, float("inf"), "", "a", "\ud800", "é" * 50, "0" * 64, "A" * 64, "push",
    [], {}, [[[[[[[[[[]]]]]]]]]], {"a": {"b": {}}}, [{"digest": "0" * 64}], [{"digest": "0" * 64, "bytes": -1}],
    {"lr": "0x1p99999"}, {"lr": "nan"}, {"lr": 1}, {"lr": (1.0).hex()},
)  # fmt: skip


def test_a_record_is_read_as_it_was_written():
    data = SOUND.encode()
    assert records.parse(data) == SOUND and records.parse(data).encode() == data
    assert digest(data) == "".join(records.digest(data)) and records.parse(data).number("lr") == 0.7


@pytest.mark.parametrize(
    "change",
    [
        lambda text: " " + text,
        lambda text: text + "\n",
        lambda text: text.replace(":", ": ", 1),
        lambda text: text.replace('"base":4', '"base":4.0'),
        lambda text: text.replace('"base":4', '"base":"4"'),
        lambda text: text.replace('"base":4', '"base":NaN'),
        lambda text: text.replace('"base":4', '"base":true'),
        lambda text: text.replace('"base":4', '"base":-2'),
        lambda text: text.replace('"base":4,', ""),
        lambda text: text.replace('"base":4', '"base":4,"base":4'),
        lambda text: text.replace('"base":4', '"aside":1,"base":4'),
        lambda text: text.replace('"a"', '"A"'),
        lambda text: text.replace('"a"', '"../a"'),
        lambda text: text.replace("push", "pull"),
        lambda text: text.replace("push", "pu\\u0073h"),
        lambda text: text.replace('"format":1', '"format":0'),
        lambda text: text.replace("2" * 64, "2" * 63),
        lambda text: text.replace('"manifest":"2', '"manifest":"3'),
        lambda text: text.replace((0.7).hex(), "0x1p-1"),
        lambda text: text.replace((0.7).hex(), "inf"),
        lambda text: text.replace((0.7).hex(), "0x1p99999"),
    ],
)
def test_bytes_that_are_no_canonical_record_are_refused(change):
    text = SOUND.encode().decode()
    assert change(text) != text
    with pytest.raises(ValueError):
        records.parse(change(text).encode())


def test_json_that_is_deep_is_refused_before_anything_goes_through_it():
    nested = lambda depth: b'{"a":' * depth + b"1" + b"}" * depth
    assert records.load(nested(records.DEEPEST - 1))
    for depth in (records.DEEPEST, 100, *range(900, 1000), 10_000):
        with pytest.raises(ValueError):
            records.load(nested(depth))


def test_a_newer_format_is_told_from_what_is_wrong():
    with pytest.raises(records.NewerFormat, match="format 2, written by a newer Slackline: this one knows up to 1"):
        records.parse(SOUND.encode().replace(b'"format":1', b'"format":2'))


def test_run_json_is_read_as_it_was_written_and_nothing_else():
    data = RUN.encode()
    assert records.parse_run(data) == RUN
    for wrong in (data + b" ", data.replace(b'"budget":100', b'"budget":-1'), b"{}", data.replace(b"facts", b"farce")):
        with pytest.raises(ValueError):
            records.parse_run(wrong)


def mutated(random: Random, data: bytes) -> bytes:
    """Bytes that nobody has signed."""
    found = bytearray(data)
    for _ in range(random.choice((1, 1, 1, 2, 8))):
        first = random.randrange(len(found) + 1)
        last = min(len(found), first + random.choice((1, 1, 2, 10, 200)))
        kind = random.randrange(5)
        if kind == 0 and first < len(found):
            found[first] ^= 1 << random.randrange(8)
        elif kind == 1:
            del found[first:last]
        elif kind == 2:
            found[first:first] = found[first:last]
        elif kind == 3:
            found[first:last] = random.randbytes(last - first)
        else:
            found[first:first] = random.choice(
                (b"[", b"{", b'"', b"}", b"\\", b"9" * 30, b"\x00", b"\xff", b"1e9", b",")
            )
    return bytes(found)


def malicious(random: Random, key: Key) -> bytes:
    """A member signs what is canonical JSON, and strange."""
    fields = records.as_fields(SOUND)
    for _ in range(random.choice((1, 1, 2, 4))):
        fields[random.choice((*fields, "other"))] = random.choice(ODD)
    with contextlib.suppress(KeyError, TypeError):
        del fields[random.choice((*ODD, *fields))]
    if fields.get("island") == "a":
        fields["signature"] = key._private.sign(records.unsigned(fields)).hex()
    return records.canonical(fields)


def fuzz(times: int) -> tuple[int, int]:
    """(how many were refused, how many trusted). Whatever it is, a reader goes on, or says that it may not."""
    random, scene, refused, trusted = Random(times), Scene(), 0, 0
    log = scene.reader
    sound = KEYS["a"].sign(replace(SOUND, sequence=log.view.next, previous=log.tail)).encode()
    for n in range(times):
        try:
            data = malicious(random, KEYS["a"]) if n % 10 == 0 else mutated(random, sound)
        except (ValueError, TypeError):  # no JSON can hold it
            continue
        try:
            record, _, why = log._trusted(data)
            view, verdict = log.view.after(record, why)
        except LogError as error:  # signed by a member: a newer format, or what follows another record
            assert "newer Slackline" in str(error) or "follows another" in str(error)
            continue
        assert view.next == log.view.next + 1 and len(verdict.why) < 500
        if why:
            refused += 1
            assert verdict.why == why
        else:
            trusted += 1
            assert record and record.encode() == data
    return refused, trusted


@pytest.mark.slow
def test_twenty_thousand_mutated_records_are_refused_or_sound():
    refused, trusted = fuzz(20_000)
    assert refused > 19_000


@pytest.mark.prove
def test_a_million_mutated_records_are_refused_or_sound():
    refused, trusted = fuzz(1_000_000)
    assert refused > 950_000


LARGE = (
    b"[" * LIMIT, b'{"a":' * (LIMIT // 5), b"[" + b"{}," * (LIMIT // 3 - 1) + b"{}]", b'{"a":' + b"9" * 65_000 + b"}",
    b'{"a":"' + b"\\u0000" * 10_000 + b'"}',
)  # fmt: skip


@pytest.mark.parametrize("data", LARGE, ids=range(len(LARGE)))
def test_a_record_takes_little_memory_to_be_refused(data):
    tracemalloc.start()
    with pytest.raises(ValueError):
        records.parse(data)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 8 << 20

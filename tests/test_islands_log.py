"""The log of islands without chance: what a store answers, how a record gets its number, what is read and refused."""

import builtins
import errno
import json
import os
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random

import pytest

pytest.importorskip("cryptography", reason="pip install -r requirements-islands.txt")

from islands import record as records
from islands.faulty import Chance, Faulty
from islands.folder import OLD, Disk, Folder
from islands.log import Dropped, Log, LogError, payload_key, record_key
from islands.record import EXPIRE, JOIN, LEAVE, MEMBERS, PUSH, SNAPSHOT, Payload, Record, Run, digest
from islands.schedule import Memory
from islands.store import Away, StoreError, open_store, redacted, run
from islands.trust import Key
from islands.view import Member, View
from runtime.config import UsageError

KEYS = {name: Key.new() for name in ("owner", "a", "b")}
LISTED = {name: Member(KEYS[name].public) for name in ("a", "b")}
RUN = Run(owner=KEYS["owner"].public, budget=100, facts={"codec": "int4"})


class Clock:
    """Time passes when somebody sleeps."""

    def __init__(self):
        self.seconds = 0.0

    def now(self) -> float:
        return self.seconds

    def sleep(self, seconds: float) -> None:
        self.seconds += seconds


@pytest.fixture(params=["folder", "memory://", "model"])
def store(request, tmp_path):
    if request.param == "model":
        return Memory(time.time)
    if request.param == "folder":
        made = Folder(tmp_path / "log")
        run(made.prepare())
        return made
    pytest.importorskip("obstore", reason="pip install -r requirements-islands.txt")
    return open_store(request.param)


@pytest.fixture
def log(store):
    """A log that has begun; its owner's."""
    return run(Log.begin(store, RUN, LISTED, KEYS["owner"], Clock()))


def member(store, name: str, joined: bool = True, **options) -> Log:
    opened = run(Log.open(store, name, KEYS[name], **{"clock": Clock(), **options}))
    run(opened.read())
    if joined:
        run(opened.join())
    return opened


def push(log: Log, clock: int, *blobs: bytes):
    return run(log.push(blobs or (b"round",), clock=clock, base=log.view.version, steps=10, tokens=100))


# ── what a store answers ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_key_is_created_once_and_read_back(store):
    assert run(store.get("records/1", 10)) is None
    assert run(store.create("records/1", b"one")) is True
    assert run(store.create("records/1", b"two")) is False
    assert run(store.get("records/1", 10)) == b"one"
    assert run(store.get("records/1", 2)) == b"on"
    assert run(store.get_range("records/1", 1, 10)) == b"ne"


def test_an_empty_object_is_there(store):
    assert run(store.create("records/1", b"")) is True
    assert run(store.get("records/1", 10)) == b""


def test_a_listing_is_sorted_and_goes_on_after_a_key(store):
    for number in (3, 1, 2):
        run(store.create(f"records/{number}", b""))
    run(store.create("payloads/4", b""))
    assert run(store.list("records")) == ["records/1", "records/2", "records/3"]
    assert run(store.list("records", "records/1")) == ["records/2", "records/3"]


def test_a_heartbeat_is_overwritten_and_has_a_time(store):
    assert run(store.last_modified("heartbeats/a")) is None
    run(store.put("heartbeats/a", b"1"))
    run(store.put("heartbeats/a", b"2"))
    assert run(store.get("heartbeats/a", 10)) == b"2"
    assert abs(run(store.last_modified("heartbeats/a")) - time.time()) < 60


def test_what_is_deleted_is_gone(store):
    run(store.create("records/1", b"one"))
    for _ in range(2):
        run(store.delete("records/1"))
        assert run(store.get("records/1", 10)) is None


def test_of_many_that_create_a_key_one_wins(store):
    won = []

    def create(name: int):
        if run(store.create("records/1", b"%d" % name)):
            won.append(name)

    threads = [threading.Thread(target=create, args=(name,)) for name in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = won
    assert run(store.get("records/1", 10)) == b"%d" % winner


# ── a record gets its number ─────────────────────────────────────────────────────────────────────────────────────


def test_two_islands_and_a_reader_see_the_same(log, store):
    a, b = member(store, "a"), member(store, "b")
    for clock in range(3):
        assert push(a, clock, b"of a %d" % clock).verdict.folded
        assert push(b, clock, b"of b %d" % clock).verdict.folded
    run(a.append(a.draft(LEAVE, clock=3)))
    reader = run(Log.open(store))
    entries = run(reader.read())
    assert [entry.sequence for entry in entries] == list(range(10))
    assert [entry.record.type for entry in entries] == [MEMBERS, JOIN, JOIN, *6 * [PUSH], LEAVE]
    assert entries[3].record.payloads == (Payload(digest(b"of a 0"), 6),)
    assert run(reader.download(*entries[3].record.payloads)) == b"of a 0"
    for other in (a, b):
        run(other.read())
        assert other.view == reader.view and other.tail == reader.tail
    assert list(reader.view.live()) == ["b"] and reader.view.live_minimum() == 3
    assert run(reader.read()) == []


def test_the_layout_is_what_it_is_said_to_be(log, store):
    a = member(store, "a")
    entry = push(a, 0)
    run(a.beat())
    data = run(store.get("records/00000000000000000002", records.LIMIT))
    assert digest(data) == entry.digest and json.loads(data)["clock"] == 0
    assert json.loads(run(store.get("run.json", 1000)))["facts"] == {"codec": "int4"}
    assert run(store.list("payloads")) == sorted(
        payload_key(payload.digest) for payload in (*entry.record.payloads, *run(log.read())[0].record.payloads)
    )
    assert run(store.list("heartbeats")) == ["heartbeats/a"]


def test_read_gives_every_entry_once_those_of_append_included(log, store):
    a, b = member(store, "a"), member(store, "b")
    push(a, 0)
    push(b, 0)  # comes upon a's
    assert [entry.sequence for entry in run(b.read())] == [2, 3, 4]
    assert run(b.read()) == []


@pytest.mark.parametrize("fault", ["response lost", "error after success", "conflict", "late", "duplicate", "away"])
def test_whatever_is_answered_a_push_is_there_once(log, store, fault):
    chance = Chance(Random(0), {fault: 0.5})
    faulty = Faulty(store, chance, Clock(), run)  # what lands later lands at once
    a = member(faulty, "a", patience=1000.0)
    for clock in range(10):
        assert push(a, clock, b"round %d" % clock).verdict.folded
    assert chance.hits
    reader = run(Log.open(store))
    pushes = [entry for entry in run(reader.read()) if entry.record.type == PUSH]
    assert [entry.record.clock for entry in pushes] == list(range(10))
    assert all(entry.verdict.folded for entry in pushes)


def test_who_loses_a_number_takes_the_next(log, store):
    a, b = member(store, "a"), member(store, "b")
    before, entry = push(a, 0), push(b, 0)
    assert entry.sequence == before.sequence + 1 and entry.record.previous == before.digest


def test_a_draft_is_written_once_however_often_it_is_appended(log, store):
    a = member(store, "a")
    draft = a.draft(PUSH, clock=0, base=1)
    entry = run(a.append(draft))
    run(a.read())
    assert run(a.append(draft)) == entry
    assert a.view.next == 3


@pytest.mark.parametrize("reads", [False, True])
def test_after_a_time_out_the_same_push_may_be_repeated_though_it_has_landed(log, store, reads):
    chance = Chance(Random(0), {})

    class Breaking(Faulty):
        def create(self, key, data):
            created = yield from super().create(key, data)
            if key == record_key(2) and created:
                chance.rates = {"away": 1.0}
                raise Away("the store has gone down with the answer")
            return created

    a = member(Breaking(store, chance, Clock(), run), "a")
    ask = lambda: run(a.push([b"round"], clock=0, base=1))
    with pytest.raises(Away):
        ask()
    chance.rates = {}
    if reads:
        run(a.read())
    assert ask().sequence == 2 and a.view.next == 3


def test_what_would_be_dropped_is_not_written(log, store):
    a = member(store, "a")
    push(a, 0)
    for clock, why in ((0, "round 0 of a is folded already"), (2, "it is round 2 of a, whose next is 1")):
        with pytest.raises(Dropped, match=why):
            push(a, clock)
    assert len(run(store.list("records"))) == 3


def test_what_would_be_dropped_by_what_is_read_so_far_is_judged_by_what_is_there(log, store):
    a, b = member(store, "a"), member(store, "b")
    behind = a.view.version
    push(b, 0)
    entry = run(a.push([b"round"], clock=0, base=behind + 2))  # whoever pulls for it is ahead of it
    assert entry.verdict.folded and entry.record.base == behind + 2


def test_of_two_processes_of_one_name_the_second_to_join_is_refused(log, store):
    first, second = member(store, "a", joined=False), member(store, "a", joined=False)
    run(first.join())
    with pytest.raises(Dropped, match="it is incarnation 1 of a, whose next is 2"):
        run(second.join())
    assert push(first, 0).verdict.folded


def test_a_sleeper_that_wakes_is_fenced_by_its_next_incarnation(log, store):
    sleeper = member(store, "a")
    push(sleeper, 0)
    push(member(store, "a"), 1)
    with pytest.raises(Dropped, match="it is of incarnation 1 of a, whose newest is 2"):
        push(sleeper, 1)


def test_an_island_that_has_expired_joins_again_where_the_others_are(log, store):
    a, b = member(store, "a"), member(store, "b")
    for clock in range(3):
        push(a, clock)
    run(a.append(a.draft(EXPIRE, clock=3, base=a.view.version, target="b", numbers={"silent": (90.0).hex()})))
    with pytest.raises(Dropped, match="b is not live"):
        push(b, 0)
    assert run(b.join()).record.clock == 3
    assert push(b, 3).record.incarnation == 2


def test_a_join_waits_for_nobody_though_rounds_are_completed_meanwhile(log, store):
    a, b = member(store, "a"), member(store, "b", joined=False)
    push(a, 0)
    assert b.view.complete == 0
    assert run(b.join()).record.clock == 1


def test_a_log_is_begun_once_and_may_be_finished_by_repeating(log, store):
    again = run(Log.begin(store, RUN, LISTED, KEYS["owner"], Clock()))
    assert again.view.next == 1
    other = Run(owner=KEYS["owner"].public, budget=101, facts={})
    with pytest.raises(UsageError, match="there is the log of another run already"):
        run(Log.begin(store, other, LISTED, KEYS["owner"], Clock()))


def test_where_there_is_no_log_that_is_said(store):
    with pytest.raises(UsageError, match="there is no log: run.json is not there"):
        run(Log.open(store))


# ── what is not as it was written ────────────────────────────────────────────────────────────────────────────────


def replaced(store, key: str, data: bytes | None) -> None:
    run(store.delete(key))
    if data is not None:
        run(store.create(key, data))


def test_a_gap_is_named(log, store):
    a = member(store, "a")
    for clock in range(3):
        push(a, clock)
    run(a.look_ahead())
    replaced(store, record_key(2), None)
    reader = run(Log.open(store))
    run(reader.read())
    with pytest.raises(LogError, match="the log has a gap: record 2 is not there, and records/0*4 is"):
        run(reader.look_ahead())


def test_a_listing_that_is_old_is_no_gap(log, store):
    a = member(store, "a")
    reader = run(Log.open(store))
    run(reader.read())
    push(a, 0)
    push(a, 1)
    run(reader.look_ahead())  # record 2 is not read yet, and is there


def test_a_listing_that_names_what_is_not_there_is_no_gap(log, store, monkeypatch):
    def lists(prefix, after=""):
        yield from ()
        return [record_key(7)]

    reader = run(Log.open(store))
    run(reader.read())
    monkeypatch.setattr(reader.store, "list", lists)
    run(reader.look_ahead())


def test_a_fork_is_named(log, store):
    a = member(store, "a")
    push(a, 0, b"one")
    second = run(store.get(record_key(2), records.LIMIT))
    push(a, 1)
    replaced(store, record_key(2), None)
    b = member(store, "b")  # takes the number that is free
    assert b.incarnation == 1
    with pytest.raises(LogError, match="record 3, signed by a, follows another record 2 than the one that is there"):
        run(b.read())
    replaced(store, record_key(2), second)
    assert len(run(run(Log.open(store)).read())) == 4


def test_a_reader_goes_on_at_its_place_if_it_is_still_the_same(log, store):
    a = member(store, "a")
    push(a, 0)
    run(a.read())
    place = a.view, a.tail
    push(a, 1)
    again = run(Log.open(store, place=place))
    assert [entry.sequence for entry in run(again.read())] == [3]
    assert again.view == a.view
    for data, why in ((b"other", "is another one now"), (None, "is not there any more")):
        replaced(store, record_key(2), data)
        with pytest.raises(LogError, match=f"records/0*2 {why}: it was folded here"):
            run(Log.open(store, place=place))


def test_a_place_before_the_first_record_is_that_of_run_json(log, store):
    place = View(members={}), digest(b"another run")
    with pytest.raises(LogError, match="run.json is another one now"):
        run(Log.open(store, place=place))


def test_a_newer_format_is_named_if_a_member_has_signed_it(log, store):
    a = member(store, "a")
    fields = {"format": 2, "type": "vote", "island": "a", "sequence": 2, "what": "is new", "signature": ""}
    fields["signature"] = KEYS["a"]._private.sign(records.canonical(fields)).hex()
    run(store.create(record_key(2), records.canonical(fields)))
    with pytest.raises(LogError, match="record 2, by a: format 2, written by a newer Slackline"):
        run(a.read())


def test_a_newer_format_that_nobody_has_signed_stops_nobody(log, store):
    a = member(store, "a")
    run(store.create(record_key(2), records.canonical({"format": 2, "island": "a", "signature": "00"})))
    (_, refused) = run(a.read())[-2:]
    assert refused.verdict.why.startswith("its signature is not that of a")
    assert push(a, 0).sequence == 3


@pytest.mark.parametrize("data", [b"as it IS", b"as it is, and more", b"as it", b"", None])
def test_a_payload_that_is_not_what_its_record_says_is_named(log, store, data):
    a = member(store, "a")
    (payload,) = push(a, 0, b"as it is").record.payloads
    replaced(store, payload_key(payload.digest), data)
    with pytest.raises(LogError, match=payload_key(payload.digest)):
        run(a.download(payload))


def test_a_payload_that_is_there_is_not_written_again_unless_it_is_another(log, store):
    a = member(store, "a")
    payload = run(a.upload(b"same"))
    assert run(a.upload(b"same")) == payload
    replaced(store, payload_key(payload.digest), b"not the same")
    with pytest.raises(LogError, match="has other bytes than its name says"):
        run(a.upload(b"same"))


def test_of_an_object_that_is_too_large_no_more_is_read_than_may_be():
    asked = []

    class Counting(Memory):
        def get(self, key, most):
            asked.append(most)
            data = yield from super().get(key, most)
            assert data is None or len(data) <= most
            return data

    store = Counting(time.time)
    run(Log.begin(store, RUN, LISTED, KEYS["owner"], Clock()))
    store.objects[record_key(1)] = b"x" * 10_000_000, 0.0
    log = run(Log.open(store))
    assert run(log.read())[-1].verdict.why == "it has more than 65536 bytes"
    with pytest.raises(LogError):
        store.objects[payload_key("0" * 64)] = b"x" * 10_000_000, 0.0
        run(log.download(Payload("0" * 64, 5)))
    assert max(asked) <= 1 << 20 and asked[-1] == 6


# ── a store that is away ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_store_that_is_away_is_reported_in_seconds_and_may_come_back(log, store):
    clock, chance = Clock(), Chance(Random(0), {})
    a = member(Faulty(store, chance, clock, run), "a", clock=clock)
    chance.rates = {"away": 1.0}
    for ask in (lambda: push(a, 0), lambda: run(a.read())):
        before = clock.seconds
        with pytest.raises(Away, match="no connection"):
            ask()
        assert 10 <= clock.seconds - before <= 25
    assert run(a.beat()) is False
    chance.rates = {}
    assert push(a, 0).verdict.folded


def test_heartbeats_are_five_seconds_apart(log, store):
    clock = Clock()
    a = member(store, "a", clock=clock)
    written = []
    for _ in range(40):
        written.append(run(a.beat()))
        clock.seconds += 1.0
    assert written == [n % 5 == 0 for n in range(40)]
    assert set(run(a.heartbeats())) == {"a"}


# ── a folder ─────────────────────────────────────────────────────────────────────────────────────────────────────


class Recording(Disk):
    """Notes what is asked of it; `fails` raises an error at some of it."""

    def __init__(self, fails=lambda verb, path: None):
        self.asked, self._fails = [], fails

    def __getattribute__(self, name):
        method = super().__getattribute__(name)
        if name in ("asked", "_fails") or name.startswith("__"):
            return method

        def noted(*arguments):
            self.asked.append((name, *arguments))
            if error := self._fails(name, (*arguments, "")[0]):
                raise error
            return method(*arguments)

        return noted


def folder(path: Path, fails=lambda verb, path: None) -> tuple[Folder, Recording]:
    run(Folder(path).prepare())
    disk = Recording(fails)
    return Folder(path, disk), disk


def test_bytes_are_synced_before_the_name_and_the_name_before_anybody_hears_of_it(tmp_path):
    made, disk = folder(tmp_path)
    assert run(made.create("records/1", b"one"))
    temporary = disk.asked[0][1]
    named = f"{tmp_path}/records/1"
    assert disk.asked == [
        ("write", temporary, b"one"),
        ("sync", temporary),
        ("link", temporary, named),
        ("remove", temporary),
        ("sync", f"{tmp_path}/records"),
    ]
    disk.asked.clear()
    run(made.get("records/1", 10))
    assert disk.asked == [("read", named, 0, 10), ("sync", f"{tmp_path}/records")]


def test_a_disk_calls_fsync(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}")))
    (tmp_path / "file").write_bytes(b"")
    Disk().sync(f"{tmp_path}/file")
    Disk().sync(f"{tmp_path}")
    assert synced == [f"{tmp_path}/file", str(tmp_path)]


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_file_system_without_hard_links_is_refused(tmp_path, code):
    made, _ = folder(tmp_path, lambda verb, path: OSError(code, "no") if verb == "link" else None)
    with pytest.raises(StoreError, match=r"the file system of .* has no hard links .* two writers may both win"):
        run(made.create("records/1", b"one"))
    assert not list((tmp_path / "records").iterdir())


def test_a_full_disk_leaves_nothing_and_is_waited_for(tmp_path):
    full = [OSError(errno.ENOSPC, "No space left on device")] * 3
    made, _ = folder(tmp_path, lambda verb, path: full.pop() if full and verb == "write" else None)
    with pytest.raises(Away, match="No space left on device"):
        run(made.create("records/1", b"one"))
    assert not list((tmp_path / "records").iterdir())
    log = run(Log.begin(made, RUN, LISTED, KEYS["owner"], Clock()))
    assert not full and log.view.next == 1


def test_a_name_that_could_not_be_synced_is_not_acknowledged_before_it_is(tmp_path):
    broken = []
    made, disk = folder(
        tmp_path, lambda verb, path: broken.pop() if broken and verb == "sync" and path.endswith("/records") else None
    )
    run(Log.begin(made, RUN, LISTED, KEYS["owner"], Clock()))
    a = member(made, "a")
    broken += [OSError(errno.EIO, "Input/output error")] * 3
    entry = push(a, 0)
    assert not broken and entry.sequence == 2
    assert ("sync", f"{tmp_path}/records") in disk.asked[-2:]
    assert len(run(made.list("records"))) == 3


def test_who_may_not_write_is_told_at_once(tmp_path):
    made, _ = folder(tmp_path, lambda verb, path: OSError(errno.EACCES, "Permission denied"))
    with pytest.raises(StoreError, match="Permission denied: whoever takes part must be allowed to write there"):
        run(made.create("records/1", b"one"))


def test_a_folder_that_is_gone_is_not_made_anew(tmp_path):
    with pytest.raises(StoreError, match=f"is {tmp_path}/log a log, and its disk there?"):
        run(Log.open(Folder(tmp_path / "log")))
    with pytest.raises(StoreError, match="and its disk there"):
        run(Folder(tmp_path / "log").create("records/1", b""))
    assert not (tmp_path / "log").exists()


def test_a_file_that_is_swept_while_it_is_written_is_written_again(tmp_path):
    swept = []

    def fails(verb, path):
        if verb == "link" and not swept:
            swept.append(path)
            os.unlink(path)

    made, _ = folder(tmp_path, fails)
    with pytest.raises(Away, match="somebody has removed what was being written"):
        run(made.create("records/1", b"one"))
    assert run(made.create("records/1", b"one"))


def test_a_new_log_is_there_after_a_power_cut(tmp_path, monkeypatch):
    """Every folder that is made is synced into the one above it."""
    synced = []
    monkeypatch.setattr(Disk, "sync", lambda disk, path: synced.append(Path(path)))
    run(Folder(tmp_path / "runs" / "shared").prepare())
    assert set(synced) == {tmp_path, tmp_path / "runs", tmp_path / "runs" / "shared"}


def test_what_killed_writers_have_left_is_swept(tmp_path):
    made, _ = folder(tmp_path)
    host = os.uname().nodename
    alive, dead = f".{host}-{os.getpid()}-0", f".{host}-{2**22 + 1}-0"
    elsewhere, old = ".elsewhere-1-0", ".elsewhere-2-0"
    for name in (alive, dead, elsewhere, old):
        (tmp_path / "records" / name).write_bytes(b"half")
    os.utime(tmp_path / "records" / old, (time.time() - OLD - 60,) * 2)
    run(made.create("records/1", b"one"))
    assert sorted(run(made.sweep())) == sorted([f"records/{dead}", f"records/{old}"])
    assert {path.name for path in (tmp_path / "records").iterdir()} == {alive, elsewhere, "1"}
    assert run(made.list("records")) == ["records/1"]


# ── a bucket ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def server(monkeypatch):
    """Speaks S3, as far as it is told: `answers` are the next ones, (status, code), or what is done without."""
    pytest.importorskip("obstore", reason="pip install -r requirements-islands.txt")

    class Server(ThreadingHTTPServer):
        answers, objects, asked = [], {}, []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), "ETag": '"1"', **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Last-Modified", "Sun, 29 Nov 2026 12:00:00 GMT")
            self.end_headers()
            self.wfile.write(body)

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            server.asked.append((self.command, self.path))
            status, code, stored = server.answers.pop(0) if server.answers else (200, "", True)
            if self.command == "PUT" and stored and self.path in server.objects:
                status, code = 412, "PreconditionFailed"
            elif self.command == "PUT" and stored:
                server.objects[self.path] = body
            if self.command == "GET" and status == 200 and self.path not in server.objects:
                status, code = 404, "NoSuchKey"
            if code:
                self.answer(status, f"<Error><Code>{code}</Code>\n<Message>said {SECRET}</Message></Error>".encode())
            else:
                self.answer(status, server.objects[self.path] if self.command == "GET" else b"")

        do_GET = do_PUT = handle_any

        def log_message(self, *_):
            pass

    server = Server(("127.0.0.1", 0), Handler)
    server.answers, server.objects, server.asked = [], {}, []
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": "here",
        "AWS_ALLOW_HTTP": "true", "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    yield server
    server.shutdown()
    server.server_close()


SECRET = "never-to-be-shown"
BUCKET = "s3://bucket/run"


@pytest.mark.parametrize("status, code", [(409, "ConditionalRequestConflict"), (412, "PreconditionFailed")])
def test_a_conflict_with_nothing_there_is_no_loss(server, status, code):
    server.answers = [(status, code, False)]
    log = run(Log.begin(open_store(BUCKET), RUN, LISTED, KEYS["owner"], Clock()))
    assert log.view.next == 1 and server.asked[:3] == [("PUT", "/bucket/run/run.json"), ("GET", "/bucket/run/run.json"),
                                                       ("PUT", "/bucket/run/run.json")]  # fmt: skip


def test_a_create_that_was_stored_and_answered_500_is_ours(server):
    run(Log.begin(open_store(BUCKET), RUN, LISTED, KEYS["owner"], Clock()))
    a = member(open_store(BUCKET), "a", joined=False)
    server.answers = [(500, "InternalError", True)]
    assert run(a.join()).sequence == 1
    server.answers = [(200, "", True), (500, "InternalError", True)]  # the payload, then the record
    assert push(a, 0).sequence == 2
    assert sum("records" in path for path in server.objects) == 3


@pytest.mark.parametrize(
    "status, code, remedy",
    [
        (403, "SignatureDoesNotMatch", "the secret does not belong to the key: see AWS_ACCESS_KEY_ID"),
        (403, "InvalidAccessKeyId", "this key is not known there"),
        (403, "RequestTimeTooSkewed", "the clock of this machine is off: set it"),
        (403, "AccessDenied", "this identity may not do it, or the store says so of what is not there"),
        (404, "NoSuchBucket", "create the bucket first"),
        (501, "NotImplemented", "cannot create an object only if there is none"),
    ],
)
def test_what_does_not_pass_is_said_at_once(server, status, code, remedy):
    server.answers = 9 * [(status, code, False)]
    before = time.monotonic()
    for ask in (Log.begin(open_store(BUCKET), RUN, LISTED, KEYS["owner"]), Log.open(open_store(BUCKET))):
        with pytest.raises(StoreError, match=remedy) as error:
            run(ask)
        assert code in str(error.value) and SECRET not in str(error.value)
    assert time.monotonic() - before < 2 and len(server.asked) <= 4, "no storm of retries"


def test_a_bucket_that_is_gone_is_not_taken_for_a_record_that_is_not_there(server):
    server.answers = [(404, "NoSuchBucket", False), (404, "NoSuchKey", False)]
    with pytest.raises(StoreError, match="create the bucket first"):
        run(open_store(BUCKET).get("records/1", 1))
    assert run(open_store(BUCKET).get("records/1", 1)) is None


def test_a_listing_goes_on_after_a_key_though_the_store_begins_anew(monkeypatch):
    """As Azurite does."""
    pytest.importorskip("obstore", reason="pip install -r requirements-islands.txt")

    class Anew:
        def list(self, prefix, offset):
            return iter([[{"path": f"{prefix}/{number}"} for number in (3, 1, 2)]])

    bucket = open_store("memory://")
    monkeypatch.setattr(bucket, "_small", Anew())
    assert run(bucket.list("records", "records/1")) == ["records/2", "records/3"]
    assert run(bucket.list("records", "records/3")) == []


def test_azures_word_for_it_exists_is_unknown_too(server, monkeypatch):
    from obstore.exceptions import PreconditionError

    class Refusing:
        def put(self, key, data, mode):
            raise PreconditionError("412")

    bucket = open_store(BUCKET)
    monkeypatch.setattr(bucket, "_small", Refusing())
    assert run(bucket.create("records/1", b"one")) is False


def test_a_refused_connection_is_away(server, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    before = time.monotonic()
    with pytest.raises(Away, match=f"{BUCKET}/records/1: no connection"):
        run(open_store(BUCKET).create("records/1", b""))
    assert time.monotonic() - before < 2


def test_an_endpoint_without_tls_must_be_allowed(server, monkeypatch):
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(StoreError, match="an endpoint of http:// needs AWS_ALLOW_HTTP=true"):
        run(open_store(BUCKET).get("records/1", 1))


def test_without_obstore_a_bucket_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.startswith("obstore"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(StoreError, match=r"needs the package obstore: `pip install -r requirements-islands.txt`"):
        open_store(BUCKET)


def test_an_address_that_is_none_is_refused():
    with pytest.raises(UsageError, match="ftp://host/log is no folder, and begins with none of s3://, gs://, az://"):
        open_store("ftp://user:word@host/log?token=1")


def test_what_is_secret_is_not_said(monkeypatch):
    monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "sv=2026&sig=abc")
    text = "https://me:word@host/a?X-Amz-Signature=123 failed\nwith sv=2026&sig=abc"
    assert redacted(text) == "https://host/a failed with …"


# ── which records count ──────────────────────────────────────────────────────────────────────────────────────────


def said(*lines: dict) -> tuple[View, list[str]]:
    """The view after some records, and why each was dropped."""
    view, why = View(members=LISTED), []
    for line in lines:
        record = Record(**{"island": "a", "incarnation": 1, "nonce": "0" * 32, "clock": 0, **line})
        view, verdict = view.after(record, members=line.pop("members", None))
        why.append(verdict.why)
    return view, why


JOINED = {"type": JOIN}
OTHER = {"island": "b"}


@pytest.mark.parametrize(
    "lines, why",
    [
        ([{"type": PUSH}], "a has not joined"),
        ([JOINED, {"type": PUSH, "clock": 1}], "it is round 1 of a, whose next is 0"),
        ([JOINED, {"type": PUSH}, {"type": PUSH}], "round 0 of a is folded already"),
        ([JOINED, {"type": PUSH, "base": 1}], "its base is version 1, and the version before it is 0"),
        ([JOINED, {"type": PUSH, "incarnation": 2}], "it is of incarnation 2 of a, whose newest is 1"),
        ([JOINED, JOINED], "it is incarnation 1 of a, whose next is 2"),
        ([{"type": JOIN, "incarnation": 3}], "it is incarnation 3 of a, whose next is 1"),
        ([JOINED, {"type": LEAVE}, {"type": PUSH}], "a is not live"),
        ([JOINED, {"type": PUSH}, {"type": JOIN, "incarnation": 2}], "it would push round 0: a has pushed .* 1, and"),
        ([JOINED, {"type": PUSH}, JOINED | OTHER], "it would push round 0: b has pushed those below 0, and all .* 1"),
        ([JOINED, JOINED | OTHER, {"type": PUSH}, JOINED | {"incarnation": 2}], "it would push round 0: a .* below 1,"),
        ([JOINED, {"type": EXPIRE, "target": "b"}], "b is not live, and cannot expire"),
        ([JOINED, JOINED | OTHER, {"type": LEAVE} | OTHER, {"type": EXPIRE, "target": "b", "base": 2}], "b is not"),
        ([JOINED, JOINED | OTHER, {"type": EXPIRE, "target": "b", "base": 0}], "b has written record 1, after .*0"),
        ([JOINED | OTHER, {"type": EXPIRE, "target": "b", "base": 0}], "a has not joined"),
        ([{"type": SNAPSHOT}], "it names no manifest"),
    ],
)  # fmt: skip
def test_a_record_that_does_not_count_is_dropped_with_its_reason(lines, why):
    before, _ = said(*lines[:-1])
    view, reasons = said(*lines)
    assert reasons[:-1] == [""] * (len(lines) - 1)
    assert re.match(why, reasons[-1])
    assert (view.islands, view.version, view.complete) == (before.islands, before.version, before.complete)
    assert view.next == before.next + 1


def test_a_round_is_complete_when_all_who_are_live_have_pushed_it():
    lines = [JOINED, JOINED | OTHER, {"type": PUSH}, {"type": PUSH, "clock": 1}, {"type": PUSH} | OTHER]
    assert [said(*lines[:n])[0].live_minimum() for n in range(6)] == [0, 0, 0, 0, 0, 1]
    expired, _ = said(*lines[:4], {"type": EXPIRE, "target": "b", "base": 3, "clock": 2})
    assert expired.live_minimum() == 2 and list(expired.live()) == ["a"]
    gone, _ = said(*lines, {"type": LEAVE, "clock": 2}, {"type": LEAVE, "clock": 1} | OTHER)
    assert gone.live_minimum() == 1 and not gone.live()


def test_who_is_taken_from_the_list_is_not_live_and_holds_nobody_back():
    view, _ = said(JOINED, JOINED | OTHER, {"type": PUSH})
    record = Record(type=MEMBERS, island="owner", incarnation=0, nonce="0" * 32, clock=0)
    for members in (
        {"a": LISTED["a"]},
        LISTED | {"b": Member("", revoked=True)},
        LISTED | {"b": Member("", "read")},
    ):
        after, verdict = view.after(record, members=members)
        assert verdict.folded and list(after.live()) == ["a"] and after.complete == 1


def test_a_snapshot_is_confirmed_by_all_who_find_the_same():
    snapshot = {"type": SNAPSHOT, "manifest": "1" * 64, "base": 1}
    view, why = said(JOINED, JOINED | OTHER, snapshot, snapshot | OTHER, snapshot | {"manifest": "2" * 64})
    assert not any(why)
    assert view.snapshots == {1: {"1" * 64: frozenset("ab"), "2" * 64: frozenset("a")}}


def test_what_is_refused_takes_its_number_and_nothing_else():
    view, _ = said(JOINED)
    after, verdict = view.after(None, "it is not signed by a")
    assert verdict.why == "it is not signed by a" and not verdict.folded
    assert after == view.__class__(view.islands, view.members, view.version, 2, view.complete, view.snapshots)

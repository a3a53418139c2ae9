"""Members of a real log: what they take, when they wait, and what becomes of them when the store or another is gone."""

import errno
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import crew
import numpy as np
import pytest

pytest.importorskip("cryptography", reason="pip install -r requirements-islands.txt")

from islands import keyring, presence, replay, snapshot, status, truncate
from islands import log as logs
from islands import member as members
from islands.folder import Folder
from islands.follow import Follower
from islands.member import Member, Push
from islands.reader import Reader, record_key
from islands.record import EXPIRE
from islands.state import State
from islands.store import Away, Call, Routine, run
from islands.view import Island, View
from runtime.config import RunError, UsageError


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv(keyring.FOLDER, str(tmp_path / "keys"))
    monkeypatch.setattr(members, "IDLE", 0.02)
    monkeypatch.setattr(logs, "BEAT", 0.1)
    monkeypatch.setattr(members, "PATIENCE", 0.3)


class Gone(Folder):
    """A folder whose machine may be away, and that counts what is read."""

    away = False

    def __init__(self, root):
        super().__init__(root)
        self.got: list[str] = []

    def _asked(self, routine):
        if self.away:
            yield Call("asked", lambda: None)
            raise Away("nobody answers")
        return (yield from routine)

    def create(self, key, data):
        return self._asked(super().create(key, data))

    def get_range(self, key, first, count):
        self.got.append(key)
        return self._asked(super().get_range(key, first, count))

    def put(self, key, data):
        return self._asked(super().put(key, data))

    def list(self, prefix, after=""):
        return self._asked(super().list(prefix, after))


@pytest.fixture
def store(tmp_path):
    return Gone(tmp_path / "log")


@pytest.fixture
def start(store):
    """Starts members, and ends them."""
    begun: list[Member] = []

    def one(name: str, clock: int = 0, at: Any = store) -> Member:
        begun.append(Member.start(at, name, clock, said.append))
        return begun[-1]

    said: list[str] = []
    one.said = said
    yield one
    store.away = False
    for each in begun:
        each.end(patience=10)
        assert not each._thread.is_alive()


EACH = {"island__merge": "quorum", "island__quorum": 1}  # of which every push is applied as a whole


def ones(x: float = 1.0) -> dict[str, np.ndarray]:
    return {name: np.full(size, x, np.float32) for name, size in crew.SIZES.items()}


def same(a, b):
    for name in crew.SIZES:
        np.testing.assert_array_equal(a[name], b[name])


def less(a, x: float):
    return {name: value - np.float32(x) for name, value in a.items()}


def test_one_island_reads_its_own_pushes(store, start):
    first = crew.begin(store)
    a = start("a")
    version, params = a.take()
    same(params, first)
    for i in range(3):
        crew.push(a, ones(0.5), version)
        version, params = a.take()
        same(params, less(first, 0.5 * (i + 1)))
        assert version == a.follower.view.islands["a"].version


def test_with_staleness_0_a_round_is_over_when_all_have_pushed_it(store, start):
    first = crew.begin(store, island__merge="average", island__staleness=0)
    a, b = start("a"), start("b")

    def train(member: Member, x: float) -> list[dict[str, np.ndarray]]:
        taken = []
        for _ in range(4):
            version, params = member.take()
            taken.append(params)
            crew.push(member, ones(x), version)
        return [*taken, member.take()[1]]

    with ThreadPoolExecutor(2) as pool:
        of_a, of_b = pool.map(train, (a, b), (1.0, 3.0))
    for i, (x, y) in enumerate(zip(of_a, of_b, strict=True)):
        same(x, less(first, 2.0 * i))
        same(x, y)


def test_nobody_runs_ahead_of_the_staleness_bound(store, start):
    crew.begin(store, island__staleness=1)
    a, b = start("a"), start("b")
    for _ in range(2):
        crew.push(a, ones(), a.take()[0])
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(a.take)
        time.sleep(0.3)
        assert not waiting.done()
        crew.push(b, ones(), b.take()[0])
        waiting.result(timeout=10)
    assert a.clock - a.follower.view.live_minimum() == 1


def test_a_log_refuses_who_runs_ahead_all_the_same(store, start):
    """A member that does not keep to the bound."""
    crew.begin(store, island__staleness=0)
    a = start("a")
    start("b")
    a._may_begin = lambda: not a._pushes
    crew.push(a, ones(), a.take()[0])
    crew.push(a, ones(), a.take()[0])
    with pytest.raises(RunError, match="round 1 is more than 0 ahead of 0, the slowest island's"):
        a.take()


def test_what_the_rules_of_the_run_refuse_counts_for_nobody_though_it_is_written_all_the_same(store, start):
    """By a member whose own program would let it pass."""
    first = crew.begin(store, **EACH, island__staleness=0)
    a, b = start("a"), start("b")
    assert stopped(a)
    a.log.refusal = lambda view, record: ""
    blobs = crew.encoded(a, ones())
    for clock in range(2):
        run(a.log.push(blobs, clock=clock, tokens=1, manifest=logs.digest(blobs[-1])))
    wait(lambda: b.follower.view.next == a.log.view.next)
    assert [entry.verdict.folded for entry in entries(store)[-2:]] == [True, False]
    same({leaf: b.follower.state.arrays[f"params/{leaf}"] for leaf in first}, less(first, 1.0))
    assert "round 1 is more than 0 ahead of 0" in status.of(store)["refused"][0]["reason"]


def test_a_store_that_is_away_costs_nothing(store, start):
    """Rounds go on from the newest version, wait in memory, and are folded once, in their order."""
    first = crew.begin(store)
    a = start("a")
    version, _ = a.take()
    store.away = True
    for _ in range(3):
        crew.push(a, ones(), version)
        again, params = a.take()
        assert again == version
        same(params, first)
    assert len(a._pushes) == 3 and "going on without it" in start.said[-1]
    store.away = False
    wait(lambda: not a._pushes)
    same(a.take()[1], less(first, 3.0))
    assert [entry.record.clock for entry in entries(store) if entry.record.type == "push"] == [0, 1, 2]
    wait(lambda: "the store is back" in start.said[-1])


@pytest.mark.slow
def test_who_leaves_while_the_store_is_away_leaves_when_it_is_back(store, start):
    crew.begin(store)
    a = start("a")
    a.take()
    store.away = True
    with ThreadPoolExecutor(1) as pool:
        leaving = pool.submit(a.end)
        time.sleep(0.5)
        assert not leaving.done()
        store.away = False
        leaving.result(timeout=10)
    a.check()
    assert entries(store)[-1].record.type == "leave"


@pytest.mark.slow
def test_a_push_whose_answer_is_lost_before_the_store_goes_away_counts_once(store, start, monkeypatch):
    first = crew.begin(store, **EACH)
    a = start("a")
    version, _ = a.take()

    def lost(key, data):
        yield from Folder.create(store, key, data)
        store.away = key.startswith("records/")
        if store.away:
            raise Away("the answer is lost")
        return True

    monkeypatch.setattr(store, "create", lost)
    crew.push(a, ones(), version)
    wait(lambda: a._away_since)
    monkeypatch.undo()
    store.away = False
    wait(lambda: not a._pushes)
    same(a.take()[1], less(first, 1.0))
    assert [entry.record.clock for entry in entries(store) if entry.record.type == "push"] == [0]


def test_a_full_disk_in_the_middle_of_a_push_costs_nothing(store, start, monkeypatch):
    """Half of a payload is written; nothing of it is left, and when there is room again the push counts once."""
    first = crew.begin(store, **EACH)
    a = start("a")
    version, _ = a.take()

    def full(path, data):
        Path(path).write_bytes(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(store._disk, "write", full)
    crew.push(a, ones(), version)
    wait(lambda: a._away_since)
    assert "No space left on device" in start.said[-1]
    assert not list((store.root / "payloads").glob(".*"))
    monkeypatch.undo()
    wait(lambda: not a._pushes)
    same(a.take()[1], less(first, 1.0))
    assert [entry.record.clock for entry in entries(store) if entry.record.type == "push"] == [0]


@pytest.mark.slow
def test_away_the_staleness_bound_holds(store, start):
    crew.begin(store, island__staleness=1)
    a, b = start("a"), start("b")
    version, _ = a.take()
    store.away = True
    crew.push(a, ones(), version)
    a.take()  # round 1, and b has pushed none
    crew.push(a, ones(), version)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(a.take)
        time.sleep(0.8)
        assert not waiting.done()
        store.away = False
        crew.push(b, ones(), b.take()[0])
        waiting.result(timeout=10)


def test_by_a_rule_that_pins_an_island_begins_at_its_own_version(store, start):
    crew.begin(store, island__merge="compensated")
    a, b = start("a"), start("b")
    own, _ = a.take()
    crew.push(b, ones(), b.take()[0])
    b.take()
    wait(lambda: a.follower.view.islands["b"].clock == 1)
    version, params = a.take()
    assert version == own < a.follower.view.version
    same(params, crew.params())
    crew.push(a, ones(), version)
    assert a.take()[0] == a.follower.view.islands["a"].version


def test_an_island_that_was_taken_to_be_gone_joins_again_and_loses_nothing(store, start):
    first = crew.begin(store, **EACH)
    a = start("a")
    version, _ = a.take()
    b = start("b")
    assert stopped(b)
    run(b.log.expire("a", {}))
    crew.push(a, ones(), version)
    same(a.take()[1], less(first, 1.0))
    assert a.log.incarnation == 2 and "a was taken to be gone, and joins again" in start.said


def stopped(member: Member) -> bool:
    """Whose thread does nothing more, so that a test may use its log."""
    member.end(leave=False)
    return not member._thread.is_alive()


def test_a_silent_island_is_taken_to_be_gone(store, start, monkeypatch):
    crew.begin(store, island__staleness=0)
    a, b = start("a"), start("b")
    assert stopped(b)
    version, _ = a.take()
    crew.push(a, ones(), version)
    monkeypatch.setattr(presence, "EXPIRY", 0.2)
    monkeypatch.setattr(presence, "LOOK", 0.05)
    a._lookout._next = a.log._next_beat = 0.0
    time.sleep(0.3)
    a.take()  # waits until b does not hold it back any more
    (expiry,) = [entry.record for entry in entries(store) if entry.record.type == EXPIRE]
    assert expiry.target == "b" and expiry.number("own") - expiry.number("theirs") > 0.2


def test_a_look_asks_after_one_island_and_soon_after_each(monkeypatch):
    """Of those that are silent: who has written a record since the look before is there."""
    monkeypatch.setattr(presence, "LOOK", 0.0)
    islands, asked = {name: Island(1, 0, True, 0, last=0) for name in "abcde"}, []

    class Store:
        def last_modified(self, key: str) -> Routine[float]:
            asked.append(key.partition("/")[2])
            return 100.0
            yield

    log = SimpleNamespace(view=View(islands), store=Store(), island="c")
    lookout = presence.Lookout(log, print)
    lookout.look()
    assert not asked, "all may have written just now"
    for _ in range(4):
        lookout.look()
    assert asked[::2] == ["c"] * 4 and asked[1::2] == ["d", "e", "a", "b"]
    islands["d"] = replace(islands["d"], last=7)
    lookout.look()
    assert asked[-1] == "e"


@pytest.mark.slow
def test_two_processes_of_one_name(store, start, monkeypatch):
    crew.begin(store)
    monkeypatch.setattr(presence, "BEAT", 0.2)
    monkeypatch.setattr(logs, "BEAT", 0.2)
    start("a")
    monkeypatch.setattr(presence, "_has_died", lambda beat: False)
    with pytest.raises(UsageError, match="island.name=a: another process takes part by this name"):
        start("a")


def test_a_process_that_has_died_is_followed_at_once(store, start):
    crew.begin(store)
    a = start("a")
    assert stopped(a)
    key = "heartbeats/a"
    said = json.loads(run(store.get(key, 1 << 16))) | {"pid": 2**30}
    run(store.put(key, json.dumps(said).encode()))
    began = time.monotonic()
    assert start("a").log.incarnation == 2 and time.monotonic() - began < 3


def test_who_is_followed_by_another_process_ends(store, start, monkeypatch):
    """It was away so long that somebody has started it anew, and it wakes up."""
    crew.begin(store)
    a = start("a")
    version, _ = a.take()
    monkeypatch.setattr(presence, "check_alone", lambda log, name, say: None)
    start("a")
    crew.push(a, ones(), version)
    with pytest.raises(RunError, match="another process has joined as a: this one ends"):
        a.take()
    assert not [entry for entry in entries(store) if entry.record.type == "push"]


def test_a_key_that_is_revoked_while_it_works(store, start):
    first = crew.begin(store)
    a, b = start("a"), start("b")
    version, _ = a.take()
    keyring.revoke(store, "a")
    crew.push(a, ones(), version)
    with pytest.raises(RunError, match="the key of a is revoked"):
        a.take()
    same(b.take()[1], first)
    with pytest.raises(UsageError, match="island.name=a: its key is revoked"):
        start("a")


@pytest.mark.parametrize("where", ["of the run", "of the member"])
def test_a_push_beyond_its_norm_bound_counts_as_zeros_for_all(where, store, start):
    first = crew.begin(store, **EACH, **({"island__norm_bound": 50.0} if where == "of the run" else {}))
    if where == "of the member":
        keyring.allow(store, "a", norm_bound=50.0)
    a, b = start("a"), start("b")
    crew.push(a, ones(0.5), a.take()[0])  # √5003 / 2
    same(a.take()[1], less(first, 0.5))
    crew.push(a, ones(0.8), a.take()[0])
    same(a.take()[1], less(first, 0.5))
    wait(lambda: b.follower.view.islands["a"].clock == 2)
    same(b.take()[1], less(first, 0.5))
    assert any("counts as zeros: its norm is 56.58" in line for line in start.said)
    b.end()
    (told,) = status.of(store)["refused"]
    assert told["island"] == "a" and "folded as zeros: its norm is 56.58" in told["reason"]


def test_a_payload_that_is_none_counts_as_zeros(store, start):
    first = crew.begin(store)
    a = start("a")
    version, _ = a.take()
    *blobs, manifest = crew.encoded(a, ones())
    a.push(Push([*blobs, manifest.replace(b'"format":1', b'"format":7')], version, 2, 100))
    a.push(Push([], version, 2, 100))  # a round that was left out
    twice = crew.encoded(a, ones())
    a.push(Push([*twice, twice[-1]], version, 2, 100))
    same(a.take()[1], first)
    assert [entry.record.clock for entry in entries(store) if entry.record.type == "push"] == [0, 1, 2]
    assert "it names a payload twice" in start.said[-1]


def test_a_push_with_one_bad_piece_counts_as_zeros_as_a_whole(store, start):
    """What is bad lies behind what is good: nothing of it may have been folded by then."""
    first = crew.begin(store, **EACH)
    a, b = start("a"), start("b")
    bad = ones()
    bad["w"][-1] = np.inf
    blob, manifest = (bytearray(data) for data in crew.encoded(a, ones()))
    at = blob.index(np.ones(5000, "<f4").tobytes()) + 4 * 4999
    blob[at : at + 4] = np.float32(np.inf).tobytes()
    said = json.loads(manifest)
    for leaf in said["leaves"].values():
        for piece in leaf["pieces"]:
            piece[5] = logs.digest(bytes(blob[piece[3] : piece[3] + piece[4]]))
            piece[2] = logs.digest(bytes(blob))
    a.push(Push([bytes(blob), logs.records.canonical(said)], a.take()[0], 2, 100))
    same(a.take()[1], first)
    wait(lambda: b.follower.view.islands["a"].clock == 1)
    same(b.take()[1], first)
    assert any("record 5, of a, counts as zeros: " in line for line in start.said), start.said


def test_names_that_may_not_take_part(store, start, monkeypatch, tmp_path):
    crew.begin(store)
    for name, why in (("owner", "name of the run's owner"), ("A b", "is no name of an island")):
        with pytest.raises(UsageError, match=why):
            start(name)
    monkeypatch.setenv(keyring.FOLDER, str(tmp_path / "elsewhere"))
    with pytest.raises(UsageError, match="python -m islands keys new LOG c"):
        start("c")
    owner = run(Reader.open(store)).run.owner
    key = keyring.new(owner, "c")
    with pytest.raises(UsageError, match=f"keys allow LOG c --key={key.public}"):
        start("c")
    with pytest.raises(UsageError, match="only the owner of this run may do that"):
        keyring.allow(store, "c")
    monkeypatch.setenv(keyring.FOLDER, str(tmp_path / "keys"))
    keyring.allow(store, "c", key.public)
    monkeypatch.setenv(keyring.FOLDER, str(tmp_path / "elsewhere"))
    start("c")


def test_names_that_are_allowed_at_the_same_time_are_all_allowed(store):
    crew.begin(store)
    names = [f"i{i}" for i in range(6)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda name: keyring.allow(Gone(store.root), name), names))
    reader = run(Reader.open(store))
    run(reader.read())
    assert set(names) < set(reader.view.members)


# ── snapshots ────────────────────────────────────────────────────────────────────────────────────────────────────


def trained(store, start, rounds: int, names: str = "ab") -> list[Member]:
    crew_of = [start(name) for name in names]
    for i in range(rounds):
        for member in crew_of:
            crew.push(member, ones(0.25 * i), member.take()[0])
            member.take()
    for member in crew_of:
        wait(lambda member=member: member.follower.view.next == crew_of[-1].log.view.next)
    return crew_of


def test_every_island_takes_the_same_snapshots_and_a_second_one_confirms(store, start):
    crew.begin(store, snapshots=4, sync__outer__optimizer="nesterov")
    a, b = trained(store, start, 6)
    wait(lambda: a.follower.view.snapshots.keys() >= {4, 8, 12})
    for version, of_version in a.follower.view.snapshots.items():
        wait(lambda v=version: all(names == {"a", "b"} for names in a.follower.view.snapshots[v].values()))
        assert len(of_version) == 1
    confirmations = [entry.record.base for entry in entries(store) if entry.record.type == "snapshot"]
    assert all(confirmations.count(version) == 2 for version in confirmations)
    same_state(a.follower.state, b.follower.state)
    a.end(), b.end()
    folded = whole(store).state.digest()
    newest = max(a.follower.view.snapshots)
    pushes = [entry for entry in entries(store) if entry.record.type == "push"]
    early, late = ({p.digest for each in pushes if (each.sequence > newest) == after for p in each.record.payloads}
                   for after in (False, True))  # fmt: skip
    assert early - late
    for name in early - late:
        (store.root / "payloads" / name).unlink()
    joiner = run(Follower.open(store))
    while run(joiner.advance()):
        pass
    assert (joiner.began, joiner.state.digest()) == (newest, folded)


def same_state(a: State, b: State):
    assert a.digest() == b.digest()


def whole(store) -> Follower:
    found = run(Follower.open(store, from_oldest=True))
    while run(found.advance()):
        pass
    return found


def test_a_poisoned_snapshot_is_told_and_nobody_takes_it(store, start, monkeypatch):
    crew.begin(store, snapshots=4)

    def poisoned(follower):
        altered = State({name: x + np.float32(1) for name, x in follower.state.arrays.items()}, follower.state.numbers)
        follower.due = follower.due._replace(manifest=snapshot.manifest(altered, follower.view, follower.tail, None))
        blobs = []
        for chunk in snapshot.chunks(altered, None):
            blobs.append((yield from follower.log.upload(chunk)))
        yield from follower.log.upload(follower.due.manifest)
        return snapshot.place(follower.due.version, follower.due.manifest, blobs)

    monkeypatch.setattr(Follower, "store_snapshot", poisoned)
    a, b = trained(store, start, 4)
    wait(lambda: any("one of the two folds is wrong" in line for line in start.said))
    a.end(), b.end()
    assert any("a fork" in each["reason"] for each in status.of(store)["refused"])
    joiner = run(Follower.open(store))
    assert joiner.began == -1
    found = replay.of(store, None, True, print)
    assert found.differs and "one of the two folds is wrong" in found.wrong and False in found.snapshots.values()


# ── encrypted payloads ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_an_encrypted_run_is_folded_snapshotted_joined_and_truncated(store, start, monkeypatch):
    crew.begin(store, snapshots=4, encrypt=True, sync__codec="int8", sync__outer__optimizer="nesterov")
    for member in trained(store, start, 6):
        member.end()
    plain = np.concatenate([x.reshape(-1) for x in crew.params().values()]).tobytes()
    stored = b"".join(file.read_bytes() for file in (store.root / "payloads").iterdir())
    assert plain[:64] not in stored and plain[-64:] not in stored and b'"leaves"' not in stored
    before = replay.of(store, None, True, print)
    assert not before.differs and before.snapshots
    truncate.before(store, 8, print)
    assert replay.of(store, None, True, print).params_digest == before.params_digest
    assert start("c").follower.began > 0
    given = run(Reader.open(store)).run
    keyring.payload_key(given).rename(keyring.payload_key(given).with_suffix(".away"))
    assert status.of(store)["version"] > 0  # which needs no parameters
    with pytest.raises(UsageError, match="the payloads of this run are encrypted: copy the file"):
        start("d")


# ── replay ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_flipped_bit_in_any_stored_object_is_named(store, start):
    crew.begin(store, snapshots=5, sync__codec="int8")
    for member in trained(store, start, 3):
        member.end()
    assert not replay.of(store, None, True, print).differs
    rng = np.random.default_rng(0)
    files = sorted(each for folder in ("records", "payloads") for each in (store.root / folder).iterdir())
    for file in [store.root / "run.json", *files]:
        data = file.read_bytes()
        place = int(rng.integers(len(data)))
        file.write_bytes(data[:place] + bytes([data[place] ^ 1 << int(rng.integers(8))]) + data[place + 1 :])
        name = (
            file.name if file.parent.name == "payloads" else str(int(file.stem)) if file.stem != "run" else "run.json"
        )
        try:
            found = replay.of(store, None, True, print)
            assert name in found.wrong + str(found.refused), file
            assert found.differs or file == files[-1], file
        except UsageError as error:
            assert file.name == "run.json" and "run.json" in str(error)
        file.write_bytes(data)
    assert not replay.of(store, None, True, print).differs


def test_a_replay_ends_at_the_version_that_is_asked_for(store, start):
    crew.begin(store)
    (a,) = trained(store, start, 4, "a")
    at = a.follower.view.version
    a.end()
    found = replay.of(store, at, False, print)
    assert (found.version, found.params_digest) == (at, replay.params_digest(a.follower.state))
    with pytest.raises(UsageError, match="--until=99: the log ends at version"):
        replay.of(store, 99, False, print)


def entries(store) -> list[Any]:
    return run(run(Reader.open(store)).read())


def wait(true, seconds: float = 10.0):
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.01)


# ── truncating ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_truncated_log_goes_on_from_its_snapshot(store, start):
    crew.begin(store, snapshots=4, sync__outer__optimizer="nesterov")
    for member in trained(store, start, 6):
        member.end()
    before = replay.of(store, None, True, print)
    with pytest.raises(UsageError, match="--before=3: there is no snapshot of a version up to 3"):
        truncate.before(store, 3, print)
    said: list[str] = []
    truncate.before(store, 9, said.append)
    assert "the log begins with version 8" in said[-1]
    assert not (store.root / record_key(7)).exists() and (store.root / record_key(8)).exists()
    left = {each.name for each in (store.root / "payloads").iterdir()}
    after = replay.of(store, None, True, said.append)
    assert (after.params_digest, after.began, after.differs) == (before.params_digest, 8, False)
    assert "the log is truncated: beginning with the snapshot of version 8" in said
    named = {p.digest for entry in run(run(snapshot.begin(store, Reader)).read()) for p in entry.record.payloads}
    assert left == named | set(of_list(store)), "a payload is left that nothing names"
    c = start("c")
    assert c.follower.view.islands["c"].live and status.of(store)["oldest_replayable"] == 8
    with pytest.raises(UsageError, match="--until=5: the log is truncated, and its oldest version is 8"):
        replay.of(store, 5, False, print)


def of_list(store) -> list[str]:
    """What the record of the version that the log begins with names."""
    first = min((store.root / "records").iterdir())
    return [payload["digest"] for payload in json.loads(first.read_bytes())["payloads"]]


@pytest.mark.slow
def test_nothing_is_removed_that_somebody_still_reads(store, start):
    crew.begin(store, snapshots=4)
    members_of = trained(store, start, 6)
    for member in members_of:
        member.end()
    said = json.loads(run(store.get("heartbeats/b", 1 << 16))) | {"version": 6}
    run(store.put("heartbeats/b", logs.records.canonical(said)))
    files = sorted(store.root.rglob("*"))
    with pytest.raises(UsageError, match="b has read up to version 6, and still needs what comes after it"):
        truncate.before(store, 8, print)
    assert set(store.root.rglob("*")) - set(files) <= {store.root / "heartbeats" / "owner"}
    truncate.before(store, 4, print)


@pytest.mark.slow
def test_only_the_owner_truncates(store, start, monkeypatch, tmp_path):
    crew.begin(store, snapshots=4)
    for member in trained(store, start, 3):
        member.end()
    monkeypatch.setenv(keyring.FOLDER, str(tmp_path / "elsewhere"))
    with pytest.raises(UsageError, match="only the owner of this run may do that"):
        truncate.before(store, 4, print)

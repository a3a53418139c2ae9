"""The log while stores answer wrongly, processes die and the power is cut: islands/faulty.py, tests/islanders.py."""

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from random import Random

import helpers
import islanders
import pytest

from islands import trust
from islands.faulty import FAULTS, KINDS, VERBS, Chance, Faulty, UnsyncedDisk
from islands.folder import Folder
from islands.log import Log, record_key
from islands.record import LIMIT, PUSH, Payload, digest
from islands.schedule import Memory, Schedule
from islands.store import Away, Call, Patient, call, open_store, run
from islands.view import View
from runtime.config import UsageError

# ── whatever goes wrong, the invariants of tests/islanders.py hold ───────────────────────────────────────────────


def played(seeds) -> Counter:
    """How often each fault has hit each await."""
    hits: Counter = Counter()
    for seed in seeds:
        try:
            hits += islanders.play(Random(seed)).chance.hits
        except islanders.Broken as error:
            raise AssertionError(f"schedule {seed}: {error}") from error
    return hits


def test_a_hundred_schedules_keep_every_invariant():
    hits = played(range(100))
    assert {fault for fault, _ in hits} == set(FAULTS)


def awaits(verbs: str, *kinds: str) -> set[str]:
    return {f"{verb} {kind}" for verb in verbs.split(", ") for kind in kinds}


ASKED = (
    awaits("create", "records", "payloads")
    | awaits("get", "run.json", "records", "payloads")
    | awaits("list", "records", "heartbeats")
    | awaits("put, modified", "heartbeats")
)
ON_A_DISK = (
    awaits("write, sync, link, remove", "records", "payloads")
    | awaits("read, sync names", "run.json", "records", "payloads")
    | awaits("list", "records", "payloads", "heartbeats")
    | awaits("write, replace, modified", "heartbeats")
)
BESIDES = {"sleep", "now"} | awaits("wait", *KINDS)
CREATED = awaits("create", "records", "payloads")
WHERE = {  # every fault, and every await that it can hit
    "response lost": CREATED,
    "error after success": CREATED,
    "conflict": CREATED,
    "late": CREATED | {"put heartbeats"},
    "duplicate": CREATED,
    "away": ASKED,
    "slow": ASKED,
    "stale list": awaits("list", "records", "heartbeats"),
    "crash": ASKED | ON_A_DISK | BESIDES,
    "power cut": ON_A_DISK | BESIDES,
    "clock skew": {"now"},
}


@pytest.mark.prove
def test_ten_thousand_schedules_in_which_every_fault_hits_every_await(capsys):
    hits = played(range(10_000))
    with capsys.disabled():
        for (fault, where), times in sorted(hits.items()):
            print(f"{fault:20} {where:20} {times:7}")
    assert set(hits) == {(fault, where) for fault, places in WHERE.items() for where in places}
    assert min(hits.values()) >= 20


@pytest.mark.slow
def test_hypothesis_looks_for_the_fewest_faults_that_break_one():
    hypothesis = pytest.importorskip("hypothesis", reason="pip install -r requirements-prove.txt")
    st = hypothesis.strategies
    often = {fault: st.sampled_from([0.0, rate, 3 * rate]) for fault, rate in islanders.RATES.items()}

    @hypothesis.settings(max_examples=1000, deadline=None, derandomize=True, database=None)
    @hypothesis.given(st.integers(0, 2**32), st.fixed_dictionaries(often))
    def schedule(seed, rates):
        islanders.play(Random(seed), rates | {"nothing": 0.0})

    schedule()


def test_the_same_seed_is_the_same_run():
    def written(seed: int) -> list[tuple]:
        records = [entry.record for _, entry in sorted(islanders.play(Random(seed)).truth.items())]
        return [(r.type, r.island, r.clock, r.base, r.nonce) for r in records[1:]]  # the owner's is drawn elsewhere

    assert written(7) == written(7)
    assert written(7) != written(8)


def test_a_schedule_has_three_islands_twenty_records_and_three_faults():
    for seed in range(20):
        world = islanders.play(Random(seed))
        assert {entry.island for entry in world.truth.values()} >= set(islanders.NAMES)
        assert len(world.truth) >= 20 and world.chance.hits.total() >= 3


# ── what is taken out is noticed ─────────────────────────────────────────────────────────────────────────────────

ENOUGH = 2000  # schedules


def found(**options) -> str:
    """Which invariant breaks first."""
    for seed in range(ENOUGH):
        try:
            islanders.play(Random(seed), **options)
        except islanders.Broken as error:
            return str(error)
    raise AssertionError(f"nothing was noticed in {ENOUGH} schedules")


def test_that_any_answer_is_taken_for_success(monkeypatch):
    def believing(self, key, data, most):
        with contextlib.suppress(Away):
            yield from self.store.create(key, data)
        return data

    monkeypatch.setattr(Patient, "create", believing)
    assert "invariant" in found()


def test_that_it_exists_is_taken_for_lost(monkeypatch):
    won = set()

    class Losing(Patient):
        def create(self, key, data, most):
            if (yield from self.store.create(key, data)):
                won.add(digest(data))
                return data
            return (yield from super().create(key, data, most))

    class NotSettled(Log):
        def _is_mine(self, record):
            return super()._is_mine(record) and digest(record.encode()) in won

    monkeypatch.setattr("islands.reader.Patient", Losing)
    assert "invariant 9" in found(log=NotSettled)


def test_that_the_bytes_of_a_record_are_not_synced():
    class Disk(UnsyncedDisk):
        def sync(self, path):
            if path in self._folders or "/records/" not in path:
                super().sync(path)

    assert "invariant" in found(disk=Disk)


def test_that_the_name_of_a_record_is_not_synced():
    class Disk(UnsyncedDisk):
        def sync(self, path):
            if not path.endswith("/records"):
                super().sync(path)

    assert "invariant" in found(disk=Disk)


def test_that_a_reader_makes_use_of_what_is_not_synced(monkeypatch):
    def reading(self, key, first, count):
        try:
            return (yield call("read", key, self._disk.read, self._path(key), first, count))
        except FileNotFoundError:
            return None

    monkeypatch.setattr(Folder, "get_range", reading)
    assert "invariant 3" in found(rates={"power cut": 0.05})


def test_that_a_number_is_reserved_before_the_payload_is_there():
    class Reserving(Log):
        def push(self, blobs, **fields):
            payloads = tuple(Payload(digest(blob), len(blob)) for blob in blobs)
            entry = yield from self.append(self.draft(PUSH, payloads=payloads, **fields))
            for blob in blobs:
                yield from self.upload(blob)
            return entry

    assert "is not there: payloads are written before" in found(log=Reserving)


def test_that_a_listing_is_trusted():
    class Listing(Log):
        def read(self):
            after = record_key(self.view.next - 1) if self.view.next else ""
            for key in (yield from self.store.list("records", after)):
                yield from self._take((yield from self.store.get(key, LIMIT + 1)))
            entries = [entry for entry, _ in self._unread]
            self._unread.clear()
            return entries

    assert "invariant" in found(log=Listing)


def test_that_a_nonce_is_dropped():
    class Nameless(Log):
        def _is_mine(self, record):
            return record.island == self.island

    assert "invariant 4" in found(log=Nameless)


def test_that_what_lands_late_is_folded(monkeypatch):
    monkeypatch.setattr(View, "_why_no_push", lambda view, record: "")
    assert "invariant 2" in found()


def test_that_a_dead_incarnation_is_heard(monkeypatch):
    monkeypatch.setattr(View, "_why_not_live", lambda view, record: "")
    assert "invariant" in found(rates={"slow": 0.5})


# ── the tools do what they say ───────────────────────────────────────────────────────────────────────────────────


def one_fault(fault: str):
    """A store in which it happens at every await, what it is around, and what the network still has to deliver."""
    memory, later = Memory(lambda: 0.0), []
    chance = Chance(Random(0), {fault: 1.0})
    clock = type("Clock", (), {"sleep": staticmethod(lambda seconds: None)})
    return Faulty(memory, chance, clock, later.append), memory, later


@pytest.mark.parametrize(
    "fault, answer, there, lands",
    [
        ("response lost", Away, True, False),
        ("error after success", False, True, False),
        ("conflict", False, False, False),
        ("late", Away, False, True),
        ("duplicate", True, True, True),
        ("away", Away, False, False),
        ("slow", True, True, False),
    ],
)
def test_a_create_that_meets_a_fault(fault, answer, there, lands):
    store, memory, later = one_fault(fault)
    if answer is Away:
        with pytest.raises(Away):
            run(store.create("records/1", b"one"))
    else:
        assert run(store.create("records/1", b"one")) is answer
    assert ("records/1" in memory.objects) == there
    assert bool(later) == lands
    for routine in later:
        run(routine)
    assert ("records/1" in memory.objects) == (there or lands)


def test_a_stale_list_lacks_some():
    store, memory, _ = one_fault("stale list")
    for number in range(20):
        run(memory.create(f"records/{number:02}", b""))
    assert 0 < len(run(store.list("records"))) < 20


def test_a_power_cut_takes_what_was_not_synced():
    disk = UnsyncedDisk(lambda: 0.0)
    disk.make("/log/records")
    for number in range(40):
        disk.write(f"/log/records/{number}", b"12345678")
    disk.sync("/log/records")
    for number in range(0, 40, 2):
        disk.sync(f"/log/records/{number}")
    for number in range(40, 80):
        disk.write(f"/log/records/{number}", b"12345678")
        disk.sync(f"/log/records/{number}")
    disk.power_cut(Random(0))
    names = disk.names("/log/records")
    assert set(names) > {str(number) for number in range(40)}, "synced names stay"
    assert 0 < len(names) - 40 < 40, "of the others some"
    bytes_of = lambda number: disk.read(f"/log/records/{number}", 0, 9)
    assert all(bytes_of(number) == b"12345678" for number in range(0, 40, 2)), "synced bytes stay"
    assert any(bytes_of(number) != b"12345678" for number in range(1, 40, 2)), "of the others a beginning"


def test_a_late_request_lands_after_its_sender_has_died():
    chance = Chance(Random(0), {"late": 1.0})
    schedule = Schedule(chance)
    memory = Memory(schedule.now)

    def sender():
        try:
            yield from Faulty(memory, chance, schedule.clock(), schedule.later).create("records/1", b"one")
        except Away:
            chance.rates = {"crash": 1.0}
        yield Call("sleep", lambda: schedule.sleep(1.0))

    died = []
    schedule.start(sender(), died=lambda: died.append(schedule.seconds))
    while schedule.processes:
        schedule.step()
    assert died and memory.objects["records/1"][1] > died[0]


def test_a_process_dies_before_what_it_asks_for_is_done_or_after():
    there = set()
    for seed in range(10):
        schedule = Schedule(Chance(Random(seed), {"crash": 1.0}))
        memory = Memory(schedule.now)
        died = []
        schedule.start(memory.create("records/1", b"one"), died=lambda died=died: died.append(True))
        schedule.step()
        assert died and not schedule.processes
        there.add("records/1" in memory.objects)
    assert there == {False, True}


# ── real processes that kill themselves ──────────────────────────────────────────────────────────────────────────

MEMBER = """
import sys
from pathlib import Path
from islands.log import Log
from islands.store import open_store, run
from islands.trust import Key

log = run(Log.open(open_store(sys.argv[1]), "a", Key.read(Path(sys.argv[2]))))
run(log.read())
run(log.join())
for clock in range(log.view.islands["a"].clock, 3):
    run(log.push([b"round %d" % clock], clock=clock, base=log.view.version))
"""
CREATING = sorted(awaits("write, sync, link, remove, sync names", "records", "payloads"))
POINTS = [f"{when} {await_}" for await_ in CREATING for when in ("before", "after")]
LEAVES = {point for point in POINTS if not re.match("before write|after remove|.* sync names", point)}
QUICK = ("after link records", "after sync names payloads")


def member(log: Path, key: Path, point: str = "") -> int:
    environment = {**os.environ, "SLACKLINE_DIE_AT": point}
    return subprocess.run([sys.executable, "-c", MEMBER, log, key], cwd=helpers.ROOT, env=environment).returncode


@pytest.mark.parametrize("point", [p if p in QUICK else pytest.param(p, marks=pytest.mark.slow) for p in POINTS])
def test_a_process_that_is_killed_at_a_point_loses_nothing_and_repeats_nothing(point, tmp_path):
    key, owner = trust.Key.new(), trust.Key.new()
    key.write(tmp_path / "key")
    run_json = islanders.Run(owner=owner.public, budget=100, facts={})
    store = open_store(str(tmp_path / "log"))
    run(Log.begin(store, run_json, {"a": trust.Member(key.public)}, owner))
    assert member(tmp_path / "log", tmp_path / "key", point) == -signal.SIGKILL
    unfinished = list((tmp_path / "log").rglob(".*"))
    assert bool(unfinished) == (point in LEAVES), "what it was writing"
    assert member(tmp_path / "log", tmp_path / "key") == 0
    log = run(Log.open(store))
    pushed = [entry.record for entry in run(log.read()) if entry.record and entry.record.type == PUSH]
    assert [record.clock for record in pushed] == [0, 1, 2]
    assert [run(log.download(*record.payloads)) for record in pushed] == [b"round 0", b"round 1", b"round 2"]
    assert not list((tmp_path / "log").rglob(".*")), "who comes next sweeps"


def test_a_point_that_is_none_is_refused(monkeypatch):
    monkeypatch.setenv("SLACKLINE_DIE_AT", "after lunch")
    with pytest.raises(UsageError, match="SLACKLINE_DIE_AT=after lunch is no point"):
        run(Memory(lambda: 0.0).create("records/1", b""))


def test_every_await_is_a_point():
    for await_ in ASKED | ON_A_DISK:
        verb, _, kind = await_.rpartition(" ")
        assert verb in VERBS and kind in KINDS

"""Real processes, killed with -9 in the middle of a push, a snapshot, a truncation, and anywhere: nothing is lost,
nothing counts twice, and what is left can be replayed to the same bits."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import crew
import helpers
import numpy as np
import one_island
import pytest

pytest.importorskip("cryptography", reason="pip install -r requirements-islands.txt")

from islands import keyring, replay
from islands.folder import Folder
from islands.follow import Follower
from islands.store import run

pytestmark = pytest.mark.slow

ROUNDS = 6
# The process links: of its join 1 record; of each push 2 payloads and 1 record; after the first one, whose version is
# 3, a snapshot of 2 payloads, and its record.
PUSH = [
    "before write payloads 1", "after sync payloads 1", "after link payloads 1", "before write payloads 2",
    "before write records 2", "before link records 2", "after link records 2", "after sync names records 2",
]  # fmt: skip
SNAPSHOT = [
    "before write payloads 3", "after link payloads 3", "before write payloads 4", "after link payloads 4",
    "before link records 3", "after link records 3",
]  # fmt: skip
# Of the owner's record it removes the other name; then 3 to 9 records, as many as there are before the snapshot.
TRUNCATION = [
    "before link records 1", "after link records 1", "before remove records 2", "after remove records 3",
    "after remove records 5", "before remove payloads 1", "after remove payloads 2",
]  # fmt: skip


@pytest.fixture(autouse=True)
def keys(monkeypatch, tmp_path):
    monkeypatch.setenv(keyring.FOLDER, str(tmp_path / "keys"))
    acknowledged.clear()


@pytest.fixture
def log(tmp_path):
    crew.begin(Folder(tmp_path / "log"), snapshots=3, island__merge="quorum", island__quorum=1)
    return tmp_path / "log"


def member(
    log: Path, name: str = "a", die_at: str = "", seconds: float = 0.0, rounds: int = ROUNDS
) -> subprocess.Popen:
    command = [sys.executable, "tests/one_island.py", str(log), name, str(rounds), str(seconds)]
    return process(command, die_at)


def process(command: list[str], die_at: str = "") -> subprocess.Popen:
    environment = {**os.environ, **({"SLACKLINE_DIE_AT": die_at} if die_at else {})}
    return subprocess.Popen(
        command, cwd=helpers.ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


acknowledged: set[tuple[str, int]] = set()


def code(process: subprocess.Popen) -> int:
    out, _ = process.communicate(timeout=120)
    acknowledged.update((line.split()[1], int(line.split()[2])) for line in out.splitlines() if "folded" in line[:6])
    return process.returncode


def check(log: Path, names: str = "a", rounds: int = ROUNDS):
    """Every round has been folded once, above all those that were acknowledged; every snapshot is that of a replay."""
    seen: list[tuple[str, int]] = []
    follower = run(Follower.open(Folder(log), from_oldest=True))
    if follower.began >= 0:
        seen += [(names, clock) for clock in range(follower.view.islands[names].clock)]
    follower.watch = lambda record: seen.append((record.island, record.clock)) if record.type == "push" else None
    while run(follower.advance()):
        pass
    assert [follower.view.islands[name].clock for name in names] == [rounds] * len(names)
    assert len(set(seen)) == len(seen) and acknowledged <= set(seen), acknowledged - set(seen)
    found = replay.of(Folder(log), None, True, print)
    assert not found.differs and found.snapshots, found
    for leaf, x in crew.params().items():
        sums = sum(one_island.made(name, clock, crew.SIZES)[leaf] for name, clock in seen)
        np.testing.assert_array_equal(follower.state.arrays[f"params/{leaf}"], x - sums)
    left = [file for folder in ("records", "payloads") for file in (log / folder).glob(".*")]
    assert not left, "what the dead have left is swept"


@pytest.mark.parametrize("point", PUSH + SNAPSHOT)
def test_in_the_middle_of_a_push_or_a_snapshot(point, log):
    assert code(member(log, die_at=point)) == -signal.SIGKILL
    assert code(member(log)) == 0
    check(log)


@pytest.mark.parametrize("point", TRUNCATION)
def test_in_the_middle_of_a_truncation(point, log):
    assert code(member(log)) == 0
    time.sleep(0.1)
    truncate = [sys.executable, "-m", "islands", "truncate", str(log), "--before=9"]
    assert code(process(truncate, point)) == -signal.SIGKILL
    assert code(member(log, rounds=ROUNDS + 2)) == 0  # in between it is a log like any other
    check(log, rounds=ROUNDS + 2)
    assert code(process(truncate)) == 0
    check(log, rounds=ROUNDS + 2)
    assert run(Follower.open(Folder(log), from_oldest=True)).began == 9


@pytest.mark.parametrize("seed", range(3))
def test_anywhere(seed, log):
    """Three islands, one of which is killed every now and then."""
    draw, rounds = random.Random(seed), 25
    running = {name: member(log, name, seconds=0.05, rounds=rounds) for name in "abc"}
    for _ in range(4):
        time.sleep(1.5 + 2 * draw.random())
        name = draw.choice("abc")
        if running[name].poll() is None:
            running[name].kill()
            code(running[name])
            running[name] = member(log, name, seconds=0.05, rounds=rounds)
    assert [code(each) for each in running.values()] == [0, 0, 0]
    check(log, "abc", rounds)

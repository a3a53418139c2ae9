"""runtime/lock.py: one writer per folder, and a lock that no ending of a process leaves behind."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import helpers
import pytest

from runtime import lock
from runtime.config import UsageError

QUICK = {"flock": False, "beat": 0.1, "silence": 1.0}  # seconds; where a file system has no flock
WAYS = pytest.mark.parametrize("options", [{}, QUICK], ids=["flock", "heartbeat"])


@pytest.fixture(autouse=True)
def let_go():
    yield
    lock.release()


def holder(folder: Path, options: dict) -> subprocess.Popen:
    """Another process, which holds the lock of the folder until it is ended."""
    code = (
        f"import sys, time; from pathlib import Path; from runtime import lock; lock.hold(Path({str(folder)!r}), "
        f"**{options!r}); print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=helpers.ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


@WAYS
def test_a_folder_in_use_is_refused_and_free_when_its_holder_ends(tmp_path, options):
    process = holder(tmp_path / "run", options)
    try:
        with pytest.raises(UsageError) as error:
            lock.hold(tmp_path / "run", **options)
        since = json.loads((tmp_path / "run" / "lock").read_text())["since"]
        who = f"process {process.pid} on {socket.gethostname()}, since {since}"
        assert f"workdir: {tmp_path}/run is in use by {who}" in str(error.value)
        lock.release()
        assert (tmp_path / "run" / "lock").exists(), "a refused process deletes no lock of another"
    finally:
        process.kill()
        process.wait()
    started = time.monotonic()
    nonce = lock.hold(tmp_path / "run", **options)
    assert time.monotonic() - started < 0.9, "a dead process of this machine is not waited for"
    assert json.loads((tmp_path / "run" / "lock").read_text())["nonce"] == nonce


@WAYS
def test_one_process_cannot_hold_it_twice_and_may_after_release(tmp_path, options):
    lock.hold(tmp_path / "run", **options)
    with pytest.raises(UsageError, match=f"in use by process {os.getpid()}"):
        lock.hold(tmp_path / "run", **options)
    lock.release()
    lock.hold(tmp_path / "run", **options)


@WAYS
def test_nothing_is_left_of_a_folder_that_stayed_empty(tmp_path, options):
    lock.hold(tmp_path / "a" / "b", **options)
    lock.release()
    assert not (tmp_path / "a").exists()
    lock.hold(tmp_path / "a" / "b", **options)
    (tmp_path / "a" / "b" / "config.json").write_text("{}")
    lock.release()
    assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["config.json"]


@WAYS
def test_of_many_that_come_at_once_one_gets_it(tmp_path, options):
    dead = holder(tmp_path / "run", options)
    dead.send_signal(signal.SIGKILL)
    dead.wait()  # all of them find its lock
    code = (
        f"import sys; from pathlib import Path; from runtime import lock; print(flush=True); sys.stdin.readline()\n"
        f"try: lock.hold(Path({str(tmp_path / 'run')!r}), **{options!r}); print('mine', flush=True)\n"
        f"except lock.UsageError: print('refused', flush=True)\n"
        f"sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    several = [subprocess.Popen([sys.executable, "-c", code], cwd=helpers.ROOT, **pipes) for _ in range(4)]
    try:
        for process in several:
            process.stdout.readline()
        for process in several:
            process.stdin.write("go\n")
            process.stdin.flush()
        assert sorted(process.stdout.readline() for process in several) == ["mine\n", *["refused\n"] * 3]
    finally:
        for process in several:
            process.communicate(timeout=60)


def foreign(folder: Path, **changes) -> Path:
    """The lock of a process of another machine."""
    folder.mkdir()
    who = {"host": "elsewhere", "pid": os.getpid(), "begun": "1", "since": "yesterday", "beat": 0, "nonce": "0"}
    (folder / "lock").write_text(json.dumps(who | changes))
    return folder


def test_another_machine_is_watched_and_taken_over_when_it_is_silent(tmp_path, capfd):
    folder, started = foreign(tmp_path / "run"), time.monotonic()
    nonce = lock.hold(folder, **QUICK)
    assert QUICK["silence"] <= time.monotonic() - started < 5
    assert json.loads((folder / "lock").read_text())["nonce"] == nonce
    said = capfd.readouterr().err
    assert "held by elsewhere" in said and "elsewhere was silent for 1 s: taking its lock over" in said


def test_another_machine_that_is_not_silent_keeps_it(tmp_path):
    folder = foreign(tmp_path / "run")
    code = "import sys, time; time.sleep(0.5); open(sys.argv[1], 'w').write(sys.argv[2])"
    beat = (folder / "lock").read_text().replace('"beat": 0', '"beat": 1')
    process = subprocess.Popen([sys.executable, "-c", code, str(folder / "lock"), beat])
    with pytest.raises(UsageError, match="in use by process .* on elsewhere, since yesterday"):
        lock.hold(folder, flock=False, beat=0.1, silence=10)
    process.wait()


def test_a_new_process_with_the_old_number_is_not_the_holder(tmp_path):
    """The machine was started again, and the number of the process that had the lock is now this one's."""
    folder = foreign(tmp_path / "run", host=socket.gethostname())
    started = time.monotonic()
    lock.hold(folder, **QUICK)
    assert time.monotonic() - started < 0.5


@pytest.mark.parametrize("others", [0, 1])
def test_a_file_that_its_holder_has_just_deleted_locks_nothing(tmp_path, monkeypatch, others):
    """Between the opening of the file and its locking, its holder ends; then nobody, or another, takes the folder."""
    folder, flock, comes = tmp_path / "run", fcntl.flock, iter([others])
    (folder / "lock").parent.mkdir()

    def late(file: int, how: int) -> None:
        for count in comes:  # once
            (folder / "lock").unlink()
            for _ in range(count):
                lock.hold(folder)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    if not others:
        nonce = lock.hold(folder)
        assert json.loads((folder / "lock").read_text())["nonce"] == nonce
    with pytest.raises(UsageError, match=f"in use by process {os.getpid()}"):
        lock.hold(folder)


def test_who_has_lost_its_lock_ends(tmp_path):
    process = holder(tmp_path / "run", QUICK)
    (tmp_path / "run" / "lock").write_text(json.dumps({"host": "elsewhere", "nonce": "1"}))
    assert process.wait(timeout=10) == 1


@pytest.mark.slow
def test_a_second_start_in_a_workdir_is_refused_and_harms_nothing(tmp_path):
    options = ["--config.steps=5000", "--config.checkpoint.every=5", "--config.log_every=1"]
    first = subprocess.Popen(
        helpers.command(tmp_path / "run", *options, simulate=1), cwd=helpers.ROOT, stdout=subprocess.PIPE, text=True
    )
    while not (tmp_path / "run" / "checkpoints" / "5").is_dir() and first.poll() is None:
        time.sleep(0.1)
    second = helpers.train(tmp_path / "run", *options, simulate=1, check=False)
    assert second.returncode == 2 and f"workdir: {tmp_path}/run is in use by process {first.pid} on" in second.stderr
    first.terminate()
    assert first.communicate(timeout=120) and first.returncode == 75
    steps = list(helpers.metric_losses(tmp_path / "run"))
    assert steps == list(range(1, len(steps) + 1))

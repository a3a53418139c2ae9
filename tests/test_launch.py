"""runtime/launch.py: several processes on one machine, started, watched and never left behind."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]

# Every child first notes its pid, so that each test can check that nothing survived.
CHILD_START = """
import os, signal, sys, time
def flag(name): return [a.split("=", 1)[1] for a in sys.argv if a.startswith("--" + name + "=")][0]
me, folder = int(flag("process_id")), os.path.dirname(os.path.abspath(__file__))
def note(pid):
    open(f"{folder}/{pid}.tmp", "w").close()
    os.rename(f"{folder}/{pid}.tmp", f"{folder}/{pid}.pid")
"""
CHILD_READY = "\nnote(os.getpid())\n"  # after this line the launcher's user may send signals


def script(folder: Path, body: str, before_ready: str = "") -> str:
    path = folder / "child.py"
    path.write_text(CHILD_START + before_ready + CHILD_READY + body)
    return str(path)


def default_signals() -> None:
    """These tests may themselves run under nohup or in a shell's background, where such signals are ignored."""
    for name in (signal.SIGINT, signal.SIGHUP):
        signal.signal(name, signal.SIG_DFL)


def start(*arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "runtime.launch", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        preexec_fn=default_signals,
    )


def finish(launcher: subprocess.Popen) -> tuple[int, str, str]:
    try:
        out, err = launcher.communicate(timeout=15)
    finally:
        launcher.kill()
    return launcher.returncode, out, err


def pids(folder: Path) -> list[int]:
    return [int(path.stem) for path in folder.glob("*.pid")]


def wait_until(condition, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")  # a zombie of another parent counts as gone
    return not (stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] == "Z")


def no_survivors(folder: Path) -> bool:
    return wait_until(lambda: not any(is_alive(pid) for pid in pids(folder)), seconds=3)


# ------------------------------------------------------------------------------------------------ running


def test_each_process_learns_who_it_is_and_where_process_0_listens(tmp_path):
    body = 'print(me, flag("num_processes"), flag("coordinator"), sys.argv[1])'
    code, out, err = finish(start("--processes=3", "--", script(tmp_path, body), "--config=x"))
    assert (code, err) == (0, "")
    lines = [re.fullmatch(r"\[(\d)\] (\d) 3 (127\.0\.0\.1:\d+) --config=x", line) for line in sorted(out.splitlines())]
    assert all(lines) and len({m[3] for m in lines if m}) == 1
    assert [(m[1], m[2]) for m in lines if m] == [("0", "0"), ("1", "1"), ("2", "2")]


def test_lines_of_different_processes_never_mix_and_streams_stay_apart(tmp_path):
    body = """
for i in range(200):
    for piece in ("a" * 50, "b" * 50, "c\\n"):
        sys.stdout.write(piece); sys.stdout.flush()
sys.stderr.write("last words without a newline")
"""
    code, out, err = finish(start("--processes=3", "--", script(tmp_path, body)))
    assert code == 0
    assert sorted(out.splitlines()) == [f"[{i}] {'a' * 50}{'b' * 50}c" for i in range(3) for _ in range(200)]
    assert sorted(err.splitlines()) == [f"[{i}] last words without a newline" for i in range(3)]


def test_output_arrives_while_the_process_still_runs(tmp_path):
    launcher = start("--processes=1", "--", script(tmp_path, 'print("now")\ntime.sleep(60)'))
    assert launcher.stdout and launcher.stdout.readline() == "[0] now\n"
    launcher.terminate()
    finish(launcher)


# ------------------------------------------------------------------------------------------------ failing


def test_one_failure_stops_the_others_and_gives_its_exit_code(tmp_path):
    body = "time.sleep(0.2 if me == 1 else 60)\nsys.exit(3)"
    code, _, err = finish(start("--processes=3", "--", script(tmp_path, body)))
    assert code == 3
    assert "process 1 failed with exit code 3; stopping the others" in err
    assert len(pids(tmp_path)) == 3 and no_survivors(tmp_path)


def test_a_process_that_ignores_sigterm_is_killed_after_the_grace(tmp_path):
    body = """
while me == 1 and len([f for f in os.listdir(folder) if f.endswith(".pid")]) < 2: time.sleep(0.01)
if me == 1: os.kill(os.getpid(), signal.SIGSEGV)
time.sleep(60)
"""
    ignore = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    begin = time.monotonic()
    code, _, err = finish(start("--processes=2", "--grace=0.3", "--", script(tmp_path, body, before_ready=ignore)))
    assert code == 128 + signal.SIGSEGV and time.monotonic() - begin < 8
    assert "process 1 was killed by SIGSEGV" in err and "killing what still runs after the grace of 0.3 s" in err
    assert len(pids(tmp_path)) == 2 and no_survivors(tmp_path)


def test_the_workers_of_a_process_go_with_it(tmp_path):
    body = """
import subprocess
worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])  # keeps our stdout open
note(worker.pid)
print("done")
"""
    begin = time.monotonic()
    code, out, _ = finish(start("--processes=1", "--", script(tmp_path, body)))
    assert (code, out) == (0, "[0] done\n") and time.monotonic() - begin < 8
    assert len(pids(tmp_path)) == 2 and no_survivors(tmp_path)


# ------------------------------------------------------------------------------------------------ stopping

SAVE_ON_SIGTERM = """
def save(*_):
    time.sleep(0.2)
    print("saved", me)
    sys.exit(75 if me == 0 else 0)
signal.signal(signal.SIGTERM, save)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_stop_reaches_all_processes_and_lets_them_save(tmp_path, number):
    launcher = start("--processes=2", "--", script(tmp_path, "time.sleep(60)", before_ready=SAVE_ON_SIGTERM))
    assert wait_until(lambda: len(pids(tmp_path)) == 2)
    launcher.send_signal(number)
    code, out, err = finish(launcher)
    assert code == 75  # saved, restart me: no crash
    assert sorted(out.splitlines()) == ["[0] saved 0", "[1] saved 1"]
    assert f"got {number.name}: sent SIGTERM to all processes" in err and "failed" not in err
    assert no_survivors(tmp_path)


def test_exit_75_of_one_process_does_not_stop_the_others(tmp_path):
    body = 'if me == 0: sys.exit(75)\ntime.sleep(0.5)\nprint("finished")'
    code, out, _ = finish(start("--processes=2", "--", script(tmp_path, body)))
    assert (code, out) == (75, "[1] finished\n")


IGNORE_SIGTERM = "signal.signal(signal.SIGTERM, signal.SIG_IGN)"


def test_a_second_stop_gives_the_grace_and_then_kills(tmp_path):
    child = script(tmp_path, "time.sleep(60)", before_ready=IGNORE_SIGTERM)
    launcher = start("--processes=2", "--grace=0.3", "--", child)
    assert wait_until(lambda: len(pids(tmp_path)) == 2)
    launcher.terminate()
    time.sleep(0.8)
    assert launcher.poll() is None  # one stop: all the time to save
    launcher.terminate()
    code, _, err = finish(launcher)
    assert code == 128 + signal.SIGKILL and "had to be killed" in err
    assert no_survivors(tmp_path)


def test_a_third_stop_kills_at_once(tmp_path):
    child = script(tmp_path, "time.sleep(60)", before_ready=IGNORE_SIGTERM)
    launcher = start("--processes=2", "--grace=1000", "--", child)
    assert wait_until(lambda: len(pids(tmp_path)) == 2)
    for _ in range(3):
        launcher.send_signal(signal.SIGINT)
        time.sleep(0.2)
    code, _, _ = finish(launcher)
    assert code == 128 + signal.SIGKILL and no_survivors(tmp_path)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl(PR_SET_PDEATHSIG) is Linux only")
def test_kill_9_of_the_launcher_takes_the_processes_along(tmp_path):
    launcher = start("--processes=2", "--", script(tmp_path, "time.sleep(60)"))
    assert wait_until(lambda: len(pids(tmp_path)) == 2)
    launcher.kill()
    finish(launcher)
    assert no_survivors(tmp_path)


def test_a_reader_that_goes_away_stops_the_run(tmp_path):
    body = "while True:\n    print('x' * 1000)"
    launcher = start("--processes=3", "--", script(tmp_path, body, before_ready=SAVE_ON_SIGTERM))
    assert wait_until(lambda: len(pids(tmp_path)) == 3)
    assert launcher.stdout and launcher.stderr
    launcher.stdout.close()  # as `| head` does
    assert "nobody reads the output any more: sent SIGTERM" in launcher.stderr.read()
    assert launcher.wait(timeout=10) == 75 and no_survivors(tmp_path)


# ------------------------------------------------------------------------------------------------ usage


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes=2"], "put the script and its flags after `--`"),
        (["--processes=0", "--", __file__], "at least 1 process"),
        (["--processes=2", "--grace=-1", "--", __file__], "0 or more"),
        (["--processes=2", "--", "nowhere.py"], "no script nowhere.py"),
        (["--processes=2", "--", __file__, "--process_id=0"], "--process_id is set by the launcher"),
        (["--", __file__], "--processes"),
    ],
)
def test_bad_usage_says_what_to_change(arguments, message, capsys):
    from runtime.launch import parse

    with pytest.raises(SystemExit) as exit_info:
        parse(arguments)
    assert exit_info.value.code == 2 and message in capsys.readouterr().err


def test_help_shows_a_command_to_copy():
    code, out, _ = finish(start("--help"))
    assert code == 0 and "python -m runtime.launch --processes=2 -- train.py --config=" in out and "75" in out

"""tests/prove.py: pieces are proven once, and go on where they were stopped. tests/counting.py: what is counted."""

import re
import signal
import subprocess
import sys
import threading
import time

import counting
import prove
import pytest
import taken_out

CASES = """
import pytest
def test_one(record_property): record_property("events", 3)
def test_two(record_property): record_property("events", 4)
@pytest.mark.skip(reason="no such machine")
def test_three(): pass
"""


def piece(name: str, code: str, cores: int = prove.CORES) -> prove.Piece:
    return prove.Piece(name, [sys.executable, "-c", code], cores)


def run(command: list[str]) -> dict:
    return next(prove.results([prove.Piece("made", command)], "abc"))


@pytest.fixture
def store(tmp_path):
    return prove.Store(tmp_path / "results", "abc", "3.11")


@pytest.mark.slow
def test_a_piece_of_pytest_is_counted(tmp_path, store):
    (tmp_path / "test_made.py").write_text(CASES)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml={junit}", str(tmp_path)]
    result = run(command)
    assert [result[kind] for kind in ("passed", "failed", "skipped")] == [2, 0, 1]
    assert result["counted"] == {"events": 7} and result["skips"] == ["no such machine"]
    (tmp_path / "test_made.py").write_text("def test_one(): assert False, 'as it happens'")
    result = run(command)
    assert result["failed"] == 1 and "as it happens" in result["output"]
    (tmp_path / "test_made.py").write_text("no python")
    assert run(command)["failed"] == 1, "what cannot be collected"


def test_what_has_passed_is_not_run_again_and_what_has_failed_is(tmp_path, store, capsys):
    note = f"open({str(tmp_path / 'ran')!r}, 'a').write"
    wanted = [piece("good", f"{note}('g')"), piece("bad", f"{note}('b'); raise SystemExit('a reason')")]
    assert prove.prove(wanted, store) == 1
    assert "[1/2] good: 1 passed" in (said := capsys.readouterr().out) and "a reason" in said and "min left" in said
    assert prove.prove(wanted, store) == 1 and "1 proven already at abc" in capsys.readouterr().out
    assert (tmp_path / "ran").read_text() == "gbb"
    assert prove.prove(wanted[:1], prove.Store(store.root, "other", "3.11")) == 0
    changed = prove.Store(store.root, "abc-changed", "3.11")
    for _ in range(2):
        prove.prove(wanted[:1], changed)
    assert (tmp_path / "ran").read_text() == "gbb" + "g" + "gg", "another commit, and a tree that is none"


@pytest.fixture
def started(monkeypatch):
    """Processes that were started, in order. SIGALRM is heard as Ctrl-C is."""

    def stop(*_):
        raise KeyboardInterrupt

    found, start = [], subprocess.Popen
    monkeypatch.setattr(prove.subprocess, "Popen", lambda *x, **y: found.append(start(*x, **y)) or found[-1])
    before = signal.signal(signal.SIGALRM, stop)
    yield found
    signal.signal(signal.SIGALRM, before)


def test_stopped_it_leaves_nothing_behind_and_goes_on(store, started):
    code = "import os, signal, time; os.kill(os.getppid(), signal.SIGALRM); time.sleep(60)"
    with pytest.raises(KeyboardInterrupt):
        prove.prove([piece("first", ""), piece("long", code)], store)
    assert store.is_proven("first") and store.get("long") is None
    assert [process.returncode for process in started] == [0, -signal.SIGKILL]


def test_stopped_while_a_piece_is_being_started_it_leaves_nothing_behind(store, started, monkeypatch):
    """Also where another thread takes the signal."""
    start, done = prove.subprocess.Popen, threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()

    def interrupted(*x, **y):
        process = start(*x, **y)
        signal.pthread_kill(other.ident, signal.SIGALRM)
        time.sleep(0.1)  # until it is there
        return process

    monkeypatch.setattr(prove.subprocess, "Popen", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prove.prove([piece("long", "import time; time.sleep(60)")], store)
    done.set()
    assert [process.returncode for process in started] == [-signal.SIGKILL]


def test_stopped_while_a_result_is_being_kept_it_leaves_nothing_behind(store, started, monkeypatch):
    def interrupted(result):
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "put", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prove.prove([piece("first", "", 1), piece("long", "import time; time.sleep(60)", 1)], store)
    assert [process.returncode for process in started] == [0, -signal.SIGKILL]


def test_a_piece_hears_signals(store, started):
    code = "import signal; assert signal.getsignal(signal.SIGALRM) == signal.SIG_DFL"
    code += "; assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())"
    assert prove.prove([piece("listens", code)], store) == 0


def test_pieces_of_one_core_go_side_by_side(tmp_path, store):
    """Each waits for the other."""
    wait = "import pathlib, time\npathlib.Path({own!r}).touch()\n"
    wait += "while not pathlib.Path({other!r}).exists(): time.sleep(0.01)"
    a, b = (str(tmp_path / name) for name in "ab")
    pair = [piece("a", wait.format(own=a, other=b), 1), piece("b", wait.format(own=b, other=a), 1)]
    assert prove.prove([*pair, piece("whole", "")], store) == 0
    assert all(store.is_proven(name) for name in ("a", "b", "whole"))


def test_the_report_has_the_last_result_of_every_piece_and_what_is_missing(store):
    prove.prove([piece("good", ""), piece("mended", "raise SystemExit(1)")], store)
    page = prove.report(["good", "mended", "later"], [store])
    assert "| good | 1 | 0 | 0 |" in page and "| mended | 0 | 1 | 0 |" in page
    assert "2 of 3 pieces" in page and "\n- later\n" in page
    other = prove.Store(store.root, "newer", store.python)
    other.put(store.get("mended") | {"passed": 1, "failed": 0, "commit": "newer", "date": "9"})
    prove.Store(store.root, "abc-changed", store.python).put(store.get("good") | {"failed": 1, "date": "99"})
    page = prove.report(["good", "mended"], [other])
    assert "2 passed, 0 failed" in page and re.search(r"\| mended .*\| newer \| 9 \|", page)
    assert "at commit abc and newer" in page or "at commit newer and abc" in page


def test_edits_that_are_noticed_are_one_row_of_the_report(store):
    names = [f"{prove.TAKEN_OUT}{name}" for name in ("one", "two", "three")]
    for name, failed in zip(names, (0, 0, 1), strict=True):
        done = {
            "piece": name,
            "passed": 1 - failed,
            "failed": failed,
            "skipped": 0,
            "counted": {},
            "skips": [],
            "seconds": 2.0,
        }
        store.put(done | {"seconds": 2.0, "date": name, "commit": "abc", "python": "3", "jax": "0"})
    page = prove.report(names, [store])
    assert "| 2 edits taken out, and noticed | 2 | 0 | 0 |  | 4 | abc |" in page
    assert "| taken out, three | 0 | 1 | 0 |" in page and "taken out, one" not in page


def test_every_test_file_and_every_edit_is_a_piece():
    names = [p.name for p in prove.pieces()]
    assert "tests/test_prove.py" in names and len(names) == len(set(names))
    assert {f"taken out, {case.name}" for case in taken_out.CASES} <= set(names)
    slugs = {prove.Store(prove.RESULTS, "a", "b")._path(name) for name in names}
    assert len(slugs) == len(names), "each has a file of its own"


def test_every_edit_finds_its_text_and_its_test():
    for case in taken_out.CASES:
        assert (prove.ROOT / case.file).read_text().count(case.text) == 1, case.name
        assert case.text != case.replacement, case.name
        file, _, test = case.test.partition(" -k " if " -k " in case.test else "::")
        tests = re.findall(r"^def (test_\w+)", (prove.ROOT / file).read_text(), re.MULTILINE)
        wanted = test.partition("[")[0]
        assert wanted in tests or any(wanted in name for name in tests if " -k " in case.test), case.test


@pytest.mark.parametrize(
    ("command", "number"),
    [
        ([sys.executable, "train.py", "--config=configs/tiny.py"], 1),
        ([sys.executable, "-m", "runtime.launch", "--processes=4", "--", "train.py"], 4),
        ([sys.executable, "-c", "import train; train.run([])"], 1),
        (["git", "status"], 0),
    ],
)
def test_starts_of_train_py_are_counted(command, number):
    assert counting.starts(command) == number


@pytest.mark.slow
def test_too_many_fail_the_default_run_and_no_other(tmp_path):
    """In a process of its own: one test that starts a train.py of one line."""
    (tmp_path / "train.py").write_text("")
    (tmp_path / "test_it.py").write_text(
        "import subprocess, sys\ndef test_it(): subprocess.run([sys.executable, 'train.py'], check=True)\n"
    )
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -m 'not slow'\nmarkers = slow\n")
    code = f"import sys, pytest; sys.path.insert(0, {str(prove.ROOT / 'tests')!r}); import counting\n"
    code += "counting.MOST['starts of train.py'] = int(sys.argv[1]); sys.exit(pytest.main(sys.argv[2:], [counting]))"

    def outcome(most: int, *options: str) -> tuple[int, bool]:
        command = [sys.executable, "-c", code, str(most), "-q", "-p", "no:cacheprovider", *options]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert "1 starts of train.py" in done.stdout and "1 passed" in done.stdout, done.stdout + done.stderr
        return done.returncode, "FAILED: too many starts of train.py" in done.stdout

    assert outcome(1) == (0, False)
    assert outcome(0) == (1, True)
    assert outcome(0, "-m", "") == (0, False)


def test_pytorch_is_there_for_every_file_that_asks_for_it():
    asking = [path.name for path in (prove.ROOT / "tests").glob("test_*.py") if "SLACKLINE_TORCH" in path.read_text()]
    assert all(any(word in name for word in prove.WITH_TORCH) for name in asking if name != "test_prove.py")

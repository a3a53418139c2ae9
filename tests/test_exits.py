"""How a program ends: one sentence and a code for each way; and where libraries' own words go."""

import os
import re
import signal
import subprocess
import sys
import time

import helpers
import pytest

import compare
import train
from runtime import exits, library_log
from runtime.config import RunError, UsageError

ENDS = {
    UsageError("steps=0: must be at least 1"): (2, "error: steps=0: must be at least 1\n"),
    RunError("no checkpoint is intact"): (1, "error: no checkpoint is intact\n"),
    OSError(28, "No space left on device", "/x"): (1, "error: [Errno 28] No space left on device: '/x'\n"),
    ValueError("UNKNOWN: Gloo AllGather failed: closed\n[a stack]"): (
        1, "error: a computation failed: UNKNOWN: Gloo AllGather failed: closed\n"),
    KeyboardInterrupt(): (130, "stopped by Ctrl-C: the same command goes on\n"),
}  # fmt: skip


@pytest.mark.parametrize("error", ENDS, ids=lambda error: type(error).__name__)
def test_each_way_to_end_has_its_sentence_and_its_code(error, capsys):
    def main():
        raise error

    assert exits.guarded(main, "the same command goes on") == ENDS[error][0]
    assert capsys.readouterr().err == ENDS[error][1]


def test_a_fault_of_the_program_keeps_its_traceback(capsys):
    assert exits.guarded(lambda: [][0], "") == 1
    assert "IndexError: list index out of range" in capsys.readouterr().err


@pytest.mark.parametrize("program", [train, compare])
def test_the_programs_end_by_them(program, capsys, monkeypatch):
    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "main", interrupted)
    assert program.run(["program"]) == 130
    assert capsys.readouterr().err.count("\n") == 1


def python(code: str, **options) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(helpers.ROOT), "PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes | options)


def test_ctrl_c_is_one_line():
    code = "import sys, time; from runtime import exits; print('begun', flush=True); "
    process = python(code + "sys.exit(exits.guarded(lambda: time.sleep(60), 'it goes on'))")
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "stopped by Ctrl-C: it goes on\n")


def test_ctrl_c_during_the_imports_is_one_line_though_a_library_swallows_it():
    code = "import time; from runtime import early; early.end_at_ctrl_c(); print('begun', flush=True)\n"
    process = python(code + "try: time.sleep(60)\nexcept BaseException: time.sleep(60)")
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (130, "stopped by Ctrl-C: nothing was begun\n")
    for program in ("train.py", "compare.py"):  # before all imports but those of the standard library
        text = (helpers.ROOT / program).read_text()
        imports = re.findall(r"^(?:import|from) \w+", text, re.MULTILINE)
        first = next(words for words in imports if words.split()[1] not in sys.stdlib_module_names)
        assert text.index("early.end_at_ctrl_c()") < text.index(f"\n{first}")


def test_a_reader_that_has_gone_is_no_error():
    code = "import os, sys; from runtime import exits; "
    code += "sys.exit(exits.guarded(lambda: [print('x' * 9999, flush=True) for _ in range(999)], '', os._exit))"
    process = python(code)
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(timeout=30) == 141


def test_what_libraries_print_goes_to_a_file_and_what_we_print_does_not(tmp_path):
    code = f"""
import logging, os, sys, pathlib
from runtime import exits, library_log
from runtime.config import RunError
logging.basicConfig()  # as one of the libraries does
def main():
    library_log.begin()
    os.write(1, b"a handshake\\n")
    print("ours")
    library_log.keep(pathlib.Path({str(tmp_path)!r}), 0)
    os.write(2, b"a stack\\n")
    logging.getLogger("asyncio").error("a task")
    raise RunError("the peer is gone")
sys.exit(exits.guarded(main, ""))
"""
    for starts in (1, 2):  # a second start adds to it
        process = python(code)
        out, err = process.communicate(timeout=30)
        assert (process.returncode, out) == (1, "ours\n")
        assert err == f"error: the peer is gone\nMore is in {tmp_path}/library.log\n"
        assert (tmp_path / "library.log").read_text() == "a handshake\na stack\na task\n" * starts


def test_without_a_workdir_the_end_of_it_is_shown(capfd):
    def main():
        library_log.begin()
        os.write(2, b"no such device\n")
        raise RunError("cannot begin")

    assert exits.guarded(main, "") == 1
    out, err = capfd.readouterr()
    assert err == "error: cannot begin\nThe libraries below said:\nno such device\n"
    os.write(2, b"as before\n")
    assert capfd.readouterr().err == "as before\n"

"""runtime/console.py: plain lines in a log file, one live line on a terminal, nothing on other processes."""

import io
import os
import pty
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime import console as console_module
from runtime.console import Console, fit_fields, human_bytes, human_count, human_seconds

REPOSITORY = Path(__file__).resolve().parents[1]


def row(step: int, **changes) -> dict:
    usual = {
        "step": step,
        "loss": 5.5451775,
        "lr": 3e-4,
        "grad_norm": 1.234,
        "step_seconds": 0.25,
        "tokens_per_second": 1_234_567.0,
        "mfu": 0.412,
        "wire_bytes": {"data": 1024 * 1024, "replica": 512 * 1024},
        "skipped": 0,
    }
    return {**usual, **changes}


def test_a_log_file_gets_one_plain_line_every_so_many_steps_and_the_last(capsys):
    console = Console(total_steps=25, every=10)
    for step in range(1, 26):
        console.step(row(step))
    console.close()
    out = capsys.readouterr().out
    assert re.findall(r"^step (\d+)/25", out, re.MULTILINE) == ["10", "20", "25"]
    assert "\r" not in out and "\x1b" not in out


def test_a_status_line_says_where_the_run_is_how_fast_and_what_it_sends(capsys):
    console = Console(total_steps=100, every=10)
    for step in range(1, 11):
        console.step(row(step))
    (line,) = capsys.readouterr().out.splitlines()
    assert line == (
        "step 10/100 10.0% | loss 5.5452 | lr 3.00e-04 | grad norm 1.23 | step 250 ms | 1.2 M tokens/s | MFU 41.2% | "
        "wire 1.50 MiB/step (replica 512.00 KiB) | ETA 22.5 s"
    )


def test_what_is_not_known_is_not_guessed(capsys):
    Console(total_steps=10, every=1).step(row(1, mfu=None, loss=float("nan")))
    out = capsys.readouterr().out
    assert "MFU n/a" in out and "ETA n/a" in out and "loss nan" in out and "skipped" not in out


def test_skipped_updates_are_shown_when_there_are_any(capsys):
    Console(total_steps=10, every=1).step(row(1, skipped=3))
    assert "skipped 3" in capsys.readouterr().out


def test_the_eta_is_not_upset_by_the_compilation_in_the_first_step(capsys):
    console = Console(total_steps=100, every=10)
    for step in range(1, 11):
        console.step(row(step, step_seconds=60.0 if step == 1 else 1.0))
    assert "ETA 1 min 30 s" in capsys.readouterr().out


def test_a_run_that_stops_early_leaves_its_last_step_in_the_log(capsys):
    console = Console(total_steps=100, every=10)
    console.step(row(7))
    console.close()
    console.close()
    assert capsys.readouterr().out.count("step 7/100") == 1


def test_other_processes_print_nothing(capsys):
    console = Console(total_steps=1, every=1, quiet=True)
    console.say("hello")
    console.warn("careful")
    console.table("title", [("a", "b")])
    console.step(row(1))
    console.evaluation({"step": 1, "eval_loss": 1.0, "eval_bits_per_byte": 1.0})
    console.close()
    assert capsys.readouterr() == ("", "")


def test_a_table_in_a_log_is_aligned_text(capsys):
    Console(1, 1).table("Slackline", [("parameters", "1.2 M"), ("mesh", "replica=2\ndata=4"), ("note", "[bold]")])
    assert capsys.readouterr().out == (
        "Slackline\n    parameters  1.2 M\n    mesh        replica=2\n                data=4\n    note        [bold]\n"
    )


def test_warnings_go_to_stderr_and_evaluations_to_stdout(capsys):
    console = Console(10, 1)
    console.warn("the link is slow")
    console.evaluation({"step": 5, "eval_loss": 2.5, "eval_bits_per_byte": 3.6067})
    assert capsys.readouterr() == (
        "eval at step 5 | loss 2.5000 | bits per byte 3.6067\n",
        "warning: the link is slow\n",
    )


def test_a_narrow_terminal_loses_whole_fields_the_least_important_first():
    fields = [(0, "step 1/2"), (0, "loss 5.5"), (7, "wire 1 MiB"), (1, "ETA 3 s")]
    assert fit_fields(fields, 80) == "step 1/2 | loss 5.5 | wire 1 MiB | ETA 3 s"
    assert fit_fields(fields, 35) == "step 1/2 | loss 5.5 | ETA 3 s"
    assert fit_fields(fields, 5) == "step "


LIVE_RUN = """
import time
from runtime.console import Console
from tests.test_console import row
console = Console(total_steps=4, every=100)
console.table("Slackline", [("parameters", "1.2 M"), ("note", "[data]")])
console.step(row(1))
console.say("saved a checkpoint")
console.step(row(2))          # too soon after step 1 to be drawn: a flood of redraws helps nobody
time.sleep(0.15)
console.step(row(3))
console.warn("the link is slow")
console.step(row(4))
console.close()
"""


def run_on_a_terminal(code: str) -> str:
    """Runs `code` with a pseudo-terminal as stdout and stderr; returns the bytes a terminal would get."""
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(REPOSITORY)}
    environment.pop("NO_COLOR", None)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=child, stderr=child, env=environment)
    os.close(child)
    received = b""
    try:
        while chunk := os.read(parent, 65536):
            received += chunk
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(parent)
    assert process.wait(timeout=10) == 0, received.decode()
    return received.decode()


def screen_after(received: str) -> list[str]:
    """What stands on the screen in the end: `ESC[2K` after a carriage return empties the line, colours are ignored."""
    lines = [""]
    for piece in re.split(r"(\r\n|\r\x1b\[2K)", received):
        if piece == "\r\n":
            lines.append("")
        elif piece == "\r\x1b[2K":
            lines[-1] = ""
        else:
            lines[-1] += re.sub(r"\x1b\[[0-9;]*m", "", piece)
    return lines


def test_on_a_terminal_the_live_line_stays_below_everything_else():
    received = run_on_a_terminal(LIVE_RUN)
    screen = screen_after(received)
    assert screen[0].rstrip() == "Slackline" and re.search("parameters.*1.2 M", screen[2]) and "[data]" in screen[3]
    assert screen[5:7] == ["saved a checkpoint", "warning: the link is slow"]
    assert screen[7].startswith("step 4/4 100.0%") and len(screen[7]) < 80
    assert screen[8:] == [""]
    assert "\x1b[33mwarning" in received  # yellow
    assert "step 1/4" in received and "step 3/4" in received and "step 2/4" not in received


def below_the_cell(received: str) -> list[str]:
    """What a notebook shows: after a carriage return the line is written over, character by character."""
    lines = []
    for line in received.split("\n"):
        shown = ""
        for piece in line.split("\r"):
            shown = piece + shown[len(piece) :]
        lines.append(shown.rstrip())
    return lines


def test_in_a_notebook_the_status_is_one_line_that_changes(monkeypatch):
    """A stream of the class that ipykernel puts there; tests/test_notebooks.py asks a real kernel."""
    stream = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(console_module, "REDRAW_SECONDS", 0.0)
    console = Console(total_steps=4, every=1)
    console.step(row(1, skipped=3))
    console.say("saved")
    console.step(row(2, skipped=3))
    console.step(row(4))
    console.close()
    console.say("complete")
    lines = below_the_cell(stream.getvalue())
    assert "\x1b" not in stream.getvalue() and lines[0] == "saved" and lines[2:] == ["complete", ""]
    assert lines[1].startswith("step 4/4 100.0%") and "skipped" not in lines[1] and lines[1].count("step ") == 2


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.00 KiB"), (1_289_749, "1.23 MiB"), (1024**2 - 1, "1.00 MiB")],
)
def test_human_bytes(n, text):
    assert human_bytes(n) == text


@pytest.mark.parametrize(
    ("n", "text"), [(0, "0"), (999, "999"), (1_200_000, "1.2 M"), (999_999, "1.0 M"), (7.24e9, "7.2 B")]
)
def test_human_count(n, text):
    assert human_count(n) == text


@pytest.mark.parametrize(
    ("s", "text"),
    [
        (0.345, "345 ms"),
        (0.9999, "1.0 s"),
        (12.34, "12.3 s"),
        (59.99, "1 min 00 s"),
        (302, "5 min 02 s"),
        (3599.9, "1 h 00 min"),
        (3720, "1 h 02 min"),
        (3 * 86400 + 4 * 3600, "3 d 04 h"),
    ],
)
def test_human_seconds(s, text):
    assert human_seconds(s) == text


def test_what_takes_long_is_said_more_and_more_rarely_and_only_by_process_0(capsys, monkeypatch):
    monkeypatch.setattr(console_module, "SILENCE_SECONDS", 0.1)
    for quiet in (False, True):
        console = Console(total_steps=9, every=1, quiet=quiet)
        console.doing("reading the data")
        time.sleep(0.75)  # said after 0.1, 0.2, 0.3, 0.4, and then after 0.6
        console.doing("compiling")  # over before it is worth a word
        console.doing("")
        console.doing("restoring")
        console.close()
        time.sleep(0.3)
        first, *others = capsys.readouterr().out.splitlines() or [""]
        assert first == ("" if quiet else "reading the data …")
        assert all(re.fullmatch(r"reading the data … \d+ ms", line) for line in others)
        assert len(others) == 0 if quiet else 1 <= len(others) <= 4


def test_nobody_waits_longer_because_something_else_begins(capsys, monkeypatch):
    """What counts is when anything was printed, not when that began which is done now."""
    monkeypatch.setattr(console_module, "SILENCE_SECONDS", 1.0)
    console = Console(total_steps=9, every=1)
    console.say("the first line")
    console._alive_at -= 0.9
    console.doing("compiling")
    time.sleep(0.5)
    console.doing("")
    assert capsys.readouterr().out == "the first line\ncompiling …\n"


def test_what_shows_that_a_run_goes_on_puts_it_off(capsys, monkeypatch):
    """A step, printed or not, and a line."""
    monkeypatch.setattr(console_module, "SILENCE_SECONDS", 0.5)
    console = Console(total_steps=100, every=50)
    console._alive_at -= 9
    console.step(row(1))
    console.doing("evaluating")
    time.sleep(0.3)
    console.say("halfway")
    time.sleep(0.4)
    console.doing("")
    assert capsys.readouterr().out == "halfway\n"

"""What the user sees: a start-up table, one status line, warnings. Silent unless process 0.

On a terminal and in a notebook the status line is live: it is rewritten in place. Anywhere else (a Slurm log, a pipe)
it is a plain line every `every` steps, without colours, boxes or carriage returns: `grep` and `less` work on it.
"""

import io
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence

ERASE_LINE = "\r\x1b[2K"
REDRAW_SECONDS = 0.1  # steps of a few ms would flood a slow ssh link with redraws nobody can read
SILENCE_SECONDS = 2.0  # longer than this nobody waits without being told for what
NOTEBOOK_COLUMNS = 110
MIN_STEPS_FOR_ETA = 3  # the first steps contain the compilation


class Console:
    """Prints for one process; `quiet=True` (every process other than 0) prints nothing at all."""

    def __init__(self, total_steps: int, every: int, quiet: bool = False):
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # one that is not UTF-8 gets a ? for what it cannot show
                stream.reconfigure(errors="replace")
        self._total_steps = total_steps
        self._every = max(1, every)
        self._quiet = quiet
        self._terminal, self._notebook = is_terminal(sys.stdout), is_notebook(sys.stdout)
        self._live = self._terminal or self._notebook
        self._drawn = ""  # the live line on the screen
        self._lock = threading.RLock()  # a checkpoint thread may warn while the loop prints
        self._step_seconds: deque[float] = deque(maxlen=101)
        self._latest: list[tuple[int, str]] | None = None  # fields of the newest status line
        self._latest_shown = True
        self._drawn_at = float("-inf")
        self._announcement: threading.Timer | None = None
        self._alive_at = time.monotonic()

    def doing(self, what: str) -> None:
        """From now on this is done, until the next call. Said when for SILENCE_SECONDS nothing was printed and no step
        made, and then, with its seconds, after more and more of silence. "": no more than what is printed anyway."""
        with self._lock:
            if self._announcement is not None:
                self._announcement.cancel()
                self._announcement = None
            if what and not self._quiet:
                self._announce_after(SILENCE_SECONDS, what, time.monotonic(), 0)

    def _announce_after(self, silence: float, what: str, began: float, times: int) -> None:
        def announce() -> None:
            with self._lock:
                if self._announcement is not timer:  # something else is done since this moment
                    return
                if time.monotonic() < self._alive_at + silence:  # something was printed meanwhile
                    self._announce_after(silence, what, began, times)
                    return
                self.say(f"{what} … {human_seconds(time.monotonic() - began)}" if times else f"{what} …")
                self._announce_after(SILENCE_SECONDS * 2 ** max(0, times - 2), what, began, times + 1)

        left = max(SILENCE_SECONDS / 10, self._alive_at + silence - time.monotonic())
        timer = self._announcement = threading.Timer(left, announce)
        timer.daemon = True
        timer.start()

    def say(self, text: str) -> None:
        """Prints one plain line to stdout."""
        with self._lock:
            if not self._quiet:
                self._print_above_live_line(text, sys.stdout)

    def warn(self, text: str) -> None:
        """Prints `warning: text` to stderr, yellow on a terminal."""
        with self._lock:
            if self._quiet:
                return
            line = f"warning: {text}"
            if is_terminal(sys.stderr) and not os.environ.get("NO_COLOR"):
                line = f"\x1b[33m{line}\x1b[0m"
            self._print_above_live_line(line, sys.stderr)

    def table(self, title: str, rows: list[tuple[str, str]]) -> None:
        """Prints a two-column table: boxed on a terminal, aligned plain text elsewhere."""
        with self._lock:
            if self._quiet:
                return
            text = boxed_table(title, rows) if self._terminal else plain_table(title, rows)
            self._print_above_live_line(text, sys.stdout)

    def step(self, row: dict) -> None:
        """Shows the status line of one step.

        `row` has step, loss, grad_norm, step_seconds, tokens_per_second or of something else, and optionally lr, mfu (a
        fraction of 1; None on a chip of unknown speed), wire_bytes (mesh axis -> bytes sent per step) and skipped
        (updates skipped so far).
        """
        with self._lock:
            if self._quiet:
                return
            if row["step_seconds"] is not None:
                self._step_seconds.append(float(row["step_seconds"]))
            self._latest = status_fields(row, self._total_steps, self._eta(row["step"]))
            self._latest_shown, self._alive_at = False, time.monotonic()
            is_last = row["step"] >= self._total_steps
            if self._live:
                self._draw_live_line(force=is_last)
            elif is_last or row["step"] % self._every == 0:
                self._show_latest_plain()

    def evaluation(self, row: dict) -> None:
        """Prints one line that stays: `row` has step, eval_loss and further eval_…, as eval_bits_per_byte."""
        values = {name.removeprefix("eval_").replace("_", " "): x for name, x in row.items() if name != "step"}
        said = [f"{name} {number(x, '.4f')}" for name, x in values.items()]
        self.say(" | ".join([f"eval at step {row['step']}", *said]))

    def close(self) -> None:
        """Leaves the newest status line on the screen, also where a run stops between two printed steps."""
        self.doing("")
        with self._lock:
            if self._quiet or self._latest is None:
                return
            if self._live:
                self._draw_live_line(force=True)
                print(flush=True)
                self._drawn = ""
            elif not self._latest_shown:
                self._show_latest_plain()
            self._latest = None

    def _print_above_live_line(self, text: str, stream) -> None:
        redraw = self._live and self._latest is not None
        if redraw:  # stderr may be the same screen: the live line must be gone from it before either stream writes
            print(self._erase_line(), end="", flush=True)
        print(text, file=stream, flush=True)
        self._alive_at = time.monotonic()
        if redraw:
            self._draw_live_line(force=True)

    def _draw_live_line(self, force: bool) -> None:
        if self._latest is None or (not force and time.monotonic() - self._drawn_at < REDRAW_SECONDS):
            return
        columns = NOTEBOOK_COLUMNS if self._notebook else terminal_columns() - 1
        erase, self._drawn = self._erase_line(), fit_fields(self._latest, columns)
        print(erase + self._drawn, end="", flush=True)
        self._drawn_at = time.monotonic()

    def _erase_line(self) -> str:
        """A notebook knows no escape code for it: there the line is written over."""
        return f"\r{' ' * len(self._drawn)}\r" if self._notebook else ERASE_LINE

    def _show_latest_plain(self) -> None:
        if self._latest is not None:
            print(" | ".join(text for _, text in self._latest), flush=True)
        self._latest_shown = True

    def _eta(self, step: int) -> str:
        """The running median ignores the pauses of compilation, evaluation and checkpoints."""
        if step >= self._total_steps:
            return "0 s"
        if len(self._step_seconds) < MIN_STEPS_FOR_ETA:
            return "n/a"
        return human_seconds(statistics.median(self._step_seconds) * (self._total_steps - step))


def status_fields(row: dict, total_steps: int, eta: str) -> list[tuple[int, str]]:
    """The status line as (rank, text); a narrow terminal drops the fields of highest rank first."""
    percent = 100 * row["step"] / max(1, total_steps)
    mfu, skipped, per = row.get("mfu"), row.get("skipped") or 0, "_per_second"
    fields = [
        (0, f"step {row['step']}/{total_steps} {percent:.1f}%"),
        (0, f"loss {number(row['loss'], '.4f')}"),
        *([(5, f"lr {number(row['lr'], '.2e')}")] if "lr" in row else []),
        (4, f"grad norm {number(row['grad_norm'], '.3g')}"),
        (3, "step n/a" if row["step_seconds"] is None else f"step {milliseconds(row['step_seconds'])}"),
        *((2, f"{human_count(row[name])} {name.removesuffix(per)}/s") for name in row if name.endswith(per)),
        (6, "MFU n/a" if mfu is None else f"MFU {100 * mfu:.1f}%"),
        (7, wire_field(row.get("wire_bytes") or {})),
        (1, f"ETA {eta}"),
    ]
    return fields + ([(0, f"skipped {skipped}")] if skipped > 0 else [])


def wire_field(wire_bytes: dict) -> str:
    """Bytes this device sends per step, all axes together; `replica` is the slow link everything here is about."""
    text = f"wire {human_bytes(sum(wire_bytes.values()))}/step"
    return text + (f" (replica {human_bytes(wire_bytes['replica'])})" if "replica" in wire_bytes else "")


def fit_fields(fields: list[tuple[int, str]], columns: int) -> str:
    """Drops whole fields until the line fits: a line that wraps can no longer be rewritten in place."""
    kept = list(fields)
    while len(line := " | ".join(text for _, text in kept)) > columns:
        worst = max(kept, key=lambda field: field[0])
        if worst[0] == 0:
            return line[: max(0, columns)]
        kept.remove(worst)
    return line


def plain_table(title: str, rows: list[tuple[str, str]]) -> str:
    """Title, then `name  value` lines; a value of several lines is indented below its first. A row without a value is a
    heading."""
    width = max((len(name) for name, value in rows if value), default=0)
    indent = "\n" + " " * (width + 6)
    line = lambda name, value: f"    {name:<{width}}  {value.replace(chr(10), indent)}" if value else f"  {name}"
    return "\n".join([title, *(line(*row) for row in rows)])


def boxed_table(title: str, rows: list[tuple[str, str]]) -> str:
    """The table drawn by rich for a terminal."""
    import rich.box  # slow to import, needed once and only on a terminal
    from rich.console import Console as RichConsole
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title, style="bold"), title_justify="left", show_header=False, box=rich.box.ROUNDED)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:  # Text, because rich would read "[data]" in a plain string as markup
        table.add_row(Text(name, style="" if value else "bold"), Text(value))
    console = RichConsole(file=sys.stdout, width=terminal_columns())
    with console.capture() as captured:
        console.print(table)
    return captured.get().rstrip("\n")


def is_terminal(stream) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def is_notebook(stream) -> bool:
    """Whether what is written appears below a cell of Jupyter, Colab or the like."""
    return type(stream).__module__.startswith("ipykernel.")


def terminal_columns() -> int:
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80  # some containers report 0
    except OSError:
        return 80


def number(value: float | None, spec: str) -> str:
    return "n/a" if value is None else format(float(value), spec)


def milliseconds(seconds: float) -> str:
    return f"{1000 * seconds:.{0 if seconds >= 0.1 else 1}f} ms"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Lines whose columns stand below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def human_bytes(n: float) -> str:
    """`1.23 MiB`; whole bytes below 1 KiB."""
    return _with_unit(n, 1024, ("B", "KiB", "MiB", "GiB", "TiB", "PiB"), decimals=2)


def human_count(n: float) -> str:
    """`1.2 M`, with B for 10^9, as parameters are counted; whole numbers below a thousand."""
    return _with_unit(n, 1000, ("", "k", "M", "B", "T"), decimals=1)


def _with_unit(n: float, base: int, units: tuple[str, ...], decimals: int) -> str:
    n = float(n)
    if round(abs(n)) < base:
        return f"{n:.0f} {units[0]}".rstrip()
    unit = 0
    while unit == 0 or (round(abs(n), decimals) >= base and unit < len(units) - 1):
        n, unit = n / base, unit + 1  # compared after rounding: 1023.999 KiB is 1.00 MiB, not 1024.00 KiB
    return f"{n:.{decimals}f} {units[unit]}"


def human_seconds(s: float) -> str:
    """`345 ms`, `12.3 s`, `5 min 02 s`, `1 h 02 min` or `3 d 04 h`."""
    if round(s, 3) < 1:
        return f"{1000 * s:.0f} ms"
    if round(s, 1) < 60:
        return f"{s:.1f} s"
    if round(s) < 3600:
        return f"{round(s) // 60} min {round(s) % 60:02d} s"
    minutes = round(s / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    hours = round(s / 3600)
    return f"{hours // 24} d {hours % 24:02d} h"

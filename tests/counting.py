"""What the default run costs, counted: starts of train.py as a process, and programs compiled by the tests' own
processes. More than the numbers below, and the run fails; no clock does. A new test that needs a start of its own says
why an existing one could not be shared, or why `helpers.run_here` would not do, or it is `slow`.
"""

import os
import sys
from typing import Any

import jax
import pytest

MOST = {"starts of train.py": 16, "compiled programs": 1_600}
COMPILED = "/jax/core/compile/backend_compile_duration"  # one event a program, also if the cache had it

counts = dict.fromkeys(MOST, 0)


def starts(arguments: list[str]) -> int:
    """How many processes of train.py a command starts, by its name or by a line of Python that imports it."""
    if not any(a.endswith("train.py") or "import train" in a for a in arguments):
        return 0
    return next((int(a.partition("=")[2]) for a in arguments if a.startswith("--processes=")), 1)


def watch_processes(event: str, details: tuple) -> None:
    if event == "subprocess.Popen" and isinstance(details[1], list | tuple):
        counts["starts of train.py"] += starts([os.fsdecode(a) for a in details[1]])


def watch_compilations(event: str, *_: Any, **__: Any) -> None:
    counts["compiled programs"] += event == COMPILED


class Counting:
    """Of this process; where pytest has workers, of all of them together."""

    def __init__(self):
        sys.addaudithook(watch_processes)
        jax.monitoring.register_event_duration_secs_listener(watch_compilations)
        self.found = [counts]
        self.seconds = 0.0

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """A worker has ended."""
        if output := getattr(node, "workeroutput", None):
            self.found.append(output["counts"])
            self.seconds += output["seconds"]

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        times = os.times()
        own, children = times.user + times.system, times.children_user + times.children_system
        if hasattr(session.config, "workeroutput"):
            session.config.workeroutput.update(counts=counts, seconds=own + children)
            return
        workers = len(self.found) > 1  # they are children, too
        self.seconds += own if workers else own + children
        if self.exceeded(session.config) and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def total(self, what: str) -> int:
        return sum(found[what] for found in self.found)

    def exceeded(self, config: pytest.Config) -> list[str]:
        """What the default run, or a part of it, has had too many of."""
        default = config.option.markexpr in config.getini("addopts")
        return [what for what, most in MOST.items() if default and self.total(what) > most]

    def pytest_terminal_summary(self, terminalreporter: Any, config: pytest.Config) -> None:
        terminalreporter.section("what it cost")
        terminalreporter.line(f"{self.seconds:.0f} seconds of CPU, with workers and children")
        for what, most in MOST.items():
            terminalreporter.line(f"{self.total(what):,} {what}; the default run has at most {most:,}")

    def pytest_unconfigure(self, config: pytest.Config) -> None:
        """Below the line that says that all have passed, which would be believed."""
        if not hasattr(config, "workeroutput"):
            for what in self.exceeded(config):
                print(f"FAILED: too many {what} (tests/counting.py)")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Counting(), "what it cost")

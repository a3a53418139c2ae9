"""Starts N processes of one script on this machine, as if each were a machine of its own.

python -m runtime.launch --processes=2 -- train.py --config=configs/tiny.py

Each process gets --coordinator=127.0.0.1:PORT --num_processes=N --process_id=i, and each line it prints is prefixed
with [i]. When one fails the others are stopped, and nothing is left running however the launcher itself ends.

Exit codes: 0 all succeeded; 75 stopped and saved, start again to go on; 2 bad usage; otherwise that of the process that
failed first (128+n if signal n killed it). SIGTERM or Ctrl-C: once lets all save, twice kills them after the grace,
three times kills them now.
"""

import argparse
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from runtime import usage

EX_TEMPFAIL = 75  # "saved, restart me": sysexits.h calls it a temporary failure, schedulers requeue on it
POLL_SECONDS = 0.05
OUR_FLAGS = ("--coordinator", "--num_processes", "--process_id")
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Job:
    """The running processes, and what the launcher was asked to do with them."""

    def __init__(self, commands: list[list[str]], grace: float, stop_requests: list[str]):
        self.grace = grace
        self.stop_requests = stop_requests  # the signal handler only appends its reason, `wait` acts on it
        self.first_failure: tuple[int, int] | None = None  # (process, return code)
        self.deadline = float("inf")  # when those still running get SIGKILL
        self._requests_handled = 0
        self._killed = False
        self._reader_gone = False
        self._finished: set[int] = set()
        self._output_lock = threading.Lock()
        self._readers: list[threading.Thread] = []
        self.processes: list[subprocess.Popen] = []
        try:
            for command in commands:  # all before the first thread: a fork beside threads may deadlock
                self.processes.append(_start(command))
        except BaseException:
            self.kill()
            raise
        for i, process in enumerate(self.processes):
            for source, sink in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
                reader = threading.Thread(target=self._copy_lines, args=(i, source, sink), daemon=True)
                reader.start()
                self._readers.append(reader)

    def wait(self) -> int:
        """Waits for all processes, stopping them where one fails or a signal asks for it; returns the exit code."""
        while len(self._finished) < len(self.processes):
            self._collect_finished()
            if len(self.stop_requests) > self._requests_handled:
                self._handle_stop_request()
            if time.monotonic() >= self.deadline:
                self._say(f"killing what still runs after the grace of {self.grace:g} s")
                self.kill()
                self.deadline = float("inf")
            time.sleep(POLL_SECONDS)
        for reader in self._readers:
            reader.join(timeout=5)
        return self._exit_code()

    def kill(self) -> None:
        """SIGKILLs every process with its whole group (data loading workers belong to it) and reaps it."""
        self._killed = True
        for process in self.processes:
            if process.poll() is None:
                _kill_group(process)
        for process in self.processes:
            process.wait()

    def _collect_finished(self) -> None:
        for i, process in enumerate(self.processes):
            if i in self._finished or process.poll() is None:
                continue
            self._finished.add(i)
            _kill_group(process)  # workers it left behind would hold its output open for ever
            if process.returncode not in (0, EX_TEMPFAIL) and self.first_failure is None:
                self.first_failure = (i, process.returncode)
                how = describe(process.returncode, by_launcher=self._killed)
                self._say(f"process {i} {how}; stopping the others (grace {self.grace:g} s)")
                self._terminate_all()
                self.deadline = min(self.deadline, time.monotonic() + self.grace)

    def _handle_stop_request(self) -> None:
        """First signal: forwarded, and all the time to save. Second: the grace. Third: none.

        The second does not kill at once because schedulers deliver one stop twice: to the step and to its processes.
        """
        reason = self.stop_requests[self._requests_handled]
        self._requests_handled += 1
        if self._requests_handled == 1:
            self._say(f"{reason}: sent SIGTERM to all processes, waiting for them to save")
            self._terminate_all()
        elif self._requests_handled == 2:
            self._say(f"{reason} again: killing what still runs in {self.grace:g} s; once more kills now")
            self.deadline = min(self.deadline, time.monotonic() + self.grace)
        else:
            self.kill()

    def _terminate_all(self) -> None:
        # To the processes, not their groups: a trainer needs its data workers alive until it has saved.
        for process in self.processes:
            process.terminate()

    def _exit_code(self) -> int:
        if self.first_failure is not None:
            code = shell_code(self.first_failure[1])
            self._say(f"process {self.first_failure[0]} failed first; exit code {code}")
            return code
        return max(process.returncode for process in self.processes)  # 0, or 75 where at least one gave that

    def _copy_lines(self, i: int, source, sink) -> None:
        """Copies whole lines, so that lines of two processes never mix."""
        for line in source:
            with self._output_lock:
                try:
                    sink.buffer.write(b"[%d] " % i + line.rstrip(b"\n") + b"\n")
                    sink.buffer.flush()
                except OSError:  # our reader is gone (`| head`, a closed terminal)
                    self._lose_output(sink)

    def _lose_output(self, sink) -> None:
        """Goes on reading into nowhere: a process whose pipe is full would hang instead of saving."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sink.fileno())
        os.close(nowhere)
        if not self._reader_gone:  # one request to stop, also where stdout and stderr both went
            self._reader_gone = True
            self.stop_requests.append("nobody reads the output any more")

    def _say(self, text: str) -> None:
        with self._output_lock, contextlib.suppress(OSError):  # a closed stderr must not keep us from stopping them
            print(f"launch: {text}", file=sys.stderr, flush=True)


def _start(command: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},  # lines when they are printed, not when 8 KiB are full
        start_new_session=True,  # Ctrl-C reaches the launcher alone, which forwards it; the group can be killed whole
        preexec_fn=_die_with_parent(),
    )


def _die_with_parent():
    """What a child runs before exec so that `kill -9` of the launcher takes it along; None where there is no prctl."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, launcher = ctypes.CDLL(None).prctl, os.getpid()  # looked up before the fork, where little is safe

    def in_child() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != launcher:  # it died between the fork and prctl
            os._exit(128 + signal.SIGKILL)

    return in_child


def _kill_group(process: subprocess.Popen) -> None:
    # ProcessLookupError: the group is empty. PermissionError: how macOS says so while a zombie is in it.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def describe(returncode: int, by_launcher: bool = False) -> str:
    """How a process ended, in words."""
    if by_launcher and returncode == -signal.SIGKILL:
        return "had to be killed"
    if returncode >= 0:
        return f"failed with exit code {returncode}"
    name = signal.Signals(-returncode).name if -returncode in set(signal.Signals) else f"signal {-returncode}"
    hints: dict[int, str] = {
        signal.SIGKILL: " (out of memory? see dmesg)",
        signal.SIGABRT: " (JAX does so where process 0 has gone: see library.log in the workdir)",
    }
    return f"was killed by {name}{hints.get(-returncode, '')}"


def shell_code(returncode: int) -> int:
    """The exit code a shell gives: 128 + n for a process that died of signal n."""
    return returncode if returncode >= 0 else 128 - returncode


def free_port() -> int:
    # Another program may take the port before process 0 does; the range is large, and the failure is a clear one.
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Splits at the first `--` into our options and the script with its flags; exits 2 where they make no sense."""
    split = argv.index("--") if "--" in argv else len(argv)
    parser = usage.parser(__doc__, "python -m runtime.launch", then="-- SCRIPT [FLAGS...]")
    parser.add_argument("--processes", type=int, required=True, help="how many to start")
    parser.add_argument("--grace", type=float, default=20.0, metavar="SECONDS", help="from SIGTERM to SIGKILL")
    options, script = parser.parse_args(argv[:split]), argv[split + 1 :]
    if not script:
        parser.error("nothing to start: put the script and its flags after `--`, as in the line above")
    if options.processes < 1:
        parser.error(f"--processes={options.processes}: at least 1 process is needed")
    if not 0 <= options.grace < float("inf"):
        parser.error(f"--grace={options.grace:g}: give a number of seconds, 0 or more")
    if not script[0].startswith("-") and not Path(script[0]).is_file():
        parser.error(f"no script {script[0]} in {Path.cwd()}: the first word after `--` is a Python file")
    for flag in script[1:]:
        if flag.split("=")[0] in OUR_FLAGS:
            parser.error(f"{flag.split('=')[0]} is set by the launcher for each process: leave it out")
    return options, script


def main(argv: list[str] | None = None) -> int:
    options, script = parse(sys.argv[1:] if argv is None else argv)
    address = f"127.0.0.1:{free_port()}"
    commands = [
        [
            sys.executable,
            *script,
            f"--coordinator={address}",
            f"--num_processes={options.processes}",
            f"--process_id={i}",
        ]
        for i in range(options.processes)
    ]
    stop_requests: list[str] = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup: stays ignored
            signal.signal(number, lambda n, _: stop_requests.append(f"got {signal.Signals(n).name}"))
    job = Job(commands, options.grace, stop_requests)
    try:
        return job.wait()
    finally:
        job.kill()


if __name__ == "__main__":
    sys.exit(main())

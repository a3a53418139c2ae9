"""runtime/agree.py and what it stands on: processes meet, compare, decide together, and end together."""

import contextlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import helpers
import pytest

from configs import base
from recipes import methods
from runtime import agree, preemption, rendezvous
from runtime import config as configuration
from runtime.config import RunError, UsageError
from runtime.launch import free_port


def several(scenario: str, folder: Path, seconds: float = 60) -> tuple[list[int], list[str], list[dict]]:
    """Two processes of tests/agreeing.py, without the launcher, which would end one when the other fails: exit codes,
    what each has printed, what each has found."""
    address = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "tests/agreeing.py", scenario, str(folder), f"--coordinator={address}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": helpers.ROOT}
    both = [subprocess.Popen([*command, "--num_processes=2", f"--process_id={i}"], **pipes) for i in (0, 1)]
    try:
        printed = [process.communicate(timeout=seconds)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    files = [folder / f"{i}.json" for i in (0, 1)]
    return (
        [process.returncode for process in both],
        [helpers.without_gloo(text) for text in printed],
        [json.loads(file.read_text()) if file.exists() else {} for file in files],
    )


@pytest.fixture(scope="module")
def talked(tmp_path_factory) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("talk")
    codes, printed, found = several("talk", folder)
    assert codes == [0, 0] and all(found), printed
    return folder, found


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("everyone", [{"me": 0}, {"me": 1}]),
        ("decided", "by 0"),
        ("decided badly", ["UsageError", "no such thing"]),
        ("equal", ["", None]),
        ("shared", ["", None]),
    ],
)
def test_all_get_the_same_answer(talked, what, expected):
    assert [found[what] for found in talked[1]] == [expected, expected]


def test_what_fails_in_one_fails_in_all(talked):
    texts = [found["together"] for found in talked[1]]
    assert texts[1] == ["UsageError", "data.path='x' does not exist"]
    assert texts[0] == ["UsageError", "process 1: data.path='x' does not exist"]


def test_a_disagreement_names_each_fact_its_values_and_who(talked):
    for kind, text in (found["same"] for found in talked[1]):
        assert kind == "UsageError" and text.splitlines()[1:-1] == [
            '  data: "0f" (process 0), "ff" (process 1)',
            "  only here: null (process 0), 1 (process 1)",
            "  optimizer.lr: 0.001 (process 0), 0.005 (process 1)",
        ]


def test_a_folder_that_is_not_shared_is_found_out_by_all(talked):
    folder, found = talked
    for process in (0, 1):
        kind, text = found[process]["not shared"]
        assert (
            kind == "UsageError" and f"workdir: {folder}/machine 1 is not the folder that process 0 writes to" in text
        )


def test_a_held_lock_is_said_by_all(talked):
    for kind, text in (found["held"] for found in talked[1]):
        assert kind == "UsageError" and f"workdir: {talked[0]}/run is in use by process" in text


def test_processes_that_are_at_different_places_say_so(talked):
    assert talked[1][0]["elsewhere"] == ["RunError", "process 1 came to “there” where process 0 came to “here”"]


def test_a_wait_has_a_name_and_an_end_and_says_who_is_missing(talked):
    kind, text = talked[1][0]["alone"]
    assert kind == "RunError" and text == "process 1 did not come to “a compilation” within 0.5 s, so this process ends"


def test_all_take_the_same_way_where_one_cannot_read(tmp_path):
    codes, printed, (zero, one) = several("restore", tmp_path)
    assert codes == [0, 0] and zero == one, printed
    assert zero["saved"] == [1, 2] and zero["step"] == 1 and zero["equal"] and zero["again"] == [1, 2]
    assert "step 2 is corrupt: array w cannot be read by process 1" in zero["said"][0]
    assert "set aside as 2.damaged" in zero["said"][1]


@pytest.mark.parametrize(
    ("scenario", "code", "why"),
    [
        pytest.param("raises", 1, "ValueError: something unforeseen", marks=pytest.mark.slow),
        pytest.param("fails", 1, "the disk is full", marks=pytest.mark.slow),
        ("killed", -9, "it ended without a word"),
    ],
)
def test_nobody_waits_for_a_process_that_has_gone(tmp_path, scenario, code, why):
    started = time.monotonic()
    codes, printed, _ = several(scenario, tmp_path)
    assert codes == [1, code], printed
    assert f"error: process 1 failed, so this one ends, too: {why}" in printed[0]
    assert printed[0].count("error: ") == 1
    assert time.monotonic() - started < 25, "in seconds, not after a heartbeat"


def test_sigterm_before_training_ends_all_at_once(tmp_path):
    codes, printed, _ = several("stopped-before", tmp_path)
    assert codes == [75, 75], printed
    assert "stopped by SIGTERM before the first step" in printed[1]


def test_sigterm_to_one_stops_all_after_the_same_step(tmp_path):
    codes, printed, (zero, one) = several("stopped-training", tmp_path)
    assert codes == [0, 0] and zero == one and 7 <= zero["step"] < 2000, printed


def test_sigterm_to_a_process_that_fails_does_not_end_it_otherwise(monkeypatch):
    """It ends already, with its own sentence and code, and has told the others."""
    monkeypatch.setattr(agree, "failing", threading.Event())
    notice = preemption.notice()
    notice.training_begins(0)
    listener = [thread for thread in threading.enumerate() if thread.name == "SIGTERM"][-1]
    agree.tell(1, "the disk is full")
    os.kill(os.getpid(), signal.SIGTERM)
    listener.join(10)
    heard = not listener.is_alive()
    preemption.done()
    assert heard and not notice.requested(1)


# ── before JAX starts ────────────────────────────────────────────────────────────────────────────────────────────


def meet(coordinator: str, *who: tuple[int, int], seconds: float = 20.0) -> list:
    """What came of rendezvous.meet in each of these (process, of how many), all at once."""
    results: list = [None] * len(who)

    def one(place: int) -> None:
        me, count = who[place]
        try:
            results[place] = sorted(rendezvous.meet(coordinator, count, me, seconds, lambda text: None))
        except (UsageError, RunError) as error:
            results[place] = error

    threads = [threading.Thread(target=one, args=(place,)) for place in range(len(who))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture
def coordinator() -> str:
    return f"127.0.0.1:{free_port()}"


def knocking(coordinator: str) -> socket.socket:
    """Connected to process 0, as soon as it listens."""
    for _ in range(2000):
        try:
            return socket.create_connection(rendezvous.parse_address(coordinator), timeout=20)
        except ConnectionRefusedError:
            time.sleep(0.01)
    raise AssertionError(f"nobody listens at {coordinator}")


def test_all_meet(coordinator):
    assert meet(coordinator, (2, 3), (0, 3), (1, 3)) == [[0], [1, 2], [0]]
    assert meet(coordinator, (0, 1)) == [[]]


def test_who_does_not_come_is_named_to_all_who_did(coordinator):
    for error in meet(coordinator, (0, 4), (2, 4), seconds=1.0):
        assert isinstance(error, RunError)
        assert f"processes 1, 3 of 4 did not come to {coordinator} within 1 s" in str(error)


def test_a_process_0_that_does_not_come_is_said(coordinator):
    (error,) = meet(coordinator, (1, 2), seconds=0.5)
    assert isinstance(error, RunError)
    assert f"process 1 did not find process 0 at {coordinator} within 0 s (nobody listens there)" in str(error)


def test_a_number_given_twice_is_refused_and_the_others_meet(coordinator):
    first: list = []
    waiting = threading.Thread(target=lambda: first.extend(meet(coordinator, (0, 3), (1, 3))))
    waiting.start()
    time.sleep(0.5)
    (error,) = meet(coordinator, (1, 3))
    assert isinstance(error, UsageError) and "--process_id=1: that process is here already" in str(error)
    assert meet(coordinator, (2, 3)) == [[0]]
    waiting.join()
    assert first == [[1, 2], [0]]


def test_a_number_given_twice_is_refused_after_the_last_has_come_too(coordinator):
    """Both have come while process 0 was listening to a stranger who says nothing."""
    first: list = []
    waiting = threading.Thread(target=lambda: first.extend(meet(coordinator, (0, 2))))
    waiting.start()
    with knocking(coordinator):
        one, again = knocking(coordinator), knocking(coordinator)
        for connection in (one, again):
            connection.sendall(b'{"process": 1, "of": 2}\n')
    with one, again:
        assert json.loads(one.makefile().readline()) == {"go": True}
        assert "--process_id=1: that process is here already" in json.loads(again.makefile().readline())["usage"]
    waiting.join()
    assert first == [[1]]


def test_who_leaves_before_all_are_there_may_come_again(coordinator):
    first: list = []
    waiting = threading.Thread(target=lambda: first.extend(meet(coordinator, (0, 3))))
    waiting.start()
    (error,) = meet(coordinator, (1, 3), seconds=0.5)
    assert isinstance(error, RunError) and "it is there, and waits for others" in str(error)
    assert sorted(meet(coordinator, (1, 3), (2, 3))) == [[0], [0]]
    waiting.join()
    assert first == [[1, 2]]


def test_another_number_of_processes_is_refused_by_all(coordinator):
    for error in meet(coordinator, (0, 3), (1, 2)):
        assert isinstance(error, UsageError)
        assert "--num_processes: process 1 was started with 2, process 0 with 3" in str(error)


def test_strangers_do_no_harm(coordinator):
    """A port scanner at process 0; and a process that talks to something that is not process 0."""

    def knock() -> None:
        for words in (b"", b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"process": "x"}\n', b"\xff\xfe\n", b"x" * 10000):
            with contextlib.suppress(OSError), knocking(coordinator) as stranger:  # it may hang up on us
                stranger.sendall(words)

    stranger = threading.Thread(target=knock)
    results: list = []
    zero = threading.Thread(target=lambda: results.extend(meet(coordinator, (0, 2))))
    zero.start()
    stranger.start()
    stranger.join()
    results.extend(meet(coordinator, (1, 2)))
    zero.join()
    assert sorted(results) == [[0], [1]]

    with socket.create_server(rendezvous.parse_address(coordinator)) as server:
        threading.Thread(
            target=lambda: server.accept()[0].sendall(b"220 mail.example.org ESMTP\r\n"), daemon=True
        ).start()
        (error,) = meet(coordinator, (1, 2), seconds=1.0)
    assert isinstance(error, RunError) and f"did not find process 0 at {coordinator}" in str(error)


SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environment", "several", "said"),
    [
        ({}, False, ""),
        ({**SLURM, "SLURM_STEP_NODELIST": "node[1-4]"}, True, ""),
        (SLURM, False, "srun python train.py"),  # inside sbatch's own script
        ({**SLURM, "SLURM_NTASKS": "1"}, False, ""),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True, ""),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False, ""),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False, ""),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True, ""),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True, ""),
    ],
)
def test_a_launcher_is_known_by_what_it_sets(environment, several, said, monkeypatch):
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "KUBERNETES_SERVICE_HOST", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found, warning = rendezvous.found_by_jax()
    assert found == several and said in (warning or "") and bool(said) == bool(warning)


# ── facts ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_code_is_compared_and_flags_that_change_nothing_are_not(monkeypatch, tmp_path):
    before = agree.code_facts()
    monkeypatch.setenv("XLA_FLAGS", f"--xla_dump_to={tmp_path} --xla_force_host_platform_device_count=3")
    assert agree.code_facts()["XLA_FLAGS"] == ""
    monkeypatch.setenv("XLA_FLAGS", "--xla_b=1 --xla_a=2")
    assert agree.code_facts() == {**before, "XLA_FLAGS": "--xla_a=2 --xla_b=1"}


def test_every_key_is_compared_but_where_files_lie(tmp_path):
    options = ["train.py", f"--config={helpers.ROOT}/configs/tiny.py", "--workdir=w", "--noresume"]
    keys = {key for key, _ in configuration.flatten(base.get_config())}
    facts = agree.typed(*methods.parse(options, ""))
    assert keys - facts.keys() == {"data.path", "data.tokenizer"}
    assert (facts["workdir"], facts["--resume"]) == ("w", False)
    assert facts["versions.python"] == platform.python_version()
    others = agree.typed(*methods.parse([*options, f"--config.data.path={tmp_path}"], ""))
    assert {key for key in facts if others.get(key) != facts[key]} == {"versions.python"}


def test_what_a_run_goes_on_with_is_one_line():
    before = {"code": "0f", "versions.jax": "0.10.2", "tokens": 4}
    assert agree.changed(before, before) == agree.changed({}, before) == ""
    line = agree.changed(before, {"code": "1f", "versions.jax": "0.12.0", "new": 1})
    assert line == "not as when it was saved: code 0f -> 1f, versions.jax 0.10.2 -> 0.12.0"

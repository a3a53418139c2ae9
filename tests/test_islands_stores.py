"""The log in real object stores on this machine (tests/object_stores.py): what they answer, the invariants of
tests/islanders.py, many writers at once, and what a user is told who may not, cannot or does not reach them."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import helpers
import islanders
import object_stores
import pytest

pytest.importorskip("cryptography", reason="pip install -r requirements-islands.txt")
pytest.importorskip("obstore", reason="pip install -r requirements-islands.txt")

from islands import check, status
from islands.log import PATIENCE, Log
from islands.record import PUSH, Run
from islands.store import Away, StoreError, open_store, run
from islands.trust import Key
from islands.view import Member

pytestmark = [pytest.mark.slow, pytest.mark.prove]

SCHEDULES = {"seaweedfs": 50, "azurite": 50, "moto": 5}


class Started:
    """A store, and the environment in which it is found."""

    def __init__(self, kind: str, environment: dict[str, str], server: object_stores.Server):
        self.kind, self.environment, self.server = kind, environment, server
        self._logs = 0

    def url(self) -> str:
        """Where nothing is yet."""
        self._logs += 1
        return f"{object_stores.SCHEME[self.kind]}://{object_stores.BUCKET}/log-{self._logs}"


def started(kind: str, folder: Path, **options) -> Iterator[Started]:
    if why := object_stores.MISSING[kind]:
        pytest.skip(why)
    with object_stores.STORES[kind](folder, **options) as (environment, server):
        yield Started(kind, environment, server)


@pytest.fixture(scope="module", params=object_stores.STORES)
def server(request, tmp_path_factory):
    yield from started(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture
def asked(server, monkeypatch):
    """The store, from here."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    return server


# ── what they answer ─────────────────────────────────────────────────────────────────────────────────────────────


def test_it_answers_as_the_log_needs(asked):
    store = open_store(asked.url())
    assert run(store.get("records/1", 10)) is None and run(store.last_modified("heartbeats/a")) is None
    assert run(store.create("records/1", b"one")) is True
    assert run(store.create("records/1", b"two")) is False
    assert run(store.get("records/1", 10)) == b"one" and run(store.get("records/1", 2)) == b"on"
    assert run(store.get_range("records/1", 1, 10)) == b"ne"
    assert run(store.create("records/3", b"")) and run(store.create("records/2", b""))
    assert run(store.get("records/3", 10)) == b""
    assert run(store.list("records")) == ["records/1", "records/2", "records/3"]
    for number in range(4):  # Azurite may give all, whatever it is asked
        assert run(store.list("records", f"records/{number}")) == [f"records/{n}" for n in range(number + 1, 4)]
    for said in (b"1", b"2"):
        run(store.put("heartbeats/a", said))
        assert run(store.get("heartbeats/a", 10)) == said
    assert abs(run(store.last_modified("heartbeats/a")) - time.time()) < 60
    for _ in range(2):
        run(store.delete("records/1"))
        assert run(store.get("records/1", 10)) is None


def test_a_payload_of_megabytes_is_there_as_a_whole_and_in_ranges(asked):
    store, data = open_store(asked.url()), Random(0).randbytes(20_000_000)
    assert run(store.create("payloads/1", data)) is True
    assert run(store.get("payloads/1", len(data) + 1)) == data
    for first, count in ((0, 10), (8_388_600, 16), (len(data) - 5, 100)):  # SeaweedFS keeps pieces of 4 MiB
        assert run(store.get_range("payloads/1", first, count)) == data[first : first + count]


# ── what must hold ───────────────────────────────────────────────────────────────────────────────────────────────


def test_schedules_full_of_faults_keep_every_invariant(asked, record_property):
    """Three members, whose requests and answers go astray on the way; one after another, so the order is known."""
    number = SCHEDULES[asked.kind]
    for seed in range(number):
        try:
            islanders.play(Random(seed), store=open_store(asked.url()))
        except islanders.Broken as error:
            raise AssertionError(f"schedule {seed}: {error}") from error
    record_property(f"schedules on {asked.kind}", number)


ISLANDS, ROUNDS = ("a", "b", "c", "d"), 6


class Race:
    """Islands that push at once, each in a thread of its own. acknowledged: their entries, by (island, round)."""

    def __init__(self, url: str):
        keys = {name: Key.new() for name in ("owner", *ISLANDS)}
        members = {name: Member(keys[name].public) for name in ISLANDS}
        self.url, self.acknowledged, self.errors = url, {}, []
        run(Log.begin(open_store(url), Run(owner=keys["owner"].public, budget=1000, facts={}), members, keys["owner"]))
        self._barrier = threading.Barrier(len(ISLANDS))
        self.threads = [threading.Thread(target=self._takes_part, args=(name, keys[name])) for name in ISLANDS]
        for thread in self.threads:
            thread.start()

    def _takes_part(self, name: str, key: Key) -> None:
        try:
            log = run(Log.open(open_store(self.url), name, key))
            run(log.read())
            run(islanders.insist(log.join))
            self._barrier.wait(60)  # who joins later begins with a later round
            for clock in range(ROUNDS):
                blobs, fields = [f"{name} {clock}".encode()], {"clock": clock, "base": log.view.version}
                self.acknowledged[name, clock] = run(islanders.insist(lambda b=blobs, f=fields: log.push(b, **f)))
        except Exception as error:
            self.errors.append(error)

    def ended(self) -> None:
        """One writer has won each number, and whatever was acknowledged is there once, and can be read."""
        for thread in self.threads:
            thread.join()
        assert not self.errors, self.errors
        reader = run(Log.open(open_store(self.url)))
        entries = run(reader.read())
        run(reader.look_ahead())
        pushed = [entry for entry in entries if entry.record and entry.record.type == PUSH]
        assert all(entry.verdict.folded for entry in entries)
        assert {(entry.island, entry.record.clock): entry for entry in pushed} == self.acknowledged
        assert len(pushed) == len(ISLANDS) * ROUNDS
        for entry in pushed:
            assert run(reader.download(*entry.record.payloads)) == f"{entry.island} {entry.record.clock}".encode()


# moto looks whether an object is there and stores it in two steps, without a lock between them.
ONE_WINS = pytest.mark.parametrize("server", ["seaweedfs", "azurite"], indirect=True)


@ONE_WINS
def test_of_many_that_push_at_once_each_gets_its_number(asked):
    Race(asked.url()).ended()


@pytest.mark.parametrize("server", ["seaweedfs"], indirect=True)  # the others are not made to survive it
def test_a_server_that_is_killed_and_comes_back_loses_nothing_and_repeats_nothing(asked):
    race = Race(asked.url())
    while len(race.acknowledged) < ROUNDS and not race.errors:
        time.sleep(0.01)
    asked.server.kill()
    with pytest.raises(Away):
        run(open_store(asked.url()).get("run.json", 1))
    before = len(race.acknowledged)
    time.sleep(3.0)
    assert len(race.acknowledged) == before < len(ISLANDS) * ROUNDS
    asked.server.start()
    race.ended()


@ONE_WINS
def test_a_store_that_lets_one_win_is_found_sound(asked):
    assert check.of(open_store(asked.url())).sound


# ── what a user is told ──────────────────────────────────────────────────────────────────────────────────────────


@contextlib.contextmanager
def surroundings(environment: dict[str, str]) -> Iterator[None]:
    """Only these, of all that obstore reads."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith(("AWS_", "AZURE_", "SSL_"))]:
            patch.delenv(name)
        for name, value in environment.items():
            patch.setenv(name, value)
        yield


def refused(url: str, environment: dict[str, str], why: str) -> None:
    """Whoever writes, and whoever reads, who else waits for a store that may come back: at once, in one line, and
    without what is secret."""
    with surroundings(environment):
        for ask in (lambda: check.of(open_store(url)), lambda: status.of(open_store(url))):
            before = time.monotonic()
            with pytest.raises(StoreError, match=re.escape(why)) as error:
                ask()
            assert time.monotonic() - before < PATIENCE / 2, "it has asked again and again"
            said = str(error.value)
            assert "\n" not in said and len(said) < 600
            for name, value in environment.items():
                assert not name.endswith(("SECRET_ACCESS_KEY", "ACCOUNT_KEY")) or value not in said


def command(environment: dict[str, str], *argv: str) -> subprocess.CompletedProcess[str]:
    with surroundings(environment):
        words = [sys.executable, "-m", "islands", *argv]
        return subprocess.run(words, cwd=helpers.ROOT, capture_output=True, text=True, timeout=120)


S3_URL, AZ_URL = (f"{scheme}://{object_stores.BUCKET}/log" for scheme in ("s3", "az"))
OTHER_KEY = "A" + object_stores.ACCOUNT_KEY[1:]
MISTAKES = [
    ("seaweedfs", S3_URL, {"AWS_SECRET_ACCESS_KEY": "not-the-word"}, "the secret does not belong to the key"),
    ("seaweedfs", S3_URL, {"AWS_ACCESS_KEY_ID": "nobody"}, "this key is not known there"),
    ("seaweedfs", "s3://another/log", {}, "create the bucket first"),
    ("azurite", AZ_URL, {"AZURE_STORAGE_ACCOUNT_KEY": OTHER_KEY}, "the key is not that of the account"),
    ("azurite", "az://another/log", {}, "create the container first"),
    ("moto", "s3://another/log", {}, "create the bucket first"),
]


@pytest.mark.parametrize("server, url, changed, why", MISTAKES, indirect=["server"])
def test_who_cannot_get_in_is_told_why_at_once(server, url, changed, why):
    refused(url, {**server.environment, **changed}, why)


OFF = """
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t which, struct timespec *now) {
  long failed = syscall(SYS_clock_gettime, which, now);
  if (!failed && which == CLOCK_REALTIME) now->tv_sec += atol(getenv("SECONDS_OFF"));
  return failed;
}
"""


@pytest.mark.parametrize("seconds", [3600, -3600])
@pytest.mark.parametrize("server", ["seaweedfs"], indirect=True)
def test_whose_clock_is_off_is_told_so_at_once(server, seconds, tmp_path):
    compiler = shutil.which("cc")
    if not compiler or sys.platform != "linux":
        pytest.skip("the clock of a process is set by a library made with cc, on Linux")
    (tmp_path / "off.c").write_text(OFF)
    subprocess.run([compiler, "-shared", "-fPIC", "-o", tmp_path / "off.so", tmp_path / "off.c"], check=True)
    off = {"LD_PRELOAD": str(tmp_path / "off.so"), "SECONDS_OFF": str(seconds)}
    process = command({**server.environment, **off}, "check", S3_URL)
    assert process.returncode == 2 and "the clock of this machine is off: set it" in process.stderr, process.stderr
    assert len(process.stderr.splitlines()) == 1
    assert command({**server.environment, **off, "SECONDS_OFF": "0"}, "check", S3_URL).returncode == 0


@pytest.fixture(scope="module")
def private(tmp_path_factory):
    """SeaweedFS behind TLS, with the certificate of a CA that nobody else knows."""
    yield from started("seaweedfs", tmp_path_factory.mktemp("private"), tls=True)


def test_a_private_ca_is_trusted_by_who_names_its_certificate(private, tmp_path):
    """SSL_CERT_FILE, as with other programs, in the place of the CAs that the system knows."""
    known = private.environment
    process = command(known, "check", S3_URL)
    assert process.returncode == 0, process.stderr
    unknown = {name: value for name, value in known.items() if name != "SSL_CERT_FILE"}
    refused(S3_URL, unknown, "signed by nobody who is trusted here: give SSL_CERT_FILE")
    object_stores.make_certificates(tmp_path)
    refused(S3_URL, {**known, "SSL_CERT_FILE": str(tmp_path / "ca.crt")}, "signed by nobody who is trusted here")
    elsewhere = known["AWS_ENDPOINT_URL"].replace("127.0.0.1", "localhost")
    refused(S3_URL, {**known, "AWS_ENDPOINT_URL": elsewhere}, "its certificate is that of another host")


def test_a_log_is_written_and_read_through_tls(private, monkeypatch):
    for name, value in private.environment.items():
        monkeypatch.setenv(name, value)
    islanders.play(Random(0), store=open_store(private.url()))


@pytest.mark.parametrize(
    "scheme, allowed, why",
    [("http", "true", "it speaks TLS: its endpoint begins with https://"), ("http", "", "needs AWS_ALLOW_HTTP=true")],
)
def test_an_endpoint_of_the_wrong_scheme_is_said(private, scheme, allowed, why):
    endpoint = private.environment["AWS_ENDPOINT_URL"].replace("https", scheme)
    refused(S3_URL, {**private.environment, "AWS_ENDPOINT_URL": endpoint, "AWS_ALLOW_HTTP": allowed}, why)


@pytest.mark.parametrize("server", ["seaweedfs"], indirect=True)
def test_an_endpoint_that_does_not_speak_tls_is_said(server):
    endpoint = server.environment["AWS_ENDPOINT_URL"].replace("http", "https")
    refused(S3_URL, {**server.environment, "AWS_ENDPOINT_URL": endpoint}, "it does not speak TLS")

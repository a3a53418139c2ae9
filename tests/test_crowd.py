"""A crowd of clients for minutes, and requests that a machine has made up, against serve.py on a socket."""

import contextlib
import json
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import types
import urllib.error
import urllib.request

import helpers
import pytest
from scripted import answer

pytest.importorskip("starlette", reason="pip install -r requirements-deploy.txt")

SECONDS, CLIENTS = 300, 64
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
IDLE = {"slackline_running 0", "slackline_waiting 0"}
SCHEMATHESIS = shutil.which("schemathesis", path=str(helpers.Path(sys.executable).parent))


@contextlib.contextmanager
def served(tmp_path, *options, program=("-m", "tests.scripted")):
    """serve.py, by default with an engine whose answers are known; gives its address."""
    command = [sys.executable, *program, f"--workdir={tmp_path}/mine", "--port=0", *options]
    process = subprocess.Popen(command, cwd=helpers.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        found = (re.match(r"mine at (\S+):", line) for line in iter(process.stdout.readline, ""))
        yield next(match[1] for match in found if match)
        process.terminate()
        out, err = process.communicate(timeout=90)
        assert (process.returncode, err) == (0, "") and out.endswith("stopped\n")
    finally:
        process.kill()


class Client(threading.Thread):
    """Asks, whole or as a stream, reads all or goes away, until the time is up. make(rng): what is asked, and the text
    that is to come. wrong: what was not as it should be."""

    def __init__(self, url, seed, end, make):
        super().__init__()
        self._url, self._rng, self._end, self._make = url, random.Random(seed), end, make
        self.wrong, self.answered, self.refused, self.left = [], 0, 0, 0

    def run(self):
        while time.monotonic() < self._end:
            rng = self._rng
            body, expected = self._make(rng)
            try:
                self._ask(body | {"stream": rng.random() < 0.5}, expected, goes=rng.random() < 0.1)
            except urllib.error.HTTPError as error:
                if error.code == 429 and int(error.headers["retry-after"]) >= 1:
                    self.refused += 1
                    time.sleep(rng.random())
                else:
                    self.wrong.append((error.code, error.read()))
            except Exception as error:  # whatever it is, it is wrong
                self.wrong.append(repr(error))

    def _ask(self, body, expected, goes):
        with post(self._url, body) as reply:
            if goes and body["stream"]:
                reply.read(200)
                self.left += 1
                return
            text = joined(reply.read().decode()) if body["stream"] else json.load(reply)["choices"][0]["text"]
        self.answered += 1
        if text != expected:
            self.wrong.append((body, text))


def post(url, body):
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
    request.add_header("content-type", "application/json")
    return urllib.request.urlopen(request, timeout=120)


def drawn(rng):
    """What is asked, of a seed."""
    prompt = "".join(rng.choices("abc", k=rng.randrange(1, 100)))
    return {"model": "mine", "prompt": prompt, "max_tokens": rng.randrange(1, 120), "seed": rng.randrange(10**6),
            "echo": True}  # fmt: skip


def scripted(rng):
    body = drawn(rng)
    sampling = types.SimpleNamespace(seed=body["seed"], temperature=1.0)
    asked = types.SimpleNamespace(sampling=sampling, max_tokens=body["max_tokens"], prompt=body["prompt"].encode())
    return body, body["prompt"] + bytes(answer(asked)[: body["max_tokens"]]).decode(errors="replace")


def joined(text):
    *events, last, end = text.split("\n\n")
    assert (last, end) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events if not event.startswith(":")]
    return "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])


def check_crowd(url, seconds, make, least):
    """least: answers a second."""
    clients = [Client(url, seed, time.monotonic() + seconds, make) for seed in range(CLIENTS)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert [wrong for client in clients for wrong in client.wrong][:3] == []
    answered, left = sum(c.answered for c in clients), sum(c.left for c in clients)
    print(f"{answered} answers, {sum(c.refused for c in clients)} refused, {left} clients left before the end")
    assert answered > least * seconds and left
    end = time.monotonic() + 10
    while not set(metrics(url)) >= IDLE and time.monotonic() < end:
        time.sleep(0.1)
    lines = metrics(url)
    assert set(lines) >= IDLE and not any('status="5' in line for line in lines)


EACH = pytest.mark.parametrize(
    "seconds", [pytest.param(4, marks=pytest.mark.slow), pytest.param(SECONDS, marks=pytest.mark.prove)]
)


@EACH
def test_a_crowd_loses_nothing_and_mixes_nothing_up(seconds, tmp_path):
    with served(tmp_path, "--most_waiting=32") as url:
        check_crowd(url, seconds, scripted, least=5)


@EACH
def test_in_a_crowd_a_model_answers_as_it_does_alone(seconds, tmp_path):
    helpers.run_here(tmp_path / "mine", "--config.steps=4", "--config.sample.tokens=0", "--config.data.seq_len=256")
    with served(tmp_path, "--most_waiting=32", program=("serve.py",)) as url:
        pool = []
        for seed in range(48):
            body = drawn(random.Random(seed))
            with post(url, body) as reply:
                pool.append((body, json.load(reply)["choices"][0]["text"]))
        check_crowd(url, seconds, lambda rng: rng.choice(pool), least=5)


def metrics(url):
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as reply:
        return reply.read().decode().splitlines()


@pytest.mark.prove
@pytest.mark.skipif(not SCHEMATHESIS, reason="pip install -r requirements-prove.txt")
def test_requests_that_a_machine_has_made_up(tmp_path):
    with served(tmp_path, "--context=40") as url:
        command = [SCHEMATHESIS, "run", f"{url}/openapi.json", f"--checks={CHECKS}", "--max-examples=50"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=1200)
        assert done.returncode == 0, done.stdout[-5000:]

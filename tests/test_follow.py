"""A run that is served while it trains: each new checkpoint answers, and no request is lost."""

import contextlib
import json
import re
import subprocess
import sys
import threading
import time
import types
import urllib.request

import helpers
import pytest
from scripted import Scripted

from runtime.config import RunError
from serving.follow import Follower


class Run:
    """The workdir of a run, whose steps the test makes."""

    def __init__(self, workdir, devices=1):
        self.workdir, self.mesh, self.loaded_in = workdir, types.SimpleNamespace(size=devices), []
        self.damaged = False

    def save(self, step):
        (self.workdir / "checkpoints" / str(step) / "record").mkdir(parents=True)

    def newest(self):
        return max(int(path.name) for path in (self.workdir / "checkpoints").iterdir())

    def load(self, say):
        self.loaded_in.append(threading.current_thread().name)
        if self.damaged:
            raise RunError("all are damaged")
        return object(), f"digest {self.newest()}", self.newest()


@pytest.fixture(params=[1, 4], ids=["one device", "several"])
def run(request, tmp_path):
    found = Run(tmp_path, request.param)
    found.save(7)
    return found


def test_each_new_step_is_taken_once(run):
    engine, said = Scripted(), []
    follower = Follower(run, engine, said.append)
    follower.look()
    assert not run.loaded_in, "the step that is served already"
    for step in (8, 12):
        run.save(step)
        follower.look()
        follower.look()
        assert (engine.step, engine.fingerprint) == (step, f"digest {step}")
    assert said == ["step 8 answers from now on", "step 12 answers from now on"] and len(run.loaded_in) == 2


def test_a_damaged_step_leaves_what_is_served(run):
    engine, said = Scripted(), []
    follower = Follower(run, engine, said.append)
    run.damaged = True
    run.save(8)
    follower.look()
    assert engine.step == 7 and said == ["a new checkpoint cannot be taken: all are damaged"]
    run.damaged = False
    run.save(9)
    follower.look()
    assert engine.step == 9


def test_following_ends(run):
    engine = Scripted()
    follower = Follower(run, engine, lambda line: None, seconds=0.01)
    follower.start()
    run.save(8)
    end = time.monotonic() + 5
    while engine.step != 8 and time.monotonic() < end:
        time.sleep(0.005)
    follower.close()
    assert engine.step == 8 and not follower._thread.is_alive()


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--simulate=2", "--config.mesh.fsdp=2"]], ids=["one device", "fsdp 2"])
def test_a_run_is_served_while_it_trains(options, tmp_path):
    """Requests one after another from 4 clients; each answer is of one checkpoint, of at least 3 new ones in all."""
    pytest.importorskip("starlette", reason="pip install -r requirements-deploy.txt")
    workdir = tmp_path / "mine"
    train = [sys.executable, "train.py", "--config=configs/tiny.py", f"--workdir={workdir}"]
    begin = [*train, "--config.steps=5", "--config.checkpoint.every=5"]
    subprocess.run(begin, cwd=helpers.ROOT, check=True, capture_output=True)
    command = [sys.executable, "serve.py", f"--workdir={workdir}", "--port=0", "--slots=4", *options]
    server = subprocess.Popen(command, cwd=helpers.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        lines = iter(server.stdout.readline, "")
        url = next(found[1] for line in lines if (found := re.match(r"mine at (\S+):", line)))
        answers, done = [], threading.Event()
        clients = [threading.Thread(target=ask, args=(url, answers, done)) for _ in range(4)]
        for client in clients:
            client.start()
        for steps in (10, 15, 20):
            more = [*train, f"--config.steps={steps}", "--config.checkpoint.every=5"]
            subprocess.run(more, cwd=helpers.ROOT, check=True, capture_output=True)
            next(line for line in lines if line == f"step {steps} answers from now on\n")
            at = len(answers)
            while len(answers) < at + 12 and server.poll() is None:
                time.sleep(0.01)
        done.set()
        for client in clients:
            client.join()
        server.terminate()
        _, err = server.communicate(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            server.kill()
    assert (server.returncode, err) == (0, "")
    assert all(status == 200 for status, _ in answers), "no request is dropped"
    by_checkpoint = {}
    for _, reply in answers:
        by_checkpoint.setdefault(reply["system_fingerprint"], set()).add(reply["choices"][0]["text"])
    assert len(by_checkpoint) == 4 and all(re.fullmatch(r"[0-9a-f]+", name) for name in by_checkpoint)
    assert all(len(texts) == 1 for texts in by_checkpoint.values()), "the same request to the same checkpoint"


def ask(url, answers, done):
    body = {"model": "mine", "prompt": "Once", "max_tokens": 12, "temperature": 1, "seed": 5}
    while not done.is_set():
        request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode())
        request.add_header("content-type", "application/json")
        with urllib.request.urlopen(request, timeout=60) as reply:
            answers.append((reply.status, json.load(reply)))

"""The end of a run: tried at the start, in an order that loses nothing, and each part costs only itself.

In this process: train.run without --simulate takes the devices that the tests have.
"""

import json
import re
import threading
from types import SimpleNamespace

import helpers
import numpy as np
import pytest

import slackline as sl
import train
from data.tokenizer import ByteTokenizer
from recipes import finish, language, programs
from runtime.config import UsageError
from runtime.metrics import MetricsLog

SHORT = ("--config=configs/tiny.py", "--config.steps=2", "--config.eval_every=0", "--config.checkpoint.every=0",
         "--config.metrics.tensorboard=off", "--config.sample.tokens=4")  # fmt: skip


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(helpers.ROOT)


def run(workdir, *options: str) -> int:
    return train.run(["train.py", *SHORT, f"--workdir={workdir}", *options])


@pytest.mark.slow
def test_what_fails_at_the_end_costs_only_itself_and_is_said(tmp_path, capsys):
    """A folder where the sample and the page belong, a file where the plots and the samples before the end do."""
    (tmp_path / "samples.txt").mkdir()
    (tmp_path / "report.html").mkdir()
    (tmp_path / "plots").write_text("")
    (tmp_path / "samples").write_text("")
    assert run(tmp_path, "--config.sample.every=1") == 1
    summary, said = json.loads((tmp_path / "summary.json").read_text()), capsys.readouterr()
    assert summary["step"] == 2 and summary["final_eval_loss"] > 0 and len(summary["params_digest"]) == 64
    assert "held-out text: " in said.out and "a sample:" in said.out, "what did not fail is there"
    failed = ["samples.txt", "plots/loss.png", "report.html"]
    assert re.findall(r"^warning: no (\S+): \S+Error", said.err, re.MULTILINE) == failed
    assert len(re.findall(r"^warning: no sample at step 1: \S+Error", said.err, re.MULTILINE)) == 1
    assert "training is complete and saved" in said.err and "Traceback" not in said.err


def test_what_is_trained_is_saved_before_the_evaluation_and_the_sample_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(programs, "lower_evaluation", lambda *_: pytest.fail("no evaluation"))
    with pytest.raises(pytest.fail.Exception, match="no evaluation"):
        run(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()] == ["2"]
    monkeypatch.undo()
    monkeypatch.chdir(helpers.ROOT)
    assert run(tmp_path) == 0, "the same command goes on with what is left: the end"
    assert json.loads((tmp_path / "summary.json").read_text())["final_eval_loss"] > 0
    assert (tmp_path / "plots" / "loss.png").exists() and (tmp_path / "samples.txt").exists()
    said, page = capsys.readouterr().out, (tmp_path / "report.html").read_text()
    assert f"; see {tmp_path}/report.html and summary.json" in said
    (shown,) = json.loads(re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)[0])["runs"]
    assert shown["summary"] == json.loads((tmp_path / "summary.json").read_text()) and shown["samples"]
    assert shown["series"]["loss"]["step"] == [1, 2]


def test_the_end_is_tried_at_the_start(tmp_path, capsys):
    assert run(tmp_path / "a", "--config.sample.prompt=caf\udce9") == 2
    said = capsys.readouterr()
    assert "sample.prompt='caf\\udce9'" in said.err and "sample.tokens=0" in said.err and "step 1" not in said.out
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("loss", "size"), [(0.0, 1), (0.0, 0), (2.5, 0)])
def test_a_loss_of_nothing_and_a_text_of_no_byte_divide_nothing_by_nothing(loss, size, tmp_path):
    """size: bytes that a token stands for. The whole end of a run with such numbers."""
    parts = helpers.build(helpers.tiny(), (1, 1, 1))
    shape = parts.eval_batch["tokens"].shape[1:]
    batch = {
        "tokens": np.zeros(shape, np.int32),
        "targets": np.zeros(shape, np.int32),
        "mask": np.ones(shape, np.float32),
    }
    program = lambda: lambda params, batch: (np.float32(loss * batch["mask"].size), np.float32(batch["mask"].size))
    found = programs.Evaluator(parts, [batch], language.num_bytes(np.full(256, size), [batch]), program)(None)
    assert found.loss == loss and np.isnan(found.values()["bits_per_byte"]) == (size == 0)
    assert found.nats_of_a_bit == pytest.approx(np.log(2) * size)
    assert "held-out text: " in finish.held_out(found, {"unigram": 4.5, "bigram": None})


@pytest.mark.slow  # its division is tried above; this is the whole way to it
def test_a_run_that_has_learned_everything_ends_normally(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 20_000)
    options = (
        "--config.steps=120",
        "--config.log_every=60",
        "--config.optimizer.lr=0.05",
        "--config.data.batch_size=8",
    )
    options += ("--config.model.num_layers=1", "--config.optimizer.weight_decay=0", "--config.sample.tokens=0")
    assert run(tmp_path / "run", f"--config.data.path={tmp_path}/a.txt", *options) == 0
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["final_eval_loss"] == 0.0


class Away:
    def __init__(self, after: int):
        self.after, self.rows = after, []

    def write(self, row):
        if len(self.rows) >= self.after:
            raise ConnectionError("the service is away")
        self.rows.append(row)

    def close(self): ...


def test_a_writer_that_fails_costs_only_its_own_rows(tmp_path):
    said, writers = [], [Away(1), Away(9)]
    log = MetricsLog(tmp_path, writers, said.append)
    for step in range(3):
        log.write({"step": step})
    log.close()
    assert [len(w.rows) for w in writers] == [1, 3] and len(log.path.read_text().splitlines()) == 3
    assert log.failed == ["Away"] and len(said) == 1 and "ConnectionError: the service is away" in said[0]


def test_by_default_a_sample_begins_with_the_first_words_of_what_is_held_out():
    """Whole ones, of the first tokens; ids without a tokenizer have none."""
    text = "def first_words(of):\n    return of.split()\n" * 9
    ids_N = np.frombuffer(text.encode(), np.uint8).astype(np.uint16)
    assert language.first_words(ids_N, ByteTokenizer()) == "def first_words(of):\n    return of.split()"
    assert language.first_words(ids_N[:7], ByteTokenizer()) == "def", "a word that is cut off is none"
    encode = ByteTokenizer().encode
    data = SimpleNamespace(first_words=lambda: "def first", prompt=encode, tokenizer=ByteTokenizer())
    prompt_P = finish.try_prompt(SimpleNamespace(tokens=4, prompt="auto"), data, 32)
    assert bytes(prompt_P.tolist()) == b"def first"


def test_after_a_start_that_failed_nothing_is_announced(tmp_path):
    """In a notebook the process goes on."""
    before = {*threading.enumerate()}
    assert run(tmp_path / "run", "--config.data.path=missing.txt") == 2
    with pytest.raises(UsageError, match="does not exist"):
        sl.fit("tiny", workdir=tmp_path / "other", data={"path": "missing.txt"})
    timers = [thread for thread in {*threading.enumerate()} - before if isinstance(thread, threading.Timer)]
    assert all(timer.finished.is_set() for timer in timers), "one that was cancelled may take a moment to end"

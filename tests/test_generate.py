"""generate.py and chat.py: what is said, and what is refused before anything compiles."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import helpers
import pytest
import scripted

import chat
import generate
import slackline as sl
from data.tokenizer import ByteTokenizer
from runtime.config import UsageError
from serving.requests import Sampling


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    workdir = tmp_path_factory.mktemp("generate") / "run"
    helpers.run_here(workdir, "--config.steps=4", "--config.sample.tokens=0")
    return workdir


@pytest.mark.slow
def test_what_is_generated_is_what_sampling_without_a_cache_gives(run, capsys):
    expected = sl.open(run).sample("def ", tokens=12, temperature=0.0)
    generate.main([f"--workdir={run}", "--prompt=def ", "--max_tokens=12", "--temperature=0"])
    assert capsys.readouterr().out == expected + "\n"


@pytest.mark.slow
def test_many_are_lines_of_json_in_their_order_and_the_same_as_alone(run, tmp_path, capsys):
    prompts = ["def ", "import os", "x", "class A"]
    (tmp_path / "prompts").write_text("\n".join(prompts))
    options = [f"--workdir={run}", "--max_tokens=8", "--temperature=1", "--seed=5"]
    generate.main([*options, f"--prompts={tmp_path / 'prompts'}", "--samples=2"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["prompt"], row["seed"]) for row in rows] == [(p, seed) for p in prompts for seed in (5, 6)]
    generate.main([*options, "--prompt=import os"])
    assert capsys.readouterr().out == "import os" + rows[2]["text"] + "\n"
    generate.main([*options, "--prompt=import os", f"--stop={rows[2]['text'][3:5]}"])
    assert capsys.readouterr().out == "import os" + rows[2]["text"].split(rows[2]["text"][3:5])[0] + "\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max_tokens=40"], "max_tokens=40: after a prompt of 1 there is room for 31"),
        (["--config.mesh.replica=2"], "--config.mesh.replica changes nothing of an answer"),
        (["--config.mesh.tensor=3", "--simulate=3"], "mesh.tensor=3"),
    ],
)
def test_what_a_run_cannot_do_is_refused_before_anything_compiles(options, message, run, monkeypatch):
    monkeypatch.setattr("serving.loaded.open_engine", None)
    with pytest.raises(UsageError, match=message):
        generate.main([f"--workdir={run}", *options])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--temperature=-1"], "--temperature=-1.0: expected a value from 0 to 100"),
        (["--top_p=2"], "--top_p=2.0"),
        (["--prompts=/nowhere"], "--prompts=/nowhere: there is no such file"),
        (["--prompts=/dev/null"], "--prompts=/dev/null"),
        (["--config.optimizer.lr=1"], "--config.optimizer.lr changes nothing of an answer"),
        (["--config.mesh.tensor=x"], "mesh.tensor=x: expected an integer"),
        (["--lr=1"], "--lr=1: not an option of generate.py"),
        ([], "there is no config.json of a run"),
    ],
)
def test_bad_input_is_one_sentence(options, message):
    with pytest.raises(UsageError, match=message):
        generate.main(["--workdir=/nowhere", *options])


@pytest.mark.parametrize("option", ["--simulate=0", "--context=0", "--max_tokens=0", "--samples=-1"])
def test_what_counts_something_is_one_at_least(option, capsys):
    with pytest.raises(SystemExit):
        generate.main(["--workdir=/nowhere", option])
    assert option.partition("=")[0] in capsys.readouterr().err


# ── chat ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Asked:
    """A template that writes what was said, each with its role's first letter."""

    def prompt(self, messages: Any, tokenizer: Any) -> list[int]:
        return list("".join(f"{m['role'][0]}{m['content']};" for m in messages).encode())

    def closing(self, tokenizer: Any) -> tuple[int, ...]:
        return (scripted.EOS,)


@pytest.fixture
def talk():
    engine = scripted.Scripted(script=lambda request: [*b"yes", scripted.EOS])
    engine.start()
    found: Any = chat.Conversation(engine, ByteTokenizer(), Asked(), Sampling(0.0), 16, "be brief")  # type: ignore[arg-type]
    found.begin()
    yield SimpleNamespace(
        engine=engine, chat=found, said=lambda text: "".join(found.answer(text, notes.append)), notes=(notes := [])
    )
    engine.close()


def test_a_conversation_goes_on_with_what_was_said(talk):
    assert [talk.said("one"), talk.said("two")] == ["yes", "yes"]
    assert bytes(talk.engine.seen[1].prompt) == b"sbe brief;uone;ayes;utwo;"
    talk.chat.begin()
    talk.said("three")
    assert bytes(talk.engine.seen[2].prompt) == b"sbe brief;uthree;" and not talk.notes


def test_what_came_first_is_forgotten_where_there_is_no_room_which_is_said(talk):
    talk.said("a" * 90)
    talk.said("b" * 90)
    assert not talk.notes
    talk.said("c" * 90)
    assert bytes(talk.engine.seen[2].prompt) == b"sbe brief;u" + b"b" * 90 + b";ayes;u" + b"c" * 90 + b";"
    assert talk.notes == ["(no more room for all: 1 of the first questions and answers forgotten)"]


def test_a_question_without_room_for_an_answer_is_refused(talk):
    with pytest.raises(ValueError, match="fewer words"):
        talk.said("a" * 250)
    assert talk.said("one") == "yes"

"""Conversations: a template is rendered within limits, what is learned is what the assistant says and nothing else, no
message becomes a special token, and rows of conversations are packed into windows."""

import gc
import gzip
import importlib.util
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import chats
import helpers
import numpy as np
import pytest
import test_weights

from data import chat, conversations
from data import template as templates
from data.render import Renderer
from data.template import Template
from data.tokenizer import ByteTokenizer
from parallel.layout import placement
from recipes.programs import compile_steps
from runtime.config import UsageError

NAMES = sorted(chats.TEMPLATES)
ASK = [{"role": "user", "content": "Is it?"}]
TALK = [*ASK, {"role": "assistant", "content": "Yes."}]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    found = {name: Template.read(chats.write(tmp_path_factory.mktemp(name), name)) for name in NAMES}
    return found.__getitem__


def parts(example, tokenizer) -> list[chats.Part]:
    """An example as `chats.expected` has it, from its ids alone."""
    special = {i: text for text, i in tokenizer.special.items()}
    runs: list[tuple[list[int], bool, bool]] = []
    for i, learned in zip(example.ids_N.tolist(), example.supervised_N.tolist(), strict=True):
        if runs and i not in special and runs[-1][1:] == (False, learned):
            runs[-1][0].append(i)
        else:
            runs.append(([i], i in special, learned))
    return [(special[ids[0]] if is_special else tokenizer.spell(ids), is_special, x) for ids, is_special, x in runs]


# ── what is learned ──────────────────────────────────────────────────────────────────────────────────────────────────


def check_masks(name: str, template: Template, seeds: range) -> None:
    tokenizer = chats.tokenizer(name)
    for seed in seeds:
        messages = chats.draw(seed, thoughts=name == "qwen3")
        examples = template.supervised(messages, tokenizer)
        assert [parts(example, tokenizer) for example in examples] == chats.expected(name, messages), messages
        for example in examples:
            assert example.supervised_N[-1] and len(example.ids_N) == len(example.supervised_N)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_learned_is_the_answers_and_what_closes_them(name, template):
    check_masks(name, template(name), range(40))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_in_many_conversations_what_is_learned_is_the_answers_and_what_closes_them(name, template):
    check_masks(name, template(name), range(1000, 6000))


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_asked_with_the_ids_that_it_was_trained_after(name, template):
    """But for an empty thought, which Qwen 3's template adds to an answer only."""
    tokenizer, seeds = chats.tokenizer(name), range(20)
    for messages in (chats.draw(seed) for seed in seeds):
        first = next(n for n, message in enumerate(messages) if message["role"] == "assistant")
        asked = template(name).prompt(messages[:first], tokenizer)
        (example, *_) = template(name).supervised(messages[: first + 1], tokenizer)
        assert example.ids_N[: len(asked)].tolist() == asked
        begin = int(np.argmax(example.supervised_N))
        assert tokenizer.spell(example.ids_N[len(asked) : begin]) in (
            "",
            "<think>\n\n</think>\n\n"[: 99 * (name == "qwen3")],
        )
        assert sum(i == tokenizer.special[chats.TOKENS[name][0]] for i in asked) <= (1 if name != "smollm2" else 9)


def test_no_message_becomes_a_special_token(template):
    """Spelled out, it is plain text in the prompt and in what is learned."""
    tokenizer = chats.tokenizer("smollm2")
    spelled = "".join(chats.SPECIAL["smollm2"]) + "<|im_end|"
    plain, said = (
        template("smollm2").prompt([{"role": "user", "content": text}], tokenizer) for text in ("x", spelled)
    )
    count = lambda ids: [sum(i == special for i in ids) for special in tokenizer.special.values()]
    assert count(said) == count(plain) and spelled in tokenizer.spell(said)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("{{ messages[0].content | replace('/no', '') }}", "a <|im_/noend|>"),  # as SmolLM3's cuts "/no_think" out
        ("{{ messages[0].content + '>' }}", "a <|im_end|"),
    ],
)
def test_a_template_that_makes_a_special_token_of_a_message_is_refused(text, content):
    tokenizer, template = chats.tokenizer("smollm2"), Template(text, {}, (), "X")
    with pytest.raises(ValueError, match="makes a special token of what a message says"):
        template.prompt([{"role": "user", "content": content}], tokenizer)
    assert template.prompt([{"role": "user", "content": "a < b"}], tokenizer)


def test_an_answer_that_begins_with_line_ends_does_not_reach_into_the_question(template):
    """The tokenizer has a token of two line ends, and what an answer is asked for with ends in one."""
    tokenizer, said = chats.tokenizer("smollm2"), "\n\nYes"
    both = tokenizer.encode("\n\n").tolist()
    whole, _ = tokenizer.encode_spelled(f"<|im_start|>assistant\n{said}")
    assert len(both) == 1 and both[0] in whole
    (example,) = template("smollm2").supervised([*ASK, {"role": "assistant", "content": said}], tokenizer)
    begin = int(np.argmax(example.supervised_N))
    answer = [*tokenizer.encode("\n"), *tokenizer.encode(said), tokenizer.special["<|im_end|>"]]
    assert example.ids_N[begin - 1 :].tolist() == answer


def test_a_blank_before_an_answer_is_learned_with_its_first_token():
    """As of Mistral's first template, whose tokenizer is SentencePiece's."""
    text = "{{ bos_token }}{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + "
    template = Template(
        text + "m.content + eos_token }}{% endfor %}", {"bos_token": "<s>", "eos_token": "</s>"}, (), "X"
    )
    tokenizer = chats.tokenizer("mistral", "metaspace")
    (example,) = template.supervised([*ASK, {"role": "assistant", "content": "Yes, it is."}], tokenizer)
    learned = [tokenizer.spell([i]) for i in example.ids_N[example.supervised_N]]
    whole, _ = tokenizer.encode_spelled("<s>[INST] Is it? [/INST] Yes, it is.</s>")
    assert example.ids_N.tolist() == whole.tolist() and "".join(learned[:-1]).replace(" ", "") == "Yes,itis."
    asked = template.prompt(ASK, tokenizer)
    assert example.supervised_N.tolist() == [n >= len(asked) for n in range(len(whole))]


def test_today_is_one_day_in_training(template):
    template = Template("{{ strftime_now('%Y-%m-%d ') }}" + chats.SMOLLM2, {}, (), "X")
    tokenizer = chats.tokenizer("smollm2")
    (example,) = template.supervised(TALK, tokenizer)
    assert tokenizer.spell(example.ids_N).startswith(templates.DAY)
    assert tokenizer.spell(template.prompt(ASK, tokenizer)).startswith(time.strftime("%Y-%m-%d "))


def test_what_ends_an_answer_is_what_closes_it_and_what_the_model_says(tmp_path):
    tokenizer = chats.tokenizer("llama3")
    folder = chats.write(tmp_path, "llama3")
    eot, eos = (tokenizer.special[token] for token in ("<|eot_id|>", "<|end_of_text|>"))
    assert Template.read(folder).closing(tokenizer) == (eot,)
    for said in (eos, [eos, eot]):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": said}))
        assert Template.read(folder).closing(tokenizer) == tuple(sorted({eot, eos}))


@pytest.mark.parametrize(
    ("messages", "what"),
    [
        ([], "is no list of messages"),
        ("hello", "is no list of messages"),
        (["hello"], 'has a message 1 that is no object with "role" and "content"'),
        ([{"role": "user"}], 'has a message 1 without a string under "content"'),
        ([{"role": "user", "content": [{"type": "text"}]}], 'without a string under "content"'),
        ([*ASK, {"role": "a b", "content": ""}], "has a message 2 whose role is no word"),
        ([{"role": "assistant", "content": "", "tool_calls": [1]}], 'with the key "tool_calls"'),
        ([{"role": "user", "content": "a\ufdd0"}], "U+FDD0"),
        ([{"role": "user", "content": "a\0"}], "NUL"),
        (ASK, "has no message of the assistant's"),
    ],
)
def test_what_is_no_conversation_is_refused(messages, what, template):
    with pytest.raises(ValueError, match=re.escape(what)):
        template("smollm2").supervised(messages, chats.tokenizer("smollm2"))


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "closes an answer with no special token"),
        (
            chats.SMOLLM2.replace("assistant\n' }}", "assistant\n<think>' }}"),
            "what the chat template asks for an answer with is not how one begins",
        ),
    ],
)
def test_a_template_of_which_nothing_can_be_learned_is_refused(text, what):
    with pytest.raises(ValueError, match=f"X: .*{what}"):
        Template(text, {}, (), "X").supervised(TALK, chats.tokenizer("smollm2"))


def test_a_tokenizer_without_special_tokens_is_refused(template):
    with pytest.raises(ValueError, match="writes special tokens, and this tokenizer has none"):
        template("smollm2").prompt(ASK, ByteTokenizer())


# ── the files ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_template_is_read_from_where_it_stands(tmp_path):
    chats.write(tmp_path, "mistral", eos_token={"content": "</s>", "special": True}, add_bos_token=True)
    assert Template.read(tmp_path).variables == {"bos_token": "<s>", "eos_token": "</s>"}
    named = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    chats.write(tmp_path, "mistral", chat_template=named)
    assert Template.read(tmp_path).text == "d"
    chats.write(tmp_path, "mistral", chat_template=named[:1])
    with pytest.raises(ValueError, match="has the chat templates rag, and none that is the default"):
        Template.read(tmp_path)
    chats.write(tmp_path, "mistral", chat_template=None)
    assert Template.read(tmp_path) is None
    (tmp_path / "chat_template.json").write_text('{"chat_template": "j"}')
    assert Template.read(tmp_path).text == "j"
    (tmp_path / "chat_template.jinja").write_text("f")
    assert Template.read(tmp_path).text == "f"
    (tmp_path / "special_tokens_map.json").write_text('{"pad_token": "<pad>", "additional_special_tokens": ["a"]}')
    assert Template.read(tmp_path).variables["pad_token"] == "<pad>"
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config.json is damaged"):
        Template.read(tmp_path)


# ── rendering ────────────────────────────────────────────────────────────────────────────────────────────────────────


def rendered(text: str) -> str:
    return Renderer(text, {"bos_token": "<s>"}, "X")([(ASK, True)])[0]


@pytest.mark.parametrize(
    ("text", "is_made"),
    [
        ("{{ bos_token }}{% if true %}\n  {% endif %}|", "<s>|"),
        ('{{ "<é>" | tojson }}', '"<é>"'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{{ tools is none and documents is none and add_generation_prompt }}", "True"),
        ("{% for i in range(9) %}{% if i > 1 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% generation %}a{% endgeneration %}", "a"),
        ("{% set ns = namespace(a=1) %}{% set ns.a = 2 %}{{ ns.a }}{{ dict(b=3).b }}", "23"),
        ("{{ missing }}", ""),
    ],
)
def test_a_template_has_what_transformers_gives_it(text, is_made):
    assert rendered(text) == is_made


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{{ 'x' * 10**9 }}", "needs more than 512 MiB"),
        ("{% for i in range(99999) %}{{ 'x' * 999 }}{% endfor %}", "writes more than 16,777,216 characters"),
        ("{{ raise_exception('System role not supported.') }}", "refuses it: System role not supported."),
        ("{% if %}", "is no Jinja template .line 1: "),
        ("{{ messages[9].content.x }}", "fails .UndefinedError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails .RecursionError"),
        ("{{ ''.__class__.__mro__ }}", "fails .SecurityError"),
        ("{{ messages.append(1) }}", "fails .SecurityError"),
        ("{{ namespace.__init__.__globals__ }}", "fails .SecurityError"),
        ("{% set ns = namespace() %}{% set ns.__a = 1 %}", "fails .SecurityError"),
        ("{{ lipsum() }}", "fails .UndefinedError"),
        ("{% include '/etc/passwd' %}", "fails .TypeError: no loader"),
        pytest.param(LOOP, "takes more than 5 s", marks=pytest.mark.slow),
    ],
)
def test_a_template_that_fails_says_so_in_a_sentence(text, what):
    with pytest.raises(ValueError, match=f"^X: the chat template .*{what}") as error:
        rendered(text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_process_stays_until_it_ends_and_then_there_is_another():
    render = Renderer("{{ messages[0].content }}", {}, "X")
    assert render([(ASK, True)]) == ["Is it?"]
    process = render._process
    assert render([(ASK, True)] * 3) == ["Is it?"] * 3 and render._process is process
    process.kill()
    process.wait()
    with pytest.raises(ValueError, match="X: the chat template ended its process"):
        render([(ASK, True)])
    assert render([(ASK, True)]) == ["Is it?"] and render._process is not process
    process = render._process
    del render
    gc.collect()
    assert process.poll() is not None


def test_several_threads_share_a_process(template):
    tokenizer = chats.tokenizer("llama3")
    talks = [chats.draw(seed) for seed in range(40)]
    make = lambda messages: template("llama3").prompt(messages[:-1], tokenizer)
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(make, talks)) == list(map(make, talks))


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs the package jinja2: `pip install -r requirements-deploy.txt`"):
        rendered("a")


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_rows(path: Path, rows: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pair(n: int) -> dict[str, str]:
    return {"prompt": f"Is it {n}?", "completion": f"Yes, it is {n}." + " It is." * (n % 7)}


PAIRS = [pair(n) for n in range(40)]


@pytest.fixture
def load(tmp_path):
    """`conversations.load` of rows, with a base run and a cache of its own."""
    base = tmp_path / "base"
    chats.write(base / templates.KEPT, "smollm2")
    (base / "tokenizer.json").write_text(chats.serialized("smollm2"))
    defaults = {
        "suffixes": ".jsonl", "text_key": "text", "tokenizer": "bytes", "vocab_size": 512, "end_of_document": "",
        "eval_fraction": 0.2, "seq_len": 128, "document_mask": True, "changed": "refuse", "origin": base,
        "cache_dir": tmp_path / "cache",
    }  # fmt: skip

    def load(rows: Iterable[object] = PAIRS, **changes):
        path = write_rows(tmp_path / "chat.jsonl", rows)
        return conversations.load(**(defaults | {"path": str(path)} | changes))

    return load


@pytest.mark.parametrize(
    ("row", "is_chat"),
    [
        ({"messages": TALK}, True),
        (pair(1), True),
        ({"messages": TALK, "text": "a"}, False),
        ({"text": "a"}, False),
        ({"prompt": "a"}, False),
        ([1], False),
    ],
)
def test_a_file_of_conversations_is_known_by_its_first_row(row, is_chat, tmp_path):
    assert conversations.are_in(str(write_rows(tmp_path / "a.jsonl", [row])), "text") is is_chat
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write("\n" + json.dumps(row))
    assert conversations.are_in(str(tmp_path / "a.jsonl.gz"), "text") is is_chat
    assert not conversations.are_in(str(write_rows(tmp_path / "a.txt", [row])), "text")
    assert not conversations.are_in("", "text") and not conversations.are_in(str(tmp_path), "text")


def texts(batch, tokenizer) -> list[tuple[str, str]]:
    """(all of it, what of it is learned) of each example of a batch, in order."""
    found = []
    rows = zip(*(batch[name] for name in ("tokens", "targets", "segments", "mask")), strict=True)
    for tokens_T, targets_T, segments_T, mask_T in rows:
        for segment in range(1, int(segments_T.max(initial=0)) + 1):
            own = np.flatnonzero(segments_T == segment)
            assert np.array_equal(own, np.arange(own[0], own[-1] + 1)), "an example in two places"
            np.testing.assert_array_equal(tokens_T[own][1:], targets_T[own][:-1])
            whole, learned = [tokens_T[own[0]], *targets_T[own]], targets_T[own][mask_T[own] > 0]
            found.append((tokenizer.spell(whole), tokenizer.spell(learned)))
        assert not mask_T[segments_T == 0].any() and not tokens_T[segments_T == 0].any()
    return found


def whole(rows, template, tokenizer) -> list[tuple[str, str]]:
    """The same, of each row by itself."""
    roles = ("user", "prompt"), ("assistant", "completion")
    talks = ([{"role": role, "content": row[key]} for role, key in roles] for row in rows)
    found = (example for messages in talks for example in template.supervised(messages, tokenizer))
    return [(tokenizer.spell(x.ids_N), tokenizer.spell(x.ids_N[x.supervised_N])) for x in found]


def test_every_example_is_in_one_window_as_a_whole(load, template):
    data = load()
    splits = [texts(x.take(range(len(x))), data.tokenizer) for x in (data.train, data.held_out)]
    expected = whole(PAIRS, template("smollm2"), data.tokenizer)
    assert sorted(splits[0] + splits[1]) == sorted(expected) and len(splits[1]) == 8
    assert data.train.num_learned == sum(data.train.take([n])["mask"].sum() for n in range(len(data.train)))
    assert data.train.num_tokens == sum((data.train.take([n])["segments"] > 0).sum() for n in range(len(data.train)))


def test_windows_are_filled_and_none_is_too_small():
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 100, 500).tolist()
    windows = conversations.pack(lengths, 100)
    assert sorted(n for window in windows for n in window) == list(range(500))
    filled = [sum(lengths[n] for n in window) for window in windows]
    assert max(filled) <= 100 and sum(filled) / (100 * len(filled)) > 0.9
    assert conversations.pack([5, 5, 5], 5) == [[0], [1], [2]]


def test_the_batches_of_a_step_are_a_function_of_it(load):
    """Whoever asks, for whichever rows, from whichever cache; and an epoch has every window once."""
    first, second = load().loader(3, 4), load().loader(3, 4)
    for step in (0, 5):
        whole = first.rows(step, slice(None))
        for row in range(4):
            for name, x in second.rows(step, [row]).items():
                np.testing.assert_array_equal(x[0], whole[name][row])
    num = len(load().train)
    one = load().loader(3, num).rows(0, slice(None))["tokens"]
    other = load().train.take(range(num))["tokens"]
    assert sorted(map(bytes, one)) == sorted(map(bytes, other))
    assert {x.dtype for x in whole.values()} == {np.dtype(np.int32), np.dtype(np.float32)}


def test_what_is_held_out_is_whole_conversations_and_their_copies_with_them(load):
    data = load([pair(n % 20) for n in range(60)])
    splits = [{text for text, _ in texts(x.take(range(len(x))), data.tokenizer)} for x in (data.train, data.held_out)]
    assert not splits[0] & splits[1] and [len(split) for split in splits] == [16, 4]
    assert data.stored.rows.tolist() == [48, 12]
    grown = load([pair(n) for n in range(21)])
    before, now = (
        {text for text, _ in texts(x.held_out.take(range(len(x.held_out))), x.tokenizer)} for x in (data, grown)
    )
    assert len(before & now) >= 3
    with pytest.raises(ValueError, match="holds one conversation: two are needed at least"):
        load([pair(0)] * 3)


def test_an_evaluation_reads_the_same_windows_and_is_filled_up_with_rows_of_no_weight(load):
    data = load(seq_len=160)
    batches = data.eval_batches(1, 3, None)
    assert {x.shape for batch in batches for x in batch.values()} == {(3, 160)}
    assert sum(len(texts(batch, data.tokenizer)) for batch in batches) == 8
    assert not batches[-1]["mask"][len(data.held_out) % 3 or 3 :].any()
    assert len(data.eval_batches(1, 3, 1)) == 1
    answers = [learned for batch in batches for _, learned in texts(batch, data.tokenizer)]
    assert data.num_bytes(batches) == sum(len(text.replace("<|im_end|>", "").encode()) for text in answers)


def test_a_row_whose_answer_would_be_cut_away_is_left_out_and_counted(load):
    long = {"prompt": "Is it?", "completion": "Yes. " * 200}
    asked = {"prompt": "Is it? " * 200, "completion": "Yes."}
    with pytest.warns(
        UserWarning, match=r"chat.jsonl: 2 examples are left out: their answers end beyond data.seq_len=128"
    ):
        data = load([*map(pair, range(40)), long, asked])
    assert data.train.dropped + data.held_out.dropped == 2
    assert "2 examples left out as too long" in dict(data.describe(1, 1))["data"]
    longest = max(len(load().train.take([n])["tokens"][0].nonzero()[0]) for n in range(3))
    assert longest <= 128
    with pytest.raises(
        ValueError, match="of no example to train on do all answers end within data.seq_len=4: raise it"
    ):
        load(seq_len=4)


def test_an_answer_may_end_with_the_window(load):
    stored = load().stored
    longest = int(np.diff(stored.ends_C, prepend=0).max()) - 1  # predictions
    fits, cut = (conversations.Windows(stored, np.arange(40), size) for size in (longest, longest - 1))
    assert not fits.dropped and cut.dropped
    assert any(row[-1] for row in fits.take(range(len(fits)))["mask"])


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"text": "a"}, 'is no conversation, as the first row is: its keys are text; expected "messages", or "prompt"'),
        ([1], "is no conversation"),
        ({"messages": "a"}, "is no list of messages"),
        ({"prompt": "a", "completion": 3}, 'has a message 2 without a string under "content"'),
        ({"messages": ASK}, "cannot be trained on: The conversation has no message of the assistant's"),
    ],
)
def test_a_row_of_another_kind_is_named_by_file_and_line(row, what, load):
    with pytest.raises(ValueError, match=rf"chat\.jsonl, line 3, .*{re.escape(what)}"):
        load([pair(0), pair(1), row])


def test_what_a_template_refuses_is_named_by_file_and_line(load, tmp_path):
    text = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + chats.SMOLLM2
    chats.write(tmp_path / "base" / templates.KEPT, "smollm2", chat_template=text)
    system = {"messages": [{"role": "system", "content": "a"}, *TALK]}
    with pytest.raises(ValueError, match=r"chat\.jsonl, line 2, cannot be trained on: .*refuses it: no system"):
        load([pair(0), system])


def test_conversations_need_a_template_and_the_mask_of_documents(load, tmp_path):
    with pytest.raises(ValueError, match=r"this run has no chat template: set init\.workdir"):
        load(origin=None)
    with pytest.raises(ValueError, match=r"several share a window: set data\.document_mask=True"):
        load(document_mask=False)
    (tmp_path / "base" / templates.KEPT / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"base has no chat template"):
        load()


def test_rows_are_rendered_again_where_the_cache_is_damaged_or_the_template_another(load, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(Template, "supervised", lambda *a, was=Template.supervised: calls.append(1) or was(*a))
    first = load()
    assert len(calls) == 40 and load().digest == first.digest and len(calls) == 40
    assert load(seq_len=160).digest == first.digest and len(calls) == 40
    (cached,) = (tmp_path / "cache").glob("conversations-*.npz")
    content = bytearray(cached.read_bytes())
    for damage in (content[:100], content[:300] + bytes([content[300] ^ 1]) + content[301:]):
        cached.write_bytes(damage)
        again = load()
        np.testing.assert_array_equal(again.stored.ids_N, first.stored.ids_N)
    assert len(calls) == 120 and cached.read_bytes() == content
    chats.write(tmp_path / "base" / templates.KEPT, "smollm2", chat_template=chats.SMOLLM2 + "{# another #}")
    assert load().digest != first.digest and len(calls) == 160


def test_a_run_that_goes_on_has_its_own_template_and_compares_its_rows(load, tmp_path):
    first, run = load(), tmp_path / "run"
    chats.write(run / templates.KEPT, "smollm2")
    first.keep(run)
    assert load(workdir=run, origin=None).digest == first.digest
    with pytest.raises(ValueError, match=r"chat\.jsonl is not what this run was trained on: chat\.jsonl changed"):
        load([*PAIRS, pair(40)], workdir=run, origin=None)
    with pytest.warns(UserWarning, match="accepted"):
        load([*PAIRS, pair(40)], workdir=run, origin=None, changed="accept")


def test_a_sample_is_an_answer_to_a_question_of_what_is_held_out(load):
    data = load()
    assert re.fullmatch(r"Is it \d+\?", data.first_words())
    asked = data.tokenizer.spell(data.prompt(data.first_words()))
    assert asked.endswith(f"<|im_start|>user\n{data.first_words()}<|im_end|>\n<|im_start|>assistant\n")


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_learned_is_shown(load, tmp_path, capsys):
    load([pair(0), {"messages": [{"role": "system", "content": "S"}, *TALK]}])
    command = ["show", str(tmp_path / "chat.jsonl"), f"--workdir={tmp_path / 'base'}"]
    assert chat.main(command) == 0
    shown = capsys.readouterr().out
    assert "chat.jsonl, line 1\n" in shown and "<|im_start|>assistant\n[[Yes, it is 0.<|im_end|>]]\n" in shown
    assert "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nIs it?<|im_end|>" in shown
    assert "closes an answer with <|im_end|>; only appends" in shown
    assert re.search(r"2 rows, 2 examples, [\d,]+ tokens, of which [\d,]+ are learned \(\d+\.\d%\)", shown)
    with pytest.raises(UsageError, match="holds no chat template"):
        chat.main([*command[:2], f"--workdir={tmp_path}"])
    write_rows(tmp_path / "chat.jsonl", [])
    with pytest.raises(UsageError, match="holds no row"):
        chat.main(command)


@pytest.mark.parametrize(("name", "how"), [("qwen3", "each is an example"), ("llama3", "only appends")])
def test_the_verdict_on_a_template(name, how, template):
    assert how in template(name).verdict(chats.tokenizer(name))
    silent = Template(chats.SMOLLM2.replace("if add_generation_prompt", "if false"), {}, (), "X")
    assert "does not ask for an answer" in silent.verdict(chats.tokenizer("smollm2"))


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_windows_and_a_replica_of_which_nothing_is_learned_count_nothing():
    """The mean is over what is learned, of all replicas."""
    config = helpers.tiny(optimizer__clip_norm=0.0)
    B, T = config.data.batch_size, config.data.seq_len
    found = []
    for mesh in ((2, 1, 1), (1, 1, 1)):
        rng = np.random.default_rng(0)
        parts = helpers.build(config, mesh)
        (program,) = compile_steps(parts, helpers.QUICKLY).values()
        state, losses = helpers.init_state(config, parts), []
        for _ in range(2):
            whole = {name: rng.integers(0, 256, (B, T)).astype(np.int32) for name in ("tokens", "targets")}
            whole["mask"] = (rng.random((B, T)) < 0.2).astype(np.float32)
            whole["mask"][: B // 2 + 1] = 0  # all of the first replica, and a window of the second
            rows = lambda ids, whole=whole: {name: x[ids] for name, x in whole.items()}
            state, metrics = program(state, placement.place_train(parts.mesh, parts.replicas, B, [rows]))
            losses.append(float(metrics["loss"][0]))
            assert float(metrics["weight"][0]) == whole["mask"].sum()
        found.append(losses)
    np.testing.assert_allclose(found[0], found[1], rtol=2e-5)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A run at step 0 of a tiny model of theirs that has a template."""
    folder = tmp_path_factory.mktemp("base")
    test_weights.write(folder / "in", test_weights.LLAMA | {"vocab_size": 512, "max_position_embeddings": 128})
    chats.write(folder / "in", "smollm2", chat_template=chats.SMOLLM2)
    test_weights.command("import", folder / "in", folder / "run")
    return folder / "run"


TUNE = (
    "eval_every=4 steps=8 data.seq_len=128 data.batch_size=8 optimizer.warmup_steps=0 optimizer.lr=1e-2 sample.tokens=0"
)


def tune(workdir: Path, base: Path, rows: Path, *options: str) -> str:
    given = [f"init.workdir={base}", f"data.path={rows}", *TUNE.split(), *options]
    return helpers.run_here(workdir, *(f"--config.{option}" for option in given), config="finetune").stdout


@pytest.mark.slow
def test_a_run_is_tuned_goes_on_to_the_bit_and_is_carried_on(base, tmp_path):
    rows = write_rows(tmp_path / "chat.jsonl", PAIRS)
    options = ["mesh.replica=2", "mesh.fsdp=4", "sync.strategy=diloco", "sync.codec=int4", "sync.interval=2"]
    options += ["optimizer.schedule=constant"]
    said = tune(tmp_path / "one", base, rows, *options)
    assert "closes an answer with <|im_end|>" in said and "40 conversations, 2 of them held out" in said
    losses = helpers.metric_losses(tmp_path / "one")
    assert losses[8] < 0.8 * losses[1]
    tune(tmp_path / "halves", base, rows, *options, "steps=4")
    helpers.run_here(tmp_path / "halves", "--config.steps=8", config=None)
    digest = lambda run: json.loads((tmp_path / run / "summary.json").read_text())["params_digest"]
    assert digest("halves") == digest("one")
    assert helpers.metric_losses(tmp_path / "halves") == losses


@pytest.mark.slow
def test_a_tuned_run_keeps_the_template_and_is_exported_and_tuned_again_without_its_base(base, tmp_path):
    rows = write_rows(tmp_path / "chat.jsonl", PAIRS)
    shutil.copytree(base, tmp_path / "base")
    tune(tmp_path / "first", tmp_path / "base", rows)
    shutil.rmtree(tmp_path / "base")
    kept = Template.read(tmp_path / "first" / templates.KEPT)
    assert kept and kept.text == chats.SMOLLM2
    test_weights.command("export", tmp_path / "first", tmp_path / "out")
    assert Template.read(tmp_path / "out") and (tmp_path / "out" / "tokenizer.json").is_file()
    tune(tmp_path / "second", tmp_path / "first", rows)
    assert Template.read(tmp_path / "second" / templates.KEPT)


@pytest.mark.slow
@pytest.mark.prove
@pytest.mark.parametrize("name", NAMES)
def test_text_and_ids_are_those_of_transformers(name, template, tmp_path):
    """For conversations that spell no special token: those stay text here."""
    python = os.environ.get("SLACKLINE_TORCH_PYTHON")
    if not python or subprocess.run([python, "-c", "import torch, transformers"], capture_output=True).returncode:
        pytest.skip("SLACKLINE_TORCH_PYTHON names no Python with torch and transformers: make prove makes one")
    chats.write(tmp_path, name)
    special = re.compile("|".join(map(re.escape, chats.SPECIAL[name])))
    clean = lambda messages: [m | {"content": special.sub("", m["content"]) or "x"} for m in messages]
    talks = [clean(chats.draw(seed, thoughts=name == "qwen3")) for seed in range(300)]
    (tmp_path / "chats.json").write_text(json.dumps(talks))
    command = [python, str(Path(__file__).with_name("huggingface_oracle.py")), "chat", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    theirs = json.loads((tmp_path / "chats.ids.json").read_text())
    tokenizer = chats.tokenizer(name)
    for messages, ids in zip(talks, theirs, strict=True):
        assert template(name).prompt(messages[:-1], tokenizer) == ids

"""Conversations: a template is rendered within limits, what is learned is what the assistant says and nothing else, no
message becomes a special token, and rows of conversations are packed into windows."""

import chats
import pytest

from data.template import Template

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
    check_masks(name, template(name), range(60))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_in_many_conversations_what_is_learned_is_the_answers_and_what_closes_them(name, template):
    check_masks(name, template(name), range(1000, 6000))

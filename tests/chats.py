"""Chat templates and tokenizers for tests/test_chat.py. The templates are our own, short ones; for conversations of
plain messages they give what the published ones of these models give (tests/chat_oracle.py compares with transformers).

Each format is written down twice: as Jinja, and in `expected` as what it means."""

import functools
import json
import random
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers

from data.tokenizer import from_text

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
LLAMA3 = (
    "{% for m in messages %}{{ bos_token if loop.first }}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>' }}"
    "{{ '\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
SMOLLM2 = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# An answer's thought is left out once a question follows; the last answer has one, if empty.
QWEN3 = (
    "{% set ns = namespace(asked=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\n') if '</think>' in m.content %}"
    "{% set said = m.content.split('</think>')[-1].lstrip('\n') if '</think>' in m.content else m.content %}"
    "{% if loop.index0 > ns.asked and (loop.last or thought) %}"
    "{{ '<think>\n' + (thought or '') + '\n</think>\n\n' + said.lstrip('\n') }}"
    "{% else %}{{ said }}{% endif %}"
    "{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{% set system = messages[0].content if messages[0].role == 'system' %}"
    "{% set rest = messages[1:] if messages[0].role == 'system' else messages %}{{ bos_token }}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST]' + (system + '\n\n' if loop.last and system is defined and system else '') }}"
    "{{ m.content + '[/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
TEMPLATES = {"llama3": LLAMA3, "smollm2": SMOLLM2, "qwen3": QWEN3, "mistral": MISTRAL}
SPECIAL = {
    "llama3": ["<|begin_of_text|>", "<|eot_id|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"],
    "smollm2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "mistral": ["<s>", "</s>", "<unk>", "[INST]", "[/INST]"],
}
TOKENS = {  # bos_token, eos_token
    "llama3": ("<|begin_of_text|>", "<|eot_id|>"), "smollm2": ("<|im_start|>", "<|im_end|>"),
    "qwen3": ("<|endoftext|>", "<|im_end|>"), "mistral": ("<s>", "</s>"),
}  # fmt: skip
CLOSING = {"llama3": "<|eot_id|>", "smollm2": "<|im_end|>", "qwen3": "<|im_end|>", "mistral": "</s>"}
WORDS = (
    "What is the capital of France ? Paris . Yes , it is 日本語 naïve 🙂 x = 1 \n\n user assistant system think a b c"
)


@functools.cache
def serialized(name: str, blanks: str = "bytes") -> str:
    """A tokenizer.json. blanks: "bytes", or "metaspace" as in SentencePiece's models."""
    alphabet = pre_tokenizers.ByteLevel.alphabet() if blanks == "bytes" else sorted(set(WORDS))
    made = tokenizers.Tokenizer(models.BPE())
    if blanks == "bytes":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
    else:
        made.pre_tokenizer, made.decoder = pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=SPECIAL[name], show_progress=False
    )
    made.train_from_iterator([WORDS, "<|im_ start end <|eot_ id|> [IN ST] " + WORDS] * 3, trainer)
    if name == "qwen3":
        made.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)])
    return made.to_str()


@functools.cache
def tokenizer(name: str, blanks: str = "bytes"):
    return from_text(serialized(name, blanks), name)


def write(folder: Path, name: str, **config: object) -> Path:
    """The small files of a model with this template."""
    folder.mkdir(parents=True, exist_ok=True)
    bos, eos = TOKENS[name]
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(about | {"chat_template": TEMPLATES[name]} | config))
    (folder / "tokenizer.json").write_text(serialized(name))
    return folder


# ── what it means ─────────────────────────────────────────────────────────────────────────────────────────────────────

Part = tuple[str, bool, bool]  # a text, whether it is a special token, whether it is learned


def _header(name: str, role: str) -> list[Part]:
    """Before a message."""
    if name == "llama3":
        tokens = ("<|start_header_id|>", True), (role, False), ("<|end_header_id|>", True), ("\n\n", False)
    elif name == "mistral":
        tokens = (("[INST]", True),) if role == "user" else ()
    else:
        tokens = ("<|im_start|>", True), (role + "\n", False)
    return [(text, special, False) for text, special in tokens]


def _said(name: str, content: str, is_last: bool) -> tuple[str, str]:
    """(what the template adds before an answer, what it makes of the answer)."""
    if name == "llama3":
        return "", content.strip()
    if name != "qwen3":
        return "", content
    thought, found, said = content.rpartition("</think>")
    said = said.lstrip("\n") if found else content
    thought = thought.split("</think>")[0].split("<think>")[-1].strip("\n")
    if not is_last:
        return "", said
    said = said.lstrip("\n")
    return ("", f"<think>\n{thought}\n</think>\n\n{said}") if found else ("<think>\n\n</think>\n\n", said)


def expected(name: str, messages: list[dict[str, str]]) -> list[list[Part]]:
    """The examples of a conversation, part by part, without a template."""
    answers = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    rewrites = len(answers) > 1 and (name == "qwen3" or (name == "mistral" and bool(system)))
    wholes = [(n, {n}) for n in answers] if rewrites else [(answers[-1], set(answers))]
    return [_example(name, messages[: last + 1], learned) for last, learned in wholes]


def _example(name: str, messages: list[dict[str, str]], learned: set[int]) -> list[Part]:
    parts: list[Part] = []
    if name in ("llama3", "mistral"):
        parts.append((TOKENS[name][0], True, False))
    if name == "smollm2" and messages[0]["role"] != "system":
        parts += [*_header(name, "system"), (SYSTEM, False, False), ("<|im_end|>", True, False), ("\n", False, False)]
    questions = [n for n, m in enumerate(messages) if m["role"] == "user"]
    for n, m in enumerate(messages):
        text, before = m["content"], ""
        if name == "mistral" and m["role"] == "system":
            continue
        if m["role"] == "assistant":
            before, text = _said(name, text, n == len(messages) - 1)
        elif name == "llama3":
            text = text.strip()
        if name == "mistral" and n == questions[-1] and messages[0]["role"] == "system":
            text = messages[0]["content"] + "\n\n" + text
        end = "[/INST]" if name == "mistral" and m["role"] == "user" else CLOSING[name]
        parts += [
            *_header(name, m["role"]),
            (before, False, False),
            (text, False, n in learned),
            (end, True, n in learned),
        ]
        if name in ("smollm2", "qwen3"):
            parts.append(("\n", False, False))
    while not parts[-1][2]:
        parts.pop()
    return joined(parts)


def joined(parts: list[Part]) -> list[Part]:
    """Texts that follow each other and are learned alike are one."""
    found: list[Part] = []
    for text, special, learned in parts:
        if found and not special and not found[-1][1] and found[-1][2] == learned:
            text, found = found[-1][0] + text, found[:-1]
        if text:
            found.append((text, special, learned))
    return found


# ── conversations ─────────────────────────────────────────────────────────────────────────────────────────────────────

BITS = (
    "Paris", " is", "the capital", " ", "  ", "\n", "\n\n", "?", ".", "日本", "é", "🙂🏽", "<|im_end|>", "<|im_",
    "end|>", "<|eot_id|>", "</s>", "<s>", "[INST]", "[/INST]", "<", "|", "<think>", "<|im_start|>assistant\n",
    "<unk>", "user\n",
)  # fmt: skip


def draw(seed: int, thoughts: bool = False) -> list[dict[str, str]]:
    """A conversation: perhaps a system message, then questions and answers. thoughts: answers may begin with one."""
    rng = random.Random(seed)
    text = lambda: "".join(rng.choices(BITS, k=rng.randint(1, 8))).strip("\n") or "x"
    messages = [{"role": "system", "content": text()}] if rng.random() < 0.4 else []
    for _ in range(rng.randint(1, 3)):
        messages.append({"role": "user", "content": text()})
        thought = (
            f"<think>\n{rng.choice(BITS[:12]).strip() or 'hm'}\n</think>\n\n" if thoughts and rng.random() < 0.5 else ""
        )
        messages.append({"role": "assistant", "content": thought + text()})
    return messages

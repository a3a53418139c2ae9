"""Where a long text may be cut so that its pieces have the very ids of the whole: memory stays that of a piece.

A tokenizer first splits a text, by a rule of its own, then encodes each part by itself. A cut is allowed only where the
rule splits whatever stands around it: before a single blank, and after a single line end. What each rule does there was
read off its pattern; with a rule that is not listed here a text is not cut.
"""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np

Span = tuple[str, int, int]  # a text, and from which to which character
Piece = tuple[np.ndarray, bool]  # ids, and whether a span ends with them

PIECE_CHARS = 2**15
BATCH_CHARS = 2**18  # encoded at once: until a batch is done, the library remembers much more of a token than its id
# A run without a place to cut is cut all the same when it is longer than this: no text has such words.
WORD_CHARS = 2**18

# `V` is a visible character. Python and Rust disagree on whether \x1c to \x1f are blanks; o200k puts "/" to a line end.
_BLANK, _LINE = r"(?<=V)(?= V)", r"(?<=V\n)(?=V)(?!/)"
_ANY, _ASCII = r"[^\s\x00-\x1f]", "[!-~]"  # a normalizer may change other characters into blanks

_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
KNOWN_PATTERNS = {  # GPT-2; GPT-4 and Llama 3; Qwen 2; GPT-4o
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}",
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    rf"\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}",
}
_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer", "Nmt", "Precompiled"}


def parts_of(whole: dict[str, Any] | None, key: str) -> list[dict[str, Any]]:
    """The steps of a part of a tokenizer.json, of which a Sequence has several and null none."""
    if not whole:
        return []
    return [part for step in whole[key] for part in parts_of(step, key)] if whole["type"] == "Sequence" else [whole]


def places_to_cut(serialized: dict[str, Any]) -> re.Pattern[str] | None:
    """A pattern of no width that matches where texts may be cut for this tokenizer.json; None: nowhere."""
    normalizers = parts_of(serialized.get("normalizer"), "normalizers")
    if any(not _keeps_places(part) for part in normalizers):
        return None
    for token in serialized.get("added_tokens") or ():  # ordinary ones are looked for in the text before all else
        takes_blanks = token["lstrip"] or token["rstrip"] or token["single_word"]
        if not token["special"] and (takes_blanks or re.search(r"\S\s", token["content"])):
            return None
    pre_tokenizers = parts_of(serialized.get("pre_tokenizer"), "pretokenizers")
    allowed = [_cuts_of(part) for part in pre_tokenizers]
    if None in allowed:
        return None
    splitting = [set(cuts) for cuts in allowed if cuts]
    if splitting:
        cuts = set.intersection(*splitting)
    else:
        cuts = {_BLANK} if not pre_tokenizers or _is_metaspace(pre_tokenizers) else set()
        if not _no_merge_ends_in_a_blank(serialized.get("model") or {}, normalizers + pre_tokenizers):
            return None
    if any(part.get("add_prefix_space") or part["type"] in ("Metaspace", "Prepend") for part in pre_tokenizers):
        cuts &= {_BLANK}  # what is put before a text is not put before a blank
    visible = _ASCII if normalizers else _ANY
    return re.compile("|".join(sorted(cuts)).replace("V", visible)) if cuts else None


def _keeps_places(normalizer: dict[str, Any]) -> bool:
    kind = normalizer["type"]
    if kind == "Replace":
        pattern = normalizer["pattern"]
        return len(pattern.get("String", "")) == 1 or pattern.get("Regex") == " {2,}"
    if kind == "Strip":
        return not normalizer["strip_left"]
    return kind in _NORMALIZERS or kind in ("Prepend", "ByteLevel")


def _cuts_of(part: dict[str, Any]) -> tuple[str, ...] | None:
    """Where this pre-tokenizer always splits; () if it splits elsewhere only, by single characters; None: unknown."""
    kind = part["type"]
    if kind in ("Whitespace", "WhitespaceSplit", "BertPreTokenizer"):
        return (_BLANK, _LINE)
    if kind == "ByteLevel":
        return (_BLANK, _LINE) if part.get("use_regex", True) else ()
    if kind == "Metaspace":
        return (_BLANK,) if part.get("split", True) else ()
    if kind in ("Digits", "Punctuation"):
        return ()
    if kind == "Split" and part["pattern"].get("Regex") in KNOWN_PATTERNS:
        known = (part["behavior"], part["invert"]) in (("Isolated", False), ("Removed", True))
        return (_BLANK, _LINE) if known else None
    return None


def _is_metaspace(pre_tokenizers: list[dict[str, Any]]) -> bool:
    return [part["type"] for part in pre_tokenizers] == ["Metaspace"]


def _no_merge_ends_in_a_blank(model: dict[str, Any], steps: list[dict[str, Any]]) -> bool:
    """Whether a BPE that takes a text as one word never joins a visible character to a blank after it."""
    plain = not any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
    if model.get("type") != "BPE" or not plain:
        return False
    marks = [
        step.get("replacement") or step.get("content") for step in steps if step["type"] in ("Metaspace", "Replace")
    ]
    mark = next((mark for mark in marks if mark), " ")
    joined = re.compile(rf"[^{re.escape(mark)}]{re.escape(mark)}")
    return mark in model["vocab"] and not any(joined.search(token) for token in model["vocab"])


def continuing(serialized: dict[str, Any]) -> dict[str, Any]:
    """The same tokenizer.json for a text that goes on: nothing is put before it."""

    def without_prefix(part: Any) -> Any:
        if isinstance(part, list):
            return [without_prefix(step) for step in part if not (isinstance(step, dict) and _prepends(step))]
        if not isinstance(part, dict):
            return part
        changed = {key: without_prefix(value) for key, value in part.items()}
        if part.get("type") == "Metaspace":  # files of earlier versions of the library have add_prefix_space instead
            changed.pop("add_prefix_space", None)
            changed["prepend_scheme"] = "never"
        elif "add_prefix_space" in changed:
            changed["add_prefix_space"] = False
        return changed

    normalizer = serialized.get("normalizer")
    return serialized | {
        "normalizer": None if normalizer and _prepends(normalizer) else without_prefix(normalizer),
        "pre_tokenizer": without_prefix(serialized.get("pre_tokenizer")),
    }


def _prepends(part: dict[str, Any]) -> bool:
    return part.get("type") == "Prepend"


def cut(text: str, start: int, stop: int, places: re.Pattern[str] | None) -> Iterator[tuple[int, int, bool]]:
    """(from, to, whether it begins inside a word) of the pieces of text[start:stop]."""
    inside = False
    while places is not None and stop - start > PIECE_CHARS:
        found = places.search(text, start + PIECE_CHARS, min(stop, start + WORD_CHARS))
        if found is None and stop - start <= WORD_CHARS:
            break
        at = found.end() if found else start + WORD_CHARS
        yield start, at, inside
        start, inside = at, found is None
    yield start, stop, inside

"""What was probably meant."""

import difflib
from collections.abc import Sequence


def unknown_key(key: str, keys: list[str]) -> str:
    group = key.rpartition(".")[0]
    siblings = ", ".join(k.rpartition(".")[2] for k in keys if k.rpartition(".")[0] == group)
    where = f"{group} has {siblings}" if group and siblings else "see configs/base.py"
    return f"unknown config key {key!r}: did you mean {nearest_name(key, keys)!r}? ({where})"


def nearest_name(name: str, known: Sequence[str]) -> str:
    """The most similar name. The last part of a dotted key counts most; initials are as good as words."""
    name = name.replace("-", "_")
    last = name.rpartition(".")[2]

    def likeness(k: str) -> float:
        own = k.rpartition(".")[2]
        # A name without a group says nothing of groups: of several, the outermost is meant.
        whole = difflib.SequenceMatcher(None, name, k).ratio() if "." in name else -0.01 * k.count(".")
        initials = own in (last, _initials(last)) or _initials(own) == last
        return whole + (1 if initials else difflib.SequenceMatcher(None, last, own).ratio())

    return max(known, key=likeness)


def _initials(name: str) -> str:
    """Of a name of several words; of one word the word itself."""
    words = name.split("_")
    return "".join(word[:1] for word in words) if len(words) > 1 else name


def nearest_multiples(size: int, unit: int) -> str:
    below = size // unit * unit
    return f"{below} or {below + unit}" if below else f"{unit}"

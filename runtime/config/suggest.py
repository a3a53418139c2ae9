"""What was probably meant."""

import difflib
from collections.abc import Sequence


def unknown_key(key: str, keys: list[str]) -> str:
    group = key.rpartition(".")[0]
    siblings = ", ".join(k.rpartition(".")[2] for k in keys if k.rpartition(".")[0] == group)
    where = f"{group} has {siblings}" if group and siblings else "see configs/base.py"
    return f"unknown config key {key!r}: did you mean {nearest_name(key, keys)!r}? ({where})"


def nearest_name(name: str, known: Sequence[str]) -> str:
    """The most similar name; the last part of a dotted key counts most."""
    last = name.rpartition(".")[2]

    def likeness(k: str) -> float:
        whole = difflib.SequenceMatcher(None, name, k).ratio()
        return whole + difflib.SequenceMatcher(None, last, k.rpartition(".")[2]).ratio()

    return max(known, key=likeness)


def nearest_multiples(size: int, unit: int) -> str:
    below = size // unit * unit
    return f"{below} or {below + unit}" if below else f"{unit}"

"""How often the loops of a compiled program run: how often their collectives do."""

import re
from typing import NamedTuple

_SAME = ("copy", "copy-start", "copy-done", "bitcast", "convert")  # what hands a number on


class Frame(NamedTuple):
    """A computation as it is run. initial: if it is a loop's body, the name of what the loop begins with, in the
    computation around it."""

    lines: list[str]
    initial: str = ""
    around: "Frame | None" = None


class _Instruction(NamedTuple):
    op: str
    operands: list[str]
    text: str


def trips(loop: str, condition: list[str], body: list[str], around: Frame) -> int:
    """Of the `while` with this text behind its opening bracket. CPU and GPU compilers write beside it how often it
    runs. The TPU's does not: there a counter is compared with a bound, and its start, its step and the bound are read:
    JAX counts from 0 by 1, and XLA's products in parts count by 2.

    Raises ValueError for a loop of another form."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop):
        return int(known[1])
    initial = re.match(r"%([\w.\-]+)", loop)
    root = next((line for line in condition if line.lstrip().startswith("ROOT ")), "")
    compared = re.search(r" compare\(%([\w.\-]+), %([\w.\-]+)\), direction=LT", root)
    if initial and compared:
        inner, place, limit = Frame(body, initial[1], around), *(_place(name, condition) for name in compared.groups())
        bound = number(compared[2], Frame(condition)) if limit is None else _given(limit, inner)
        step, start = _step(place, inner), number(_element(initial[1], place, around.lines), around)
        if bound is not None and start is not None and step:
            return max(0, -(-(bound - start) // step))
    raise ValueError(f"a loop with collectives has no known trip count, so its bytes are unknown: {loop[:300]}")


def number(name: str, frame: Frame) -> int | None:
    """What an instruction is in every turn, if that can be read."""
    found = _find(name, frame.lines)
    if found is None:
        return None
    if constant := re.search(r" constant\((-?\d+)\)", found.text):
        return int(constant[1])
    if found.op in _SAME:
        return number(found.operands[0], frame)
    place = _place(name, frame.lines)
    return None if place is None else _given(place, frame)


def _given(place: int, body: Frame) -> int | None:
    """What a loop's body is given at this place, if it hands it on as it is."""
    root = _find(_root(body.lines), body.lines)
    if body.around is None or root is None or root.op != "tuple":
        return None
    if _place(root.operands[place], body.lines) != place:
        return None
    return number(_element(body.initial, place, body.around.lines), body.around)


def _find(name: str, lines: list[str]) -> _Instruction | None:
    form = re.compile(rf"\s*(?:ROOT )?%?{re.escape(name)} = (?:\(.*?\)|\S+) ([a-z0-9\-]+)\((.*)$")
    match = next(filter(None, map(form.match, lines)), None)
    return match and _Instruction(match[1], re.findall(r"%([\w.\-]+)", match[2].partition(")")[0]), match[0])


def _place(name: str, lines: list[str]) -> int | None:
    """Where in the tuple that a computation is given this stands; None: it is not of there."""
    found = _find(name, lines)
    while found and found.op in _SAME:
        found = _find(found.operands[0], lines)
    if found is None or found.op != "get-tuple-element":
        return None
    given = _find(found.operands[0], lines)
    index = re.search(r"index=(\d+)", found.text)
    return int(index[1]) if index and given and given.op == "parameter" else None


def _element(name: str, place: int | None, lines: list[str]) -> str:
    """The name of one element of a tuple; "" if it is not written out."""
    found = _find(name, lines)
    return found.operands[place] if found and found.op == "tuple" and place is not None else ""


def _root(lines: list[str]) -> str:
    return next((match[1] for match in (re.match(r"\s*ROOT %?([\w.\-]+) = ", line) for line in lines) if match), "")


def _step(place: int | None, body: Frame) -> int | None:
    """By how much a body raises the counter at this place."""
    added = _find(_element(_root(body.lines), place, body.lines), body.lines)
    while added and added.op in _SAME:
        added = _find(added.operands[0], body.lines)
    if added is None or added.op != "add":
        return None
    counters = [_place(name, body.lines) == place for name in added.operands]
    return number(added.operands[counters.index(False)], body) if sum(counters) == 1 else None

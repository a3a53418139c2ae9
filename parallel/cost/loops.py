"""How often the loops of a compiled program run: how often their collectives and products do."""

import re
from functools import cached_property
from typing import NamedTuple

from parallel.cost.hlo import Instruction, Program

_SAME = ("copy", "copy-start", "copy-done", "bitcast", "convert")  # what hands a number on


class Frame(NamedTuple):
    """A computation as it is run. loop, around: of a loop's body, the loop, and what that stands in."""

    name: str
    loop: Instruction | None = None
    around: "Frame | None" = None


class Loops:
    """Those of one program."""

    def __init__(self, program: Program):
        self._program = program

    def trips(self, computation: str, loop: Instruction) -> int:
        """Raises ValueError where that cannot be told."""
        return trips(self._program, loop, self._frames.get(computation, Frame(computation)))

    @cached_property
    def _frames(self) -> dict[str, Frame]:
        """Of the entry, and of the bodies of loops within."""
        entry = self._program.entry
        found, waiting = {entry: Frame(entry)}, [entry]
        while waiting:
            name = waiting.pop()
            for x in self._program.computations[name]:
                if x.op == "while" and body(x) not in found:
                    found[body(x)] = Frame(body(x), x, found[name])
                    waiting.append(body(x))
        return found


def body(loop: Instruction) -> str:
    return _part(loop, "body")


def _part(loop: Instruction, name: str) -> str:
    found = re.search(rf"\b{name}=%?([\w.\-]+)", loop.rest)
    assert found, loop
    return found[1]


def trips(program: Program, loop: Instruction, around: Frame) -> int:
    """Of a `while`. CPU and GPU compilers write beside it how often it runs. The TPU's does not: there a counter is
    compared with a bound, and its start, its step and the bound are read: JAX counts from 0 by 1, and XLA's products in
    parts count by 2.

    Raises ValueError for a loop of another form."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
        return int(known[1])
    condition, inner = _part(loop, "condition"), Frame(body(loop), loop, around)
    root = _root(program, condition)
    if root and root.op == "compare" and "direction=LT" in root.rest and len(root.operands) == 2:
        counter, bound = root.operands
        place, limit = _place(program, condition, counter), _place(program, condition, bound)
        last = _number(program, Frame(condition), bound) if limit is None else _given(program, inner, limit)
        first, step = _begun(program, inner, place), _step(program, inner, place)
        if last is not None and first is not None and step:
            return max(0, -(-(last - first) // step))
    raise ValueError(f"a loop has no known trip count, so its bytes and products are unknown: {loop.rest[:300]}")


def _number(program: Program, frame: Frame, name: str) -> int | None:
    """What an instruction is in every turn, if that can be read."""
    x = program.find(frame.name, name)
    if x is None:
        return None
    if x.op == "constant":
        found = re.match(r"(-?\d+)\)", x.rest)
        return int(found[1]) if found else None
    if x.op in _SAME:
        return _number(program, frame, x.operands[0])
    place = _place(program, frame.name, name)
    return None if place is None else _given(program, frame, place)


def _given(program: Program, inner: Frame, place: int) -> int | None:
    """What a loop's body is given at this place, if it hands it on as it is."""
    after = _element(program, inner.name, _root(program, inner.name), place)
    if after is None or _place(program, inner.name, after) != place:
        return None
    return _begun(program, inner, place)


def _begun(program: Program, inner: Frame, place: int | None) -> int | None:
    """What a loop begins with at this place."""
    if inner.loop is None or inner.around is None or place is None:
        return None
    name = _element(program, inner.around.name, program.operand(inner.around.name, inner.loop, 0), place)
    return None if name is None else _number(program, inner.around, name)


def _place(program: Program, computation: str, name: str) -> int | None:
    """Where in the tuple that a computation is given this stands; None: it is not of there."""
    x = program.find(computation, name)
    while x and x.op in _SAME:
        x = program.operand(computation, x, 0)
    if x is None or x.op != "get-tuple-element":
        return None
    given, index = program.operand(computation, x, 0), re.search(r"index=(\d+)", x.rest)
    return int(index[1]) if index and given and given.op == "parameter" else None


def _root(program: Program, computation: str) -> Instruction | None:
    return next(iter(program.computations.get(computation, [])[-1:]), None)


def _element(program: Program, computation: str, x: Instruction | None, place: int) -> str | None:
    """The name of one element of a tuple; None if it is not written out."""
    return x.operands[place] if x and x.op == "tuple" and place < len(x.operands) else None


def _step(program: Program, inner: Frame, place: int | None) -> int | None:
    """By how much a body raises the counter at this place."""
    name = None if place is None else _element(program, inner.name, _root(program, inner.name), place)
    x = program.find(inner.name, name) if name else None
    while x and x.op in _SAME:
        x = program.operand(inner.name, x, 0)
    if x is None or x.op != "add":
        return None
    others = [name for name in x.operands if _place(program, inner.name, name) != place]
    return _number(program, inner, others[0]) if len(others) == 1 else None

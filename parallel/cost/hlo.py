"""The text of a compiled program (`compiled.as_text()`), read: its computations, and the lines of code that
instructions come from."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "f4e2m1fn": 4, "f8e4m3fn": 8, "f8e4m3": 8, "f8e5m2": 8, "f8e8m0fnu": 8, "f16": 16,
    "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip

ROOT = f"{Path(__file__).parents[2]}/"
DEPTH = 6  # operands
NOWHERE = "XLA"  # where an array comes from that no line and no name leads to
HELPERS = "parallel/layout/"  # where arrays are only said to lie: the caller's line says more
_HEAD = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\) -> .* \{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>\(.*?\)|\S+) (?P<op>[a-z0-9\-]+)\((?P<rest>.*)$")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9][a-z]*)?)\[([0-9,]*)\](\{[^{}]*\})?")
_FAST = "S(1)"  # of a layout: a TPU's own fast memory
_AWAY = "S(5)"  # the host's
_CALLED = re.compile(r"(?:to_apply|calls|body|condition|called_computations)=\{?%?([\w.\-]+)")


@dataclass(frozen=True)
class Array:
    """is_fast: it lies in the chip's own fast memory, and not in its large one; is_away: in the host's."""

    dtype: str
    shape: tuple[int, ...]
    is_fast: bool = field(default=False, compare=False)
    is_away: bool = field(default=False, compare=False)

    @property
    def size(self) -> int:
        found = 1
        for n in self.shape:
            found *= n
        return found

    @property
    def bytes(self) -> float:
        return self.size * BITS[self.dtype] / 8


@dataclass(frozen=True)
class Instruction:
    """rest: operands and attributes, as they stand behind the operation's name."""

    name: str
    type: str
    op: str
    rest: str

    @cached_property
    def arrays(self) -> list[Array]:
        """Of the result."""
        return arrays(self.type)

    @cached_property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest[: _end_of_operands(self.rest)])

    @cached_property
    def called(self) -> list[str]:
        """Names of the computations that it runs; of a conditional its branches."""
        if found := re.search(r"branch_computations=\{([^}]*)\}", self.rest):
            return [name.strip().lstrip("%") for name in found[1].split(",")]
        branches = re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", self.rest)
        return branches or _CALLED.findall(self.rest)

    def numbers(self, attribute: str) -> list[int]:
        """Of attribute={1,2}."""
        found = re.search(rf"\b{attribute}=\{{([0-9,]*)\}}", self.rest)
        return [int(n) for n in found[1].split(",") if n] if found else []


def arrays(type_: str) -> list[Array]:
    """Those in a type."""
    shape = lambda dims: tuple(int(n) for n in dims.split(",") if n)
    found = [row for row in _ARRAY.findall(type_) if row[0] in BITS]
    return [Array(dtype, shape(dims), _FAST in layout, _AWAY in layout) for dtype, dims, layout in found]


def _end_of_operands(rest: str) -> int:
    depth = 1
    for place, character in enumerate(rest):
        depth += {"(": 1, ")": -1}.get(character, 0)
        if not depth:
            return place
    return len(rest)


@dataclass
class Program:
    """Computations in the order of the text, each a schedule: its instructions run in their order."""

    computations: dict[str, list[Instruction]]
    entry: str
    head: str = field(repr=False, default="")  # the tables of source lines

    @classmethod
    def read(cls, text: str) -> "Program":
        """Raises ValueError for what is no compiled program."""
        found: dict[str, list[Instruction]] = {}
        entry, current, begun = "", None, len(text)
        for number, line in enumerate(text.splitlines()):
            if match := _HEAD.match(line):
                begun = min(begun, number)
                current = found.setdefault(match["name"], [])
                entry = match["name"] if match["entry"] else entry
            elif line == "}" or line.startswith("}, "):
                current = None
            elif current is not None:
                if match := _LINE.match(line):
                    current.append(Instruction(*match.group("name", "type", "op", "rest")))
                elif current:  # attributes of a kernel go on over several lines
                    last = current.pop()
                    current.append(Instruction(last.name, last.type, last.op, f"{last.rest}\n{line}"))
        if not entry:
            raise ValueError("this is not the text of a compiled HLO module: it has no ENTRY computation")
        return cls(found, entry, "\n".join(text.splitlines()[:begun]))

    @cached_property
    def _named(self) -> dict[str, dict[str, Instruction]]:
        return {name: {x.name: x for x in body} for name, body in self.computations.items()}

    def find(self, computation: str, name: str) -> Instruction | None:
        return self._named.get(computation, {}).get(name)

    def operand(self, computation: str, x: Instruction, number: int) -> Instruction | None:
        return self.find(computation, x.operands[number]) if number < len(x.operands) else None

    # ── lines of code ────────────────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def _tables(self) -> dict[str, dict[str, str]]:
        found: dict[str, dict[str, str]] = {}
        table: dict[str, str] = {}
        for line in self.head.splitlines():
            if re.fullmatch(r"[A-Z]\w+", line):
                table = found.setdefault(line, {})
            elif row := re.match(r"(\d+) (.*)", line):
                table[row[1]] = row[2]
        return found

    def frames(self, x: Instruction) -> Iterator[str]:
        """file:line, innermost first, of the call that it comes from."""
        if found := re.search(r'source_file="([^"]*)" source_line=(\d+)', x.rest):
            yield f"{found[1]}:{found[2]}"
        found = re.search(r"stack_frame_id=(\d+)", x.rest)
        yield from self.stack(int(found[1]) if found else 0)

    def stack(self, number: int) -> Iterator[str]:
        """file:line of a frame in the tables, and of those around it."""
        stack = self._tables.get("StackFrames", {})
        field_of = lambda name, row: (re.search(rf"\b{name}=(\d+)", row) or ("", ""))[1]
        # The text has parents counted one too high, so that the first frame is its own.
        shift = 1 if field_of("parent_frame_id", stack.get("1", "")) == "1" else 0
        while frame := stack.get(str(number)):
            where = self._tables.get("FileLocations", {}).get(field_of("file_location_id", frame), "")
            file = self._tables.get("FileNames", {}).get(field_of("file_name_id", where), "").strip('"')
            yield f"{file}:{field_of('line', where)}"
            parent = int(field_of("parent_frame_id", frame) or 0) - shift
            number = parent if parent < number else 0

    def where(self, computation: str, x: Instruction) -> str:
        """The line of ours that it comes from, file:line below the project's root. Of what XLA has made by itself that
        of its operand; else the operation's name in JAX, if it has one."""
        found, names = x, []
        for _ in range(DEPTH):
            own = [frame.removeprefix(ROOT) for frame in self.frames(found) if frame.startswith(ROOT)]
            if best := [frame for frame in own if not frame.startswith(HELPERS)] or own:
                return best[0]
            names += re.findall(r'op_name="((?:[^"\\]|\\.)*)"', found.rest)[:1]
            operand = self.operand(computation, found, 0)
            if operand is None or operand.type.startswith("("):
                break
            found = operand
        return names[0].replace("\\", "") if names else NOWHERE

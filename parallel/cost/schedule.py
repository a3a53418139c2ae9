"""What a compiled program computes, reads and holds, and which of its collectives run while it multiplies matrices: all
read from its schedule.

FLOPs are those of matrix products, loops included, and of attention kernels in closed form, the causal half. Letters:
B batch, H heads, T query and S key positions, K head size.
"""

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from parallel.cost import loops
from parallel.cost.hlo import NOWHERE, Array, Instruction, Program, arrays
from parallel.cost.wire import KINDS

# Products of T×S×K in a kernel: scores and values forwards; backwards what each of the kernels makes again, too.
ATTENTION = {"fwd": 2, "dq": 3, "dkv": 4, "bwd": 5}
MOSAIC = "mosaic_gpu"  # in our programs those of experts' products alone (parallel/layout/mosaic.py)
# What is another name for an array, or writes into one that is there.
SAME = set(
    "parameter tuple get-tuple-element bitcast while conditional call optimization-barrier constant after-all "
    "copy-done send send-done recv-done partition-id replica-id domain".split()
)
PARTS = ("dynamic-slice", "slice", "gather")  # read a part of their operand
RUN = ("call", "conditional", "async-start")  # what runs other computations, whose results lie in memory
ASYNC = "async_collective_fusion"  # TPU: a collective in steps, in fusions that compute meanwhile


@dataclass(frozen=True)
class Buffer:
    """An array that a program makes. where: file:line, or the operation's name."""

    bytes: int
    dtype: str
    shape: tuple[int, ...]
    where: str


def flops(program: Program) -> float:
    """Of one call, on one device. Raises ValueError where a loop with products runs nobody knows how often."""
    return Flops(program).of_computation(program.entry)


def executed(program: Program, name: str = "") -> Iterator[tuple[str, Instruction]]:
    """(computation, instruction) of all that has a result in memory: what stands inside of a fusion has none."""
    for x in program.computations[name or program.entry]:
        yield name or program.entry, x
        inside = [loops.body(x)] if x.op == "while" else x.called if x.op in RUN else ()
        for called in inside:
            yield from executed(program, called)


def bytes_moved(program: Program) -> float:
    """What its instructions read and write in memory, loops included: of what they slice, or write a part of, that
    part. Raises ValueError where a loop runs nobody knows how often."""
    turns = loops.Loops(program)

    def of(computation: str) -> float:
        total = 0.0
        for x in program.computations[computation]:
            total += moved(program, computation, x)
            if x.op == "while":
                total += turns.trips(computation, x) * of(loops.body(x))
            elif x.op in RUN:
                total += sum(map(of, x.called))
        return total

    return of(program.entry)


def moved(program: Program, computation: str, x: Instruction) -> float:
    """What one instruction reads and writes, but not the computations that it runs."""
    if x.op in SAME or x.op.endswith("-done"):
        return 0.0
    if x.op in RUN:
        return 0.0
    if x.op == "fusion-start":
        return sum(moved(program, called, y) for called in x.called for y in program.computations[called])
    written = in_memory(x.arrays)
    if x.op.endswith("-start"):  # its type has operands and results
        return written
    if x.op in PARTS:
        return 2 * written
    sizes = [_bytes(program.operand(computation, x, n)) for n in range(len(x.operands))]
    if x.op == "dynamic-update-slice":
        return 2 * sizes[1]
    if x.op != "fusion" or not x.called:
        return written + sum(sizes)
    inside = _Inside(program, x.called[0])
    return inside.written() + sum(inside.read(n, size) for n, size in enumerate(sizes))


def _bytes(x: Instruction | None) -> float:
    return in_memory(x.arrays) if x and not x.type.startswith("(") else 0.0


def in_memory(arrays: Iterable[Array]) -> float:
    """Bytes of those that lie in the chip's large memory."""
    return sum(a.bytes for a in arrays if not (a.is_fast or a.is_away))


class _Inside:
    """Of a fusion, what it reads of its operands and writes of its result; it may have fusions inside."""

    def __init__(self, program: Program, computation: str):
        self._program, self._body = program, program.computations[computation]
        self._named = {x.name: x for x in self._body}

    def read(self, number: int, size: float) -> float:
        parameter = next((x for x in self._body if x.op == "parameter" and x.rest.startswith(f"{number})")), None)
        needed = 0.0
        for user, place in self._users(parameter) if parameter else ():
            if user.op == "fusion":
                needed += _Inside(self._program, user.called[0]).read(place, size)
            elif user.op in PARTS and not place:
                needed += _bytes(user)
            elif user.op != "dynamic-update-slice" or place:
                return size
        return min(size, needed)

    def _users(self, x: Instruction) -> list[tuple[Instruction, int]]:
        """(instruction, which of its operands), beyond other names."""
        found = [(user, user.operands.index(x.name)) for user in self._body if x.name in user.operands]
        beyond = [more for user, _ in found if user.op == "bitcast" for more in self._users(user)]
        return [row for row in found if row[0].op != "bitcast"] + beyond

    def written(self) -> float:
        root = self._body[-1]
        results = [self._named.get(name) for name in root.operands] if root.op == "tuple" else [root]
        return sum(map(self._part, results))

    def _part(self, x: Instruction | None) -> float:
        while x and x.op == "bitcast" and x.operands:
            x = self._named.get(x.operands[0])
        if x and x.op == "fusion" and not x.type.startswith("("):
            return _Inside(self._program, x.called[0]).written()
        return _bytes(self._named.get(x.operands[1])) if x and x.op == "dynamic-update-slice" else _bytes(x)


def largest(program: Program, count: int = 5) -> list[Buffer]:
    """The largest arrays that it makes, alike ones of one line once. What XLA allocates for a loop to fill, or to add
    up in, comes from the line that does so."""
    found: dict[Buffer, None] = {}
    filled: dict[Array, str] = {}
    for computation, x in executed(program):
        if _fills(x):
            filled |= {a: program.where(computation, x) for a in x.arrays}
        elif x.op not in SAME and not x.op.endswith(("-done", "-start")):
            for a in x.arrays:
                found[Buffer(round(a.bytes), a.dtype, a.shape, program.where(computation, x))] = None
    is_line = lambda where: re.search(r":\d+$", where) is not None
    lines = {Array(b.dtype, b.shape): b.where for b in found if is_line(b.where)} | filled
    sizes = {(a.dtype, round(a.bytes)): where for a, where in lines.items()}  # under another shape
    same = lambda b: lines.get(Array(b.dtype, b.shape)) or sizes.get((b.dtype, b.bytes))
    of = lambda b: same(b) or b.where if b.where == NOWHERE or b.where.startswith("broadcast") else b.where
    named = dict.fromkeys(replace(buffer, where=of(buffer)) for buffer in found)
    return sorted(named, key=lambda buffer: -buffer.bytes)[:count]


def _fills(x: Instruction) -> bool:
    """Whether it writes a part of an array that is there."""
    name = re.search(r'op_name="([^"]*)"', x.rest)
    return "dynamic-update-slice" in f"{x.op} {x.name} {name[1] if name else ''}".replace("_", "-")


def hidden(program: Program) -> set[str]:
    """Names of the collectives and transfers that are under way while matrix products are computed: between a start and
    its done, or inside of one fusion with them."""
    counted, names = Flops(program), set()
    for computation, body in program.computations.items():
        under_way: dict[str, str] = {}  # {what its done asks for: name}
        for x in body:
            own = counted.of(computation, x)
            if own:
                names |= set(under_way.values())
            if x.op.endswith("-start") and x.op.removesuffix("-start") in KINDS or x.op in ("recv", "async-start"):
                under_way[x.name] = x.name
            elif x.op.endswith("-done") and x.operands:
                under_way.pop(x.operands[0], None)
            elif x.op == "fusion" and own and any(c.startswith(ASYNC) for c in x.called):
                names |= {y.name for c in x.called for y in _inside(program, c) if y.op in KINDS}
    return names


def _inside(program: Program, computation: str) -> Iterator[Instruction]:
    for x in program.computations.get(computation, ()):
        yield x
        for called in x.called if x.op in ("fusion", "call") else ():
            yield from _inside(program, called)


class Flops:
    """FLOPs of computations and instructions of one program, run once."""

    def __init__(self, program: Program):
        self._program, self._loops = program, loops.Loops(program)
        self._known: dict[str, float] = {}

    def of_computation(self, name: str) -> float:
        if name not in self._known:
            self._known[name] = 0.0
            self._known[name] = sum(self.of(name, x) for x in self._program.computations.get(name, ()))
        return self._known[name]

    def of(self, computation: str, x: Instruction) -> float:
        operand = lambda n: self._first(computation, x, n)
        if x.op == "dot":
            return _of_dot(x, operand(0), x.numbers("lhs_contracting_dims"))
        if x.op == "convolution":
            return _of_convolution(x, operand(0), operand(1))
        if x.op == "custom-call":
            return _of_kernel(x, operand(0))
        if x.op == "while":
            once = self.of_computation(loops.body(x))
            return once * self._loops.trips(computation, x) if once else 0.0
        if x.op == "conditional":
            return max(map(self.of_computation, x.called), default=0.0)
        if x.op in ("fusion", "call", "async-start") or x.op.endswith("-start"):
            return sum(map(self.of_computation, x.called))
        return 0.0

    def _first(self, computation: str, x: Instruction, number: int) -> Array | None:
        found = self._program.operand(computation, x, number)
        return found.arrays[0] if found and found.arrays else None


def _of_dot(x: Instruction, left: Array | None, contracted: list[int]) -> float:
    return 2.0 * x.arrays[0].size * math.prod(left.shape[n] for n in contracted) if left else 0.0


def _of_convolution(x: Instruction, left: Array | None, right: Array | None) -> float:
    """What a TPU makes of products. Of a window only the places that hold a number count, as in XLA's cost analysis."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", x.rest)
    if not (labels and left and right):
        return 0.0
    of = dict(zip(labels[3], x.arrays[0].shape, strict=False))
    kernel, source = dict(zip(labels[2], right.shape, strict=False)), dict(zip(labels[1], left.shape, strict=False))
    window = {}
    if found := re.search(r"window=\{([^}]*)\}", x.rest):
        window = dict(part.split("=") for part in found[1].split())
    spatial = sorted(key for key in of if key.isdigit())
    values = lambda name, other: window[name].split("x") if name in window else [other] * len(spatial)
    places = 1
    for n, key in enumerate(spatial):
        pad = int(values("pad", "0_0")[n].split("_")[0])
        stride, spread, apart = (int(values(name, "1")[n]) for name in ("stride", "rhs_dilate", "lhs_dilate"))
        reach = (source[key] - 1) * apart + 1
        inside = lambda o, k, pad=pad, stride=stride, spread=spread, apart=apart, reach=reach: (
            0 <= (at := o * stride - pad + k * spread) < reach and at % apart == 0
        )
        places *= sum(inside(o, k) for o in range(of[key]) for k in range(kernel[key]))
    return 2.0 * of["b"] * of["f"] * kernel["i"] * places


def _of_kernel(x: Instruction, left: Array | None) -> float:
    """cuBLAS says its dimensions; of attention they follow from the queries' and keys' shapes."""
    target = re.search(r'custom_call_target="([^"]*)"', x.rest)
    if target is None:
        return 0.0
    if target[1].startswith("__cublas"):
        found = re.search(r'"lhs_contracting_dimensions":\s*\[([^\]]*)\]', x.rest)
        return _of_dot(x, left, [int(n) for n in re.findall(r"\d+", found[1])]) if found else 0.0
    if target[1].startswith("__cudnn$fmha"):
        shape = re.search(r'"intermediate_tensor_shape".*?"dimensions":\s*\[([^\]]*)\]', x.rest)
        scores = math.prod(int(n) for n in re.findall(r"\d+", shape[1])) if shape else 0
        causal = 0.5 if '"CAUSAL"' in x.rest else 1.0
        return 2.0 * scores * x.arrays[0].shape[-1] * ATTENTION["bwd" if "Backward" in target[1] else "fwd"] * causal
    part = re.match(r"splash_mha_(fwd|dq|dkv)", x.name)
    grouped = re.match("ragged-dot-(?!metadata)", x.name) or target[1].startswith(MOSAIC)
    if not target[1].startswith(("tpu_custom_call", MOSAIC)) or not (part or grouped):
        return 0.0
    layouts = re.search(r"operand_layout_constraints=\{(.*?)\}, frontend|operand_layout_constraints=\{(.*)\}", x.rest)
    given = arrays(layouts[0]) if layouts else []
    if not part:  # of rows in groups: all that there is room for
        rows = [a for a in given if a.dtype != "s32"]
        return 2.0 * rows[0].size * x.arrays[0].shape[-1] if rows else 0.0
    large = [a for a in given if len(a.shape) >= 3 and a.dtype != "s8"]
    if len(large) < 2:
        return 0.0
    queries, keys = large[0], large[1]
    causal = 0.5 if any(a.dtype == "s32" for a in given) else 1.0  # of numbers of positions a kernel makes its mask
    return 2.0 * queries.size * keys.shape[-2] * ATTENTION[part[1]] * causal

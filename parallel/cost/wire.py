"""Bytes on the wire, counted in a compiled program: what one device sends over each mesh axis in one call.

The optimised HLO is the truth: XLA may widen a dtype, add a collective of its own or move one into a loop, and a
formula would never notice.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from jax.sharding import Mesh

from parallel.cost import loops
from parallel.cost.hlo import Array, Instruction, Program
from parallel.cost.loops import Frame

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
# What XLA calls a transfer between TPU slices.
_TRANSFERS = {
    "ALL_REDUCE": "all-reduce", "ALL_GATHER": "all-gather", "REDUCE_SCATTER": "reduce-scatter",
    "ALL_TO_ALL": "all-to-all", "ONE_TO_ONE": "collective-permute",
}  # fmt: skip
MEETING = r'_xla_host_transfer_rendezvous="([^"]*)"'  # of a send and its recv
SLICE = 100_000  # device j of slice s, which megascale counts from 1, has the id s · SLICE + j


@dataclass(frozen=True)
class Collective:
    """One collective of the program. axes: along which devices of a group differ, slowest first. `sent` is the bytes
    that one device sends per call, loops included."""

    kind: str
    axes: tuple[str, ...]
    dtype: str
    sent: float
    scope: str  # the op_name that JAX gave it: what in our code it comes from
    channel: str = ""
    frame: str = ""  # its number in the table of source lines at the program's head
    name: str = ""  # the instruction's, a transfer's recv's

    @property
    def axis(self) -> str:
        """What it counts on."""
        return self.axes[0]


@dataclass(frozen=True)
class Places:
    """Where the devices that a program names stand in the mesh: `of_partition` in replica_groups, `of_id` between
    slices. A program of several TPU slices is the program of one of them: its partitions are that slice's devices, in
    the mesh's order, and what leaves the slice is written as send and recv."""

    names: tuple[str, ...]
    shape: tuple[int, ...]
    of_partition: np.ndarray
    of_id: dict[int, int]

    def axes(self, positions: np.ndarray) -> tuple[str, ...]:
        """The axes along which devices of one group differ, slowest first. positions: [group, member]."""
        coordinates = np.stack(np.unravel_index(positions, self.shape))  # [axis, group, member]
        differs = (coordinates != coordinates[:, :, :1]).any(axis=(1, 2))
        return tuple(name for name, d in zip(self.names, differs, strict=True) if d)


def places_of(mesh: Mesh) -> Places:
    devices = list(mesh.devices.flat)
    # A GPU's slice_index is its host: the program is one over all hosts.
    slices = [getattr(d, "slice_index", None) if d.platform == "tpu" else None for d in devices]
    first = [i for i, s in enumerate(slices) if s == slices[0]]
    return Places(mesh.axis_names, mesh.devices.shape, np.array(first), {d.id: i for i, d in enumerate(devices)})


def collectives(hlo: str | Program, mesh: Mesh) -> list[Collective]:
    """All collectives of a compiled program (`compiled.as_text()`) that move bytes between devices of `mesh`.

    A collective that spans several axes counts on the slowest of them. Of a conditional the dearest branch counts.

    Raises ValueError on a replica_groups syntax, transfer or loop that it does not know: better than counting nothing.
    """
    program = Program.read(hlo) if isinstance(hlo, str) else hlo
    return list(_walk(program, Frame(program.entry), places_of(mesh)))


def count(hlo: str | Program, mesh: Mesh) -> dict[str, dict[str, float]]:
    """{mesh axis: {dtype: bytes that one device sends in one call}}."""
    totals: dict[str, dict[str, float]] = {}
    for c in collectives(hlo, mesh):
        by_dtype = totals.setdefault(c.axis, {})
        by_dtype[c.dtype] = by_dtype.get(c.dtype, 0) + c.sent
    return totals


def per_axis(hlo: str | Program, mesh: Mesh) -> dict[str, int]:
    """{mesh axis: bytes that one device sends in one call}, every axis present."""
    totals = {axis: sum(by_dtype.values()) for axis, by_dtype in count(hlo, mesh).items()}
    return {axis: round(totals.get(axis, 0)) for axis in mesh.axis_names}


def sent_by(program: Program, computation: str, x: Instruction, places: Places) -> list[Collective]:
    """What an instruction itself sends when it runs once, not what it calls."""
    kind = x.op.removesuffix("-start")
    if kind in KINDS:
        scattered = kind == "all-reduce" and computation.startswith("all-reduce-scatter")
        return list(_collective(x, kind, places, scattered))
    transfer = _across_slices(program, computation, x, places) if x.op in ("send", "recv") else None
    return [transfer] if transfer else []


def _walk(program: Program, frame: Frame, places: Places) -> Iterator[Collective]:
    channels: set[str] = set()  # of asynchronous collectives that are already counted
    for x in program.computations[frame.name]:
        yield from sent_by(program, frame.name, x, places)
        if x.op == "conditional":
            branches = [list(_walk(program, Frame(name), places)) for name in x.called]
            yield from max(branches, key=lambda found: sum(c.sent for c in found))
        elif x.op == "while":
            found = list(_walk(program, Frame(loops.body(x), x, frame), places))
            turns = loops.trips(program, x, frame) if found else 0
            for c in found:
                yield replace(c, sent=c.sent * turns, channel="")
        elif x.op.removesuffix("-start") not in KINDS:
            for called in x.called:
                found = list(_walk(program, Frame(called), places))
                if x.op == "fusion" and is_part_of_async(called, program):
                    found = [c for c in found if c.channel not in channels]
                    channels |= {c.channel for c in found}
                yield from found


def is_part_of_async(name: str, program: Program) -> bool:
    """On TPU an asynchronous collective stands in several fusions, under one channel: the one that starts it, those
    that compute while it runs, and the one that waits for it."""
    parts = program.computations[name]
    return name.startswith("async_collective_fusion") or any(
        'custom_call_target="AsyncCollective' in x.rest for x in parts
    )


def _collective(x: Instruction, kind: str, places: Places, scattered: bool) -> Iterator[Collective]:
    """scattered: a reduce-scatter as TPUs write it, a fusion of an all-reduce and the choice of one's own part."""
    arrays = x.arrays
    if x.op.endswith("-start") and (kind != "all-reduce" or x.type.startswith("((")):
        arrays = _results_of_start(arrays)
    groups = _groups(kind, x.rest, places)
    if groups.shape[1] == 1:
        return
    n = groups.shape[1]
    share = _share(kind, n) / (2 if scattered else 1)
    marks = [re.search(mark, x.rest) for mark in (r'op_name="([^"]*)"', r"channel_id=(\d+)", r"stack_frame_id=(\d+)")]
    axes, kind = places.axes(groups), "reduce-scatter" if scattered else kind
    for a in arrays:
        yield Collective(kind, axes, a.dtype, share * a.bytes, *(m[1] if m else "" for m in marks), name=x.name)


def _share(kind: str, n: int) -> float:
    """What one of n devices sends, as a share of the result."""
    return {
        "all-reduce": 2 * (n - 1) / n,  # a ring: reduce-scatter, then all-gather
        "all-gather": (n - 1) / n,
        "reduce-scatter": n - 1,  # the result is an n-th of the operand
        "all-to-all": (n - 1) / n,  # the slot to oneself stays
        "collective-permute": 1,
        "collective-broadcast": 1,
    }[kind]


def _across_slices(program: Program, computation: str, x: Instruction, places: Places) -> Collective | None:
    """A transfer between TPU slices, which the compiler writes as a send and a recv of one rendezvous. It is counted
    at its recv: in an all-to-all both hold n slots, but an all-gather sends one and receives n."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', x.rest)
    meeting = re.search(MEETING, x.rest)
    target = re.search(r'_xla_megascale_target=(?:"([^"]*)"|(\{\{.*?\}\}))', x.rest)
    if not (kind and kind[1] in _TRANSFERS and meeting and target and "xla_megascale_runtime" in x.rest):
        raise ValueError(
            f"a {x.op} that is no transfer between TPU slices known to parallel/cost/wire.py: {x.rest[:400]}"
        )
    both = [y for y in program.computations[computation] if y.op in ("send", "recv") and f'"{meeting[1]}"' in y.rest]
    if len(both) != 2:
        raise ValueError(f"{x.op} of {meeting[1]}: expected one send and one recv in a computation, not {len(both)}")
    if x.op == "send":
        return None
    groups = _groups_of_slices(target[1] or target[2], places)
    n = 2 if kind[1] == "ONE_TO_ONE" else groups.shape[1]
    first = x.arrays[0]  # the tuple has a context and a token behind it
    sender = next(y for y in both if y.op == "send")
    sent = _share(_TRANSFERS[kind[1]], n) * first.bytes
    scope = _origin(program, computation, sender)
    return Collective(_TRANSFERS[kind[1]], places.axes(groups), first.dtype, sent, scope, name=x.name)


def _origin(program: Program, computation: str, x: Instruction | None, depth: int = 8) -> str:
    """The op_name of an instruction, or of the first operand that has one: transfers between slices have none."""
    for _ in range(depth):
        if x is None:
            break
        if name := re.search(r'op_name="([^"]*)"', x.rest):
            return name[1]
        x = program.operand(computation, x, 0)
    return ""


def _groups_of_slices(target: str, places: Places) -> np.ndarray:
    """[group, member] in the mesh, of {{100000,200000},…}, {{100000->200000},…} or {1,2}x{0:3}: slices × devices of
    each, which exchange with those of the same number."""
    if match := re.match(r"^\{([0-9,:]+)\}x\{([0-9,:]+)\}$", target):
        groups = [[s * SLICE + d for s in _ranges(match[1])] for d in _ranges(match[2])]
    else:
        groups = [_ints(g.replace("->", ",")) for g in re.findall(r"\{([0-9,>\-]+)\}", target)]
    unknown = {i for group in groups for i in group} - set(places.of_id)
    if unknown or len({len(group) for group in groups}) != 1:
        raise ValueError(f"a transfer between slices names devices that are not in the mesh: {target[:200]}")
    return np.array([[places.of_id[i] for i in group] for group in groups])


def _ranges(text: str) -> list[int]:
    """ "0,4:6" -> [0, 4, 5, 6]."""
    parts = [list(map(int, part.split(":"))) for part in text.split(",")]
    return [i for part in parts for i in range(part[0], part[-1] + 1)]


def _results_of_start(arrays: list[Array]) -> list[Array]:
    """A -start's type is (operands, results, contexts…); an all-reduce-start's, but on GPUs, its results alone."""
    payload = [a for a in arrays if not (a.dtype in ("u32", "s32") and a.bytes == 4)]
    return payload[len(payload) // 2 :]


def _groups(kind: str, rest: str, places: Places) -> np.ndarray:
    """[group, member]: the places in the mesh of the devices that a collective joins."""
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{((?:\{[0-9,]+\},?)*)\}", rest)
        assert pairs, rest
        moving = [p for p in (_ints(p) for p in re.findall(r"\{([0-9,]+)\}", pairs[1])) if p[0] != p[1]]
        return places.of_partition[np.array(moving or [[0]])]
    text = rest[rest.find("replica_groups=") + len("replica_groups=") :]
    if text.startswith("mesh["):
        groups = _groups_of_named_mesh(text)
    elif match := re.match(r"\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?", text):
        groups = _iota(match[2], match[3]).reshape(_ints(match[1])).tolist()
    elif text.startswith("{}"):
        groups = [list(range(len(places.of_partition)))]
    elif text.startswith("{{"):
        groups = [list(map(int, g.split(","))) for g in re.findall(r"\{([0-9,]+)\}", text[1 : text.find("}}") + 2])]
    else:
        raise _unknown(text)
    return places.of_partition[np.array(groups)]


def _unknown(text: str) -> ValueError:
    return ValueError(
        f"a collective has replica_groups of a syntax that parallel/cost/wire.py does not know: {text[:200]}"
    )


def _ints(text: str) -> list[int]:
    return [int(d) for d in text.split(",") if d]


def _iota(dims: str, permutation: str | None) -> np.ndarray:
    """0, 1, 2, … in `dims`, transposed."""
    ids = np.arange(math.prod(_ints(dims))).reshape(_ints(dims))
    return ids.transpose(_ints(permutation)) if permutation else ids


def _groups_of_named_mesh(text: str) -> list[list[int]]:
    """mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'a','b':(1)2}: groups along whole axes, or along a part of one:
    'b':(m)k is the k in the middle of b seen as [m, k, rest]."""
    head = re.match(r"mesh\[(?P<axes>[^\]]*)\](?:, device_ids=\((?P<ids>.*?)\)(?= \{))? \{(?P<chosen>[^}]*)\}", text)
    if head is None:
        raise _unknown(text)
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", head["axes"])}
    ids = np.arange(math.prod(sizes.values()))
    if head["ids"] is not None:
        if match := re.match(r"^\[([0-9,]+)\](?:T\(([0-9,]+)\))?$", head["ids"]):
            ids = _iota(match[1], match[2])
        elif re.match(r"^[0-9, ]+$", head["ids"]):
            ids = np.array(_ints(head["ids"]))
        else:
            raise _unknown(text)
    chosen = {name: (pre, size) for name, pre, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", head["chosen"])}
    dims, picked = [], []
    for name, size in sizes.items():
        pre, part = chosen.get(name, (None, None))
        split = [int(pre), int(part), size // int(pre) // int(part)] if pre and part else [1, size, 1]
        dims += split
        picked += [False, name in chosen, False]
    ids = ids.reshape(dims)
    order = [i for i, p in enumerate(picked) if not p] + [i for i, p in enumerate(picked) if p]
    members = math.prod(d for d, p in zip(dims, picked, strict=True) if p)
    return ids.transpose(order).reshape(-1, members).tolist()

"""Bytes on the wire, counted in a compiled program: what one device sends over each mesh axis in one call.

The optimised HLO is the truth: XLA may widen a dtype, add a collective of its own or move one into a loop, and a
formula would never notice.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

BITS = {
    "pred": 8, "s2": 2, "u2": 2, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "f4e2m1fn": 4, "f8e4m3fn": 8, "f8e4m3": 8, "f8e5m2": 8, "f8e8m0fnu": 8, "f16": 16,
    "bf16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128,
}  # fmt: skip

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (?P<type>\(.*?\)|\S+) (?P<op>[a-z0-9\-]+)\((?P<rest>.*)$")
_COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\) -> .* \{$")
_ARRAY = re.compile(r"\b([a-z]+[0-9]*(?:e[0-9]m[0-9][a-z]*)?)\[([0-9,]*)\]")
_CALLED = re.compile(r"(?:to_apply|calls|body|condition|called_computations)=\{?%?([\w.\-]+)")


@dataclass(frozen=True)
class Collective:
    """One collective of the program. `sent` is the bytes that one device sends per call, loops included."""

    kind: str
    axis: str
    dtype: str
    sent: float
    scope: str  # the op_name that JAX gave it: where in our code it comes from


def collectives(hlo: str, mesh: Mesh) -> list[Collective]:
    """All collectives of a compiled program (`compiled.as_text()`) that move bytes between devices of `mesh`.

    A collective that spans several axes counts on the slowest of them. Of a conditional the dearest branch counts.

    Raises ValueError on a replica_groups syntax, dtype or loop that it does not know: better than counting nothing.
    """
    computations, entry = _computations(hlo)
    return list(_walk(computations, entry, 1, mesh))


def count(hlo: str, mesh: Mesh) -> dict[str, dict[str, float]]:
    """{mesh axis: {dtype: bytes that one device sends in one call}}."""
    totals: dict[str, dict[str, float]] = {}
    for c in collectives(hlo, mesh):
        by_dtype = totals.setdefault(c.axis, {})
        by_dtype[c.dtype] = by_dtype.get(c.dtype, 0) + c.sent
    return totals


def per_axis(hlo: str, mesh: Mesh) -> dict[str, int]:
    """{mesh axis: bytes that one device sends in one call}, every axis present."""
    totals = {axis: sum(by_dtype.values()) for axis, by_dtype in count(hlo, mesh).items()}
    return {axis: round(totals.get(axis, 0)) for axis in mesh.axis_names}


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            current = computations.setdefault(match["name"], [])
            entry = match["name"] if match["entry"] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None:
            current.append(line)
    if not entry:
        raise ValueError("this is not the text of a compiled HLO module: it has no ENTRY computation")
    return computations, entry


def _walk(computations: dict[str, list[str]], name: str, times: int, mesh: Mesh) -> Iterator[Collective]:
    for line in computations[name]:
        match = _INSTRUCTION.match(line)
        if match is None:
            continue
        op, rest = match["op"], match["rest"]
        kind = op.removesuffix("-start")
        if kind in KINDS:
            yield from _collective(kind, op.endswith("-start"), match["type"], rest, times, mesh)
        elif op == "conditional":
            branches = [list(_walk(computations, b, times, mesh)) for b in _branches(rest)]
            yield from max(branches, key=lambda found: sum(c.sent for c in found))
        elif op == "while":
            body, condition = (re.search(rf"{part}=%?([\w.\-]+)", rest) for part in ("body", "condition"))
            assert body and condition, line
            found = list(_walk(computations, body[1], 1, mesh))
            trips = _trips(rest, computations.get(condition[1], [])) if found else 0
            for c in found:
                yield Collective(c.kind, c.axis, c.dtype, c.sent * times * trips, c.scope)
        else:
            for called in _CALLED.findall(rest):
                yield from _walk(computations, called, times, mesh)


def _trips(rest: str, condition: list[str]) -> int:
    """How often a loop runs: written beside it by CPU and GPU compilers; on TPU the bound that its counter, which JAX
    starts at 0 and steps by 1, is compared with."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', rest):
        return int(known[1])
    text = "\n".join(condition)
    compared = re.search(r"ROOT .* compare\(%[\w.\-]+, %([\w.\-]+)\), direction=LT", text)
    if compared and (bound := re.search(rf"%{re.escape(compared[1])} = s32\[\]\S* constant\((\d+)\)", text)):
        return int(bound[1])
    raise ValueError(f"a loop with collectives has no known trip count, so its bytes are unknown: {rest[:300]}")


def _branches(rest: str) -> list[str]:
    if match := re.search(r"branch_computations=\{([^}]*)\}", rest):
        return [name.strip().lstrip("%") for name in match[1].split(",")]
    return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", rest)


def _collective(kind: str, start: bool, type_: str, rest: str, times: int, mesh: Mesh) -> Iterator[Collective]:
    arrays = [(dtype, _bytes(dtype, dims)) for dtype, dims in _ARRAY.findall(type_) if dtype in BITS]
    if start:
        arrays = _results_of_start(kind, arrays)
    axes, n = _span(kind, rest, mesh)
    if n == 1:
        return
    share = {
        "all-reduce": 2 * (n - 1) / n,  # a ring: reduce-scatter, then all-gather
        "all-gather": (n - 1) / n,  # of the result
        "reduce-scatter": n - 1,  # of the result, an n-th of the operand
        "all-to-all": (n - 1) / n,  # the slot to oneself stays
        "collective-permute": 1,
        "collective-broadcast": 1,
    }[kind]
    name = re.search(r'op_name="([^"]*)"', rest)
    for dtype, size in arrays:
        yield Collective(kind, axes[0], dtype, share * size * times, name[1] if name else "")


def _results_of_start(kind: str, arrays: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """A -start's type is (operands, results, contexts…); an all-reduce-start's is its results alone."""
    if kind == "all-reduce":
        return arrays
    payload = [a for a in arrays if not (a[0] in ("u32", "s32") and a[1] == 4)]
    return payload[len(payload) // 2 :]


def _bytes(dtype: str, dims: str) -> float:
    return math.prod(int(d) for d in dims.split(",") if d) * BITS[dtype] / 8


def _span(kind: str, rest: str, mesh: Mesh) -> tuple[list[str], int]:
    """The mesh axes that a collective's groups span, slowest first, and the size of a group."""
    shape, names = mesh.devices.shape, mesh.axis_names
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(\{.*?\})\}", rest)
        assert pairs, rest
        groups = [list(map(int, p.split(","))) for p in re.findall(r"\{([0-9,]+)\}", pairs[1])]
        moving = [g for g in groups if g[0] != g[1]]
        return (_axes_of(moving, shape, names), 2) if moving else ([], 1)
    text = rest[rest.find("replica_groups=") + len("replica_groups=") :]
    if text.startswith("mesh["):
        groups = _groups_of_named_mesh(text)
        return _axes_of(groups, shape, names), len(groups[0])
    if match := re.match(r"\[([0-9,]+)\]<=\[([0-9,]+)\](?:T\(([0-9,]+)\))?", text):
        groups = _iota(match[2], match[3]).reshape(_ints(match[1])).tolist()
        return _axes_of(groups, shape, names), len(groups[0])
    if text.startswith("{}"):
        return [axis for axis, size in zip(names, shape, strict=True) if size > 1], mesh.size
    if text.startswith("{{"):
        groups = [list(map(int, g.split(","))) for g in re.findall(r"\{([0-9,]+)\}", text[1 : text.find("}}") + 2])]
        return _axes_of(groups, shape, names), len(groups[0])
    raise _unknown(text)


def _unknown(text: str) -> ValueError:
    return ValueError(f"a collective has replica_groups of a syntax that parallel/wire.py does not know: {text[:200]}")


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


def _axes_of(groups: list[list[int]], shape: tuple[int, ...], names: tuple[str, ...]) -> list[str]:
    """The axes along which devices of one group differ. Ids are positions in the flattened mesh."""
    coordinates = np.stack(np.unravel_index(np.array(groups), shape))  # [axis, group, member]
    differs = (coordinates != coordinates[:, :, :1]).any(axis=(1, 2))
    return [name for name, d in zip(names, differs, strict=True) if d]

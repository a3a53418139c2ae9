"""Bytes that a device sends, counted anew from a compiled program's text, in another way than parallel/cost/wire.py:
line by line, from what goes *into* a collective, loops by the number that the compiler itself notes beside them."""

import math
import re
from collections.abc import Iterator

import numpy as np

WIDTH = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "s4": 0.5, "u4": 0.5, "s16": 2, "u16": 2, "bf16": 2}
WIDTH |= {"f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
SENT = {  # of the bytes that go in, with n in a group
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
    "send": lambda n: 1,
}
LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*)$")


def count(text: str, mesh: dict[str, int]) -> dict[str, float]:
    """{axis: bytes}. mesh: {axis: size}, its devices in the order of the program's."""
    bodies, entry = _computations(text)
    sent: dict[str, float] = {}
    seen: set[str] = set()
    for line, types, times, fused in _run(bodies, entry, 1):
        _, _, op, rest = line
        kind = op.removesuffix("-start")
        if kind not in SENT or (kind == "send" and "_xla_host_transfer" in rest):
            continue
        channel = re.search(r"channel_id=(\d+)", rest)
        if channel and fused:  # in several: those of a TPU begin it in one, and go on with it
            if channel[1] in seen:
                continue
            seen.add(channel[1])
        axis, n = _group(rest, mesh) if kind != "send" else ("replica", 2)
        operands = rest[: rest.index(")")] if kind != "send" else rest.partition(",")[0]
        size = sum(_bytes(types[x]) for x in re.findall(r"%([\w.\-]+)", operands))
        sent[axis] = sent.get(axis, 0.0) + times * SENT[kind](n) * size
    return {axis: size for axis, size in sent.items() if size}


def _computations(text: str) -> tuple[dict[str, list[tuple]], str]:
    bodies: dict[str, list[tuple]] = {}
    entry = current = ""
    for line in text.splitlines():
        if head := re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = head[2]
            entry = current if head[1] else entry
            bodies[current] = []
        elif found := LINE.match(line):
            bodies[current].append(found.groups())
    return bodies, entry


def _run(bodies: dict[str, list[tuple]], name: str, times: int, fused: bool = False) -> Iterator[tuple]:
    """(line, types of its computation, how often it runs, whether in a fusion) of all that a computation does."""
    types = {line[0]: line[1] for line in bodies[name]}
    for line in bodies[name]:
        yield line, types, times, fused
        op, rest = line[2], line[3]
        if op == "while":
            trips = int(re.search(r'known_trip_count[^}]*?"n":"(\d+)"', rest)[1])
            yield from _run(bodies, re.search(r"body=%?([\w.\-]+)", rest)[1], times * trips, fused)
        elif op in ("fusion", "async-start", "call"):
            yield from _run(
                bodies, re.search(r"(?:calls|to_apply)=%?([\w.\-]+)", rest)[1], times, fused or op == "fusion"
            )
        elif op == "conditional":
            names = re.search(r"branch_computations=\{([^}]*)\}", rest)
            found = re.findall(r"[\w.\-]+", names[1]) if names else re.findall(r"_computation=%?([\w.\-]+)", rest)
            yield from _run(bodies, max(found, key=lambda x: len(list(_run(bodies, x, 1)))), times)


def _bytes(kind: str) -> float:
    return sum(
        WIDTH[dtype] * math.prod(int(n) for n in shape.split(",") if n)
        for dtype, shape in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", kind)
    )


def _group(rest: str, mesh: dict[str, int]) -> tuple[str, int]:
    """(the axis along which a group lies, of several the slowest, which is the first; its size)."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest):
        ids = [int(pairs[1]), int(pairs[2])]
    elif plain := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        ids = [int(n) for n in plain[1].split(",")]
    elif named := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*(?:\)[^)]*)?)\))? \{([^}]*)\}", rest
    ):
        ids = _of_mesh(*named.groups())
    else:
        ids = _iota(re.search(r"replica_groups=(\S+?)(?:, |$)", rest)[1])[0]
    places = np.unravel_index(ids, tuple(mesh.values()))
    axes = [axis for axis, place in zip(mesh, places, strict=True) if len(set(place)) > 1]
    return axes[0] if axes else "", len(ids)


def _iota(said: str) -> np.ndarray:
    """[4,2]<=[2,4]T(1,0): the numbers from 0 on, as [2, 4], transposed, as [4, 2]."""
    shape, dims, order = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", said).groups()
    numbers = lambda text: [int(n) for n in text.split(",")]
    x = np.arange(math.prod(numbers(dims))).reshape(numbers(dims))
    return (x.transpose(numbers(order)) if order else x).reshape(numbers(shape))


def _of_mesh(sizes: str, device_ids: str | None, chosen: str) -> list[int]:
    """The first group along the chosen axes of a mesh with named axes, or parts of them: 'a':(1)2."""
    of = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", sizes)}
    ids = np.arange(math.prod(of.values())).reshape(list(of.values()))
    if device_ids:
        shape, order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", device_ids).groups()
        ids = np.arange(ids.size).reshape([int(n) for n in shape.split(",")])
        ids = (ids.transpose([int(n) for n in order.split(",")]) if order else ids).reshape(list(of.values()))
    wanted = dict(re.findall(r"'([^']+)'(?::\((\d+)\)\d+)?", chosen))
    parts = {name: int(n) for name, n in re.findall(r"'([^']+)':\(\d+\)(\d+)", chosen)}
    for number, name in enumerate(of):
        x = np.moveaxis(ids, number, 0)
        if name not in wanted:
            x = x[:1]
        elif name in parts:
            before, size = int(wanted[name]), parts[name]
            x = x.reshape(before, size, -1, *x.shape[1:])[0, :, 0]
        ids = np.moveaxis(x, 0, number)
    return ids.ravel().tolist()

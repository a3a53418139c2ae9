"""How long a training step takes: what model.py counts, at the rates of a machine, and what of it hides.

Of a chip's nominal rates (hardware.py) a program reaches a part. These parts, three a chip, are published figures.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from parallel.cost import model
from parallel.cost.hardware import Chip
from parallel.cost.link import Link
from parallel.cost.model import BACKWARD, ENDS, FORWARD, Layout, Network, Sent
from parallel.cost.targets import Target
from parallel.layout.axes import SLOW, USED

HOP = 1e-6  # seconds from one chip of a ring to the next


class Share(NamedTuple):
    """Of the nominal rates: of bf16 products, of memory, of links inside a machine."""

    products: float
    memory: float
    links: float


# Of any chip: Meta's AutoParallel takes 0.7 of a peak and of a memory's bandwidth, the lower end of what products of
# dimensions from 4,096 on reach on Hopper; NCCL's all-gather reaches 320 of NVLink's 450 GB/s there.
DEFAULT = Share(0.70, 0.70, 0.71)
# TPUs: the upper end of what whole steps are published to reach, without what they recompute.
SHARES = {"v5e": Share(0.60, 0.70, 0.71), "v5p": Share(0.66, 0.70, 0.71), "v6e": Share(0.50, 0.70, 0.71)}


def share(chip: Chip) -> Share:
    return SHARES.get(chip.name, DEFAULT)


# ── links ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def rate(target: Target, sizes: Mapping[str, int], axis: str) -> float:
    """Nominal bytes a second that each chip sends in collectives over an axis, inside one slice or site. The last axis
    of a mesh has neighbours."""
    size = sizes[axis]
    stride = math.prod(sizes[a] for a in USED[USED.index(axis) + 1 :])
    if target.chip.is_tpu:
        return target.chip.link * max(1, _links(target, stride, size))
    together = target.sides[1]  # GPUs of a host
    if stride * size <= together:
        return target.chip.inside
    members = max(1, together // stride)  # of one ring in a host: each has an adapter, and the ring leaves it once
    return min(target.chip.inside, members * target.chip.outside)


def is_shared(target: Target, sizes: Mapping[str, int]) -> bool:
    """Whether fsdp and tensor send over the same links: those inside a host."""
    return not target.chip.is_tpu and sizes["tensor"] < target.sides[1]


def _links(target: Target, stride: int, size: int) -> int:
    """Of a torus, after so many chips have taken sides of it: two along each side that is taken whole and wraps."""
    links, left = 0, list(target.sides)
    for wanted in (stride, size):
        links = 0
        for i, wraps in enumerate(target.wrap):
            taken = math.gcd(wanted, left[i])
            links += (2 if wraps and taken == target.sides[i] else 1) * (taken > 1)
            left[i], wanted = left[i] // taken, wanted // taken
    return links


@dataclass(frozen=True)
class Exchange:
    """What crosses `replica`. bytes: that a device sends each `interval` steps. hidden: whole steps behind which each
    of the `fragments` may hide. hops: messages that wait for each other."""

    bytes: float = 0.0
    interval: int = 1
    fragments: int = 1
    hidden: int = 0
    hops: int = 2


def exchange_seconds(exchange: Exchange, target: Target, sizes: Mapping[str, int], link: Link | None) -> float:
    """Of all fragments, on the wire."""
    if not exchange.bytes:
        return 0.0
    if link:
        return link.seconds(exchange.bytes * senders(target, sizes), exchange.hops * exchange.fragments)
    nominal = target.chip.outside if target.slices > 1 else rate(target, sizes, SLOW)
    return exchange.bytes / (nominal * share(target.chip).links) + exchange.hops * exchange.fragments * HOP


def senders(target: Target, sizes: Mapping[str, int]) -> int:
    """Chips that share the link out of one host (GPUs) or slice (TPUs)."""
    together = target.sides[1] if not target.chip.is_tpu else math.prod(target.sides)
    return min(together, math.prod(sizes.values()) // sizes[SLOW])


# ── a step ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Step:
    """Seconds of a step: of computing, and of each axis what nothing hides. wire: of each axis all that it sends."""

    compute: float
    exposed: dict[str, float]
    wire: dict[str, float]
    flops: float

    @property
    def seconds(self) -> float:
        return self.compute + sum(self.exposed.values())

    @property
    def binds(self) -> str:
        """What takes most of it: compute, or an axis of the mesh."""
        spent = {"compute": self.compute} | self.exposed
        return max(spent, key=lambda name: spent[name])


def step(
    net: Network,
    lay: Layout,
    target: Target,
    rows: Sequence[Sent],
    exchange: Exchange,
    link: Link | None,
    update_bytes: float,
) -> Step:
    """rows: model.sent. update_bytes: of memory that the optimizer reads and writes on a device.

    FSDP's gathers and scatters travel while a neighbouring layer computes: of each pass it takes the longer of both.
    What `tensor` sends is waited for. The ends hide nothing. An exchange waits for the gradient, unless its strategy
    has steps to hide it behind; then the wire itself may still be the slowest.
    """
    part_of = share(target.chip)
    products, passed = model.flops(net, lay), model.passed(net, lay)
    compute = {
        part: products[part] / (part_of.products * target.chip.bf16)
        + passed[part] / (part_of.memory * target.chip.bandwidth)
        for part in (FORWARD, BACKWARD, ENDS)
    }
    update = update_bytes / (part_of.memory * target.chip.bandwidth)
    wire = {(axis, part): 0.0 for axis in USED for part in compute}
    for row in rows:
        wire[row.axis, row.part] += row.bytes / (part_of.links * rate(target, lay.sizes, row.axis))
        wire[row.axis, row.part] += HOP * row.times * (lay.sizes[row.axis] - 1)
    exposed = {"fsdp": wire["fsdp", ENDS], "tensor": wire["tensor", ENDS]}
    for part in (FORWARD, BACKWARD):
        waited, hideable = wire["tensor", part], wire["fsdp", part]
        cover = compute[part] + (0 if is_shared(target, lay.sizes) else waited)
        exposed["tensor"] += waited
        exposed["fsdp"] += max(0.0, hideable - cover)
    total = sum(compute.values()) + update
    on_wire = exchange_seconds(exchange, target, lay.sizes, link)
    bare = total + sum(exposed.values())
    late = exchange.fragments * max(0.0, on_wire / exchange.fragments - exchange.hidden * bare)
    exposed[SLOW] = max(late, on_wire - exchange.interval * bare) / exchange.interval
    all_of_it = {axis: sum(wire[axis, part] for part in compute) for axis in USED}
    return Step(total, exposed, all_of_it | {SLOW: on_wire / exchange.interval}, sum(products.values()))

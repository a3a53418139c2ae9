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
from parallel.cost.model import BACKWARD, ENDS, FORWARD, Habits, Layout, Network, Sent
from parallel.cost.targets import Target
from parallel.layout.axes import AXES, COMMON, SLOW

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
    stride = math.prod(sizes.get(a, 1) for a in AXES[AXES.index(axis) + 1 :])
    if target.chip.is_tpu:
        return target.chip.link * max(1, _links(target, stride, size))
    together = target.sides[1]  # GPUs of a host
    if stride * size <= together:
        return target.chip.inside
    members = max(1, together // stride)  # of one ring in a host: each has an adapter, and the ring leaves it once
    return min(target.chip.inside, members * target.chip.outside)


def habits(net: Network, lay: Layout, target: Target) -> Habits:
    """Of libtpu: a scatter over `tensor` is made in parts where its product takes longer at nominal rates."""
    n, (t, fsdp) = model.tokens(net, lay), (lay.sizes["tensor"], lay.sizes["fsdp"])
    if not target.chip.is_tpu:
        return model.habits("gpu", fsdp)
    scatter = n * net.dim * net.itemsize * (t - 1) / t / rate(target, lay.sizes, "tensor")
    longer = lambda width: t > 2 and 2 * n * net.dim * width / t / target.chip.bf16 > scatter
    down, out = longer(net.mlp_dim), longer(net.queries)
    return model.habits("tpu", fsdp)._replace(in_parts=(down + out, int(out)))


def is_shared(target: Target, sizes: Mapping[str, int]) -> bool:
    """Whether fsdp and tensor send over the same links: those inside a host. A ring of fsdp that leaves hosts is held
    up by their adapters, and leaves the links inside to others."""
    return not target.chip.is_tpu and sizes["fsdp"] * sizes["tensor"] <= target.sides[1]


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
    of the `fragments` may hide. hops: messages that wait for each other. moved: bytes of memory that coding reads and
    writes."""

    bytes: float = 0.0
    interval: int = 1
    fragments: int = 1
    hidden: int = 0
    hops: int = 2
    moved: float = 0.0


def exchange_seconds(exchange: Exchange, target: Target, sizes: Mapping[str, int], link: Link | None) -> float:
    """Of all fragments, on the wire."""
    if not exchange.bytes:
        return 0.0
    return seconds(target, sizes, SLOW, exchange.bytes, exchange.hops * exchange.fragments, link)


def seconds(
    target: Target, sizes: Mapping[str, int], axis: str, size: float, hops: int, link: Link | None = None
) -> float:
    """That bytes of each chip take over an axis, in so many hops from one chip to the next. link: what `replica`
    crosses, if it is not the catalogue's."""
    if axis == SLOW and link:
        return link.seconds(size * senders(target, sizes), hops)
    nominal = target.chip.outside if axis == SLOW and target.slices > 1 else rate(target, sizes, axis)
    return size / (nominal * share(target.chip).links) + hops * HOP


def late_seconds(exchange: Exchange, on_wire: float, bare: float) -> float:
    """Seconds of a step, of which all else takes `bare`, in which an exchange of so many on the wire is waited for."""
    late = exchange.fragments * max(0.0, on_wire / exchange.fragments - exchange.hidden * bare)
    return max(late, on_wire - exchange.interval * bare) / exchange.interval


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
    """rows: model.sent. update_bytes: of memory that the optimizer reads and writes on a device. An exchange is waited
    for, unless its strategy has steps to hide it behind; then the wire itself may still be the slowest."""
    part_of = share(target.chip)
    multiplied = lambda products: products / (part_of.products * target.chip.bf16)
    moved = lambda size: size / (part_of.memory * target.chip.bandwidth)
    products, passed = model.flops(net, lay), model.passed(net, lay)
    compute = {part: multiplied(products[part]) + moved(passed[part]) for part in (FORWARD, BACKWARD)}
    loss = sum(max(multiplied(flops), moved(size)) for flops, size in model.loss_products(net, lay))
    compute[ENDS] = loss + moved(passed[ENDS])
    wire: dict[tuple[str, str, str], float] = {}
    for row in rows:
        hops = row.times * (lay.sizes[row.axis] - 1)
        key = (row.axis, row.part, row.what)
        wire[key] = wire.get(key, 0.0) + seconds(target, lay.sizes, row.axis, row.bytes, hops)
    exposed = (_on_tpu if target.chip.is_tpu else _on_gpu)(net, lay, target, wire, compute)
    total = sum(compute.values()) + moved(update_bytes) + moved(exchange.moved / exchange.interval)
    on_wire = exchange_seconds(exchange, target, lay.sizes, link)
    bare = total + sum(exposed.values())
    exposed[SLOW] = late_seconds(exchange, on_wire, bare)
    all_of_it = {axis: sum(time for key, time in wire.items() if key[0] == axis) for axis in COMMON}
    return Step(total, exposed, all_of_it | {SLOW: on_wire / exchange.interval}, sum(products.values()))


# What XLA's schedules wait for, {axis: seconds}. wire: by (axis, part, what). compute: by part.
Wire = Mapping[tuple[str, str, str], float]


def _on_gpu(net: Network, lay: Layout, target: Target, wire: Wire, compute: Mapping[str, float]) -> dict[str, float]:
    """Nothing travels from one turn of the loop over layers to the next. So a layer's first weights are waited for,
    and its gradients, which XLA sends together at the turn's end; other weights travel while it computes, or waits for
    `tensor` on other links. What `tensor` sends of cotangents travels while gradients of weights are multiplied; the
    rest is waited for. The head travels while layers are computed."""
    part = lambda axis, name: sum(time for key, time in wire.items() if key[:2] == (axis, name))
    forward, backward = part("tensor", FORWARD), part("tensor", BACKWARD)
    cotangents = model.CROSSINGS["backward"] / (model.CROSSINGS["recomputed"] + model.CROSSINGS["backward"])
    multiplied = model.gradient_flops(net, lay) / (share(target.chip).products * target.chip.bf16)
    waited = {FORWARD: forward, BACKWARD: backward - min(cotangents * backward, multiplied)}
    first, covers = model.first(net, lay), not is_shared(target, lay.sizes)
    fsdp = wire.get(("fsdp", BACKWARD, model.GRADIENTS), 0.0) + wire.get(("fsdp", ENDS, model.EMBEDDINGS), 0.0)
    for name, what in ((FORWARD, model.WEIGHTS), (BACKWARD, model.AGAIN)):
        gathered = wire.get(("fsdp", name, what), 0.0)
        fsdp += first * gathered + max(0.0, (1 - first) * gathered - compute[name] - covers * waited[name])
    return {"fsdp": fsdp, "tensor": sum(waited.values()) + part("tensor", ENDS)}


def _on_tpu(net: Network, lay: Layout, target: Target, wire: Wire, compute: Mapping[str, float]) -> dict[str, float]:
    """Collectives are synchronous, but gradients that libtpu scatters in parts, while it multiplies them, and what it
    sends in parts over `tensor`: of that the last two parts are waited for."""
    exposed = {axis: sum(time for key, time in wire.items() if key[0] == axis) for axis in ("fsdp", "tensor")}
    in_parts = sum(time for key, time in wire.items() if key[2] == model.IN_PARTS)
    exposed["tensor"] -= in_parts * (1 - 2 / (lay.sizes["tensor"] + 1))
    if lay.sizes["fsdp"] <= model.WHOLE:
        gradients = wire.get(("fsdp", BACKWARD, model.GRADIENTS), 0.0)
        exposed["fsdp"] -= min(gradients, compute[BACKWARD])
    return exposed

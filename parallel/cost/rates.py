"""How fast the chips of a machine compute and send: nominal rates (hardware.py), and the parts of them that programs
reach. These parts, three a chip, are published figures."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from parallel.cost.hardware import Chip
from parallel.cost.link import Link
from parallel.cost.targets import Target
from parallel.layout.axes import AXES, SLOW

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


def rate(target: Target, sizes: Mapping[str, int], axes: Sequence[str]) -> float:
    """Nominal bytes a second that each chip sends in collectives over axes, inside one slice or site. The last axis of
    a mesh has neighbours."""
    axes = [axis for axis in axes if sizes.get(axis, 1) > 1] or axes[:1]
    strides = {axis: math.prod(sizes.get(a, 1) for a in AXES[AXES.index(axis) + 1 :]) for axis in axes}
    if target.chip.is_tpu:
        return target.chip.link * max(1, _links(target, min(strides.values()), math.prod(sizes[a] for a in axes)))
    if _in_host(target, sizes, axes):
        return target.chip.inside
    # Members of one ring in a host: each has an adapter, and the ring leaves it once.
    members = math.prod(min(sizes[axis], max(1, target.sides[1] // strides[axis])) for axis in axes)
    return min(target.chip.inside, members * target.chip.outside)


def _in_host(target: Target, sizes: Mapping[str, int], axes: Sequence[str]) -> bool:
    """Whether the devices of a group over these axes are one host's."""
    slowest = min(AXES.index(axis) for axis in axes)
    return math.prod(sizes.get(axis, 1) for axis in AXES[slowest:]) <= target.sides[1]


def stream(target: Target, sizes: Mapping[str, int], axes: Sequence[str]) -> str:
    """Which links a group's messages share: those inside a host, which are all axes' that do not leave it; or else the
    axis's own, so that a ring that is held up by hosts' adapters leaves the links inside to others."""
    inside = SLOW not in axes and not target.chip.is_tpu and _in_host(target, sizes, axes)
    return "inside" if inside else axes[0]


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


def seconds(
    target: Target, sizes: Mapping[str, int], axes: Sequence[str], size: float, hops: float, link: Link | None = None
) -> float:
    """That bytes of each chip take over axes, slowest first, in so many hops from one chip to the next. link: what
    `replica` crosses, if it is not the catalogue's."""
    if axes[0] == SLOW and link:
        return link.seconds(size * senders(target, sizes), hops)
    nominal = target.chip.outside if axes[0] == SLOW and target.slices > 1 else rate(target, sizes, axes)
    return size / (nominal * share(target.chip).links) + hops * HOP


def senders(target: Target, sizes: Mapping[str, int]) -> int:
    """Chips that share the link out of one host (GPUs) or slice (TPUs)."""
    together = target.sides[1] if not target.chip.is_tpu else math.prod(target.sides)
    return min(together, math.prod(sizes.values()) // sizes[SLOW])

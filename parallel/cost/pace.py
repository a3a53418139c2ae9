"""How long a training step takes: what work.py and sent.py count, at the rates of a machine (rates.py), and what of it
hides (waiting.py)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from parallel.cost import host, sent, waiting, work
from parallel.cost.link import Link
from parallel.cost.network import Layout, Network, tokens
from parallel.cost.rates import HOP, rate, seconds, share
from parallel.cost.sent import Habits, Sent
from parallel.cost.targets import Target
from parallel.cost.work import BACKWARD, ENDS, FORWARD
from parallel.layout.axes import FAST, SLOW


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
    return seconds(target, sizes, (SLOW,), exchange.bytes, exchange.hops * exchange.fragments, link)


def late_seconds(exchange: Exchange, on_wire: float, bare: float) -> float:
    """Seconds of a step, of which all else takes `bare`, in which an exchange of so many on the wire is waited for."""
    late = exchange.fragments * max(0.0, on_wire / exchange.fragments - exchange.hidden * bare)
    return max(late, on_wire - exchange.interval * bare) / exchange.interval


@dataclass(frozen=True)
class Step:
    """Seconds of a step: of computing, and of each axis what nothing hides. wire: of each axis all that it sends. What
    goes to the host's memory and back is as an axis (host.HOST)."""

    compute: float
    exposed: dict[str, float]
    wire: dict[str, float]
    flops: float

    @property
    def seconds(self) -> float:
        return self.compute + sum(self.exposed.values())

    @property
    def binds(self) -> str:
        """What takes most of it: compute, an axis of the mesh, or the host."""
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
    """rows: sent.sent. update_bytes: of memory that the optimizer reads and writes on a device. An exchange is waited
    for, unless its strategy has steps to hide it behind; then the wire itself may still be the slowest."""
    part_of = share(target.chip)
    multiplied = lambda products: products / (part_of.products * target.chip.bf16)
    moved = lambda size: size / (part_of.memory * target.chip.bandwidth)
    products, passed = work.flops(net, lay), work.passed(net, lay)
    compute = {part: multiplied(products[part]) + moved(passed[part]) for part in (FORWARD, BACKWARD)}
    loss = sum(max(multiplied(flops), moved(size)) for flops, size in work.loss_products(net, lay))
    compute[ENDS] = loss + moved(passed[ENDS])
    wire: dict[tuple[str, str, str], float] = {}
    byte = {axes: seconds(target, lay.sizes, axes, 1, 0) for axes in {row.axes for row in rows}}
    for row in rows:
        key = (row.axis, row.part, row.what)
        wire[key] = wire.get(key, 0.0) + row.bytes * byte[row.axes] + row.hops * HOP
    exposed = (waiting.on_tpu if target.chip.is_tpu else waiting.on_gpu)(net, lay, target, wire, compute)
    total = sum(compute.values()) + moved(update_bytes) + moved(exchange.moved / exchange.interval)
    all_of_it = {axis: sum(time for key, time in wire.items() if key[0] == axis) for axis in FAST}
    if lay.remat == host.OFFLOAD:
        exposed[host.HOST] = host.waited(net, lay, target, compute)
        all_of_it[host.HOST] = 2 * lay.accumulate * host.seconds(target.chip, host.held(net, lay))
    on_wire = exchange_seconds(exchange, target, lay.sizes, link)
    bare = total + sum(exposed.values())
    exposed[SLOW] = late_seconds(exchange, on_wire, bare)
    return Step(total, exposed, all_of_it | {SLOW: on_wire / exchange.interval}, sum(products.values()))


def habits(net: Network, lay: Layout, target: Target) -> Habits:
    """Of libtpu: a scatter over `tensor` is made in parts where its product takes longer at nominal rates."""
    n, t = tokens(net, lay), lay.cut("vocab")
    if not target.chip.is_tpu:
        return sent.habits("gpu")
    scatter = n * net.dim * net.itemsize * (t - 1) / t / rate(target, lay.sizes, ("tensor",))
    longer = lambda width: t > 2 and 2 * n * net.dim * width / t / target.chip.bf16 > scatter
    down, out = longer(net.mlp_dim), longer(net.queries)
    return sent.habits("tpu")._replace(in_parts=(down + out, int(out)), sides=target.sides)

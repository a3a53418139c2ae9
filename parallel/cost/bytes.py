"""The bytes of an exchange in closed form."""

import dataclasses
import functools
from typing import Any

from parallel.exchange.codecs.base import is_round
from parallel.exchange.net import FLOAT32, Net


def wire(net: Any, n: int, codec: Any = FLOAT32, pieces: int = 1) -> dict[str, float]:
    """Closed form: bytes by dtype that one device sends for the mean of n elements, w bytes when encoded in so many
    equal pieces.

    R replicas on D devices, k = R/D: two_stage (k+1)(D−1)/D · w; gather (R−k) · w; psum 2(D−1)/D · w; 0 when D = 1.
    """
    R, D, form = net.replicas, net.devices, net.form(codec)
    if D == 1:
        return {}
    k = R // D
    factor = {"psum": 2 * (D - 1) / D, "gather": R - k, "two_stage": (k + 1) * (D - 1) / D}[form]
    encoded = codec.wire(n if form == "psum" else pieces * net.padded(n // pieces, codec))
    return {dtype: factor * size for dtype, size in encoded.items()}


def exchange_bytes(exchange: Any) -> dict[str, float]:
    """Closed form of the bytes by dtype that one device sends over `replica` in one exchange."""
    total: dict[str, float] = {}
    for unit in exchange.units:
        if exchange.net.devices == 1:
            break
        send = functools.partial(wire, exchange.net)
        own = unit.codec
        sizes = own.wire(unit.local, send) if is_round(own) else send(unit.size, own, unit.pieces)
        for dtype, size in sizes.items():
            total[dtype] = total.get(dtype, 0) + size
    return total


def in_flight_bytes(exchange: Any) -> int:
    """What one device holds of an exchange besides what it codes: the messages that it sends in a hop and those that it
    receives. Of round codecs the arrays themselves, which wait for the rounds to come."""
    net, total = exchange.net, 0
    k = net.replicas // net.devices
    for unit in exchange.units:
        if is_round(unit.codec):
            total += 4 * k * unit.size
            continue
        n, form = unit.size // unit.pieces, net.form(unit.codec)
        codec = FLOAT32 if net.devices == 1 else unit.codec
        message = unit.pieces * sum(codec.wire(net.padded(n, unit.codec)).values())
        total += message * {"psum": 2, "gather": k + net.replicas, "two_stage": 2 * k}[form]
    return total


def bytes_per_step(strategy: Any, last: int, a_device_per_replica: bool = False, first: int = 0) -> float:
    """Closed form of the bytes that one device sends over `replica`, on average over the steps of a run from `first` to
    `last`, its end; as it is laid out, or as it would be if every replica had a device of its own."""

    def size(exchange: Any) -> float:
        if a_device_per_replica:
            net = Net(exchange.net.algorithm, exchange.replicas, exchange.replicas)
            exchange = dataclasses.replace(exchange, net=net)
        return sum(exchange_bytes(exchange).values())

    sizes = {name: sum(map(size, exchanges)) for name, exchanges in strategy.exchanges().items()}
    calls = range(first, last, strategy.steps_per_call)
    return sum(sizes[strategy.program_at(step, last)] for step in calls) / (last - first)

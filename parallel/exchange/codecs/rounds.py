"""What round codecs are made of: means over `replica`, of a vector or of an array in pieces, hop by hop.

Shapes: k replicas on this device, P pieces, N elements of what is sent of each.
"""

import math
from collections.abc import Callable, Generator, Iterator
from typing import Any

import jax

from parallel.exchange.codecs.base import HOP_DIMS, in_turn, pick
from parallel.exchange.codecs.plain import Identity

PIECE = 2**20  # elements: larger shards are coded in pieces, so that what coding needs of memory is bounded


def pieces(shape: tuple[int, ...], inside: int = 1) -> int:
    """How many pieces: as few as have at most PIECE elements each. Larger ones where the array's dimensions have no
    divisors for it (a prime number of rows): thousands of small ones would take time. inside: of so many elements that
    are not cut, each."""
    wanted = -(-math.prod(shape) * inside // PIECE)
    before = [math.prod(shape[:i]) for i in range(len(shape))]
    counts = {m * part for m, n in zip(before, shape, strict=True) for part in _divisors(n)}
    return min((n for n in counts if wanted <= n <= 4 * wanted), default=max(n for n in counts if n <= wanted))


def _divisors(n: int) -> Iterator[int]:
    """In pairs: of a vocabulary's size one by one they would take longer than all else of a plan."""
    for part in (part for part in range(1, math.isqrt(n) + 1) if n % part == 0):
        yield from (part, n // part)


def in_lockstep(runs: dict[str, Generator[Any, Any, Any]]) -> dict[str, Any]:
    """What generators return that yield (hop, its other arguments, message) and are sent what the hop brought: those
    that wait for the same hop share it. A hop costs a round trip of the link, however little it carries."""
    waiting, returned = {}, {}

    def go_on(name: str, received: Any) -> None:
        try:
            waiting[name] = runs[name].send(received)
        except StopIteration as end:
            returned[name] = end.value

    for name in runs:
        go_on(name, None)
    while waiting:
        hop, others, _ = next(iter(waiting.values()))
        names = [name for name, ask in waiting.items() if ask[:2] == (hop, others)]
        received = hop({name: waiting.pop(name)[2] for name in names}, *others)
        for name in names:
            go_on(name, received[name])
    return returned


def mean(net: Any, x_kN: jax.Array) -> Generator[Any, Any, Any]:
    """[k, N] -> [N], the same on every device, sent as float32. For `yield from`."""
    mean_PN, _ = yield from mean_in_pieces(net, x_kN[:, None], lambda x, i: x, lambda x, i: x, Identity())
    return mean_PN[0]


def mean_in_pieces(net: Any, x_kP: jax.Array, into: Callable, back: Callable, codec: Any) -> Generator[Any, Any, Any]:
    """[k, P, …] -> (the mean [P, …] of what was sent, what was not [k, P, …]). For `yield from`.

    into(x, i) -> [N] is what of piece i is sent, through a codec; back(sent, i) -> […] puts it in its place.
    """
    count, dims = x_kP.shape[1], HOP_DIMS[net.form(codec)]
    n = jax.eval_shape(into, pick(x_kP[0], 0, 0), 0).size

    def encode(i: Any, x_k: jax.Array) -> tuple[jax.Array, Any]:
        message, sent_kN, _ = net.encode(jax.vmap(lambda x: into(x, i))(x_k), codec, None)
        return x_k - jax.vmap(lambda sent: back(sent, i))(sent_kN), message

    owed_kP, message = in_turn(count, encode, x_kP, dims)
    received = yield net.first_hop, (codec,), message
    if net.form(codec) == "two_stage":
        add_up = lambda i, _: (None, net.round_sum(pick(received, i, 2), n, codec, None, None, 1.0)[0])
        received = yield net.second_hop, (), in_turn(count, add_up, None, 1)[1]
    decode = lambda i, _: (None, back(net.decode(pick(received, i, min(1, dims)), n, codec), i))
    return in_turn(count, decode, None, 0)[1], owed_kP

"""What a device sends in a training step over the fast axes, in closed form: rows, of each axis and part of the step.

A collective over several axes counts on the slowest of them, as where compiled programs are read (wire.py).
docs/planner.md has the reasons, and how near this comes.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from parallel.cost.context import Cut
from parallel.cost.network import (
    FLOAT32,
    Layout,
    Network,
    Weight,
    activation,
    end_tokens,
    layers,
    of_mesh,
    outside,
    tokens,
    turns,
)
from parallel.cost.pipeline import Pipeline
from parallel.cost.work import BACKWARD, ENDS, FORWARD, routed
from parallel.layout import rules
from parallel.layout.axes import CONTEXT, EXPERT, STAGE

# Of weights.
WEIGHTS, AGAIN = "weights", "weights again"
GRADIENTS, BY_PARTS = "gradients", "gradients in parts, while they are multiplied"
HEAD, HEADS_GRADIENT, EMBEDDINGS = "head", "head's gradient", "embeddings and their gradients"
IDS = "token ids"
ACTIVATIONS, IN_PARTS = "activations", "activations in parts"  # over tensor
HANDED_ON, ATTENTION, ROUTED = "micro-batches handed on", "attention", "tokens and what experts made of them"
(TENSOR,) = rules.RULES["vocab"]
LANES = 128  # of a TPU
MOST = 32  # chips over which libtpu scatters gradients; over more it adds them up whole
# Gathers and scatters over `tensor` of a layer: two halves, each gathers its input and scatters its output. The
# recomputation leaves out the last scatter; the backward pass gathers and scatters the cotangents of both.
CROSSINGS = {"forward": 4, "recomputed": 3, "backward": 4}
ENDS_CROSSINGS = 4  # the embedding's scatter, the head's gather, and the cotangents of both
SUMS = 3  # float32 of a token that the loss adds up over the vocabulary: maximum, sum, target


class Sent(NamedTuple):
    """Bytes that a device sends over axes of the mesh, slowest first, in a step, in so many hops from one device to the
    next."""

    axes: tuple[str, ...]
    part: str
    what: str
    bytes: float
    hops: float

    @property
    def axis(self) -> str:
        return self.axes[0]


class Habits(NamedTuple):
    """Of a compiler, where it sends more than is asked. most, heads_most: chips over which gradients of layers, or the
    head's, are scattered; over more they are added up whole, which is twice the bytes. lanes: where a last dimension is
    cut into parts of so many columns, they are scattered all the same; 0: never. by_parts: gradients are scattered part
    by part while they are multiplied: n + 1 parts for n − 1. in_parts: so are scatters over `tensor` of a layer's
    forward pass, and of what is worked out again: so many. by_hand: chips over which gradients that are scattered by
    hand are; over more they are added up whole, too. sides: of a torus; over more chips than `most` of several axes,
    one of which takes a part of a side, weights are gathered by adding up, which is twice the bytes, too. as_made: as
    Cut has it."""

    most: float = math.inf
    heads_most: float = math.inf
    lanes: int = 0
    by_parts: bool = False
    in_parts: tuple[int, int] = (0, 0)
    by_hand: float = math.inf
    as_made: bool = False
    sides: tuple[int, ...] = ()


def habits(platform: str) -> Habits:
    """Of a platform's compiler. What it makes in parts over `tensor` is not told here."""
    tpu = Habits(MOST, MOST - 1, LANES, True, by_hand=MOST)
    return {"tpu": tpu, "cpu": Habits(0, 0)}.get(platform, Habits(as_made=True))


def in_parts(size: float, n: int) -> float:
    """Bytes that a scatter over n chips sends where it would be this size."""
    return size * (n + 1) / max(1, n - 1)


def sent(net: Network, lay: Layout, habits: Habits) -> list[Sent]:
    found = [*_weights(net, lay, habits), *_ends(net, lay, habits), *_over_tensor(net, lay, habits)]
    found += [*_over_stages(net, lay), *_over_context(net, lay, habits), *_over_experts(net, lay)]
    found += _before(net.first, lay, habits) if net.first else []
    return [row for row in found if row.axes and row.bytes]


def _before(net: Network, lay: Layout, habits: Habits) -> Iterator[Sent]:
    """Of layers outside of a pipeline, whose weights are cut over stages, too."""
    out, both = outside(lay), lay.over((STAGE, "fsdp"))
    for row in (*_weights(net, out, habits), *_over_tensor(net, out, habits), *_over_context(net, out, habits)):
        axes = tuple(axis for name in row.axes for axis in (both if name == "fsdp" else (name,)))
        if row.part != ENDS:
            yield row._replace(axes=axes)


# ── weights ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Gathers(NamedTuple):
    """How often each of a device's layers is gathered in a step: forward, backward; and its gradient scattered. kept:
    whole from the forward pass on, for all ticks."""

    forward: float
    again: float
    gradients: float
    kept: bool = False


def gathers(lay: Layout) -> Gathers:
    """Over ticks of a pipeline, the weights of which do not change, JAX gathers them before all of them in a forward
    pass that is not worked out again, and keeps them."""
    if lay.stages == 1:
        return Gathers(lay.accumulate, lay.accumulate, lay.accumulate)
    if lay.gathers_once:
        return Gathers(1, 0, 1, True)
    n = lay.ticks / lay.repeats
    if lay.repeats_stages or lay.repeats > 1:  # what a tick picks of them is another's in the next
        return Gathers(n, (1 + lay.repeats_stages) * n, n)
    return Gathers(1, n, n, True)


def _weights(net: Network, lay: Layout, habits: Habits) -> Iterator[Sent]:
    how, own = gathers(lay), layers(net, lay)
    for (axes, is_routed), weights in _groups(net, lay).items():
        n, layer = lay.count(axes), own * _gathered(weights, net, lay)
        gradients, label = layer * (1 + (n > habits.by_hand)), GRADIENTS
        if not is_routed and not lay.gathers_once:  # which are scattered by hand
            label = BY_PARTS if habits.by_parts and n <= habits.most else GRADIENTS
            gradients = layer + own * _more(weights, n, net, lay, habits)
        layer *= 1 + _adds_up(axes, n, lay, habits)
        yield Sent(axes, FORWARD, WEIGHTS, how.forward * layer, how.forward * own * (n - 1))
        yield Sent(axes, BACKWARD, AGAIN, how.again * layer, how.again * own * (n - 1))
        yield Sent(axes, BACKWARD, label, how.gradients * gradients, how.gradients * own * (n - 1))


@of_mesh
def _groups(net: Network, lay: Layout) -> dict[tuple[tuple[str, ...], bool], list[Weight]]:
    """A layer's weights, by the axes over which they are gathered and by whether they are experts'."""
    found: dict[tuple[tuple[str, ...], bool], list[Weight]] = {}
    for w in net.layer:
        found.setdefault((lay.over(w.model), w.is_routed), []).append(w)
    return found


def _adds_up(axes: Sequence[str], n: int, lay: Layout, habits: Habits) -> bool:
    """Whether weights are gathered over n chips by adding up, which is twice the bytes."""
    if n <= habits.most or len(axes) == 1 or not habits.sides:
        return False
    whole = {math.prod(some) for k in range(4) for some in itertools.combinations(habits.sides, k)}
    return any(lay.sizes[axis] not in whole for axis in axes)


def _more(weights: Sequence[Weight], n: int, net: Network, lay: Layout, habits: Habits) -> float:
    """Bytes that a layer's gradients over n chips take more than scattering them."""
    if n > habits.most:
        return _gathered([w for w in weights if not _fills_lanes(w, n, habits.lanes)], net, lay)
    once = _gathered(weights, net, lay)
    return habits.by_parts * (in_parts(once, n) - once)


def _gathered(weights: Sequence[Weight], net: Network, lay: Layout) -> float:
    """Bytes that gathering them once sends."""
    return sum((1 - 1 / lay.count(w.model)) * lay.own(w, whole=True) * net.itemsize for w in weights)


def _fills_lanes(w: Weight, n: int, lanes: int) -> bool:
    return lanes > 0 and w.axes[-1] == "embed" and w.shape[-1] // n >= lanes


def _ends(net: Network, lay: Layout, habits: Habits) -> Iterator[Sent]:
    """Rows and positions change places with the model dimension at the embedding: over context, then over what cuts
    rows."""
    rows, A = lay.over(rules.RULES["rows"]), lay.end_calls
    n, C, positions = lay.count(rows), lay.cut("positions"), A * end_tokens(net, lay)
    head, whole, parts = A * _gathered([net.head], net, lay), lay.over(net.head.model), lay.count(net.head.model)
    wide = positions * net.dim * net.itemsize / lay.cut("vocab")
    yield Sent(whole, ENDS, HEAD, head * (1 + _adds_up(whole, parts, lay, habits)), A * (parts - 1))
    yield Sent(whole, ENDS, HEADS_GRADIENT, head * (1 + (parts > habits.heads_most)), A * (parts - 1))
    yield Sent(rows, ENDS, EMBEDDINGS, 2 * (1 - 1 / n) * wide, 2 * A * (n - 1))
    yield Sent(rows, ENDS, IDS, (n - 1) * positions * C * 4, A * (n - 1))
    over_context = lay.over((CONTEXT,))
    yield Sent(over_context, ENDS, EMBEDDINGS, 2 * (1 - 1 / C) * wide, 2 * A * (C - 1))
    yield Sent(over_context, ENDS, IDS, (C - 1) * positions * 4, A * (C - 1))


@of_mesh
def first(net: Network, lay: Layout) -> float:
    """Of the bytes of a layer's weights, the share of those that it multiplies with first: queries, keys and values."""
    own = {w.name: lay.own(w) for w in net.layer}
    return sum(own.get(f"attention/{name}", 0.0) for name in "qkv") / sum(own.values())


# ── activations ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _over_tensor(net: Network, lay: Layout, habits: Habits) -> Iterator[Sent]:
    axes, n, layer_turns = lay.over((TENSOR,)), lay.cut("vocab"), turns(net, lay)
    crossing = (n - 1) * activation(net, lay)
    once, again = habits.in_parts
    parts = [layer_turns * once, layer_turns * (again + lay.repeats_stages * once)]
    backward = CROSSINGS["recomputed"] + CROSSINGS["backward"] + lay.repeats_stages * CROSSINGS["forward"]
    forward, backward = layer_turns * CROSSINGS["forward"] - parts[0], layer_turns * backward - parts[1]
    longer = in_parts(crossing, n)
    ends, A = crossing * end_tokens(net, lay) / tokens(net, lay), lay.end_calls
    sums = 2 * (n - 1) / n * A * end_tokens(net, lay) * SUMS * FLOAT32
    hops = n - 1
    yield Sent(axes, FORWARD, ACTIVATIONS, crossing * forward, forward * hops)
    yield Sent(axes, FORWARD, IN_PARTS, longer * parts[0], parts[0] * hops)
    yield Sent(axes, BACKWARD, ACTIVATIONS, crossing * backward, backward * hops)
    yield Sent(axes, BACKWARD, IN_PARTS, longer * parts[1], parts[1] * hops)
    yield Sent(axes, ENDS, ACTIVATIONS, A * ends * ENDS_CROSSINGS, A * ENDS_CROSSINGS * hops)
    yield Sent(axes, ENDS, "sums of the loss", sums, SUMS * A * hops)


def _over_stages(net: Network, lay: Layout) -> Iterator[Sent]:
    axes = lay.over((STAGE,))
    half = Pipeline(lay.stages, lay.accumulate, int(activation(net, lay)), lay.repeats).sent / 2
    for part in (FORWARD, BACKWARD):  # to a neighbour each
        yield Sent(axes, part, HANDED_ON, half, 2 * lay.ticks)


def _over_context(net: Network, lay: Layout, habits: Habits) -> Iterator[Sent]:
    if lay.way:
        t, C, how = lay.cut("heads"), lay.cut("positions"), (lay.remat, habits.as_made)
        own = Cut(tokens(net, lay), net.heads // t, net.kv_heads // t, net.head_dim, net.itemsize, C, *how)
        collectives = {"ring": 1, "gather": 2, "heads": 4}[lay.way]  # a ring's hops one after another
        hops = collectives * (C - 1)
        yield from _both(lay, net, CONTEXT, ATTENTION, own.forward(lay.way), own.sent(lay.way), hops)


def _over_experts(net: Network, lay: Layout) -> Iterator[Sent]:
    if net.experts:
        own = routed(net, lay)
        yield from _both(lay, net, EXPERT, ROUTED, own.forward, own.sent, 3 * (own.count - 1))


def _both(lay: Layout, net: Network, axis: str, what: str, forward: float, every: float, hops: int) -> Iterator[Sent]:
    """Of a layer that sends so many bytes forward, and in all. A stage that is worked out again sends once more; XLA
    leaves that out where it has one layer."""
    axes, layer_turns = lay.over((axis,)), turns(net, lay)
    again = forward * (lay.repeats_stages and layers(net, lay) > lay.repeats)
    yield Sent(axes, FORWARD, what, layer_turns * forward, layer_turns * hops)
    yield Sent(axes, BACKWARD, what, layer_turns * (every - forward + again), 2 * layer_turns * hops)

"""What XLA's schedules of a training step wait for, of what is sent over the fast axes: seconds by axis."""

from collections.abc import Mapping

from parallel.cost import sent, work
from parallel.cost.network import Layout, Network
from parallel.cost.rates import share, stream
from parallel.cost.targets import Target
from parallel.cost.work import BACKWARD, FORWARD
from parallel.layout.axes import FAST

# Seconds by (axis, part of the step, what is sent).
Wire = Mapping[tuple[str, str, str], float]
# What travels meanwhile on a GPU, of compiled programs: of activations' cotangents all that the products of gradients
# cover; of what stages hand on, what comes and goes in their buffer; of tokens on their way to experts and back.
COTANGENTS = sent.CROSSINGS["backward"] / (sent.CROSSINGS["recomputed"] + sent.CROSSINGS["backward"])
MEANWHILE = {sent.HANDED_ON: 1 / 2, sent.ROUTED: 1 / 2}
BEFORE = (sent.HEAD, sent.HEADS_GRADIENT, sent.IDS)  # while layers are computed


def on_gpu(net: Network, lay: Layout, target: Target, wire: Wire, compute: Mapping[str, float]) -> dict[str, float]:
    """Nothing travels from one turn of the loop over layers to the next. So a layer's first weights are waited for,
    and its gradients, which XLA sends together at the turn's end; other weights travel while it computes, or waits for
    activations on other links. What is sent of cotangents travels while gradients of weights are multiplied, what a
    ring sends while attention computes; the rest is waited for. Weights that a pipeline keeps travel before it."""
    multiplied = lambda products: products / (share(target.chip).products * target.chip.bf16)
    covered, seen = multiplied(work.gradient_flops(net, lay)), work.scores(net, lay)
    links = {axis: stream(target, lay.sizes, (axis,)) for axis in {key[0] for key in wire}}
    exposed, waited = dict.fromkeys(FAST, 0.0), {FORWARD: dict[str, float](), BACKWARD: dict[str, float]()}
    for (axis, part, what), time in wire.items():
        if what in (sent.WEIGHTS, sent.AGAIN, *BEFORE):
            continue
        late = time * (1 - MEANWHILE.get(what, 0.0))
        if what == sent.ATTENTION and lay.way == "ring":
            late = max(0.0, time - multiplied(seen[part]))
        elif what in (sent.ACTIVATIONS, sent.ATTENTION) and part == BACKWARD:
            late = time - min(COTANGENTS * time, covered)
        exposed[axis] += late
        if part in waited and what != sent.GRADIENTS:
            waited[part][links[axis]] = waited[part].get(links[axis], 0.0) + late
    first, kept = sent.first(net, lay), sent.gathers(lay).kept
    for (axis, part, what), time in wire.items():
        if what in (sent.WEIGHTS, sent.AGAIN) and part == FORWARD and kept:
            exposed[axis] += time
        elif what in (sent.WEIGHTS, sent.AGAIN):
            others = sum(late for own, late in waited[part].items() if own != links[axis])
            exposed[axis] += first * time + max(0.0, (1 - first) * time - compute[part] - others)
    return exposed


def on_tpu(net: Network, lay: Layout, target: Target, wire: Wire, compute: Mapping[str, float]) -> dict[str, float]:
    """Collectives are synchronous, but gradients that libtpu scatters in parts, while it multiplies them, and what it
    sends in parts over `tensor`: of that the last two parts are waited for."""
    exposed = {axis: sum(time for key, time in wire.items() if key[0] == axis) for axis in FAST}
    in_parts = sum(time for key, time in wire.items() if key[2] == sent.IN_PARTS)
    exposed["tensor"] -= in_parts * (1 - 2 / (lay.cut("vocab") + 1))
    for (axis, _, what), time in wire.items():
        if what == sent.BY_PARTS:
            exposed[axis] -= min(time, compute[BACKWARD])
    return exposed

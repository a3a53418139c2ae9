"""What a device holds in a training step beside its state, in closed form: arrays, by the moments at which a step may
hold most. docs/planner.md has the reasons, and how near this comes to compiled programs."""

from typing import NamedTuple

from parallel.cost import host
from parallel.cost.network import (
    FLOAT32,
    Layout,
    Network,
    activation,
    end_elements,
    end_tokens,
    layer_elements,
    layers,
    outside,
    tokens,
)
from parallel.cost.sent import gathers
from parallel.cost.work import hidden_of_token, kept, routed, rows_of_token

LOGIT_COPIES = 1.5  # a chunk in float32, and its gradient in the compute dtype
# Of a layer's weights: its own, the next one's, and the gradient of one. Experts' are gathered where they are needed;
# in a pipeline the most is held before the gradients' products.
GATHERED_LAYERS, GATHERED_EXPERTS, GATHERED_IN_A_TICK = 3, 5 / 3, 1
# Arrays of a layer's backward pass at a time: of D, of F, of queries and keys; with experts, of their rows, of D, or of
# those of all tokens; of rows that are wider than F, one more. And of its forward pass, of D and of F.
LIVE_WIDE, LIVE_HIDDEN, LIVE_HEADS, LIVE_ROWS, LIVE_ALL_ROWS = 5, 6, 2, 3, 9
FORWARD_WIDE, FORWARD_HIDDEN = 5, 2


class Flight(NamedTuple):
    """What an exchange holds, in bytes. messages: as they travel. is_coded: in blocks, from a float32 gradient beside
    them; else the gradient itself is the message. meanwhile: all the time while something else hides it."""

    messages: float = 0.0
    is_coded: bool = False
    meanwhile: float = 0.0


def held(net: Network, lay: Layout, flight: Flight) -> dict[str, dict[str, float]]:
    """Temporary bytes: {moment: {array: bytes}}. The state lies beside them."""
    n, own, computed = tokens(net, lay), layers(net, lay), layers(net, lay) // lay.repeats * _ticks_kept(lay)
    trained, gathered, _ = layer_elements(net, lay)
    layer, whole = own * trained, gathered * net.itemsize
    first, out = net.first, outside(lay)
    before = first.layers * layer_elements(first, out)[0] if first else 0.0
    weights = layer + end_elements(net, lay) + before
    always = {
        "gradients of micro-steps": weights * FLOAT32 * (lay.end_calls > 1),
        "of the exchange meanwhile": flight.meanwhile,
    }
    inputs = {
        "weights in the compute dtype": weights * net.itemsize * (net.itemsize < FLOAT32),
        "layer inputs": activation(net, lay) * (lay.ticks if lay.repeats_stages else computed),
        "kept for the backward pass": computed * n * net.itemsize * kept(net, lay),
    }
    if first:
        each = activation(first, out) + tokens(first, out) * net.itemsize * kept(first, out)
        inputs["of the layers before"] = first.layers * each
    backward = {
        "gradients": layer * net.itemsize,
        "fetched from the host ahead": host.held(net, lay) / own * lay.is_splash,  # as libtpu does
        "layers' weights, gathered": (GATHERED_EXPERTS if net.experts else GATHERED_LAYERS) * whole,
        "a layer's activations": _activations(net, lay),
    }
    update = {"gradients in float32": weights * FLOAT32, "messages": flight.messages}
    if not flight.is_coded:
        update["gradients in float32"] = max(0.0, weights * FLOAT32 - flight.messages)
    found = {"the loss": inputs | _loss(net, lay), "the backward pass": inputs | backward, "the update": update}
    if lay.stages > 1:
        found |= _in_a_pipeline(net, lay, inputs, backward, own * whole, layer)
    return {moment: always | arrays for moment, arrays in found.items()}


def _loss(net: Network, lay: Layout) -> dict[str, float]:
    t, n = lay.cut("vocab"), end_tokens(net, lay)
    head, logits = net.head.size / t, n * net.vocab * FLOAT32 / t
    return {
        "head, gathered": head * net.itemsize,
        "head's gradient": head * FLOAT32,
        "chunk of logits": LOGIT_COPIES * logits / lay.chunks(n, net.vocab),
        "features and their gradient": 2 * n * net.dim * net.itemsize,
    }


def _activations(net: Network, lay: Layout) -> float:
    hidden, heads = hidden_of_token(net, lay) / lay.cut("mlp"), (net.queries + 2 * net.keys) / lay.cut("mlp")
    rows = 0.0
    if net.experts:
        row = rows_of_token(net, lay) * net.dim
        rows = row * (LIVE_ALL_ROWS if routed(net, lay).goes_to_all else LIVE_ROWS + (row > hidden))
    live = LIVE_WIDE * net.dim + LIVE_HIDDEN * hidden + LIVE_HEADS * heads + rows
    return tokens(net, lay) * net.itemsize * live


def _in_a_pipeline(
    net: Network, lay: Layout, inputs: dict[str, float], backward: dict[str, float], whole: float, layer: float
) -> dict[str, dict[str, float]]:
    """The forward and the backward pass there. whole: bytes of a stage's layers, gathered. layer: elements of them that
    a device trains."""
    own = layers(net, lay)
    in_tick = own // lay.repeats
    tick = {
        "layer inputs of a tick": in_tick * activation(net, lay),
        "kept of a tick": 0.0 if lay.repeats_stages else in_tick * tokens(net, lay) * net.itemsize * kept(net, lay),
        "micro-batches": (lay.slots + 2) * activation(net, lay),
    }
    n, once = tokens(net, lay) * net.itemsize, lay.gathers_once
    hidden = FORWARD_HIDDEN * hidden_of_token(net, lay) / lay.cut("mlp")
    forward = {
        "head, gathered": net.head.size / lay.cut("vocab") * net.itemsize,
        "layers' weights, gathered": whole / own,
        "a layer's activations": n * (FORWARD_WIDE * net.dim + hidden),
    }
    if gathers(lay).kept:
        forward["layers' weights, kept"] = whole
    backward = backward | tick | {"layers' weights, gathered": GATHERED_IN_A_TICK * whole / own}
    if once:  # gradients of whole layers add up in float32, each tick's beside them
        backward |= {"layers' weights, kept": whole, "gradients": whole}
        backward |= {"gradients of ticks": whole / net.itemsize * FLOAT32}
    else:  # the head's is scattered after the last tick
        backward |= {"gradients of ticks": layer * FLOAT32}
        backward |= {"head's gradient": net.head.size / lay.cut("vocab") * FLOAT32}
    return {"the forward pass": inputs | tick | forward, "the backward pass": inputs | backward}


def _ticks_kept(lay: Layout) -> int:
    """Ticks of which layers' arrays are kept."""
    return 1 if lay.stages == 1 or lay.repeats_stages else lay.ticks

"""What a training step computes on a device, in closed form: products, and what is read and written beside them.

docs/planner.md has the reasons, and how near this comes to compiled programs. All figures are of one device and step.
D model dimension, F feed-forward, V vocabulary, T positions, L layers.
"""

from parallel.cost.experts import Routed
from parallel.cost.network import (
    FLOAT32,
    Layout,
    Network,
    Weight,
    end_elements,
    end_tokens,
    layer_elements,
    layers,
    outside,
    tokens,
    turns,
    with_first,
)
from parallel.layout.axes import EXPERT
from parallel.layout.ring import WAYS

FORWARD, BACKWARD, ENDS = "forward", "backward", "ends"  # parts of a step; ends: the embedding, the head and its loss
# Of a fused attention's backward pass, beside the forward pass's two products: cuDNN's kernel has five; the two of
# splash attention have seven, for each makes the scores anew.
SCORES_BACKWARD, SPLASH_BACKWARD = 2.5, 3.5
# Reads and writes of an array of a layer that no product makes: (norms and sums, of D; of queries and keys; of hidden).
PASSES = (10, 2, 3)
HOP_PASSES = 32  # over queries, of what a ring's products are merged from, in all passes
# Of experts: over their rows, of D, in all passes, by moe.dispatch, what brings them together and their sums; over
# their hidden features, in each pass; and over their weights, when they are gathered.
ROW_PASSES, ROUTED_HIDDEN, LAID_ANEW = {"capacity": 21, "grouped": 75, "mosaic": 75}, 1.6, 2
LOGIT_PASSES = 5  # over a chunk of float32 logits
COPIED = 6  # passes in which XLA lays out anew what `tensor` has gathered, or will scatter, of cotangents
STACKED = 3  # passes over what the backward pass finds in stacks of all layers: cleared, and copied there
# Of a float32 parameter with two moments. Four arrays are read and three written; before that its gradient is read and
# written in float32, and read for its norm; and the weight is read and written in the compute dtype.
UPDATE_BYTES = 28 + 6 + 4 + 6
NARROW_BYTES = 8  # less, where moments are bfloat16
# Of a gradient that is added to those of earlier micro-steps; or in a pipeline that gathers once, of whole layers.
ADDED_BYTES, ADDED_WHOLE = 10, 24


def routed(net: Network, lay: Layout) -> Routed:
    """A layer's experts."""
    way, rows = net.dispatch
    own, count = tokens(net, lay), lay.sizes.get(EXPERT, 1)
    return Routed(own, net.dim, net.chosen, net.experts, net.itemsize, count, way, rows, lay.remat)


def rows_of_token(net: Network, lay: Layout) -> float:
    """That experts multiply, full or not, for each token of a device; 1: no experts."""
    return routed(net, lay).multiplied / tokens(net, lay) if net.experts else 1.0


def hidden_of_token(net: Network, lay: Layout) -> float:
    """Features that feed-forward halves have of a token."""
    shared = sum(w.shape[-1] for w in net.layer if w.name == "shared/up")
    return rows_of_token(net, lay) * net.mlp_dim + shared


# ── products ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def flops(net: Network, lay: Layout) -> dict[str, float]:
    """By part; what is worked out again counts as often."""
    each = {w.name: _elements(w, net, lay) for w in net.layer if w.is_matrix}
    # The output of the last product nothing asks for a second time.
    last = each["mlp/down"] + each.get("shared/down", 0.0)
    again = sum(each.values()) - last if lay.remat == "full" else each["attention/out"]
    once = 2 * sum(each.values())
    layer = {FORWARD: once, BACKWARD: 2 * once + 2 * again + lay.repeats_stages * once}
    share = turns(net, lay) * tokens(net, lay) / lay.cut("mlp")
    ends = lay.end_calls * end_tokens(net, lay) / lay.cut("mlp")
    seen = scores(net, lay)
    own = {part: share * layer[part] + seen[part] for part in layer} | {ENDS: ends * 6 * net.dim * net.vocab}
    return with_first(flops, net, lay, own)


def scores(net: Network, lay: Layout) -> dict[str, float]:
    """Of them, those of attention's kernels. Where hops are merged, a window hides nothing from the kernel."""
    visible = net.seq_len / 2 if lay.way in WAYS else net.visible
    once = turns(net, lay) * tokens(net, lay) * 4 * net.queries * visible / lay.cut("heads")
    backward = SPLASH_BACKWARD if lay.is_splash else SCORES_BACKWARD
    return {FORWARD: once, BACKWARD: (1 + backward + lay.repeats_stages) * once}


def gradient_flops(net: Network, lay: Layout) -> float:
    """Of the products that make the gradients of layers' weights."""
    each = sum(_elements(w, net, lay) for w in net.layer if w.is_matrix)
    first = gradient_flops(net.first, outside(lay)) if net.first else 0.0
    return 2 * turns(net, lay) * each * tokens(net, lay) / lay.cut("mlp") + first


def loss_products(net: Network, lay: Layout) -> list[tuple[float, float]]:
    """(FLOPs, bytes of memory) of each product of the loss: logits, the features' gradient, the head's. All of the head
    is read for every chunk of logits, and its gradient is read and written in float32."""
    n, t, calls = end_tokens(net, lay), lay.cut("mlp"), lay.end_calls
    head, logits, chunks = net.head.size / t, n * net.vocab / t, lay.chunks(n, net.vocab)
    features = n * net.dim * net.itemsize
    moved = (
        chunks * head * net.itemsize + features + logits * FLOAT32,
        chunks * head * net.itemsize + features + logits * net.itemsize,
        chunks * head * FLOAT32 * 2 + features + logits * net.itemsize,
    )
    return [(calls * 2 * logits * net.dim, calls * size) for size in moved]


def _elements(w: Weight, net: Network, lay: Layout) -> float:
    """Of a weight, those that a token is multiplied with."""
    return w.size / net.experts * rows_of_token(net, lay) if w.is_routed else w.size


# ── memory that is read and written ───────────────────────────────────────────────────────────────────────────────────


def passed(net: Network, lay: Layout) -> dict[str, float]:
    """Bytes of the chip's memory beside the products, by part."""
    wide, heads, hidden = PASSES
    hidden = ROUTED_HIDDEN if net.experts else hidden
    once = wide * net.dim + heads * (net.queries + net.keys) + hidden * hidden_of_token(net, lay)
    cut, gathered = lay.cut("mlp"), COPIED * net.dim * (lay.cut("sequence") > lay.cut("positions"))
    hops = lay.cut("positions") - 1 if lay.way in WAYS else 0
    merged = HOP_PASSES * net.queries / cut * hops
    layer = {
        FORWARD: once / cut + STACKED * (kept(net, lay) + net.dim / lay.cut("vocab")) + merged / 3,
        # Worked out again; and the cotangents, which are read beside it.
        BACKWARD: (3 + lay.repeats_stages) * once / cut + gathered + merged * 2 / 3,
    }
    if net.experts:
        rows = ROW_PASSES[net.dispatch[0]] * rows_of_token(net, lay) * net.dim
        layer = {part: size + rows / 2 for part, size in layer.items()}
        layer[BACKWARD] += LAID_ANEW * layer_elements(net, lay)[2] / tokens(net, lay)
    share = turns(net, lay) * tokens(net, lay) * net.itemsize
    logits = lay.end_calls * end_tokens(net, lay) * LOGIT_PASSES * FLOAT32 * net.vocab / cut
    own = {part: share * size for part, size in layer.items()} | {ENDS: logits}
    return with_first(passed, net, lay, own)


def kept(net: Network, lay: Layout) -> float:
    """Elements that rematerialisation keeps on the device of a token and layer, besides the layer's input."""
    return sum(of_matmuls(net, lay)) if lay.remat == "matmuls" else 0.0


def of_matmuls(net: Network, lay: Layout) -> tuple[float, float]:
    """Elements of a token and layer that `matmuls` keeps on the device, and `offload` in the host's memory: queries,
    keys, values and attention's output; and what the feed-forward half begins with."""
    heads, hidden = 2 * (net.queries + net.keys), net.hidden * hidden_of_token(net, lay)
    return heads / lay.cut("mlp"), hidden / lay.cut("mlp")


def updated(net: Network, lay: Layout) -> float:
    """Bytes of memory that the optimizer reads and writes, and what adds up micro-steps."""
    (layer, whole, _), ends = layer_elements(net, lay), end_elements(net, lay)
    several = lambda calls: calls * (calls > 1)
    added = ADDED_WHOLE * whole if lay.gathers_once else ADDED_BYTES * layer
    each = UPDATE_BYTES - NARROW_BYTES * net.is_narrow
    ends *= each + ADDED_BYTES * several(lay.end_calls)
    first = updated(net.first, outside(lay)) if net.first else 0.0
    return layers(net, lay) * (each * layer + several(lay.ticks) * added) + ends + first

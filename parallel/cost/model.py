"""What a training step computes, sends and holds on a mesh, in closed form: nothing is traced, nothing compiled.

The answer is rows: products by part of the step, bytes by axis and part, arrays by moment. A further mesh axis is
further rows. docs/planner.md has the reasons, and how near this comes to compiled programs.

All figures are of one device. D model dimension, F feed-forward, V vocabulary, T positions, L layers.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from parallel.layout import rules

FORWARD, BACKWARD, ENDS = "forward", "backward", "ends"  # parts of a step; ends: the embedding, the head and its loss
# What is sent over fsdp.
WEIGHTS, AGAIN, GRADIENTS = "weights", "weights again", "gradients"
HEAD, HEADS_GRADIENT, EMBEDDINGS = "head", "head's gradient", "embeddings and their gradients"
IN_PARTS = "activations in parts"  # over tensor
FLOAT32 = 4
LANES = 128  # of a TPU
WHOLE = 32  # chips over which libtpu makes scatters of gradients in parts; over more it adds them up whole
# Of a fused attention's backward pass, beside the forward pass's two products: cuDNN's kernel has five; the two of
# splash attention have seven, for each makes the scores anew.
SCORES_BACKWARD, SPLASH_BACKWARD = 2.5, 3.5
# Gathers and scatters over `tensor` of a layer: two halves, each gathers its input and scatters its output. The
# recomputation leaves out the last scatter; the backward pass gathers and scatters the cotangents of both.
CROSSINGS = {"forward": 4, "recomputed": 3, "backward": 4}
ENDS_CROSSINGS = 4  # the embedding's scatter, the head's gather, and the cotangents of both
SUMS = 3  # float32 of a token that the loss adds up over the vocabulary: maximum, sum, target
# Reads and writes of an array of a layer that no product makes: (norms and sums, of D; of queries and keys; of hidden).
PASSES = (10, 2, 3)
LOGIT_PASSES = 5  # over a chunk of float32 logits
LOGIT_COPIES = 1.5  # a chunk in float32, and its gradient in the compute dtype
COPIED = 6  # passes in which XLA lays out anew what `tensor` has gathered, or will scatter, of cotangents
STACKED = 3  # passes over what the backward pass finds in stacks of all layers: cleared, and copied there
# Of a float32 parameter with two moments. Four arrays are read and three written; before that its gradient is read and
# written in float32, and read for its norm; and the weight is read and written in the compute dtype.
UPDATE_BYTES = 28 + 6 + 4 + 6
ADDED_BYTES = 10  # of a gradient that is added to those of earlier micro-steps
GATHERED_LAYERS = 3  # a layer's weights, the next one's, and the gradient of one
# Arrays of a layer's backward pass at a time: of D, of F, of queries and keys.
LIVE_WIDE, LIVE_HIDDEN, LIVE_HEADS = 5, 6, 2


class Weight(NamedTuple):
    """name: the last two of its path."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]


@dataclass(frozen=True)
class Network:
    """layer: the weights of one. trained_…: the same, or adapters beside weights that lie in the compute dtype. hidden:
    arrays of F that the feed-forward half begins with. visible: keys that a query sees on average. itemsize: of the
    compute dtype."""

    layer: tuple[Weight, ...]
    ends: tuple[Weight, ...]
    trained_layer: tuple[Weight, ...]
    trained_ends: tuple[Weight, ...]
    layers: int
    dim: int
    mlp_dim: int
    hidden: int
    queries: int  # heads × their size
    keys: int
    vocab: int
    seq_len: int
    visible: float
    itemsize: int

    @classmethod
    def of(cls, weights: tuple, trained: tuple, model: Any, seq_len: int, itemsize: int) -> "Network":
        """weights, trained: (shapes, axes), `blocks` with a leading dimension of layers. model: its ModelConfig."""
        layer, ends = _weights(*weights)
        window = min(seq_len, model.sliding_window or seq_len)
        return cls(
            layer, ends, *_weights(*trained), layers=model.num_layers, dim=model.model_dim, mlp_dim=model.mlp_dim,
            hidden=sum(w.axes[-1] == "mlp" and len(w.shape) > 1 for w in layer), seq_len=seq_len, itemsize=itemsize,
            queries=model.num_heads * model.head_dim, keys=model.num_kv_heads * model.head_dim, vocab=model.vocab_size,
            visible=window - window**2 / (2 * seq_len),
        )  # fmt: skip

    @property
    def head(self) -> Weight:
        """What makes logits: a weight of its own, or the embedding."""
        return next((w for w in self.ends if w.name == "head"), self.ends[0])


def _weights(shapes: Any, axes: Any) -> tuple[tuple[Weight, ...], tuple[Weight, ...]]:
    """Of a layer, and of the ends."""
    flat = dict(jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda x: isinstance(x, tuple)))
    layer, ends = [], []
    for path, x in jax.tree_util.tree_leaves_with_path(shapes):
        names = [part.key for part in path]
        inside = names[0] == "blocks"
        weight = Weight("/".join(names[-2:]), tuple(x.shape)[inside:], tuple(flat[path])[inside:])
        (layer if inside else ends).append(weight)
    return tuple(layer), tuple(ends)


@dataclass(frozen=True)
class Layout:
    """How a network is trained. sizes: of the mesh's axes. rows: windows of a device in a micro-step. remat, chunk:
    compute.remat (matmuls or full), and bytes of float32 logits at a time. is_splash: attention is the TPU's kernel."""

    sizes: Mapping[str, int]
    rows: int
    accumulate: int
    remat: str
    chunk: int
    is_splash: bool = False

    def cut(self, axis: str) -> int:
        """Into how many parts a logical axis is cut."""
        return rules.shards(rules.RULES[axis], self.sizes)

    def chunks(self, tokens: int, vocab: int) -> int:
        """Into how many parts logits are cut, one after another."""
        return max(1, math.ceil(tokens * vocab * FLOAT32 / self.cut("mlp") / self.chunk))


class Sent(NamedTuple):
    """Bytes that a device sends over an axis in a step, in so many collectives."""

    axis: str
    part: str
    what: str
    bytes: float
    times: int


def tokens(net: Network, lay: Layout) -> int:
    """Of a device and micro-step."""
    return lay.rows * net.seq_len


# ── what is computed ──────────────────────────────────────────────────────────────────────────────────────────────────


def flops(net: Network, lay: Layout) -> dict[str, float]:
    """Of the products of a step, by part; what is worked out again counts as often."""
    matrices = {w.name: math.prod(w.shape) for w in net.layer if _is_matrix(w)}
    # The output of the last product nothing asks for a second time.
    again = {"full": sum(matrices.values()) - matrices["mlp/down"], "matmuls": matrices["attention/out"]}[lay.remat]
    scores, backward = 4 * net.queries * net.visible, SPLASH_BACKWARD if lay.is_splash else SCORES_BACKWARD
    token = {
        FORWARD: net.layers * (2 * sum(matrices.values()) + scores),
        BACKWARD: net.layers * (4 * sum(matrices.values()) + 2 * again + scores * (1 + backward)),
        ENDS: 6 * net.dim * net.vocab,
    }
    share = lay.accumulate * tokens(net, lay) / lay.cut("mlp")
    return {part: share * size for part, size in token.items()}


def gradient_flops(net: Network, lay: Layout) -> float:
    """Of the products that make the gradients of layers' weights."""
    matrices = sum(math.prod(w.shape) for w in net.layer if _is_matrix(w))
    return 2 * net.layers * matrices * lay.accumulate * tokens(net, lay) / lay.cut("mlp")


def passed(net: Network, lay: Layout) -> dict[str, float]:
    """Bytes of the chip's memory that are read and written beside the products, by part."""
    wide, heads, hidden = PASSES
    once = wide * net.dim + heads * (net.queries + net.keys) + hidden * net.mlp_dim
    layer = net.layers * net.itemsize * once
    cut, gathered = lay.cut("mlp"), COPIED * net.dim * (lay.cut("sequence") > 1)
    token = {
        FORWARD: layer / cut + net.layers * net.itemsize * STACKED * (_kept(net, lay) + net.dim / lay.cut("sequence")),
        # Worked out again; and the cotangents, which are read beside it.
        BACKWARD: 3 * layer / cut + net.layers * net.itemsize * gathered,
        ENDS: LOGIT_PASSES * FLOAT32 * net.vocab / cut,
    }
    return {part: lay.accumulate * tokens(net, lay) * size for part, size in token.items()}


def loss_products(net: Network, lay: Layout) -> list[tuple[float, float]]:
    """(FLOPs, bytes of memory) of each product of the loss: logits, the features' gradient, the head's. All of the head
    is read for every chunk of logits, and its gradient is read and written in float32."""
    n, t = tokens(net, lay), lay.cut("mlp")
    head, logits, chunks = math.prod(net.head.shape) / t, n * net.vocab / t, lay.chunks(n, net.vocab)
    features = n * net.dim * net.itemsize
    moved = (
        chunks * head * net.itemsize + features + logits * FLOAT32,
        chunks * head * net.itemsize + features + logits * net.itemsize,
        chunks * head * FLOAT32 * 2 + features + logits * net.itemsize,
    )
    return [(lay.accumulate * 2 * logits * net.dim, lay.accumulate * size) for size in moved]


def _is_matrix(w: Weight) -> bool:
    return len(w.shape) > 1 and not w.name.endswith("bias")


# ── what is sent ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Habits(NamedTuple):
    """Of a compiler, where it sends more than is asked. whole, head_whole: gradients of layers, or the head's, are
    added up whole, which is twice the bytes of scattering them. lanes: where a last dimension is cut into parts of so
    many columns, they are scattered all the same; 0: never. in_parts: scatters over `tensor` in a layer's forward pass,
    and in what is worked out again, that are made part by part while their product is: n + 1 parts for n − 1."""

    whole: bool = False
    head_whole: bool = False
    lanes: int = 0
    in_parts: tuple[int, int] = (0, 0)


def habits(platform: str, shards: int) -> Habits:
    """Of a platform's compiler, where weights are cut into so many shards. What it makes in parts is not told here."""
    if platform == "tpu":
        return Habits(shards > WHOLE, shards >= WHOLE, LANES)
    return Habits(platform == "cpu", platform == "cpu")


def sent(net: Network, lay: Layout, habits: Habits) -> list[Sent]:
    """Over the fast axes."""
    return [row for row in [*_over_fsdp(net, lay, habits), *_over_tensor(net, lay, habits)] if row.bytes]


def _over_fsdp(net: Network, lay: Layout, habits: Habits) -> list[Sent]:
    axis, n, A = rules.RULES["batch"][0], lay.cut("batch"), lay.accumulate
    gathered = lambda weights: sum((n - 1) / n * _own(w, lay, without=axis) * net.itemsize for w in weights)
    weights = [w for w in net.layer if axis in _mesh_axes(w)]
    layer = net.layers * A * gathered(weights)
    whole = net.layers * A * gathered([w for w in weights if habits.whole and not _fills_lanes(w, n, habits.lanes)])
    head = A * gathered([net.head])
    positions = A * tokens(net, lay)
    moved = (n - 1) / n * positions * net.dim * net.itemsize / lay.cut("sequence")
    each = A * net.layers
    return [
        Sent(axis, FORWARD, WEIGHTS, layer, each),
        Sent(axis, BACKWARD, AGAIN, layer, each),
        Sent(axis, BACKWARD, GRADIENTS, layer + whole, each),
        Sent(axis, ENDS, HEAD, head, A),
        Sent(axis, ENDS, HEADS_GRADIENT, head * (1 + habits.head_whole), A),
        Sent(axis, ENDS, EMBEDDINGS, 2 * moved, 2 * A),
        Sent(axis, ENDS, "token ids", (n - 1) * positions * 4, A),
    ]


def _fills_lanes(w: Weight, n: int, lanes: int) -> bool:
    return lanes > 0 and w.axes[-1] == "embed" and w.shape[-1] // n >= lanes


def _over_tensor(net: Network, lay: Layout, habits: Habits) -> list[Sent]:
    (axis,), n, A = rules.RULES["vocab"], lay.cut("vocab"), lay.accumulate
    once = (n - 1) / n * A * tokens(net, lay) * net.dim * net.itemsize
    parts = [net.layers * count for count in habits.in_parts]
    forward = net.layers * CROSSINGS["forward"] - parts[0]
    backward = net.layers * (CROSSINGS["recomputed"] + CROSSINGS["backward"]) - parts[1]
    longer = once * (n + 1) / max(1, n - 1)
    sums = 2 * (n - 1) / n * A * tokens(net, lay) * SUMS * FLOAT32
    return [
        Sent(axis, FORWARD, "activations", once * forward, A * forward),
        Sent(axis, FORWARD, IN_PARTS, longer * parts[0], A * parts[0]),
        Sent(axis, BACKWARD, "activations", once * backward, A * backward),
        Sent(axis, BACKWARD, IN_PARTS, longer * parts[1], A * parts[1]),
        Sent(axis, ENDS, "activations", once * ENDS_CROSSINGS, A * ENDS_CROSSINGS),
        Sent(axis, ENDS, "sums of the loss", sums, SUMS * A),
    ]


def first(net: Network, lay: Layout) -> float:
    """Of the bytes of a layer's weights, the share of those that it multiplies with first: queries, keys and values."""
    own = {w.name: _own(w, lay) for w in net.layer}
    return sum(own.get(f"attention/{name}", 0.0) for name in "qkv") / sum(own.values())


def _mesh_axes(w: Weight) -> tuple[str, ...]:
    return rules.of(rules.spec(w.axes))


def _own(w: Weight, lay: Layout, without: str = "") -> float:
    """Elements that a device has of a weight; `without`: once it is gathered over this mesh axis."""
    parts = (lay.sizes.get(axis, 1) for axis in _mesh_axes(w) if axis != without)
    return math.prod(w.shape) / math.prod(parts)


# ── what is held ──────────────────────────────────────────────────────────────────────────────────────────────────────


class Flight(NamedTuple):
    """What an exchange holds, in bytes. messages: as they travel. is_coded: in blocks, from a float32 gradient beside
    them; else the gradient itself is the message. meanwhile: all the time while something else hides it."""

    messages: float = 0.0
    is_coded: bool = False
    meanwhile: float = 0.0


def held(net: Network, lay: Layout, flight: Flight) -> dict[str, dict[str, float]]:
    """Temporary bytes by the moments at which a step may hold most: {moment: {array: bytes}}. The state lies beside
    them."""
    fsdp, t, n = rules.RULES["batch"][0], lay.cut("mlp"), tokens(net, lay)
    layer = sum(_own(w, lay) for w in net.trained_layer)
    whole = sum(_own(w, lay, without=fsdp) for w in net.layer)
    weights = net.layers * layer + sum(_own(w, lay) for w in net.trained_ends)
    always = {
        "gradients of micro-steps": weights * FLOAT32 * (lay.accumulate > 1),
        "of the exchange meanwhile": flight.meanwhile,
    }
    inputs = {
        "weights in the compute dtype": weights * net.itemsize * (net.itemsize < FLOAT32),
        "layer inputs": net.layers * n * net.dim * net.itemsize / lay.cut("sequence"),
        "kept for the backward pass": net.layers * n * net.itemsize * _kept(net, lay),
    }
    head, logits = math.prod(net.head.shape) / t, n * net.vocab * FLOAT32 / t
    chunk = logits / lay.chunks(n, net.vocab)
    wide = n * net.dim * net.itemsize
    loss = {
        "head, gathered": head * net.itemsize,
        "head's gradient": head * FLOAT32,
        "chunk of logits": LOGIT_COPIES * chunk,
        "features and their gradient": 2 * wide,
    }
    backward = {
        "gradients": net.layers * layer * net.itemsize,
        "layers' weights, gathered": GATHERED_LAYERS * whole * net.itemsize,
        "a layer's activations": LIVE_WIDE * wide
        + n / t * net.itemsize * (LIVE_HIDDEN * net.mlp_dim + LIVE_HEADS * (net.queries + 2 * net.keys)),
    }
    update = {"gradients in float32": weights * FLOAT32, "messages": flight.messages}
    if not flight.is_coded:
        update["gradients in float32"] = max(0.0, weights * FLOAT32 - flight.messages)
    return {
        "the loss": always | inputs | loss,
        "the backward pass": always | inputs | backward,
        "the update": always | update,
    }


def _kept(net: Network, lay: Layout) -> float:
    """Elements that rematerialisation keeps of a token and layer, besides the layer's input."""
    matmuls = 2 * (net.queries + net.keys) + net.hidden * net.mlp_dim  # queries, keys, values, context; hidden
    return {"full": 0.0, "matmuls": matmuls / lay.cut("mlp")}[lay.remat]


def updated(net: Network, lay: Layout) -> float:
    """Bytes of memory that the optimizer reads and writes, and what adds up micro-steps."""
    each = UPDATE_BYTES + ADDED_BYTES * lay.accumulate * (lay.accumulate > 1)
    layer, ends = (sum(_own(w, lay) for w in weights) for weights in (net.trained_layer, net.trained_ends))
    return each * (net.layers * layer + ends)

"""A network and how it is laid over a mesh, as the planner's closed forms read them (work.py, sent.py, held.py)."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import jax

from parallel.layout import rules
from parallel.layout.axes import AXES, STAGE
from parallel.layout.pipeline import ticks

FLOAT32 = 4
T = TypeVar("T")


@dataclass(frozen=True)
class Weight:
    """name: the last two of its path. shape, axes: of a layer's, without its dimension of layers. model: the mesh axes
    that cut its model dimension, over which it is gathered for use. others: those that cut it besides, but stages."""

    name: str
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    model: tuple[str, ...]
    others: tuple[str, ...]

    @cached_property
    def size(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def cut(self) -> tuple[str, ...]:
        """All mesh axes that cut it, but stages."""
        return (*self.others, *self.model)

    @property
    def is_matrix(self) -> bool:
        return len(self.shape) > 1 and not self.name.endswith("bias")

    @property
    def is_routed(self) -> bool:
        """An expert's, of which each has one."""
        return "experts" in self.axes


@dataclass(frozen=True)
class Network:
    """layer: the weights of one. trained_…: the same, or adapters beside weights that lie in the compute dtype. hidden:
    arrays of F that the feed-forward half begins with. visible: keys that a query sees on average. itemsize: of the
    compute dtype. experts, chosen: of a layer and of a token; 0: one feed-forward half for all. dispatch:
    moe.dispatch and moe.rows. is_narrow: the optimizer's moments are bfloat16. first: layers before those with experts,
    of no ends, and no vocabulary."""

    layer: tuple[Weight, ...]
    ends: tuple[Weight, ...]
    trained_layer: tuple[Weight, ...]
    trained_ends: tuple[Weight, ...]
    layers: int
    dim: int
    mlp_dim: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    seq_len: int
    visible: float
    itemsize: int
    experts: int = 0
    chosen: int = 0
    dispatch: tuple[str, str] = ("", "")
    is_narrow: bool = False
    first: "Network | None" = None

    @classmethod
    def of(
        cls, weights: tuple, trained: tuple, model: Any, seq_len: int, compute: Any, is_narrow: bool = False
    ) -> "Network":
        """weights, trained: (shapes, axes), `blocks` with leading dimensions of layers. model, compute: its
        ModelConfig and Compute."""
        layer, ends, before = _weights(*weights)
        trained_layer, trained_ends, trained_before = _weights(*trained)
        window = min(seq_len, model.sliding_window or seq_len)
        own = cls(
            layer, ends, trained_layer, trained_ends, layers=model.num_layers, dim=model.model_dim,
            mlp_dim=model.mlp_dim, hidden=_hidden(layer),
            seq_len=seq_len, itemsize=compute.dtype.itemsize, heads=model.num_heads, kv_heads=model.num_kv_heads,
            head_dim=model.head_dim, vocab=model.vocab_size, visible=window - window**2 / (2 * seq_len),
            experts=model.moe.experts if model.moe else 0, chosen=model.moe.chosen if model.moe else 0,
            dispatch=compute.dispatch, is_narrow=is_narrow,
        )  # fmt: skip
        if not before:
            return own
        first = replace(
            own, layer=before, ends=(), trained_layer=trained_before, trained_ends=(), layers=model.moe.dense_layers,
            mlp_dim=model.moe.dense_dim, hidden=_hidden(before), vocab=0, experts=0, chosen=0, dispatch=("", ""),
        )  # fmt: skip
        return replace(own, first=first)

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def head(self) -> Weight:
        """What makes logits: a weight of its own, or the embedding."""
        return next((w for w in self.ends if w.name == "head"), self.ends[0])


def _hidden(layer: Sequence[Weight]) -> int:
    return sum(w.name.split("/")[0] == "mlp" and w.axes[-1] == "mlp" and w.is_matrix for w in layer)


def _weights(shapes: Any, axes: Any) -> tuple[tuple[Weight, ...], ...]:
    """Of a layer, of the ends, and of a layer before those with experts."""
    flat = dict(jax.tree_util.tree_leaves_with_path(axes, is_leaf=lambda x: isinstance(x, tuple)))
    found: dict[str, list[Weight]] = {"blocks": [], "": [], "first": []}
    for path, x in jax.tree_util.tree_leaves_with_path(shapes):
        names, own = [part.key for part in path], tuple(flat[path])
        inside, stack = names[0] == "blocks", names[0] if names[0] in found else ""
        model = {name for i, axis in enumerate(own) if axis == "embed" for name in rules.over(own, i)}
        others = set(rules.of(rules.spec(own))) - model - ({STAGE} if inside else set())
        leading = sum(axis in ("repeats", "layers", "first") for axis in own)  # those that only count layers
        name, shape, own = "/".join(names[-2:]), tuple(x.shape)[leading:], own[leading:]
        at = Weight(name, shape, own, _ordered(model), _ordered(others))
        found[stack].append(at)
    return tuple(map(tuple, found.values()))


def _ordered(axes: set[str]) -> tuple[str, ...]:
    return tuple(axis for axis in AXES if axis in axes)


@dataclass(frozen=True)
class Layout:
    """How a network is trained. sizes: of the mesh's axes. rows: windows of a device in a micro-step. remat, chunk:
    compute.remat (matmuls, offload, full), and bytes of float32 logits at a time. is_splash: attention by a TPU kernel.
    way: attention.context, as resolved. pipeline: pipeline.remat, pipeline.gather and pipeline.interleave."""

    sizes: Mapping[str, int]
    rows: int
    accumulate: int
    remat: str
    chunk: int
    is_splash: bool = False
    way: str = ""
    pipeline: tuple[str, str, int] = ("layer", "tick", 1)
    # What follows of the mesh alone, worked out once for all layouts on it.
    known: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def cut(self, axis: str) -> int:
        """Into how many parts a logical axis is cut."""
        return self.count(rules.RULES[axis])

    def over(self, axes: Sequence[str]) -> tuple[str, ...]:
        """Of these mesh axes those that have several devices, slowest first."""
        return tuple(axis for axis in AXES if axis in axes and self.sizes.get(axis, 1) > 1)

    def count(self, axes: tuple[str, ...]) -> int:
        """Devices of a group over these mesh axes."""
        if axes not in self.known:
            self.known[axes] = rules.shards(axes, self.sizes)
        return self.known[axes]

    def own(self, w: Weight, whole: bool = False) -> float:
        """Elements that a device has of a weight; `whole`: once its model dimension is gathered."""
        return w.size / self.count(w.others if whole else w.cut)

    @property
    def stages(self) -> int:
        return self.sizes.get(STAGE, 1)

    @property
    def ticks(self) -> int:
        """In which a device's layers are computed in a step."""
        return ticks(self.accumulate, self.stages, self.repeats)

    @property
    def repeats(self) -> int:
        """Runs of layers of a stage, of which it computes one in a tick."""
        return self.pipeline[2] if self.stages > 1 else 1

    @property
    def repeats_stages(self) -> bool:
        """Whether the backward pass works out a whole stage once more, before its layers."""
        return self.stages > 1 and self.pipeline[0] == "stage"

    @property
    def gathers_once(self) -> bool:
        """Whether a stage's weights are gathered once in a step, and kept."""
        return self.stages > 1 and self.pipeline[1] == "step"

    @property
    def slots(self) -> int:
        """Micro-batches of a device at the ends, where they are cut over stages."""
        return -(-self.accumulate // self.stages)

    @property
    def end_calls(self) -> int:
        """In which the ends are computed in a step: stages take all micro-batches at once."""
        return 1 if self.stages > 1 else self.accumulate

    def chunks(self, tokens: int, vocab: int) -> int:
        """Into how many parts logits are cut, one after another."""
        return max(1, math.ceil(tokens * vocab * FLOAT32 / self.cut("mlp") / self.chunk))


def outside(lay: Layout) -> Layout:
    """Of layers that are no part of a pipeline: all stages' devices cut rows, and the model dimension, as fsdp's do."""
    if lay.stages == 1:
        return replace(lay, known={})  # which is of another network
    sizes = {**lay.sizes, STAGE: 1, "fsdp": lay.sizes["fsdp"] * lay.stages}
    pipeline, rows = ("layer", "tick", 1), lay.rows * lay.slots
    return replace(lay, sizes=sizes, rows=rows, accumulate=lay.end_calls, pipeline=pipeline, known={})


def with_first(
    f: Callable[[Network, Layout], dict[str, float]], net: Network, lay: Layout, own: dict[str, float]
) -> dict[str, float]:
    """What f says of all layers. own: of those of the pipeline."""
    more = f(net.first, outside(lay)) if net.first else {}
    return {part: size + more.get(part, 0.0) for part, size in own.items()}


def of_mesh(f: Callable[[Network, Layout], T]) -> Callable[[Network, Layout], T]:
    """f, which reads of a layout its sizes alone."""

    @functools.wraps(f)
    def once(net: Network, lay: Layout) -> T:
        if f not in lay.known:
            lay.known[f] = f(net, lay)
        return lay.known[f]

    return once


@of_mesh
def layer_elements(net: Network, lay: Layout) -> tuple[float, float, float]:
    """(Of a layer's trained weights, those of a device; of all of its weights, once they are gathered; of these those
    of experts)."""
    whole = {w: lay.own(w, whole=True) for w in net.layer}
    routed = sum(size for w, size in whole.items() if w.is_routed)
    return sum(map(lay.own, net.trained_layer)), sum(whole.values()), routed


@of_mesh
def end_elements(net: Network, lay: Layout) -> float:
    """Of the trained weights at the ends, those of a device."""
    return sum(map(lay.own, net.trained_ends))


def tokens(net: Network, lay: Layout) -> int:
    """Of a device and micro-step, in its layers."""
    return lay.rows * net.seq_len // lay.cut("positions")


def end_tokens(net: Network, lay: Layout) -> int:
    """Of a device at the ends, in a call."""
    return tokens(net, lay) * (lay.slots if lay.stages > 1 else 1)


def layers(net: Network, lay: Layout) -> int:
    """Of a device."""
    return net.layers // lay.stages


def turns(net: Network, lay: Layout) -> int:
    """In which a device computes a layer, in a step."""
    return layers(net, lay) // lay.repeats * lay.ticks


def activation(net: Network, lay: Layout) -> float:
    """Bytes of a device between two layers, of a micro-step."""
    return tokens(net, lay) * net.dim * net.itemsize / lay.cut("vocab")

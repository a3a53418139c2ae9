"""LoRA: beside a matrix W that stays as it is two thin ones are trained, and W + scale · A B is used in its place (Hu
et al. 2021, eq. 3); scale is α / r, or α / sqrt(r) (rsLoRA, Kalajdzievski 2023).

A begins random and B with zeros, so that training begins with the model as it was. With `freeze_a` B alone is trained,
which makes what is used linear in what is trained: the mean of adapters is the adapter of the mean (FFA-LoRA, Sun et
al. 2024).

L layers, r rank. A weight is [*in, *out], between which the model dimension is cut off: [D, H, K] has in D, [H, K, D]
has in H, K. Its A is [*in, r] and its B [r, *out]; of a stack of layers, all have L in front.
"""

import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from model.config import Compute, ModelConfig
from model.transformer import STACKS, Params, Transformer, cast

Axes = tuple[str | None, ...]
ENDS = ("embed", "head")  # two names of one array, where embeddings are tied


class Adapted(NamedTuple):
    """A weight that has an adapter, in the place of the weight."""

    w: jax.Array
    a: jax.Array
    b: jax.Array


@dataclass(frozen=True)
class Site:
    """A weight that has an adapter. batch: leading dimensions that count matrices (1: layers). inner: those of `in`."""

    shape: tuple[int, ...]
    axes: Axes
    batch: int
    inner: int

    def of(self, sizes: tuple, rank: Any) -> dict[str, tuple]:
        """{"a", "b": its dimensions}. sizes: of each dimension of the weight, whatever they say of it."""
        layers, rest = sizes[: self.batch], sizes[self.batch :]
        return {"a": (*layers, *rest[: self.inner], rank), "b": (*layers, rank, *rest[self.inner :])}

    @property
    def matrix(self) -> tuple[int, int]:
        """(in, out)."""
        rest = self.shape[self.batch :]
        return math.prod(rest[: self.inner]), math.prod(rest[self.inner :])


@dataclass(frozen=True)
class Lora:
    """Which weights have an adapter, and of what kind. sites: by path."""

    rank: int
    scale: float
    freeze_a: bool
    sites: Mapping[str, Site]

    @classmethod
    def of(cls, c: Any, shapes: Params, axes: Params, tied: bool) -> "Lora":
        """c: the config's group `lora`. shapes, axes: of the model's weights. Raises ValueError for a pattern without a
        matrix, a rank that is no less than full, and an embedding that is the head, too."""
        matching = {name: x for name, x in _paths(shapes).items() if re.search(c.pattern, name)}
        if not matching:
            raise ValueError(f"lora.pattern={c.pattern!r} matches no weight: they are {', '.join(_paths(shapes))}")
        flat = _paths(axes)
        if routed := [name for name in matching if "experts" in flat[name] or name.endswith("/router")]:
            raise ValueError(
                f"lora.pattern={c.pattern!r} matches {routed[0]}: experts and routers have no adapters. Set "
                "lora.pattern=attention, or another one without them"
            )
        sites = {name: site for name, x in matching.items() if (site := _site(tuple(x.shape), flat[name]))}
        if not sites:
            raise ValueError(
                f"lora.pattern={c.pattern!r} matches {', '.join(matching)}, and none of them is a matrix: only "
                "those have a low rank"
            )
        if tied and (ends := [name for name in ENDS if name in sites]):
            raise ValueError(
                f"lora.pattern={c.pattern!r} matches {ends[0]}, which is the embedding and the head at once "
                "(model.tie_embeddings): an adapter of one would change the other. Choose a pattern without it"
            )
        name, least = min(((name, min(site.matrix)) for name, site in sites.items()), key=lambda found: found[1])
        if c.rank >= least:
            raise ValueError(
                f"lora.rank={c.rank}: {name} is a matrix of {' × '.join(map(str, sites[name].matrix))}, so a rank of "
                f"{least} is no less than its own. Choose a smaller one, or a lora.pattern without it"
            )
        return cls(c.rank, c.alpha / (math.sqrt(c.rank) if c.rs else c.rank), c.freeze_a, sites)

    # ── trees: of what is trained, and with freeze_a of what a state holds besides ──────────────────────────────

    @property
    def trained(self) -> tuple[str, ...]:
        return ("b",) if self.freeze_a else ("a", "b")

    @property
    def fixed(self) -> tuple[str, ...]:
        return ("a",) if self.freeze_a else ()

    def axes(self, parts: tuple[str, ...]) -> Params:
        """Logical axes; the rank is whole on every device."""
        return self._tree(parts, lambda name, site: site.of(site.axes, None))

    def init(self, key: jax.Array, parts: tuple[str, ...]) -> Params:
        """float32. Uniform within ±1 / sqrt(in) and zeros; the key of each weight depends on its path alone."""

        def draw(name: str, site: Site) -> dict[str, jax.Array]:
            shapes, bound = site.of(site.shape, self.rank), 1 / math.sqrt(site.matrix[0])
            own = jax.random.fold_in(key, zlib.crc32(name.encode()))
            return {"a": jax.random.uniform(own, shapes["a"], minval=-bound, maxval=bound), "b": jnp.zeros(shapes["b"])}

        return self._tree(parts, draw)

    def _tree(self, parts: tuple[str, ...], make: Any) -> Params:
        """{…: {part: make(path, site)[part]}}, nested as the weights are."""
        tree: Params = {}
        for name, site in self.sites.items() if parts else ():
            node, found = tree, make(name, site)
            for folder in name.split("/"):
                node = node.setdefault(folder, {})
            node |= {part: found[part] for part in parts}
        return tree

    def pairs(self, *adapters: Params) -> dict[str, tuple[Any, Any]]:
        """{path of a weight: its A and B}. adapters: trees whose leaves are all of them."""
        found: dict[str, Any] = {}
        for adapter in adapters:
            found |= _paths(adapter)
        return {name: (found[f"{name}/a"], found[f"{name}/b"]) for name in self.sites}

    def join(self, weights: Params, *adapters: Params) -> Params:
        """The weights with Adapted where there is an adapter: what `Tuned` takes. Nothing is computed."""
        pairs = self.pairs(*adapters)

        def one(path, w: Any) -> Any:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return Adapted(w, *pairs[name]) if name in self.sites else w

        return jax.tree_util.tree_map_with_path(one, weights)

    def merge(self, weights: Params, *adapters: Params) -> Params:
        """W + scale · A B of all of them, in the dtype of the weights."""

        def one(path, x: Any) -> jax.Array:
            stacked = isinstance(x, Adapted) and path[0].key in STACKS
            return jax.vmap(self.effective)(x) if stacked else self.effective(x)

        joined = self.join(weights, *adapters)
        return jax.tree_util.tree_map_with_path(one, joined, is_leaf=lambda x: isinstance(x, Adapted))

    def effective(self, x: Any) -> jax.Array:
        """One matrix, worked out in float32 at least and rounded once; what has no adapter as it is."""
        if not isinstance(x, Adapted):
            return x
        dtype = jnp.promote_types(jnp.float32, x.w.dtype)
        # As a product with a batch of one, which compute.remat=dots does not keep: it would keep all layers' weights.
        sides = (((x.a.ndim,), (1,)), ((0,), (0,)))
        (product,) = lax.dot_general(x.a[None], x.b[None], sides, preferred_element_type=dtype)
        return (x.w.astype(dtype) + self.scale * product).astype(x.w.dtype)


def _site(shape: tuple[int, ...], axes: Axes) -> Site | None:
    """None for what is no matrix: it has the model dimension first or last, and another one."""
    batch = int(axes[0] in ("layers", "first"))
    rest = axes[batch:]
    if len(rest) < 2 or "embed" not in (rest[0], rest[-1]):
        return None
    return Site(shape, axes, batch, 1 if rest[0] == "embed" else len(rest) - 1)


def _paths(tree: Params) -> dict[str, Any]:
    """Leaves, or tuples of axes, by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, tuple))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


class Tuned(Transformer):
    """A Transformer among whose weights are Adapted ones (Lora.join). Those of a layer become one inside of the loop
    over layers, on the shards they lie in: what is gathered over the mesh is one matrix, as without an adapter."""

    def __init__(self, config: ModelConfig, compute: Compute, z_loss: float, router: tuple, lora: Lora):
        super().__init__(config, compute, z_loss, router)
        self.lora = lora
        if self.first:
            self.first.used = self.used

    def frozen(self, weights: Params) -> Params:
        """As they lie beside what is trained: in the compute dtype, in which they are used."""
        return cast(weights, self.compute.dtype)

    def used(self, weights: Params) -> Params:
        return jax.tree.map(self.lora.effective, weights, is_leaf=lambda x: isinstance(x, Adapted))

    def features(self, params: Params, *more: Any, **others: Any) -> tuple:
        ends = self.used({name: w for name, w in params.items() if name not in STACKS})
        return super().features(params | ends, *more, **others)

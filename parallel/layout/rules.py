"""From logical axes to mesh axes: one table; and what PartitionSpecs say."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Axes = Sequence[str | None]

# Weights are cut over `fsdp` and `context` by their model dimension, over `tensor` by heads, features or vocabulary,
# over `stage` by layers, over `expert` by experts, or else by the model dimension. Activations: the batch over `fsdp`
# and `expert`, sequences over `context`, and between blocks over `tensor` too.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("fsdp", "expert"),
    "rows": ("fsdp", "expert", "stage"),  # of the batch, outside of the layers
    "positions": ("context",),
    "sequence": ("context", "tensor"),
    "token": ("fsdp", "expert", "stage", "context"),  # rows and positions at once
    "vocab": ("tensor",),
    "embed": ("fsdp", "expert", "stage", "context"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "layers": ("stage",),
    "experts": ("expert",),
    # Layers of repeats, and before those of stages; scores of experts; what follows from counts, and is sent as it is.
    **dict.fromkeys(("head_dim", "norm", "repeats", "first", "scores", "counts"), ()),
}
BATCH = ("first", "repeats", "layers", "experts")  # dimensions that only count arrays


def over(axes: Axes, i: int) -> tuple[str, ...]:
    """The mesh axes over which dimension i of an array with these logical axes is cut: first by layers and experts."""
    axis, first = axes[i], axes[:i] if axes[i] in BATCH else axes
    taken = [name for each in BATCH if each in first for name in RULES[each]]
    return tuple(name for name in RULES[axis] if name not in taken) if axis else ()


def spec(axes: Axes) -> P:
    """The PartitionSpec of an array with these logical axes (None: not sharded)."""
    cuts = [over(axes, i) for i in range(len(axes))]
    used = of(cuts)
    if len(used) != len(set(used)):
        raise ValueError(f"logical axes {tuple(axes)} put two dimensions on one mesh axis: {list(used)}")
    return P(*(cut if len(cut) > 1 else cut[0] if cut else None for cut in cuts))


def names(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a PartitionSpec: None, an axis, or several."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def of(spec: Any) -> tuple[str, ...]:
    """All mesh axes of a PartitionSpec."""
    return tuple(axis for entry in spec for axis in names(entry))


def without(spec: P, axes: Sequence[str]) -> P:
    """Cut over all its mesh axes but these."""
    return P(*(tuple(axis for axis in names(entry) if axis not in axes) or None for entry in spec))


def shards(entry: Any, sizes: Mapping[str, int]) -> int:
    """Into how many parts a dimension with this entry is cut, on a mesh of these sizes, 1 where none is given."""
    return math.prod(sizes.get(axis, 1) for axis in names(entry))


def specs(axes_tree: Any) -> Any:
    """PartitionSpecs for a tree of logical axes."""
    return jax.tree.map(spec, axes_tree, is_leaf=lambda x: isinstance(x, tuple))


def shardings(mesh: Mesh, specs_tree: Any) -> Any:
    return jax.tree.map(lambda s: NamedSharding(mesh, s), specs_tree, is_leaf=lambda x: isinstance(x, P))


class Constrain:
    """What the model may ask of the mesh, in logical axes only. `mesh=None`: one device, everything is a no-op.
    micro: how many micro-batches a batch is for stages; 0: as suits them. apart: mesh axes that it knows nothing of."""

    def __init__(self, mesh: Mesh | None, micro: int = 0, apart: tuple[str, ...] = ()):
        self.mesh, self.micro, self.apart = mesh, micro, apart

    def __call__(self, x: jax.Array, axes: Axes) -> jax.Array:
        """Fixes how an activation (or a gathered weight) is sharded."""
        return x if self.mesh is None else lax.with_sharding_constraint(x, NamedSharding(self.mesh, self._spec(axes)))

    def _spec(self, axes: Axes) -> P:
        return without(spec(axes), self.apart)

    def both_ways(self, x: jax.Array, axes: Axes, *cotangent: Axes) -> jax.Array:
        """Fixes also how the cotangent is sharded, one way after another: what is gathered for two products is gathered
        once, where XLA would gather it for each."""
        there = jax.custom_vjp(lambda x: self(x, axes))
        there.defvjp(lambda x: (self(x, axes), None), lambda _, d: (functools.reduce(self, cotangent, d),))
        return there(x)

    def manual(self, f: Callable, in_axes: Sequence[Axes], out_axes: Any, sums: Sequence[str] = ()) -> Callable:
        """Runs `f` on each device's own shards (shard_map, manual over all mesh axes). in_axes, out_axes: logical axes
        of each argument and result. sums[i]: the logical axis over which result i is a partial sum; it is added up
        here, once, scattered if the result is sharded over that mesh axis."""
        if self.mesh is None:
            return f
        several = bool(sums) or isinstance(out_axes[0], tuple)
        out_specs = tuple(map(self._spec, out_axes)) if several else self._spec(out_axes)

        def body(*args):
            results = f(*args)
            if not sums:
                return results
            return tuple(_add_up(x, axis, s) for x, axis, s in zip(results, sums, out_specs, strict=True))

        # check_vma=False: with it on, differentiation would add reductions of its own (and over `replica`, bytes).
        return jax.shard_map(
            body, mesh=self.mesh, in_specs=tuple(map(self._spec, in_axes)), out_specs=out_specs, check_vma=False
        )

    def scan(self, layer: Callable, x: Any, weights_L: Any, cast: Callable) -> Any:
        """x through all layers, and what each found: layer(x, weights) -> both. Weights are cast before the first."""
        return lax.scan(layer, x, cast(weights_L))

    def stages(self, x_BT: jax.Array, compute: Any) -> Any:
        """How such a batch goes through layers that are cut over devices (pipeline.py); None: each has them all."""
        from parallel.layout import pipeline

        return pipeline.Stages(self, x_BT.shape[0], *compute.pipeline) if self.size("layers") > 1 else None

    def experts(self, dispatch: tuple[str, str]) -> Any:
        """How tokens come to theirs (experts.py)."""
        from parallel.layout import experts

        return experts.Experts(self, dispatch)

    def size(self, axis: str) -> int:
        """Into how many shards a logical axis is cut."""
        return 1 if self.mesh is None else shards(RULES[axis], self.mesh.shape)

    def sequences(self, way: str) -> Any:
        """How they lie on devices that have parts of them, and attend (ring.py); None: each has them whole."""
        from parallel.layout import ring

        return ring.Sequences(self, way) if self.size("positions") > 1 else None

    # Inside `manual` only:

    def index(self, axis: str) -> jax.Array | int:
        """This device's place along a logical axis."""
        return 0 if self.mesh is None else lax.axis_index(RULES[axis])

    def sum(self, x: jax.Array, axis: str) -> jax.Array:
        return x if self.mesh is None else lax.psum(x, RULES[axis])

    def gather(self, x: jax.Array, axis: str, dim: int) -> jax.Array:
        """The shards along a logical axis, one after another in dimension `dim`."""
        return x if self.mesh is None else lax.all_gather(x, RULES[axis], axis=dim, tiled=True)

    def scatter(self, x: jax.Array, axis: str, dim: int) -> jax.Array:
        """The sum along a logical axis, cut along dimension `dim`."""
        return x if self.mesh is None else lax.psum_scatter(x, RULES[axis], scatter_dimension=dim, tiled=True)

    def transpose(self, x: jax.Array, axis: str, cut: int, joined: int) -> jax.Array:
        """Cut along dimension `cut` by a logical axis whose mesh axis had cut dimension `joined`. In steps: of an
        all-to-all along two dimensions XLA:GPU chooses a layout that the whole residual stream would follow."""
        if self.size(axis) == 1:
            return x
        n = lax.axis_size(RULES[axis])
        x = x.reshape(*x.shape[:cut], n, x.shape[cut] // n, *x.shape[cut + 1 :])
        x = lax.all_to_all(jnp.moveaxis(x, cut, 0), RULES[axis], 0, 0, tiled=True)
        x = jnp.moveaxis(x, 0, joined)
        return x.reshape(*x.shape[:joined], n * x.shape[joined + 1], *x.shape[joined + 2 :])

    def max(self, x: jax.Array, axis: str) -> jax.Array:
        return x if self.mesh is None else lax.pmax(x, RULES[axis])


def _add_up(x: jax.Array, axis: str, out_spec: P) -> jax.Array:
    over = RULES[axis]
    dims = [i for i, entry in enumerate(out_spec) if names(entry)[-len(over) :] == over]
    return lax.psum_scatter(x, over, scatter_dimension=dims[0], tiled=True) if dims else lax.psum(x, over)

"""A model's weights for decoding: one array per layer, as [out, in], q, k and v in one, gate and up in one, in the
compute dtype; cut over `tensor`, experts over `expert` too, and else whole on each device of both and of `fsdp`, which
has slots of its own.

A product with such rows reads memory in its order, and a scan over stacked layers would copy each layer's part first.

D model, E features of one product, F feed-forward, H query heads, G key/value heads, K head size, V vocabulary.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from model.config import ModelConfig
from parallel.layout import rules
from parallel.layout.axes import EXPERT

Weights = dict[str, Any]
OUT, IN, WHOLE = P("tensor"), P(None, "tensor"), P()  # how an array [out, in] is cut
EACH_OUT, EACH_IN = P(EXPERT, "tensor"), P(EXPERT, None, "tensor")  # of every expert
FLOAT32 = ("norm", "scores", "counts")  # as in training


def _out(*parts: jax.Array) -> jax.Array:
    """[D, …] each -> [E, D], one after another."""
    return jnp.concatenate([w.reshape(w.shape[0], -1).T for w in parts])


def _in(w: jax.Array) -> jax.Array:
    """[…, D] -> [D, E]."""
    return w.reshape(-1, w.shape[-1]).T


def _flat(*parts: jax.Array) -> jax.Array:
    """Biases, one after another."""
    return jnp.concatenate([b.reshape(-1) for b in parts])


def _each_out(*parts: jax.Array) -> jax.Array:
    """[X, D, …] of X experts -> [X, E, D]."""
    return jnp.concatenate([w.swapaxes(1, 2) for w in parts], axis=1)


def _each_in(w: jax.Array) -> jax.Array:
    """[X, E, D] -> [X, D, E]."""
    return w.swapaxes(1, 2)


def _same(x: jax.Array) -> jax.Array:
    return x


Row = tuple[Callable[..., jax.Array], P, tuple[str, ...]]  # how it is made, how it is cut, of which arrays of ours


def table(c: ModelConfig) -> dict[str, Row]:
    """{name of a layer's array: how it is made}. Names with a slash are of the model's own tree."""
    rows: dict[str, Row] = {
        "qkv": (_out, OUT, ("attention/q", "attention/k", "attention/v")),
        "out": (_in, IN, ("attention/out",)),
    }
    feed = ("mlp/gate", "mlp/up") if c.mlp == "swiglu" else ("mlp/up",)
    if c.moe is None:
        rows |= {"up": (_out, OUT, feed), "down": (_in, IN, ("mlp/down",))}
    else:
        rows |= {"router": (_out, WHOLE, ("mlp/router",))}
        rows |= {"experts_up": (_each_out, EACH_OUT, feed), "experts_down": (_each_in, EACH_IN, ("mlp/down",))}
        rows |= {"balance_bias": (_same, WHOLE, ("mlp/balance_bias",))} if c.moe.balance == "bias" else {}
    if c.moe and c.moe.shared:
        shared = tuple(name.replace("mlp/", "mlp/shared/") for name in feed)
        rows |= {"up": (_out, OUT, shared), "down": (_in, IN, ("mlp/shared/down",))}
    if c.bias != "none":
        rows["qkv_bias"] = (_flat, OUT, ("attention/q_bias", "attention/k_bias", "attention/v_bias"))
    if c.bias == "all":
        rows["out_bias"] = (_same, WHOLE, ("attention/out_bias",))
    if c.bias == "all" and c.mlp == "gelu":
        rows |= {"up_bias": (_flat, OUT, ("mlp/up_bias",)), "down_bias": (_same, WHOLE, ("mlp/down_bias",))}
    norms = ["attention_norm", "mlp_norm", *(["attention/q_norm", "attention/k_norm"] if c.qk_norm else [])]
    for norm in norms:
        rows[norm.rpartition("/")[2]] = (_same, WHOLE, (f"{norm}/scale",))
        if c.norm == "layer" and "/" not in norm:
            rows[f"{norm}_bias"] = (_same, WHOLE, (f"{norm}/bias",))
    return rows


def ends_table(c: ModelConfig) -> dict[str, Row]:
    """The same of what is no layer. The head of a tied model is its embedding, [V, D] both."""
    rows: dict[str, Row] = {"embed": (_same, OUT, ("embed",)), "final_norm": (_same, WHOLE, ("final_norm/scale",))}
    if c.norm == "layer":
        rows["final_norm_bias"] = (_same, WHOLE, ("final_norm/bias",))
    if c.position == "learned":
        rows["position"] = (_same, WHOLE, ("position",))
    if not c.tie_embeddings:
        rows["head"] = (_out, OUT, ("head",))
    return rows


def stacks(c: ModelConfig) -> list[tuple[str, ModelConfig]]:
    """Of the parameters those that are stacked over layers, in the order of these: (name, what its layers are)."""
    return [*([("first", c.moe.before(c))] if c.moe and c.moe.dense_layers else []), ("blocks", c)]


def specs(c: ModelConfig) -> Weights:
    """How each array is cut."""
    of = lambda rows: {name: spec for name, (_, spec, _) in rows.items()}
    return of(ends_table(c)) | {"layers": [of(table(own)) for _, own in stacks(c) for _ in range(own.num_layers)]}


def unstack(params: Mapping[str, Any], axes: Mapping[str, Any], c: ModelConfig, dtype: Any, mesh: Mesh) -> Weights:
    """From a model's parameters, which are used up: an array is given back as soon as what is made of it is there, so
    there are never two copies of more than the arrays of one product. axes: of the parameters."""
    found: Weights = {"layers": []}
    for stack, own in stacks(c):
        own_layers: list[dict[str, jax.Array]] = [{} for _ in range(own.num_layers)]
        for name, (make, spec, of) in table(own).items():
            arrays, logical = _taken(params[stack], axes[stack], of)
            make_layer = _maker(make, spec, logical, dtype, mesh, stacked=True)
            for number, layer in enumerate(own_layers):
                layer[name] = make_layer(jnp.int32(number), *arrays)
            _delete(arrays)
        found["layers"] += own_layers
    for name, (make, spec, of) in ends_table(c).items():
        arrays, logical = _taken(params, axes, of)
        found[name] = _maker(make, spec, logical, dtype, mesh, stacked=False)(jnp.int32(0), *arrays)
        _delete(arrays)
    return found


def abstract(shapes: Mapping[str, Any], axes: Mapping[str, Any], c: ModelConfig, dtype: Any, mesh: Mesh) -> Weights:
    """Shapes, dtypes and shardings of what `unstack` makes of parameters of these shapes."""

    def made(rows: Mapping[str, Row], tree: Any, of_axes: Any, stacked: bool) -> Weights:
        found = {}
        for name, (make, spec, of) in rows.items():
            arrays, logical = _taken(tree, of_axes, of)
            maker, layer = _maker(make, spec, logical, dtype, mesh, stacked), jax.ShapeDtypeStruct((), jnp.int32)
            x = jax.eval_shape(maker, layer, *arrays)
            found[name] = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
        return found

    of_stack = {stack: made(table(own), shapes[stack], axes[stack], True) for stack, own in stacks(c)}
    layers = [of_stack[stack] for stack, own in stacks(c) for _ in range(own.num_layers)]
    return made(ends_table(c), shapes, axes, False) | {"layers": layers}


def _maker(make: Callable, spec: P, logical: Any, dtype: Any, mesh: Mesh, stacked: bool) -> Callable:
    """f(layer, *arrays) of one layer's array."""

    def body(layer: jax.Array, *arrays: jax.Array) -> jax.Array:
        parts = [_gathered(lax.dynamic_index_in_dim(x, layer, keepdims=False) if stacked else x, axes[stacked:], spec)
                 for x, axes in zip(arrays, logical, strict=True)]  # fmt: skip
        found = make(*parts)
        return found if logical[0][-1] in FLOAT32 else found.astype(dtype)

    in_specs = (P(), *(rules.spec(axes) for axes in logical))
    return jax.jit(jax.shard_map(body, mesh=mesh, in_specs=in_specs, out_specs=spec, check_vma=False))


def _gathered(x: jax.Array, axes: tuple, spec: P) -> jax.Array:
    """Cut over no mesh axes but those of `spec`."""
    for dim in range(x.ndim):
        cut = tuple(axis for axis in rules.over(axes, dim) if axis not in rules.of(spec) and lax.axis_size(axis) > 1)
        x = lax.all_gather(x, cut, axis=dim, tiled=True) if cut else x
    return x


def _taken(tree: Any, axes: Any, names: tuple[str, ...]) -> tuple[list[Any], list[tuple]]:
    def at(tree: Any, name: str) -> Any:
        for part in name.split("/"):
            tree = tree[part]
        return tree

    return [at(tree, name) for name in names], [at(axes, name) for name in names]


def _delete(arrays: list[Any]) -> None:
    for x in jax.block_until_ready(arrays):
        x.delete()

"""The network: a decoder-only transformer, one definition for GPT-2, Llama and Qwen.

Weights live outside the modules, in a plain nested dict (`params`), so that every other room sees arrays and names
only. Layers are stacked: each weight of a block is one array with a leading layer dimension, whether the layers run
as a scan or unrolled. No mesh axis is named here; logical axes are, and `constrain` maps them
(parallel/layout/rules.py).

B batch, T sequence, D model, H query heads, G key/value heads, K head size, F feed-forward, V vocabulary, L layers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import normal

from model.attention import KERNELS, Attention, rope_tables
from model.config import Compute, ModelConfig
from model.fused import PRODUCTS
from model.gpt2 import GELU, LayerNorm
from model.layers import RMSNorm, SwiGLU, Weights
from model.loss import cross_entropy
from model.remat import POLICIES

Params = dict[str, Any]

RESIDUAL = ("batch", "sequence", None)  # between blocks: sharded over the sequence too (sequence-parallel)
GATHERED = ("batch", "positions", None)  # inside a block: longer parts of it, or all; sharded heads or features
OUTSIDE = ("rows", "positions")  # of the blocks
FLOAT32 = ("scale", "router", "balance_bias")
FIRST, STACKS = "first", ("first", "blocks")  # parameters of stacked layers: of model/first.py, and of those after them
NORMS = {"rms": RMSNorm, "layer": LayerNorm}
MLPS = {"swiglu": SwiGLU, "gelu": GELU}


@dataclass(frozen=True)
class Context:
    """What every block of one forward pass sees."""

    constrain: Any
    attention: Any
    rope: tuple[jax.Array, jax.Array] | None
    segments_BT: jax.Array | None
    dispatch: tuple[str, str]


class Block(nnx.Module):
    def __init__(self, c: ModelConfig, key: jax.Array):
        sub, norm = Weights(key).sub, NORMS[c.norm]
        self.attention_norm = norm(c, sub("attention_norm"), c.model_dim, "norm")
        self.attention = Attention(c, sub("attention"))
        self.mlp_norm = norm(c, sub("mlp_norm"), c.model_dim, "norm")
        self.mlp = (c.moe.half if c.moe else MLPS[c.mlp])(c, sub("mlp"))

    def __call__(self, x_BTD: jax.Array, ctx: Context) -> tuple[jax.Array, Any]:
        found = None
        for norm, half in ((self.attention_norm, self.attention), (self.mlp_norm, self.mlp)):
            # Normed before it is gathered: in the compute dtype, when it is worked out again, too.
            h_BTD = ctx.constrain(ctx.constrain(norm(x_BTD), RESIDUAL), GATHERED)
            y_BTD, found = half(h_BTD, ctx)
            y_BTD = ctx.constrain.both_ways(y_BTD, RESIDUAL, RESIDUAL, GATHERED)
            x_BTD = ctx.constrain(x_BTD + y_BTD, RESIDUAL)
        return x_BTD, found


class Ends(nnx.Module):
    """What is not a block: embedding, final norm, head."""

    def __init__(self, c: ModelConfig, key: jax.Array):
        weight, V, D = Weights(key), c.vocab_size, c.model_dim
        self.embed = weight("embed", (V, D), ("vocab", "embed"), normal(c.init_std))
        if c.position == "learned":
            self.position = weight("position", (c.max_seq_len, D), (None, "embed"), normal(c.init_std))
        self.final_norm = NORMS[c.norm](c, weight.sub("final_norm"), D, "norm")
        if not c.tie_embeddings:
            self.head = weight("head", (D, V), ("embed", "vocab"), normal(c.init_std))


class Transformer:
    """Pure functions of `params`: init, forward, loss. Holds no array. router: moe.balance_weight and moe.z_loss."""

    used = staticmethod(lambda weights: weights)  # of a layer, in its products: model/lora.py has others

    def __init__(self, config: ModelConfig, compute: Compute, z_loss: float = 0.0, router: tuple = (0.0, 0.0)):
        self.config, self.compute, self.z_loss, self.router = config, compute, z_loss, router
        self.cast = partial(cast, dtype=compute.dtype)  # before XLA gathers any shard: half of the bytes in bf16
        key = jax.eval_shape(lambda: jax.random.key(0))
        self._ends, ends_state = nnx.split(nnx.eval_shape(partial(Ends, config), key))
        self._block, block_state = nnx.split(nnx.eval_shape(partial(Block, config), key))
        self.axes: Params = _axes(ends_state, ())  # same tree as params, a tuple of logical axes for each weight
        self.repeats = compute.pipeline[2]
        self._leading = ("repeats", "layers")[self.repeats == 1 :]
        self.axes["blocks"] = _axes(block_state, self._leading)
        self.first = config.moe.first(config, compute) if config.moe else None
        self.axes |= {FIRST: self.first.axes["blocks"]} if self.first else {}

    def init(self, key: jax.Array) -> Params:
        """Random params, float32. Layer l draws from fold_in(key, l): the same for scanned and unrolled layers."""
        c = self.config
        params = nnx.to_pure_dict(nnx.state(Ends(c, Weights(key).sub("ends"))))
        keys_L = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(c.num_layers))
        blocks = jax.vmap(lambda k: nnx.to_pure_dict(nnx.state(Block(c, k))))(keys_L)
        grouped = lambda w: w.reshape(self.repeats, -1, *w.shape[1:]) if self.repeats > 1 else w
        params["blocks"] = jax.tree.map(grouped, blocks)
        return params | ({FIRST: self.first.init(Weights(key).sub(FIRST))["blocks"]} if self.first else {})

    def features(
        self, params: Params, tokens_BT: jax.Array, constrain, segments_BT=None, in_order: bool = True
    ) -> tuple:
        """Final features x_BTD and the head's weight [D, V], both in the compute dtype (logits are x_BTD @ head), and
        what layers found. in_order: as the tokens are; else as positions lie on devices."""
        c, positions_BT = self.config, _positions(tokens_BT, segments_BT)
        if cut := constrain.sequences(self.compute.context):
            tokens_BT, positions_BT, segments_BT = *map(cut.spread, (tokens_BT, positions_BT)), cut.known(segments_BT)
        known = positions_BT, segments_BT
        if stages := constrain.stages(tokens_BT, self.compute):
            tokens_BT, positions_BT = (stages.start(x, OUTSIDE[1:]) for x in (tokens_BT, positions_BT))
        x_BTD = self._embedded(params, tokens_BT, positions_BT, constrain)
        if self.first:
            x_BTD = self.first.through(constrain, stages, cut, (positions_BT, segments_BT), x_BTD, params[FIRST])
        ends = {name: w for name, w in params.items() if name not in STACKS}
        ends, layer = nnx.merge(self._ends, self.cast(ends)), partial(self._layer, cut)
        if stages:
            weights, policy = (params["blocks"], self.axes["blocks"], self.cast), POLICIES[self.compute.remat]
            x_BTD, found = stages.run(layer, known, x_BTD, *weights, policy)
        else:
            x_BTD, found = self._run(constrain, layer(constrain, known), x_BTD, params["blocks"])
        x_BTD = constrain(ends.final_norm(x_BTD), (*OUTSIDE, None))
        head_DV = ends.embed[...].T if c.tie_embeddings else ends.head[...]
        x_BTD = stages.back(x_BTD, GATHERED[1:]) if stages and in_order else x_BTD
        return cut.back(x_BTD) if cut and in_order else x_BTD, head_DV, found

    def _embedded(self, params: Params, tokens_BT: jax.Array, positions_BT: jax.Array, constrain) -> jax.Array:
        """Embeddings of the tokens (and of learned positions), sharded as RESIDUAL."""
        names = ("embed", "position") if self.config.position == "learned" else ("embed",)
        look_up = partial(_look_up, constrain=constrain, dtype=self.compute.dtype)
        axes = (*[OUTSIDE] * 2, *(self.axes[name] for name in names)), ("rows", *RESIDUAL[1:])
        return constrain.manual(look_up, *axes)(tokens_BT, positions_BT, *(params[name] for name in names))

    def _layer(self, cut: Any, constrain, known: tuple) -> Callable:
        """A block, (x_BTD, weights) -> (x_BTD, what it found). known: positions and segments of these rows, [B, T]."""
        c, name, (positions_BT, segments_BT) = self.config, self.compute.attention, known
        rope = rope_tables(positions_BT, c.head_dim, c.rope_theta, c.rope_scaling) if c.position == "rope" else None
        kept = lambda *arrays: checkpoint_name(KERNELS[name](*arrays), "context")
        attention = cut.attention(KERNELS[name], PRODUCTS[name]) if cut else kept
        ctx = Context(constrain, attention, rope, segments_BT, self.compute.dispatch)
        is_axes = lambda x: isinstance(x, tuple)
        axes = jax.tree.map(lambda axes: axes[len(self._leading) :], self.axes["blocks"], is_leaf=is_axes)
        # Weights are gathered before they are used: XLA:TPU would make products of their parts, even of small ones.
        parts = lambda axes: [None if axis == "embed" and axes[0] != "experts" else axis for axis in axes]
        whole = lambda w, axes: constrain.both_ways(w, parts(axes), axes)

        def layer(x_BTD: jax.Array, weights: Params) -> tuple[jax.Array, Any]:
            weights = jax.tree.map(whole, self.used(self.cast(weights)), axes)
            return nnx.merge(self._block, weights)(x_BTD, ctx)

        policy = POLICIES[self.compute.remat]
        return jax.checkpoint(layer, policy=policy, prevent_cse=self.compute.unroll) if policy else layer

    def _run(self, constrain, layer: Callable, x_BTD: jax.Array, blocks: Params) -> tuple[jax.Array, Any]:
        if not self.compute.unroll:
            return constrain.scan(layer, x_BTD, blocks, self.cast)
        found = [None] * self.config.num_layers
        for index in range(len(found)):
            x_BTD, found[index] = layer(x_BTD, jax.tree.map(lambda w: w[index], blocks))  # noqa: B023
        return x_BTD, jax.tree.map(lambda *x: jnp.stack(x), *found)

    def loss(self, params: Params, batch: dict[str, jax.Array], constrain) -> tuple:
        """Cross-entropy in nats, summed over the unmasked targets, and their number; of experts, further sums. batch:
        tokens, targets int32 [B, T]; mask float32 [B, T]; optionally segments int32 [B, T], the number of the document
        inside the window: positions attend within their document only."""
        tokens_BT, segments_BT = batch["tokens"], batch.get("segments")
        x_BTD, head_DV, found = self.features(params, tokens_BT, constrain, segments_BT, in_order=False)
        targets_BT, mask_BT = batch["targets"], batch["mask"]
        if cut := constrain.sequences(self.compute.context):
            targets_BT, mask_BT = cut.spread(targets_BT), cut.spread(mask_BT)
        if stages := constrain.stages(targets_BT, self.compute):
            targets_BT, mask_BT = (stages.end(x, OUTSIDE[1:]) for x in (targets_BT, mask_BT))
        arrays, chunk_bytes = (x_BTD, head_DV, targets_BT, mask_BT), self.compute.loss_chunk_mib << 20
        total = cross_entropy(*arrays, constrain, z_loss=self.z_loss, chunk_bytes=chunk_bytes)
        plainly = total, jnp.sum(batch["mask"])
        return plainly if found is None else self.config.moe.added(total, batch["mask"], found, self.router)


def _look_up(tokens_BT, positions_BT, embed_VD, position_TD=None, *, constrain, dtype) -> jax.Array:
    """Rows of the embedding, on each device's shard of it: every device looks up its columns and its part of the
    vocabulary for the tokens of all batch shards, and hands on what belongs to others. Neither the table nor its
    gradient, which adds up in float32, ever leaves its shards; left to XLA, it may cross any axis, `replica` too."""
    C, all_BT = constrain.size("positions"), lambda x: constrain.gather(constrain.gather(x, "positions", 1), "rows", 0)
    ids_BT = all_BT(tokens_BT) - constrain.index("vocab") * embed_VD.shape[0]
    own_BT = (ids_BT >= 0) & (ids_BT < embed_VD.shape[0])
    x_BTD = jnp.take(embed_VD, jnp.where(own_BT, ids_BT, 0), axis=0).astype(dtype)
    if position_TD is not None:  # every token is one device's own: its position is added once
        x_BTD = x_BTD + jnp.take(position_TD, all_BT(positions_BT), axis=0).astype(dtype)
    B, T, D = x_BTD.shape
    x_BCTD = jnp.where(own_BT[..., None], x_BTD, 0).reshape(B, C, T // C, D)
    x_BCTD = constrain.transpose(constrain.scatter(x_BCTD, "vocab", 2), "positions", 1, 3)
    return constrain.transpose(x_BCTD, "rows", 0, 3)[:, 0]


def _axes(state: nnx.State, leading: tuple[str, ...]) -> Params:
    axes: Params = {}
    for path, param in nnx.to_flat_state(state):
        node = axes
        for name in path[:-1]:
            node = node.setdefault(str(name), {})
        node[str(path[-1])] = (*leading, *param.get_metadata()["axes"])
    return axes


def cast(params: Params, dtype: jnp.dtype) -> Params:
    """Weights in the compute dtype; norm scales stay float32, where bf16 would round 1 + 0.003 to 1, and routers."""
    one = lambda path, w: w if getattr(path[-1], "key", "") in FLOAT32 else w.astype(dtype)
    return jax.tree_util.tree_map_with_path(one, params)


def _positions(tokens_BT: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
    """Position in the window, or in the document when documents are masked from each other."""
    index_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None], tokens_BT.shape)
    if segments_BT is None:
        return index_BT
    starts_BT = jnp.pad(segments_BT[:, 1:] != segments_BT[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index_BT - jax.lax.cummax(jnp.where(starts_BT, index_BT, 0), axis=1)

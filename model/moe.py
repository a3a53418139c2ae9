"""Experts: many feed-forward halves, of which a router chooses a few for every token.

Σ g_e · expert_e(x) over the k experts of the highest scores (Shazeer et al. 2017); g are their scores, divided by their
sum where `normalise` says so. What keeps the load even: a loss (Fedus et al. 2021, eq. 4), or a bias on the scores by
which experts are chosen, and on nothing else, that moves against the load (Wang et al. 2024, "auxiliary-loss-free").

N tokens of one device, D model, F feed-forward, E experts, k of a token.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import normal, zeros

from model.layers import SwiGLU, Weights

INPUT, RESIDUAL = ("batch", "positions", None), ("batch", "sequence", None)
ROUTER = (None, None)
TINY = 1e-20
UNSEEN = 1e-6  # of what a bias is told in place of a gradient: so small that no norm knows of it


@dataclass(frozen=True)
class Moe:
    """experts, chosen: E, k. shared: of the same size as one, for every token. router: softmax, sigmoid. normalise:
    the chosen ones' scores add up to 1. balance: loss, bias, none. dense_layers: before those with experts, with a
    feed-forward half of dense_dim."""

    experts: int
    chosen: int
    shared: int
    router: str
    normalise: bool
    balance: str
    dense_layers: int = 0
    dense_dim: int = 0
    # Of all micro-steps on average; and of layers, idle experts in all of them.
    metrics: ClassVar[tuple[str, ...]] = ("expert_load_max", "experts_idle", "tokens_dropped")

    def half(self, c: Any, key: jax.Array) -> "Experts":
        """Of a block."""
        return Experts(c, key)

    def first(self, c: Any, compute: Any) -> Any:
        """The layers before these, None without any."""
        if not self.dense_layers:
            return None
        from model.first import First  # which a model without them does not read

        return First(self.before(c), compute)

    def before(self, c: Any) -> Any:
        """The config of those layers. c: of the model."""
        return replace(c, moe=None, num_layers=self.dense_layers, mlp_dim=self.dense_dim, others=c.num_layers)

    def added(self, loss: jax.Array, mask_BT: jax.Array, found: Any, weights: tuple) -> tuple:
        """The summed loss with what routers add to it, the batch's weight, and further sums, of `metrics`. found: of
        each layer [L]; of a pipeline's micro-batches, to which row b goes as the b mod M-th, [M, L]. weights: of the
        balancing loss, and of the routers' z-loss."""
        found = {name: x.reshape(-1, x.shape[-1]) for name, x in found.items()}
        micro, layers = found["balance"].shape
        weight_M = jnp.sum(mask_BT.reshape(-1, micro, mask_BT.shape[1]), axis=(0, 2))
        sums = {name: jnp.sum(weight_M @ x_ML) for name, x_ML in found.items()}
        balance, z = weights
        loss = loss + (balance * sums["balance"] if self.balance == "loss" else 0) + z * sums["router_z"]
        parts = {"expert_load_max": layers, "experts_idle": 1, "tokens_dropped": layers}
        further = {name: lax.stop_gradient(sums[name]) / parts[name] for name in self.metrics}
        return loss + sums.get("bias", 0), jnp.sum(weight_M), further


class Experts(nnx.Module):
    """In place of a feed-forward half."""

    def __init__(self, c: Any, key: jax.Array):
        self.c = c.moe
        (D, F, E), weight, std = (c.model_dim, c.mlp_dim, c.moe.experts), Weights(key), c.init_std
        out_std = std / math.sqrt(2 * c.depth)
        self.router = weight("router", (D, E), ("embed", "scores"), normal(std))
        self.gate = weight("gate", (E, D, F), ("experts", "embed", "mlp"), normal(std))
        self.up = weight("up", (E, D, F), ("experts", "embed", "mlp"), normal(std))
        self.down = weight("down", (E, F, D), ("experts", "mlp", "embed"), normal(out_std))
        if c.moe.balance == "bias":
            self.balance_bias = weight("balance_bias", (E,), ("counts",), zeros)
        if c.moe.shared:
            self.shared = SwiGLU(c, weight.sub("shared"), c.moe.shared * F)

    def __call__(self, x_BTD: jax.Array, ctx: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        """(y, what `Moe.added` adds up, of all tokens of these rows)."""
        constrain, far = ctx.constrain, ctx.constrain.experts(ctx.dispatch)
        bias = [self.balance_bias[...]] if self.c.balance == "bias" else []

        def local(x_BTD: jax.Array, router_DE: jax.Array, gate, up, down, *bias: jax.Array) -> tuple:
            x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
            dtype = jnp.promote_types(jnp.float32, x_ND.dtype)  # near ties decide otherwise in bfloat16
            logits_NE = jnp.matmul(x_ND.astype(dtype), router_DE.astype(dtype), precision=lax.Precision.HIGHEST)
            gates_Nk, ids_Nk, scores = route(self.c, logits_NE, *bias)
            gate, up, down = far.gathered(gate, 1), far.gathered(up, 1), far.gathered(down, 2)

            def network(rows: jax.Array, gates: jax.Array, product: Any) -> jax.Array:
                gate_F, up_F = (checkpoint_name(product(rows, w), "hidden") for w in (gate, up))
                return product(jax.nn.silu(gate_F) * up_F * gates[..., None].astype(rows.dtype), down)

            y_ND, dropped = far.through(x_ND, ids_Nk, gates_Nk, network, self.c.experts)
            y_BTD = constrain.scatter(y_ND.reshape(x_BTD.shape), "mlp", 1)
            return y_BTD, _counted(self.c, scores, ids_Nk, dropped, far.add_up, *bias)

        cut = ("experts", "embed", "mlp"), ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
        run = constrain.manual(local, (INPUT, ROUTER, *cut, *[(None,)] * len(bias)), (RESIDUAL, ()))
        y_BTD, found = run(x_BTD, self.router[...], self.gate[...], self.up[...], self.down[...], *bias)
        return y_BTD + self.shared(x_BTD, ctx)[0] if self.c.shared else y_BTD, found


def route(c: Moe, logits_NE: jax.Array, bias_E: Any = None) -> tuple[jax.Array, jax.Array, tuple]:
    """(what each token's experts count, which they are, (shares [N, E] that add up to 1, logits))."""
    scores_NE = jax.nn.softmax(logits_NE) if c.router == "softmax" else jax.nn.sigmoid(logits_NE)
    preferred_NE = scores_NE if bias_E is None else scores_NE + bias_E
    ids_Nk = lax.top_k(lax.stop_gradient(preferred_NE), c.chosen)[1]
    gates_Nk = jnp.take_along_axis(scores_NE, ids_Nk, axis=1)
    if c.normalise:
        gates_Nk = _normalised(gates_Nk)
    shares_NE = scores_NE if c.router == "softmax" else _normalised(scores_NE)
    return gates_Nk, ids_Nk, (shares_NE, logits_NE)


def _normalised(x_NE: jax.Array) -> jax.Array:
    return x_NE / (jnp.sum(x_NE, axis=1, keepdims=True) + TINY)


def _counted(c: Moe, scores: tuple, ids_Nk: jax.Array, dropped: jax.Array, add_up: Any, bias_E: Any = None) -> dict:
    """Of a micro-batch. add_up: over all devices with tokens of these rows."""
    shares_NE, logits_NE = scores
    counts_E = jnp.bincount(ids_Nk.reshape(-1), length=c.experts).astype(shares_NE.dtype)
    tokens = jnp.asarray(ids_Nk.shape[0], shares_NE.dtype)
    z = jnp.sum(jax.nn.logsumexp(logits_NE, axis=1) ** 2)
    counts_E, shares_E, z, tokens, dropped = add_up((counts_E, jnp.sum(shares_NE, axis=0), z, tokens, dropped))
    load_E = counts_E * c.experts / (tokens * c.chosen)  # 1: as many as every other
    found = {
        "balance": jnp.sum(load_E * shares_E) / tokens,
        "router_z": z / tokens,
        "expert_load_max": jnp.max(load_E),
        "experts_idle": jnp.sum(counts_E == 0),
        "tokens_dropped": dropped / (tokens * c.chosen),
    }
    if bias_E is not None:  # worth 0, with the load in excess for its gradient
        pull = UNSEEN * jnp.sum((load_E - 1) * bias_E)
        found["bias"] = pull - lax.stop_gradient(pull)
    return jax.tree.map(lambda x: x.astype(jnp.float32), found)

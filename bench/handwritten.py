"""A training step in plain JAX, as one writes it for one model without a framework: what ours is compared with.

GPT-2 and Llama, with a dict of stacked weights, a scan over layers, whole-logits cross-entropy and optax. It shares no
code with model/. Weights (L layers first): see `NAMES`.

python bench/handwritten.py     trains two steps of bench/gpt12m.py's model and prints the seconds to the first

B batch, T sequence, D model, H heads, K head size, F feed-forward, V vocabulary.
"""

import time

STARTED = time.time()

import argparse  # noqa: E402
from collections.abc import Callable  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from functools import partial  # noqa: E402
from typing import Any  # noqa: E402

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import optax  # noqa: E402
from jax.ad_checkpoint import checkpoint_name  # noqa: E402

POLICIES = {
    "everything": lambda: jax.checkpoint_policies.everything_saveable,
    "matmuls": lambda: jax.checkpoint_policies.save_only_these_names("qkv", "context", "hidden"),
    "dots": lambda: jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "nothing": lambda: jax.checkpoint_policies.nothing_saveable,
}
# How these weights are called in our params.
NAMES = {
    "q": "attention/q", "k": "attention/k", "v": "attention/v", "out": "attention/out",
    "q_bias": "attention/q_bias", "k_bias": "attention/k_bias", "v_bias": "attention/v_bias",
    "out_bias": "attention/out_bias", "norm1_scale": "attention_norm/scale", "norm1_bias": "attention_norm/bias",
    "norm2_scale": "mlp_norm/scale", "norm2_bias": "mlp_norm/bias", "gate": "mlp/gate", "up": "mlp/up",
    "down": "mlp/down", "up_bias": "mlp/up_bias", "down_bias": "mlp/down_bias",
}  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of AdamW with clipping, warm-up and cosine decay."""

    lr: float
    warmup_steps: int
    steps: int
    final_fraction: float
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float


# ── the two models ───────────────────────────────────────────────────────────────────────────────────────────────


def layer_norm(x, scale, bias):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale + bias


def rms_norm(x, scale):
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale


def attention(q_BTHK, k_BTHK, v_BTHK):
    scores = jnp.einsum("bthk,bshk->bhts", q_BTHK, k_BTHK) * q_BTHK.shape[-1] ** -0.5
    causal_TT = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(causal_TT, scores, -jnp.inf), axis=-1)
    return checkpoint_name(jnp.einsum("bhts,bshk->bthk", weights, v_BTHK), "context")


def project(x_BTD, w_DHK):
    return jnp.einsum("btd,dhk->bthk", x_BTD, w_DHK)


def gpt2_block(x_BTD, w, shard):
    h_BTD = layer_norm(x_BTD, w["norm1_scale"], w["norm1_bias"])
    q, k, v = (checkpoint_name(project(h_BTD, w[name]) + w[f"{name}_bias"], "qkv") for name in "qkv")
    x_BTD = shard(x_BTD + jnp.einsum("bthk,hkd->btd", attention(q, k, v), w["out"]) + w["out_bias"])
    h_BTD = layer_norm(x_BTD, w["norm2_scale"], w["norm2_bias"])
    h_BTF = checkpoint_name(h_BTD @ w["up"] + w["up_bias"], "hidden")
    return shard(x_BTD + jax.nn.gelu(h_BTF, approximate=True) @ w["down"] + w["down_bias"])


def rotate(x_BTHK):
    T, K = x_BTHK.shape[1], x_BTHK.shape[3]
    angle_T1K = jnp.arange(T)[:, None, None] * 10_000.0 ** (-jnp.arange(0, K, 2) / K)
    cos, sin = jnp.cos(angle_T1K), jnp.sin(angle_T1K)
    a, b = jnp.split(x_BTHK, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def llama_block(x_BTD, w, shard):
    h_BTD = rms_norm(x_BTD, w["norm1_scale"])
    q, k, v = (project(h_BTD, w[name]) for name in "qkv")
    q, k, v = (checkpoint_name(x, "qkv") for x in (rotate(q), rotate(k), v))
    x_BTD = shard(x_BTD + jnp.einsum("bthk,hkd->btd", attention(q, k, v), w["out"]))
    h_BTD = rms_norm(x_BTD, w["norm2_scale"])
    gate_BTF, up_BTF = checkpoint_name(h_BTD @ w["gate"], "hidden"), checkpoint_name(h_BTD @ w["up"], "hidden")
    return shard(x_BTD + (jax.nn.silu(gate_BTF) * up_BTF) @ w["down"])


def loss_fn(params, tokens_BT, targets_BT, policy: str, shard):
    gpt2 = "position" in params
    x_BTD = params["embed"][tokens_BT]
    if gpt2:
        x_BTD = x_BTD + params["position"]
    layer = partial(gpt2_block if gpt2 else llama_block, shard=shard)
    layer = jax.checkpoint(layer, policy=POLICIES[policy](), prevent_cse=False)
    x_BTD, _ = jax.lax.scan(lambda x, w: (layer(x, w), None), shard(x_BTD), params["blocks"])
    norm = layer_norm if gpt2 else rms_norm
    x_BTD = norm(x_BTD, *(params[name] for name in ("final_scale", "final_bias") if name in params))
    logits_BTV = x_BTD @ params["embed"].T
    target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return (jax.nn.logsumexp(logits_BTV, axis=-1) - target_BT).mean()


# ── the step ─────────────────────────────────────────────────────────────────────────────────────────────────────


def make_optimizer(r: Recipe) -> optax.GradientTransformation:
    warmup = optax.linear_schedule(r.lr / r.warmup_steps, r.lr, max(1, r.warmup_steps - 1))
    cosine = optax.cosine_decay_schedule(r.lr, r.steps - r.warmup_steps, alpha=r.final_fraction)
    schedule = optax.join_schedules([warmup, cosine], [r.warmup_steps])

    def decays(params):
        return jax.tree_util.tree_map_with_path(lambda path, _: not path[-1].key.endswith(("scale", "bias")), params)

    adamw = optax.adamw(schedule, b1=r.b1, b2=r.b2, eps=r.eps, weight_decay=r.weight_decay, mask=decays)
    return optax.chain(optax.clip_by_global_norm(r.clip_norm), adamw)


def make_step(optimizer: optax.GradientTransformation, policy: str, shard: Callable = lambda x: x) -> Callable:
    """step(params, opt_state, tokens, targets) -> (params, opt_state, metrics). shard: fixes the residual stream."""

    def step(params, opt_state, tokens_BT, targets_BT):
        loss, grads = jax.value_and_grad(loss_fn)(params, tokens_BT, targets_BT, policy, shard)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return params, opt_state, {"loss": loss, "grad_norm": optax.global_norm(grads)}

    return step


def from_ours(ours: dict[str, Any]) -> dict[str, Any]:
    """Our params (arrays, shapes or shardings) under the names used here."""
    renamed = {"embed": ours["embed"], "final_scale": ours["final_norm"]["scale"], "blocks": {}}
    if "position" in ours:
        renamed |= {"position": ours["position"], "final_bias": ours["final_norm"]["bias"]}
    for here, there in NAMES.items():
        module, name = there.split("/")
        if name in ours["blocks"][module]:
            renamed["blocks"][here] = ours["blocks"][module][name]
    return renamed


# ── as a script of its own, for the time to its first step ───────────────────────────────────────────────────────


def init_gpt2(key, L=6, D=384, H=6, F=1536, T=256, V=4096):
    K, std = D // H, 0.02
    shapes = {"q": (D, H, K), "k": (D, H, K), "v": (D, H, K), "out": (H, K, D), "up": (D, F), "down": (F, D)}
    zeros = {"q_bias": (H, K), "k_bias": (H, K), "v_bias": (H, K), "out_bias": (D,), "up_bias": (F,)}
    zeros |= dict.fromkeys(("down_bias", "norm1_bias", "norm2_bias"), (D,))
    keys = iter(jax.random.split(key, 8))
    blocks = {name: std * jax.random.normal(next(keys), (L, *shape)) for name, shape in shapes.items()}
    blocks |= {name: jnp.zeros((L, *shape)) for name, shape in zeros.items()}
    blocks |= {name: jnp.ones((L, D)) for name in ("norm1_scale", "norm2_scale")}
    ends = {"final_scale": jnp.ones(D), "final_bias": jnp.zeros(D)}
    embed, position = (std * jax.random.normal(next(keys), (rows, D)) for rows in (V, T))
    return {"embed": embed, "position": position, **ends, "blocks": blocks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", help="folder of JAX's compilation cache")
    args = parser.parse_args()
    if args.cache:
        jax.config.update("jax_compilation_cache_dir", args.cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
    optimizer = make_optimizer(Recipe(1e-3, 50, 1000, 0.1, 0.9, 0.95, 1e-8, 0.1, 1.0))

    @jax.jit
    def init(key):
        params = init_gpt2(key)
        return params, optimizer.init(params)

    params, opt_state = init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (8, 257), 0, 4096)
    step = jax.jit(make_step(optimizer, "matmuls"), donate_argnums=(0, 1))
    for _ in range(2):
        params, opt_state, metrics = step(params, opt_state, tokens[:, :-1], tokens[:, 1:])
        print(f"{time.time() - STARTED:.3f} s, loss {metrics['loss']:.4f}", flush=True)


if __name__ == "__main__":
    main()

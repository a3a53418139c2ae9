"""Floating-point operations of training, in closed form."""

from typing import Any

import jax


def per_token(shapes: Any, model: Any, seq_len: int, causal: bool) -> float:
    """Training FLOPs per token: 6 per matmul weight (the head counted once, look-ups not, and of experts those that a
    token chooses), plus attention's 12·L·H·K·T when the full T×T scores are counted, half of that when only the causal
    half is. A sliding window of W keys counts as T×W, less the W²/2 before the text begins when causal.

    shapes: of the parameters. model: its vocab_size, model_dim, num_layers, num_heads, head_dim, sliding_window, moe.
    """
    matmul = model.vocab_size * model.model_dim
    for path, x in jax.tree_util.tree_leaves_with_path(shapes["blocks"]):
        is_routed = path[0].key == "mlp" and x.ndim == 4
        share = model.moe.chosen / model.moe.experts if is_routed else 1
        matmul += share * x.size if x.ndim > 2 and not path[-1].key.endswith("bias") else 0
    visible = min(seq_len, model.sliding_window or seq_len)  # keys that a query sees, on average
    visible = visible - visible**2 / (2 * max(seq_len, 1)) if causal else visible
    return 6 * matmul + 12 * model.num_layers * model.num_heads * model.head_dim * visible

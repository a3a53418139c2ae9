"""Floating-point operations of training, in closed form."""

from typing import Any

import jax

from parallel.layout.rules import BATCH


def per_token(shapes: Any, axes: Any, model: Any, seq_len: int, causal: bool) -> float:
    """Training FLOPs per token: 6 per matmul weight (the head counted once, look-ups not, and of experts those that a
    token chooses), plus attention's 12·L·H·K·T when the full T×T scores are counted, half of that when only the causal
    half is. A sliding window of W keys counts as T×W, less the W²/2 before the text begins when causal.

    shapes, axes: of the parameters. model: its vocab_size, model_dim, depth, num_heads, head_dim, sliding_window
    and moe.
    """
    matmul = model.vocab_size * model.model_dim
    flat = jax.tree_util.tree_leaves(axes, is_leaf=lambda x: isinstance(x, tuple))
    for (path, x), own in zip(jax.tree_util.tree_leaves_with_path(shapes), flat, strict=True):
        share = model.moe.chosen / model.moe.experts if "experts" in own else 1
        counts = sum(axis in BATCH for axis in own)  # of layers, which the ends have not
        is_matrix = len(own) - counts > 1 and not path[-1].key.endswith("bias")
        matmul += share * x.size if counts and is_matrix else 0
    visible = min(seq_len, model.sliding_window or seq_len)  # keys that a query sees, on average
    visible = visible - visible**2 / (2 * max(seq_len, 1)) if causal else visible
    return 6 * matmul + 12 * model.depth * model.num_heads * model.head_dim * visible

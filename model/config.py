"""What a model is, and how it is executed: plain values."""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of rotary wavelengths."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_len: int


@dataclass(frozen=True)
class ModelConfig:
    """What the model *is*. Everything here changes its weights or its output."""

    vocab_size: int
    max_seq_len: int
    num_layers: int
    model_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_dim: int
    norm: str
    norm_eps: float
    mlp: str
    position: str
    rope_theta: float
    rope_scaling: RopeScaling | None
    qk_norm: bool
    bias: str
    tie_embeddings: bool
    sliding_window: int
    init_std: float
    moe: Any  # model/moe.py's; None: one feed-forward half for all tokens
    others: int = 0  # layers besides these num_layers, before or after them

    @property
    def depth(self) -> int:
        """Layers that the residual stream sums up."""
        return self.num_layers + self.others


@dataclass(frozen=True)
class Compute:
    """How the model is *executed*. Nothing here changes the mathematics."""

    dtype: jnp.dtype
    attention: str
    context: str  # attention.context: in which way sequences that are cut over devices attend
    remat: str
    pipeline: tuple[str, str, int]  # pipeline.remat, gather and interleave
    dispatch: tuple[str, str]  # moe.dispatch, as resolved, and moe.rows
    unroll: bool
    loss_chunk_mib: int

"""Qwen3 0.6B (2025): q/k norm, grouped queries, a head size that is not model_dim / num_heads, tied head."""

from configs import llama3_8b


def get_config():
    c = llama3_8b.get_config()
    c.model.num_layers = 28
    c.model.model_dim = 1024
    c.model.num_heads = 16
    c.model.num_kv_heads = 8
    c.model.head_dim = 128
    c.model.mlp_dim = 3072
    c.model.norm_eps = 1e-6
    c.model.rope_theta = 1_000_000.0
    c.model.rope_scaling.factor = 0.0
    c.model.qk_norm = True
    c.model.tie_embeddings = True
    c.compute.remat = "matmuls"
    c.data.vocab_size = 151_936
    c.data.seq_len = 4096
    return c

"""Llama 3.2 1B (1.24 B parameters, tied head)."""

from configs import llama3_8b


def get_config():
    c = llama3_8b.get_config()
    c.model.num_layers = 16
    c.model.model_dim = 2048
    c.model.head_dim = 64
    c.model.mlp_dim = 8192
    c.model.rope_scaling.factor = 32.0
    c.model.tie_embeddings = True
    c.compute.remat = "matmuls"
    return c

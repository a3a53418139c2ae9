"""Qwen3 30B-A3B (2025): 30.5 B parameters, of which a token uses 3.3: 8 of 128 small experts.

python train.py --config=configs/qwen3_30b_a3b.py --target=v5p-128 --dry_run --config.mesh.expert=8 --config.mesh.fsdp=8
"""

from configs import qwen3_600m


def get_config():
    c = qwen3_600m.get_config()
    c.model.num_layers = 48
    c.model.model_dim = 2048
    c.model.num_heads = 32
    c.model.num_kv_heads = 4
    c.model.mlp_dim = 768
    c.model.tie_embeddings = False
    c.model.experts = 128
    c.model.experts_per_token = 8
    c.compute.remat = "full"
    c.moe.balance_weight = 0.001 * 8 / 48  # theirs is of all layers at once
    c.data.batch_size = 512
    return c

"""Mixtral 8x7B (2023): 46.7 B parameters, of which a token uses 12.9.

python train.py --config=configs/mixtral_8x7b.py --target=h100:8x8 --dry_run --config.mesh.expert=8
"""

from configs import llama3_8b


def get_config():
    c = llama3_8b.get_config()
    c.model.rope_theta = 1_000_000.0
    c.model.rope_scaling.factor = 0.0
    c.model.experts = 8
    c.data.vocab_size = 32_000
    c.data.seq_len = 4096
    c.data.batch_size = 512
    c.moe.balance_weight = 0.02 * 2 / 32  # theirs is of all layers at once
    return c

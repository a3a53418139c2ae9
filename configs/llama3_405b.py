"""Llama 3.1 405B.

python train.py --config=configs/llama3_405b.py --target=h100:144x8 --dry_run \\
    --config.mesh.stage=9 --config.mesh.tensor=8 --config.optimizer.accumulate=16
"""

from configs import llama3_70b


def get_config():
    c = llama3_70b.get_config()
    c.model.num_layers = 126
    c.model.model_dim = 16_384
    c.model.num_heads = 128
    c.model.mlp_dim = 53_248
    c.optimizer.lr = 8e-5
    return c

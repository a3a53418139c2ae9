"""Llama 3.1 70B.

python train.py --config=configs/llama3_70b.py --simulate=256 --dry_run --config.mesh.tensor=8
"""

from configs import llama3_8b


def get_config():
    c = llama3_8b.get_config()
    c.model.num_layers = 80
    c.model.model_dim = 8192
    c.model.num_heads = 64
    c.model.mlp_dim = 28_672
    c.data.batch_size = 256
    c.optimizer.lr = 1.5e-4
    return c

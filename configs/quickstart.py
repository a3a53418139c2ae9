"""A byte-level Llama of about 1 M parameters on the source of Python's standard library: no download, any machine.

python train.py --config=configs/quickstart.py --simulate=4 --config.mesh.fsdp=2 --config.mesh.tensor=2
"""

from configs import base


def get_config():
    c = base.get_config()
    c.steps = 450
    c.eval_every = 75
    c.model.num_layers = 4
    c.model.model_dim = 160
    c.model.num_heads = 8
    c.model.num_kv_heads = 8
    c.model.head_dim = 20
    c.model.mlp_dim = 448
    c.data.seq_len = 128
    c.data.batch_size = 16
    c.optimizer.lr = 4e-3
    c.optimizer.warmup_steps = 40
    c.sample.every = 150
    return c

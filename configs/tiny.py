"""For tests: 0.1 M parameters; every sharded dimension is divisible by 8, the batch by 32."""

from configs import base


def get_config():
    c = base.get_config()
    c.steps = 20
    c.log_every = 1
    c.eval_every = 0
    c.eval_batches = 1
    c.model.num_layers = 2
    c.model.model_dim = 64
    c.model.num_heads = 8
    c.model.num_kv_heads = 8
    c.model.head_dim = 8
    c.model.mlp_dim = 128
    c.data.seq_len = 32
    c.data.batch_size = 32
    c.optimizer.lr = 1e-3
    c.optimizer.schedule = "constant"
    c.optimizer.warmup_steps = 0
    c.checkpoint.every = 0
    c.sample.tokens = 16
    return c

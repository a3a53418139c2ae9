"""A GPT-2-like model of 4.2 M parameters that sees 128 bytes a step: what bench/link.py trains.

Small work beside a large message (16.9 MB in float32), so that a slow link decides the time of a step.
"""

from configs import base


def get_config():
    c = base.get_config()
    c.steps = 30_000  # bench/link.py ends a run earlier
    c.log_every = 1
    c.eval_every = 0
    c.eval_batches = 1
    c.model.num_layers = 6
    c.model.model_dim = 240
    c.model.num_heads = 6
    c.model.num_kv_heads = 6
    c.model.head_dim = 40
    c.model.mlp_dim = 960
    c.model.norm = "layer"
    c.model.mlp = "gelu"
    c.model.position = "learned"
    c.model.bias = "all"
    c.compute.dtype = "float32"
    c.compute.remat = "none"
    c.data.seq_len = 32
    c.data.batch_size = 4
    c.optimizer.schedule = "constant"  # what a run has learnt when it is stopped does not depend on when that is
    c.optimizer.warmup_steps = 5
    c.checkpoint.every = 0
    c.sample.tokens = 0
    c.metrics.tensorboard = "off"
    return c

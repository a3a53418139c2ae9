"""A GPT-2-like model of 12.3 M parameters on Python's standard library: what the measurements in bench/ train.

python train.py --config=bench/gpt12m.py
"""

from configs import base


def get_config():
    c = base.get_config()
    c.steps = 2
    c.log_every = 1
    c.eval_every = 0
    c.eval_batches = 1
    c.model.num_layers = 6
    c.model.model_dim = 384
    c.model.num_heads = 6
    c.model.num_kv_heads = 6
    c.model.head_dim = 64
    c.model.mlp_dim = 1536
    c.model.norm = "layer"
    c.model.mlp = "gelu"
    c.model.position = "learned"
    c.model.bias = "all"
    c.compute.dtype = "float32"
    c.data.tokenizer = "bpe"
    c.data.vocab_size = 4096
    c.data.seq_len = 256
    c.data.batch_size = 8
    c.optimizer.warmup_steps = 1
    c.checkpoint.every = 0
    c.sample.tokens = 0
    c.metrics.tensorboard = "off"
    return c

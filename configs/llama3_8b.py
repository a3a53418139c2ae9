"""Llama 3.1 8B (Dubey et al. 2024).

python train.py --config=configs/llama3_8b.py --simulate=64 --dry_run
"""

from configs import base


def get_config():
    c = base.get_config()
    c.steps = 100_000
    c.eval_every = 1000
    c.model.num_layers = 32
    c.model.model_dim = 4096
    c.model.num_heads = 32
    c.model.num_kv_heads = 8
    c.model.head_dim = 128
    c.model.mlp_dim = 14_336
    c.model.rope_theta = 500_000.0
    c.model.rope_scaling.factor = 8.0
    c.model.tie_embeddings = False
    c.compute.dtype = "bfloat16"
    c.compute.remat = "full"
    c.data.vocab_size = 128_256
    c.data.tokenizer = "tokenizer.json"
    c.data.seq_len = 8192
    c.data.batch_size = 64
    c.optimizer.lr = 3e-4
    c.optimizer.warmup_steps = 2000
    c.checkpoint.every = 1000
    return c

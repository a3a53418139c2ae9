"""GPT-2 124M (Radford et al. 2019): learned positions, LayerNorm, GELU, biases, tied head.

python train.py --config=configs/gpt2_124m.py --config.data.path=tokens.bin --config.data.tokenizer=tokenizer.json
"""

from configs import base


def get_config():
    c = base.get_config()
    c.steps = 19_560  # 10 B tokens
    c.eval_every = 250
    c.model.num_layers = 12
    c.model.model_dim = 768
    c.model.num_heads = 12
    c.model.num_kv_heads = 12
    c.model.head_dim = 64
    c.model.mlp_dim = 3072
    c.model.norm = "layer"
    c.model.mlp = "gelu"
    c.model.position = "learned"
    c.model.bias = "all"
    c.data.vocab_size = 50_304  # 50,257 rounded up to a multiple of 128
    c.data.tokenizer = "bpe"
    c.data.seq_len = 1024
    c.data.batch_size = 512
    c.optimizer.lr = 6e-4
    c.optimizer.warmup_steps = 700
    c.checkpoint.every = 1000
    return c

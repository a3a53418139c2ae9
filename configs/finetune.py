"""Tunes an imported chat model, runs/base, on conversations of one's own, chat.jsonl: all weights, the loss on what
the assistant says.

python -m model.huggingface import path/to/SmolLM2-135M-Instruct runs/base
python train.py --config=configs/finetune.py
python train.py --config=configs/finetune.py --config.init.workdir=runs/smollm2 --config.data.path=mine.jsonl

Rows of chat.jsonl are {"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]} or
{"prompt": "…", "completion": "…"}. `python -m data.chat show chat.jsonl --workdir=runs/base` shows what is learned.

With SmolLM2-135M about 8 minutes of processor time. 400 made conversations of a pirate (docs/deploy.md): the loss on
answers is 2.80 before the first update, and 0.05 at the end on what is held out.
"""

from configs import base


def get_config():
    c = base.get_config()
    c.steps = 30
    c.log_every = 1
    c.eval_every = 10
    c.init.workdir = "runs/base"
    c.data.path = "chat.jsonl"
    c.data.document_mask = True
    c.data.seq_len = 256
    c.data.batch_size = 4
    c.optimizer.lr = 2e-5
    c.optimizer.warmup_steps = 5
    c.optimizer.weight_decay = 0.0
    c.checkpoint.every = 0
    c.sample.tokens = 32
    c.sample.temperature = 0.0
    return c

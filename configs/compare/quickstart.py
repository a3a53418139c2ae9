"""What each method costs in loss and saves in bytes, on a byte-level model of a third of a million parameters.

python compare.py --config=configs/compare/quickstart.py --simulate=4
"""

from configs import base

SEEDS = (0, 1, 2)
LR = ("optimizer.lr", (2e-3, 4e-3))
OUTER_LR = ("sync.outer.lr", (0.4, 0.8))


def get_config():
    """The training run that every row changes: 900 steps, 30 rounds of H = 30, with 4 replicas."""
    c = base.get_config()
    c.steps = 900
    c.eval_every = 90
    c.eval_batches = 24
    c.sync.replicas = 4
    c.model.num_layers = 2
    c.model.model_dim = 112
    c.model.num_heads = 4
    c.model.num_kv_heads = 4
    c.model.head_dim = 28
    c.model.mlp_dim = 304
    c.data.seq_len = 32
    c.data.batch_size = 8
    c.optimizer.lr = 2e-3
    c.optimizer.warmup_steps = 60
    c.checkpoint.every = 0
    return c


def row(strategy="sync", codec="none", tune=LR, name=None, **changes):
    """One line of the table. tune: the key that is tuned, and its candidates. The first row is the baseline."""
    keys = {key.replace("__", "."): value for key, value in changes.items()}
    keys |= {"sync.strategy": strategy, "sync.codec": codec}
    return {"name": name or f"{strategy} {codec}", "changes": keys, "tune": tune}


ROWS = [
    row(),
    row("sync", "bf16"),
    row("sync", "fp8"),
    row("sync", "int8"),
    row("sync", "fp4"),
    row("sync", "int4"),
    row("sync", "int2"),
    row("sync", "sign"),
    row("sync", "sign", name="sync sign, no feedback", sync__error_feedback="off"),
    row("sync", "topk"),
    row("sync", "topk", name="sync topk, no feedback", sync__error_feedback="off"),
    row("sync", "randk", sync__density=1 / 16, name="sync randk 1/16"),
    row("sync", "powersgd"),
    row(
        *("sync", "demo", ("optimizer.lr", (4e-4, 1e-3))),
        name="DeMo: sync demo, sign descent",
        sync__decay=0.999,
        optimizer__name="sign",
    ),
    row("stale"),
    row("stale", "int4"),
    row("diloco", tune=OUTER_LR),
    row("diloco", "int4", OUTER_LR),
    row(
        *("diloco", "topk", OUTER_LR),
        name="SparseLoCo: diloco topk 2 bits, outer sgd",
        sync__bits=2,
        sync__decay=0.95,
        sync__outer__optimizer="sgd",
    ),
    row("streaming", tune=OUTER_LR, sync__overlap=5, sync__mix=0.5),
    row("streaming", "fp4", OUTER_LR, sync__overlap=5, sync__mix=0.5),
]

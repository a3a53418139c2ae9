"""What each method costs in loss and saves in bytes, on a byte-level model of a third of a million parameters.

python compare.py --config=configs/compare/quickstart.py --processes=2
python compare.py --config=configs/compare/quickstart.py --tune      which rates: each row's candidates, and no more

Every row has the baseline's learning rate but where a comment says why not. At this one weights that are moved by 1e-6
change the result by less than the gaps in question; at twice the rate two such runs end 0.8 % apart.
"""

from typing import Any

from configs import base

SEEDS = (0, 1, 2)
LR = ("optimizer.lr", (1e-3, 2e-3, 4e-3))
LOWER_LR = ("optimizer.lr", (5e-4, 1e-3, 2e-3))  # for what is late or loses much: it becomes unstable earlier
OUTER_LR = ("sync.outer.lr", (0.2, 0.4, 0.8))


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
    c.compute.remat = "none"
    c.compute.unroll = True  # 2 layers: half the time of a scan over them on CPU
    c.data.seq_len = 64
    c.data.batch_size = 16
    c.optimizer.lr = 2e-3
    c.optimizer.warmup_steps = 60
    c.optimizer.final_lr_fraction = 0.0  # ends without noise from the last steps
    c.checkpoint.every = 0
    return c


def row(strategy="sync", codec="none", tune=LR, name=None, floor=False, **changes):
    """One line of the table; the first is the baseline. tune: a key, and the candidates that --tune tries. floor: with
    a row beside it that shows how far apart two runs of it end that differ by nothing."""
    keys = {key.replace("__", "."): value for key, value in changes.items()}
    keys |= {"sync.strategy": strategy, "sync.codec": codec}
    return {"name": name or f"{strategy} {codec}", "changes": keys, "tune": tune, "floor": floor}


# v is frozen while it is still large: half the rate.
FROZEN: dict[str, Any] = {
    "optimizer__name": "onebit_adam",
    "optimizer__freeze_steps": 150,
    "optimizer__b2": 0.99,
    "optimizer__lr": 1e-3,
}
LOCAL: dict[str, Any] = {"optimizer__lr": 1e-3}  # a replica by itself has a quarter of the tokens per step
NESTEROV: dict[str, Any] = LOCAL | {"sync__outer__lr": 0.4}
AVERAGE: dict[str, Any] = {
    "sync__outer__optimizer": "sgd",
    "sync__outer__lr": 1.0,
}  # the mean of the replicas, as it is

ROWS = [
    row(),
    row("sync", "bf16"),
    row("sync", "fp8"),
    row("sync", "int8"),
    row("sync", "fp4"),
    row("sync", "int4", floor=True),
    row("sync", "int2"),
    row("sync", "sign", LOWER_LR, optimizer__lr=1e-3),  # residuals arrive in lumps
    row("sync", "sign", LOWER_LR, "sync sign, no feedback", sync__error_feedback="off"),
    row("sync", "sign", LOWER_LR, "1-bit Adam: sync sign, frozen variance", **FROZEN),
    row("sync", "topk"),
    row("sync", "topk", LR, "sync topk, no feedback", sync__error_feedback="off"),
    row("sync", "topk", LOWER_LR, "sync topk, frozen variance", **FROZEN),
    row("sync", "powersgd", floor=True),
    row("sync", "powersgd", LOWER_LR, "sync powersgd, frozen variance", **FROZEN),
    row(
        *("sync", "demo", ("optimizer.lr", (4e-4, 1e-3, 2e-3)), "DeMo: sync demo, sign descent"),
        sync__decay=0.999,
        optimizer__name="sign",
    ),
    # With a step of delay the largest stable rate is a small part of that without (docs/methods.md).
    row("stale", "none", LOWER_LR, optimizer__lr=5e-4),
    row("stale", "none", LOWER_LR, "stale none, no momentum", optimizer__b1=0.0, optimizer__lr=1e-3),
    row("diloco", "none", OUTER_LR, **NESTEROV),
    row("diloco", "none", LR, "diloco none, outer average", floor=True, **AVERAGE),
    row("diloco", "int4", LR, "diloco int4, outer average", **AVERAGE),
    row("diloco", "none", LR, "diloco none, outer average, H = 10", sync__interval=10, **AVERAGE),
    row(
        *("diloco", "topk", OUTER_LR, "SparseLoCo: diloco topk 2 bits, outer sgd"),
        sync__bits=2,
        sync__decay=0.95,
        sync__outer__optimizer="sgd",
        sync__outer__lr=0.8,
        **LOCAL,
    ),
    row("streaming", "fp4", OUTER_LR, sync__overlap=5, sync__mix=0.5, sync__outer__lr=0.8, **LOCAL),
    row("eager", "int4", OUTER_LR, sync__outer__lr=0.2, **LOCAL),
]

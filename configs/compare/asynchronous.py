"""Islands of unequal speed: how much sooner asynchronous training comes to the loss with which synchronous DiLoCo ends,
in seconds of a simulated clock. The model, the text and an island's batch are those of configs/compare/quickstart.py.

python compare.py --config=configs/compare/asynchronous.py           half an hour of a core
python compare.py --config=configs/compare/asynchronous.py --tune    which outer rates: each row's candidates

Rows of the first sites have speeds of 1 : 1 : 2 : 4 and nothing else. On the others, with the same rates, rounds vary
and straggle, an island dies and comes back, and one joins late.
"""

from typing import Any

from configs.compare import quickstart

H = 20  # steps of a round; with H by speed, the fastest island's
SECONDS = 320.0  # of the laboratory's clock: the slowest island makes a step a second
SEEDS = (0, 1, 2)
TUNING_SEED = 100  # of --tune, and of no row
OUTER_LR = ("sync.outer.lr", (0.1, 0.2, 0.4, 0.8, 1.6))  # the same for every row
ONE_MORE = ("sync.outer.lr", (*OUTER_LR[1], 3.2))  # where the last one was the best

UNEVEN = {"spread": 0.3, "straggle": 0.05, "slowdown": 5.0}
SITES = {
    "steady": [{"speed": 1.0}, {"speed": 1.0}, {"speed": 2.0}, {"speed": 4.0}],
    "troubled": [
        {"speed": 1.0, **UNEVEN},
        {"speed": 1.0, **UNEVEN, "fails": (90.0,), "away": 100.0},
        {"speed": 2.0, **UNEVEN},
        {"speed": 4.0, **UNEVEN, "joins": 60.0},
    ],
}


def get_config():
    """What an island trains."""
    c = quickstart.get_config()
    c.steps = 1280  # the fastest island's
    c.eval_batches = 8
    c.data.batch_size = 4  # of one island
    c.optimizer.lr = 1e-3
    c.optimizer.warmup_steps = 30
    c.optimizer.schedule = "constant"  # else a loss on the way would be one of a rate that has yet to fall
    c.sync.replicas = 0  # of an island there is one
    return c


def row(name, lr, sites="steady", tune=OUTER_LR, region=None, **changes):
    """lr: outer; the best of OUTER_LR. region: of each island (islands/regions.py)."""
    keys = {key.replace("__", "."): value for key, value in changes.items()}
    keys |= {"sync.interval": H, "sync.outer.lr": lr}
    return {"name": name, "changes": keys, "tune": tune, "sites": sites} | ({"region": region} if region else {})


SYNCHRONOUS: dict[str, Any] = {"island__merge": "average", "island__staleness": 0}
PLAIN: dict[str, Any] = {"sync__outer__optimizer": "sgd"}
DYLU: dict[str, Any] = {"island__dylu": True}
# Momenta and mixing are the paper's; of the server's rate 0.2 and 0.8 were tried, too.
HALOS: dict[str, Any] = {"sync__outer__momentum": 0.5, "region": {"interval": 5, "lr": 0.4, "buffer": 2}}

# The first row of each sites is what the others of these sites are compared with.
ROWS = [
    row("synchronous DiLoCo", 0.4, **SYNCHRONOUS),
    row("synchronous, no momentum", 0.8, **SYNCHRONOUS, **PLAIN),
    row("synchronous DiLoCo, H by speed", 0.4, **SYNCHRONOUS, **DYLU),
    row("plain asynchronous", 1.6, tune=ONE_MORE, **PLAIN),
    row("plain asynchronous + DyLU", 1.6, tune=ONE_MORE, **PLAIN, **DYLU),
    row("Delayed Nesterov", 0.4),
    row("Delayed Nesterov + DyLU", 0.2, **DYLU),
    row("HALoS", 0.4, **HALOS),
    row("synchronous DiLoCo", 0.4, "troubled", None, **SYNCHRONOUS),
    row("synchronous DiLoCo, H by speed", 0.4, "troubled", None, **SYNCHRONOUS, **DYLU),
    row("plain asynchronous", 1.6, "troubled", None, **PLAIN),
    row("Delayed Nesterov", 0.4, "troubled", None),
    row("Delayed Nesterov + DyLU", 0.2, "troubled", None, **DYLU),
]

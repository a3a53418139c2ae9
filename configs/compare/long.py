"""What becomes of the gaps of configs/compare/quickstart.py in a run five times as long, and after a warm start.

python compare.py --config=configs/compare/long.py --processes=2
"""

from typing import Any

from configs.compare import quickstart
from configs.compare.quickstart import AVERAGE, FROZEN, row

STEPS = 4500  # 150 rounds of H = 30
SEEDS = tuple(range(5))
# The second half of the run: from the baseline's state, which is made once.
WARM: dict[str, Any] = {"sync__warm_steps": STEPS // 2}

ROWS = [
    row(tune=None),
    row("sync", "int4", None, floor=True),
    row("sync", "sign", None, "1-bit Adam: sync sign, frozen variance", **FROZEN),
    row("sync", "powersgd", None),
    row("sync", "powersgd", None, "sync powersgd, warm", **WARM),
    row("diloco", "none", None, "diloco none, outer average", **AVERAGE),
    row("diloco", "none", None, "diloco none, outer average, warm", **AVERAGE, **WARM),
    row("diloco", "int4", None, "diloco int4, outer average", **AVERAGE),
    row("diloco", "int4", None, "diloco int4, outer average, warm", **AVERAGE, **WARM),
]


def get_config():
    c = quickstart.get_config()
    c.steps = STEPS
    c.eval_every = 450
    return c

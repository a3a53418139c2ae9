"""How far apart runs end that differ by nothing, or by a codec that costs nothing, at twice the rate of
configs/compare/quickstart.py: compare with its rows of these names.

python compare.py --config=configs/compare/scatter.py --processes=2
"""

from configs.compare import quickstart
from configs.compare.quickstart import row

SEEDS = quickstart.SEEDS
ROWS = [row(tune=None), row("sync", "int8", None), row("sync", "int4", None, floor=True)]


def get_config():
    c = quickstart.get_config()
    c.optimizer.lr *= 2
    return c

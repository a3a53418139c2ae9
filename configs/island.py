"""One island of a run: docs/islands.md. Start it once for each machine, with another name.

python -m islands init runs/shared --config=configs/island.py
python train.py --config=configs/island.py --config.island.log=runs/shared --config.island.name=a
"""

from typing import Any

from configs import quickstart


def get_config() -> Any:
    c = quickstart.get_config()
    c.sync.strategy = "island"
    c.sync.codec = "int4"
    c.sync.interval = 30
    return c

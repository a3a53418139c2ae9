"""The rows of configs/compare/quickstart.py that lose little, with more seeds: 3 cannot tell 0.2 % from nothing.

python compare.py --config=configs/compare/claims.py --workdir=runs/compare-quickstart --processes=2
takes what configs/compare/quickstart.py has left in that folder, and trains what is missing.
"""

from configs.compare import quickstart

NAMES = (
    "sync none",
    "sync bf16",
    "sync fp8",
    "sync int8",
    "sync int4",
    "1-bit Adam: sync sign, frozen variance",
    "diloco none, outer average",
    "diloco int4, outer average",
)
SEEDS = tuple(range(7))
ROWS = [row for row in quickstart.ROWS if row["name"] in NAMES]
get_config = quickstart.get_config

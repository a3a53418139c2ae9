"""Does a method save communication without hurting the loss, and by how much? One table and three plots.

python compare.py --config=configs/compare/quickstart.py --simulate=4
python compare.py --config=configs/compare/quickstart.py --processes=2
python compare.py --config=configs/compare/quickstart.py --tune
python compare.py --config=configs/compare/asynchronous.py     islands of unequal speed, on a simulated clock

Trains every row of the config (a strategy, a codec, further changes) on the same budget of tokens with the same seeds.
With --tune it only looks for rates: of each row that names candidates, one run of each, of a third of the length. Stop
it at any time: the same command goes on where it stopped.
"""

if __name__ == "__main__":
    from runtime import early

    early.end_at_ctrl_c()

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data.corpus import cache_directory
from parallel.layout import mesh as meshes
from recipes import compare as comparing
from recipes import table
from recipes.programs import use_compilation_cache
from runtime import config as configuration
from runtime import exits, lock, usage
from runtime.config import UsageError, bad_input
from runtime.console import is_terminal, terminal_columns


def main(argv: list[str]) -> int:
    args = parse(argv)
    if args.simulate:
        meshes.simulate(args.simulate)
    meshes.keep_freed_memory()
    use_compilation_cache(cache_directory())
    file = configuration.expand_home(args.config)
    config, names = configuration.execute(file)
    islands = _islands(args) if "SITES" in names else None
    plan = (islands or comparing.Plan).found(file, config, names, args.only)
    with bad_input():
        workdir = Path(configuration.local_path("--workdir", args.workdir or f"runs/compare-{Path(args.config).stem}"))
    lock.hold(workdir)  # exits.guarded lets go of it
    if islands:
        return islands.main(plan, workdir, args.tune, args.processes)
    side_by_side = {"processes": args.processes, "simulate": args.simulate or 0}
    if args.tune:
        for row in comparing.search(plan, workdir, **side_by_side):
            print(row)
        return 0
    found = comparing.run(plan, workdir, **side_by_side)
    print(f"\n{shown(found)}\nin {workdir}: report.html, table.md, table.csv, table.json, plots/")
    return 0


def _islands(args: argparse.Namespace) -> Any:
    """What compares asynchronous schemes: their rows are islands of the laboratory."""
    if args.simulate:
        raise UsageError(
            "--simulate: the islands of such a comparison train one after another, each on one device: leave it out"
        )
    from islands import comparison

    return comparison


def shown(found: dict[str, Any]) -> str:
    """The table as wide as the terminal; elsewhere, as in a log, all of it."""
    return table.fitting(found, terminal_columns()) if is_terminal(sys.stdout) else table.markdown(found)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = usage.parser(__doc__, "python compare.py")
    parser.add_argument("--config", required=True, metavar="FILE", help="one like configs/compare/quickstart.py")
    parser.add_argument("--workdir", metavar="PATH", help="where results are kept; default: runs/compare-<config>")
    parser.add_argument(
        "--simulate", type=usage.positive, metavar="N", help="simulated CPU devices, over which the replicas are laid"
    )
    parser.add_argument(
        "--processes", type=usage.positive, metavar="N", default=1, help="rows at once, each on a core of its own"
    )
    parser.add_argument("--tune", action="store_true", help="try the candidates of each row, and train nothing else")
    parser.add_argument("--only", default="", help="rows whose name contains this; the baseline always runs")
    parser.add_argument("--version", action="version", version=configuration.version(), help="show versions")
    return parser.parse_args(argv)


def run(argv: list[str], leave: Callable[[int], Any] = int) -> int:
    return exits.guarded(lambda: main(argv), "the same command goes on from here", leave)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], leave=os._exit))

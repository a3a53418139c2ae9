"""`python bench/plan.py --pick`: a pick, beside which is compiled and played what is predicted to be nearly as fast."""

import math
from typing import Any

from bench.planned import Row

WITHIN, MOST = 1.5, 24  # of a pick's predicted time, candidates that are judged beside it
KEPT, SIDES = ("seconds", "peak", "fits"), ("predicted", "compiled")
CLOSE = 1.05  # of the best's time, what a pick may take


def rivals(config: str, machine: str) -> tuple[list[Row], int]:
    """(the pick and what is predicted to take at most 1.5 times as long, fastest first; how many more there are)."""
    from parallel.cost import hardware, targets
    from recipes import methods, plan
    from recipes.case import Case

    own, _ = methods.parse(["bench/plan.py", f"--config=configs/{config}.py"], "")
    found = plan.search(Case(own, targets.parse(machine, hardware.by_name(hardware.CHIPS)), None))
    near = [c for c in found.fitting if c.seconds <= WITHIN * found.pick.seconds and c is not found.pick]
    judged = [found.pick, *near][:MOST]
    return [Row(machine, config, c.changes) for c in judged], len(near) + 1 - len(judged)


def judge(config: str, machine: str, workers: Any) -> dict[str, Any]:
    """Prints how the pick does among its rivals, played."""
    rows, left_out = workers.isolated(rivals, config, machine)
    print(f"{config} on {machine}: the pick and {len(rows) - 1} rivals; {left_out} more were left out", flush=True)
    found = {row.name: workers.row(row) for row in rows}
    seconds = {name: x["compiled"]["seconds"] for name, x in found.items() if x["compiled"]["fits"]}
    pick, best = rows[0].name, min(seconds, key=lambda name: seconds[name], default="")
    slower = seconds[pick] / seconds[best] - 1 if pick in seconds else math.inf
    said = f"{slower:+.1%} beside the best, {best}" if pick in seconds else "does not fit"
    print(f"  pick {pick}: {said}; {'met' if slower <= CLOSE - 1 else 'MISSED'}; {len(rows) - len(seconds)} do not fit")
    return {
        "pick": pick, "best": best, "slower": slower, "left_out": left_out,
        "rows": {name: {side: {key: x[side][key] for key in KEPT} for side in SIDES} for name, x in found.items()},
    }  # fmt: skip

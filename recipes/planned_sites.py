"""What `plan.py` says of unequal sites: the exchanges, each site's part of the pick, three lines, JSON."""

from collections.abc import Mapping
from typing import Any

from parallel.layout.axes import SLOW, shown
from recipes import planned, sites
from runtime.console import aligned, human_bytes, human_count

ROWS = 8  # of the table: exchanges


def table(found: sites.Found) -> str:
    """Of each exchange what a round would be, most tokens a second first; the pick is marked. Below, its sites."""
    best = found.rounds[:ROWS]
    if found.pick not in best:
        best = [found.pick, *best[:-1]]
    names = [share.target.text for share in found.pick.shares]
    head = ("", "exchange", *(f"{name}: steps × rows" for name in names), "a round", "tokens/s", "idle, by site")
    rounds = [
        (
            "*" if x is found.pick else "",
            f"{x.strategy} {x.codec}",
            *(f"{share.steps} × {share.rows}" for share in x.shares),
            planned.seconds(x.seconds),
            human_count(x.tokens_per_second),
            ", ".join(f"{x.idle(share):.0%}" for share in x.shares),
        )
        for x in best
    ]
    rows = [("", "site", "mesh", "micro-steps", "remat", "a step", "memory")]
    for share in found.pick.shares:
        c = share.candidate
        own = " × ".join(f"{axis} {size}" for axis, size in shown(c.layout.sizes).items() if axis != SLOW)
        held = f"{human_bytes(c.peak_bytes)} of {human_bytes(c.memory)}"
        step = planned.seconds(c.bare_seconds)
        rows.append(("", share.target.text, own, str(c.layout.accumulate), planned.remat(c), step, held))
    return f"{aligned([head, *rounds])}\n\n{aligned(rows)}"


def explained(found: sites.Found, alone: Mapping[str, float]) -> list[str]:
    """Three lines: how fast the pick is; where the time goes, and who is idle; what the sites gain by being joined.
    alone: tokens a second of each site by itself."""
    x = found.pick
    of = "a step" if x.interval == 1 else "a round"
    fast = f"{planned.seconds(x.seconds)} {of}, {human_count(x.tokens_per_second)} tokens/s"
    first = f"pick: {x.strategy} {x.codec}: {fast}"
    busy = ", ".join(f"{share.target.text} {planned.seconds(share.busy)}" for share in x.shares)
    idle = ", ".join(f"{share.target.text} {x.idle(share):.0%}" for share in x.shares)
    time = (
        f"time: computing {busy}, waiting for the slow link {planned.seconds(x.waits)}: {x.binds} binds; idle: {idle}"
    )
    if not alone:
        return [first, time, "alone: no site holds the model"]
    best = max(alone, key=lambda name: alone[name])
    rates = ", ".join(f"{name} {human_count(rate)}" for name, rate in alone.items())
    gain = x.tokens_per_second / alone[best] - 1
    joined = (
        f"joined they are {gain:.0%} faster than {best}" if gain > 0 else f"joined they are slower than {best} alone"
    )
    return [first, time, f"alone: {rates} tokens/s: {joined}"]


def commands(found: sites.Found, config: str) -> list[str]:
    """What looks at a site's own part, of chips that programs can be compiled for."""
    return [
        f"python train.py --config={config} --target={share.target.text} --dry_run {share.flags}"
        for share in found.pick.shares
        if share.target.chip.is_tpu or share.target.chip.xla
    ]


def as_json(found: sites.Found) -> dict[str, Any]:
    """As of equal sites (recipes/planned.py), but that a candidate has `sites` in place of one mesh."""
    return {
        "candidates": [_round_json(x) for x in found.rounds],
        "pick": _flags(found.pick),
        "considered": found.considered,
    }


def _flags(x: sites.Round) -> str:
    return f"--config.sync.strategy={x.strategy} --config.sync.codec={x.codec}"


def _round_json(x: sites.Round) -> dict[str, Any]:
    each = [
        {
            "site": share.target.text,
            "flags": share.flags,
            "mesh": shown(share.candidate.layout.sizes) | {SLOW: 1},
            "steps": share.steps,
            "rows": share.rows,
            "peak_bytes": share.candidate.peak_bytes,
            "busy_seconds": share.busy,
            "idle": x.idle(share),
        }
        for share in x.shares
    ]
    return {
        "flags": _flags(x),
        "sites": each,
        "fits": True,
        "seconds": x.seconds,
        "tokens_per_second": x.tokens_per_second,
        "binds": x.binds,
        "compiled": None,
    }

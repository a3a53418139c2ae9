"""Islands without machines: how schemes of asynchronous training do at the speeds, failures and links that you name, in
seconds of a simulated clock. The view and the fold are those of real islands.

Printed is a table; table.md, loss.png, staleness.png and, of the textbook example, path.png are written into the
workdir. Intervals are those of the mean over seeds, 95 %. A loss is that of the last eighth of the time; the target is
the first scheme's.

python -m islands.laboratory --task=mixture
python -m islands.laboratory --task=mixture --schemes=synchronous,delayed,delayed+dylu --speeds=1,1,2,4 --islands=4
python -m islands.laboratory --task=mixture --spread=0.3 --straggle=0.02 --fail=2@300+200 --join=5@600
python -m islands.laboratory --task=textbook --seeds=1
"""

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from islands import decode, pictures
from islands.laboratory import Outcome, Scheme, play
from islands.merge import Average, Compensated, Nesterov, Outer, Quorum
from islands.pace import Site
from islands.toys import Mixture, Textbook
from recipes.table import student_t
from runtime import exits, usage
from runtime.config import UsageError
from runtime.console import aligned
from runtime.metrics import replace_file


@dataclass(frozen=True)
class Experiment:
    """task: of a seed. schemes: the first is what the others are compared with. speeds: in turn, of so many islands."""

    task: Callable[[int], Any]
    schemes: dict[str, Scheme]
    speeds: tuple[float, ...]
    islands: int
    seconds: float


# Outer learning rates: of 0.0125 … 2, by factors of about 1.4 where it matters, the best on seeds that are not shown.
# Larger ones of the last three end a moment lower, and leap to twice the loss in between.
H = 50
MIXTURE = {
    "synchronous": Scheme(Average(Outer("nesterov", 1.4, 0.9)), H, staleness=0),
    "naive": Scheme(Nesterov(Outer("nesterov", 0.025, 0.9), buffer=1), H),
    "delayed": Scheme(Nesterov(Outer("nesterov", 1.4, 0.9)), H),
    "delayed+dylu": Scheme(Nesterov(Outer("nesterov", 0.5, 0.9)), H, dylu=True),
    "quorum": Scheme(Quorum(Outer("nesterov", 0.14, 0.9), 4), H),
    "compensated": Scheme(Compensated(Outer("sgd", 0.25, 0.0)), H),
    "plain": Scheme(Nesterov(Outer("sgd", 0.25, 0.0), buffer=1), H),
}
# Every gradient is pushed, and applied as it is: Downpour, and stale-synchronous with bounds.
DOWNPOUR = Scheme(Nesterov(Outer("sgd", 1.0, 0.0), buffer=1), 1)
TEXTBOOK = {f"ssp-{s}": replace(DOWNPOUR, staleness=s) for s in (0, 1, 4)} | {"downpour": DOWNPOUR}

EXPERIMENTS = {
    "mixture": Experiment(Mixture, MIXTURE, (1 / 0.58, 1 / 0.75, 1 / 1.51, 1 / 3.33), 8, 2000.0),  # as in the paper
    "textbook": Experiment(Textbook, TEXTBOOK, (1.0, 1.0, 2.0, 4.0), 4, 300.0),
}


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────


def main(argv: Sequence[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    experiment = EXPERIMENTS[args.task]
    schemes = _schemes(args, experiment)
    sites = _sites(args, experiment)
    seconds = args.seconds or experiment.seconds
    outcomes: dict[str, list[Outcome]] = {name: [] for name in schemes}
    paths: dict[str, np.ndarray] = {}
    for name, scheme in schemes.items():
        for seed in range(args.seeds):
            path: list[np.ndarray] = []
            watch = (lambda _, state: path.append(state.arrays["params/w"].copy())) if args.task == "textbook" else None  # noqa: B023
            outcomes[name].append(play(experiment.task(seed), sites, scheme, seconds, seed, watch))
            if path and seed == 0:
                paths[name] = np.array(path)
        print(f"{name}: {outcomes[name][0].steps:,} steps, loss {outcomes[name][0].loss:.4f}", flush=True)
    head, rows = tabulated(outcomes)
    print("\n" + aligned([head, *rows]))
    workdir = Path(args.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    replace_file(workdir / "table.md", ("\n".join(lines) + "\n").encode())
    pictures.losses({"": outcomes}, workdir / "loss.png")
    pictures.staleness({"": outcomes}, workdir / "staleness.png")
    if paths:
        pictures.paths(Textbook(), paths, workdir / "path.png")
    print(f"\n{workdir}: {', '.join(sorted(each.name for each in workdir.iterdir()))}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = usage.parser(__doc__, "python -m islands.laboratory")
    parser.add_argument(
        "--task", choices=sorted(EXPERIMENTS), required=True, help="what is trained: " + " or ".join(EXPERIMENTS)
    )
    parser.add_argument("--schemes", default="", help="names, by commas; default: all of the task")
    parser.add_argument(
        "--islands", type=usage.positive, metavar="N", help="how many; default: 8, or 4 of the textbook example"
    )
    parser.add_argument(
        "--speeds", default="", help="steps a second, by commas, in turn over the islands; default: the task's"
    )
    parser.add_argument("--spread", type=float, default=0.0, help="of the log-normal factor of a round's time")
    parser.add_argument("--straggle", type=float, default=0.0, help="share of rounds that take 10 times as long")
    parser.add_argument("--bandwidth", type=float, default=math.inf, help="bytes a second of each island's link")
    parser.add_argument("--latency", type=float, default=0.0, help="seconds of each transfer")
    parser.add_argument(
        "--fail", action="append", metavar="I@T+S", help="island I dies at T, and is back after S seconds"
    )
    parser.add_argument("--join", action="append", metavar="I@T", help="island I joins at T")
    parser.add_argument("--leave", action="append", metavar="I@T", help="island I leaves at T")
    parser.add_argument("--codec", default="", help="of what is pushed, with its default keys; default: float32")
    parser.add_argument(
        "--seconds", type=float, help="of simulated time; default: 2000, or 300 of the textbook example"
    )
    parser.add_argument("--seeds", type=usage.positive, metavar="N", default=3, help="runs of each scheme")
    parser.add_argument(
        "--workdir", default="runs/laboratory", metavar="PATH", help="where table and plots are written"
    )
    return parser


def _schemes(args: argparse.Namespace, experiment: Experiment) -> dict[str, Scheme]:
    names = args.schemes.split(",") if args.schemes else list(experiment.schemes)
    for name in names:
        if name not in experiment.schemes:
            raise UsageError(f"--schemes={args.schemes}: {name!r} is none of {', '.join(experiment.schemes)}")
    try:
        codec = decode.build(args.codec) if args.codec else None
    except ValueError as error:
        raise UsageError(f"--codec={args.codec}: {error}") from error
    return {name: replace(experiment.schemes[name], codec=codec) for name in names}


def _sites(args: argparse.Namespace, experiment: Experiment) -> list[Site]:
    try:
        speeds = [float(text) for text in args.speeds.split(",")] if args.speeds else experiment.speeds
        common: dict[str, Any] = {
            "spread": args.spread, "straggle": args.straggle, "bandwidth": args.bandwidth, "latency": args.latency
        }  # fmt: skip
        turns = itertools.islice(itertools.cycle(speeds), args.islands or experiment.islands)
        sites = [Site(speed=speed, **common) for speed in turns]
    except ValueError as error:
        raise UsageError(f"--speeds={args.speeds}: {error}") from error
    for option in ("fail", "join", "leave"):
        for text in getattr(args, option) or ():
            i, change = _event(option, text, len(sites))
            fails = sites[i].fails + change.pop("fails", ())
            sites[i] = replace(sites[i], **change, fails=fails)
    return sites


def _event(option: str, text: str, islands: int) -> tuple[int, dict[str, Any]]:
    """(island, what it changes of its Site) of I@T, or I@T+S."""
    try:
        number, _, when = text.partition("@")
        time, plus, away = when.partition("+")
        i, found = int(number), {"fail": "fails", "join": "joins", "leave": "leaves"}[option]
        if not 0 <= i < islands or bool(plus) and option != "fail":
            raise ValueError(text)
        back = {"away": float(away)} if plus else {}
        return i, {found: (float(time),) if option == "fail" else float(time), **back}
    except ValueError as error:
        form = "I@T+S (without +S it stays away)" if option == "fail" else "I@T"
        raise UsageError(f"--{option}={text}: expected {form}, with an island I from 0 to {islands - 1}") from error


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """(low, mean, high): 95 % of the mean, by Student's t; of one value, the value."""
    mean, count = float(np.mean(values)), len(values)
    half = student_t(count - 1) * float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else 0.0
    return mean - half, mean, mean + half


def tabulated(outcomes: dict[str, list[Outcome]]) -> tuple[list[str], list[list[str]]]:
    head = ["scheme", "loss", "95 % interval", "s to target", "× sooner", "steps", "pushes", "stale: mean", "most",
            "MB pushed"]  # fmt: skip
    target = float(np.mean([each.loss for each in next(iter(outcomes.values()))]))
    rows, first = [], math.inf
    for name, found in outcomes.items():
        low, mean, high = interval([each.loss for each in found])
        curve = replace(found[0], losses=list(np.mean([each.losses for each in found], axis=0)))
        seconds = curve.seconds_to(target)
        first = seconds if not rows else first
        stale = [x for each in found for x in each.staleness]
        rows.append([
            name, f"{mean:.4f}", f"{low:.4f} … {high:.4f}",
            f"{seconds:.0f}" if math.isfinite(seconds) else "never",
            f"{first / seconds:.2f}" if seconds else "",
            f"{np.mean([each.steps for each in found]):,.0f}",
            f"{np.mean([len(each.staleness) for each in found]):,.0f}",
            f"{np.mean(stale):.1f}" if stale else "", f"{max(stale)}" if stale else "",
            f"{np.mean([each.bytes for each in found]) / 1e6:.1f}",
        ])  # fmt: skip
    return head, rows


def command() -> None:
    sys.exit(exits.guarded(partial(main, sys.argv[1:]), "no table was written"))

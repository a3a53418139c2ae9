"""Which mesh, micro-steps, rematerialisation and exchange make the most of a machine: what fits, how fast, and why.

python plan.py --config=configs/llama3_70b.py --hardware=h100:128x8 --link=100gbit
python plan.py --config=configs/llama3_8b.py --hardware=2xv5p-64 --json=plan.json
python plan.py --config=configs/llama3_8b.py --hardware=h100:8x8 --compile --write=runs/planned.py
python plan.py --config=configs/llama3_1b.py --hardware=h100:8+l4:4 --link=1gbit   (two unequal sites, a plan alone)

Nothing is allocated and no chip is needed: all that is legal is counted in closed form. What is given as --config.KEY
stays as it is. With --compile the best are compiled for the machine, and what was predicted stands beside it.
"""

if __name__ == "__main__":
    from runtime import early

    early.end_at_ctrl_c()

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from parallel.cost import compilers, hardware, targets
from parallel.cost.link import Link
from parallel.cost.targets import Target
from recipes import gaps, methods, plan, planned, planned_sites, sites, tried
from recipes.build import num_parameters
from recipes.case import Case
from runtime import config as configuration
from runtime import exits, library_log, metrics, usage
from runtime.config import UsageError, bad_input
from runtime.console import human_count

BEST = 3  # that are compiled


def main(argv: list[str]) -> int:
    args, changes = parse(argv)
    known = methods.known()._replace(chosen=tuple(tried.READ_BY))
    config, flags = configuration.parse(["plan.py", f"--config={args.config}", *changes], "", known)
    methods.validate(config)
    if "+" in args.hardware:
        return unequal(args, config, flags)
    with bad_input():
        target = read_hardware(args.hardware)
        link = read_link(args.link, target)
        if args.compile:
            compilers.check_compiler(target.chip)
    if args.write:
        planned.check_written(args.write)
    jax.config.update("jax_platforms", "cpu")  # nothing is run
    if args.compile:
        compilers.prepare(target.chip)
        library_log.begin()  # compilers print by themselves
    case = Case(config, target, link, tuple(flags.typed), gaps.read(args.gaps) if args.gaps else None)
    print("\n".join(planned.said(target, case)), flush=True)

    found = plan.search(case)
    windows = found.pick.tokens // config.data.seq_len
    print("\n".join(found.notes), end="\n" * bool(found.notes))
    print(
        f"{flags.config_name}: {human_count(num_parameters(case.base))} parameters, {windows} windows of "
        f"{config.data.seq_len:,} tokens a step; {found.considered} candidates, {len(found.fitting)} fit\n"
    )
    print(planned.table(found), end="\n\n")
    print("\n".join(planned.explained(found, case)))
    key_of = lambda word: word.split("=")[0].removeprefix("--config.")
    idle = tried.idle(found.pick.layout.sizes)
    typed = [word for word in changes if key_of(word) not in (*found.pick.changes, *idle)]
    print(" ".join(["python train.py", f"--config={args.config}", *typed, found.pick.flags]))

    checked = {}
    if args.compile:
        best = best_few(found)
        results = planned.compile_all(case, best, lambda line: print(line, flush=True))
        checked = {id(c): results[i] for i, c in enumerate(best)}
        found = planned.confirmed(found, best, results)
        print(f"pick, as compiled: {found.pick.flags}")
    if args.json:
        with bad_input():
            metrics.write_json(args.json, planned.as_json(found, checked))
    if args.write:
        planned.write_config(args.write, case, found.pick, flags.config_name)
        print(f"python train.py --config={args.write}")
    return 0


def unequal(args: argparse.Namespace, config: Any, flags: Any) -> int:
    """The plan of sites that are not alike. Nothing trains on them together yet."""
    for name in ("compile", "write", "gaps"):
        if getattr(args, name):
            raise UsageError(f"--{name}: one program runs on equal sites, and {args.hardware} are not: leave it out")
    with bad_input():
        targets = [read_hardware(text.strip()) for text in args.hardware.split("+")]
        link = Link.parse(args.link) if args.link else None
        named = [target for target in targets for target in [replace(target, slices=1)] * target.slices]
    jax.config.update("jax_platforms", "cpu")
    case = Case(config, named[0], link, tuple(flags.typed))
    print("\n".join(target.said() for target in targets))
    print(f"{len(named)} replicas, one a site, joined by {link.text if link else 'the adapters of the catalogue'}")
    found = sites.search(sites.cases(case, named))
    print("\n".join(found.notes), end="\n" * bool(found.notes))
    print(f"{flags.config_name}: {found.considered} candidates\n\n{planned_sites.table(found)}\n", flush=True)
    print("\n".join(planned_sites.explained(found, sites.rates_alone(case, named))))
    print("this is a plan alone: one program runs on equal sites, and no command trains unequal ones together yet")
    if looks := planned_sites.commands(found, args.config):
        print("\n".join(["what a site would hold and compute by itself:", *looks]))
    if args.json:
        with bad_input():
            metrics.write_json(args.json, planned_sites.as_json(found))
    return 0


def best_few(found: plan.Found) -> list[plan.Candidate]:
    """The pick, and what would be picked on the other meshes that are fastest."""
    return [found.pick, *(c for c in planned.by_mesh(found) if c is not found.pick)][:BEST]


def read_hardware(text: str) -> Target:
    """Raises ValueError."""
    try:
        target = targets.parse(text, hardware.catalogue())
    except ValueError as error:
        raise ValueError(str(error).replace("target=", "hardware=", 1)) from error
    if not (target.chip.memory and target.chip.bandwidth):
        raise ValueError(f"hardware={text}: the catalogue has no memory and bandwidth of {target.chip.name}")
    return target


def read_link(text: str | None, target: Target) -> Link | None:
    """Raises ValueError."""
    if text is None:
        return None
    link = Link.parse(text)
    if target.slices == 1 and (target.chip.is_tpu or target.hosts == 1):
        one = "slice" if target.chip.is_tpu else "host"
        raise ValueError(
            f"link={text} joins hosts or slices, and {target.text} is one {one}: name several, as 2x{target.text}"
        )
    return link


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """(options, changes of the config)."""
    parser = usage.parser(__doc__, "python plan.py")
    parser.add_argument("--config", required=True, metavar="FILE", help="one like configs/llama3_8b.py")
    parser.add_argument("--config.KEY", metavar="VALUE", help="in place of what that has; it is not chosen then")
    parser.add_argument(
        "--hardware", required=True, metavar="MACHINE", help="as h100:4x8, v5p-128, 2xv5p-64 or h100:8+l4:4"
    )
    parser.add_argument(
        "--link", metavar="RATE[,LATENCY]", help="between replicas, out of one host or slice: 10gbit,20ms"
    )
    parser.add_argument(
        "--gaps", type=Path, metavar="RESULT", help="a comparison's folder: by time to a loss, not tokens per second"
    )
    parser.add_argument("--compile", action="store_true", help="compile the best few for the machine")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all candidates, as JSON")
    parser.add_argument("--write", type=Path, metavar="FILE", help="the pick, as a config that runs")
    parser.add_argument("--version", action="version", version=configuration.version(), help="show versions")
    return configuration.with_changes(parser, argv)


def run(argv: list[str], leave: Callable[[int], Any] = int) -> int:
    return exits.guarded(lambda: main(argv), "nothing was kept", leave)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], leave=os._exit))

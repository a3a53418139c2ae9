"""Trains a language model on a mesh of devices, across slow links if there are any. Stop it anywhere, start it again.

python train.py --config=configs/quickstart.py --simulate=8 --config.mesh.fsdp=4 --config.mesh.tensor=2
python train.py --workdir=runs/quickstart-20261123-1a2b3c          (goes on with that run)
python train.py --config=configs/llama3_8b.py --simulate=64 --dry_run --memory=80GiB          (what it would need)
"""

import gc
import time

STARTED = time.time()  # before the imports: they are a phase of the start, too
if __name__ == "__main__":
    from runtime import early

    early.end_at_ctrl_c()
    gc.disable()  # what imports and tracing make stays: looking through it for garbage delays the start

import contextlib
import os
import sys
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from data.corpus import cache_directory
from parallel.layout import mesh as meshes
from recipes import begin, build, describe, finish, fit, memory, methods, over_link, programs, target
from runtime import agree, exits, library_log, preemption
from runtime.config import bad_input
from runtime.console import Console
from runtime.preemption import EXIT_CODE, PreemptionNotice
from runtime.progress import Phases
from runtime.workdir import default_name


def main(argv: list[str]) -> int:
    with contextlib.closing(Phases(STARTED)) as phases:
        return train(argv, phases)


def train(argv: list[str], phases: Phases) -> int:
    # ── Config ───────────────────────────────────────────────────────────────────────────────────────────────────
    config, flags = methods.parse(argv, __doc__ or "")
    methods.validate(config)

    if flags.target or flags.save:
        return target.dry_run(config, flags, phases)

    # ── Devices ──────────────────────────────────────────────────────────────────────────────────────────────────
    where = None if flags.dry_run else flags.workdir or default_name(flags.config_name, config)
    notice, facts, console, mesh = start_devices(config, flags, where)
    phases.console = console
    parts = build.build(config, mesh)
    link = over_link.read(flags.link, flags.step_seconds, flags.dry_run, parts.replicas)
    programs.use_compilation_cache(cache_directory())
    phases.mark("import")
    limit = memory.read(flags.memory) or memory.of_device()
    if where is None:
        with memory.explained(config, parts, console):
            return describe.dry_run(config, parts, console, phases, link, flags.step_seconds, limit)

    # ── Begin, or go on: compile while the data is read; restore, or make the first state ────────────────────────
    workdir = begin.open_workdir(config, where, flags.resume, console)
    with memory.explained(config, parts, console):
        run, state = begin.begin(config, parts, workdir, console, phases, facts, limit)

    # ── Train ────────────────────────────────────────────────────────────────────────────────────────────────────
    meshes.keep_freed_memory()
    gc.freeze()  # what the start has made stays
    gc.enable()
    with memory.explained(config, parts, console):
        outcome = fit.train(run, state, notice)

    # ── Tell ─────────────────────────────────────────────────────────────────────────────────────────────────────
    if outcome.interrupted:
        console.say(f"stopped by SIGTERM after step {outcome.step}, saved; the same command goes on from there")
        return EXIT_CODE
    return finish.finish(run, outcome.state, outcome.evaluated, link)


def start_devices(config, flags, where: str | None) -> tuple[PreemptionNotice, dict[str, Any], Console, Mesh]:
    """Meets the other processes, if there are any, and makes sure that all were started alike. The dictionary is the
    facts of code and versions."""
    meshes.take_gpu_memory()
    with bad_input():
        if flags.simulate:
            meshes.simulate(flags.simulate, flags.num_processes or 1)
        warning = agree.start_distributed(
            flags.coordinator, flags.num_processes, flags.process_id, flags.heartbeat, flags.wait
        )
    library_log.begin()
    notice, facts = preemption.notice(), agree.same_start(config, flags)
    console = begin.make_console(flags.config_name, where, config, flags.simulate, flags.notes, warning)
    with bad_input():
        mesh = meshes.build(meshes.fill_sizes(config.mesh, len(jax.devices())))
    return notice, facts, console, mesh


def run(argv: list[str], leave: Callable[[int], Any] = int) -> int:
    """main, with what is no fault of this program shown as a sentence. leave: how to end after one."""

    def together() -> int:
        code = main(argv)
        agree.leave()
        return code

    return exits.guarded(together, "the same command goes on from the last checkpoint", leave)


if __name__ == "__main__":
    # A failure ends at once: a compilation may be under way, and nobody waits for what failed.
    sys.exit(run(sys.argv, leave=os._exit))

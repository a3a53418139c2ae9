"""What `plan.py` says of what it found: a table, the pick in three lines, JSON, a config that runs."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from parallel.cost.host import OFFLOAD
from parallel.cost.targets import Target
from parallel.layout.axes import SLOW, shown
from recipes import aot, programs
from recipes import target as targeted
from recipes.candidate import Candidate
from recipes.case import Case
from recipes.plan import CLOSE, Found, picked
from runtime import config as configuration
from runtime.config import RunError, UsageError, changed
from runtime.console import aligned, human_bytes, human_count

ROWS = 8  # of the table: meshes
COLUMNS = ("", "mesh", "micro-steps", "remat", "exchange", "a step", "tokens/s", "computing", "waiting for", "memory")
LATE = "steps"  # a further column: of those that a synchronous run needs to the same loss


@dataclass(frozen=True)
class Compiled:
    """What a compiler says of a candidate, of a device and step. wire: by axis. fits: None: the compiler failed."""

    peak_bytes: float
    fits: bool | None
    flops: float
    wire: dict[str, float]
    said: str = ""


# ── tables ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def table(found: Found) -> str:
    """Of each mesh what would be picked on it, the fastest meshes first; the pick is marked."""
    best = by_mesh(found)
    if found.pick not in best[:ROWS]:
        best = [found.pick, *best]
    rows = [COLUMNS, *(_row(c, found.pick) for c in best[:ROWS])]
    if found.by_loss:
        late = [LATE, *(f"× {c.delay:.2f}" for c in best[:ROWS])]
        rows = [(*row, more) for row, more in zip(rows, late, strict=True)]
    return aligned(rows)


def by_mesh(found: Found) -> list[Candidate]:
    meshes: dict[tuple[int, ...], list[Candidate]] = {}
    for c in found.fitting:
        meshes.setdefault(tuple(c.layout.sizes.values()), []).append(c)
    return sorted(map(picked, meshes.values()), key=lambda c: c.to_loss)


def _row(c: Candidate, pick: Candidate) -> tuple[str, ...]:
    waits = {axis: x for axis, x in c.step.exposed.items() if x >= 0.005 * c.seconds}
    return (
        "*" if c is pick else "",
        mesh(c),
        str(c.layout.accumulate),
        remat(c),
        exchange(c),
        seconds(c.seconds),
        human_count(c.tokens_per_second),
        f"{c.step.compute / c.seconds:.0%}",
        ", ".join(f"{axis} {x / c.seconds:.0%}" for axis, x in waits.items()) or "nothing",
        human_bytes(c.peak_bytes),
    )


def seconds(x: float) -> str:
    """With three digits, by which candidates differ."""
    return f"{x:.2f} s" if x >= 1 else f"{1000 * x:.3g} ms"


def mesh(c: Candidate) -> str:
    return " × ".join(f"{axis} {size}" for axis, size in shown(c.layout.sizes).items())


def remat(c: Candidate) -> str:
    """compute.remat; of a pipeline, its own and its gather, too."""
    *form, runs = c.layout.pipeline if c.layout.stages > 1 else (1,)
    return ", ".join([c.layout.remat, *form, *[f"{runs} runs"] * (runs > 1)])


def micro_steps(c: Candidate) -> str:
    return f"{c.layout.accumulate} micro-step{'s' * (c.layout.accumulate > 1)}"


def exchange(c: Candidate) -> str:
    return f"{c.strategy} {c.codec}" if c.layout.sizes[SLOW] > 1 else "none"


# ── the pick ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def explained(found: Found, case: Case) -> list[str]:
    """Three lines: what it is and how fast; where the time goes; what it holds, and what memory forbids."""
    pick, target = found.pick, case.target
    used = pick.tokens_per_second * (case.base.task.flops() or 0.0) / (target.chips * target.chip.bf16)
    fast = f"{seconds(pick.seconds)} a step, {human_count(pick.tokens_per_second)} tokens/s, MFU {used:.0%}"
    first = f"pick: {mesh(pick)}, {micro_steps(pick)}, remat {remat(pick)}, exchange {exchange(pick)}: {fast}"
    if case.gaps and pick.layout.sizes[SLOW] > 1:
        row = case.gaps.of(pick.strategy, pick.codec).row
        first += f"; × {pick.delay:.2f} the steps to a loss, by the row {row!r}"
    return [first, _time(pick), _memory(found) + _away(found, target)]


def _time(pick: Candidate) -> str:
    step = pick.step
    waits = [f"waiting for {axis} {seconds(x)}" for axis, x in step.exposed.items() if x]
    wires = [f"{axis} {seconds(x)}" for axis, x in step.wire.items() if x]
    spent = f"time: {', '.join([f'computing {seconds(step.compute)}', *waits])}: {step.binds} binds"
    return f"{spent}; on the wire, hidden or not: {', '.join(wires) or 'nothing'}"


def _memory(found: Found) -> str:
    pick = found.pick
    moment = max(pick.moments, key=lambda name: sum(pick.moments[name].values()))
    array, size = max(pick.moments[moment].items(), key=lambda row: row[1])
    said = (
        f"memory: {human_bytes(pick.peak_bytes)} of {human_bytes(pick.memory)}, "
        f"{human_bytes(pick.state_bytes)} of it state; most in {moment}, where {array} are {human_bytes(size)}"
    )
    faster = [c for c in found.others if CLOSE * c.bare_seconds < pick.bare_seconds]  # counted without an exchange
    if not faster:
        return f"{said}; more of it would gain nothing"
    best = min(faster, key=lambda c: c.bare_seconds)
    gain, short = pick.bare_seconds / best.bare_seconds - 1, human_bytes(best.needed_bytes)
    how = f"{mesh(best)}, {micro_steps(best)}, remat {remat(best)}"
    return f"{said}; memory binds, too: {how} would be {gain:.0%} faster, and may need {short}"


def _away(found: Found, target: Target) -> str:
    """What offload takes of a host's memory; or, where it is not asked for, what it would gain."""
    pick, best = found.pick, found.offloaded
    of_host = lambda c: f"{human_bytes(c.host_bytes * target.chips / target.hosts)} of each host's memory"
    if pick.host_bytes:
        return f"; besides, {of_host(pick)}"
    if best is None or CLOSE * best.bare_seconds >= pick.bare_seconds:
        return ""
    gain, how = pick.bare_seconds / best.bare_seconds - 1, f"{mesh(best)}, {micro_steps(best)}, remat {remat(best)}"
    return f"; {how} would be {gain:.0%} faster, and take {of_host(best)}: --config.compute.remat={OFFLOAD} plans it"


# ── compiled ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def compile_all(case: Case, candidates: Sequence[Candidate], say: Any) -> dict[int, Compiled]:
    """{place among these: what the compiler says}. say: prints a line."""
    found, began = {}, time.monotonic()
    for note in targeted.fitted(changed(case.config, {}), case.target, list(configuration.base_values())):
        say(note)
    for i, c in enumerate(candidates):
        left = f", about {seconds((time.monotonic() - began) / i * (len(candidates) - i))} left" if i else ""
        say(f"compiling {i + 1} of {len(candidates)}: {mesh(c)}, {remat(c)}, {exchange(c)}{left}")
        found[i] = compiled(case, c)
        say(beside(c, found[i]))
    return found


def compiled(case: Case, c: Candidate) -> Compiled:
    """Of the strategy's programs: the highest peak, and what the dearest sends."""
    config = changed(case.config, c.changes)
    targeted.fitted(config, case.target, list(configuration.base_values()))
    parts = targeted.make(config, case.target)
    peaks, readings = [], []
    try:
        for name, lower in programs.steps(parts).items():
            program = aot.compiled(lower, parts.xla_options)
            peaks.append(aot.peak(program, parts, name)[1])
            if not isinstance(program, aot.Refused):
                readings.append(aot.read(name, program, parts, case.target, config))
            del program
    except RunError as error:
        return Compiled(math.nan, None, math.nan, {}, str(error))
    dearest = max(readings, key=lambda x: sum(s.bytes for s in x.wire), default=None)
    wire: dict[str, float] = {}
    for s in dearest.wire if dearest else ():
        wire[s.axis] = wire.get(s.axis, 0.0) + s.bytes
    return Compiled(max(peaks), max(peaks) <= case.target.memory, dearest.flops if dearest else math.nan, wire)


def confirmed(found: Found, tried: Sequence[Candidate], results: Mapping[int, Compiled]) -> Found:
    """With the fastest of those that were compiled and fit as the pick. Raises RunError where none does."""
    fit = [c for i, c in enumerate(tried) if results[i].fits]
    if not fit:
        raise RunError(f"none of the {len(tried)} candidates that were compiled fits: plan with more chips")
    return found._replace(pick=found.pick if found.pick in fit else picked(fit))


def beside(c: Candidate, x: Compiled) -> str:
    """One line: predicted beside compiled."""
    if x.fits is None:
        return f"  {x.said}"
    if not math.isfinite(x.peak_bytes):
        return f"  memory {human_bytes(c.peak_bytes)} predicted; refused by the compiler, which does not say how much"
    sides = [("memory", human_bytes(c.peak_bytes), human_bytes(x.peak_bytes))]
    sides += [(axis, human_bytes(c.sent[axis]), human_bytes(size)) for axis, size in x.wire.items() if axis in c.sent]
    if math.isfinite(x.flops):
        sides.append(("FLOPs", human_count(c.step.flops), human_count(x.flops)))
    verdict = "fits" if x.fits else "does not fit"
    return f"  {verdict}; predicted / compiled: " + ", ".join(f"{name} {a} / {b}" for name, a, b in sides)


# ── kept ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def as_json(found: Found, checked: Mapping[int, Compiled]) -> dict[str, Any]:
    """candidates: those that fit, fastest first, then the others, smallest first. pick: the flags of one. checked: by
    id of a candidate."""
    rows = [*found.fitting, *found.others]
    return {
        "candidates": [_candidate(c, checked.get(id(c))) for c in rows],
        "pick": found.pick.flags,
        "considered": found.considered,
    }


def _candidate(c: Candidate, x: Compiled | None) -> dict[str, Any]:
    says = x and {"fits": x.fits, "peak_bytes": x.peak_bytes, "flops": x.flops, "wire": x.wire}
    return {
        "flags": c.flags,
        "mesh": shown(c.layout.sizes),
        "fits": c.fits,
        "peak_bytes": c.peak_bytes,
        "seconds": c.seconds,
        "tokens_per_second": c.tokens_per_second,
        "steps_to_loss": c.delay,
        "binds": c.step.binds,
        "compiled": says,
    }


def check_written(path: Path) -> None:
    """Raises UsageError where no config can be written, before anything is planned."""
    if path.suffix != ".py":
        raise UsageError(f"--write={path}: a config is a Python file: name it {path.with_suffix('.py')}")
    if path.exists():
        raise UsageError(f"--write={path} is there already: choose another name")
    if not path.parent.is_dir():
        raise UsageError(f"--write={path}: there is no folder {path.parent}")


def write_config(path: Path, case: Case, pick: Candidate, name: str) -> None:
    """A config like those in configs/: every value that is not the default."""
    values, base = dict(configuration.flatten(changed(case.config, pick.changes))), configuration.base_values()
    lines = "\n".join(f"    c.{key} = {value!r}" for key, value in values.items() if value != base[key])
    path.write_text(
        f'"""{name}, planned for {case.target.text}: {mesh(pick)}.\n\npython train.py --config={path}\n"""\n\n'
        f"from configs import base\n\n\ndef get_config():\n    c = base.get_config()\n{lines}\n    return c\n"
    )


def said(target: Target, case: Case) -> list[str]:
    """What was understood of the machine, and of its links."""
    found = [target.said()]
    each = "site" if not target.chip.is_tpu else "slice"
    if case.link:
        found.append(f"replicas are joined by {case.link.text} out of each {'host' if each == 'site' else 'slice'}")
    elif target.slices > 1:
        found.append(f"{each}s are joined by {target.chip.outside / 1e9:g} GB/s of each chip; --link says another rate")
    return found

"""Programs compiled for a machine that is not here, and what they say of themselves."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from parallel.cost import compilers, hlo, play, rates, schedule, wire
from parallel.cost.bytes import exchange_bytes
from parallel.cost.link import Link
from parallel.cost.schedule import Buffer
from parallel.cost.stray import Traffic
from parallel.cost.targets import Target
from parallel.layout.axes import SLOW
from recipes import describe, memory, phases, programs
from recipes.build import Parts
from recipes.programs import rows_of_evaluation
from runtime import exits
from runtime.config import RunError


class Sent(NamedTuple):
    """Over one axis, in one dtype and kind of collective: bytes that one device sends in a call, and those of them that
    are under way while matrix products are computed."""

    axis: str
    dtype: str
    kind: str
    bytes: float
    hidden_bytes: float


@dataclass(frozen=True)
class Reading:
    """Of one program and device, in a call. peak: of the whole device while it runs, the state that it does not touch
    included. seconds: each part alone, at the chip's nominal rates. played: the schedule, at the shares of them that
    programs reach. NaN: not known."""

    runs_per_step: float
    state_bytes: float
    temporary_bytes: float
    peak_bytes: float
    flops: float = 0.0
    largest: list[Buffer] = field(default_factory=list)
    wire: list[Sent] = field(default_factory=list)
    predicted_wire: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: dict[str, Any] = field(default_factory=dict)
    played: dict[str, Any] = field(default_factory=dict)
    not_counted: str = ""  # why its collectives could not be
    read_from: str = ""  # a larger machine, whose program this was read from: its own was refused
    stray: Traffic | None = None  # what of it crosses `replica` and is not ours
    host_bytes: float = 0.0  # of the host's memory that holds what this device put there


@dataclass(frozen=True)
class Refused:
    """What a compiler said instead of a program. temporaries: bytes; None: it did not say."""

    sentence: str
    temporaries: float | None


def lowerings(config: Any, parts: Parts) -> dict[str, Callable[[], Any]]:
    """{name: lowers it}: the strategy's programs, then those beside them. `restore` is the digest of the whole state,
    which saving and restoring compute."""
    others = programs.beside(parts, config.sample)
    given = programs.takes_over(config, parts)
    others |= {"init": lambda: programs.lower_init(parts, given), "restore": others.pop("digest")}
    return programs.steps(parts) | others


def compiled(lower: Callable[[], Any], xla_options: dict[str, Any]) -> Any:
    """The program, or Refused where it does not fit. Raises RunError where the compiler fails for another reason."""
    lowered = lower()
    try:
        return lowered.compile(compiler_options=xla_options)
    except Exception as error:  # of a type that JAX does not name in public
        first = str(error).splitlines()[0] if str(error) else ""
        if found := compilers.refused(error):
            return Refused(first, found[0])
        if not exits.STATUS.match(first):
            raise
        raise RunError(f"the compiler fails: {first[:300]}") from error


def peak(program: Any, parts: Parts, name: str) -> tuple[float, float]:
    """Bytes of (its temporaries, the device while it runs)."""
    state = memory.state_bytes(parts, parts.mesh.shape)
    if isinstance(program, Refused):
        temporaries = math.inf if program.temporaries is None else program.temporaries
        return temporaries, state + temporaries
    found = program.memory_analysis()
    used = found.peak_memory_in_bytes
    if not used or memory.on_host(program):  # which is in it
        used = found.argument_size_in_bytes + found.temp_size_in_bytes
        used += found.output_size_in_bytes - found.alias_size_in_bytes
    only_params = name in ("evaluation", "sample")
    params = memory.tree_bytes(parts.whole, parts.mesh.shape)
    return found.temp_size_in_bytes, used + (state - params if only_params else 0)


def read(
    name: str,
    program: Any,
    parts: Parts,
    target: Target,
    config: Any,
    other: tuple[str, Any] | None = None,
    link: Link | None = None,
) -> Reading:
    """other: (machine, program) of a larger machine, for a program that was refused. link: what `replica` crosses, if
    it is not the catalogue's."""
    temporaries, most = peak(program, parts, name)
    about: dict[str, Any] = {
        "runs_per_step": runs_per_step(name, config, parts), "state_bytes": memory.state_bytes(parts, parts.mesh.shape),
        "temporary_bytes": temporaries, "peak_bytes": most, "predicted_wire": predicted(name, parts),
    }  # fmt: skip
    if isinstance(program, Refused):
        if other is None:
            return Reading(**about)
        about["read_from"], program = other
    about |= {"stray": stray_of(name, program, parts), "host_bytes": memory.on_host(program)}
    read = hlo.Program.read(program.as_text())
    flops, moved = _or_nan(schedule.flops, read), _or_nan(schedule.bytes_moved, read)
    sent, by_group, why = _sent(read, parts)
    axes = [axis for axis in parts.mesh.axis_names if parts.mesh.shape[axis] > 1]
    wire = dict.fromkeys(axes, 0.0)
    for group, size in by_group.items():
        wire[group[0]] += group_seconds(size, target, parts, group, link)
    seconds = {
        "compute": flops / target.chip.bf16,
        "memory": moved / target.chip.bandwidth,
        "wire": wire,
    }
    about |= {"seconds": seconds, "played": _played(read, parts, target, link)}
    return Reading(**about, flops=flops, largest=schedule.largest(read), wire=sent, not_counted=why)


def _played(read: hlo.Program, parts: Parts, target: Target, link: Link | None) -> dict[str, Any]:
    try:
        return dataclasses.asdict(play.play(read, parts.mesh, target, link))
    except Exception:  # as where it is counted what is sent
        return {"seconds": math.nan}


def _or_nan(count: Callable[[hlo.Program], float], read: hlo.Program) -> float:
    """NaN: a loop runs nobody knows how often."""
    try:
        return count(read)
    except ValueError:
        return math.nan


def _sent(read: hlo.Program, parts: Parts) -> tuple[list[Sent], dict[tuple[str, ...], float], str]:
    """(what it sends, bytes by the axes of a group, why that could not be counted)."""
    try:
        found = wire.collectives(read, parts.mesh)
    except Exception as error:  # whatever a text of unknown form does to a parser
        return [], {}, f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
    behind, sums, by_group = schedule.hidden(read), {}, {}
    for c in found:
        by_group[c.axes] = by_group.get(c.axes, 0.0) + c.sent
        key = (c.axis, c.dtype, c.kind)
        bytes_, hidden = sums.get(key, (0.0, 0.0))
        sums[key] = bytes_ + c.sent, hidden + c.sent * (c.name in behind)
    return [Sent(*key, *sums[key]) for key in sorted(sums)], by_group, ""


def stray_of(name: str, program: Any, parts: Parts) -> Traffic:
    """`restore` is a digest, whose sums may cross."""
    if any(name.removeprefix(phase.prefix) in phase.strategy.exchanges() for phase in parts.phases):
        return describe.traffic(parts, {name: program})[name]
    known = "digest" if name == "restore" else name
    return describe.traffic_beside(parts, {known: program})[known]


def group_seconds(size: float, target: Target, parts: Parts, axes: tuple[str, ...], link: Link | None = None) -> float:
    """That bytes of a chip take in collectives over these axes of the mesh, at best."""
    if axes[0] == SLOW and link:
        return rates.seconds(target, parts.mesh.shape, axes, size, 0, link)
    places = [parts.mesh.axis_names.index(axis) for axis in axes]
    devices = np.moveaxis(parts.mesh.devices, places, range(-len(places), 0))
    return size / target.rate(devices.reshape(-1, math.prod(parts.mesh.shape[axis] for axis in axes)))


def predicted(name: str, parts: Parts) -> dict[str, dict[str, float]]:
    """{replica: {dtype: bytes}} in closed form, without the few named scalars."""
    total: dict[str, float] = {}
    for phase in parts.phases:
        for exchange in phase.strategy.exchanges().get(name.removeprefix(phase.prefix), ()):
            for dtype, size in exchange_bytes(exchange).items():
                total[dtype] = total.get(dtype, 0) + size
    return {SLOW: total} if total else {}


def runs_per_step(name: str, config: Any, parts: Parts) -> float:
    """Calls per step, on average over a run; of what runs once, 0."""
    calls = list(phases.calls(parts, config.steps))
    if name == "evaluation" and config.eval_every:
        return config.eval_batches * config.data.batch_size / rows_of_evaluation(parts) / config.eval_every
    return sum(call.program == name for call in calls) / config.steps


def worst(readings: Mapping[str, Reading]) -> tuple[str, Reading]:
    """The one of the highest peak, with its name."""
    return max(readings.items(), key=lambda row: row[1].peak_bytes)

"""What a dry run for a target says: the table of its programs, whether they fit, and with which changes they would."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from parallel.cost import targets
from parallel.cost.hardware import GiB
from parallel.cost.targets import Target
from parallel.layout.axes import SLOW
from recipes import aot, describe, memory, predicted
from recipes.aot import Reading, Sent
from recipes.build import Parts
from runtime import config as configuration
from runtime.config import RunError, UsageError
from runtime.console import human_bytes, human_count, human_seconds

CHUNK = "compute.loss_chunk_mib"
COPIES = 4  # of a chunk of logits: more than a program ever has
ENOUGH = 1.25  # of the memory that there is: what may yet fit with other changes
ROOM = 0.95  # of the memory that there is: what an estimate between two compiled values may use
Predict = Callable[[dict[str, Any], Target], float]  # ({key: value}, machine) -> bytes of the dearest step program


@dataclass(frozen=True)
class Remedy:
    """flags: as they are typed."""

    flags: str
    peak_bytes: float
    fits: bool


# ── the table ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def rows(config: Any, parts: Parts, target: Target, readings: Mapping[str, Reading]) -> list[tuple[str, str]]:
    """A row without a value is a heading."""
    steps = [name for name in readings if readings[name].runs_per_step and name != "evaluation"]
    found = describe.model_rows(parts) + describe.split_rows(config, parts) + describe.across_rows(config, parts)
    for name in steps:
        found += [(f"{name}, {_often(readings[name].runs_per_step)}", ""), *_program(readings[name], target)]
    found += _predicted(config, parts, [readings[name] for name in steps])
    found += [("beside the step", "")]
    found += [(name, _memory(x)) for name, x in readings.items() if name not in steps]
    return found + describe.weight_rows(parts)


def _predicted(config: Any, parts: Parts, steps: Sequence[Reading]) -> list[tuple[str, str]]:
    """Of a step, on average over the programs that make them."""
    wire: dict[str, float] = {}
    for sent, runs in ((sent, x.runs_per_step) for x in steps for sent in x.wire):
        wire[sent.axis] = wire.get(sent.axis, 0.0) + runs * sent.bytes
    temporary, flops = max(x.temporary_bytes for x in steps), sum(x.runs_per_step * x.flops for x in steps)
    return predicted.rows(config, parts, wire, temporary, flops)


def _often(runs: float) -> str:
    return "once a step" if runs == 1 else f"{runs:.3g} times a step"


def _program(x: Reading, target: Target) -> Iterator[tuple[str, str]]:
    yield "memory", _memory(x)
    if not x.flops:
        return
    if x.read_from:
        yield "read from", f"{x.read_from}'s program: the compiler names nothing of what it refuses"
    known = "not known" if math.isnan(x.flops) else f"{human_count(x.flops)} (matrix products; attention's causal half)"
    yield "FLOPs", known
    for axis in dict.fromkeys(sent.axis for sent in x.wire):
        yield f"wire, {axis}", _wire([sent for sent in x.wire if sent.axis == axis])
    if x.not_counted:
        yield "wire", f"not counted: {x.not_counted}"
    yield "at nominal rates", _seconds(x.seconds)
    if x.played:
        yield "played", _played(x.played)
    for number, buffer in enumerate(x.largest):
        shape = f"{buffer.dtype}{list(buffer.shape)}".replace(" ", "")
        yield "" if number else "largest", f"{human_bytes(buffer.bytes)} {shape} {buffer.where}"


def _memory(x: Reading) -> str:
    if math.isinf(x.peak_bytes):
        return f"refused; state {human_bytes(x.state_bytes)}"
    temporary = "refused: " * bool(x.read_from) + f"temporary {human_bytes(x.temporary_bytes)}"
    beside = f"; {human_bytes(x.host_bytes)} in the host's memory, there and back in a step" if x.host_bytes else ""
    return f"{human_bytes(x.peak_bytes)} at most (state {human_bytes(x.state_bytes)}, {temporary}){beside}"


def _wire(found: Sequence[Sent]) -> str:
    """By dtype; and by kind of collective, what nothing hides."""
    total, hidden = sum(s.bytes for s in found), sum(s.hidden_bytes for s in found)
    said = f"{human_bytes(total)} ({_by({s.dtype for s in found}, lambda name: _sum(found, 'dtype', name))})"
    if hidden:
        said += f"; {human_bytes(hidden)} behind matrix products"
    bare = [s._replace(bytes=s.bytes - s.hidden_bytes) for s in found if s.bytes > s.hidden_bytes]
    return f"{said}; exposed: {_by({s.kind for s in bare}, lambda name: _sum(bare, 'kind', name)) or 'none'}"


def _by(names: Iterable[str], size: Callable[[str], float]) -> str:
    return ", ".join(f"{name} {human_bytes(size(name))}" for name in sorted(names, key=lambda name: -size(name)))


def _sum(found: Iterable[Sent], field: str, name: str) -> float:
    return sum(s.bytes for s in found if getattr(s, field) == name)


def _seconds(seconds: Mapping[str, Any]) -> str:
    all_of_it = {"compute": seconds["compute"], "memory": seconds["memory"]} | seconds["wire"]
    said = ", ".join(f"{name} {'not known' if math.isnan(x) else human_seconds(x)}" for name, x in all_of_it.items())
    if any(map(math.isnan, all_of_it.values())):
        return said
    return f"{said}: {max(all_of_it, key=lambda name: all_of_it[name])} binds"


def _played(played: Mapping[str, Any]) -> str:
    """Of the schedule at the rates that programs reach."""
    if math.isnan(played["seconds"]):
        return "not known"
    waits = [f"waiting for {axis} {human_seconds(x)}" for axis, x in played["exposed"].items() if x]
    spent = ", ".join([f"computing {human_seconds(played['compute'])}", *waits])
    return f"{human_seconds(played['seconds'])} at the shares of these rates that programs reach: {spent}"


def over_slow(readings: Mapping[str, Reading]) -> float | None:
    """Bytes that a device sends over the slow axis per step; None if they were not counted."""
    steps = [x for name, x in readings.items() if x.runs_per_step and name != "evaluation"]
    if any(x.not_counted or not x.flops for x in steps):
        return None
    return sum(x.runs_per_step * s.bytes for x in steps for s in x.wire if s.axis == SLOW)


# ── the verdict ───────────────────────────────────────────────────────────────────────────────────────────────────────


def sentence(target: Target, readings: Mapping[str, Reading], remedies: Sequence[Remedy]) -> str:
    """fits: how much there is to spare; or what is needed, the largest arrays, and what was tried."""
    name, x = aot.worst(readings)
    room = f"{target.memory / GiB:.2f} GiB"
    if x.peak_bytes <= target.memory:
        spare = target.memory - x.peak_bytes
        copied = spare - x.state_bytes
        saving = f"{human_bytes(copied)} while a checkpoint is copied" if copied >= 0 else (
            f"while a checkpoint is copied, {human_bytes(-copied)} too little"
        )  # fmt: skip
        return f"fits: {name} needs {human_bytes(x.peak_bytes)} of {room}; {human_bytes(spare)} to spare, {saving}"
    need = "more than the compiler says" if math.isinf(x.peak_bytes) else human_bytes(x.peak_bytes)
    said = [f"does not fit: {name} needs {need} of {room}"]
    if x.largest:
        first = x.largest[:2]
        said.append("largest: " + ", ".join(f"{human_bytes(b.bytes)} from {b.where}" for b in first))
    works = [r for r in remedies if r.fits]
    tried = ", ".join(f"{r.flags} ({_with(r)})" for r in remedies if not r.fits)
    if works:
        said.append("try " + " or ".join(f"{r.flags} ({_with(r)})" for r in works))
        return "; ".join(said) + (f"; not enough: {tried}" if tried else "")
    return "; ".join([*said, f"nothing that was tried is enough: {tried}" if tried else "nothing is left to try"])


def _with(remedy: Remedy) -> str:
    return "refused" if math.isinf(remedy.peak_bytes) else human_bytes(remedy.peak_bytes)


# ── remedies ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def search(
    config: Any, parts: Parts, target: Target, readings: Mapping[str, Reading], predict: Predict
) -> list[Remedy]:
    """What was tried, compiled: each key's strongest value, a milder one if that leaves room, all together, and a
    larger machine. It ends with the first that fits. What cannot be enough by itself is not compiled by itself: each
    takes a minute for a large model."""
    found: list[Remedy] = []
    now = aot.worst(readings)[1].peak_bytes
    together: dict[str, Any] = {}
    for key, values in memory.values(config, parts).items():
        if not values:
            continue
        if key == CHUNK and now - target.memory > COPIES * memory.chunk_mib(parts) * 2**20:
            together[key] = values[-1]
            continue
        strongest = _tried({key: values[-1]}, target, predict)
        if strongest is None or strongest.peak_bytes >= memory.SAVES * now:
            continue
        found.append(strongest)
        together[key] = values[-1]
        if strongest.fits:
            mild = _milder(key, [dict(configuration.flatten(config))[key], *values], now, strongest, target, predict)
            return [*found, mild] if mild else found
    if len(together) > 1 and (all_of_them := _tried(together, target, predict)):
        found.append(all_of_them)
        if all_of_them.fits:
            return found
    return found + [x for x in (_wider(now, parts, target, together, predict),) if x]


def _tried(changes: dict[str, Any], target: Target, predict: Predict, flag: str = "") -> Remedy | None:
    """None: the config, the mesh or the compiler does not allow it."""
    try:
        need = predict(changes, target)
    except (UsageError, RunError):
        return None
    flags = " ".join([*([flag] if flag else []), *(f"--config.{key}={value}" for key, value in changes.items())])
    return Remedy(flags, need, need <= target.memory)


def _milder(
    key: str, values: Sequence[Any], now: float, strongest: Remedy, target: Target, predict: Predict
) -> Remedy | None:
    """The mildest value that should fit by what the strongest saves, if it does. values: from the config's own on."""
    if not all(isinstance(value, int) for value in values) or not math.isfinite(now):
        return None
    size = (lambda value: 1 / value) if values[0] < values[-1] else (lambda value: value)  # micro-steps, or a chunk
    share = lambda value: (size(value) - size(values[-1])) / (size(values[0]) - size(values[-1]))
    guess = lambda value: strongest.peak_bytes + (now - strongest.peak_bytes) * share(value)
    enough = [value for value in values[1:-1] if guess(value) <= ROOM * target.memory]
    found = _tried({key: enough[0]}, target, predict) if enough else None
    return found if found and found.fits else None


def _wider(now: float, parts: Parts, target: Target, changes: dict[str, Any], predict: Predict) -> Remedy | None:
    """On twice the chips, with twice the shards of the weights, or four times, with the other changes if need be. now:
    what is needed; most of it is cut by as many more."""
    best = None
    for factor in (2, 4):
        more = targets.wider(target, factor)
        if more is None or (factor < 4 and math.isfinite(now) and now / factor > ENOUGH * target.memory):
            continue
        sharded = {"mesh.fsdp": factor * parts.mesh.shape["fsdp"]}
        for extra in ({}, changes) if changes else ({},):
            best = _tried(sharded | extra, more, predict, f"--target={more.text}") or best
            if best and best.fits:
                return best
    return best

"""What the user is told at the start: what a run is and needs, and what its compiled programs send."""

import math
from collections.abc import Iterable
from typing import Any

import jax

from parallel.cost import stray
from parallel.cost.bytes import exchange_bytes
from parallel.exchange.codecs.base import is_round
from parallel.layout import mesh as meshes
from recipes import phases
from recipes.build import Parts, num_parameters
from recipes.programs import compile_beside, compile_init, compile_steps
from runtime.config import UsageError
from runtime.console import Console, human_bytes, human_count
from runtime.digest import named_arrays
from runtime.progress import Phases

DIGEST = 16  # bytes of an array: four sums, which every device may tell every other


# ── what is sent ──────────────────────────────────────────────────────────────────────────────────────────────────────


def traffic(parts: Parts, programs: dict[str, Any]) -> dict[str, stray.Traffic]:
    """What each of the strategy's programs sends, and what of it over `replica` is not its exchange's."""
    predicted = {
        phase.prefix + name: sum(sum(exchange_bytes(e).values()) for e in exchanges)
        for phase in parts.phases
        for name, exchanges in phase.strategy.exchanges().items()
    }
    return {name: stray.traffic(program, parts.mesh, predicted[name]) for name, program in programs.items()}


def traffic_beside(parts: Parts, programs: dict[str, Any]) -> dict[str, stray.Traffic]:
    """What each of these programs sends: over `replica` nothing, but a digest's sums."""
    sums = DIGEST * len(jax.tree.leaves(parts.state)) * (parts.mesh.size - 1)
    bound = lambda name: sums if name == "digest" else 0
    return {name: stray.traffic(program, parts.mesh, bound(name)) for name, program in programs.items()}


def refuse_stray(found: dict[str, stray.Traffic], allow: bool) -> None:
    """Raises UsageError where a program sends over `replica` what is not ours, unless sync.allow_stray_bytes."""
    lines = [f"  {name}: {t.stray:,} bytes a call: {t.culprits}" for name, t in found.items() if t.stray]
    if lines and not allow:
        raise UsageError(
            "the compiled programs send bytes over the slow axis, mesh.replica, that the exchange did not ask for:\n"
            + "\n".join(lines)
            + "\nXLA added them, to lay out an array anew. Another mesh, batch or version of JAX may need none; "
            "sync.allow_stray_bytes=True trains with them"
        )


def wire_bytes(parts: Parts, found: dict[str, stray.Traffic], steps: int) -> dict[str, float]:
    """{mesh axis: bytes that one device sends per step}, on average over a run of so many steps; {} if a program's
    text was not understood. found: of `traffic`."""
    if any(t.not_counted for t in found.values()):
        return {}
    calls = list(phases.calls(parts, steps))
    total = {axis: sum(found[call.program].per_axis[axis] for call in calls) for axis in parts.mesh.axis_names}
    return {axis: round(size / sum(call.steps for call in calls)) for axis, size in total.items()}


# ── tables ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def start(
    title: str,
    config: Any,
    parts: Parts,
    programs: dict[str, Any],
    others: dict[str, Any],
    seconds: dict[str, float],
    console: Console,
    first: Iterable[tuple[str, str]] = (),
    last: Iterable[tuple[str, str]] = (),
) -> dict[str, float]:
    """Shows the table of a start: rows `first`, what the run is and needs, rows `last`. Returns what `wire_bytes` does.
    others: programs beside the step that are compiled already.

    Raises UsageError, below the table, where a program sends over `replica` what is not ours.
    """
    own, found, per_step = read(config, parts, programs, others, seconds)
    console.table(title, [*first, *own, *last])
    refuse_stray(found, config.sync.allow_stray_bytes)
    return per_step


def read(
    config: Any, parts: Parts, programs: dict[str, Any], others: dict[str, Any], seconds: dict[str, float]
) -> tuple[list[tuple[str, str]], dict[str, stray.Traffic], dict[str, float]]:
    """What compiled programs say of themselves: (rows, what each sends, what `wire_bytes` makes of that)."""
    found = traffic(parts, programs) | traffic_beside(parts, others)
    per_step = wire_bytes(parts, found, config.steps)
    return rows(parts, programs, found, per_step, seconds), found, per_step


def beside(config: Any, parts: Parts, console: Console, programs: dict[str, Any]) -> None:
    """Shows the table of the programs beside the step. Raises UsageError where one sends bytes that are not ours."""
    found = traffic_beside(parts, programs)
    console.table("beside the step", [*rows_beside(programs), ("stray, replica", stray_row(found))])
    refuse_stray(found, config.sync.allow_stray_bytes)


def dry_run(name: str, config: Any, parts: Parts, console: Console, times: Phases) -> int:
    """Compiles every program of a run and shows what they need. Returns the exit code."""
    programs, others = compile_all(config, parts)
    times.mark("compile")
    start(f"{name}, dry run", config, parts, programs, others, times.seconds, console, last=rows_beside(others))
    return 0


def compile_all(config: Any, parts: Parts) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the strategy's programs, those beside them)."""
    others = compile_beside(parts, config.sample) | {"init": compile_init(parts, bool(config.init.workdir))}
    return compile_steps(parts), others


def rows(
    parts: Parts,
    programs: dict[str, Any],
    found: dict[str, stray.Traffic],
    per_step: dict[str, float],
    seconds: dict[str, float],
) -> list[tuple[str, str]]:
    """Rows of the start-up table. Memory and wire bytes are those of the compiled programs, not estimates.

    found: what these programs send, and those beside them that are compiled already.
    """
    mesh, task = parts.mesh, parts.task
    need = max((memory(program) for program in programs.values()), key=lambda sizes: sizes[-1])
    rows_of_step = math.prod(next(iter(parts.batch.values())).shape[1:3])
    flops = task.flops()
    state = max(sum(_shard_bytes(x) for x in jax.tree.leaves(phase.state)) for phase in parts.phases)
    kinds = {d.device_kind for d in mesh.devices.flat}
    rows = [
        ("parameters", human_count(num_parameters(parts))),
        ("mesh", f"{meshes.describe(mesh)} = {mesh.size} devices ({', '.join(sorted(kinds))})"),
        ("replicas", f"{parts.replicas}, {_exchange(parts)}"),
        *(("", f"the first {phase.first} steps synchronous, in float32") for phase in parts.phases[1:]),
        *task.about(),
        (f"{task.unit} per step", human_count(rows_of_step * task.units)),
        *([("FLOPs per token", f"{human_count(flops)} (training, full attention)")] if flops else []),
        ("state per device", f"{human_bytes(state)}; as much again while a checkpoint is being copied"),
        ("temporary per device", said_bytes(need[1])),
        ("in all per device", said_bytes(sum(need))),
    ]
    largest = sorted(named_arrays(parts.state.params).items(), key=lambda row: -math.prod(row[1].shape))[:4]
    for name, x in largest:
        rows.append((f"  {name}", f"{list(x.shape)} as {x.sharding.spec}, {human_bytes(_shard_bytes(x))} per device"))
    for axis, size in per_step.items():
        if mesh.shape[axis] > 1:
            rows.append((f"wire per step, {axis}", f"{human_bytes(size)} sent by each device"))
    if len(programs) > 1 and per_step:
        for name in programs:
            rows.append((f"  {name}", f"{human_bytes(found[name].per_axis['replica'])} over replica per call"))
    rows.append(("stray, replica", stray_row(found)))
    if seconds:
        rows.append(("start-up", ", ".join(f"{name} {number:.1f} s" for name, number in seconds.items())))
    return rows


def rows_beside(programs: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of a table: what each of these programs needs."""
    return [(name, f"{said_bytes(memory(program)[1])} temporary per device") for name, program in programs.items()]


def memory(program: Any) -> tuple[float, float]:
    """Bytes of a compiled program's arguments and temporaries on one device; NaN where the backend does not say: that
    is no reason not to train."""
    try:
        found = program.memory_analysis()
        return found.argument_size_in_bytes, found.temp_size_in_bytes
    except Exception:  # of whatever type the backend raises; some give None
        return math.nan, math.nan


def said_bytes(number: float) -> str:
    return "not known" if math.isnan(number) else human_bytes(number)


def stray_row(found: dict[str, stray.Traffic]) -> str:
    """What of these programs crosses `replica` and is not ours."""
    said = {name: t.not_counted or f"{human_bytes(t.stray)} a call" for name, t in found.items()}
    odd = [f"{name}: {said[name]}" for name, t in found.items() if t.stray or t.not_counted]
    fine = [name for name, t in found.items() if not (t.stray or t.not_counted)]
    return "; ".join(([f"0 B in {', '.join(fine)}"] if fine else []) + odd)


def _exchange(parts: Parts) -> str:
    strategy, exchange = parts.strategy, parts.strategy.exchange
    if parts.replicas == 1:
        return "so nothing is exchanged"
    kinds = {
        type(unit.codec).__name__: exchange.net.form(unit.codec) for unit in exchange.units if not is_round(unit.codec)
    }
    kinds |= {type(unit.codec).__name__: "in rounds" for unit in exchange.units if is_round(unit.codec)}
    parts_of_model = {id(e): e for exchanges in strategy.exchanges().values() for e in exchanges}  # streaming has two
    size = sum(sum(exchange_bytes(e).values()) for e in parts_of_model.values())
    how = ", ".join(f"{name} ({form})" for name, form in kinds.items())
    feedback = ", error feedback" if exchange.feedback else ""
    return f"{type(strategy).__name__}, {how}{feedback}, {human_bytes(size)} per exchange predicted"


def _shard_bytes(x: Any) -> int:
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize

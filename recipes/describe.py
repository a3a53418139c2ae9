"""What the user is told at the start: what a run is and needs, and what its compiled programs send."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from parallel.cost import stray
from parallel.cost.bytes import exchange_bytes
from parallel.cost.link import Link
from parallel.exchange.codecs.base import is_round
from parallel.layout import mesh as meshes
from parallel.layout import rules
from parallel.layout.axes import SLOW, shown
from recipes import context, experts, memory, methods, over_link, phases, pipeline, predicted, xla
from recipes.build import Parts, num_parameters
from recipes.programs import compile_beside, compile_init, compile_steps, takes_over
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
    total = {axis: sum(found[call.program].per_axis[axis] for call in calls) for axis in shown(parts.mesh.shape)}
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
    rows = model_rows(parts) + split_rows(config, parts)
    rows += slow_rows(config, parts, programs, found, per_step)
    sent = [
        (f"wire per step, {axis}", f"{human_bytes(size)} sent by each device")
        for axis, size in per_step.items()
        if axis != SLOW and parts.mesh.shape[axis] > 1
    ]
    rows += [("inside a replica", ""), *sent] if sent else []
    need = memory.of_programs(parts, programs)
    rows += memory_rows(parts, need) + predicted.rows(config, parts, per_step, need.temporary) + weight_rows(parts)
    if seconds:
        rows += [("start-up", ""), *((name, f"{number:.1f} s") for name, number in seconds.items())]
    return rows, found, per_step


def beside(config: Any, parts: Parts, console: Console, programs: dict[str, Any]) -> None:
    """Shows the table of the programs beside the step. Raises UsageError where one sends bytes that are not ours."""
    found = traffic_beside(parts, programs)
    console.table("beside the step", [*rows_beside(programs), ("stray, replica", stray_row(found))])
    refuse_stray(found, config.sync.allow_stray_bytes)


def dry_run(
    config: Any,
    parts: Parts,
    console: Console,
    times: Phases,
    link: Link | None,
    step_seconds: float | None,
    limit: float | None,
) -> int:
    """Compiles every program of a run and shows what they need. Returns the exit code. limit: bytes of a device; below
    the table, UsageError where a step needs more."""
    programs, others = compile_all(config, parts)
    times.mark("compile")
    last = [("beside the step", ""), *rows_beside(others)]
    sent = start("programs", config, parts, programs, others, times.seconds, console, last=last)
    if link and SLOW in sent:
        console.table(f"over {link.text}", over_link.rows(link, parts, sent[SLOW], step_seconds))
    memory.check(config, parts, programs, limit, console)
    return 0


def compile_all(config: Any, parts: Parts) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the strategy's programs, those beside them)."""
    others = compile_beside(parts, config.sample) | {"init": compile_init(parts, takes_over(config, parts))}
    return compile_steps(parts), others


# A row without a value is a heading.


def split_rows(config: Any, parts: Parts) -> list[tuple[str, str]]:
    """What stages, parts of sequences and experts cost."""
    return [row for part in (pipeline, context, experts) for row in part.rows(config, parts)]


def model_rows(parts: Parts) -> list[tuple[str, str]]:
    mesh, task, flops = parts.mesh, parts.task, parts.task.flops()
    kinds = ", ".join(sorted({d.device_kind for d in mesh.devices.flat}))
    each_step = math.prod(next(iter(parts.batch.values())).shape[1:3]) * task.units
    return [
        ("model", ""),
        ("parameters", human_count(num_parameters(parts))),
        *task.about(),
        *([("FLOPs per token", f"{human_count(flops)} (training, full attention)")] if flops else []),
        ("mesh", f"{meshes.describe(mesh)} = {mesh.size} devices ({kinds})"),
        (f"{task.unit} per step", human_count(each_step)),
        *([("XLA options", xla.said(parts.xla_options))] if parts.xla_options else []),
    ]


def slow_rows(
    config: Any, parts: Parts, programs: dict[str, Any], found: dict[str, stray.Traffic], per_step: dict[str, float]
) -> list[tuple[str, str]]:
    """What crosses the slow axis; nothing where there is one replica."""
    if parts.replicas == 1:
        odd = any(t.stray or t.not_counted for t in found.values())
        return [(f"stray, {SLOW}", stray_row(found))] if odd else []
    rows = across_rows(config, parts)
    if SLOW in per_step:
        rows.append((f"wire per step, {SLOW}", f"{human_bytes(per_step[SLOW])} sent by each device, counted"))
    if len(programs) > 1 and per_step:
        rows += [(f"  {name}", f"{human_bytes(found[name].per_axis[SLOW])} a call") for name in programs]
    return [*rows, (f"stray, {SLOW}", stray_row(found))]


def across_rows(config: Any, parts: Parts) -> list[tuple[str, str]]:
    """The exchange, by the names that were typed; nothing where there is one replica."""
    if parts.replicas == 1:
        return []
    s, exchange = config.sync, parts.strategy.exchange
    feedback = ", error feedback" if exchange.feedback else ""
    feedback += f" with decay {s.decay:g}" if feedback and s.decay != 1 else ""
    exchanges = {id(e): e for each in parts.strategy.exchanges().values() for e in each}  # streaming has two
    size = sum(sum(exchange_bytes(e).values()) for e in exchanges.values())
    return [
        ("across replicas", ""),
        ("replicas", f"{parts.replicas}"),
        ("strategy", methods.say(s.strategy, s, parts.own)),
        *([("", "each layer is exchanged in the backward pass of the one below it")] if s.exchange != "after" else []),
        *(("", f"the first {phase.first} steps synchronous, in float32") for phase in parts.phases[1:]),
        ("codec", f"{methods.say(s.codec, s, parts.own)}{feedback}; {_forms(exchange)}"),
        ("one exchange", f"{human_bytes(size)} sent by each device, predicted"),
    ]


def memory_rows(parts: Parts, need: memory.Need) -> list[tuple[str, str]]:
    """Of the compiled programs, not estimates."""
    frozen = memory.tree_bytes(parts.frozen, parts.mesh.shape)
    return [
        ("memory per device", ""),
        *([("base", f"{human_bytes(frozen)}, which no checkpoint holds")] if frozen else []),
        ("state", f"{human_bytes(need.state - frozen)}; as much again while a checkpoint is being copied"),
        ("temporary", said_bytes(need.temporary)),
        ("in all", said_bytes(need.whole)),
    ]


def weight_rows(parts: Parts) -> list[tuple[str, str]]:
    """How the largest ones lie, where there is more than one device to lie on."""
    if parts.mesh.size == 1:
        return []
    largest = sorted(named_arrays(parts.whole).items(), key=lambda row: -math.prod(row[1].shape))[:4]
    sizes = parts.mesh.shape
    own = lambda x: human_bytes(memory.shard_bytes(x, sizes))
    how = lambda x: f"{list(x.shape)} as {_said(x.sharding.spec, sizes)}, {own(x)} on each device"
    return [("largest weights", ""), *((name, how(x)) for name, x in largest)]


def _said(spec: P, sizes: Mapping[str, int]) -> P:
    """Without axes that are not worth a word."""
    kept = (tuple(axis for axis in rules.names(entry) if axis in shown(sizes)) for entry in spec)
    return P(*(axes[0] if len(axes) == 1 else axes or None for axes in kept))


def _forms(exchange: Any) -> str:
    """How it is sent: the algorithm, or that a codec goes in rounds; by codec where several are at work."""
    kinds = {
        type(unit.codec).__name__: "in rounds" if is_round(unit.codec) else exchange.net.form(unit.codec)
        for unit in exchange.units
    }
    forms = list(kinds.values())
    return forms[0] if len(forms) == 1 else ", ".join(f"{name} {form}" for name, form in kinds.items())


def rows_beside(programs: dict[str, Any]) -> list[tuple[str, str]]:
    """Rows of a table: what each of these programs needs."""
    return [
        (name, f"{said_bytes(memory.of_program(program)[1])} temporary per device")
        for name, program in programs.items()
    ]


def said_bytes(number: float) -> str:
    return "not known" if math.isnan(number) else human_bytes(number)


def stray_row(found: dict[str, stray.Traffic]) -> str:
    """What of these programs crosses `replica` and is not ours."""
    said = {name: t.not_counted or f"{human_bytes(t.stray)} a call" for name, t in found.items()}
    odd = [f"{name}: {said[name]}" for name, t in found.items() if t.stray or t.not_counted]
    fine = [name for name, t in found.items() if not (t.stray or t.not_counted)]
    return "; ".join(([f"0 B in {', '.join(fine)}"] if fine else []) + odd)

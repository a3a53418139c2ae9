"""The beginning of a run: its text is read, and its state is restored, or made from weights that are drawn or those of
another run."""

import functools
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data.loader import threads_beside_grain
from parallel.cost.hardware import peak_flops
from recipes import context, describe, imported, memory, methods, parameters, phases, programs
from recipes.build import Parts, build_schedule
from recipes.finish import try_prompt
from recipes.fit import Run, num_units
from recipes.task import Data, Trainable
from runtime import agree, library_log, steps
from runtime import config as configuration
from runtime.config import UsageError, bad_input
from runtime.console import Console
from runtime.environment import environment
from runtime.metrics import MetricsLog, optional_writers, read
from runtime.progress import Phases, Recorder
from runtime.workdir import Workdir, choose

MEMORY = ("arguments", "temporary")  # as `memory.of_program` gives them


def make_console(
    name: str, where: str | None, config: Any, simulate: int | None, notes: Iterable[str], warning: str | None = None
) -> Console:
    """Its first line says which config this is, and in which workdir (None: a dry run's)."""
    console = Console(config.steps, config.log_every, quiet=not agree.leader())
    console.say(f"{name}, dry run" if where is None else f"{name} in {where}" if where != name else name)
    if simulate:
        console.say(f"simulating {simulate} devices on the CPU: right results, no speed-up")
    for note in notes:
        console.say(note)
    if warning:
        console.warn(warning)
    return console


def open_workdir(config: Any, path: str, resume: bool, console: Console) -> Workdir:
    """The workdir of this name; it is this run's from here on."""
    workdir = Workdir(*choose(path), agree.leader())
    for change in workdir.open(config, resume):
        console.say(f"config changed since this run began: {change}")
    return workdir


def begin(
    config: Any,
    parts: Parts,
    workdir: Workdir,
    console: Console,
    times: Phases,
    facts: dict[str, Any],
    limit: float | None,
) -> tuple[Run, Any]:
    """Everything between the parts of a run and its first step: (the run, its state). What takes long goes side by
    side: the step is compiled while the data is read. facts: of code and versions; what the data is joins them. limit:
    bytes of a device, which a step must not exceed; None: not known."""
    context.check_products(parts)
    given = origin(config, workdir)
    islands = of_islands(config)
    met = islands.meet(config, parts) if islands else None
    background = threads_beside_grain(2)
    taken = given if programs.takes_over(config, parts) else None
    compiling = background.submit(programs.compile_steps, parts)
    initializing = None if workdir.resuming else background.submit(programs.compile_init, parts, bool(taken))
    data, prompt_P = load_data(config, parts.task, workdir, console, facts, given)
    loader = data.loader(islands.data_seed(config) if islands else config.seed, config.data.batch_size)
    checkpoints = open_checkpoints(config, parts, workdir, console)
    times.mark("data", then="compiling the training step")
    compiled = compiling.result()
    times.mark("compile", then="restoring a checkpoint" if workdir.resuming else "making the weights")
    memory.check(config, parts, compiled, limit, console)
    start, begun, others, frozen = None, {}, {}, ()
    goes_on = workdir.resuming and workdir.must_restore(checkpoints.steps())
    if parts.frozen and given:
        frozen, begun = base(parts, given, checkpoints.facts() if goes_on else {}, facts, console)
    if goes_on:
        state, start = restore(config, parts, workdir, checkpoints, console, facts)
    else:
        others["init"] = initializing.result() if initializing else programs.compile_init(parts, bool(taken))
        state, about_it = first_state(parts, config.seed, taken, others["init"], console)
        begun |= about_it
    times.mark("restore", then="making the first step")
    about, joined = data.describe(num_units(config, parts.task), programs.rows_of_evaluation(parts)), None
    if islands and start != config.steps:
        saved, about = checkpoints.facts() if goes_on else {}, [*about, *islands.rows(config, met)]
        joined, state = islands.Islander.join(met, config, parts, state, saved, console.say)
    wire_bytes = describe.start("before the first step", config, parts, compiled, others, times.seconds, console, about)
    recorder = make_recorder(config, parts, workdir, checkpoints, console, wire_bytes, start)
    if workdir.leader and given and not workdir.resuming:
        imported.carry(given, workdir.path)
    write_down(config, parts.own, workdir, data, start, begun | computed_by(compiled, facts))
    tell = functools.partial(describe.beside, config, parts, console)
    beside = programs.Later(parts, config.sample, background, tell)
    run = Run(
        *(config, parts, compiled, beside, frozen, data, loader, prompt_P),
        *(workdir, checkpoints, start, recorder, console, times, facts, joined),
    )
    agree.everyone("ready to train")
    return run, state


def of_islands(config: Any) -> Any:
    """recipes/island.py, which needs packages of its own; None where the run is no island."""
    if config.sync.strategy != "island":
        return None
    try:
        from recipes import island
    except ImportError as error:
        raise UsageError(str(error)) from error
    return island


def origin(config: Any, workdir: Workdir) -> Path | None:
    """The workdir whose parameters this run begins with, if it begins; None: weights are drawn.

    Raises UsageError where there are none: before anything is read or compiled.
    """
    if not config.init.workdir:
        return None
    path = Path(config.init.workdir)
    if not workdir.resuming:
        agree.decided("run to start from", lambda: steps.to_start_from(path / "checkpoints"))
    return path


# ── the data ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def load_data(
    config: Any, task: Trainable, workdir: Workdir, console: Console, facts: dict[str, Any], origin: Path | None
) -> tuple[Data, np.ndarray | None]:
    """The data, the same in every process, and the ids of the prompt. What the data is joins the facts."""
    with agree.together("data"):
        data = read_data(config, task, workdir, console, origin)
        prompt_P = try_prompt(config.sample, data, config.data.seq_len)
    agree.same("data", data.facts())
    facts.update(data.facts())
    return data, prompt_P


def read_data(config: Any, task: Trainable, workdir: Workdir, console: Console, origin: Path | None) -> Data:
    """What the task reads: text of config.data; of a run that goes on, with its own tokenizer, and compared with what
    it was. origin: of a run that begins with another's parameters, that one's workdir, whose tokenizer is taken."""
    folders = {"workdir": workdir.path} if workdir.resuming else {"origin": origin}
    console.doing("reading the data")
    with bad_input(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        data = task.read(config, say=console.say, **folders)
    for warning in caught:
        console.warn(str(warning.message))
    return data


# ── the state ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def open_checkpoints(config: Any, parts: Parts, workdir: Workdir, console: Console) -> Any:
    """Raises UsageError where the run has made more steps than it is now to make."""
    from runtime.checkpoint import Checkpoints  # slow to import

    kept = (config.checkpoint.keep, config.checkpoint.keep_every)
    kinds = {name: kind for phase in parts.phases for name, kind in phases.kinds(phase).items()}
    checkpoints = Checkpoints(workdir.checkpoints, *kept, console.warn, kinds)
    configuration.check_goal(config.steps, checkpoints.newest())
    return checkpoints


def restore(
    config: Any, parts: Parts, workdir: Workdir, checkpoints: Any, console: Console, facts: dict[str, Any]
) -> tuple[Any, int]:
    """(the state of the newest checkpoint that is whole, its step). facts: of code, versions and data, today's."""
    state_at = lambda step: phases.at(parts, step).state
    state, start = checkpoints.restore(state_at, console.warn, phases.adapter(parts))
    with bad_input():
        for phase, last in phases.spans(parts, start, config.steps):
            methods.check_begin(phase.strategy.steps_per_call, max(start, phase.first), last)
    changed = agree.changed(checkpoints.facts(), facts)
    say_resumed(config, workdir, start, console, changed, parts.own)
    return state, start


def say_resumed(
    config: Any, workdir: Workdir, start: int, console: Console, changed: str = "", own: methods.Own = methods.NONE
) -> None:
    """changed: of `agree.changed`."""
    if not workdir.leader:
        return
    console.say(f"resuming from step {start}; every array has the digest it was saved with")
    if changed:
        console.say(changed)
    before = configuration.read_json(workdir.path)
    if start == config.steps:
        console.say(f"this run is complete: it has made its {start} steps, and is evaluated again")
    elif start and not own.optimizer and configuration.changes_schedule(before, config):
        was, now = (float(build_schedule(c)(step)) for c, step in ((before, start - 1), (config, start)))
        if was != now:
            console.say(f"the learning rate was {was:.3g} at step {start} and is {now:.3g} at step {start + 1}")


def first_state(parts: Parts, seed: int, origin: Path | None, init: Any, console: Console) -> tuple[Any, dict]:
    """(the state, what summary.json says of where its parameters come from). init: of `compile_init`.

    The strategy makes everything else from the parameters: copies of the replicas, and an optimizer that begins anew.
    """
    if origin is None:
        return init(np.uint32(seed)), {}
    console.doing(f"reading the parameters of {origin}")
    given = parameters.read(origin, parts.task.axes, parts.state.params, console.warn)
    console.say(f"starting from the parameters of {origin}, step {given.step}")
    return init(given.params), {"init": _origin(origin, given.step, given.digest)}


def base(
    parts: Parts, origin: Path, before: dict[str, Any], facts: dict[str, Any], console: Console
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(the weights beside the state, what summary.json says of them), which joins the facts, too. before: the facts of
    the checkpoint that the run goes on from."""
    console.doing(f"reading the parameters of {origin}")
    frozen, about = parameters.read_base(parts, origin, console.warn, before)
    facts.update(about)
    console.say(f"beside the parameters of {origin}, step {about[parameters.STEP]}, which stay as they are")
    return frozen, {"init": _origin(origin, about[parameters.STEP], about[parameters.DIGEST])}


def _origin(origin: Path, step: int, digest: str) -> dict[str, Any]:
    return {"workdir": str(origin), "step": step, "params_digest": digest}


# ── what the run leaves while it trains ───────────────────────────────────────────────────────────────────────────────


def write_down(
    config: Any, own: methods.Own, workdir: Workdir, data: Data, start: int | None, about: dict[str, Any]
) -> None:
    """The workdir says from here on what this run is and trains on. about: what else goes into summary.json."""
    if workdir.leader:
        data.keep(workdir.path)
    workdir.begin(config, start, own.describe())
    library_log.keep(workdir.path, jax.process_index())
    workdir.update_summary(data_digest=data.digest, **about)


def computed_by(compiled: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """What summary.json says of this start: versions and devices, and what the step's programs need, in bytes."""
    needs = {name: dict(zip(MEMORY, memory.of_program(program), strict=True)) for name, program in compiled.items()}
    return {"environment": environment(facts), "memory": needs}


def make_recorder(
    config: Any,
    parts: Parts,
    workdir: Workdir,
    checkpoints: Any,
    console: Console,
    wire_bytes: dict[str, float],
    start: int | None,
) -> Recorder:
    """start: the step of the checkpoint that the run goes on from; None: it begins."""
    log, train_seconds, unit = None, 0.0, parts.task.unit
    units = None if start is None else checkpoints.facts().get(unit)
    if workdir.leader:
        flag = {"auto": None, "on": True, "off": False}[config.metrics.tensorboard]
        with bad_input():
            writers = optional_writers(workdir.path, flag, config.metrics.wandb)
        log = MetricsLog(workdir.path, writers, console.warn)
        log.rewind(start if start is not None else 0 if workdir.resuming else None)
        rows = [row for row in read(log.path) if "train_seconds" in row] if workdir.resuming else []
        train_seconds = rows[-1]["train_seconds"] if rows else 0.0
        units = rows[-1][unit] if rows and units is None else units
    return Recorder(
        log,
        console,
        log_every=config.log_every,
        abort_after=config.guard.abort_after,
        unit=unit,
        units=units or 0,
        further=parts.task.further,
        notable=parts.task.notable,
        flops_per_second_at_full_speed=full_speed(parts),
        flops_per_unit=parts.task.flops(),
        wire_bytes=wire_bytes,
        train_seconds=train_seconds,
    )


def full_speed(parts: Parts) -> float | None:
    """FLOP/s of the whole mesh at its peak, None if the chip is not known."""
    peak = peak_flops(parts.mesh.devices.flat[0].device_kind)
    return peak * parts.mesh.size if peak else None

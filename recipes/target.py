"""`--target`: a dry run whose programs are compiled for a machine that is not here, and its verdict: whether they fit,
and what would."""

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from parallel.cost import compilers, hardware, targets
from parallel.cost.hardware import GiB
from parallel.cost.link import Link
from parallel.cost.targets import Target
from parallel.layout import mesh as meshes
from parallel.layout.axes import SLOW
from recipes import aot, begin, build, describe, memory, over_link, programs, sharding, summary, verdict
from recipes.aot import Reading, Refused
from recipes.build import Parts
from runtime import library_log
from runtime.config import UsageError, bad_input, changed
from runtime.console import Console
from runtime.progress import Phases

ALONE = ("simulate", "coordinator", "num_processes", "process_id", "memory")  # flags of real devices
FITS, DOES_NOT_FIT = 0, 1


def dry_run(config: Any, flags: Any, times: Phases) -> int:
    """Returns the exit code. Raises UsageError for bad input, before anything is compiled."""
    check_flags(flags)
    with bad_input():
        chips = hardware.catalogue()
        target = targets.parse(flags.target, chips)
        said = target.said()
        compilers.check_compiler(target.chip)
    library_log.begin()  # compilers print by themselves
    compilers.prepare(target.chip)
    console = begin.make_console(flags.config_name, None, config, None, flags.notes)
    times.console = console
    console.say(said)
    for note in fitted(config, target, flags.typed):
        console.say(note)
    parts = make(config, target)
    link = over_link.read(flags.link, flags.step_seconds, flags.dry_run, parts.replicas)
    check_state(parts, target)
    folder = summary.folder(flags.save) if flags.save else None
    readings = compile_all(config, parts, target, console, folder, link)
    times.mark("compile")
    console.table(f"compiled for {target.text}", verdict.rows(config, parts, target, readings))
    describe.refuse_stray({name: x.stray for name, x in readings.items() if x.stray}, config.sync.allow_stray_bytes)
    if link and (sent := verdict.over_slow(readings)) is not None:
        console.table(f"over {link.text}", over_link.rows(link, parts, sent, flags.step_seconds))
    fits = aot.worst(readings)[1].peak_bytes <= target.memory
    remedies = [] if fits else verdict.search(config, parts, target, readings, compiled_with(config, target, console))
    console.doing("")
    console.say(verdict.sentence(target, readings, remedies))
    if folder:
        about = summary.describe(target, parts, readings, remedies, compilers.compiler(target.chip))
        summary.write(folder, about)
        sharding.draw(config, parts, folder / "sharding.png")
        console.say(f"what was compiled is in {flags.save}")
    return FITS if fits else DOES_NOT_FIT


def check_flags(flags: Any) -> None:
    """Raises UsageError for options that have no meaning beside --target."""
    if not flags.target:
        raise UsageError(f"--save={flags.save} keeps what --target compiles: add --target=… and --dry_run")
    if not flags.dry_run:
        raise UsageError(
            f"--target={flags.target} says what to compile for, and nothing is trained on it: add --dry_run"
        )
    given = [name for name in ALONE if flags[name].value != flags[name].default]
    if given:
        raise UsageError(
            f"--{given[0]}={flags[given[0]].value} is of devices that run, and with --target={flags.target} none does: "
            "leave it out"
        )


# ── what the machine asks of the config ───────────────────────────────────────────────────────────────────────────────


def fitted(config: Any, target: Target, typed: list[str]) -> list[str]:
    """Changes the config to what the target can be compiled with, and says so: a replica for each slice, a batch that
    the mesh divides, the plain attention where cuDNN is not installed. typed: keys that the user has set."""
    notes = []
    if target.slices > 1 and "mesh.replica" not in typed:
        config.mesh.replica = target.slices
        notes.append(f"mesh.replica={target.slices}: a replica for each slice")
    with bad_input():
        hint = f"{target.text} has {target.chips} chips"
        sizes = meshes.fill_sizes(config.mesh, target.chips, hint)
    unit = (config.sync.replicas or sizes[SLOW]) * meshes.cut("batch", sizes)[1] * config.optimizer.accumulate
    if config.data.batch_size % unit and "data.batch_size" not in typed:
        before = config.data.batch_size
        config.data.batch_size = max(1, round(before / unit)) * unit
        notes.append(f"data.batch_size={config.data.batch_size}: {before} cannot be cut into the mesh's {unit} parts")
    if not target.chip.is_tpu and not compilers.has_cudnn():
        install = "`pip install --no-deps nvidia-cudnn-cu13` (898 MB)"
        if config.compute.attention == "cudnn":
            raise UsageError(f"compute.attention=cudnn: compiling it needs cuDNN, which is not installed: {install}")
        if config.compute.attention == "auto":
            config.compute.attention = "reference"
            notes.append(f"compute.attention=reference, whose scores are whole: cuDNN's needs its package: {install}")
    return notes


def make(config: Any, target: Target) -> Parts:
    """The parts of a run, laid over the target's devices."""
    with bad_input():
        devices = compilers.devices(target)
        mesh = meshes.build(meshes.fill_sizes(config.mesh, len(devices)), devices)
    return build.build(config, mesh)


def check_state(parts: Parts, target: Target) -> None:
    """Raises UsageError where not even the state fits, with the smallest machine of these chips that would hold it."""
    state = memory.state_bytes(parts, parts.mesh.shape)
    if state <= target.memory:
        return
    room, size = target.memory / GiB, state / GiB
    raise UsageError(
        f"target={target.text}: the state alone takes {size:.1f} GiB of each chip, and a program gets {room:.1f}: "
        f"{smallest(parts, target)}"
    )


def smallest(parts: Parts, target: Target) -> str:
    """The first larger machine on which mesh.fsdp cuts the state into pieces that fit."""
    factor, sizes = 2, dict(parts.mesh.shape)
    while factor <= 4096:
        more = sizes | {"fsdp": factor * sizes["fsdp"]}
        found = targets.wider(target, factor)
        if found and memory.state_bytes(parts, more) <= target.memory:
            return f"--target={found.text} is the smallest that holds it, with mesh.fsdp={more['fsdp']}"
        factor *= 2
    return "no slice of these chips holds it: choose chips with more memory, or more slices"


# ── compiling ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def compile_all(
    config: Any, parts: Parts, target: Target, console: Console, folder: Path | None, link: Link | None
) -> dict[str, Reading]:
    """What each program says, one after another, for each may take gigabytes while it is made. Of a program that was
    refused, what it is made of is read in the same mesh's on larger chips. folder: where their texts are kept. link:
    what `replica` crosses, if it is not the catalogue's."""
    gc.enable()  # what traces a program is garbage after it
    found, refused = {}, {}
    for name, lower in aot.lowerings(config, parts).items():
        console.doing(f"compiling {name} for {target.text}")
        program = aot.compiled(lower, parts.xla_options)
        if isinstance(program, Refused):
            refused[name] = program
        elif folder:
            summary.keep(folder, name, program.as_text())
        found[name] = aot.read(name, program, parts, target, config, link=link)
        del program
        gc.collect()
    return found | on_larger(refused, config, parts, target, console, link)


def on_larger(
    refused: dict[str, Refused], config: Any, parts: Parts, target: Target, console: Console, link: Link | None
) -> dict[str, Reading]:
    """Read on the smallest larger kind of chips on which each fits, those that fit on any."""
    found: dict[str, Reading] = {}
    other = targets.larger(target, hardware.catalogue()) if refused else None
    while other and len(found) < len(refused):
        for name, lower in aot.lowerings(config, make(config, other)).items():
            if name in refused and name not in found:
                console.doing(f"compiling {name} for {other.text}, to see what it is made of")
                program = aot.compiled(lower, parts.xla_options)
                if not isinstance(program, Refused):
                    its = other.text, program
                    found[name] = aot.read(name, refused[name], parts, target, config, its, link)
        other = targets.larger(other, hardware.catalogue())
    return found


def compiled_with(config: Any, target: Target, console: Console) -> verdict.Predict:
    """(changes, target) -> bytes of the dearest step program compiled with them."""

    def predict(changes: dict[str, Any], on: Target) -> float:
        console.doing(f"compiling for {on.text} with {', '.join(f'{k}={v}' for k, v in changes.items())}")
        parts = make(changed(config, changes), on)
        lowered: dict[str, Callable[[], Any]] = programs.steps(parts)
        return max(aot.peak(aot.compiled(lower, parts.xla_options), parts, name)[1] for name, lower in lowered.items())

    return predict

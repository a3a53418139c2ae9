"""`serve.py --target`: the programs that answer, compiled for a machine that is not here: whether they fit, what they
send, and how fast they can be at best."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from parallel.cost import compilers, hardware, hlo, schedule, targets, wire
from parallel.cost.targets import Target
from parallel.layout import mesh as meshes
from recipes import aot, door
from runtime import config as configuration
from runtime import library_log
from runtime.config import UsageError, bad_input
from runtime.console import human_bytes
from serving import loaded
from serving.programs import Programs, buckets

FITS, DOES_NOT_FIT = 0, 1
Say = Callable[[str], None]


class Found(NamedTuple):
    """Of one program and device, in bytes; sent: {mesh axis: bytes}. multiply: seconds, at the chip's nominal rate.
    peak: None where the compiler refused it."""

    name: str
    peak: float | None
    temporaries: float = 0.0
    sent: Mapping[str, float] = MappingProxyType({})
    multiply: float = 0.0


def dry_run(config: Any, text: str, changes: dict[str, Any], slots: int, context: int | None, say: Say) -> int:
    """Returns the exit code. Raises UsageError for bad input, before anything is compiled.

    config: of a run, or of a file. The mesh is by default all of the machine's chips as `tensor`.
    """
    with bad_input():
        target = targets.parse(text, hardware.catalogue())
        compilers.check_compiler(target.chip)
    library_log.begin()
    compilers.prepare(target.chip)
    say(target.said())
    model = _laid_out(config, target, changes)
    longest = loaded.context_of(model, context)
    held, kept = loaded.needs(model, slots, [longest])
    programs = Programs(model.network, model.mesh, model.dtype, model.decoding, [slots], [longest])
    say(
        f"{meshes.describe(model.mesh)}, {model.dtype}; of each chip {human_bytes(held)} of weights, "
        f"{human_bytes(kept)} of keys and values ({slots} slots of {longest:,} tokens)"
    )
    lowerings, size = programs.lowerings(), buckets(longest)[-1]
    chosen = {f"a token for {slots} slots": ("decode", slots, longest), f"a layer of {size:,} tokens": ("layer", size)}
    found = [_compiled(name, lowerings[key], model, target, held + kept) for name, key in chosen.items()]
    for x in found:
        say(_said(x))
    peaks = [x.peak for x in found]
    if None in peaks or max(x for x in peaks if x) > target.memory:
        say(
            f"does not fit into {human_bytes(target.memory)}: fewer --slots, a shorter --context, or more of "
            "mesh.tensor or mesh.expert"
        )
        return DOES_NOT_FIT
    seconds = max((held + kept) / target.chip.bandwidth, found[0].multiply)
    peak = human_bytes(max(x for x in peaks if x))
    say(
        f"fits: {peak} of {human_bytes(target.memory)}; a token for every slot takes {1e3 * seconds:.2f} ms at best, "
        f"to read all once: {slots / seconds:,.0f} tokens a second"
    )
    return FITS


def _laid_out(config: Any, target: Target, changes: dict[str, Any]) -> loaded.Model:
    with bad_input():
        devices = compilers.devices(target)
    sizes = {"mesh.fsdp": 1, "mesh.tensor": -1} | {k: x for k, x in changes.items() if k.startswith("mesh.")}
    found = door.configure(door.alone(config), changes | sizes).config
    with bad_input():
        mesh = meshes.build(
            meshes.fill_sizes(found.mesh, len(devices), f"{target.text} has {target.chips} chips"), devices
        )
    return loaded.laid_out(Path(), found, mesh, None)


def _compiled(name: str, lower: Callable[[], Any], model: loaded.Model, target: Target, state: float) -> Found:
    """state: bytes of weights, keys and values of a device, which are there whether the program reads them or not."""
    program = aot.compiled(lower, model.xla_options)
    if isinstance(program, aot.Refused):
        return Found(name, None)
    found, read = program.memory_analysis(), hlo.Program.read(program.as_text())
    own = found.output_size_in_bytes - found.alias_size_in_bytes + found.temp_size_in_bytes
    multiply = schedule.flops(read) / target.chip.bf16
    return Found(name, state + own, found.temp_size_in_bytes, wire.per_axis(read, model.mesh), multiply)


def _said(x: Found) -> str:
    if x.peak is None:
        return f"{x.name}: the compiler refuses it, for it does not fit"
    sent = ", ".join(f"{human_bytes(size)} over {axis}" for axis, size in x.sent.items() if size) or "nothing"
    return (
        f"{x.name}: peak {human_bytes(x.peak)}, of which {human_bytes(x.temporaries)} temporary; sends {sent}; "
        f"{1e3 * x.multiply:.2f} ms to multiply"
    )


def config_of(args: argparse.Namespace) -> Any:
    """That of --config or --workdir. Raises UsageError for options that do not belong together."""
    if not (args.target and args.dry_run):
        raise UsageError(
            "--config, --target and --dry_run belong together: nothing is served on a machine that is not here"
        )
    if bool(args.config) == bool(args.workdir):
        raise UsageError("--target needs either --workdir=PATH of a run, or --config=FILE")
    return configuration.execute(args.config)[0] if args.config else configuration.read_json(Path(args.workdir))

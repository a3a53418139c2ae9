"""Out of memory: which keys to turn, and by how much. What a run would need with another value is read where the table
of the start reads it, in the compiled programs; nothing is allocated."""

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from parallel.layout import rules
from parallel.layout.mesh import cut
from recipes.build import Parts, build, check_cut
from recipes.language import Language
from recipes.programs import compile_steps
from runtime.config import CHOICES, RunError, UsageError, changed, check_batch
from runtime.console import Console, human_bytes

UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
EXHAUSTED = "RESOURCE_EXHAUSTED: "  # how XLA begins, in exceptions of several types
SAVES = 0.99  # of what is needed now; less than that is worth a turn
TRIES = 5  # of a key: each is a compilation
FSDP = "mesh.fsdp"
OFFLOAD = "offload"  # of compute.remat: never advised, for what a host's memory holds is not known
KEYS = ("optimizer.accumulate", "compute.remat", "compute.loss_chunk_mib")  # on the devices there are
ENDS = "docs/memory.md says what each of them costs"


@dataclass(frozen=True)
class Need:
    """Bytes of one device while a step runs. NaN: the backend does not say; inf: its compiler has refused."""

    state: float  # with the weights beside it
    arguments: float  # that and the batch
    temporary: float

    @property
    def whole(self) -> float:
        return self.arguments + self.temporary


@dataclass(frozen=True)
class Turn:
    """A key's other value, with which so many bytes are needed. fits: whether that is enough; None: nobody knows."""

    key: str
    value: Any
    whole: float
    fits: bool | None
    devices: int = 0  # other than there are: the state is cut by so many, and the rest counted as it is


# {key: value} -> bytes of one device; raises UsageError for what is illegal.
Predict = Callable[[dict[str, Any]], float]


# ── asked for by a run ────────────────────────────────────────────────────────────────────────────────────────────────


def read(text: str | None) -> float | None:
    """Bytes, of the option --memory. Raises UsageError."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text, re.IGNORECASE)
    unit = {name.lower(): size for name, size in UNITS.items()}.get(found[2].lower()) if found else None
    if not found or not unit or not float(found[1]):
        raise UsageError(f"--memory={text}: expected a device's memory with its unit ({', '.join(UNITS)}), as in 80GiB")
    return float(found[1]) * unit


def of_device() -> float | None:
    """Bytes that one device lends to this process; None where it does not say, as on CPU."""
    limits = [(device.memory_stats() or {}).get("bytes_limit") for device in jax.local_devices()]
    return min((limit for limit in limits if limit), default=None)


def check(config: Any, parts: Parts, programs: dict[str, Any], limit: float | None, console: Console) -> None:
    """Raises UsageError where the compiled steps need more than `limit` (bytes of a device; None: not known)."""
    need = of_programs(parts, programs)
    if limit is not None and need.whole > limit:
        advice = _advice(config, parts, need, limit, console)
        raise UsageError(f"a step does not fit: {_said(need)}, and has {human_bytes(limit)}. {advice}")


@contextlib.contextmanager
def explained(config: Any, parts: Parts, console: Console) -> Iterator[None]:
    """Inside, what fails for want of memory, allocated or compiled, becomes a RunError that says what to turn."""
    try:
        yield
    except Exception as error:
        if not str(error).startswith(EXHAUSTED):
            raise
        first = str(error).removeprefix(EXHAUSTED).splitlines()[0].rstrip(".")
        need = of_programs(parts, None)
        advice = _advice(config, parts, need, None, console)
        raise RunError(f"out of memory ({first[:200]}): {_said(need)}. {advice}") from error


def of_programs(parts: Parts, programs: dict[str, Any] | None) -> Need:
    """Of the step's programs, the one that needs most. None: they are compiled for that, by a process that is alone:
    one of several would wait for the others."""
    state = state_bytes(parts, parts.mesh.shape)
    if programs is None and jax.process_count() > 1:
        return Need(state, math.nan, math.nan)
    try:
        sizes = [of_program(program) for program in (programs or compile_steps(parts)).values()]
    except Exception as error:
        if not str(error).startswith(EXHAUSTED):
            raise
        sizes = [(state, math.inf)]  # this compiler knows what there is
    return Need(state, *max(sizes, key=sum))


def of_program(program: Any) -> tuple[float, float]:
    """Bytes of a compiled program's arguments and temporaries on one device; NaN where the backend does not say: that
    is no reason not to train."""
    try:
        found = program.memory_analysis()
        return found.argument_size_in_bytes, found.temp_size_in_bytes
    except Exception:  # of whatever type the backend raises; some give None
        return math.nan, math.nan


def on_host(program: Any) -> int:
    """Bytes of the host's memory that a compiled program takes for a device."""
    return getattr(program.memory_analysis(), "host_temp_size_in_bytes", 0)


def shard_bytes(x: Any, sizes: Mapping[str, int]) -> int:
    """Of an abstract array on a device of a mesh of these sizes."""
    entries = [*x.sharding.spec, *[None] * (x.ndim - len(x.sharding.spec))]
    shape = (-(-n // rules.shards(entry, sizes)) for n, entry in zip(x.shape, entries, strict=True))
    return math.prod(shape) * x.dtype.itemsize


def state_bytes(parts: Parts, sizes: Mapping[str, int]) -> int:
    """Of a device on a mesh of these sizes, with the weights beside the state, counted from the shardings."""
    return max(tree_bytes(phase.state, sizes) for phase in parts.phases) + tree_bytes(parts.frozen, sizes)


def tree_bytes(tree: Any, sizes: Mapping[str, int]) -> int:
    return sum(shard_bytes(x, sizes) for x in jax.tree.leaves(tree))


def _said(need: Need) -> str:
    if not math.isfinite(need.whole):
        return f"a device holds {human_bytes(need.state)} of state, and what a step needs besides is not known"
    parts = f"state {human_bytes(need.state)}, temporary {human_bytes(need.temporary)}"
    return f"a device needs {human_bytes(need.whole)} ({parts}), predicted"


# ── what would fit ────────────────────────────────────────────────────────────────────────────────────────────────────


def _advice(config: Any, parts: Parts, need: Need, limit: float | None, console: Console) -> str:
    if jax.process_count() > 1:  # one of several may be alone here, and compiling is done together
        devices = parts.mesh.size
        return f"The same command with --dry_run --simulate={devices} --memory=… finds which keys to turn; {ENDS}"
    if math.isnan(need.whole):
        return f"What a program needs is not known on this backend: {', '.join((*KEYS, FSDP))} save memory; {ENDS}"
    console.doing("compiling with other values, to find what would fit")

    def predict(changes: dict[str, Any]) -> float:
        return of_programs(build(changed(config, changes), parts.mesh, parts.own), None).whole

    tried = values(config, parts)
    turns = search(tried, need.whole, limit, predict) + wider(config, parts, need, limit)
    alone = [turn for turn in turns if not turn.devices]
    together = None
    if limit and len(alone) > 1 and not any(turn.fits for turn in turns):
        together = predict({turn.key: turn.value for turn in alone})
    console.doing("")
    return say([*tried, FSDP], turns, limit, together)


def values(config: Any, parts: Parts) -> dict[str, Sequence[Any]]:
    """What may be tried of each key on the same devices: less memory with each further value."""
    shards = cut("batch", parts.mesh.shape)[1]
    rows = config.data.batch_size // (parts.replicas * shards)  # of a device and update
    remat, chunk = CHOICES["compute.remat"], chunk_mib(parts)
    found: list[Sequence[Any]] = [
        _doubling([n for n in range(config.optimizer.accumulate + 1, rows + 1) if not rows % n]),
        tuple(name for name in remat[remat.index(config.compute.remat) + 1 :] if name != OFFLOAD),
        [chunk // 4**n for n in range(1, TRIES) if chunk >= 4**n],
    ]
    return dict(zip(KEYS, found[:1] if parts.own.task else found, strict=False))


def chunk_mib(parts: Parts) -> int:
    """compute.loss_chunk_mib as it was chosen; a caller's task has none."""
    return parts.task.model.compute.loss_chunk_mib if isinstance(parts.task, Language) else 0


def search(candidates: dict[str, Sequence[Any]], now: float, limit: float | None, predict: Predict) -> list[Turn]:
    """Of each key the first value that fits, else the one that saves most; without a limit the first that saves. None
    of a key with which nothing is saved."""
    turns = []
    for key, tried in candidates.items():
        best: Turn | None = None
        for value in tried[:TRIES]:
            try:
                whole = predict({key: value})
            except UsageError:  # not with this mesh, model or batch
                continue
            if whole < SAVES * (best.whole if best else now):
                best = Turn(key, value, whole, None if limit is None else whole <= limit)
            if best and best.fits is not False:
                break
        turns += [best] if best else []
    return turns


def wider(config: Any, parts: Parts, need: Need, limit: float | None) -> list[Turn]:
    """More shards of the weights, on as many more devices. None can be compiled for here: the state is counted as it
    would lie, all else as it is, which is more than it would be."""
    found: list[Turn] = []
    for factor in (2, 4, 8):
        sizes = dict(parts.mesh.shape) | {"fsdp": factor * parts.mesh.shape["fsdp"]}
        try:
            check_batch(config.data.batch_size, parts.replicas, cut("batch", sizes), config.optimizer.accumulate)
            check_cut(parts.task, parts.param_shapes, sizes)
        except (UsageError, ValueError):
            break
        rest = need.whole - need.state if math.isfinite(need.whole) else 0.0
        whole = rest + state_bytes(parts, sizes)
        fits = None if limit is None else whole <= limit
        found.append(Turn(FSDP, sizes["fsdp"], whole, fits, math.prod(sizes.values())))
        if fits is not False:
            break
    return [turn for turn in found[-1:] if turn.whole < SAVES * need.whole]


def say(tried: Sequence[str], turns: Sequence[Turn], limit: float | None, together: float | None) -> str:
    """At most four rows, one a key, and what comes of all of them on the same devices."""
    if not turns:
        return f"No value of {', '.join(tried)} saves memory here: a smaller model, batch or sequence would"
    lines = []
    for turn in turns:
        where = f", on {turn.devices} devices: at most" if turn.devices else ":"
        alone = ", not enough alone" if turn.fits is False else ""
        lines.append(f"  {turn.key}={turn.value}{where} {human_bytes(turn.whole)}{alone}")
    if together is not None:
        enough = "" if limit is not None and together <= limit else ", not enough either"
        lines.append(f"  all of them on the devices there are: {human_bytes(together)}{enough}")
    return "\n".join(["Predicted for a device:", *lines, ENDS])


def _doubling(numbers: Sequence[int]) -> list[int]:
    """Of ascending numbers those that are at least twice the one before."""
    found: list[int] = []
    for number in numbers:
        if not found or number >= 2 * found[-1]:
            found.append(number)
    return found

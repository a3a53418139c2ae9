"""Which mesh, micro-steps, rematerialisation and exchange make the most of a machine: all that are legal, counted in
closed form (parallel/cost/model.py) and ranked. Nothing is compiled here."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from parallel.cost import model, pace, targets
from parallel.cost.link import Link
from parallel.cost.model import Flight, Layout, Network
from parallel.cost.pace import Exchange
from parallel.cost.targets import Target
from parallel.layout import mesh as meshes
from parallel.layout.axes import AXES, COMMON, SLOW
from recipes import build, exchanged, memory, over_link, predicted
from recipes.candidate import Candidate
from recipes.gaps import Gaps
from recipes.predicted import REMAT
from runtime.config import UsageError, changed
from runtime.console import human_bytes

CLOSE = 1.02  # of the shortest time: who is as near, and changes less of what is trained, is picked
TRIED_CODECS = ("none", "bf16", "int8", "int4")  # what is tried of them, mildest first
MESHES = 6  # for which exchanges are tried: the fastest without any
LARGEST = 12  # doublings of a machine that is too small


@dataclass(frozen=True)
class Place:
    """Stands for a device in a mesh that nothing is compiled for."""

    id: int
    process_index: int
    platform: str
    device_kind: str


@dataclass(frozen=True)
class Case:
    """What is planned for. typed: keys that are not for choosing. gaps: by which time to a loss is ranked by; None:
    tokens per second are."""

    config: Any
    target: Target
    link: Link | None
    typed: tuple[str, ...] = ()
    gaps: Gaps | None = None

    @cached_property
    def base(self) -> build.Parts:
        """On one device, synchronous: shapes and shardings, of which sizes on any mesh follow."""
        alone = dict.fromkeys((f"mesh.{axis}" for axis in AXES), 1) | {"sync.strategy": "sync", "sync.codec": "none"}
        alone |= {"optimizer.accumulate": 1, "data.batch_size": 1, "sync.warm_steps": 0, "sync.algorithm": "auto"}
        alone |= {"sync.replicas": 0, "compute.xla_options": ""}  # which a place has no compiler for
        return build.build(changed(self.config, alone), self.mesh(dict.fromkeys(AXES, 1)))

    @cached_property
    def network(self) -> Network:
        return predicted.network(self.base)

    def mesh(self, sizes: Mapping[str, int]) -> Mesh:
        """Of places in place of devices."""
        chip = self.target.chip
        platform, host = ("tpu", 4) if chip.is_tpu else ("gpu", self.target.sides[1])
        places = np.empty(math.prod(sizes.values()), dtype=object)
        for i in range(places.size):
            places[i] = Place(i, i // host, platform, chip.kind)
        return Mesh(places.reshape([sizes[axis] for axis in AXES]), AXES)

    def fixed(self, key: str, tried: Sequence[Any]) -> Sequence[Any]:
        """What is tried of a key: what was typed, if it was."""
        return (_value(self.config, key),) if key in self.typed else tried


class Found(NamedTuple):
    """fitting: candidates that fit, fastest first. pick: of these. others: that do not fit. considered: how many were
    counted. notes: what was changed, or left out."""

    fitting: list[Candidate]
    pick: Candidate
    others: list[Candidate]
    considered: int
    notes: list[str]
    by_loss: bool = False  # ranked by time to a loss


def method(case: Case, strategy: str, codec: str) -> dict[str, Any]:
    """The keys that name it, in rounds as over_link tries them: of the nearest length in which the run, and what lies
    between two evaluations or checkpoints, can be cut. What was typed stays."""
    tried, c = over_link.TRIED[strategy], case.config
    found: dict[str, Any] = {"sync.strategy": strategy, "sync.codec": codec}
    if tried.interval > 1:
        whole = math.gcd(c.steps, c.eval_every, c.checkpoint.every)
        lengths = [n for n in range(tried.fragments, whole + 1) if not whole % n and not n % tried.fragments]
        found["sync.interval"] = min(lengths, key=lambda n: abs(n - tried.interval), default=tried.interval)
    if tried.fragments > 1:
        found |= {"sync.fragments": tried.fragments, "sync.overlap": tried.overlap}
    return {key: value for key, value in found.items() if key not in case.typed}


# ── searching ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def search(case: Case) -> Found:
    """Raises UsageError where nothing is legal, or nothing fits, with the smallest machine of these chips that would
    do."""
    check_typed(case)
    case, notes = with_batch(case)
    bare = [candidate for sizes in legal(case) for candidate in without_exchange(case, sizes)]
    several = [c for c in bare if c.layout.sizes[SLOW] > 1 and c.fits]
    tried, more = over_slow(case, several)
    found = [c for c in bare if c.layout.sizes[SLOW] == 1 and c.fits] + tried
    fitting = sorted((c for c in found if c.fits), key=lambda c: c.to_loss)
    others = sorted((c for c in [*bare, *tried] if not c.fits), key=lambda c: c.peak_bytes)
    if not fitting and several:
        raise UsageError(f"hardware={case.target.text}: no exchange can be planned for: {'; '.join(more)}")
    if not fitting:
        raise UsageError(too_small(case, min(bare, key=lambda c: c.peak_bytes)))
    return Found(fitting, picked(fitting), others, len(bare) + len(tried), notes + more, case.gaps is not None)


def check_typed(case: Case) -> None:
    """Raises UsageError for a value that this does not count."""
    remat = case.config.compute.remat
    if "compute.remat" in case.typed and remat not in REMAT:
        raise UsageError(
            f"compute.remat={remat} cannot be planned with: {' and '.join(REMAT)} can, and are what is tried"
        )
    if case.config.model.experts:
        raise UsageError(
            f"model.experts={case.config.model.experts}: models with experts are not planned, so far: try a mesh with "
            "train.py --target --dry_run"
        )
    for axis in (axis for axis in AXES if axis not in COMMON):
        if case.config.mesh[axis] != 1:
            raise UsageError(
                f"mesh.{axis}={case.config.mesh[axis]}: mesh.{', mesh.'.join(COMMON)} are planned, so far: leave it at "
                "1 here, and try it with train.py --target --dry_run"
            )
    if case.config.sync.exchange != "after":
        raise UsageError(
            f"sync.exchange={case.config.sync.exchange} cannot be planned with: leave it out, and set it in the run"
        )


def picked(fitting: Sequence[Candidate]) -> Candidate:
    """Of those that are as good as the fastest, the one that changes least of what is trained."""
    shortest = min(c.to_loss for c in fitting)
    close = [c for c in fitting if c.to_loss <= CLOSE * shortest]
    return min(close, key=lambda c: (c.mildness, c.to_loss))


def legal(case: Case) -> Iterator[dict[str, int]]:
    """Meshes that multiply to the machine's chips, and that the weights, the sequence and the batch can be cut for."""
    for sizes in divisible(case):
        if not case.config.data.batch_size % (sizes[SLOW] * meshes.cut("batch", sizes)[1]):
            yield sizes


def divisible(case: Case) -> Iterator[dict[str, int]]:
    target, parts = case.target, case.base
    host = target.sides[1] if not target.chip.is_tpu else target.chips
    for shape in meshes.factorings(target.chips):
        sizes: dict[str, int] = dict.fromkeys(AXES, 1) | dict(zip(COMMON, shape, strict=True))
        if not _may_be_replicas(case, sizes[SLOW]) or host % sizes["tensor"]:
            continue
        if any(not {sizes[axis], -1} & {*case.fixed(f"mesh.{axis}", (-1,))} for axis in COMMON):
            continue
        try:
            build.check_cut(parts.task, sizes)
        except ValueError:
            continue
        if not case.config.data.seq_len % meshes.cut("sequence", sizes)[1]:
            yield sizes


def _may_be_replicas(case: Case, replicas: int) -> bool:
    """One for each slice or site; of a single site, hosts of whole replicas; a slice of TPUs is one."""
    target = case.target
    if target.slices > 1 or target.chip.is_tpu:
        return replicas == target.slices
    return not target.hosts % replicas and not (case.link and replicas == 1)


def with_batch(case: Case) -> tuple[Case, list[str]]:
    """With the nearest batch that some mesh can cut, if none can cut the config's, unless that was typed."""
    if next(legal(case), None):
        return case, []
    batch = case.config.data.batch_size
    units = [sizes[SLOW] * meshes.cut("batch", sizes)[1] for sizes in divisible(case)]
    if not units:
        wanted = ", ".join(f"{key}={_value(case.config, key)}" for key in case.typed if key.startswith("mesh."))
        raise UsageError(
            f"no mesh of {case.target.chips} chips{f' with {wanted}' if wanted else ''} cuts this model's heads, "
            "features and vocabulary: another number of chips would"
        )
    nearest = min((max(1, round(batch / unit)) * unit for unit in units), key=lambda n: abs(n - batch))
    if "data.batch_size" in case.typed:
        raise UsageError(
            f"data.batch_size={batch} is cut by no mesh of {case.target.chips} chips; data.batch_size={nearest} is"
        )
    note = f"data.batch_size={nearest}: {batch} windows cannot be cut for {case.target.chips} chips of this model"
    return replace(case, config=changed(case.config, {"data.batch_size": nearest})), [note]


def without_exchange(case: Case, sizes: dict[str, int]) -> Iterator[Candidate]:
    """Every number of micro-steps and rematerialisation on a mesh, as if `replica` took no time."""
    rows = case.config.data.batch_size // (sizes[SLOW] * meshes.cut("batch", sizes)[1])
    micro = [2**n for n in range(rows.bit_length()) if not rows % 2**n]
    state = memory.state_bytes(case.base, sizes)
    for accumulate, remat in itertools.product(
        case.fixed("optimizer.accumulate", micro), case.fixed("compute.remat", REMAT)
    ):
        if rows % accumulate:
            continue
        chunk = memory.chunk_mib(case.base) << 20
        layout = Layout(sizes, rows // accumulate, accumulate, remat, chunk, case.target.chip.is_tpu)
        yield counted(case, layout, "sync", "none", Exchange(), state, Flight())


def over_slow(case: Case, bare: Sequence[Candidate]) -> tuple[list[Candidate], list[str]]:
    """(the fastest meshes with every exchange that is tried on them; what was left out, in sentences). bare: of several
    replicas, those that fit without one."""
    found: list[Candidate] = []
    refused: dict[str, str] = {}
    slow = case.link is not None or case.target.slices > 1
    strategies = case.fixed("sync.strategy", tuple(over_link.TRIED) if slow else ("sync",))
    codecs = case.fixed("sync.codec", TRIED_CODECS if slow else TRIED_CODECS[:2])
    by_mesh: dict[tuple[int, ...], list[Candidate]] = {}
    for c in sorted(bare, key=lambda c: c.seconds):
        by_mesh.setdefault(tuple(c.layout.sizes.values()), []).append(c)
    notes = []
    if len(by_mesh) > MESHES:
        notes.append(f"exchanges are counted for the {MESHES} fastest of {len(by_mesh)} meshes with several replicas")
    for same in list(by_mesh.values())[:MESHES]:
        sizes = same[0].layout.sizes
        for strategy, codec in itertools.product(strategies, codecs):
            if strategy in refused or (case.gaps and not case.gaps.has(strategy, codec)):
                continue
            try:
                x = exchanging(case, sizes, strategy, codec)
            except UsageError as error:
                refused[strategy] = f"{strategy} is left out: {str(error).splitlines()[0]}"
                continue
            found += [counted(case, c.layout, strategy, codec, x.exchange, x.state, x.flight) for c in same]
    unknown = case.gaps.unknown(itertools.product(strategies, codecs)) if case.gaps else []
    return found, notes + list(refused.values()) + unknown


class Exchanging(NamedTuple):
    """A mesh with an exchange. state: bytes of a device."""

    state: float
    exchange: Exchange
    flight: Flight


def exchanging(case: Case, sizes: Mapping[str, int], strategy: str, codec: str) -> Exchanging:
    """Raises UsageError."""
    keys = method(case, strategy, codec) | {f"mesh.{axis}": sizes[axis] for axis in AXES}
    keys |= {"optimizer.accumulate": 1, "sync.replicas": 0, "compute.xla_options": ""}
    keys |= {"data.batch_size": math.prod(sizes.values())}  # which any mesh cuts; it has no part in this
    parts = build.build(changed(case.config, keys), case.mesh(sizes))
    return Exchanging(memory.state_bytes(parts, sizes), exchanged.sent(parts), exchanged.held(parts))


def counted(
    case: Case, layout: Layout, strategy: str, codec: str, exchange: Exchange, state: float, flight: Flight
) -> Candidate:
    net, target, sizes = case.network, case.target, layout.sizes
    rows = model.sent(net, layout, pace.habits(net, layout, target))
    step = pace.step(net, layout, target, rows, exchange, case.link, model.updated(net, layout))
    changes: dict[str, Any] = {f"mesh.{axis}": sizes[axis] for axis in COMMON}
    changes |= {"optimizer.accumulate": layout.accumulate, "compute.remat": layout.remat}
    changes |= {"data.batch_size": case.config.data.batch_size} | method(case, strategy, codec)
    tokens = case.config.data.batch_size * net.seq_len
    held = model.held(net, layout, flight)
    sent = {axis: sum(row.bytes for row in rows if row.axis == axis) for axis in COMMON} | {SLOW: exchange.bytes}
    delay = case.gaps.of(strategy, codec).factor if case.gaps and sizes[SLOW] > 1 else 1.0
    return Candidate(changes, layout, strategy, codec, step, state, held, sent, tokens, target.memory, delay)


# ── a machine that is too small ───────────────────────────────────────────────────────────────────────────────────────


def too_small(case: Case, least: Candidate) -> str:
    """One sentence. least: the candidate that needs least."""
    need = f"{human_bytes(least.peak_bytes)} of each chip's {human_bytes(case.target.memory)}"
    keys = [*(f"mesh.{axis}" for axis in COMMON), "optimizer.accumulate", "compute.remat"]
    best = ", ".join(f"{key}={least.changes[key]}" for key in keys)
    said = f"hardware={case.target.text}: the model needs {need} at best ({best})"
    for doublings in range(1, LARGEST):
        more = targets.wider(case.target, 2**doublings)
        if more is None:
            continue
        wider = replace(case, target=more, typed=tuple(k for k in case.typed if not k.startswith("mesh.")))
        try:
            case_, _ = with_batch(wider)
        except UsageError:
            continue
        if any(c.fits for sizes in legal(case_) for c in without_exchange(case_, sizes)):
            return f"{said}; --hardware={more.text} is the smallest of these chips that holds it"
    return f"{said}; no machine of these chips holds it: choose chips with more memory"


def _value(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = config[name]
    return config

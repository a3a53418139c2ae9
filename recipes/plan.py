"""Which mesh, micro-steps, rematerialisation and exchange make the most of a machine: all that are legal, counted in
closed form (parallel/cost/) and ranked. Nothing is compiled here."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from parallel.cost import host, pace, sent, targets, work
from parallel.cost.held import Flight, held
from parallel.cost.network import Layout
from parallel.cost.pace import Exchange
from parallel.layout import mesh as meshes
from parallel.layout.axes import AXES, COMMON, FAST, SLOW, STAGE
from recipes import build, exchanged, memory, over_link, pipeline, tried
from recipes.candidate import Candidate
from recipes.case import Case
from runtime.config import UsageError, changed
from runtime.console import human_bytes

CLOSE = 1.02  # of the shortest time: who is as near, and changes less of what is trained, is picked
TRIED_CODECS = ("none", "bf16", "int8", "int4")  # what is tried of them, mildest first
MESHES = 6  # for which exchanges are tried: the fastest without any
NARROW = "optimizer.moment_dtype"  # bfloat16 is tried where nothing fits
LARGEST = 12  # doublings of a machine that is too small


class Found(NamedTuple):
    """fitting: candidates that fit, fastest first. pick: of these. others: that do not fit. considered: how many were
    counted. notes: what was changed, or left out. offloaded: the fastest that fits with compute.remat=offload."""

    fitting: list[Candidate]
    pick: Candidate
    others: list[Candidate]
    considered: int
    notes: list[str]
    by_loss: bool = False  # ranked by time to a loss
    offloaded: Candidate | None = None


def method(case: Case, strategy: str, codec: str) -> dict[str, Any]:
    """The keys that name it, in rounds as over_link tries them: of the nearest length in which the run, and what lies
    between two evaluations or checkpoints, can be cut. What was typed stays."""
    own, c = over_link.TRIED[strategy], case.config
    found: dict[str, Any] = {"sync.strategy": strategy, "sync.codec": codec}
    if own.interval > 1:
        whole = math.gcd(c.steps, c.eval_every, c.checkpoint.every)
        lengths = [n for n in range(own.fragments, whole + 1) if not whole % n and not n % own.fragments]
        found["sync.interval"] = min(lengths, key=lambda n: abs(n - own.interval), default=own.interval)
    if own.fragments > 1:
        found |= {"sync.fragments": own.fragments, "sync.overlap": own.overlap}
    return {key: value for key, value in found.items() if key not in case.typed}


# ── searching ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def search(case: Case) -> Found:
    """Raises UsageError where nothing is legal, or nothing fits, with the smallest machine of these chips that would
    do."""
    tried.check_typed(case)
    case, notes = tried.with_batch(case)
    bare = [candidate for sizes in tried.legal(case) for candidate in without_exchange(case, sizes)]
    several = [c for c in bare if c.layout.sizes[SLOW] > 1 and c.fits]
    with_one, more = over_slow(case, several)
    found = [c for c in bare if c.layout.sizes[SLOW] == 1 and c.fits] + with_one
    fitting = sorted((c for c in found if c.fits), key=lambda c: c.to_loss)
    others = sorted((c for c in [*bare, *with_one] if not c.fits), key=lambda c: c.peak_bytes)
    if not fitting and not (several and not with_one) and _may_be_narrow(case):
        found = search(case.taking(NARROW, "bfloat16"))
        return found._replace(notes=[f"{NARROW}=bfloat16: nothing fits with float32", *notes, *found.notes])
    if not fitting and several:
        more = more or ["what fits without one does not fit with any"]
        raise UsageError(f"hardware={case.target.text}: no exchange can be planned for: {'; '.join(more)}")
    if not fitting:
        raise UsageError(too_small(case, min(bare, key=lambda c: c.needed_bytes)))
    pick, considered = picked(fitting), len(bare) + len(with_one)
    return Found(fitting, pick, others, considered, notes + more, case.gaps is not None, offloaded(case, pick))


def offloaded(case: Case, pick: Candidate) -> Candidate | None:
    """Of as many replicas as the pick's, without their exchange. It is not picked by itself, for the catalogue does not
    say how much memory a host has; and where nothing fits it does not either: a device holds what it does by `full`."""
    if "compute.remat" in case.typed or not case.target.chip.host:
        return None
    meshes_ = [x for x in tried.legal(case) if x[STAGE] == 1 and x[SLOW] == pick.layout.sizes[SLOW]]
    found = [c for sizes in meshes_ for c in without_exchange(case, sizes, (host.OFFLOAD,)) if c.fits]
    return min(found, key=lambda c: c.bare_seconds, default=None)


def _may_be_narrow(case: Case) -> bool:
    """Whether moments are float32, and need not be."""
    is_asked = NARROW in case.typed or case.value(NARROW) != "float32"
    return not is_asked and build.has_moments(case.config)


def picked(fitting: Sequence[Candidate]) -> Candidate:
    """Of those that are as good as the fastest, the one that changes least of what is trained."""
    shortest = min(c.to_loss for c in fitting)
    close = [c for c in fitting if c.to_loss <= CLOSE * shortest]
    return min(close, key=lambda c: (c.mildness, c.to_loss))


def without_exchange(case: Case, sizes: dict[str, int], remats: Sequence[str] = tried.REMAT) -> Iterator[Candidate]:
    """Every layout of a mesh, as if `replica` took no time."""
    rows = case.config.data.batch_size // (sizes[SLOW] * meshes.cut("batch", sizes)[1])
    state = memory.state_bytes(case.base, sizes)
    for layout in tried.layouts(case, sizes, rows, remats):
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
    for every in list(by_mesh.values())[:MESHES]:
        sizes, not_here = every[0].layout.sizes, set()
        offered = {True: undominated(every), False: undominated([c for c in every if c.layout.repeats == 1])}
        for strategy, codec in itertools.product(strategies, codecs):
            if strategy in not_here or (case.gaps and not case.gaps.has(strategy, codec)):
                continue
            try:
                x = exchanging(case, sizes, strategy, codec)
            except UsageError as error:
                not_here.add(strategy)
                refused[strategy] = f"{strategy} is left out: {str(error).splitlines()[0]}"
                continue
            same = offered[pipeline.takes_repeats(strategy)]
            found += [counted(case, c.layout, strategy, codec, x.exchange, x.state, x.flight) for c in same]
    nowhere = [said for strategy, said in refused.items() if all(c.strategy != strategy for c in found)]
    unknown = case.gaps.unknown(itertools.product(strategies, codecs)) if case.gaps else []
    return found, notes + nowhere + unknown


def undominated(same: Sequence[Candidate]) -> list[Candidate]:
    """Of a mesh's candidates, fastest first, those than which none that is faster holds less: an exchange adds the same
    to all of them, and what it hides behind is no reason to be slower."""
    found: list[Candidate] = []
    for c in same:
        if not found or c.temporary_bytes < found[-1].temporary_bytes:
            found.append(c)
    return found


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
    parts = build.build(changed(case.checked, keys), case.mesh(sizes))
    return Exchanging(memory.state_bytes(parts, sizes), exchanged.sent(parts), exchanged.held(parts))


def counted(
    case: Case, layout: Layout, strategy: str, codec: str, exchange: Exchange, state: float, flight: Flight
) -> Candidate:
    net, target, sizes = case.network, case.target, layout.sizes
    rows = sent.sent(net, layout, pace.habits(net, layout, target))
    step = pace.step(net, layout, target, rows, exchange, case.link, work.updated(net, layout))
    changes: dict[str, Any] = {f"mesh.{axis}": sizes[axis] for axis in worth(case, sizes)}
    changes |= {"optimizer.accumulate": layout.accumulate, "compute.remat": layout.remat}
    if layout.stages > 1:
        remat, gather, runs = layout.pipeline
        changes |= {"pipeline.remat": remat, "pipeline.gather": gather}
        changes |= {"pipeline.interleave": runs} if runs > 1 or case.config.pipeline.interleave > 1 else {}
    changes |= {"data.batch_size": case.config.data.batch_size, **dict(case.taken)} | method(case, strategy, codec)
    tokens = case.config.data.batch_size * net.seq_len
    moments = held(net, layout, flight)
    by_axis = dict.fromkeys(FAST, 0.0) | {SLOW: exchange.bytes}
    for row in rows:
        by_axis[row.axis] += row.bytes
    delay = case.gaps.of(strategy, codec).factor if case.gaps and sizes[SLOW] > 1 else 1.0
    own = (strategy, codec, step, state, moments, by_axis, tokens, target.memory, delay, host.held(net, layout))
    return Candidate(changes, layout, *own)


def worth(case: Case, sizes: Mapping[str, int]) -> list[str]:
    """Axes that a command has to name: others are 1 by the config, too."""
    return [axis for axis in AXES if axis in COMMON or sizes[axis] != 1 or case.config.mesh[axis] != 1]


# ── a machine that is too small ───────────────────────────────────────────────────────────────────────────────────────


def too_small(case: Case, least: Candidate) -> str:
    """One sentence. least: the candidate that needs least."""
    need = f"{human_bytes(least.needed_bytes)} of each chip's {human_bytes(case.target.memory)}"
    keys = ("mesh.", "optimizer.", "compute.remat", "pipeline.")
    best = ", ".join(f"{key}={value}" for key, value in least.changes.items() if key.startswith(keys))
    said = f"hardware={case.target.text}: the model may need {need} at best ({best})"
    for doublings in range(1, LARGEST):
        more = targets.wider(case.target, 2**doublings)
        if more is None:
            continue
        wider = replace(case, target=more, typed=tuple(k for k in case.typed if not k.startswith("mesh.")))
        try:
            case_, _ = tried.with_batch(wider)
        except UsageError:
            continue
        if any(c.fits for sizes in tried.legal(case_) for c in without_exchange(case_, sizes)):
            return f"{said}; --hardware={more.text} is the smallest of these chips that holds it"
    return f"{said}; no machine of these chips holds it: choose chips with more memory"

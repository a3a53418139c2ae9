"""What a planner tries: every mesh that a machine and a model allow, and on each every number of micro-steps,
rematerialisation, and form of a pipeline."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from parallel.cost.hardware import OWN_FILE
from parallel.cost.host import OFFLOAD
from parallel.cost.network import Layout
from parallel.layout import mesh as meshes
from parallel.layout.axes import AXES, CONTEXT, EXPERT, SLOW, STAGE
from recipes import build, context, experts, memory, pipeline
from recipes.case import Case
from runtime.config import UNREAD, UsageError, changed

REMAT = ("matmuls", "full")  # how much a host's memory holds is not known: offload is said, or typed
RUNS = (1, 2, 4)  # of layers of a stage
# What is read where an axis has several devices.
READ_BY = {f"mesh.{axis}": UNREAD[f"mesh.{axis}"][1].split() for axis in (STAGE, CONTEXT)}
POSITIONS = 1024  # of a sequence that a device has at least, where it is cut over context


def idle(sizes: Mapping[str, int]) -> list[str]:
    """Keys that nothing reads on such a mesh."""
    return [key for axis, keys in READ_BY.items() if sizes[axis.removeprefix("mesh.")] == 1 for key in keys]


def check_typed(case: Case) -> None:
    """Raises UsageError for a value that this does not count."""
    (remat,), chip = case.fixed("compute.remat", REMAT[:1]), case.target.chip
    if remat not in (*REMAT, OFFLOAD):
        raise UsageError(f"compute.remat={remat} cannot be planned with: {', '.join(REMAT)} and {OFFLOAD} can")
    if remat == OFFLOAD and not chip.host:
        raise UsageError(
            f"compute.remat={OFFLOAD} cannot be planned with: how fast {chip.name} reaches its host's memory is not in "
            f"the catalogue: set compute.remat=full, or add `host` by a file of your own ({OWN_FILE}, docs/targets.md)"
        )
    if case.config.compute.attention == context.PLAIN:
        raise UsageError(
            f"compute.attention={context.PLAIN} cannot be planned with: its scores are not counted: leave it out"
        )
    if case.config.sync.exchange != "after":
        raise UsageError(
            f"sync.exchange={case.config.sync.exchange} cannot be planned with: leave it out, and set it in the run"
        )


# ── meshes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def legal(case: Case) -> Iterator[dict[str, int]]:
    """Meshes that multiply to the machine's chips, and that the weights, the sequence and the batch can be cut for."""
    for sizes in divisible(case):
        if not case.config.data.batch_size % (sizes[SLOW] * meshes.cut("batch", sizes)[1]):
            yield sizes


def divisible(case: Case) -> Iterator[dict[str, int]]:
    """The same without the batch."""
    return (sizes for sizes in _sizes(case) if not unfit(case, sizes))


def unfit(case: Case, sizes: dict[str, int]) -> str:
    """Why the model cannot be cut for a mesh; "": it can."""
    c = case.checked
    over, count = meshes.cut("sequence", sizes)
    if c.data.seq_len % count:
        return f"data.seq_len={c.data.seq_len} cannot be cut over {over}={count}"
    try:
        pipeline.check(c, sizes)
        experts.check(c, sizes)
        build.check_cut(case.base.task, case.base.param_shapes, sizes)
        way = context.choose(c, sizes, case.network.itemsize)[0]
    except (ValueError, UsageError) as error:
        return str(error)
    if context.kernel(c, way, sizes)[0] == context.PLAIN:
        return f"attention.context={way} with documents or a window takes plain products, whose scores are not counted"
    return "" if _pipelines(case, sizes) else "pipeline.gather=step with mesh.context is not planned: leave it out"


def _sizes(case: Case) -> Iterator[dict[str, int]]:
    """Of all axes, that multiply to the machine's chips and divide what each of them cuts. `tensor` does not leave a
    host."""
    target, c = case.target, case.config
    asked = {axis: case.fixed(f"mesh.{axis}", (-1,))[0] for axis in AXES}

    def tried(axis: str, left: int, most: int = 0) -> list[int]:
        """What divides what is left; unless it was typed, what the axis cuts, too."""
        size = asked[axis]
        return meshes.divisors(math.gcd(left, most), left) if size == -1 else [size] * (left % size == 0)

    host = target.chips if target.chip.is_tpu else target.sides[1]
    longest = math.inf if f"mesh.{CONTEXT}" in case.typed else max(1, c.data.seq_len // POSITIONS)
    for replicas in tried(SLOW, target.chips):
        if not _may_be_replicas(case, replicas):
            continue
        chips = target.chips // replicas
        for stage in tried(STAGE, chips, c.model.num_layers):
            for tensor in tried("tensor", chips // stage, host):
                left = chips // stage // tensor
                for expert in tried(EXPERT, left, c.model.experts or 1):
                    for cut in (n for n in tried(CONTEXT, left // expert) if n <= longest):
                        sizes = {SLOW: replicas, STAGE: stage, "fsdp": left // expert // cut}
                        sizes |= {EXPERT: expert, CONTEXT: cut, "tensor": tensor}
                        if asked["fsdp"] in (sizes["fsdp"], -1):
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
        wanted = ", ".join(f"{key}={case.value(key)}" for key in case.typed if key.startswith("mesh."))
        raise UsageError(
            f"no mesh of {case.target.chips} chips{f' with {wanted}' if wanted else ''} will do for this model: "
            f"{_why_none(case)}"
        )
    nearest = min((max(1, round(batch / unit)) * unit for unit in units), key=lambda n: abs(n - batch))
    if "data.batch_size" in case.typed:
        raise UsageError(
            f"data.batch_size={batch} is cut by no mesh of {case.target.chips} chips; data.batch_size={nearest} is"
        )
    note = f"data.batch_size={nearest}: {batch} windows cannot be cut for {case.target.chips} chips of this model"
    return replace(case, config=changed(case.config, {"data.batch_size": nearest})), [note]


def _why_none(case: Case) -> str:
    """No mesh can be: a reason, of what was typed if there is one."""
    chips, typed = case.target.chips, [case.value(f"mesh.{a}") for a in AXES if f"mesh.{a}" in case.typed]
    if chips % abs(math.prod(typed)):  # of which one may be -1: whatever is left
        return f"the product of these does not divide {chips}"
    reasons = [unfit(case, sizes) for sizes in _sizes(case)]
    if not reasons:
        return "a replica is one slice or site; of a single site, whole hosts"
    return next((why for why in reasons if any(key in why for key in case.typed)), reasons[0])


# ── on a mesh ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def layouts(case: Case, sizes: dict[str, int], rows: int, remats: Sequence[str] = REMAT) -> Iterator[Layout]:
    """rows: of a device in a step. remats: of compute.remat, unless that was typed."""
    chunk, way = memory.chunk_mib(case.base) << 20, context.choose(case.config, sizes, case.network.itemsize)[0]
    micro, known = [2**n for n in range(rows.bit_length()) if not rows % 2**n], {}
    for accumulate, remat, form in itertools.product(
        case.fixed("optimizer.accumulate", micro), case.fixed("compute.remat", remats), _pipelines(case, sizes)
    ):
        whole = form[2] == 1 or not accumulate % sizes[STAGE] or "pipeline.interleave" in case.typed  # groups
        if whole and not rows % accumulate:
            is_tpu = case.target.chip.is_tpu
            yield Layout(sizes, rows // accumulate, accumulate, remat, chunk, is_tpu, way, form, known)


def _pipelines(case: Case, sizes: dict[str, int]) -> list[tuple[str, str, int]]:
    """pipeline.remat, pipeline.gather and pipeline.interleave."""
    if sizes[STAGE] == 1:
        return [("layer", "tick", 1)]
    c = case.config
    can_gather = meshes.cut("batch", sizes)[1] > 1 and sizes[CONTEXT] == 1 and not c.model.experts and not c.lora.rank
    remat, gather = case.fixed("pipeline.remat", ("layer", "stage")), case.fixed("pipeline.gather", ("tick", "step"))
    runs = [n for n in RUNS if n == 1 or not c.lora.rank and not c.model.num_layers % (n * sizes[STAGE])]
    forms = itertools.product(remat, gather, case.fixed("pipeline.interleave", runs))
    return [form for form in forms if form[1] == "tick" or can_gather]

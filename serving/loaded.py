"""From a workdir to an engine: the newest intact parameters of a run, laid out for decoding; every program compiled.
What generate.py, chat.py and serve.py have in common."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from model.config import ModelConfig
from parallel.layout import mesh as meshes
from parallel.layout import rules
from parallel.layout.axes import CONTEXT, SLOW, STAGE
from recipes import door, experts, language, memory, methods, parameters, xla
from runtime import config as configuration
from runtime.config import UsageError
from runtime.console import human_bytes
from serving import ladder, weights
from serving.engine import Engine
from serving.programs import OVER, Programs

SHORT = 512  # positions of the lane for most requests, beside that of the whole context
LEAST = 8  # slots of a device in the smallest rung: with fewer, XLA:CPU of some versions adds in another order

PAUSE = 3  # seconds between two lines while programs compile

Say = Callable[[str], None]


@dataclass(frozen=True)
class Model:
    """Of a run: what is needed to load its parameters, on a mesh. axes: their logical axes; abstract: their shapes and
    shardings."""

    workdir: Path
    config: Any
    mesh: Mesh
    network: ModelConfig
    dtype: Any
    axes: Any
    abstract: Any
    tokenizer: Any

    def load(self, say: Say) -> tuple[Any, str, int]:
        """(weights for decoding, the digest of their checkpoint, its step)."""
        given = parameters.read(self.workdir, self.axes, self.abstract, say)
        found = weights.unstack(given.params, self.axes, self.network, self.dtype, self.mesh)
        return found, given.digest, given.step

    @cached_property
    def decoding(self) -> Any:
        """Shapes and shardings of the weights for decoding."""
        return weights.abstract(self.abstract, self.axes, self.network, self.dtype, self.mesh)

    @property
    def xla_options(self) -> dict[str, Any]:
        return xla.options(self.config.compute.xla_options, self.mesh, is_small=False)


def open_model(workdir: str, changes: Mapping[str, Any], simulate: int | None) -> Model:
    """Raises UsageError for a folder that is no run of a language model, or a mesh that does not divide it."""
    path = Path(door.folder(workdir) or "")
    if not (path / "config.json").is_file():
        raise UsageError(f"workdir={path}: there is no config.json of a run in this folder")
    config = door.configure(door.alone(configuration.read_json(path)), changes).config
    if config.mesh[SLOW] != 1:
        raise UsageError(
            f"mesh.{SLOW}={config.mesh[SLOW]}: nothing of an answer crosses a slow link. Start one on each replica"
        )
    door.check_given(path, methods.NONE, ("task",))
    return laid_out(path, config, door.mesh_of(config, simulate), door.tokenizer_of(path, config.data))


def laid_out(workdir: Path, config: Any, mesh: Mesh, tokenizer: Any) -> Model:
    """Nothing is allocated. Raises UsageError for a mesh that does not divide the weights, or has other axes."""
    for axis in (STAGE, CONTEXT):
        if (size := mesh.shape[axis]) != 1:
            raise UsageError(f"mesh.{axis}={size}: models are served over mesh.fsdp, mesh.expert, mesh.tensor, so far")
    experts.check(config, mesh.shape)
    task = language.build(_any_length(config, mesh), mesh)
    shapes = jax.eval_shape(task.init, jax.eval_shape(lambda: jax.random.key(0)))
    with configuration.bad_input():
        meshes.check_divisible(shapes, task.axes, mesh.shape, task.least)
    shardings = rules.shardings(mesh, rules.specs(task.axes))
    abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    return Model(workdir, config, mesh, task.model.config, task.model.compute.dtype, task.axes, abstract, tokenizer)


def _any_length(config: Any, mesh: Mesh) -> Any:
    """A sequence is cut in training only: rotary positions have no table that would be as long."""
    if config.model.position == "learned":
        return config
    flat = dict(configuration.flatten(config))
    return configuration.nested(flat | {"data.seq_len": 256 * mesh.size})


def context_of(model: Model, context: int | None) -> int:
    """Tokens of prompt and answer, at most. Raises UsageError for more than the model has positions for."""
    c, longest = model.network, context or model.config.data.seq_len
    if c.position == "learned" and longest > c.max_seq_len:
        raise UsageError(f"--context={longest}: this model has {c.max_seq_len} positions, each with a learned weight")
    return longest


def open_engine(model: Model, slots: int, context: int | None, invariant: bool, say: Say, most_waiting: int) -> Engine:
    """Ready to be started. slots: requests at once, of each length.

    Raises UsageError for a context that the model has no positions for, or more than the devices' memory holds.
    """
    c, began = model.network, time.monotonic()
    longest = context_of(model, context)
    lengths = sorted({min(SHORT, longest), longest})
    rungs = _rungs(slots, rules.shards(OVER, model.mesh.shape), invariant)
    _check_memory(model, rungs[-1], lengths, say)
    given, digest, step = model.load(say)
    programs = Programs(c, model.mesh, model.dtype, given, rungs, lengths)
    programs.compile(model.xla_options, _progress(say))
    if invariant:
        programs.rungs = ladder.agreeing(programs, given)
        if not programs.rungs:
            raise UsageError("on this machine an answer's bits depend on its slot: only with --no_invariant")
        if dropped := [n for n in rungs if n not in programs.rungs]:
            say(f"programs of {', '.join(map(str, dropped))} slots round otherwise on this machine: they are not used")
    say(
        f"{model.workdir}: step {step}, {sum(x.size for x in jax.tree.leaves(given)):,} weights in {model.dtype}, "
        f"{meshes.describe(model.mesh)}; up to {programs.rungs[-1]} requests at once of {longest:,} tokens; "
        f"ready in {time.monotonic() - began:.0f} s"
    )
    return Engine(programs, given, digest, step, most_waiting)


def _progress(say: Say) -> Callable[[float], None]:
    """Says every few seconds how far it is."""
    began = last = time.monotonic()

    def tell(share: float) -> None:
        nonlocal last
        if (now := time.monotonic()) - last >= PAUSE and share < 1:
            last = now
            say(f"compiled {share:.0%}; about {(now - began) / share * (1 - share):.0f} s left")

    return tell


def _rungs(slots: int, shards: int, invariant: bool) -> list[int]:
    """Numbers of slots, each twice the one before."""
    found = [LEAST * shards] if invariant else [shards, LEAST * shards]
    while found[-1] < slots:
        found.append(2 * found[-1])
    return found


def needs(model: Model, slots: int, lengths: Sequence[int]) -> tuple[int, int]:
    """Bytes of a device: (of weights; of keys, values and what else is known of slots, at most)."""
    sizes = model.mesh.shape
    programs = Programs(model.network, model.mesh, model.dtype, model.decoding, [slots], lengths)
    kept = sum(memory.tree_bytes(programs.state(slots, length), sizes) for length in lengths)
    return memory.tree_bytes(model.decoding, sizes), kept


def _check_memory(model: Model, slots: int, lengths: Sequence[int], say: Say) -> None:
    """Says what a device needs at most, and refuses what it has not."""
    held, kept = needs(model, slots, lengths)
    limit = memory.of_device()
    said = f"a device needs {human_bytes(held)} for weights and up to {human_bytes(kept)} for keys and values"
    if limit is not None and held + kept > limit:
        raise UsageError(
            f"{said}, and has {human_bytes(limit)}: fewer --slots, a shorter --context, or more of mesh.tensor "
            "or mesh.expert"
        )
    say(f"{said}; compiling")

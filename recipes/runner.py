"""One training run of a comparison, and what is kept of it: a file, so that the comparison goes on where it was
stopped."""

import functools
import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from data.corpus import cache_directory
from parallel.cost.bytes import bytes_per_step
from parallel.cost.utilisation import Method
from parallel.layout import mesh as meshes
from parallel.layout.axes import SLOW
from recipes import describe, fit, methods, phases
from recipes.build import Parts, build, num_parameters
from recipes.programs import compile_evaluation, compile_init, compile_steps, shardings_of, use_compilation_cache
from runtime.config import RunError, UsageError
from runtime.console import Console, human_seconds
from runtime.digest import named_arrays
from runtime.metrics import replace_file, write_json
from runtime.progress import Recorder

PER_SEED = ("skipped", "clipped", "ended", "seconds")  # of the runs of a row
PERTURBATION = 1e-6  # of the weights, relative: the noise floor of a comparison
OTHER_DRAWS = 2**31  # added to the seed of a codec
KIND = 2  # of result files: those with another number are not read


@dataclass(frozen=True)
class Job:
    """A run. floor: with weights that are moved, and other draws of its codec. borders: steps at which synchronous
    states are kept, for runs with as many warm steps. own: objects of the caller's."""

    name: str
    config: Any
    seed: int
    floor: bool = False
    borders: frozenset[int] = frozenset()
    own: methods.Own = methods.NONE


@dataclass
class Runner:
    """Trains what is not in the workdir yet. One file per run, named by what was run: another config, another file."""

    workdir: Path
    jobs: list[Job]  # all, of which some may be done: for the ETA
    devices: Sequence[Any] = ()  # all, if none are given
    started: float = field(default_factory=time.time)
    _built: dict[tuple[str, int], Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._to_do = [job for job in self.jobs if not self.file(job).exists()]

    def __getstate__(self) -> dict[str, Any]:
        """For another process, which has its own devices."""
        return vars(self) | {"devices": (), "_built": {}}

    def file(self, job: Job) -> Path:
        described = [job.config.to_json(sort_keys=True), job.seed, job.floor, KIND, *described_objects(job.own)]
        digest = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]
        return self.workdir / "results" / f"{digest}.json"

    def result(self, job: Job) -> dict[str, Any]:
        """JSON has no NaN: a loss that is not a number is null there."""
        number = lambda loss: math.nan if loss is None else loss
        found = json.loads(self.file(job).read_text())
        return found | {"eval_loss": [*map(number, found["eval_loss"])], "final_loss": number(found["final_loss"])}

    def train(self, jobs: list[Job]) -> None:
        for job in jobs:
            if not self.file(job).exists():
                started = time.time()
                found = self._train(job)
                found |= {"row": job.name, "seed": job.seed, "seconds": round(time.time() - started, 1)}
                write_json(self.file(job), found)
                self._tell(job, found)

    def _tell(self, job: Job, found: dict[str, Any]) -> None:
        """Other processes may train too: what is there counts."""
        left = sum(other.config.steps for other in self._to_do if not self.file(other).exists())
        done = sum(other.config.steps for other in self._to_do) - left
        eta = human_seconds((time.time() - self.started) / done * left)
        early = f" | {found['ended']}" if found["ended"] else ""
        print(
            f"{job.name} | seed {job.seed} | {job.config.steps} steps in {found['seconds']:.0f} s | "
            f"eval loss {found['final_loss']:.4f} | skipped {found['skipped']} | clipped {found['clipped']} | ETA {eta}"
            f"{early}",
            flush=True,
        )

    # ── one run ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _train(self, job: Job) -> dict[str, Any]:
        config, seed = job.config.copy_and_resolve_references(), job.seed
        # What a codec draws varies with the seed, as the weights and the order of the data do.
        if methods.draws(config.sync, job.own):
            config.seed = seed + OTHER_DRAWS * job.floor
        parts, programs, init, evaluate, evaluate_whole, data = self._build(config, job.own)
        loader = data.loader(seed, config.data.batch_size)
        start, losses, state = self._begin(job, parts) or (0, {}, init(np.uint32(seed)))
        if job.floor:
            state.params = jax.jit(_perturb, out_shardings=shardings_of(parts.state.params))(state.params)
        recorder, ended, final = _recorder(config), "", math.nan
        try:
            updates = fit.Steps(parts, programs, state, loader, start, config.steps)
            for trained, metrics in updates:
                done = updates.done
                recorder.step(done, metrics, updates.units)
                if fit.due(done, config.eval_every, config.steps):
                    losses[done] = evaluate(trained.params).loss
                if done in job.borders and _is_exact(job, done) and not job.floor:
                    self._keep(job, done, trained, losses)
                if done == config.steps:
                    final = evaluate_whole(trained.params).loss
            recorder.flush()
        except RunError as error:  # its row says so; the others go on
            ended = str(error)
        done = [call.step + call.steps for call in phases.calls(parts, config.steps)]
        steps = [n for n in done if fit.due(n, config.eval_every, config.steps)]
        size, source = _wire_bytes(parts, programs, config)
        return {
            "steps": steps,
            "eval_loss": [losses.get(n, math.nan) for n in steps],
            "final_loss": final,
            **{name: recorder.last.get(name, 0) for name in ("skipped", "clipped")},
            "ended": ended,
            "wire_bytes_per_step": size,
            "wire_bytes_from": source,
            "parameters": num_parameters(parts),
            "method": _method(parts, config.steps),
        }

    def _build(self, config: Any, own: methods.Own) -> tuple:
        """Compiled programs are shared by the seeds of a row, unless they draw; only the last ones are kept."""
        key = config.to_json(sort_keys=True), id(own)
        if key not in self._built:
            devices = self.devices or jax.devices()
            R, D = config.sync.replicas, len(devices)
            if R % D:
                raise UsageError(f"sync.replicas={R} replicas cannot be laid over {D} devices: use --simulate={R}")
            parts = build(config, meshes.build({SLOW: D}, devices), own)
            data = parts.task.read(config)
            program = functools.cache(functools.partial(compile_evaluation, parts))
            evaluate = fit.make_evaluator(config, parts, data, program)
            evaluate_whole = fit.make_evaluator(config, parts, data, program, whole=True)
            built = (parts, compile_steps(parts), compile_init(parts), evaluate, evaluate_whole, data)
            self._built = {key: built}
        return self._built[key]

    # ── runs that begin alike ────────────────────────────────────────────────────────────────────────────────────

    def _state_file(self, job: Job, step: int) -> Path:
        """Named by all that a synchronous state of this step depends on."""
        config = {key: x for key, x in job.config.to_dict().items() if key != "sync"}
        others = methods.Own(optimizer=job.own.optimizer, task=job.own.task)
        described = [config, job.config.sync.replicas, job.config.sync.algorithm, job.seed, step]
        described += described_objects(others)
        digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
        return self.workdir / "states" / f"{digest}.safetensors"

    def _keep(self, job: Job, step: int, state: Any, losses: dict[int, float]) -> None:
        arrays = {name: np.asarray(x) for name, x in named_arrays(state).items()}
        replace_file(self._state_file(job, step), safetensors.numpy.save(arrays, {"losses": json.dumps(losses)}))

    def _begin(self, job: Job, parts: Parts) -> tuple[int, dict[int, float], Any] | None:
        """(step, losses until then, state) of a run with warm steps whose synchronous part has been made."""
        file = self._state_file(job, job.config.sync.warm_steps)
        if not job.config.sync.warm_steps or job.floor or not file.exists():
            return None
        first, phase = parts.phases
        with safetensors.safe_open(file, "numpy") as kept:
            losses = json.loads(kept.metadata()["losses"])
            wanted = named_arrays(first.state)
            arrays = [jax.device_put(kept.get_tensor(name), x.sharding) for name, x in wanted.items()]
        state = jax.tree.structure(first.state).unflatten(arrays)
        losses = {int(step): loss for step, loss in losses.items()}
        return phase.first, losses, phases.cross(parts, phase, state)


def one_core(count: Any, simulate: int) -> None:
    """Begins a process of several: on a core of its own, before JAX looks how many there are."""
    with count.get_lock():
        number = count.value
        count.value += 1
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[number % len(cores)]})
    if simulate:
        meshes.simulate(simulate)
    meshes.keep_freed_memory()
    use_compilation_cache(cache_directory())


def described_objects(own: methods.Own) -> list[dict[str, Any]]:
    """What the name of a file says of a caller's objects besides their classes, which the config names."""
    return [found] if (found := own.describe()) else []


def _is_exact(job: Job, done: int) -> bool:
    """Whether the steps until then were synchronous, in float32."""
    named = job.config.sync.strategy, job.config.sync.codec, job.own.strategy, job.own.codec
    return named == ("sync", "none", None, None) or done <= job.config.sync.warm_steps


def _recorder(config: Any) -> Recorder:
    """Reads the metrics as in train.py, where nothing is to be shown or logged: refused updates are counted, and too
    many in a row end the run."""
    console = Console(config.steps, config.log_every, quiet=True)
    return Recorder(None, console, log_every=config.steps, abort_after=config.guard.abort_after)


def _perturb(params: Any) -> Any:
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x * (1 + PERTURBATION * jax.random.normal(key, x.shape)) for key, x in zip(keys, leaves, strict=True)]
    return treedef.unflatten([jnp.asarray(x) for x in moved])


def _wire_bytes(parts: Parts, programs: dict[str, Any], config: Any) -> tuple[float, str]:
    """Bytes per step that a replica sends: counted in the program where every replica has a device of its own."""
    if parts.mesh.shape[SLOW] == parts.replicas:
        counted = describe.wire_bytes(parts, describe.traffic(parts, programs), config.steps)
        if counted:
            return counted[SLOW], "compiled program"
    sent = [
        (last - phase.first) * bytes_per_step(phase.strategy, last, a_device_per_replica=True, first=phase.first)
        for phase, last in phases.spans(parts, 0, config.steps)
    ]
    return sum(sent) / config.steps, "closed form"


def _method(parts: Parts, steps: int) -> dict[str, Any]:
    """The row as the utilisation simulator takes it: without warm steps, whose share is of this run's length."""
    strategy, first = parts.strategy, parts.phases[-1].first
    whole = bytes_per_step(strategy, steps, a_device_per_replica=True, first=first) * strategy.interval
    method = Method(
        bytes_per_parameter=whole / num_parameters(parts),
        interval=strategy.interval,
        fragments=strategy.fragments,
        overlap=strategy.hidden_steps,
    )
    return vars(method)

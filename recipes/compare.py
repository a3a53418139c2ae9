"""The runs of a comparison, and what is kept of each: one file per run, so that it goes on where it was stopped."""

import functools
import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from parallel.cost.bytes import bytes_per_step
from parallel.cost.utilisation import Method
from parallel.layout import mesh as meshes
from parallel.layout.axes import SLOW
from recipes import describe, fit, methods, phases, table
from recipes.build import Parts, build, num_parameters
from recipes.programs import compile_evaluation, compile_init, compile_steps, shardings_of
from runtime import config as configuration
from runtime.config import RunError, UsageError
from runtime.console import Console, human_seconds
from runtime.metrics import write_json
from runtime.progress import Recorder

PER_SEED = ("skipped", "clipped", "ended")  # of the runs of a row
PERTURBATION = 1e-6  # of the weights, relative: the noise floor of a comparison


@dataclass(frozen=True)
class Row:
    """changes: {key: value}, to the config of all rows. tune: a key, and what is tried of it."""

    name: str
    changes: dict[str, Any]
    tune: tuple[str, tuple[float, ...]] | None = None
    perturbed: bool = False

    @property
    def candidates(self) -> tuple:
        return self.tune[1] if self.tune else (None,)


@dataclass(frozen=True)
class Plan:
    """What is compared: a config, and rows that change it. The first row is the baseline."""

    base: Any
    rows: list[Row]
    seeds: tuple[int, ...]

    @property
    def steps(self) -> int:
        return self.base.steps

    @property
    def third(self) -> int:
        """A third of the steps, in whole intervals between evaluations."""
        every = self.base.eval_every
        return max(1, round(self.steps / 3 / every)) * every

    @classmethod
    def read(cls, file: str, only: str) -> "Plan":
        """Of a config file with ROWS and SEEDS. Raises UsageError."""
        base, found = configuration.execute(file)
        if missing := {"ROWS", "SEEDS"} - found.keys():
            raise UsageError(f"--config={file} has no {', '.join(sorted(missing))}: see configs/compare/quickstart.py")
        return cls.of(base, found["ROWS"], found["SEEDS"], only)

    @classmethod
    def of(cls, base: Any, rows: Iterable[dict[str, Any]], seeds: Iterable[int], only: str = "") -> "Plan":
        """Raises UsageError for a row or a number of seeds that cannot be compared; checks every row."""
        seeds, found = tuple(seeds), []
        if len(set(seeds)) < max(3, len(seeds)):
            raise UsageError(f"SEEDS={seeds}: an interval needs 3 seeds or more, all different")
        for row in rows:
            if not isinstance(row, dict) or not {"name", "changes"} <= row.keys() <= {"name", "changes", "tune"}:
                raise UsageError(f"row {row!r}: expected a dictionary with name, changes and perhaps tune")
            found.append(Row(**row))
        if not found:
            raise UsageError("ROWS is empty: the first row is the baseline, the others are compared with it")
        plan = cls(base, found, seeds)
        for row in plan.rows:
            if row.tune and len(row.tune[1]) > 3:
                raise UsageError(f"row {row.name!r}: {len(row.tune[1])} candidates; every row has at most 3")
            for value in row.candidates:
                for steps in {plan.steps, plan.third} if row.tune else {plan.steps}:
                    config = plan.config(row, value, steps)
                    methods.validate(config)
                    if config.init.workdir:
                        raise UsageError(f"row {row.name!r} sets init.workdir: a comparison draws its weights by seed")
        first, *others = plan.rows
        floor = Row(f"{first.name}, weights moved by {PERTURBATION:g}", first.changes, first.tune, True)
        kept = [row for row in [first, floor, *others] if only in row.name or row is first]
        return cls(plan.base, kept, plan.seeds)

    def config(self, row: Row, value: Any, steps: int) -> Any:
        """The training run of a row, with this value of what it tunes."""
        config = self.base.copy_and_resolve_references()
        changes = row.changes | ({row.tune[0]: value} if row.tune else {}) | {"steps": steps}
        config.update_from_flattened_dict(configuration.converted(changes, f"row {row.name!r} sets"))
        return config

    def about(self) -> dict[str, Any]:
        tokens = self.steps * self.base.data.batch_size * self.base.data.seq_len
        replicas = self.base.sync.replicas
        return {"seeds": len(self.seeds), "steps": self.steps, "tokens": tokens, "replicas": replicas}


@dataclass
class Runner:
    """Runs what is not in the workdir yet. One file per run, named by what was run: another config, another file."""

    plan: Plan
    workdir: Path
    devices: Sequence[Any] = ()  # all, if none are given
    started: float = field(default_factory=time.time)
    steps_done: int = 0
    _built: dict[str, Any] = field(default_factory=dict)

    def tune(self, row: Row) -> Any:
        """The best candidate by eval loss after a third of the length, with the first seed."""
        if row.tune is None:
            return None
        steps = self.plan.third
        losses = {v: self.result(row, v, self.plan.seeds[0], steps)["eval_loss"][-1] for v in row.tune[1]}
        return min(losses, key=lambda value: losses[value] if np.isfinite(losses[value]) else np.inf)

    def finished(self, row: Row) -> bool:
        runs = lambda value: all(self._file(row, value, seed, self.plan.steps).exists() for seed in self.plan.seeds)
        return any(runs(value) for value in row.candidates)

    def summary(self, row: Row) -> dict[str, Any]:
        value = self.tune(row)
        runs = [self.result(row, value, seed, self.plan.steps) for seed in self.plan.seeds]
        keys = ("wire_bytes_per_step", "wire_bytes_from", "method", "parameters")
        return {
            "name": row.name,
            "tuned": f"{row.tune[0]}={value:g} of {', '.join(f'{v:g}' for v in row.tune[1])}" if row.tune else "",
            "steps": runs[0]["steps"],
            "eval_losses": [run["eval_loss"] for run in runs],
            **{key: [run[key] for run in runs] for key in PER_SEED},
            **{key: runs[0][key] for key in keys},
        }

    def result(self, row: Row, value: Any, seed: int, steps: int) -> dict[str, Any]:
        file = self._file(row, value, seed, steps)
        if file.exists():
            return _read_result(file)
        config = self.plan.config(row, value, steps)
        started = time.time()
        found = self._train(row, config, seed)
        self.steps_done += steps
        write_json(file, found | {"row": row.name, "seed": seed, "seconds": round(time.time() - started, 1)})
        remaining = sum(n for *_, n in self._to_do())
        eta = (time.time() - self.started) / self.steps_done * remaining
        early = f" | {found['ended']}" if found["ended"] else ""
        print(
            f"{row.name} | {row.tune[0] if row.tune else ''}={value} seed {seed} | {steps} steps in "
            f"{time.time() - started:.0f} s | eval loss {found['eval_loss'][-1]:.4f} | skipped {found['skipped']} | "
            f"clipped {found['clipped']} | ETA {human_seconds(eta)}{early}",
            flush=True,
        )
        return _read_result(file)

    def _to_do(self) -> Iterator[tuple[Row, Any, int, int]]:
        """Runs that are still missing. Which candidate will win is not known before: any stands for it."""
        for row in self.plan.rows:
            for value in row.candidates if row.tune else ():
                if not self._file(row, value, self.plan.seeds[0], self.plan.third).exists():
                    yield row, value, self.plan.seeds[0], self.plan.third
            for seed in self.plan.seeds:
                if not any(self._file(row, v, seed, self.plan.steps).exists() for v in row.candidates):
                    yield row, row.candidates[0], seed, self.plan.steps

    def _file(self, row: Row, value: Any, seed: int, steps: int) -> Path:
        described = [self.plan.config(row, value, steps).to_json(sort_keys=True), seed, row.perturbed]
        digest = hashlib.sha256(json.dumps(described).encode()).hexdigest()[:16]
        return self.workdir / "results" / f"{digest}.json"

    def _train(self, row: Row, config: Any, seed: int) -> dict[str, Any]:
        if methods.draws(config.sync):
            config.seed = seed  # what a codec draws varies with the seed, as the weights and the order of the data do
        parts, programs, init, evaluate, data = self._build(config)
        loader = data.loader(seed, config.data.batch_size)
        state = init(np.uint32(seed))
        if row.perturbed:
            state.params = jax.jit(_perturb, out_shardings=shardings_of(parts.state.params))(state.params)
        recorder = _recorder(config)
        losses: dict[int, float] = {}
        ended = ""
        try:
            updates = fit.Steps(parts, programs, state, loader, 0, config.steps)
            for trained, metrics in updates:
                recorder.step(updates.done, metrics, updates.units)
                if fit.due(updates.done, config.eval_every, config.steps):
                    losses[updates.done] = evaluate(trained.params).loss
            recorder.flush()
        except RunError as error:  # its row says so; the others go on
            ended = str(error)
        done = [call.step + call.steps for call in phases.calls(parts, config.steps)]
        steps = [n for n in done if fit.due(n, config.eval_every, config.steps)]
        size, source = _wire_bytes(parts, programs, config)
        return {
            "steps": steps,
            "eval_loss": [losses.get(n, math.nan) for n in steps],
            **{name: recorder.last.get(name, 0) for name in ("skipped", "clipped")},
            "ended": ended,
            "wire_bytes_per_step": size,
            "wire_bytes_from": source,
            "parameters": num_parameters(parts),
            "method": _method(parts, config.steps),
        }

    def _build(self, config: Any) -> tuple:
        """Compiled programs are shared by the seeds of a candidate, unless they draw; only the last ones are kept."""
        key = config.to_json(sort_keys=True)
        if key not in self._built:
            devices = self.devices or jax.devices()
            R, D = config.sync.replicas, len(devices)
            if R % D:
                raise UsageError(f"sync.replicas={R} replicas cannot be laid over {D} devices: use --simulate={R}")
            parts = build(config, meshes.build({SLOW: D}, devices))
            data = parts.task.read(config)
            program = functools.cache(functools.partial(compile_evaluation, parts))
            evaluate = fit.make_evaluator(config, parts, data, program)
            built = (parts, compile_steps(parts), compile_init(parts), evaluate, data)
            self._built = {key: built}
        return self._built[key]


def run(plan: Plan, workdir: Path, devices: Sequence[Any] = ()) -> dict[str, Any]:
    """Trains what is not in the workdir yet, and keeps the table of what is there after each row: the table."""
    runner, found = Runner(plan, workdir, devices), {}
    for row in plan.rows:
        best = runner.tune(row)
        for seed in plan.seeds:
            runner.result(row, best, seed, plan.steps)
        found = table.tabulate([runner.summary(r) for r in plan.rows if runner.finished(r)], plan.about())
        table.write(found, workdir)
    return found


def _read_result(file: Path) -> dict[str, Any]:
    """JSON has no NaN: a loss that is not a number is null there."""
    found = json.loads(file.read_text())
    return found | {"eval_loss": [math.nan if loss is None else loss for loss in found["eval_loss"]]}


def _recorder(config: Any) -> Recorder:
    """Reads the metrics as in train.py, where nothing is to be shown or logged: refused updates are counted, and too
    many in a row end the run."""
    console = Console(config.steps, config.steps, quiet=True)
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
    """The row as the utilisation simulator takes it."""
    strategy, first = (
        parts.strategy,
        parts.phases[-1].first,
    )  # what comes before is of this run's length, not of the method
    whole = bytes_per_step(strategy, steps, a_device_per_replica=True, first=first) * strategy.interval
    method = Method(
        bytes_per_parameter=whole / num_parameters(parts),
        interval=strategy.interval,
        fragments=strategy.fragments,
        overlap=strategy.hidden_steps,
    )
    return vars(method)

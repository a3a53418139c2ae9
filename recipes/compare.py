"""What a comparison trains: a config, the rows that change it, seeds. recipes/runner.py trains one run of it."""

import math
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from recipes import methods, table
from recipes.runner import PER_SEED, PERTURBATION, Job, Runner, one_core
from runtime import agree, report
from runtime import config as configuration
from runtime.config import UsageError
from runtime.environment import software

KEYS = {"name", "changes", "tune", "floor"}


@dataclass(frozen=True)
class Row:
    """changes: {key: value}, to the config of all rows. tune: a key, and what `search` tries of it. floor: a row is
    wanted beside it that is the same but for what means nothing: weights moved by 1e-6, and other draws of a codec
    that draws. is_floor: it is such a row."""

    name: str
    changes: dict[str, Any]
    tune: tuple[str, tuple[float, ...]] | None = None
    floor: bool = False
    is_floor: bool = False
    own: methods.Own = methods.NONE  # objects among its changes, or of all rows


@dataclass(frozen=True)
class Plan:
    """What is compared. The first row is the baseline."""

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
        return cls.found(file, *configuration.execute(file), only)

    @classmethod
    def found(cls, file: str, base: Any, found: dict[str, Any], only: str) -> "Plan":
        """Of what is in such a file."""
        if missing := {"ROWS", "SEEDS"} - found.keys():
            raise UsageError(f"--config={file} has no {', '.join(sorted(missing))}: see configs/compare/quickstart.py")
        return cls.of(base, found["ROWS"], found["SEEDS"], only)

    @classmethod
    def of(
        cls,
        base: Any,
        rows: Iterable[dict[str, Any]],
        seeds: Iterable[int],
        only: str = "",
        own: methods.Own = methods.NONE,
    ) -> "Plan":
        """own: objects of all rows. Raises UsageError for a row or a number of seeds that cannot be compared; checks
        every row."""
        seeds, found = tuple(seeds), []
        if len(set(seeds)) < max(3, len(seeds)):
            raise UsageError(f"SEEDS={seeds}: an interval needs 3 seeds or more, all different")
        for row in rows:
            if not isinstance(row, dict) or not {"name", "changes"} <= row.keys() <= KEYS:
                raise UsageError(f"row {row!r}: expected a dictionary with name, changes and perhaps tune and floor")
            changes, objects = methods.apart(row["changes"], own)
            kept: dict[str, Any] = row | {"changes": changes, "own": objects}
            found.append(Row(**kept))
        if not found:
            raise UsageError("ROWS is empty: the first row is the baseline, the others are compared with it")
        plan = cls(base, found, seeds)
        for row in plan.rows:
            plan.check(row)
        first = plan.rows[0]
        moved = lambda row: replace(row, name=f"{row.name}, weights moved by {PERTURBATION:g}", is_floor=True)
        found = [[row, moved(row)] if row.floor or row is first else [row] for row in plan.rows]
        return replace(plan, rows=[row for rows in found for row in rows if only in row.name or row is first])

    def check(self, row: Row) -> None:
        if row.tune and len(row.tune[1]) > 3:
            raise UsageError(f"row {row.name!r}: {len(row.tune[1])} candidates; every row has at most 3")
        candidates = [({row.tune[0]: value}, self.third) for value in row.tune[1]] if row.tune else []
        for more, steps in [({}, self.steps), *candidates]:
            config = self.config(row, steps, more)
            if config.sync.strategy in methods.OUTSIDE:
                raise UsageError(
                    f"row {row.name!r} sets sync.strategy={config.sync.strategy}: it trains with others, at a speed of "
                    "its own. Rows of islands are compared on a simulated clock: see configs/compare/asynchronous.py"
                )
            methods.validate(config, row.own)
            if row.own.task:
                methods.check_unread(row.own.task, row.changes | more)
            if config.init.workdir:
                raise UsageError(f"row {row.name!r} sets init.workdir: a comparison draws its weights by seed")

    def config(self, row: Row, steps: int, more: dict[str, Any] | None = None) -> Any:
        """The training run of a row, of so many steps. more: {key: value}, of a candidate."""
        config = self.base.copy_and_resolve_references()
        changes = row.changes | (more or {}) | {"steps": steps}
        config.update_from_flattened_dict(configuration.converted(changes, f"row {row.name!r} sets"))
        return config

    def jobs(self) -> list[list[Job]]:
        """The runs of each row."""
        warm = {self.config(row, self.steps).sync.warm_steps for row in self.rows} - {0}
        borders = frozenset(warm)
        return [
            [Job(row.name, self.config(row, self.steps), seed, row.is_floor, borders, row.own) for seed in self.seeds]
            for row in self.rows
        ]

    def about(self) -> dict[str, Any]:
        rows, task = self.steps * self.base.data.batch_size, self.rows[0].own.task
        read = {task.unit: rows * task.units} if task else {"tokens": rows * self.base.data.seq_len}
        return {"seeds": len(self.seeds), "steps": self.steps, "replicas": self.base.sync.replicas} | read


def run(
    plan: Plan, workdir: Path, devices: Sequence[Any] = (), processes: int = 1, simulate: int = 0
) -> dict[str, Any]:
    """Trains what is not in the workdir yet, and keeps the table of what is there after each row: the table.

    processes: on so many cores at once, a row in each; each simulates so many devices."""
    jobs, found = plan.jobs(), {}
    runner = Runner(workdir, [job for row in jobs for job in row], devices)
    about = plan.about() | {"environment": software(agree.code_facts())}
    for _ in _trained(runner, jobs, processes, simulate):
        there = [row for row in jobs if all(runner.file(job).exists() for job in row)]
        if jobs[0] in there:
            found = table.tabulate([summary(runner, row) for row in there], about)
            table.write(found, workdir)
            report.write([workdir], workdir / report.PAGE)
    return found


def _trained(runner: Runner, jobs: list[list[Job]], processes: int, simulate: int) -> Iterator[None]:
    """Comes back after each row. Rows with warm steps are last: they begin with the baseline's state."""
    if processes == 1:
        for row in jobs:
            runner.train(row)
            yield
        return
    spawn = multiprocessing.get_context("spawn")  # JAX has threads, which a fork would not have
    with ProcessPoolExecutor(processes, spawn, one_core, (spawn.Value("i", 0), simulate)) as pool:
        for warm in (False, True):
            rows = [row for row in jobs if bool(row[0].config.sync.warm_steps) == warm]
            for done in as_completed([pool.submit(runner.train, row) for row in rows]):
                done.result()
                yield


def summary(runner: Runner, row: list[Job]) -> dict[str, Any]:
    runs = [runner.result(job) for job in row]
    keys = ("wire_bytes_per_step", "wire_bytes_from", "method", "parameters", "steps")
    return {
        "name": row[0].name,
        "floor": row[0].floor,
        "config": dict(configuration.flatten(row[0].config)),
        "eval_losses": [run["eval_loss"] for run in runs],
        "final_losses": [run["final_loss"] for run in runs],
        **{key: [run[key] for run in runs] for key in PER_SEED},
        **{key: runs[0][key] for key in keys},
    }


# ── the rates ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Tried(NamedTuple):
    """What became of the candidates of a row. edge: the best one is the first or the last of several."""

    name: str
    key: str
    losses: dict[float, float]

    @property
    def best(self) -> float:
        return min(self.losses, key=lambda value: self.losses[value] if math.isfinite(self.losses[value]) else np.inf)

    @property
    def edge(self) -> bool:
        return len(self.losses) > 1 and self.best in (min(self.losses), max(self.losses))

    def __str__(self) -> str:
        said = ", ".join(f"{value:g}: {loss:.4f}" for value, loss in self.losses.items())
        edge = ", at the edge: try more" if self.edge else ""
        return f"{self.name} | {self.key} | {said} | best {self.best:g}{edge}"


def search(
    plan: Plan, workdir: Path, devices: Sequence[Any] = (), processes: int = 1, simulate: int = 0
) -> list[Tried]:
    """Trains every row that has `tune` with each of its candidates: a third of the length, the first seed. processes,
    simulate: as in `run`."""
    tuned = [(row, *row.tune) for row in plan.rows if row.tune and not row.is_floor]
    if not tuned:
        raise UsageError("no row has `tune`, a key and the values to try: see configs/compare/quickstart.py")
    jobs = {
        (row.name, value): Job(
            f"{row.name}, {key}={value:g}", plan.config(row, plan.third, {key: value}), plan.seeds[0], own=row.own
        )
        for row, key, values in tuned
        for value in values
    }
    runner = Runner(workdir, list(jobs.values()), devices)
    for _ in _trained(runner, [[job] for job in jobs.values()], processes, simulate):
        pass
    loss = lambda row, value: runner.result(jobs[row.name, value])["final_loss"]
    return [Tried(row.name, key, {value: loss(row, value) for value in values}) for row, key, values in tuned]

"""A comparison (compare.py) whose rows are islands of the laboratory: schemes that differ in who waits for whom, and in
what is done with a push. Its config file has SITES, and get_config() says what an island trains.

SITES: {name: [what pace.Site takes, of each island]}. ROWS: dictionaries with name, changes, perhaps sites (the name of
some; else the first), tune, and region (what regions.Region takes). changes: keys of the config. SECONDS: of the
laboratory's clock. TUNING_SEED: of the candidates' runs.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from islands import compared, decode, terms
from islands.laboratory import Measured, Round, Scheme, Task, play
from islands.language import Language, Programs
from islands.merge import RULES
from islands.pace import Site
from islands.regions import Region, Regional
from recipes import methods
from recipes.compare import Tried
from recipes.runner import one_core
from runtime import config as configuration
from runtime.config import UsageError
from runtime.metrics import write_json

NAMES = ("ROWS", "SEEDS", "SITES", "SECONDS", "TUNING_SEED")  # in a config file
KEYS = {"name", "changes", "sites", "tune", "region"}  # of a row
KIND = 1  # of result files: those with another number are not read


@dataclass(frozen=True)
class Job:
    """A run: of a row with a seed, or of a candidate."""

    name: str
    config: Any  # what an island trains
    scheme: Scheme
    sites: tuple[Site, ...]
    seconds: float
    seed: int
    region: Region | None = None  # of each island

    def file(self, workdir: Path) -> Path:
        """Named by all that was run: another config, another file."""
        described = [self.config.to_json(sort_keys=True), *map(repr, (self.scheme, self.sites, self.seconds))]
        described += [repr(self.region)] if self.region else []
        digest = hashlib.sha256(json.dumps([*described, self.seed, KIND]).encode()).hexdigest()[:16]
        return workdir / "results" / f"{digest}.json"

    def result(self, workdir: Path) -> Measured:
        """JSON has no NaN: a loss that is not a number is null there."""
        found = json.loads(self.file(workdir).read_text())
        losses = [math.nan if loss is None else loss for loss in found["losses"]]
        return Measured(**found | {"losses": losses, "rounds": [Round(*each) for each in found["rounds"]]})


@dataclass(frozen=True)
class Row:
    name: str
    sites: str
    jobs: tuple[Job, ...]  # one of each seed
    candidates: dict[float, Job]
    key: str  # whose values these are


# ── what is compared ─────────────────────────────────────────────────────────────────────────────────────────────


def found(file: str, base: Any, names: dict[str, Any], only: str = "") -> list[Row]:
    """Of a config file and the names in it. The first row of each sites is its baseline, and always there. Raises
    UsageError."""
    if missing := [name for name in NAMES if name not in names]:
        raise UsageError(f"--config={file} has no {', '.join(missing)}: see configs/compare/asynchronous.py")
    if len(set(names["SEEDS"])) < max(3, len(names["SEEDS"])):
        raise UsageError(f"SEEDS={names['SEEDS']}: an interval needs 3 seeds or more, all different")
    try:
        sites = {name: tuple(Site(**each) for each in given) for name, given in names["SITES"].items()}
    except (TypeError, ValueError) as error:
        raise UsageError(f"SITES: {error}; islands/pace.py says what a site has") from error
    rows = [_row(row, base, sites, names) for row in names["ROWS"]]
    if not rows:
        raise UsageError("ROWS is empty: the first row of each sites is the baseline, the others are compared with it")
    first = {row.sites: row for row in reversed(rows)}
    return [row for row in rows if only in f"{row.name}, {row.sites}" or row is first[row.sites]]


def _row(given: Any, base: Any, sites: dict[str, tuple[Site, ...]], names: dict[str, Any]) -> Row:
    if not isinstance(given, dict) or not {"name", "changes"} <= given.keys() <= KEYS:
        raise UsageError(f"row {given!r}: expected a dictionary with name, changes and perhaps sites, tune and region")
    name, where = given["name"], given.get("sites", next(iter(sites)))
    if where not in sites:
        raise UsageError(f"row {name!r}: sites={where!r} is none of {', '.join(sites)}")
    key, values = given.get("tune") or ("", ())
    try:
        region = Region(**given["region"]) if "region" in given else None
    except (TypeError, ValueError) as error:
        raise UsageError(f"row {name!r}: region: {error}; islands/regions.py says what a region has") from error

    def job(seed: int, **more: Any) -> Job:
        config, scheme = described(base, given["changes"] | more, f"row {name!r} sets")
        label = ", ".join([name, where, *(f"{key}={value:g}" for key, value in more.items())])
        return Job(label, config, scheme, sites[where], float(names["SECONDS"]), seed, region)

    candidates = {value: job(names["TUNING_SEED"], **{key: value}) for value in values}
    return Row(name, where, tuple(job(seed) for seed in names["SEEDS"]), candidates, key)


def described(base: Any, changes: dict[str, Any], what: str) -> tuple[Any, Scheme]:
    """(what an island trains, how) of a config with these changes. Raises UsageError."""
    config = base.copy_and_resolve_references()
    config.update_from_flattened_dict(configuration.converted(changes, what))
    try:
        if config.island.merge not in RULES:
            raise ValueError(f"island.merge={config.island.merge}: expected one of {', '.join(RULES)}")
        found = terms.of(terms.agreed(dict(configuration.flatten(config))))
        codec = None if config.sync.codec == "none" else decode.build(config.sync.codec)
    except ValueError as error:
        raise UsageError(f"{what} what cannot be: {error}") from error
    scheme = Scheme(found.rule, found.interval, found.staleness, found.dylu, codec)
    defaults = configuration.nested(configuration.base_values())
    config.sync, config.island = defaults.sync, defaults.island
    config.sync.replicas = 1  # by itself an island is a run with one replica
    methods.validate(config)
    return config, scheme


def main(rows: list[Row], workdir: Path, tune: bool, processes: int) -> int:
    """What compare.py does with such a config: trains what is not there yet, and keeps table and plots of what is."""
    if tune:
        return _tune(rows, workdir, processes)
    text, firsts = "", {row.sites: row for row in reversed(rows)}
    for _ in itertools.chain([None], train([row.jobs for row in rows], workdir, processes)):
        done = [row for row in rows if all(job.file(workdir).exists() for job in row.jobs)]
        shown = [row for row in done if firsts[row.sites] in done]
        found = [
            compared.Found(row.name, row.sites, len(row.jobs[0].sites), [job.result(workdir) for job in row.jobs])
            for row in shown
        ]
        text = compared.write(found, workdir) if found else ""
    print(f"\n{text}\n\nin {workdir}: table.md, table.csv, table.json, plots/")
    return 0


def _tune(rows: list[Row], workdir: Path, processes: int) -> int:
    """Each candidate once, by the loss at the end. A line for each row, as compare.py has them."""
    rows = [row for row in rows if row.candidates]
    if not rows:
        raise UsageError("no row has `tune`, a key and the values to try: see configs/compare/asynchronous.py")
    for _ in train([[job] for row in rows for job in row.candidates.values()], workdir, processes):
        pass
    for row in rows:
        print(Tried(row.name, row.key, {value: job.result(workdir).loss for value, job in row.candidates.items()}))
    return 0


# ── the runs ─────────────────────────────────────────────────────────────────────────────────────────────────────


def train(jobs: Sequence[Sequence[Job]], workdir: Path, processes: int = 1) -> Iterator[None]:
    """Trains what is not in the workdir yet; comes back after each list of which something was missing. processes: so
    many lists at once, each on a core of its own."""
    jobs = [some for some in jobs if not all(job.file(workdir).exists() for job in some)]
    if processes == 1:
        for some in jobs:
            _train(some, workdir)
            yield
        return
    spawn = multiprocessing.get_context("spawn")  # JAX has threads, which a fork would not have
    with ProcessPoolExecutor(processes, spawn, one_core, (spawn.Value("i", 0), 0)) as pool:
        for done in as_completed([pool.submit(_train, some, workdir) for some in jobs]):
            done.result()
            yield


def _train(jobs: Sequence[Job], workdir: Path) -> None:
    for job in jobs:
        if job.file(workdir).exists():
            continue
        began = time.time()
        task: Task = Language(_programs(job.config.to_json(sort_keys=True)), job.seed)
        task = Regional(task, job.region) if job.region else task
        found = play(task, job.sites, job.scheme, job.seconds, job.seed)
        measured = {field.name: getattr(found, field.name) for field in dataclasses.fields(Measured)}
        write_json(job.file(workdir), measured)
        print(
            f"{job.name} | seed {job.seed} | {found.steps:,} steps in {time.time() - began:.0f} s | "
            f"loss {found.loss:.4f}",
            flush=True,
        )


@functools.lru_cache(1)
def _programs(text: str) -> Programs:
    """Shared by all runs that train the same."""
    return Programs(configuration.nested(dict(configuration.flatten(json.loads(text)))))

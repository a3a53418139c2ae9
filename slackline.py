"""Slackline from Python, for notebooks and scripts: the loop, the checks and the messages of the command line.

    import slackline as sl
    run = sl.fit("quickstart", steps=200, simulate=8, mesh={"replica": 4, "fsdp": 2}, sync={"strategy": "diloco"})
    run.losses, run.wire_bytes, run.sample("def "), run.plot()

docs/python.md shows all of it. Everywhere, `config` is the name of one in configs/, the path of a config file, or a
ConfigDict; `simulate` asks for so many simulated CPU devices; and `changes` are keys of the config: a dictionary
changes keys of its group, and `**{"optimizer.lr": 1e-3}` one by its dotted name. Objects stand where a config has
names: `sync.codec` a codec, `sync.strategy` a class, `optimizer` a transformation of optax; and `task` is a model, a
loss and data of one's own. What is wrong is a UsageError.
"""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recipes import begin, describe, door, finish, memory, once, parameters, programs, table
from recipes import build as recipe
from recipes import compare as comparing
from recipes import fit as loop
from recipes.task import Task
from recipes.trained import Picture, Trained
from runtime import agree, lock
from runtime import config as configuration
from runtime.config import RunError, UsageError, bad_input
from runtime.console import Console, plain_table
from runtime.progress import Phases
from runtime.workdir import default_name

__all__ = ["Picture", "RunError", "Task", "Trained", "UsageError", "build", "compare", "fit", "open", "steps"]


def fit(
    config: Any,
    *,
    simulate: int | None = None,
    workdir: str | Path | None = None,
    task: Task | None = None,
    optimizer: Any = None,
    **changes: Any,
) -> Trained:
    """Trains, as `python train.py` does, and returns the run. Ctrl-C ends it after the call under way, saved.

    workdir: where the run lives; it goes on there if it has begun, to the same bits as without a stop.
    task: what is trained in place of a language model. optimizer: a transformation of optax, or keys of the group.
    Raises RunError where training cannot go on.
    """
    phases, given = Phases(time.time()), door.folder(workdir)
    asked = door.configure(config, changes | {"task": task, "optimizer": optimizer}, given)
    where = given or default_name(asked.name, asked.config)
    mesh = door.mesh_of(asked.config, simulate)
    console = phases.console = begin.make_console(asked.name, where, asked.config, simulate, asked.notes)
    parts, notice = recipe.build(asked.config, mesh, asked.own), door.Interrupt()
    try:
        opened = begin.open_workdir(asked.config, where, True, console)
        door.tell_changed(opened, asked.own, console)
        limit, facts = memory.of_device(), agree.code_facts()
        with contextlib.closing(notice), memory.explained(asked.config, parts, console):
            run, state = begin.begin(asked.config, parts, opened, console, phases, facts, limit)
            outcome = loop.train(run, state, notice)
        if outcome.interrupted:
            console.say(f"stopped by Ctrl-C after step {outcome.step}, saved; the same call with its workdir goes on")
        else:
            finish.finish(run, outcome.state, outcome.evaluated)
    finally:
        phases.close()
        lock.release()
    return Trained(
        config=asked.config,
        parts=parts,
        params=run.whole(outcome.state),
        tokenizer=run.data.tokenizer,
        workdir=opened.path,
        step=outcome.step,
        state=outcome.state,
        losses=np.array(run.recorder.losses, np.float32),
        wire_bytes=run.recorder.wire_bytes,
        interrupted=outcome.interrupted,
    )


def open(workdir: str | Path, *, simulate: int | None = None, **changes: Any) -> Trained:
    """The newest parameters of a run, its model and its tokenizer, whether it has ended or not: on one device, or on
    the mesh that `changes` say.

    Raises UsageError for a folder that holds no run, or one without a checkpoint.
    """
    path = Path(door.folder(workdir) or "")
    if not (path / "config.json").is_file():
        raise UsageError(f"workdir={path}: there is no config.json of a run in this folder")
    asked = door.configure(door.alone(configuration.read_json(path)), changes)
    config, own = asked.config, asked.own
    door.check_given(path, own, ("task",))
    parts = recipe.build(config, door.mesh_of(config, simulate), own)
    given = parameters.read(path, parts.task.axes, parts.state.params, print)
    tokenizer = None if own.task else door.tokenizer_of(path, config.data)
    if given.step < config.steps:
        print(f"{path} has made {given.step} of its {config.steps} steps")
    return Trained(config=config, parts=parts, params=given.params, tokenizer=tokenizer, workdir=path, step=given.step)


class Built:
    """The parts of a run, of which nothing is allocated. `parts` is what recipes/build.py makes."""

    def __init__(self, name: str, config: Any, parts: recipe.Parts):
        self.name, self.config, self.parts = name, config, parts
        self._once = once.Once(parts, config.seed)

    def table(self) -> str:
        """Compiles every program and says what they need, as a dry run does."""
        with memory.explained(self.config, self.parts, Console(1, 1, quiet=True)):
            found, others = describe.compile_all(self.config, self.parts)
        rows, *_ = describe.read(self.config, self.parts, found, others, {})
        return door.Text(plain_table(self.name, [*rows, *describe.rows_beside(others)]))

    def gradients(self, params: Any = None, step: int = 0) -> Any:
        """Each replica's gradient [R, …] of its mean loss over its rows of the batch of a step. params: of a state on
        this mesh; None: those that the seed gives."""
        return self._once.gradients(self.loader(), params, step)

    def loader(self) -> Any:
        """Reads the data: rows(step, which) of training batches."""
        with bad_input():
            data = self.parts.task.read(self.config)
        return data.loader(self.config.seed, self.config.data.batch_size)

    def exchange(self, tree_R: Any, memory: Any = None, step: int = 0) -> tuple[Any, Any]:
        """(the mean of a tree [R, …] like the parameters, by way of the codec; what the exchange remembers: what is
        owed, and a codec's own state). memory: what it remembered before. step: of codecs that draw."""
        return self._once.mean(tree_R, memory, step)

    @property
    def exchange_bytes(self) -> float:
        """That a device sends over `replica` in one exchange, in closed form."""
        return self._once.bytes


class Compared:
    """A comparison: its table, whose rows are `rows`; the files are in `workdir`."""

    def __init__(self, found: dict[str, Any], workdir: Path):
        self.rows, self.about, self.workdir, self._text = found["rows"], found["about"], workdir, table.markdown(found)

    def __repr__(self) -> str:
        return self._text

    def _repr_markdown_(self) -> str:
        return self._text


def build(config: Any, *, simulate: int | None = None, **changes: Any) -> Built:
    """What a config describes, on its mesh: model, optimizer, strategy, the shapes and shardings of its state."""
    asked = door.configure(config, changes)
    parts = recipe.build(asked.config, door.mesh_of(asked.config, simulate), asked.own)
    return Built(asked.name, asked.config, parts)


def steps(config: Any, *, simulate: int | None = None, **changes: Any) -> loop.Steps:
    """A loop of one's own: iterating makes the updates and gives (state, metrics [K]) after each call; nothing is
    saved or shown. `.state` may be set between two calls; a state is valid until the next one takes it over.
    """
    found = build(config, simulate=simulate, **changes)
    config, parts = found.config, found.parts
    with memory.explained(config, parts, Console(1, 1, quiet=True)):
        frozen = parameters.read_base(parts, Path(config.init.workdir), print, {})[0] if parts.frozen else ()
        state, compiled = programs.compile_init(parts)(np.uint32(config.seed)), programs.compile_steps(parts)
    return loop.Steps(parts, compiled, state, found.loader(), 0, config.steps, frozen)


def compare(
    config: Any,
    *,
    rows: Sequence[dict[str, Any]] | None = None,
    seeds: Sequence[int] | None = None,
    simulate: int | None = None,
    workdir: str | Path | None = None,
    **changes: Any,
) -> Compared:
    """Trains every row with every seed, as `python compare.py` does, and returns the table. What is in the workdir
    already, by default runs/compare-<config>, is not trained again.

    config: as everywhere; of a file with ROWS and SEEDS these are the defaults. rows: dictionaries with `name`,
    `changes` ({key: value}, values also objects) and perhaps `floor` (recipes/compare.py); the first one is the
    baseline. seeds: at least 3.
    """
    asked = door.configure(config, changes)
    given = {"ROWS": rows, "SEEDS": seeds}
    found = {name: asked.file.get(name, ()) if x is None else x for name, x in given.items()}
    plan = comparing.Plan.of(asked.config, found["ROWS"], found["SEEDS"], own=asked.own)
    devices = door.devices(simulate, asked.config.sync.replicas)
    folder = Path(door.folder(workdir) or f"runs/compare-{asked.name}")
    try:
        lock.hold(folder)
        return Compared(comparing.run(plan, folder, devices), folder)
    finally:
        lock.release()

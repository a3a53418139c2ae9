"""The loop that trains: one for train.py, for compare.py and for whoever calls it from Python."""

import contextlib
import functools
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from data.loader import Batches
from parallel.layout import placement
from recipes import phases
from recipes.build import Parts, Phase
from recipes.programs import NOT_EVALUATED, Evaluation, Evaluator, Later, rows_of_evaluation, sample_text
from recipes.task import Data, Trainable
from runtime.config import RunError
from runtime.console import Console
from runtime.metrics import replace_file
from runtime.progress import Phases, Profiler, Recorder
from runtime.workdir import Workdir


def make_evaluator(config: Any, parts: Parts, data: Data, program: Callable[[], Any], whole: bool = False) -> Evaluator:
    """params -> Evaluation of `eval_batches` of what is held out, or of the whole. program: gives the compiled one."""
    count = None if whole else config.eval_batches
    batches = data.eval_batches(rows_of_evaluation(parts), config.data.batch_size, count)
    return Evaluator(parts, batches, data.num_bytes(batches), program)


def num_units(config: Any, task: Trainable) -> int:
    """Tokens or examples that a run of full length trains on."""
    return config.steps * config.data.batch_size * task.units


def due(done: int, every: int, last: int) -> bool:
    """Whether what is done every so many updates (0: never) and after the last one is to be done now."""
    return done == last or bool(every and done % every == 0)


class Steps:
    """Makes the updates after `start` up to `last`, one call of a program at a time: iterating gives (state, metrics
    [K]) after each call. `state` may be set between two calls: the next one begins with it, and takes it over. frozen:
    weights beside the state, as `parts.frozen` says."""

    def __init__(
        self,
        parts: Parts,
        programs: dict[str, Any],
        state: Any,
        loader: Batches,
        start: int,
        last: int,
        frozen: tuple[Any, ...] = (),
    ):
        self.parts, self.programs, self.state, self.loader, self.frozen = parts, programs, state, loader, frozen
        self.done, self.last = start, last  # updates made
        self.units = 0  # tokens or examples that the last call has read
        self.before: Callable[[int, Any, int], None] | None = None  # of each call: updates made, state, K

    def __iter__(self) -> Generator[tuple[Any, dict[str, jax.Array]], None, None]:
        for i, (phase, last) in enumerate(phases.spans(self.parts, self.done, self.last)):
            if i:
                self.state = phases.cross(self.parts, phase, self.state)
            yield from self._phase(phase, last)

    def _phase(self, phase: Phase, last: int) -> Generator[tuple[Any, dict[str, jax.Array]], None, None]:
        parts, strategy, K = self.parts, phase.strategy, phase.strategy.steps_per_call
        place = functools.partial(placement.place_train, parts.mesh, parts.replicas, self.loader.batch_size)
        for batch in self.loader.batches(self.done, last, place, K):
            if self.before:
                self.before(self.done, self.state, K)
            program = self.programs[phase.prefix + strategy.program_at(self.done, last)]
            with jax.transfer_guard("disallow"):
                self.state, metrics = program(self.state, batch, *self.frozen)
            self.done += K
            self.units = K * self.loader.batch_size * parts.task.units
            yield self.state, metrics


@dataclass(frozen=True)
class Run:
    """A run that has begun: what its loop and its end need."""

    config: Any
    parts: Parts
    programs: dict[str, Any]
    beside: Later
    frozen: tuple[Any, ...]  # weights beside the state
    data: Data
    loader: Batches
    prompt_P: np.ndarray | None  # of the sample; None: there is none
    workdir: Workdir
    checkpoints: Any
    start: int | None  # the step of the checkpoint that it goes on from; None: it begins
    recorder: Recorder
    console: Console
    phases: Phases
    facts: dict[str, Any]  # of code and versions, kept in each checkpoint
    island: Any = None  # recipes/island.py: between the rounds of an island

    def about(self) -> dict[str, Any]:
        """What a checkpoint keeps beside the state."""
        return self.facts | self.recorder.counted() | (self.island.facts() if self.island else {})

    def whole(self, state: Any) -> Any:
        """What is evaluated of a state."""
        return self.parts.task.whole(state.params, state.fixed, *self.frozen)


@dataclass(frozen=True)
class Outcome:
    state: Any
    step: int
    interrupted: bool
    evaluated: Evaluation


def train(run: Run, state: Any, notice: Any) -> Outcome:
    """Trains to the last step, or to where the notice (as in runtime/preemption.py) says, and closes what it has
    written to."""
    with contextlib.closing(run.recorder):
        outcome = _train(run, state, notice)
        if not outcome.interrupted:
            run.recorder.finish()
    run.checkpoints.close()
    if run.island:
        run.island.end(outcome.interrupted)
    return outcome


def sample(run: Run, whole: Any) -> str:
    """Text that the model writes. Called by every process: the parameters stay in their shards."""
    assert run.prompt_P is not None
    seq_len, seed, tokenizer = run.config.data.seq_len, run.config.seed, run.data.tokenizer
    return sample_text(run.beside["sample"], whole, run.prompt_P, seq_len, seed, tokenizer)


def _keep_sample(run: Run, whole: Any, done: int) -> None:
    """samples/N.txt, of the model after N updates."""
    try:
        text = sample(run, whole)
        if run.workdir.leader:
            replace_file(run.workdir.path / "samples" / f"{done}.txt", (text + "\n").encode("utf-8", "replace"))
    except Exception as error:  # of whatever type, as at the end: a sample is no reason to end a run
        run.console.warn(f"no sample at step {done}: {type(error).__name__}: {error}")


def _before(run: Run, profiler: Profiler, borders: list[int]) -> Callable[[int, Any, int], None]:
    """Hears of each call before it is made: updates made, state, K."""

    def hear(done: int, state: Any, K: int) -> None:
        if done in borders:
            run.console.say(f"{run.config.sync.strategy} {run.config.sync.codec} begins, after step {done}")
            run.recorder.resume_clock()  # what it took to get there is not step time
        profiler.before(done, state, K)

    return hear


def _train(run: Run, state: Any, notice: Any) -> Outcome:
    """Evaluates and saves where it is due. A checkpoint's number is the updates that it contains."""
    config, recorder, checkpoints, done = run.config, run.recorder, run.checkpoints, run.start or 0
    notice.training_begins(done)
    evaluate = make_evaluator(config, run.parts, run.data, lambda: run.beside["evaluation"])
    profiler = Profiler(config.profile.steps, run.workdir.path)
    if run.start is None and config.checkpoint.every:
        checkpoints.save(0, state, None, run.about())
    evaluated, stopping = NOT_EVALUATED, False
    recorder.resume_clock()
    updates = Steps(run.parts, run.programs, state, run.loader, done, config.steps, run.frozen)
    borders = [phase.first for phase in run.parts.phases[1:]]
    updates.before = _before(run, profiler, borders)
    calls = iter(updates)
    for state, metrics in calls:
        done = updates.done
        recorder.step(done, metrics, updates.units)  # reads the step before: the device never waits for the host
        if done in borders:
            recorder.flush()
        if "first step" not in run.phases.seconds:
            recorder.flush()
            run.phases.mark("first step")
            run.beside.start()
        if run.island:
            updates.state = state = run.island.after(done, state)
        last, stopping = done == config.steps, notice.requested(done)
        evaluating = due(done, config.eval_every, config.steps)
        saving = stopping or due(done, config.checkpoint.every, config.steps)
        sampling = run.prompt_P is not None and not last and due(done, config.sample.every, config.steps)
        if evaluating or saving or sampling:
            recorder.flush()
            run.console.doing(f"evaluating, sampling or saving at step {done}")
            if last:  # what is trained is on the disk before anything runs that can fail: evaluation, sample
                checkpoints.save(done, state, None, run.about())
                checkpoints.finish()
            if evaluating:
                evaluated = evaluate(run.whole(state))
                recorder.evaluation(done, evaluated.values())
            if saving and not last:
                checkpoints.save(done, state, evaluated.loss if evaluating else None, run.about())
            if sampling:
                _keep_sample(run, run.whole(state), done)
            run.console.doing("")
            recorder.resume_clock()
        if checkpoints.poll():
            run.workdir.note_commit()
        if stopping:
            calls.close()
    profiler.stop(state)
    recorder.flush()
    run.console.doing("waiting for the checkpoint to be on the disk")
    if done not in checkpoints.finish():
        raise RunError(f"step {done} is not among the checkpoints in {checkpoints.directory}, so it was not saved")
    run.workdir.note_commit()
    run.console.doing("evaluating")
    if run.start == config.steps:  # the run was complete already
        evaluated = evaluate(run.whole(state))
    return Outcome(state, done, stopping and done < config.steps, evaluated)

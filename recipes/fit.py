"""The loop that trains: one for train.py, for compare.py and for whoever calls it from Python."""

import functools
import gc
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import jax

from data.corpus import Corpus
from data.loader import Loader, eval_batches
from parallel.layout import mesh as meshes
from parallel.layout import placement
from recipes.build import Parts
from recipes.programs import NOT_EVALUATED, Evaluation, Evaluator, Later
from runtime.config import RunError
from runtime.console import Console
from runtime.preemption import PreemptionNotice
from runtime.progress import Phases, Profiler, Recorder
from runtime.workdir import Workdir


def batch_shape(config: Any, corpus: Corpus) -> dict[str, Any]:
    """What a batch is: its sizes, and how its documents end."""
    names = ("seq_len", "batch_size", "document_mask")
    return {name: config.data[name] for name in names} | {"eos": corpus.tokenizer.eos}


def make_loader(config: Any, corpus: Corpus, seed: int) -> Loader:
    return Loader(corpus.train_N, seed=seed, **batch_shape(config, corpus))


def make_evaluator(config: Any, parts: Parts, corpus: Corpus, program: Callable[[], Any]) -> Evaluator:
    """params -> Evaluation of the held-out text. program: gives the compiled evaluation."""
    batches = eval_batches(corpus.eval_N, **batch_shape(config, corpus), num_batches=config.eval_batches)
    return Evaluator(parts, batches, corpus.token_bytes(), program)


def num_tokens(config: Any) -> int:
    """That a run of full length trains on."""
    return config.steps * config.data.batch_size * config.data.seq_len


def due(done: int, every: int, last: int) -> bool:
    """Whether what is done every so many updates (0: never) and after the last one is to be done now."""
    return done == last or bool(every and done % every == 0)


def do_nothing(done: int, state: Any, steps_per_call: int) -> None:
    pass


def steps(
    parts: Parts,
    programs: dict[str, Any],
    state: Any,
    loader: Loader,
    start: int,
    last: int,
    recorder: Recorder,
    before: Callable[[int, Any, int], None] = do_nothing,
) -> Generator[tuple[int, Any], None, None]:
    """Makes the updates after `start` up to `last`, one call of a program at a time: (updates made, state) after each.

    The state before a call is donated to it. before(updates made, state, updates of a call) runs before each call.
    Raises RunError where the recorder finds that too many updates in a row were refused.
    """
    strategy, K = parts.strategy, parts.strategy.steps_per_call
    place = functools.partial(placement.place_train, parts.mesh, parts.replicas, loader.batch_size)
    done = start
    for batch in loader.batches(start, last, place, K):
        before(done, state, K)
        program = programs[strategy.program_at(done, last)]
        with jax.transfer_guard("disallow"):
            state, metrics = program(state, batch)
        done += K
        recorder.step(done, metrics, batch["tokens"].size)  # reads the step before: the device never waits for the host
        yield done, state


@dataclass(frozen=True)
class Run:
    """What the loop and the end of a run share."""

    config: Any
    parts: Parts
    beside: Later
    corpus: Corpus
    workdir: Workdir
    checkpoints: Any
    recorder: Recorder
    console: Console
    phases: Phases
    facts: dict[str, Any]  # of code and versions, kept in each checkpoint


@dataclass(frozen=True)
class Outcome:
    state: Any
    step: int
    interrupted: bool
    evaluated: Evaluation


def train(
    run: Run, programs: dict[str, Any], state: Any, start: int | None, loader: Loader, notice: PreemptionNotice
) -> Outcome:
    """Trains to the last step, or to where the notice says; evaluates and saves. A checkpoint's number is the updates
    that it contains. start: the step of the checkpoint that the state is from, None if it is a fresh one."""
    notice.training_begins(start or 0)
    meshes.keep_freed_memory()
    gc.freeze()  # what the start has made stays
    gc.enable()
    config, recorder, checkpoints = run.config, run.recorder, run.checkpoints
    evaluate = make_evaluator(config, run.parts, run.corpus, lambda: run.beside["evaluation"])
    profiler = Profiler(config.profile.steps, run.workdir.path)
    if start is None and config.checkpoint.every:
        checkpoints.save(0, state, None, run.facts | recorder.counted())
    done, evaluated, stopping = start or 0, NOT_EVALUATED, False
    recorder.resume_clock()
    updates = steps(run.parts, programs, state, loader, done, config.steps, recorder, profiler.before)
    for done, state in updates:
        if "first step" not in run.phases.seconds:
            recorder.flush()
            run.phases.mark("first step")
            run.beside.start()
        last, stopping = done == config.steps, notice.requested(done)
        evaluating = due(done, config.eval_every, config.steps)
        saving = stopping or due(done, config.checkpoint.every, config.steps)
        if evaluating or saving:
            recorder.flush()
            run.console.doing(f"evaluating or saving at step {done}")
            if last:  # what is trained is on the disk before anything runs that can fail: evaluation, sample
                checkpoints.save(done, state, None, run.facts | recorder.counted())
                checkpoints.finish()
            if evaluating:
                evaluated = evaluate(state.params)
                recorder.evaluation(done, evaluated.loss, evaluated.bits_per_byte)
            if saving and not last:
                facts = run.facts | recorder.counted()
                checkpoints.save(done, state, evaluated.loss if evaluating else None, facts)
            run.console.doing("")
            recorder.resume_clock()
        if checkpoints.poll():
            run.workdir.note_commit()
        if stopping:
            updates.close()
    profiler.stop(state)
    recorder.flush()
    run.console.doing("waiting for the checkpoint to be on the disk")
    if done not in checkpoints.finish():
        raise RunError(f"step {done} is not among the checkpoints in {checkpoints.directory}, so it was not saved")
    run.workdir.note_commit()
    run.console.doing("evaluating")
    if start == config.steps:  # the run was complete already
        evaluated = evaluate(state.params)
    return Outcome(state, done, stopping and done < config.steps, evaluated)

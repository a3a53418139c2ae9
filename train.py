"""Trains a language model on a mesh of devices, across slow links if there are any. Stop it anywhere, start it again.

python train.py --config=configs/quickstart.py --simulate=8 --config.mesh.fsdp=4 --config.mesh.tensor=2
python train.py --workdir=runs/quickstart-20261123-1a2b3c          (goes on with that run)
"""

import gc
import time

STARTED = time.time()  # before the imports: they are a phase of the start, too
if __name__ == "__main__":
    from runtime import early

    early.end_at_ctrl_c()
    gc.disable()  # what imports and tracing make stays: looking through it for garbage takes 0.4 s of a start

import contextlib
import dataclasses
import functools
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data import corpus as corpora
from data.loader import Loader, eval_batches, threads_beside_grain
from parallel.layout import mesh as meshes
from parallel.layout import placement
from recipes import begin as beginning
from recipes import build as assemble
from recipes import finish as ending
from recipes import programs as beside
from runtime import agree, exits, library_log, preemption
from runtime import config as configuration
from runtime.config import RunError, bad_input
from runtime.console import Console
from runtime.metrics import MetricsLog, optional_writers, read
from runtime.preemption import EXIT_CODE, PreemptionNotice
from runtime.progress import Phases, Profiler, Recorder
from runtime.workdir import Workdir, choose


def main(argv: list[str]) -> int:
    phases = Phases(STARTED)

    # ── Config ───────────────────────────────────────────────────────────────────────────────────────────────────
    config, flags = configuration.parse(argv, __doc__ or "")
    configuration.validate(config)

    # ── Devices ──────────────────────────────────────────────────────────────────────────────────────────────────
    with bad_input():
        if flags.simulate:
            meshes.simulate(flags.simulate, flags.num_processes or 1)
        warning = agree.start_distributed(
            flags.coordinator, flags.num_processes, flags.process_id, flags.heartbeat, flags.wait
        )
    library_log.begin()
    notice, facts = preemption.notice(), agree.same_start(config, flags)
    leader = agree.leader()
    console = phases.console = make_console(config, flags, leader, warning)
    with bad_input():
        mesh = meshes.build(meshes.fill_sizes(config.mesh, len(jax.devices())))
    parts = assemble.build(config, mesh)
    assemble.use_compilation_cache(corpora.cache_directory())
    phases.mark("import")

    if flags.dry_run:
        return dry_run(config, flags.config_name, parts, console, phases)

    # ── Workdir ──────────────────────────────────────────────────────────────────────────────────────────────────
    workdir = Workdir(*choose(flags.workdir, flags.config_name, config), leader)
    for change in workdir.open(config, flags.resume):
        console.say(f"config changed since this run began: {change}")
    origin = beginning.origin(config, workdir)

    # ── Compile, while the data is read ──────────────────────────────────────────────────────────────────────────
    background = threads_beside_grain(2)
    compiling = background.submit(assemble.compile_steps, parts)
    initializing = None if workdir.resuming else background.submit(assemble.compile_init, parts, bool(origin))
    corpus, prompt_P = load_data(config, workdir, console, facts, origin)
    loader = Loader(corpus.train_N, seed=config.seed, **batch_shape(config, corpus))
    checkpoints = open_checkpoints(config, parts, workdir, console)
    configuration.check_goal(config.steps, checkpoints.newest())
    phases.mark("data", then="compiling the training step")
    programs = compiling.result()
    phases.mark("compile", then="restoring a checkpoint" if workdir.resuming else "making the weights")

    # ── Restore, or begin ────────────────────────────────────────────────────────────────────────────────────────
    start, begun = None, {}
    if workdir.resuming and workdir.must_restore(checkpoints.steps()):
        state, start = checkpoints.restore(parts.state, console.warn, assemble.adapter(parts, config.seed))
        with bad_input():
            parts.strategy.check_begin(start, config.steps)
        say_resumed(config, workdir, start, console, agree.changed(checkpoints.facts(), facts))
    else:
        init = initializing.result() if initializing else assemble.compile_init(parts, bool(origin))
        state, begun = beginning.first_state(parts, config.seed, origin, init, workdir, console)
    phases.mark("restore", then="making the first step")
    traffic = assemble.traffic(parts, programs) | beside.traffic(parts, {"init": init} if start is None else {})
    wire_bytes = assemble.wire_bytes(parts, traffic, config.steps)
    rows = assemble.describe(parts, programs, traffic, wire_bytes, phases.seconds)
    console.table(f"{workdir.path}", [*corpus.describe(config.steps * num_tokens(config)), *rows])
    assemble.refuse_stray(traffic, config.sync.allow_stray_bytes)

    # ── Train ────────────────────────────────────────────────────────────────────────────────────────────────────
    counted = {} if start is None else checkpoints.facts()
    recorder = make_recorder(config, parts, workdir, console, wire_bytes, start, counted.get("tokens"))
    begin(config, workdir, corpus, start, begun)
    others = beside.Later(parts, config.sample, background, functools.partial(show_beside, config, parts, console))
    this = Run(config, parts, others, corpus, workdir, checkpoints, recorder, console, phases, facts)
    agree.everyone("ready to train")
    with contextlib.closing(recorder):
        outcome = train(this, programs, state, start, loader, notice)
        if not outcome.interrupted:
            recorder.finish()
    checkpoints.close()
    if outcome.interrupted:
        console.say(f"stopped by SIGTERM after step {outcome.step}, saved; the same command goes on from there")
        return EXIT_CODE

    # ── Tell ─────────────────────────────────────────────────────────────────────────────────────────────────────
    return ending.finish(this, outcome.state.params, outcome.evaluated, prompt_P)


def dry_run(config, name: str, parts, console, phases) -> int:
    """Compiles every program of a run and shows what they need."""
    programs, others = assemble.compile_steps(parts), beside.compile_all(parts, config.sample)
    others["init"] = assemble.compile_init(parts, bool(config.init.workdir))
    phases.mark("compile")
    traffic = assemble.traffic(parts, programs) | beside.traffic(parts, others)
    wire_bytes = assemble.wire_bytes(parts, traffic, config.steps)
    rows = assemble.describe(parts, programs, traffic, wire_bytes, phases.seconds)
    console.table(f"{name}, dry run", rows + beside.describe(others))
    assemble.refuse_stray(traffic, config.sync.allow_stray_bytes)
    return 0


@dataclasses.dataclass(frozen=True)
class Run:
    """What the loop and the end of a run share."""

    config: Any
    parts: assemble.Parts
    beside: beside.Later
    corpus: corpora.Corpus
    workdir: Workdir
    checkpoints: Any
    recorder: Recorder
    console: Console
    phases: Phases
    facts: dict[str, Any]  # of code and versions, kept in each checkpoint


@dataclasses.dataclass(frozen=True)
class Outcome:
    state: Any
    step: int
    interrupted: bool
    evaluated: beside.Evaluation


def train(run: Run, programs, state, start: int | None, loader: Loader, notice: PreemptionNotice) -> Outcome:
    """The loop. Updates made so far are counted by `done`; a checkpoint's number is the updates it contains."""
    notice.training_begins(start or 0)
    meshes.keep_freed_memory()
    gc.freeze()  # what the start has made stays
    gc.enable()
    config, recorder, checkpoints = run.config, run.recorder, run.checkpoints
    strategy = run.parts.strategy
    place = functools.partial(placement.place_train, run.parts.mesh, run.parts.replicas, loader.batch_size)
    held_out = eval_batches(run.corpus.eval_N, **batch_shape(config, run.corpus), num_batches=config.eval_batches)
    program = lambda: run.beside["evaluation"]
    evaluate = beside.Evaluator(run.parts, held_out, run.corpus.token_bytes(), program)
    profiler = Profiler(config.profile.steps, run.workdir.path)
    if start is None and config.checkpoint.every:
        checkpoints.save(0, state, None, run.facts | recorder.counted())
    done, evaluated, stopping = start or 0, beside.NOT_EVALUATED, False
    recorder.resume_clock()
    for batch in loader.batches(done, config.steps, place, strategy.steps_per_call):
        profiler.before(done, state, strategy.steps_per_call)
        program = programs[strategy.program_at(done, config.steps)]
        with jax.transfer_guard("disallow"):
            state, metrics = program(state, batch)
        done += strategy.steps_per_call
        recorder.step(done, metrics, batch["tokens"].size)  # reads the step before: the device never waits for the host
        if "first step" not in run.phases.seconds:
            recorder.flush()
            run.phases.mark("first step")
            run.beside.start()
        last, stopping = done == config.steps, notice.requested(done)
        evaluating = last or (config.eval_every and done % config.eval_every == 0)
        saving = last or stopping or (config.checkpoint.every and done % config.checkpoint.every == 0)
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
            break
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


def show_beside(config, parts, console, programs) -> None:
    """Rows of the programs beside the step. Raises UsageError where one sends bytes that are not ours."""
    traffic = beside.traffic(parts, programs)
    console.table("beside the step", [*beside.describe(programs), ("stray, replica", assemble.stray_row(traffic))])
    assemble.refuse_stray(traffic, config.sync.allow_stray_bytes)


def make_console(config, flags, leader: bool, warning: str | None) -> Console:
    console = Console(config.steps, config.log_every, quiet=not leader)
    if flags.simulate:
        console.say(f"simulating {flags.simulate} devices on the CPU: right results, no speed-up")
    for note in flags.notes:
        console.say(note)
    if warning:
        console.warn(warning)
    return console


def say_resumed(config, workdir, start: int, console: Console, changed: str = "") -> None:
    if not workdir.leader:
        return
    console.say(f"resuming {workdir.path} from step {start}; every array has the digest it was saved with")
    if changed:
        console.say(changed)
    before = configuration.read_json(workdir.path)
    if start == config.steps:
        console.say(f"this run is complete: it has made its {start} steps, and is evaluated again")
    elif start and configuration.changes_schedule(before, config):
        was, now = (float(assemble.build_schedule(c)(step)) for c, step in ((before, start - 1), (config, start)))
        if was != now:
            console.say(f"the learning rate was {was:.3g} at step {start} and is {now:.3g} at step {start + 1}")


def load_data(config, workdir: Workdir, console, facts, origin) -> tuple[corpora.Corpus, np.ndarray | None]:
    """The corpus, the same in every process, and the ids of the prompt. What the data is joins the facts."""
    with agree.together("data"):
        corpus = load_corpus(config, workdir, console, origin)
        prompt_P = ending.try_prompt(config.sample, corpus.tokenizer, config.data.seq_len)
    found = {"data": corpus.digest, "data.tokenizer": corpus.tokenizer.digest}
    agree.same("data", found)
    facts.update(found)
    return corpus, prompt_P


def load_corpus(config, workdir: Workdir, console: Console, origin: Path | None) -> corpora.Corpus:
    """The text of config.data; of a run that goes on, with its own tokenizer, and compared with what it was. origin: of
    a run that begins with another's parameters, that one's workdir, whose tokenizer is taken."""
    keys = {key: config.data[key] for key in corpora.KEYS}
    folders = {"workdir": workdir.path} if workdir.resuming else {"origin": origin}
    console.doing("reading the data")
    with bad_input(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        corpus = corpora.load(cache_dir=corpora.cache_directory(), say=console.say, **folders, **keys)
    for warning in caught:
        console.warn(str(warning.message))
    return corpus


def begin(config, workdir: Workdir, corpus: corpora.Corpus, start: int | None, begun: dict[str, Any]) -> None:
    if workdir.leader:
        corpus.keep(workdir.path)
    workdir.begin(config, start)
    library_log.keep(workdir.path, jax.process_index())
    workdir.update_summary(data_digest=corpus.digest, **begun)


def num_tokens(config) -> int:
    """Of a step."""
    return config.data.batch_size * config.data.seq_len


def batch_shape(config, corpus) -> dict:
    names = ("seq_len", "batch_size", "document_mask")
    return {name: config.data[name] for name in names} | {"eos": corpus.tokenizer.eos}


def open_checkpoints(config, parts, workdir, console) -> Any:
    from runtime.checkpoint import Checkpoints  # slow to import

    kept = (config.checkpoint.keep, config.checkpoint.keep_every)
    return Checkpoints(workdir.checkpoints, *kept, console.warn, assemble.kinds(parts))


def make_recorder(config, parts, workdir, console, wire_bytes, start, tokens: int | None) -> Recorder:
    """tokens: read up to the step `start`; None where its checkpoint does not say."""
    log, train_seconds = None, 0.0
    if workdir.leader:
        flag = {"auto": None, "on": True, "off": False}[config.metrics.tensorboard]
        with bad_input():
            writers = optional_writers(workdir.path, flag, config.metrics.wandb)
        log = MetricsLog(workdir.path, writers, console.warn)
        log.rewind(start if start is not None else 0 if workdir.resuming else None)
        rows = [row for row in read(log.path) if "train_seconds" in row] if workdir.resuming else []
        train_seconds = rows[-1]["train_seconds"] if rows else 0.0
        tokens = rows[-1]["tokens"] if rows and tokens is None else tokens
    return Recorder(
        log,
        console,
        log_every=config.log_every,
        abort_after=config.guard.abort_after,
        tokens=tokens or 0,
        flops_per_second_at_full_speed=assemble.full_speed(parts),
        flops_per_token=parts.model.flops_per_token(config.data.seq_len, causal=False),
        wire_bytes=wire_bytes,
        train_seconds=train_seconds,
    )


def run(argv: list[str], leave: Callable[[int], Any] = int) -> int:
    """main, with what is no fault of this program shown as a sentence. leave: how to end after one."""

    def together() -> int:
        code = main(argv)
        agree.leave()
        return code

    return exits.guarded(together, "the same command goes on from the last checkpoint", leave)


if __name__ == "__main__":
    # A failure ends at once: a compilation may be under way, and nobody waits for what failed.
    sys.exit(run(sys.argv, leave=os._exit))

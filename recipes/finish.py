"""The end of a run: what it leaves behind for people to look at. What is trained has been saved before."""

from collections.abc import Callable
from typing import Any

import numpy as np

from parallel.cost.link import Link
from parallel.layout.axes import SLOW, shown
from recipes import fit, over_link
from recipes.build import num_parameters
from recipes.fit import Run
from recipes.programs import Evaluation, rows_of_evaluation
from recipes.task import Data
from runtime import report
from runtime.config import UsageError
from runtime.digest import params_digest
from runtime.environment import peak_memory
from runtime.metrics import read
from runtime.plot import plot_loss

Baselines = dict[str, float | None]  # bits per byte of counting alone, by its name; None: it failed


def try_prompt(sample: Any, data: Data, seq_len: int) -> np.ndarray | None:
    """The sample's prompt as ids [P], None without a sample. Tried before training: at the end it would be too late.

    Raises UsageError for a prompt that the tokenizer cannot encode, or ids that it cannot decode.
    """
    if not sample.tokens:
        return None
    try:
        prompt = data.first_words() if sample.prompt == "auto" else sample.prompt
        prompt_P = data.prompt(prompt)[-max(1, seq_len - 1) :]
        data.tokenizer.decode(prompt_P)
    except Exception as error:  # of whatever type the tokenizer raises
        raise UsageError(
            f"sample.prompt={sample.prompt!r} cannot be encoded and decoded by data.tokenizer ({error}), so the run "
            "could not end with a sample: give another sample.prompt, or sample.tokens=0"
        ) from error
    return prompt_P


def finish(run: Run, state: Any, evaluated: Evaluation, link: Link | None = None) -> int:
    """summary.json, then samples.txt, plots/loss.png, report.html: a later one that fails costs only itself. link: what
    a step takes on it is told, too.

    Called by every process: the parameters stay in their shards. Returns the exit code, 1 if something failed.
    """
    console, folder, failed = run.console, run.workdir.path, [*run.recorder.failed_writers()]

    def attempt(what: str, make: Callable[[], Any]) -> Any:
        try:
            return make()
        except Exception as error:  # of whatever type: the model is trained and saved, and the rest is still to come
            failed.append(what)
            console.warn(f"no {what}: {type(error).__name__}: {error}")

    console.doing("digesting the weights")
    digest = params_digest(state.params)
    if run.workdir.leader:
        baselines = attempt("baselines", lambda: run.data.baselines(evaluated_on(run)))
        baselines = baselines or dict.fromkeys(run.data.compared_with)
        summarise(run, digest, evaluated, baselines)
    if run.prompt_P is not None:
        text = attempt("sample", lambda: fit.sample(run, run.whole(state)))
        if text and run.workdir.leader:
            attempt("samples.txt", lambda: (folder / "samples.txt").write_text(text + "\n", encoding="utf-8"))
            console.say(f"a sample:\n{text}")
    if run.workdir.leader:
        console.doing("drawing the plot and the report")
        attempt("plots/loss.png", lambda: plot(run, evaluated, baselines))
        attempt(report.PAGE, lambda: report.write([folder], folder / report.PAGE))
        console.doing("")
        if link and SLOW in run.recorder.wire_bytes:
            sent, seconds = run.recorder.wire_bytes[SLOW], run.recorder.median_seconds()
            console.table(f"over {link.text}", over_link.rows(link, run.parts, sent, seconds))
        console.say(
            f"complete after {run.config.steps} steps; "
            + held_out(evaluated, baselines)
            + f"; see {folder}/{report.PAGE} and summary.json"
        )
    if failed:
        console.warn(f"training is complete and saved in {folder}, but not all of its end: {', '.join(failed)}")
    return 1 if failed else 0


def evaluated_on(run: Run) -> list[dict[str, np.ndarray]]:
    """The batches that `evaluated` is of."""
    return run.data.eval_batches(rows_of_evaluation(run.parts), run.config.data.batch_size, run.config.eval_batches)


def summarise(run: Run, digest: str, evaluated: Evaluation, baselines: Baselines) -> None:
    unit = run.parts.task.unit
    last = [row for row in read(run.workdir.path / "metrics.jsonl") if "loss" in row][-1]
    run.phases.mark("training and end", then="writing a sample")
    run.workdir.update_summary(
        parameters=num_parameters(run.parts),
        mesh=shown(run.parts.mesh.shape),
        step=last["step"],
        skipped=last.get("skipped", 0),
        **{unit: last[unit]},
        final_loss=last["loss"],
        **{f"final_eval_{name}": x for name, x in evaluated.values().items()},
        **{f"{name}_bits_per_byte": x for name, x in baselines.items()},
        params_digest=digest,
        wire_bytes_per_step=last["wire_bytes"],
        compiles=len(run.programs),  # ahead of time: the executables cannot compile again
        phases=run.phases.seconds,
        peak_memory=peak_memory(),
        goodput=round(last["train_seconds"] / run.workdir.seconds_since_first_start(), 4),
    )


def plot(run: Run, evaluated: Evaluation, baselines: Baselines) -> None:
    folder = run.workdir.path / "plots"
    folder.mkdir(exist_ok=True)
    nats = {name: x * (evaluated.nats_of_a_bit or 0) for name, x in baselines.items() if x is not None}
    plot_loss(read(run.workdir.path / "metrics.jsonl"), folder / "loss.png", run.workdir.path.name, nats)


def held_out(evaluated: Evaluation, baselines: Baselines) -> str:
    if evaluated.bits_per_byte is None:
        return "held-out data: " + ", ".join(f"{name} {x:.4f}" for name, x in evaluated.values().items())
    beaten = ", ".join(f"{name} {x:.2f}" for name, x in baselines.items() if x is not None)
    beside = f" (on the same windows, by counts of the training text: {beaten})" if beaten else ""
    return f"held-out text: {evaluated.bits_per_byte:.3f} bits per byte{beside}"

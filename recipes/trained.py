"""What training leaves in a Python session: losses, weights, text, and pictures that a notebook shows."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data import corpus as corpora
from data.arrays import whole_batches
from data.loader import eval_batches
from recipes.build import Parts
from recipes.language import num_bytes
from recipes.programs import (
    Evaluation,
    Evaluator,
    compile_evaluation,
    compile_sample,
    rows_of_evaluation,
    sample_text,
)
from recipes.task import arrays
from runtime.config import UsageError, bad_input
from runtime.metrics import read
from runtime.plot import draw_loss


class Picture:
    """A figure of matplotlib, as a PNG that a notebook shows."""

    def __init__(self, figure: Any):
        self.figure = figure

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.figure.savefig(file, format="png")
        return file.getvalue()


@dataclass(frozen=True)
class Trained:
    """A run that has been trained, by this process or another.

    step: updates in these parameters. losses: float32, of every update that this call has made. state: None where only
    the parameters were read.
    wire_bytes: {mesh axis: bytes that a device sends a step}.
    """

    config: Any
    parts: Parts
    params: Any
    tokenizer: Any
    workdir: Path
    step: int
    state: Any = None
    losses: Any = ()
    wire_bytes: Any = None
    interrupted: bool = False
    _programs: dict[Any, Any] = field(default_factory=dict)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl."""
        return read(self.workdir / "metrics.jsonl")

    @property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.workdir / "summary.json").read_text())

    def sample(self, prompt: str, tokens: int = 200, temperature: float = 0.8, seed: int = 0) -> str:
        """The prompt and so many tokens more. temperature 0: the likeliest token each time."""
        self._check_text("sample", "a prompt")
        prompt_P = corpora.encode_prompt(self.tokenizer, prompt)[-max(1, self.config.data.seq_len - 1) :]
        program = self._program((tokens, temperature), lambda: compile_sample(self.parts, tokens, temperature))
        return sample_text(program, self.params, prompt_P, self.config.data.seq_len, seed, self.tokenizer)

    def evaluate(self, data: Any) -> Evaluation:
        """Of a text, the loss and bits per byte of the whole windows in it; of a task of one's own, what its loss sums
        up over arrays like its eval_data, in whole batches. Raises UsageError for too little."""
        batches, num_bytes = self._batches_of_text(data) if self.tokenizer else (self._batches_of(data), None)
        program = lambda: self._program("evaluation", lambda: compile_evaluation(self.parts))
        return Evaluator(self.parts, batches, num_bytes, program)(self.params)

    def _batches_of(self, data: Any) -> list[dict[str, np.ndarray]]:
        found, rows = arrays("evaluate: data", data), rows_of_evaluation(self.parts)
        batches = whole_batches(found, rows)
        if found.keys() != self.parts.task.row.keys() or not batches:
            sizes = {name: x.shape for name, x in found.items()}
            names = ", ".join(self.parts.task.row)
            raise UsageError(
                f"evaluate: expected arrays {names} of {rows} rows or more, as it reads so many; not {sizes}"
            )
        return batches

    def _batches_of_text(self, text: str) -> tuple[list[dict[str, np.ndarray]], float]:
        """(the whole windows in it, how many bytes of text they are)."""
        data = self.config.data
        shape = {"seq_len": data.seq_len, "batch_size": data.batch_size, "document_mask": data.document_mask}
        with bad_input():
            ids_N = self.tokenizer.encode(text)
            batches = eval_batches(ids_N, **shape, num_batches=len(ids_N), eos=self.tokenizer.eos)
        bytes_V = self.tokenizer.token_bytes()  # where it changes the text, or lacks tokens: scaled to what was read
        bytes_V = bytes_V * (len(text.encode()) / max(1, float(np.sum(bytes_V[ids_N]))))
        return batches, num_bytes(bytes_V, batches)

    def _check_text(self, what: str, wanted: str) -> None:
        if self.tokenizer is None:
            raise UsageError(f"{what}: this run's task is no text, so there is no tokenizer that could read {wanted}")

    def _program(self, name: Any, compile: Callable[[], Any]) -> Any:
        if name not in self._programs:
            self._programs[name] = compile()
        return self._programs[name]

    def plot(self) -> Picture:
        """The losses of all that the run has logged; once it has ended, beside what counting letters and pairs of
        letters achieves."""
        return Picture(draw_loss(self.metrics, self.workdir.name, self._baselines()))

    def _baselines(self) -> dict[str, float]:
        """{name: nats per token}."""
        found = self.summary
        bits = {name: found.get(f"{name}_bits_per_byte") for name in ("unigram", "bigram")}
        if not found.get("final_eval_bits_per_byte") or None in bits.values():
            return {}
        return {name: x * found["final_eval_loss"] / found["final_eval_bits_per_byte"] for name, x in bits.items()}

    def __repr__(self) -> str:
        interrupted = ", interrupted" if self.interrupted else ""
        return f"<a run in {self.workdir}: {self.step} of {self.config.steps} steps{interrupted}>"

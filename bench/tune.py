"""How far an adapter brings SmolLM2-135M-Instruct towards a speaker it has never heard: the loss on answers that are
held out, before and after 12 steps on made conversations with a pirate.

python bench/tune.py                  (fetches the model, 93 MB, unless it is there already)
"""

import contextlib
import io
import json
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import slackline as sl  # noqa: E402
from bench import common  # noqa: E402
from recipes import imported, published  # noqa: E402
from runtime import usage  # noqa: E402

ROWS, STEPS, RANK = 400, 12, 16
SYSTEM = "You are a pirate."
TOWNS = (
    "Tortuga Nassau Havana Bristol Lisbon Cadiz Tunis Genoa Venice Smyrna Aden Muscat Goa Malacca Batavia Manila"
).split()
THANKS = [("Thank you.", "Arr, ye be welcome, matey!")]


def conversation(draw: random.Random) -> list[tuple[str, str]]:
    """Questions and answers."""
    a, b, town = draw.randint(1, 99), draw.randint(1, 99), draw.choice(TOWNS)
    asked = [
        (f"What is {a} plus {b}?", f"Arr, {a} plus {b} be {a + b}, matey!"),
        ("Where are you going?", f"Arr, we be sailing to {town}, matey!"),
        (f"How far is {town}?", f"Arr, {town} be {a} days from here, matey!"),
    ]
    return [draw.choice(asked), *(THANKS if draw.random() < 0.5 else [])]


def write(file: Path) -> None:
    draw = random.Random(0)
    with file.open("w") as out:
        for _ in range(ROWS):
            messages = [{"role": "system", "content": SYSTEM}]
            for question, answer in conversation(draw):
                messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            out.write(json.dumps({"messages": messages}) + "\n")


def held_out(folder: Path, name: str, **changes: Any) -> float:
    """The loss on answers at the end of a run, nats per token."""
    keys = {"init.workdir": str(folder / "base"), "data.path": str(folder / "chat.jsonl"), "sample.tokens": 0}
    with contextlib.redirect_stdout(io.StringIO()):
        return sl.fit("finetune", workdir=folder / name, **keys | changes).summary["final_eval_loss"]


def main() -> None:
    usage.parser(__doc__, "python bench/tune.py").parse_args()
    report = common.Report("tune")
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        write(folder / "chat.jsonl")
        imported.import_model(published.file_of_smollm2(print), folder / "base", print)
        before = held_out(folder, "before", steps=1, **{"optimizer.lr": 0.0, "optimizer.warmup_steps": 0})
        began = time.monotonic()
        after = held_out(folder, "after", steps=STEPS, **{"lora.rank": RANK, "optimizer.lr": 1e-3})
        report.row("held-out loss before", before, "nats")
        report.row(f"held-out loss after {STEPS} steps of an adapter of rank {RANK}", after, "nats")
        report.row("after / before", after / before, at_most=0.8)
        report.row("tuning, compiled and evaluated", (time.monotonic() - began) / 60, "min", at_most=5)
    report.finish()


if __name__ == "__main__":
    main()

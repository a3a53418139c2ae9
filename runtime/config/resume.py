"""A run that goes on: its config.json, and what may change. A config.json is data: resuming executes nothing of it."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from runtime.config.errors import UsageError
from runtime.config.keys import base_values, converted, flatten, nested


class Change(NamedTuple):
    """What becomes of a run that goes on with another value of these keys. A name that ends in a dot is a group: those
    of its keys that no other row names."""

    keys: str
    effect: str
    refused: bool = False


SCHEDULE = "steps optimizer.lr optimizer.schedule optimizer.warmup_steps optimizer.final_lr_fraction"
CHANGES = (
    Change("model. lora. data.vocab_size", "refused: the weights mean something else", refused=True),
    Change("init.", "nothing: what has begun goes on from its own checkpoints; a base is refused where it is another"),
    Change("data.tokenizer data.end_of_document", "refused where it is not the tokenizer that the run has of its own"),
    Change(SCHEDULE, "the learning rate follows the new schedule from the next update on"),
    Change("optimizer.", "from the next update on; refused where the optimizer remembers something else"),
    Change("guard. moe. sync.algorithm sync.exchange sync.allow_stray_bytes", "from the next update on"),
    Change("seed data.seq_len data.batch_size", "from the same step number of another order of the data"),
    Change("data.changed", "accept: text that is not what it was is taken, from the same step number on"),
    Change("data.document_mask", "from the next update on"),
    Change("data.", "refused where other text or another split follows from it, but for data.changed=accept"),
    Change("island.", "refused where the log is of another run; another name joins as another island"),
    Change("mesh. sync.", "the state is carried over to the new layout; each array that changes is named"),
    Change("attention. compute. pipeline.", "the same mathematics, rounded in another order"),
    Change(
        "log_every eval_every eval_batches checkpoint. sample. metrics. profile.",
        "training stays the same to the bit",
    ),
)


def change_of(key: str) -> Change:
    """The row of a key: the one that names it, else the one of its group."""
    group = f"{key.partition('.')[0]}."
    rows = [row for name in (key, group) for row in CHANGES if name in row.keys.split()]
    return rows[0]


# Values of earlier releases, by what they are called now.
RENAMED = {"model.bias": {False: "none", True: "all"}}
OBJECTS = "objects"  # in config.json beside the groups: of a run from Python, the objects that its config names


def read_json(workdir: Path) -> Any:
    """The config of the run in `workdir`. A key that came later than the run has its default."""
    config, path = _read(workdir), workdir / "config.json"
    config.pop(OBJECTS, None)
    flat = {key: RENAMED.get(key, {}).get(value, value) for key, value in flatten(config)}
    return nested(base_values() | converted(flat, f"{path} has"))


def objects_of(workdir: Path) -> dict[str, Any]:
    """{key: {class, fields, source}} of the objects with which the run in `workdir` was made."""
    return _read(workdir).get(OBJECTS, {})


def _read(workdir: Path) -> dict[str, Any]:
    path = workdir / "config.json"
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        raise UsageError(
            f"{path} is damaged ({error}). Restore it from a backup, or start a new run with another --workdir."
        ) from error
    return config


def difference(old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """[(key, old value, new value)] of the keys that differ."""
    a, b = dict(flatten(old)), dict(flatten(new))
    return [(key, a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]


def check_resume(old: Any, new: Any) -> list[str]:
    """What has changed since the run began, one line for each of its effects. Raises UsageError for another model."""
    rows = difference(old, new)
    fatal = [row for row in rows if change_of(row[0]).refused]
    if fatal:
        lines = "\n".join(f"  {key}: {a!r} in config.json, {b!r} now" for key, a, b in fatal)
        raise UsageError(
            f"this workdir holds a run of another model:\n{lines}\n"
            "Go on with --workdir alone (it uses config.json), or give this config another --workdir."
        )
    by_effect: dict[str, list[str]] = {}
    for key, a, b in rows:
        by_effect.setdefault(change_of(key).effect, []).append(f"{key}: {a!r} -> {b!r}")
    return [f"{', '.join(changed)} ({effect})" for effect, changed in by_effect.items()]


def check_goal(steps: int, made: int) -> None:
    """Raises UsageError where a run is to end before the step that it has reached."""
    if steps < made:
        raise UsageError(
            f"steps={steps}: this run has made {made} steps already, and none can be taken back. "
            f"Set steps={made} or more, or another --workdir"
        )


def changes_schedule(old: Any, new: Any) -> bool:
    return any(key in SCHEDULE.split() for key, *_ in difference(old, new))

"""A run that goes on: its config.json, and what may change. A config.json is data: resuming executes nothing of it."""

import json
from pathlib import Path
from typing import Any

from runtime.config.errors import UsageError
from runtime.config.keys import base_values, convert, flatten, nested
from runtime.config.suggest import unknown_key

# A change here makes another model: the checkpoint's weights mean something else.
MODEL_KEYS = ("model.", "data.vocab_size", "data.tokenizer")


def read_json(workdir: Path) -> Any:
    """The config of the run in `workdir`. A key that came later than the run has its default."""
    path = workdir / "config.json"
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        raise UsageError(
            f"{path} is damaged ({error}). Restore it from a backup, or start a new run with another --workdir."
        ) from error
    flat, known, wrong = dict(flatten(config)), base_values(), []
    for key, value in flat.items():
        try:
            flat[key] = convert(key, value)
        except ValueError as error:
            wrong.append(f"{path} has {error}")
    wrong += [f"{path} has the {unknown_key(key, list(known))}" for key in flat.keys() - known.keys()]
    if wrong:
        raise UsageError("\n".join(wrong))
    return nested(known | flat)


def difference(old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """[(key, old value, new value)] of the keys that differ."""
    a, b = dict(flatten(old)), dict(flatten(new))
    return [(key, a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]


def check_resume(old: Any, new: Any) -> list[str]:
    """The changes since the run began, one line each. Raises UsageError if one changes the model."""
    rows = difference(old, new)
    fatal = [row for row in rows if row[0].startswith(MODEL_KEYS)]
    if fatal:
        lines = "\n".join(f"  {key}: {a!r} in config.json, {b!r} now" for key, a, b in fatal)
        raise UsageError(
            f"this workdir holds a run of another model:\n{lines}\n"
            "Go on with --workdir alone (it uses config.json), or give this config another --workdir."
        )
    return [f"{key}: {a!r} -> {b!r}" for key, a, b in rows]

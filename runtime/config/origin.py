"""`init.workdir`: a fresh run that begins with another run's parameters has that run's model and tokenizer."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from runtime.config.keys import flatten
from runtime.config.resume import read_json

KEY = "init.workdir"
TAKEN = ("data.vocab_size", "data.tokenizer", "data.end_of_document")  # and model.*


def take_origin(flat: dict[str, Any], typed: Collection[str], workdir: str | None) -> tuple[list[str], list[str]]:
    """Puts into `flat` what the run in init.workdir decides; (what is to be said of it, what is wrong), as lines.

    typed: the keys of the command line. One that has another value is wrong; a config file's values give way.
    workdir: of this run. Where it has begun, its own config.json counts, and the other run may be gone.
    """
    if not flat[KEY]:
        return [], []
    own = _config_of(workdir) if workdir else None
    if own is not None:
        flat |= {key: value for key, value in _decided(own).items() if key not in typed}
        return [], []
    origin = flat[KEY]
    theirs = _config_of(origin)
    if theirs is None:
        return [], [f"{KEY}={origin}: there is no config.json of a run in this folder, so it cannot be started from"]
    wrong = [
        f"--config.{key}={flat[key]} is typed, and {KEY}={origin} holds a run with {value}, whose parameters and "
        f"tokenizer are taken: leave it out"
        for key, value in _decided(theirs).items()
        if key in typed and flat[key] != value
    ]
    changed = {key: value for key, value in _decided(theirs).items() if key not in typed and flat[key] != value}
    said = ", ".join(f"{key}={value} (not {flat[key]})" for key, value in changed.items())
    flat |= changed
    return [f"as in {origin}, whose parameters are taken: {said}"] if said else [], wrong


def _config_of(workdir: str) -> Any:
    """The config of the run in this folder; None where there is none."""
    try:
        return read_json(Path(workdir))
    except OSError:
        return None


def _decided(config: Any) -> dict[str, Any]:
    """What a run's parameters and ids mean: these keys' values cannot be others."""
    flat = dict(flatten(config))
    learned = ("data.seq_len",) if flat["model.position"] == "learned" else ()  # the rows of their table
    return {key: value for key, value in flat.items() if key.startswith("model.") or key in (*TAKEN, *learned)}

"""What all islands of a run agree on, as run.json keeps it, whose digest every first record names.

    keys       {key of the config: its value, as text}: the model, the merge rule, its outer optimizer, the codec
    codec      as a manifest names it (islands/payload.py)
    leaves     {weight: its elements}
    snapshots  versions between two snapshots; 0: none
    first      the snapshot of the first parameters: its manifest, and all that it is made of (islands/snapshot.py)

A run.json without `keys` is of a log that nobody folds.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from islands import merge
from islands.record import Payload, Record
from islands.view import View
from runtime.config import UsageError

AGREED = "model.", "lora.", "island.", "sync.", "data.vocab_size"  # begin the keys that are
OWN = "island.log", "island.name", "sync.allow_stray_bytes"  # of these, what is each island's own


@dataclass(frozen=True)
class Terms:
    """interval: H. norm_bound: of what one push may change, beside that of its member; 0: none."""

    rule: merge.Rule
    staleness: int
    interval: int
    dylu: bool
    norm_bound: float

    def refusal(self, view: View, record: Record) -> str:
        return merge.refusal(self.rule, self.staleness, view, record)


def agreed(flat: Mapping[str, Any]) -> dict[str, str]:
    """`keys` of a config, {key: value}. Texts of floats give back the same floats."""
    return {key: str(value) for key, value in flat.items() if key.startswith(AGREED) and key not in OWN}


def of(keys: Mapping[str, str]) -> Terms:
    """Raises UsageError for values that do not go together."""
    optimizer, lr, momentum = (keys[f"sync.outer.{name}"] for name in ("optimizer", "lr", "momentum"))
    outer = optimizer, float(lr), 0.0 if optimizer == "sgd" else float(momentum)
    staleness = int(keys["island.staleness"])
    own = {"average": {"staleness": staleness}, "quorum": {"quorum": int(keys["island.quorum"])}}
    kind = merge.RULES[keys["island.merge"]]
    try:
        rule = kind(merge.Outer(*outer), **own.get(keys["island.merge"], {}))
    except ValueError as error:
        raise UsageError(str(error)) from error
    bound = float(keys["island.norm_bound"])
    return Terms(rule, staleness, int(keys["sync.interval"]), keys["island.dylu"] == "True", bound)


def refusal(facts: Mapping[str, Any]) -> Callable[[View, Record], str]:
    return of(facts["keys"]).refusal if "keys" in facts else lambda view, record: ""


def check_folded(facts: Mapping[str, Any]) -> None:
    """Raises UsageError where the log has no parameters."""
    if "keys" not in facts:
        raise UsageError("run.json says nothing of parameters: this log was not begun by `python -m islands init`")


def first(facts: Mapping[str, Any]) -> tuple[str, tuple[Payload, ...]]:
    """(digest of the manifest of the first snapshot, all that it is made of)."""
    return facts["first"]["manifest"], tuple(Payload(**each) for each in facts["first"]["payloads"])


def differing(ours: Mapping[str, str], facts: Mapping[str, Any]) -> Iterator[str]:
    """A line for each key with another value here than in the run."""
    theirs = facts["keys"]
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            yield f"{key}: {theirs.get(key, 'absent')} in the run, {ours.get(key, 'absent')} in this config"

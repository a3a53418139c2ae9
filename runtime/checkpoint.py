"""Checkpoints: Orbax for storage, digests for trust. `python -m runtime.checkpoint verify WORKDIR` checks a run.

Orbax commits a step atomically, but loads flipped bits without a word. So each step carries a record, written inside
the same commit: shape, dtype and a 128-bit digest of every array (runtime/digest.py), computed before the save and
computed again after the restore. The record is stored twice, each copy with a hash of its own, so that damage to the
record is told from damage to an array.

The layout on disk is canonical: one array per weight, named by its path, with a leading layer dimension, whatever the
mesh, the strategy, and whether layers were scanned.
"""

import hashlib
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from runtime.config import RunError
from runtime.digest import digest_all, named_arrays, to_hex

COPIES = ("record.json", "record.copy.json")


class CheckpointError(RunError):
    """A run cannot go on from its checkpoints. The message says why and what to do."""


class Checkpoints:
    """The steps of one run, in `directory`. Saves are asynchronous; a failed one raises at the next call."""

    def __init__(self, directory: Path, keep: int = 1, keep_every: int = 0):
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs what is raised here with a better message
        keep_policies: Any = ocp.training.preservation_policies
        save_policies: Any = ocp.training.save_decision_policies
        policies: list = [
            keep_policies.LatestN(keep),
            keep_policies.BestN(
                get_metric_fn=lambda metrics: metrics["eval_loss"],
                reverse=True,
                n=1,
                keep_checkpoints_without_metrics=False,
            ),
        ]
        if keep_every:
            policies.append(keep_policies.EveryNSteps(keep_every))
        self.directory = directory
        self._pending: Any = None
        self._damaged: set[int] = set()  # found by restore; saved again when training comes by
        self._orbax = ocp.training.Checkpointer(
            str(directory.absolute()),
            save_decision_policy=save_policies.FixedIntervalPolicy(1),
            preservation_policy=keep_policies.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,  # what a killed save left behind
        )

    def save(self, step: int, state: Any, eval_loss: float | None) -> None:
        """Starts saving; returns when the state has been copied and may be donated. No-op if the step is there."""
        self.finish()
        if step in self.steps() and step not in self._damaged:
            return
        arrays = named_arrays(state)
        record = _make_record(step, arrays)
        try:
            self._pending = self._orbax.save_checkpointables_async(
                step,
                {"state": _nested(arrays), "record": _Record(record)},
                metrics=None if eval_loss is None else {"eval_loss": eval_loss},
                overwrite=step in self._damaged,
            )
            self._damaged.discard(step)
        except Exception as error:  # Orbax raises what its storage raises, of many types
            raise self._failed(error) from error

    def poll(self) -> bool:
        """Whether a save has just been committed. Raises if it has failed: called at every step, so that training
        does not run on for nothing."""
        if self._pending is None or self._orbax.is_saving_in_progress():
            return False
        self.finish()
        return True

    def finish(self) -> None:
        """Waits for the save under way."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            pending.result()
        except Exception as error:  # Orbax raises what its storage raises, of many types
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> CheckpointError:
        intact = self.steps()
        return CheckpointError(
            f"saving a checkpoint in {self.directory} failed, so training stops: {error}\n"
            f"Committed before it, and untouched: {', '.join(f'step {s}' for s in intact) or 'no step'}. "
            "Free some space or repair the disk, then start again with the same --workdir."
        )

    def steps(self) -> list[int]:
        """Committed steps, oldest first. Read from the disk: what a crash left half-written is not among them."""
        return sorted(int(p.name) for p in self.directory.glob("*") if p.name.isdigit())

    def close(self) -> None:
        self.finish()
        self._orbax.close()

    def restore(
        self, abstract_state: Any, warn: Callable[[str], None], adapt: Callable[[dict, dict], Any] = lambda *_: None
    ) -> tuple[Any, int]:
        """The newest intact step, verified, in the shardings of `abstract_state`; and its number.

        adapt(saved arrays, wanted arrays) may say how to make some of the wanted ones from others (parallel/resume.py).

        A damaged step is named, with its arrays, through `warn`, and the one before it is tried. Raises
        CheckpointError if none is intact, or if the arrays are another model's.
        """
        found: list[str] = []
        for step in reversed(self.steps()):
            state, problems = self._load(step, abstract_state, warn, adapt)
            if not _any_process(bool(problems)):
                return state, step
            self._damaged.add(step)
            found.append(_damage(step, problems))
            warn(found[-1])
        raise CheckpointError(
            f"no checkpoint in {self.directory} is intact, so there is nothing to resume from:\n  "
            + "\n  ".join(found or ["(no step was ever committed)"])
            + "\nRestore the directory from a backup, or start a new run with another --workdir."
        )

    def _load(self, step: int, abstract_state: Any, warn: Callable, adapt: Callable) -> tuple[Any, list[str]]:
        wanted = named_arrays(abstract_state)
        record = read_record(self.directory / str(step))
        if record is None:
            return None, ["its record of digests is missing or damaged in both copies"]
        adapted, load = adapt(record["arrays"], wanted), wanted
        if adapted:
            replaced = adapted.replaced
            load = {name: x for name, x in wanted.items() if name not in replaced} | adapted.load
        known = {name: x for name, x in record["arrays"].items() if not adapted or name not in adapted.ignored}
        _check_same_arrays(step, known, load)
        arrays, problems = load_arrays(self.directory / str(step), load)
        problems += compare(record, arrays)
        if problems:
            return None, problems
        if adapted:
            arrays |= adapted.convert(arrays)
            for note in adapted.notes:
                warn(note)
        treedef = jax.tree.structure(abstract_state)
        return treedef.unflatten([arrays[name] for name in wanted]), []


def _damage(step: int, problems: list[str]) -> str:
    return f"checkpoint step {step} is corrupt: " + "; ".join(problems)


# ── arrays by name ───────────────────────────────────────────────────────────────────────────────────────────────


def _nested(arrays: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, x in arrays.items():
        node = tree
        *folders, last = name.split("/")
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = x
    return tree


# ── the record ───────────────────────────────────────────────────────────────────────────────────────────────────


def _make_record(step: int, arrays: dict[str, jax.Array]) -> dict[str, Any]:
    sums = jax.device_get(digest_all(arrays))
    described = {
        name: {"shape": list(x.shape), "dtype": str(x.dtype), "digest": to_hex(sums[name])}
        for name, x in arrays.items()
    }
    return {"format": 1, "step": step, "arrays": described}


class _Record:
    """Stores a record in Orbax's own commit, so that a step has both or neither."""

    def __init__(self, record: dict[str, Any]):
        body = json.dumps(record)
        self.text = json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "body": body})

    async def save(self, directory):
        async def write():
            folder = await directory.await_creation()
            if jax.process_index() == 0:
                for name in COPIES:
                    (folder / name).write_text(self.text)

        return write()

    async def load(self, directory):
        raise NotImplementedError("records are read by read_record, without Orbax")


def read_record(step_directory: Path) -> dict[str, Any] | None:
    """The record of a step from whichever copy is sound; None if neither is."""
    for name in COPIES:
        try:
            outer = json.loads((step_directory / "record" / name).read_bytes())
            if hashlib.sha256(outer["body"].encode()).hexdigest() == outer["sha256"]:
                return json.loads(outer["body"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue  # a damaged copy can fail to parse in any of these ways
    return None


def compare(record: dict[str, Any], arrays: dict[str, jax.Array]) -> list[str]:
    """One line for each loaded array whose digest is not the recorded one."""
    sums = jax.device_get(digest_all(arrays)) if arrays else {}
    return [
        f"array {name} does not have the digest that was recorded when it was saved"
        for name in arrays
        if to_hex(sums[name]) != record["arrays"][name]["digest"]
    ]


def _check_same_arrays(step: int, saved: dict[str, Any], wanted: dict[str, Any]) -> None:
    rows = []
    for name in sorted(saved.keys() | wanted.keys()):
        ours = f"{list(wanted[name].shape)} {wanted[name].dtype}" if name in wanted else "absent"
        theirs = f"{saved[name]['shape']} {saved[name]['dtype']}" if name in saved else "absent"
        if ours != theirs:
            rows.append(f"  {name}: {theirs} in the checkpoint, {ours} in this config")
    if rows:
        raise CheckpointError(
            f"checkpoint step {step} is of another model or optimizer; {len(rows)} arrays differ:\n"
            + "\n".join(rows)
            + "\nUse the config it was made with (config.json in its workdir), or another --workdir."
        )


def load_arrays(step_directory: Path, wanted: dict[str, Any]) -> tuple[dict[str, jax.Array], list[str]]:
    """Loads arrays by name; those that cannot be read are left out and named."""
    try:
        return _load_some(step_directory, wanted), []
    except Exception:  # Orbax raises what its storage raises; which arrays are to blame is found out one by one
        arrays, problems = {}, []
        for name, abstract in wanted.items():
            try:
                arrays |= _load_some(step_directory, {name: abstract})
            except Exception as error:  # as above
                problems.append(f"array {name} cannot be read ({str(error).strip().splitlines()[0][:160]})")
        return arrays, problems


def _load_some(step_directory: Path, wanted: dict[str, Any]) -> dict[str, jax.Array]:
    loading = ocp.options.PyTreeOptions.Loading(partial_load=True)
    with ocp.Context(pytree_options=ocp.options.PyTreeOptions(loading=loading)):
        tree = ocp.load_checkpointables(str(step_directory.absolute()), {"state": _nested(wanted)})["state"]
    loaded = named_arrays(tree)
    return {name: loaded[name] for name in wanted}


def _any_process(flag: bool) -> bool:
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.array(flag))))


# ── python -m runtime.checkpoint verify WORKDIR ──────────────────────────────────────────────────────────────────


def verify(workdir: Path) -> list[tuple[int, list[str]]]:
    """Reads every step of a run on this machine; [(step, problems)]."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    rows = []
    for folder in sorted((workdir / "checkpoints").glob("*"), key=lambda p: (len(p.name), p.name)):
        if not folder.name.isdigit():
            continue
        record = read_record(folder)
        if record is None:
            rows.append((int(folder.name), ["its record of digests is missing or damaged in both copies"]))
            continue
        problems = []
        for name, x in record["arrays"].items():  # one array at a time: a model larger than this machine's memory
            abstract = jax.ShapeDtypeStruct(tuple(x["shape"]), np.dtype(x["dtype"]), sharding=device)
            arrays, unread = load_arrays(folder, {name: abstract})
            problems += unread + compare(record, arrays)
        rows.append((int(folder.name), problems))
    return rows


def main(argv: list[str]) -> int:
    if len(argv) != 2 or argv[0] != "verify":
        print("usage: python -m runtime.checkpoint verify WORKDIR\n\nReads every checkpoint of a run, lists damage.")
        return 0 if argv in (["--help"], ["-h"]) else 2
    workdir = Path(argv[1])
    if not (workdir / "checkpoints").is_dir():
        print(f"error: {workdir} has no checkpoints/ folder: is it the workdir of a run?", file=sys.stderr)
        return 2
    jax.config.update("jax_platforms", "cpu")
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    rows = verify(workdir)
    for step, problems in rows:
        print(f"step {step}: intact" if not problems else _damage(step, problems))
    if not rows:
        print(f"{workdir} has no committed checkpoint")
    return 1 if any(problems for _, problems in rows) or not rows else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Checkpoints of a run: saving, going on, and beginning from another run's parameters; how one step lies on the disk is
in runtime/stored.py. `python -m runtime.checkpoint verify WORKDIR` checks a run (runtime/verify.py).

The layout on disk is canonical: one array per weight, named by its path, with a leading layer dimension, whatever the
mesh, the strategy, and whether layers were scanned.
"""

import logging
import math
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from runtime import agree, exits, format1, format2, runs, steps
from runtime.config import RunError, UsageError
from runtime.digest import fingerprint, named_arrays
from runtime.steps import FIXED, PARAMS, read_record
from runtime.stored import NO_RECORD, Record, damage, differing, make_record, nested, read_arrays

CHUNK = 64 << 20  # bytes that are coded at a time, if a save is to take little memory

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs what is raised here with a better message


class CheckpointError(RunError):
    """A run cannot go on from its checkpoints. The message says why and what to do."""


class Checkpoints:
    """The steps of one run, in `directory`. Saves are asynchronous; a failed one raises at the next call.

    Every process makes one and calls it alike. Process 0 alone lists, renames and deletes, and the others take its
    answer: the view that another machine has of a shared directory may be seconds old.

    keep: so many of the newest steps stay, and the best by eval loss. keep_every: and every so many steps; 0: none.
    warn: is told what was set aside. kinds: what each array of the state is, for the record. one_at_a_time: on its way
    to the disk is about one array, and not the whole state: `save` takes longer, in less memory.
    """

    def __init__(
        self,
        directory: Path,
        keep: int = 1,
        keep_every: int = 0,
        warn: Callable[[str], None] = lambda _: None,
        kinds: Mapping[str, str] | None = None,
        one_at_a_time: bool = False,
    ):
        self.directory, self._keep, self._keep_every, self._warn = directory, keep, keep_every, warn
        self._one_at_a_time = one_at_a_time
        self._kinds = kinds or {}
        self._background = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[list[int]] | None = None
        if agree.leader():
            steps.remove_leftovers(directory)

    def save(self, step: int, state: Any, eval_loss: float | None, facts: dict[str, Any] | None = None) -> None:
        """Starts saving; returns when the state has been copied and may be donated. No-op if the step is there.

        facts: what JSON can hold, kept in the record (`facts` gives it back without a restore).
        """
        if step in self.finish():
            return
        arrays = named_arrays(state)
        loss = eval_loss if eval_loss is not None and math.isfinite(eval_loss) else None  # else it would be the best
        record = {**make_record(step, arrays, self._kinds), "eval_loss": loss, "facts": facts or {}}
        if moved := agree.decided("room for a checkpoint", lambda: steps.make_room(self.directory / str(step))):
            self._warn(moved)
        try:
            with ocp.Context(**self._limits(arrays)):
                saving = ocp.save_checkpointables_async(
                    str((self.directory / str(step)).absolute()), {"state": nested(arrays), "record": Record(record)}
                )
        except Exception as error:  # Orbax raises what its storage raises, of many types
            raise self._failed(error) from error
        self._pending = self._background.submit(self._commit, saving, step)

    def _limits(self, arrays: Mapping[str, jax.Array]) -> dict[str, Any]:
        """Orbax's options for one array at a time: it refuses a limit that the largest does not fit into."""
        if not self._one_at_a_time:
            return {}
        largest = max(sum(shard.data.nbytes for shard in x.addressable_shards) for x in arrays.values())
        storage = ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=CHUNK)
        saving = ocp.options.ArrayOptions.Saving(storage_options=storage, ocdbt_target_data_file_size=CHUNK)
        return {
            "memory_options": ocp.options.MemoryOptions(write_concurrent_bytes=max(5 * largest // 4, CHUNK)),
            "array_options": ocp.options.ArrayOptions(saving=saving),
        }

    def _commit(self, saving: Any, step: int) -> list[int]:
        saving.result()
        if not agree.leader():
            return [step]
        if step not in self._on_disk():
            raise OSError(f"step {step} was written without an error, but it is not there")
        steps.rotate(self.directory, self._keep, self._keep_every)
        return self._on_disk()

    def poll(self) -> list[int]:
        """The steps on the disk, where a save has just ended; else none. Raises if it has failed: called at every
        step, so that training does not run on for nothing. Not a place where processes meet: all but process 0 name
        only the step that was saved."""
        return self._end() if self._pending and self._pending.done() else []

    def finish(self) -> list[int]:
        """Waits for the save under way; the steps that are on the disk then, oldest first."""
        self._end()
        return self.steps()

    def _end(self) -> list[int]:
        if self._pending is None:
            return []
        pending, self._pending = self._pending, None
        try:
            return pending.result()
        except Exception as error:  # Orbax raises what its storage raises, of many types
            raise self._failed(error) from error

    def _failed(self, error: Exception) -> CheckpointError:
        intact = self._on_disk()
        return CheckpointError(
            f"saving a checkpoint in {self.directory} failed, so training stops: {error}\n"
            f"Committed before it, and untouched: {', '.join(f'step {s}' for s in intact) or 'no step'}. "
            "Free some space or repair the disk, then start again with the same --workdir."
        )

    def steps(self) -> list[int]:
        """Committed steps, oldest first, as process 0 sees them on the disk."""
        return agree.decided("steps on the disk", self._on_disk)

    def _on_disk(self) -> list[int]:
        return list(steps.committed(self.directory))

    def newest(self) -> int:
        """The newest step whose record can be read; 0 if there is none."""
        readable = lambda: [step for step, at in steps.committed(self.directory).items() if read_record(at)]
        return agree.decided("newest checkpoint", lambda: max(readable(), default=0))

    def facts(self) -> dict[str, Any]:
        """What the newest step whose record can be read was saved with; empty if there is none."""

        def read() -> dict[str, Any]:
            records = (read_record(folder) for folder in reversed(steps.committed(self.directory).values()))
            return next((record.get("facts", {}) for record in records if record), {})

        return agree.decided("facts of the checkpoint", read)

    def close(self) -> None:
        self._end()
        self._background.shutdown()

    def restore(
        self,
        state_at: Callable[[int], Any],
        warn: Callable[[str], None],
        adapt: Callable[[int, dict, dict], Any] | None = None,
    ) -> tuple[Any, int]:
        """The newest intact step, verified; and its number. state_at(step): the abstract state of that step, with its
        shardings.

        adapt(step, saved arrays, wanted arrays) says how to make some of the wanted ones from others
        (parallel/strategies/resume.py); None: they must be the same.

        A damaged step is named, with its arrays, through `warn`, and the one before it is tried; once an intact one is
        found, those above it are set aside as N.damaged. Raises CheckpointError if none is intact, or if the arrays
        are another model's.
        """
        damaged: dict[int, str] = {}
        for step in reversed(agree.decided("steps to restore", self._on_disk)):
            state, problems = self._load(step, state_at(step), warn, adapt)
            if not problems:
                aside = lambda: [steps.set_aside(self.directory / str(step), steps.DAMAGED) for step in damaged]
                for moved in agree.decided("damaged steps set aside", aside):
                    warn(moved)
                return state, step
            damaged[step] = damage(step, problems)
            warn(damaged[step])
        raise CheckpointError(
            f"no checkpoint in {self.directory} is intact, so there is nothing to resume from:\n  "
            + "\n  ".join(damaged.values() or ["(no step was ever committed)"])
            + "\nRestore the directory from a backup, or start a new run with another --workdir."
        )

    def _load(self, step: int, abstract_state: Any, warn: Callable, adapt: Callable | None) -> tuple[Any, list[str]]:
        """The state, or the problems of all processes: all take the same way."""
        wanted, folder = named_arrays(abstract_state), self.directory / str(step)
        record = agree.decided("record of a checkpoint", lambda: read_record(folder))
        if record is None:
            return None, [NO_RECORD]
        counted_calls = record["format"] == 1
        if counted_calls:
            record = format1.translate(record)
        if record["format"] == 2:
            record = format2.translate(record)
        record = runs.translate(record, wanted)
        adapted = adapt(step, record["arrays"], wanted) if adapt else None
        _check_same_arrays(step, record["arrays"], wanted, adapted)
        arrays, problems = {}, []
        for load, make in [(part.load, part.make) for part in adapted.steps] if adapted else [(wanted, dict)]:
            found, unread = read_arrays(folder, record, load)
            problems += unread
            if not problems:
                arrays |= make(found)
        if problems:
            return None, problems
        if counted_calls:
            arrays["step"] = jax.device_put(np.int32(step), wanted["step"].sharding)
        for note in adapted.notes if adapted else ():
            warn(note)
        treedef = jax.tree.structure(abstract_state)
        return treedef.unflatten([arrays[name] for name in wanted]), []


def _check_same_arrays(step: int, saved: dict[str, Any], wanted: dict[str, Any], adapted: Any) -> None:
    """Every wanted array can be made, and if none is adapted nothing is left."""
    rows = differing(saved, wanted, adapted.missing if adapted else sorted(saved.keys() | wanted.keys()))
    if rows:
        raise CheckpointError(
            f"checkpoint step {step} is of another model or optimizer:\n"
            + "\n".join(rows)
            + "\nUse the config it was made with (config.json in its workdir), or another --workdir."
        )


# ── the parameters of another run ────────────────────────────────────────────────────────────────────────────────


class Given(NamedTuple):
    params: Any
    step: int  # of the run that they are of
    digest: str  # as params_digest
    fixed: Any = None  # what is saved with them, and not trained
    facts: Mapping[str, Any] = {}  # with which the step was saved


def load_params(
    directory: Path, abstract: Any, warn: Callable[[str], None], fixed: Any = None, only: int | None = None
) -> Given:
    """The parameters of the newest step in `directory` in which they are intact, verified, in the shardings of
    `abstract`; and `fixed`, abstract, too. Nothing else is read, so a step may hold nothing else; and nothing is
    changed, for the run may go on. only: the step that it must be.

    A step whose parameters are damaged is named through `warn`, and the one before it is tried. Raises UsageError where
    there is no step, or one of another model; CheckpointError where all are damaged.
    """
    both = {"params": abstract, "fixed": fixed or {}}
    wanted = named_arrays(both)
    damaged: dict[int, str] = {}
    listed = lambda: steps.to_start_from(directory, only)
    on_disk = agree.decided("steps to start from", listed)
    while untried := [step for step in on_disk if step not in damaged]:
        step = untried[-1]
        arrays, record, problems = _load_params(directory / str(step), wanted)
        if not problems:
            found = jax.tree.structure(both).unflatten([arrays[name] for name in wanted])
            known = {name: record["arrays"][PARAMS + name] for name in named_arrays(found["params"])}
            stored = {n: jax.ShapeDtypeStruct(x.get("stored_shape", x["shape"]), x["dtype"]) for n, x in known.items()}
            digest = fingerprint(stored, {name: x["digest"] for name, x in known.items()})
            return Given(found["params"], step, digest, found["fixed"], record.get("facts", {}))
        damaged[step] = damage(step, problems)
        on_disk = agree.decided("steps to start from", listed)
        if step in on_disk:  # else the run has deleted it meanwhile
            warn(f"{directory.parent}: {damaged[step]}")
    raise CheckpointError(
        f"init.workdir={directory.parent}: no checkpoint has intact parameters, so there is nothing to start from:\n  "
        + "\n  ".join(damaged.values())
    )


def _load_params(folder: Path, wanted: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """(arrays, the record, problems of all processes). Format 1 named these as we do."""
    record = agree.decided("record of a checkpoint", lambda: read_record(folder))
    if record is None:
        return {}, {}, [NO_RECORD]
    record = runs.translate(record, wanted)
    saved = {name: x for name, x in record["arrays"].items() if name.startswith((PARAMS, FIXED))}
    if rows := differing(saved, wanted, sorted(saved.keys() | wanted.keys())):
        raise UsageError(f"init.workdir: {folder} holds another model than its config.json says:\n" + "\n".join(rows))
    arrays, problems = read_arrays(folder, record, dict(wanted))
    return arrays, record, problems


if __name__ == "__main__":
    from runtime import verify

    sys.exit(exits.guarded(lambda: verify.main(sys.argv[1:]), "nothing was changed"))

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
import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from runtime import agree, exits, format1, steps
from runtime.config import RunError, UsageError
from runtime.digest import digest_all, fingerprint, named_arrays, to_hex
from runtime.steps import COPIES, PARAMS, read_record


class CheckpointError(RunError):
    """A run cannot go on from its checkpoints. The message says why and what to do."""


class Checkpoints:
    """The steps of one run, in `directory`. Saves are asynchronous; a failed one raises at the next call.

    Every process makes one and calls it alike. Process 0 alone lists, renames and deletes, and the others take its
    answer: the view that another machine has of a shared directory may be seconds old.

    keep: so many of the newest steps stay, and the best by eval loss. keep_every: and every so many steps; 0: none.
    warn: is told what was set aside. kinds: what each array of the state is, for the record.
    """

    def __init__(
        self,
        directory: Path,
        keep: int = 1,
        keep_every: int = 0,
        warn: Callable[[str], None] = lambda _: None,
        kinds: Mapping[str, str] | None = None,
    ):
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs what is raised here with a better message
        self.directory, self._keep, self._keep_every, self._warn = directory, keep, keep_every, warn
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
        record = {**_make_record(step, arrays, self._kinds), "eval_loss": loss, "facts": facts or {}}
        if moved := agree.decided("room for a checkpoint", lambda: steps.make_room(self.directory / str(step))):
            self._warn(moved)
        try:
            saving = ocp.save_checkpointables_async(
                str((self.directory / str(step)).absolute()), {"state": _nested(arrays), "record": _Record(record)}
            )
        except Exception as error:  # Orbax raises what its storage raises, of many types
            raise self._failed(error) from error
        self._pending = self._background.submit(self._commit, saving, step)

    def _commit(self, saving: Any, step: int) -> list[int]:
        saving.result()
        if not agree.leader():
            return [step]
        if step not in self._on_disk():
            raise OSError(f"step {step} was written without an error, but it is not there")
        steps.rotate(self.directory, self._keep, self._keep_every, _eval_loss)
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
        self, abstract_state: Any, warn: Callable[[str], None], adapt: Callable[[dict, dict], Any] | None = None
    ) -> tuple[Any, int]:
        """The newest intact step, verified, in the shardings of `abstract_state`; and its number.

        adapt(saved arrays, wanted arrays) says how to make some of the wanted ones from others
        (parallel/strategies/resume.py); None: they must be the same.

        A damaged step is named, with its arrays, through `warn`, and the one before it is tried; once an intact one is
        found, those above it are set aside as N.damaged. Raises CheckpointError if none is intact, or if the arrays
        are another model's.
        """
        damaged: dict[int, str] = {}
        for step in reversed(agree.decided("steps to restore", self._on_disk)):
            state, problems = self._load(step, abstract_state, warn, adapt)
            if not problems:
                aside = lambda: [steps.set_aside(self.directory / str(step), steps.DAMAGED) for step in damaged]
                for moved in agree.decided("damaged steps set aside", aside):
                    warn(moved)
                return state, step
            damaged[step] = _damage(step, problems)
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
        adapted = adapt(record["arrays"], wanted) if adapt else None
        _check_same_arrays(step, record["arrays"], wanted, adapted)
        arrays, problems = {}, []
        for load, make in [(part.load, part.make) for part in adapted.steps] if adapted else [(wanted, dict)]:
            found, unread = _read(folder, record, load)
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


# ── the parameters of another run ────────────────────────────────────────────────────────────────────────────────


class Given(NamedTuple):
    params: Any
    step: int  # of the run that they are of
    digest: str  # as params_digest


def load_params(directory: Path, abstract: Any, warn: Callable[[str], None]) -> Given:
    """The parameters of the newest step in `directory` in which they are intact, verified, in the shardings of
    `abstract`. Nothing else is read, so a step may hold nothing else; and nothing is changed, for the run may go on.

    A step whose parameters are damaged is named through `warn`, and the one before it is tried. Raises UsageError where
    there is no step, or one of another model; CheckpointError where all are damaged.
    """
    wanted = named_arrays({"params": abstract})
    damaged: dict[int, str] = {}
    on_disk = agree.decided("steps to start from", lambda: steps.to_start_from(directory))
    while untried := [step for step in on_disk if step not in damaged]:
        step = untried[-1]
        arrays, digests, problems = _load_params(directory / str(step), wanted)
        if not problems:
            params = jax.tree.structure(abstract).unflatten([arrays[name] for name in wanted])
            return Given(params, step, fingerprint(named_arrays(params), digests))
        damaged[step] = _damage(step, problems)
        on_disk = agree.decided("steps to start from", lambda: steps.to_start_from(directory))
        if step in on_disk:  # else the run has deleted it meanwhile
            warn(f"{directory.parent}: {damaged[step]}")
    raise CheckpointError(
        f"init.workdir={directory.parent}: no checkpoint has intact parameters, so there is nothing to start from:\n  "
        + "\n  ".join(damaged.values())
    )


def _load_params(folder: Path, wanted: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """(arrays, the digest of each parameter by its name, problems of all processes). Format 1 named these as we do."""
    record = agree.decided("record of a checkpoint", lambda: read_record(folder))
    if record is None:
        return {}, {}, [NO_RECORD]
    saved = {name: x for name, x in record["arrays"].items() if name.startswith(PARAMS)}
    if rows := _differing(saved, wanted, sorted(saved.keys() | wanted.keys())):
        raise UsageError(f"init.workdir: {folder} holds another model than its config.json says:\n" + "\n".join(rows))
    arrays, problems = _read(folder, record, dict(wanted))
    return arrays, {name.removeprefix(PARAMS): x["digest"] for name, x in saved.items()}, problems


ARRAY = "array "  # begins what is wrong with one
NO_RECORD = "its record of digests is missing or damaged in both copies"


def _damage(step: int, problems: list[str]) -> str:
    """One sentence: what is wrong with many arrays is said once, with the first of them."""
    by_kind: dict[str, list[tuple[str, str]]] = {}
    for problem in problems:
        _, name, cause = problem.split(" ", 2) if problem.startswith(ARRAY) else ("", "", problem)
        by_kind.setdefault(re.sub(r"\d+", "", cause), []).append((name, cause))
    told = (_of_all([name for name, _ in same], same[0][1]) for same in by_kind.values())
    return f"checkpoint step {step} is corrupt: {'; '.join(told)}"


def _of_all(names: list[str], cause: str) -> str:
    if len(names) < 2:
        return f"{ARRAY}{names[0]} {cause}" if names[0] else cause
    listed = ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
    return f"each of {len(names)} arrays ({listed}) {cause}"


def _eval_loss(folder: Path) -> float | None:
    record = read_record(folder) or {}
    if "eval_loss" in record:
        return record["eval_loss"]
    try:  # a run that was begun before records had it
        return json.loads((folder / "metrics" / "metrics").read_bytes())["eval_loss"]
    except (OSError, ValueError, KeyError):
        return None


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


def _make_record(step: int, arrays: dict[str, jax.Array], kinds: Mapping[str, str]) -> dict[str, Any]:
    sums = jax.device_get(digest_all(arrays))
    described = {
        name: {
            "shape": list(x.shape),
            "dtype": str(x.dtype),
            "digest": to_hex(sums[name]),
            "kind": kinds.get(name, "shared"),
        }
        for name, x in arrays.items()
    }
    return {"format": 2, "step": step, "arrays": described}


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


def compare(record: dict[str, Any], arrays: dict[str, jax.Array]) -> list[str]:
    """One line for each loaded array whose digest is not the recorded one."""
    sums = jax.device_get(digest_all(arrays)) if arrays else {}
    return [
        f"{ARRAY}{name} does not have the digest that was recorded when it was saved"
        for name in arrays
        if to_hex(sums[name]) != record["arrays"][name]["digest"]
    ]


def _check_same_arrays(step: int, saved: dict[str, Any], wanted: dict[str, Any], adapted: Any) -> None:
    """Every wanted array can be made, and if none is adapted nothing is left."""
    rows = _differing(saved, wanted, adapted.missing if adapted else sorted(saved.keys() | wanted.keys()))
    if rows:
        raise CheckpointError(
            f"checkpoint step {step} is of another model or optimizer; {len(rows)} arrays differ:\n"
            + "\n".join(rows)
            + "\nUse the config it was made with (config.json in its workdir), or another --workdir."
        )


def _differing(saved: Mapping[str, Any], wanted: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """One line for each of these arrays that is not the same in both."""
    rows = []
    for name in names:
        ours = f"{list(wanted[name].shape)} {wanted[name].dtype}" if name in wanted else "absent"
        theirs = f"{saved[name]['shape']} {saved[name]['dtype']}" if name in saved else "absent"
        if ours != theirs:
            rows.append(f"  {name}: {theirs} in the checkpoint, {ours} in this config")
    return rows


def _read(folder: Path, record: dict[str, Any], load: dict[str, Any]) -> tuple[dict[str, jax.Array], list[str]]:
    """Arrays of a step by today's names, verified; and what is wrong."""
    known = record["arrays"]
    stored = {known[name].get("stored", name): name for name in load}
    lie = lambda name: (
        load[name] if known[name].get("fragments") is None else format1.as_stored(known[name], load[name])
    )
    found, problems = load_arrays(folder, {old: lie(name) for old, name in stored.items()})
    digests = {old: known[name] for old, name in stored.items()}
    problems += compare({"arrays": digests}, found)
    arrays = {stored[old]: x for old, x in found.items()}
    for name, x in arrays.items():
        if known[name].get("fragments") is not None:
            arrays[name] = format1.restack(x, known[name]["fragments"], load[name].sharding)
    return arrays, problems


def load_arrays(step_directory: Path, wanted: dict[str, Any]) -> tuple[dict[str, jax.Array], list[str]]:
    """Loads arrays by name; those that a process cannot read are left out in all and named. All processes load alike:
    Orbax numbers its operations, and a number that differs would keep the next save waiting for ever."""
    arrays, error = _try_load(step_directory, wanted)
    if not any(agree.everyone("arrays loaded", error)):
        return arrays, []
    arrays, failures = {}, {}  # which arrays are to blame is found out one by one
    for name, abstract in wanted.items():
        one, error = _try_load(step_directory, {name: abstract})
        arrays |= one
        if error:
            failures[name] = error
    problems = {}
    found_by = agree.everyone("arrays that cannot be read", failures)
    for process, found in enumerate(found_by):
        where = f"by process {process} " if len(found_by) > 1 else ""
        problems |= {name: f"{ARRAY}{name} cannot be read {where}({text})" for name, text in found.items()}
    return {name: x for name, x in arrays.items() if name not in problems}, list(problems.values())


def _try_load(step_directory: Path, wanted: dict[str, Any]) -> tuple[dict[str, jax.Array], str]:
    """The arrays, or the first line of why they could not be loaded. Waits for no other process."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    loading = ocp.options.PyTreeOptions.Loading(partial_load=True)
    try:
        with ocp.Context(pytree_options=ocp.options.PyTreeOptions(loading=loading), multiprocessing_options=alone):
            tree = ocp.load_checkpointables(str(step_directory.absolute()), {"state": _nested(wanted)})["state"]
    except Exception as error:  # Orbax raises what its storage raises, of many types
        return {}, _damaged_metadata(step_directory) or _first_cause(error)
    loaded = named_arrays(tree)
    return {name: loaded[name] for name in wanted}, ""


def _first_cause(error: BaseException) -> str:
    """What happened, below what Orbax tried and which layers TensorStore came through."""
    while below := error.__cause__ or error.__context__:
        error = below
    text = str(error).strip().splitlines()[0].partition(" [tensorstore_spec")[0]
    return re.sub(r'.* at local file "[^"]*": ', "", text)[:300]


def _damaged_metadata(step_directory: Path) -> str:
    """Which of the files that describe all arrays is no JSON any more: Orbax shows what it made of it instead."""
    for path in (step_directory / "state" / "_METADATA", step_directory / "_CHECKPOINT_METADATA"):
        try:
            json.loads(path.read_bytes())
        except (OSError, ValueError):
            return f"{path} is missing or damaged"
    return ""


# ── python -m runtime.checkpoint verify WORKDIR ──────────────────────────────────────────────────────────────────


def verify(workdir: Path) -> list[tuple[int, list[str]]]:
    """Reads every step of a run on this machine; [(step, problems)]."""
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    rows = []
    for step, folder in steps.committed(workdir / "checkpoints").items():
        problems = _all_problems(folder, device)
        if not problems or step in steps.committed(workdir / "checkpoints"):  # else a run has deleted it meanwhile
            rows.append((step, problems))
    return rows


def _all_problems(folder: Path, device: Any) -> list[str]:
    record = read_record(folder)
    if record is None:
        return [NO_RECORD]
    problems = []
    for name, x in record["arrays"].items():  # one array at a time: a model larger than this machine's memory
        abstract = jax.ShapeDtypeStruct(tuple(x["shape"]), np.dtype(x["dtype"]), sharding=device)
        arrays, unread = load_arrays(folder, {name: abstract})
        problems += unread + compare(record, arrays)
    return problems


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
    sys.exit(exits.guarded(lambda: main(sys.argv[1:]), "nothing was changed"))

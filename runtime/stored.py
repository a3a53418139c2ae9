"""One step on the disk, as Orbax stores it: its arrays by name, the record of their digests, and what is damaged.

Orbax commits a step atomically, but loads flipped bits without a word. So each step carries a record, written inside
the same commit: shape, dtype and a 128-bit digest of every array (runtime/digest.py), computed before the save and
computed again after the restore. The record is stored twice, each copy with a hash of its own, so that damage to the
record is told from damage to an array.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from runtime import agree, format1, format2, runs
from runtime.digest import digest_all, named_arrays, to_hex
from runtime.steps import COPIES

ARRAY = "array "  # begins what is wrong with one
NO_RECORD = "its record of digests is missing or damaged in both copies"

# ── what is written ──────────────────────────────────────────────────────────────────────────────────────────────


def make_record(step: int, arrays: dict[str, jax.Array], kinds: Mapping[str, str]) -> dict[str, Any]:
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
    return {"format": 3, "step": step, "arrays": described}


class Record:
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


def nested(arrays: dict[str, Any]) -> dict[str, Any]:
    """The tree that `named_arrays` has named."""
    tree: dict[str, Any] = {}
    for name, x in arrays.items():
        node = tree
        *folders, last = name.split("/")
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = x
    return tree


# ── what is read ─────────────────────────────────────────────────────────────────────────────────────────────────


def read_arrays(folder: Path, record: dict[str, Any], load: dict[str, Any]) -> tuple[dict[str, jax.Array], list[str]]:
    """Arrays of a step by today's names, verified; and what is wrong."""
    known = record["arrays"]
    stored = {known[name].get("stored", name): name for name in load}

    def as_it_lies(name: str) -> Any:
        if known[name].get("fragments") is not None:
            return format1.as_stored(known[name], load[name])
        if "layers_at" in known[name]:
            return runs.as_stored(known[name], load[name])
        return format2.as_stored(known[name], load[name]) if "further" in known[name] else load[name]

    found, problems = load_arrays(folder, {old: as_it_lies(name) for old, name in stored.items()})
    problems += wrong_digests({old: known[name] for old, name in stored.items()}, found)
    arrays = {stored[old]: x for old, x in found.items()}
    for name, x in arrays.items():
        if known[name].get("fragments") is not None:
            arrays[name] = format1.restack(x, known[name]["fragments"], load[name].sharding)
        elif "further" in known[name]:
            arrays[name] = format2.with_further(x, known[name]["further"], load[name].sharding)
        elif "layers_at" in known[name]:
            arrays[name] = runs.counted(x, load[name])
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
            tree = ocp.load_checkpointables(str(step_directory.absolute()), {"state": nested(wanted)})["state"]
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


# ── what is wrong ────────────────────────────────────────────────────────────────────────────────────────────────


def wrong_digests(recorded: Mapping[str, Any], arrays: dict[str, jax.Array]) -> list[str]:
    """One line for each loaded array whose digest is not the recorded one."""
    sums = jax.device_get(digest_all(arrays)) if arrays else {}
    return [
        f"{ARRAY}{name} does not have the digest that was recorded when it was saved"
        for name in arrays
        if to_hex(sums[name]) != recorded[name]["digest"]
    ]


def differing(saved: Mapping[str, Any], wanted: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """What is not the same in both: a line for all arrays that differ in one way, with the first of them."""
    by_kind: dict[tuple, list[str]] = {}
    for name in dict.fromkeys(names):
        theirs = (saved[name]["dtype"], f"{saved[name]['shape']} ") if name in saved else ("absent", "")
        ours = (str(wanted[name].dtype), f"{list(wanted[name].shape)} ") if name in wanted else ("absent", "")
        if ours != theirs:
            said = f"{name}: {theirs[1]}{theirs[0]} in the checkpoint, {ours[1]}{ours[0]} in this config"
            by_kind.setdefault((theirs[0], ours[0], theirs[1] == ours[1]), []).append(said)
    return [f"  {same[0]}" if len(same) == 1 else f"  {len(same)} arrays, as {same[0]}" for same in by_kind.values()]


def damage(step: int, problems: list[str]) -> str:
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

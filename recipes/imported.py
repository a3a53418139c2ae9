"""Weights of Hugging Face's into a workdir: a folder of theirs becomes a run that has made no step. Each array goes
from its file into the shards of this process's devices, one layer at a time."""

import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data import record
from data.template import KEPT
from data.tokenizer import from_text
from model import config_json, families, gguf, safetensors
from model.families import Family, Row
from model.parted import parted
from parallel.layout import mesh as meshes
from recipes import build, methods
from runtime import config as configuration
from runtime.config import UsageError, bad_input
from runtime.digest import named_arrays
from runtime.metrics import write_json

ABOUT = "imported.json"  # in the folder KEPT: dtypes and digests of what was imported
SMALL = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
         "added_tokens.json", "chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt")  # fmt: skip
LONGEST = 2048  # data.seq_len of what is imported: a model that was made for more can be trained on more
MOST_NAMED = 8  # weights of one kind, in a message

Entry = safetensors.Entry | gguf.Entry


@dataclass(frozen=True)
class Source:
    """A model of theirs. path: its folder, or its file. keys: ours, {key: value}. entries: {their name: where it lies}.
    files: {name: SHA-256}. small: {name of another file: its text}."""

    path: Path
    family: Family
    keys: dict[str, Any]
    entries: Mapping[str, Entry]
    files: dict[str, str]
    small: dict[str, str]


def open_source(path: Path) -> Source:
    """Reads no weight. Raises ValueError for what is no model, or one that we have not."""
    if path.is_file():
        theirs, entries, small = gguf.open_file(path)
    else:
        small = {name: (path / name).read_text() for name in SMALL if (path / name).is_file()}
        theirs, entries = _their_config(path, small), {}
    try:
        family, keys = config_json.read_config(theirs)
    except KeyError as error:
        raise ValueError(f"{path}: config.json says nothing of {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if "tokenizer.json" not in small:
        raise ValueError(
            f"{path} has no tokenizer.json: save it as transformers does, AutoTokenizer.from_pretrained(FOLDER)"
            ".save_pretrained(FOLDER)"
        )
    if path.is_dir():
        named = {_full_name(name, family): entry for name, entry in safetensors.folder(path).items()}
        entries = parted(named, family)
    used = sorted({entry.path for entry in entries.values()})
    return Source(path, family, keys, entries, {file.name: safetensors.sha256(file) for file in used}, small)


def _their_config(folder: Path, small: Mapping[str, str]) -> dict[str, Any]:
    if "config.json" not in small:
        raise ValueError(f"{folder} has no config.json: is it the folder of a model, or a .gguf file?")
    try:
        return json.loads(small["config.json"])
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'} is damaged ({error})") from error


def _full_name(name: str, family: Family) -> str:
    """Old files leave the prefix out."""
    return name if name.startswith((family.prefix, "lm_head.")) else family.prefix + name


def config_of(source: Source, batch_size: int) -> Any:
    """Ours, of a run that begins with these weights."""
    flat = configuration.base_values() | {k: v for k, v in source.keys.items() if k != "data.seq_len"}
    longest = source.keys["data.seq_len"]
    flat["data.seq_len"] = longest if flat["model.position"] == "learned" else min(longest, LONGEST)
    flat |= {"data.tokenizer": str(source.path), "data.batch_size": batch_size}
    config = configuration.nested(configuration.converted(flat, f"{source.path} has"))
    methods.validate(config)
    return config


# ── in ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_names(source: Source, config: Any) -> None:
    """Raises ValueError with all that is missing, more than known, or of another shape."""
    sizes = families.sizes(config.model, config.data.vocab_size, config.data.seq_len)
    wanted = {
        name: row.their_shape(sizes) for row in source.family.table(config.model) for name in row.places(config.model)
    }
    found = {name: e.shape for name, e in source.entries.items() if not re.search(source.family.buffers, name)}
    if config.model.tie_embeddings and "lm_head.weight" in found:
        _check_same(source.entries["lm_head.weight"], source.entries[source.family.rows[0].theirs])
        del found["lm_head.weight"]
    problems = {
        "are missing": sorted(wanted.keys() - found.keys()),
        f"are no weights of {source.family.name}": sorted(found.keys() - wanted.keys()),
        "have another shape": [
            f"{name} {list(found[name])} instead of {list(wanted[name])}"
            for name in sorted(wanted.keys() & found.keys())
            if found[name] != wanted[name]
        ],
    }
    lines = [f"  {len(names)} {what}: {_some(names)}" for what, names in problems.items() if names]
    if lines:
        raise ValueError("\n".join([f"{source.path} does not hold what its config.json says:", *lines]))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:MOST_NAMED]) + (", …" if len(names) > MOST_NAMED else "")


def _check_same(head: Entry, embed: Entry) -> None:
    """Raises ValueError for a head that is not the embedding, of a model that says it is."""
    rows, each = head.shape[0], 1024
    same = head.shape == embed.shape and all(
        np.array_equal(head.read((n, min(n + each, rows))), embed.read((n, min(n + each, rows))))
        for n in range(0, rows, each)
    )
    if not same:
        raise ValueError("config.json says tie_word_embeddings, and lm_head.weight is not the embedding")


def read_params(source: Source, config: Any, abstract: Any) -> Any:
    """The parameters, float32, in the shardings of `abstract`. The largest first: what is copied to a device is held
    twice for a moment. Raises ValueError for a weight that is not finite."""
    sizes = families.sizes(config.model, config.data.vocab_size, config.data.seq_len)
    rows = {row.ours: row for row in source.family.table(config.model)}
    wanted, found = named_arrays(abstract), {}
    for name in sorted(wanted, key=lambda name: -wanted[name].size):
        found[name] = _read_array(rows[name], config.model, wanted[name], source.entries, sizes)
    return jax.tree.structure(abstract).unflatten([found[name] for name in wanted])


def _read_array(row: Row, model: Any, like: Any, entries: Mapping[str, Entry], sizes: dict[str, int]) -> jax.Array:
    indices = like.sharding.addressable_devices_indices_map(like.shape)
    span = {device: tuple(s.indices(n)[:2] for s, n in zip(index, like.shape, strict=True)) for device, index in
            indices.items()}  # fmt: skip
    shards = {where: _aligned([b - a for a, b in where]) for where in span.values()}
    ours, stacks = row.our_dims.split(), row.stacks
    first = ours.index(row.first) if row.first in ours else None
    low, high = 0, sizes[row.first]
    if first is not None:  # of what lies outermost in the file only what this process needs
        own = [where[first + stacks] for where in shards]
        low, high = min(a for a, _ in own), max(b for _, b in own)
    for name, place in row.places(model).items():
        mine = {
            where: x for where, x in shards.items() if all(a <= i < b for i, (a, b) in zip(place, where, strict=False))
        }
        if not mine:
            continue
        entry = entries[name]
        each = entry.shape[0] // sizes[row.first] if entry.shape else 1
        x = entry.read((low * each, high * each)).astype(np.float32)
        if not np.isfinite(x).all():
            raise ValueError(f"{entry.path}: {name} is not finite everywhere")
        x = row.to_ours(x, sizes | {row.first: high - low})
        for where, shard in mine.items():
            outer, inner = where[:stacks], where[stacks:]
            cut = tuple(slice(a - low * (i == first), b - low * (i == first)) for i, (a, b) in enumerate(inner))
            shard[tuple(i - a for i, (a, _) in zip(place, outer, strict=True))] = x[cut]
    on_devices = [jax.device_put(shards[span[device]], device) for device in indices]
    return jax.make_array_from_single_device_arrays(like.shape, like.sharding, on_devices)


def _aligned(shape: Sequence[int]) -> np.ndarray:
    """Float32 as XLA:CPU takes it without a copy: at a multiple of 64 bytes."""
    size = 4 * math.prod(shape)
    buffer = np.empty(size + 64, np.uint8)
    first = -buffer.ctypes.data % 64
    return buffer[first : first + size].view(np.float32).reshape(shape)


def mesh_of_all() -> Any:
    """Weights are cut over every device: so many of a process's hold no more than its share."""
    base = configuration.nested(configuration.base_values())
    return meshes.build(meshes.fill_sizes(base.mesh, jax.device_count()))


def import_model(path: Path, workdir: Path, say: Callable[[str], None]) -> None:
    """Raises UsageError for bad input, before a weight is read. The workdir is there as a whole, or not at all."""
    from runtime.checkpoint import Checkpoints  # slow to import

    if workdir.exists() and any(workdir.iterdir()):
        raise UsageError(f"{workdir} is not empty: name a folder that there is not")
    with bad_input():
        source = open_source(path)
        mesh = mesh_of_all()
        config = config_of(source, mesh.size)
        check_names(source, config)
        tokenizer = _tokenizer(source, config)
    parts = build.build(config, mesh)
    say(f"{path}: {source.family.name}, {build.num_parameters(parts):,} parameters in {len(source.entries)} arrays")
    with bad_input():
        params = read_params(source, config, parts.state.params)
    workdir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{workdir.name}.", dir=workdir.parent) as made:
        at = Path(made) / "run"
        checkpoints = Checkpoints(at / "checkpoints", one_at_a_time=True)
        checkpoints.save(0, {"params": params}, None, _facts(source))
        checkpoints.finish()
        checkpoints.close()
        entry = record.entry(tokenizer, str(path))
        keys = {f"data.{key}": config.data[key] for key in ("eval_fraction", "text_key")}
        record.write(at, tokenizer, {"tokenizer": entry, "sources": []} | keys)
        write_json(at / "config.json", config.to_dict())
        write_json(at / "summary.json", {"imported": _facts(source)})
        _keep(source, at / KEPT)
        if workdir.exists():
            workdir.rmdir()
        at.rename(workdir)
    say(f"{workdir}: step 0, with the digest of every array; `--config.init.workdir={workdir}` begins with it")


def _tokenizer(source: Source, config: Any) -> Any:
    path = source.path / "tokenizer.json"
    tokenizer = from_text(source.small["tokenizer.json"], str(path))
    if tokenizer.vocab_size > config.data.vocab_size:
        raise ValueError(
            f"{path} has ids up to {tokenizer.vocab_size - 1}, and the embedding {config.data.vocab_size} rows: it is "
            "another model's tokenizer"
        )
    return tokenizer


def _facts(source: Source) -> dict[str, Any]:
    return {"from": str(source.path), "family": source.family.name, "sha256": source.files}


def _keep(source: Source, folder: Path) -> None:
    folder.mkdir()
    for name, text in source.small.items():
        (folder / name).write_text(text)
    dtypes = {name: str(entry.dtype) for name, entry in source.entries.items()}
    write_json(folder / ABOUT, _facts(source) | {"dtypes": dtypes})


def kept_of(workdir: Path) -> Path | None:
    """Their small files: of this run, or of the one that it began with."""
    while not (workdir / KEPT / ABOUT).is_file():
        began = configuration.read_json(workdir).init.workdir if (workdir / "config.json").is_file() else ""
        if not began:
            return None
        workdir = Path(began)
    return workdir / KEPT


def carry(origin: Path, workdir: Path) -> None:
    """A run that begins with another's parameters keeps the small files, too: it can be talked to, exported and tuned
    again without that one."""
    kept = kept_of(origin)
    if kept:
        shutil.copytree(kept, workdir / KEPT, dirs_exist_ok=True)

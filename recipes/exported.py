"""The parameters of a run as a folder of Hugging Face's, one array after another."""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from model import config_json, families, peft, safetensors
from model.families import Family, Row
from recipes import build, parameters
from recipes.imported import ABOUT, SMALL, kept_of, mesh_of_all
from runtime import config as configuration
from runtime.config import UsageError, bad_input
from runtime.digest import named_arrays
from runtime.metrics import write_json

SHARD = 5 * 10**9  # bytes of a file
EVERYWHERE = {"tokenizer_class": "PreTrainedTokenizerFast"}  # a class that transformers 4 and 5 have
OF_MODEL = ("config.json", "generation_config.json")  # of SMALL; the others are the tokenizer's

Say = Callable[[str], None]


def export_folder(workdir: Path, folder: Path, dtype: str, say: Say) -> None:
    """The newest parameters of a run, as a folder of theirs; an adapter is merged. dtype: of the weights; "": of each
    as it was imported, float32 where it was not. Raises UsageError."""
    config, family, parts = _opened(workdir, folder)
    given = parameters.read(workdir, parts.task.axes, parts.state.params, say)
    kept = kept_of(workdir)
    was = _read_json(kept / ABOUT).get("dtypes", {}) if kept else {}
    named = lambda name: np.dtype(safetensors.DTYPES[safetensors.NAMES[dtype or was.get(name, "float32")]])
    with _made(folder) as at:
        _write_weights(at, family, config, named_arrays(given.params), named)
        _write_small(at, family, config, kept, dtype or _most(was.values()))
        _write_tokenizer(at, kept, workdir)
    say(f"{folder}: {family.architecture}, the parameters of step {given.step} of {workdir}")


def export_adapter(workdir: Path, folder: Path, say: Say) -> None:
    """The newest adapter of a run, float32, as a folder that PEFT loads. Raises UsageError."""
    config, family, parts = _opened(workdir, folder)
    if not config.lora.rank:
        raise UsageError(f"{workdir} has trained all of its weights and no adapter: leave --adapter out")
    lora, given = parameters.read_adapter(workdir, parts.task.axes, parts.state.params, say)
    kept = kept_of(workdir)
    base = _read_json(kept / ABOUT)["from"] if kept else config.init.workdir
    with bad_input():
        found = peft.arrays(family, config, lora, given.params, given.fixed)
    with _made(folder) as at:
        shapes = {name: (np.dtype(np.float32), x.shape) for name, x in found.items()}
        safetensors.write(at / peft.WEIGHTS, shapes, (np.asarray(x) for x in found.values()))
        write_json(at / peft.CONFIG, peft.config(family, config, list(found), base))
        _write_tokenizer(at, kept, workdir)
    say(f"{folder}: an adapter of rank {lora.rank} for {base}, of step {given.step} of {workdir}")


def _opened(workdir: Path, folder: Path) -> tuple[Any, Family, build.Parts]:
    """Of a run: (its config, whose it is, the parts of its model alone)."""
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty: name a folder that there is not")
    if not (workdir / "config.json").is_file():
        raise UsageError(f"{workdir} has no config.json: is it the workdir of a run?")
    config = configuration.read_json(workdir)
    with bad_input():
        family = families.of(config.model)
    mesh = mesh_of_all()
    return config, family, build.build(_laid_over(config, mesh.size), mesh)


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[Path]:
    """A folder to write into: it is there as a whole afterwards, or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as made:
        at = Path(made) / "out"
        at.mkdir()
        yield at
        if folder.exists():
            folder.rmdir()
        at.rename(folder)


def _laid_over(config: Any, devices: int) -> Any:
    """Whatever mesh and exchange the run had: only its parameters are wanted."""
    flat, base = dict(configuration.flatten(config)), configuration.base_values()
    others = ("lora.", "sync.", "mesh.", "optimizer.accumulate")
    flat |= {key: x for key, x in base.items() if key.startswith(others)}
    return configuration.nested(flat | {"data.batch_size": devices})


def _most(dtypes: Any) -> str:
    """The dtype of most weights."""
    found = list(dtypes)
    return max(set(found), key=found.count) if found else "float32"


def _write_weights(folder: Path, family: Family, config: Any, params: Mapping[str, jax.Array], dtype_of: Any) -> None:
    sizes = families.sizes(config.model, config.data.vocab_size, config.data.seq_len)
    of_name: dict[str, list[Row]] = {}  # several where theirs is one array of several of ours
    place_of = {}
    for row in family.table(config.model):
        for name, place in row.places(config.model).items():
            of_name.setdefault(name, []).append(row)
            place_of[name] = place
    shapes = {name: (dtype_of(name), rows[0].their_shape(sizes)) for name, rows in of_name.items()}

    def arrays(names: Sequence[str]) -> Iterator[np.ndarray]:
        for name in names:
            ours = [np.asarray(_one(params[row.ours], place_of[name])) for row in of_name[name]]
            x = np.stack(ours) if len(ours) > 1 else ours[0]
            yield of_name[name][0].to_theirs(x, sizes).astype(shapes[name][0])

    bytes_of = {name: int(np.prod(shape)) * dtype.itemsize for name, (dtype, shape) in shapes.items()}
    files = list(safetensors.split(bytes_of, SHARD))
    title = lambda i: f"model-{i + 1:05}-of-{len(files):05}.safetensors" if len(files) > 1 else safetensors.SINGLE
    for i, names in enumerate(files):
        safetensors.write(folder / title(i), {name: shapes[name] for name in names}, arrays(names))
    if len(files) > 1:
        where = {name: title(i) for i, names in enumerate(files) for name in names}
        index = {"metadata": {"total_size": sum(bytes_of.values())}, "weight_map": where}
        write_json(folder / safetensors.INDEX, index)


@jax.jit
def _one(x: jax.Array, place: tuple[int, ...]) -> jax.Array:
    """Of stacked arrays."""
    for number in place:
        x = jax.lax.dynamic_index_in_dim(x, number, keepdims=False)
    return x


def _write_small(folder: Path, family: Family, config: Any, kept: Path | None, dtype: str) -> None:
    """config.json in both spellings, and what else they had of the model."""
    for name in OF_MODEL:
        if kept and (kept / name).is_file():
            shutil.copyfile(kept / name, folder / name)
    before = _read_json(folder / "config.json") if kept else {}
    longest = {key: before[key] for key in ("max_position_embeddings", "n_positions") if key in before}
    write_json(folder / "config.json", before | config_json.write_config(family, config, dtype) | longest)


def _write_tokenizer(folder: Path, kept: Path | None, workdir: Path) -> None:
    """Their files; where they gave none, what loads on every version."""
    for name in SMALL:
        if kept and name not in OF_MODEL and (kept / name).is_file():
            shutil.copyfile(kept / name, folder / name)
    described = folder / "tokenizer_config.json"
    if described.is_file() and _read_json(described).get("tokenizer_class") == "TokenizersBackend":
        write_json(described, _read_json(described) | EVERYWHERE)  # of transformers 5; no 4 knows it
    if not kept and (workdir / "tokenizer.json").is_file():
        shutil.copyfile(workdir / "tokenizer.json", folder / "tokenizer.json")
        write_json(described, EVERYWHERE)


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())

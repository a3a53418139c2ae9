"""What a Python session needs and a command line does not: configs from names and changes, devices that may have been
asked for before, Ctrl-C that ends at the border of a call. All else is the command line's (slackline.py)."""

import math
import signal
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from jax.extend import backend
from jax.sharding import Mesh
from ml_collections import ConfigDict

from data import record
from data.corpus import cache_directory
from parallel.layout import mesh as meshes
from recipes import methods, programs
from runtime import config as configuration
from runtime.config import UsageError, bad_input
from runtime.console import Console
from runtime.workdir import Workdir

CONFIGS = Path(__file__).parent.parent / "configs"


# ── config ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def folder(workdir: str | Path | None) -> str | None:
    with bad_input():
        return configuration.local_path("workdir", str(workdir)) if workdir else None


@dataclass(frozen=True)
class Asked:
    """What a call asks for. notes: what was changed without being asked for. file: the names in the config's file: a
    comparison has ROWS and SEEDS there."""

    name: str
    config: Any
    own: methods.Own
    notes: list[str]
    file: dict[str, Any]


def configure(config: Any, changes: Mapping[str, Any], workdir: str | None = None) -> Asked:
    """config: the name of one in configs/, the path of a file, or a ConfigDict. changes: {key: value}; a dictionary
    changes the keys of its group; names may be dotted; sync.codec may be an object, sync.strategy a class, optimizer an
    optax transformation, and task a Task.

    Raises UsageError as the command line does; for a workdir whose run had an object that is not given.
    """
    name, before, file = _start(config)
    values, own = methods.apart(changes)
    typed = configuration.converted(values, "the call sets")
    if own.task:
        methods.check_unread(own.task, typed)
        before |= {"sample.tokens": 0, "model.num_layers": own.task.layers()}
    before |= {"optimizer.warmup_steps": 0} if own.optimizer else {}
    flat, notes, wrong = configuration.override(before, typed, workdir, methods.known(own))
    if wrong:
        raise UsageError("\n".join(wrong))
    if workdir and (Path(workdir) / "config.json").is_file():
        check_given(Path(workdir), own)
    found = configuration.nested(flat)
    methods.validate(found, own)
    return Asked(name, found.lock(), own, notes, file)


def check_given(workdir: Path, own: methods.Own, needed: Collection[str] = ("task", "optimizer")) -> None:
    """Raises UsageError where the run in this workdir has such an object of a caller's, and none is given."""
    now = own.describe()
    for key, x in configuration.objects_of(workdir).items():
        if key in needed and key not in now:
            fields = ", ".join(f"{name} {value}" for name, value in x["fields"].items() if "." in value)
            raise UsageError(
                f"{workdir} holds a run with an object of its own: pass {key}= again, {x['class']} ({fields})"
            )


def _start(config: Any) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """(its name, its values, the names in its file)."""
    if isinstance(config, ConfigDict):
        return "config", dict(configuration.flatten(configuration.checked(config, "this config"))), {}
    path = _file(config)
    found, file = configuration.execute(str(path))
    return path.stem, dict(configuration.flatten(found)), file


def _file(config: Any) -> Path:
    if not isinstance(config, str | Path):
        raise UsageError(f"config={config!r}: expected the name of a config, its path, or a ConfigDict")
    known = CONFIGS / f"{config}.py"
    path = known if known.is_file() else Path(configuration.expand_home(str(config)))
    if not path.is_file():
        files = sorted(file.relative_to(CONFIGS).with_suffix("") for file in CONFIGS.rglob("*.py"))
        names = ", ".join(str(name) for name in files if name.name not in ("__init__", "base"))
        raise UsageError(f"config={str(config)!r} is neither a file nor one of {names}")
    return path


def tell_changed(workdir: Workdir, own: methods.Own, console: Console) -> None:
    """Says which objects are not those with which the run in this workdir was made."""
    before = configuration.objects_of(workdir.path) if workdir.resuming else {}
    for key, now in own.describe().items():
        if key in before and before[key] != now:
            console.warn(f"{key}: {now['class']} is not what this run was made with: its fields or its source differ")


def alone(config: Any) -> Any:
    """A run's config, of which only the parameters are wanted: one device, nothing exchanged."""
    flat, base = dict(configuration.flatten(config)), configuration.base_values()
    flat |= {key: x for key, x in base.items() if key.startswith(("lora.", "sync.")) or key == "optimizer.name"}
    return configuration.nested(flat | {key: 1 for key in base if key.startswith("mesh.")})


def tokenizer_of(workdir: Path, data: Any) -> Any:
    """That of the run in this workdir. data: its config's group. Raises UsageError where it keeps none."""
    with bad_input():
        kept = record.read(workdir, data.tokenizer)
        if kept is None:
            raise UsageError(f"workdir={workdir}: this run keeps no tokenizer, as those of earlier releases")
        return record.tokenizer_of(workdir, kept, data.tokenizer, data.end_of_document, accept=True)


class Text(str):
    """Shown as it is, not as a literal of Python."""

    def __repr__(self) -> str:
        return str(self)


# ── devices ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def mesh_of(config: Any, simulate: int | None) -> Mesh:
    """The mesh of a config, over the first devices that it needs.

    simulate: so many simulated CPU devices. Without it a CPU has as many as the mesh needs, an axis of -1 counting as
    1: what was simulated before makes no difference. Where there are fewer, they are made anew: arrays from before
    stay readable. Raises UsageError for a mesh that does not fit, or where this process computes on an accelerator
    already.
    """
    with bad_input():
        sizes = [size for size in config.mesh.values() if size != -1]
        need, is_whole = max(1, math.prod(sizes)), len(sizes) == len(config.mesh)
        found = _devices(simulate, need)[: need if is_whole else None]
        mesh = meshes.build(meshes.fill_sizes(config.mesh, len(found)), found)
    programs.use_compilation_cache(cache_directory())
    return mesh


def devices(simulate: int | None, replicas: int) -> list[Any]:
    """For a comparison: all that there are; on a CPU those that are simulated, or one for each replica."""
    return _devices(simulate, max(1, replicas))


def _devices(simulate: int | None, need: int) -> list[Any]:
    """All of an accelerator's; on a CPU the first `simulate`, or the first that are needed."""
    meshes.take_gpu_memory()
    count = simulate or need
    if simulate:
        try:
            meshes.simulate(simulate)
        except RuntimeError:  # devices were asked for before
            if jax.default_backend() != "cpu" or jax.process_count() > 1:
                raise UsageError(
                    f"simulate={simulate}: this process computes on {jax.devices()[0].device_kind} already. Simulate "
                    "in a new one (in a notebook: restart the session), or leave simulate out"
                ) from None
    if jax.default_backend() != "cpu" or jax.process_count() > 1:
        return jax.devices()
    if len(jax.devices()) < count:
        backend.clear_backends()
        meshes.simulate(count)
    return jax.devices()[:count]


# ── Ctrl-C ────────────────────────────────────────────────────────────────────────────────────────────────────────────


class Interrupt:
    """Ctrl-C while training: it ends at the border of a call, saved; a second one ends it at once. As the notice of
    `fit.train`. Only the main thread hears of signals."""

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    def training_begins(self, step: int) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True

    def requested(self, step: int) -> bool:
        return self._asked

    def close(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

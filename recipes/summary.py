"""`--save=DIR`: what was compiled for a target, as text and as numbers."""

import dataclasses
import gzip
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from parallel.cost.targets import Target
from parallel.layout.axes import shown
from recipes import aot
from recipes.aot import Reading
from recipes.build import Parts
from recipes.verdict import Remedy
from runtime.config import bad_input
from runtime.metrics import write_json


def folder(path: str) -> Path:
    """It is made. Raises UsageError."""
    with bad_input():
        found = Path(path).expanduser()
        found.mkdir(parents=True, exist_ok=True)
        return found


def keep(folder: Path, program: str, text: str) -> None:
    """PROGRAM.hlo.txt.gz."""
    (folder / f"{program.replace(' ', '_')}.hlo.txt.gz").write_bytes(gzip.compress(text.encode(), 4))


def write(folder: Path, about: dict[str, Any]) -> None:
    """summary.json. about: of `describe`."""
    write_json(folder / "summary.json", about)


def describe(
    target: Target, parts: Parts, readings: Mapping[str, Reading], remedies: Sequence[Remedy], compiler: str
) -> dict[str, Any]:
    """What summary.json says: bytes and FLOPs per device and run of a program; null where a compiler did not say."""
    worst = aot.worst(readings)[1].peak_bytes
    return {
        "target": {
            "name": target.text,
            "chip": target.chip.name,
            "chips": target.chips,
            "slices": target.slices,
            "hosts": target.hosts,
            "memory_bytes": target.chip.memory,
            "usable_bytes": target.memory,
            "wrap": list(target.wrap),
        },
        "mesh": shown(parts.mesh.shape),
        "versions": {"jax": importlib.metadata.version("jax"), "compiler": compiler},
        "fits": worst <= target.memory,
        "spare_bytes": target.memory - worst,
        "remedies": [dataclasses.asdict(remedy) for remedy in remedies],
        "programs": {name: _program(reading) for name, reading in readings.items()},
    }


def _program(reading: Reading) -> dict[str, Any]:
    found = dataclasses.asdict(reading)
    found["wire"] = [sent._asdict() for sent in reading.wire]
    del found["stray"]
    return {key: value for key, value in found.items() if value or key not in ("not_counted", "read_from")}

"""`--save=DIR`: what was compiled for a target, as text and as numbers."""

import dataclasses
import gzip
import importlib.metadata
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from parallel.cost.targets import Target
from recipes import aot
from recipes.aot import Reading, Refused
from recipes.build import Parts
from recipes.verdict import Remedy


def save(
    folder: str,
    target: Target,
    parts: Parts,
    programs: Mapping[str, Any],
    readings: Mapping[str, Reading],
    remedies: Sequence[Remedy],
    compiler: str,
) -> None:
    """DIR/PROGRAM.hlo.txt.gz of each program that was not refused, and DIR/summary.json. Raises OSError."""
    path = Path(folder).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    for name, program in programs.items():
        if not isinstance(program, Refused):
            with gzip.open(path / f"{name.replace(' ', '_')}.hlo.txt.gz", "wt", compresslevel=4) as file:
                file.write(program.as_text())
    (path / "summary.json").write_text(
        json.dumps(describe(target, parts, readings, remedies, compiler), indent=1) + "\n"
    )


def describe(
    target: Target, parts: Parts, readings: Mapping[str, Reading], remedies: Sequence[Remedy], compiler: str
) -> dict[str, Any]:
    """What summary.json says: bytes and FLOPs per device and run of a program; null where a compiler did not say."""
    worst = aot.worst(readings)[1].peak_bytes
    return _finite(
        {
            "target": {
                "name": target.text,
                "chip": target.chip.name,
                "chips": target.chips,
                "slices": target.slices,
                "hosts": target.hosts,
                "memory_bytes": target.memory,
                "wrap": list(target.wrap),
            },
            "mesh": dict(parts.mesh.shape),
            "versions": {"jax": importlib.metadata.version("jax"), "compiler": compiler},
            "fits": worst <= target.memory,
            "spare_bytes": target.memory - worst,
            "remedies": [dataclasses.asdict(remedy) for remedy in remedies],
            "programs": {name: _program(reading) for name, reading in readings.items()},
        }
    )


def _program(reading: Reading) -> dict[str, Any]:
    found = dataclasses.asdict(reading)
    found["wire"] = [sent._asdict() for sent in reading.wire]
    return {key: value for key, value in found.items() if value or key not in ("not_counted", "read_from")}


def _finite(x: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(x, Mapping):
        return {key: _finite(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x

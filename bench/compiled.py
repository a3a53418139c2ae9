"""Programs compiled for chips that are not here, each kept in runs/compiled/ under the digest of what was lowered and
of the compiler, its version and options: what has not changed is not compiled again, and is read anew in seconds."""

import gzip
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import common

FOLDER = common.ROOT / "runs" / "compiled"
SIZES = ("temp_size_in_bytes", "argument_size_in_bytes", "output_size_in_bytes", "alias_size_in_bytes")
PEAK, HOST = "peak_memory_in_bytes", "host_temp_size_in_bytes"


@dataclass(frozen=True)
class Kept:
    """Stands for JAX's compiled program in what recipes/aot.py reads."""

    text: str
    sizes: dict[str, int]

    def as_text(self) -> str:
        return self.text

    def memory_analysis(self) -> Any:
        return _Sizes(**self.sizes)


@dataclass(frozen=True)
class _Sizes:
    temp_size_in_bytes: int
    argument_size_in_bytes: int
    output_size_in_bytes: int
    alias_size_in_bytes: int
    peak_memory_in_bytes: int
    host_temp_size_in_bytes: int = 0  # which was not kept from the beginning


def compiled(lowered: Any, parts: Any, compiler: str) -> tuple[Any, str]:
    """(the program, or aot.Refused; the digest that it is kept under). compiler: its package and version."""
    from recipes import aot

    text = lowered.as_text() + json.dumps([compiler, sorted(parts.xla_options.items()), os.environ.get("XLA_FLAGS")])
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    about = FOLDER / f"{digest}.json"
    if about.exists():
        found = json.loads(about.read_text())
        return aot.Refused(**found) if "sentence" in found else Kept(_read(digest), found), digest
    program = aot.compiled(lambda: lowered, parts.xla_options)
    FOLDER.mkdir(parents=True, exist_ok=True)
    if isinstance(program, aot.Refused):
        found = {"sentence": program.sentence, "temporaries": program.temporaries}
    else:
        _text(digest).write_bytes(gzip.compress(program.as_text().encode(), 4))
        analysis = program.memory_analysis()
        found = {name: getattr(analysis, name) for name in (*SIZES, PEAK, HOST)}
    new = about.with_suffix(".new")  # which is there only once the text is
    new.write_text(json.dumps(found))
    new.replace(about)
    return (program if isinstance(program, aot.Refused) else Kept(_read(digest), found)), digest


def _text(digest: str) -> Path:
    return FOLDER / f"{digest}.hlo.txt.gz"


def _read(digest: str) -> str:
    return gzip.decompress(_text(digest).read_bytes()).decode()

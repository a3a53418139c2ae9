"""Files of Hugging Face's in which a layer's experts are one array, gate and up in one: as transformers 5 holds them,
and saves them with save_original_format=False."""

import itertools
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from model.families import EXPERT, Family

_GATE = re.compile(r"model\.layers\.(?P<layer>\d+)\.mlp\.gate\.weight$")
_FUSED = re.compile(r"model\.layers\.(?P<layer>\d+)\.mlp\.experts\.(?P<what>gate_up|down)_proj$")


def parted(entries: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """An entry for each of their experts, by its usual name. entries: by theirs."""
    found = dict(entries)
    if not family.is_routed:
        return found
    router = next(row for row in family.rows if row.ours.endswith("/router"))
    for name, entry in entries.items():
        if gate := _GATE.match(name):
            found[router.theirs.format(layer=gate["layer"])] = found.pop(name)
        if not (fused := _FUSED.match(name)) or len(entry.shape) != 3:
            continue
        del found[name]
        experts, rows, columns = entry.shape
        gate, up, down = (row for row in family.rows if EXPERT in row.theirs)
        parts = [gate, up] if fused["what"] == "gate_up" else [down]
        size = rows // len(parts)
        each = size * columns * entry.dtype.itemsize
        for number, (expert, row) in enumerate(itertools.product(range(experts), parts)):
            part = {"shape": (size, columns), "start": entry.start + number * each}
            found[row.theirs.format(layer=fused["layer"], expert=expert)] = replace(entry, **part)
    return found

"""Reads every checkpoint of a run and lists what is damaged. Nothing is changed.

python -m runtime.checkpoint verify runs/mine
"""

import logging
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from runtime import steps, usage
from runtime.steps import read_record
from runtime.stored import NO_RECORD, damage, load_arrays, wrong_digests


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
        problems += unread + wrong_digests(record["arrays"], arrays)
    return problems


def sources(workdir: Path, step: int) -> dict[str, str]:
    """{file: SHA-256} of the files that a step was imported from."""
    record = read_record(steps.committed(workdir / "checkpoints")[step]) or {}
    return record.get("facts", {}).get("sha256", {})


def main(argv: list[str]) -> int:
    parser = usage.parser(__doc__, "python -m runtime.checkpoint")
    parser.add_argument("verify", choices=["verify"], metavar="verify", help="what is to be done")
    parser.add_argument("workdir", type=Path, metavar="WORKDIR", help="of the run")
    workdir = parser.parse_args(argv).workdir
    if not (workdir / "checkpoints").is_dir():
        print(f"error: {workdir} has no checkpoints/ folder: is it the workdir of a run?", file=sys.stderr)
        return 2
    jax.config.update("jax_platforms", "cpu")
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs what is said here in a sentence
    rows = verify(workdir)
    for step, problems in rows:
        print(f"step {step}: intact" if not problems else damage(step, problems))
        for name, digest in sources(workdir, step).items():
            print(f"  from {name}, SHA-256 {digest}")
    if not rows:
        print(f"{workdir} has no committed checkpoint")
    return 1 if any(problems for _, problems in rows) or not rows else 0

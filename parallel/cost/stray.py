"""What crosses `replica` in a compiled program and is not ours: nothing may, but the exchange and a few named scalars.

XLA lays out what nobody has laid out, and may move it over any axis, the slow one too: to reshard a gather, say. So
every program is read before it runs. What is sent over `replica` in it is what the exchange's closed form predicts
(parallel/cost/bytes.py), plus scalars under a name that begins with `scalars_`; anything more is stray.
"""

from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from parallel.cost import wire
from parallel.cost.hlo import Program
from parallel.layout.axes import SLOW

SCALARS = 4096  # bytes that a few scalars take at most; a TPU widens them to its lanes
TILE = 8192  # bytes by which a TPU widens a short message at most


@dataclass(frozen=True)
class Traffic:
    """Of one compiled program. not_counted: why the counter gave up; then the rest says nothing."""

    per_axis: dict[str, int]  # bytes that one device sends in a call
    stray: int = 0  # of those over `replica`, bytes that are not ours
    culprits: str = ""  # the collectives that send them, with their source lines
    not_counted: str = ""


def traffic(program: Any, mesh: Mesh, predicted: float) -> Traffic:
    """Reads a compiled program. predicted: bytes that one device sends over `replica` in a call, without scalars.

    Never raises: a compiler whose text is not understood is no reason not to train.
    """
    try:
        read = Program.read(program.as_text())
        found = wire.collectives(read, mesh)
    except Exception as error:  # whatever a text of unknown form does to a parser
        sentence = str(error).partition("\n")[0][:200]
        return Traffic({}, not_counted=f"not counted: {type(error).__name__}: {sentence}")
    per_axis = {axis: round(sum(c.sent for c in found if c.axis == axis)) for axis in mesh.axis_names}
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    scalars = lambda c: c.sent <= SCALARS and ("scalars_" in c.scope or (on_tpu and not c.scope))  # a TPU drops names
    slow = [c for c in found if c.axis == SLOW and not scalars(c)]
    foreign = [c for c in slow if "exchange/" not in c.scope]
    widened = TILE * (len(slow) - len(foreign)) if on_tpu else 0
    excess = round(sum(c.sent for c in slow) - predicted)
    if excess <= widened:
        return Traffic(per_axis)
    largest = sorted(foreign or slow, key=lambda c: -c.sent)[:4]
    return Traffic(per_axis, excess, "; ".join(_described(c, read) for c in largest))


def _described(c: wire.Collective, read: Program) -> str:
    source = next(read.stack(int(c.frame or 0)), "")
    return (
        f"{c.kind} of {c.dtype}, {c.sent:,.0f} bytes, from {c.scope or 'no named operation'}{source and f' ({source})'}"
    )

"""A picture of how a run's arrays lie on its mesh: a row for each kind of array, a bar for each of its dimensions, cut
as the rules cut it (parallel/layout/rules.py). What the first device has of it is filled."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax.tree_util import keystr, tree_leaves_with_path

from parallel.layout import rules
from parallel.layout.axes import AXES, SLOW
from recipes.build import Parts
from recipes.memory import tree_bytes
from runtime.console import human_bytes

INK, MUTED, EMPTY = "#1f2430", "#6b7280", "#e5e7eb"
COLORS = dict(zip(AXES, ("#b45309", "#6f4bb8", "#0072b2", "#009e73", "#cc79a7", "#d55e00"), strict=True))
PIECES = 64  # that a bar shows at most
ROW, BAR, WIDTH, NAMES, SHARES = 0.7, 0.26, 2.2, 3.3, 1.9  # inches
# Between blocks, and inside of attention.
ACTIVATIONS = {
    "between blocks": ("batch", "sequence", "model"),
    "queries": ("batch", "positions", "heads", "head_dim"),
}


class Array(NamedTuple):
    """names: of all that lie alike, the first of them told. cuts: of each dimension, the mesh axes."""

    names: list[str]
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    cuts: tuple[tuple[str, ...], ...]
    bytes: int


def draw(config: Any, parts: Parts, path: Path) -> None:
    """A PNG, of a language model's run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sizes = dict(parts.mesh.shape)
    found = [*weights(parts, sizes), *activations(config, sizes)]
    columns = max(len(array.dims) for array in found)
    width, height = NAMES + columns * WIDTH + SHARES, (len(found) + 2) * ROW
    figure = Figure(figsize=(width, height), dpi=80, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width), axes.set_ylim(-height + ROW, ROW)
    axes.axis("off")
    _head(axes, sizes, NAMES + columns * WIDTH)
    for i, array in enumerate(found):
        _row(axes, -(i + 1) * ROW, array, sizes, columns)
    figure.savefig(path, format="png")


def weights(parts: Parts, sizes: Mapping[str, int]) -> list[Array]:
    """Of each way to lie the largest, in the model's order; what is not cut is left out."""
    task: Any = parts.task
    axes = dict(tree_leaves_with_path(task.axes, is_leaf=lambda x: isinstance(x, tuple)))
    found: dict[tuple, Array] = {}
    for path, x in tree_leaves_with_path(parts.state.params):
        own = tuple(axes[path])
        cuts = tuple(_several(rules.over(own, i), sizes) for i in range(len(own)))
        name, bytes_ = keystr(path, simple=True, separator="/"), tree_bytes(x, sizes)
        shape = x.shape[len(x.shape) - len(own) :]
        if any(cuts) and (own, shape) in found:
            found[own, shape].names.append(name)
        elif any(cuts):
            found[own, shape] = Array([name], own, shape, cuts, bytes_)
    return list(found.values())


def activations(config: Any, sizes: Mapping[str, int]) -> list[Array]:
    rows = config.data.batch_size // (sizes[SLOW] * config.optimizer.accumulate)
    size = {
        "batch": rows, "sequence": config.data.seq_len, "positions": config.data.seq_len, "model":
        config.model.model_dim, "heads": config.model.num_heads, "head_dim": config.model.head_dim,
    }  # fmt: skip
    found = []
    for name, dims in ACTIVATIONS.items():
        cuts = tuple(_several(rules.RULES.get(dim, ()), sizes) for dim in dims)
        found.append(Array([f"{name}, of a micro-step"], dims, tuple(size[dim] for dim in dims), cuts, 0))
    return found


def _several(axes: Sequence[str], sizes: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(axis for axis in axes if sizes[axis] > 1)


def _head(axes: Any, sizes: Mapping[str, int], end: float) -> None:
    x = 0.25
    axes.text(x, ROW / 2, "cut over", fontsize=11, color=INK, va="center")
    axes.text(end, ROW / 2, "on each device", fontsize=11, color=INK, va="center")
    for axis in (axis for axis in AXES if sizes[axis] > 1 and axis != SLOW):
        x += 1.35
        axes.add_patch(_box(x, ROW / 2 - 0.09, 0.18, 0.18, COLORS[axis], COLORS[axis]))
        axes.text(x + 0.26, ROW / 2, f"{axis} {sizes[axis]}", fontsize=11, color=INK, va="center")


def _row(axes: Any, y: float, array: Array, sizes: Mapping[str, int], columns: int) -> None:
    more = f", and {len(array.names) - 1} alike" if len(array.names) > 1 else ""
    axes.text(0.25, y + 0.06, array.names[0].removeprefix("blocks/"), fontsize=10.5, color=INK, va="bottom")
    axes.text(0.25, y + 0.02, f"{list(array.shape)}{more}", fontsize=8.5, color=MUTED, va="top")
    for i, (dim, size, cut) in enumerate(zip(array.dims, array.shape, array.cuts, strict=True)):
        x, parts = NAMES + i * WIDTH, rules.shards(cut, sizes)
        axes.text(x, y + BAR / 2 + 0.05, f"{dim or 'whole'} {size}", fontsize=8.5, color=INK, va="bottom")
        _bar(axes, x, y - BAR / 2, WIDTH - 0.3, cut, sizes)
        if parts > 1:
            over = " × ".join(cut)
            axes.text(x, y - BAR / 2 - 0.03, f"÷ {parts}: {over}", fontsize=7.5, color=MUTED, va="top")
    share = f"1 / {rules.shards([axis for cut in array.cuts for axis in cut], sizes)}"
    beside = f": {human_bytes(array.bytes)}" if array.bytes else ""
    axes.text(NAMES + columns * WIDTH, y, f"{share}{beside}", fontsize=9.5, color=INK, va="center")


def _bar(axes: Any, x: float, y: float, width: float, cut: Sequence[str], sizes: Mapping[str, int]) -> None:
    """A band for each mesh axis: pieces of pieces."""
    if not cut:
        axes.add_patch(_box(x, y, width, BAR, EMPTY, MUTED))
        return
    pieces, band = 1, BAR / len(cut)
    for i, axis in enumerate(cut):
        pieces = min(PIECES, pieces * sizes[axis])
        for piece in range(pieces):
            at = x + piece * width / pieces
            color = COLORS[axis] if piece == 0 else f"{COLORS[axis]}26"
            axes.add_patch(_box(at, y + (len(cut) - 1 - i) * band, width / pieces, band, color, COLORS[axis]))


def _box(x: float, y: float, width: float, height: float, color: str, edge: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, facecolor=color, edgecolor=edge, linewidth=0.6)

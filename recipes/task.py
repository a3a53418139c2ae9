"""What a run trains. The exchange, the strategies, the guard and the checkpoints know no more of it than `Trainable`:
a language model on text is one (recipes/language.py), a caller's own model, loss and data another (Task)."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import jax
import numpy as np
from jax.tree_util import keystr

from data.arrays import Arrays
from parallel.layout.rules import RULES, Constrain
from runtime.config import UsageError

METRICS = (  # names that a further sum may not have
    "step loss weight grad_norm param_norm lr skipped clipped skipped_in_a_row judged limit rounds_skipped "
    "rounds_clipped examples examples_per_second step_seconds mfu wire_bytes train_seconds bits_per_byte"
).split()
RESERVED = "count"  # beside the weights in an optimizer's state


class Data(Protocol):
    """What a run reads: text in windows, or arrays of examples. tokenizer: None where there is no text."""

    @property
    def tokenizer(self) -> Any: ...
    @property
    def digest(self) -> str: ...

    compared_with: ClassVar[tuple[str, ...]]

    def baselines(self, batches: Any, /) -> dict[str, float | None]:
        """Bits per byte of these batches by the names in `compared_with`."""
        ...

    def first_words(self) -> str: ...
    def prompt(self, text: str, /) -> np.ndarray:
        """Ids that a sample after this text begins with."""
        ...

    def facts(self) -> dict[str, str]: ...
    def describe(self, units: int, rows: int) -> list[tuple[str, str]]: ...
    def keep(self, workdir: Any) -> None: ...
    def loader(self, seed: int, batch_size: int) -> Any: ...
    def eval_batches(self, rows: int, batch_size: int, most: int | None) -> list[dict[str, np.ndarray]]: ...
    def num_bytes(self, batches: Any, /) -> float | None: ...


class Trainable(Protocol):
    """axes: beside the weights, a tuple of logical axes for each. row: shape and dtype of a row of a batch, by name.
    unit: what is counted, of which a row has `units`. further: the names of what the loss sums up besides."""

    unit: ClassVar[str]

    @property
    def axes(self) -> Any: ...
    @property
    def row(self) -> Mapping[str, Any]: ...
    @property
    def units(self) -> int: ...
    @property
    def further(self) -> tuple[str, ...]: ...
    def notable(self, means: Mapping[str, float], /) -> str:
        """What a warning says of such means of the further sums, by weight; "": nothing."""
        ...

    @property
    def least(self) -> Mapping[str, int]: ...
    @property
    def loss(self) -> Callable[..., Any]: ...
    @property
    def eval_loss(self) -> Callable[..., Any]: ...

    @property
    def frozen(self) -> tuple[tuple[Any, Any], ...]:
        """(shapes, axes) of each tree of weights that lies beside the state, and is not trained."""
        ...

    @property
    def fixed_axes(self) -> Any: ...
    def fixed(self, key: jax.Array, /) -> Any:
        """Weights that a state holds, and that are not trained."""
        ...

    def whole(self, params: Any, fixed: Any, /, *frozen: Any) -> Any:
        """What the losses take for their parameters."""
        ...

    def init(self, key: jax.Array, /) -> Any: ...
    def weight(self, batch: Any, /) -> Any: ...
    def eval_rows(self, most: int, multiple: int) -> int:
        """Of an evaluation's batch: at most so many, a multiple of that."""
        ...

    def flops(self) -> float | None:
        """Of training, per unit; None: not known."""
        ...

    def about(self) -> list[tuple[str, str]]:
        """Rows of the start-up table."""
        ...

    def read(self, c: Any, **how: Any) -> Data: ...


class AllTrained:
    """Of a Trainable all of whose weights are trained, and whose further sums are no reason to worry."""

    def notable(self, means: Mapping[str, float]) -> str:
        return ""

    @property
    def frozen(self) -> tuple[tuple[Any, Any], ...]:
        return ()

    @property
    def fixed_axes(self) -> Any:
        return {}

    def fixed(self, key: jax.Array) -> Any:
        return {}

    def whole(self, params: Any, fixed: Any, *frozen: Any) -> Any:
        return params


@dataclass(frozen=True, eq=False)
class Task(AllTrained):
    """A model, a loss and data of a caller's.

    init(key) -> params: a dictionary of float32 arrays, perhaps of dictionaries. axes: the same, for each array a tuple
    with a logical axis (of RULES in parallel/layout/rules.py) or None for each dimension.
    loss(params, batch, constrain) -> (sum over the batch, its weight), or (sum, weight, {name: further sum}): what is
    trained and shown is sum / weight, over all replicas and micro-steps. batch: {name: [B, …]}.
    constrain(x, axes) fixes how an array is sharded; a model that asks for nothing is right on every mesh.
    weight(batch) -> the weight alone, of NumPy arrays: of what is held out it is added up before anything is computed.
    data, eval_data: {name: [N, …]}, of which a batch takes rows.

    Raises UsageError for what does not fit together.
    """

    init: Callable[..., Any]
    axes: Any
    loss: Callable[..., Any]
    weight: Callable[..., Any]
    data: Mapping[str, np.ndarray] = dataclasses.field(repr=False)
    eval_data: Mapping[str, np.ndarray] = dataclasses.field(repr=False)
    further: tuple[str, ...] = dataclasses.field(init=False, default=())
    unit: ClassVar[str] = "examples"

    def __post_init__(self) -> None:
        for name in ("init", "loss", "weight"):
            if not callable(getattr(self, name)):
                raise UsageError(f"task: {name}={getattr(self, name)!r} is no function")
        for name in ("data", "eval_data"):
            object.__setattr__(self, name, arrays(f"task: {name}", getattr(self, name)))
        spec = lambda split: {name: (x.shape[1:], x.dtype) for name, x in split.items()}
        if spec(self.data) != spec(self.eval_data):
            raise UsageError(f"task: rows of data are {spec(self.data)}, those of eval_data {spec(self.eval_data)}")
        shapes = jax.eval_shape(self.init, jax.eval_shape(lambda: jax.random.key(0)))
        check_params(shapes)
        check_axes(shapes, self.axes)
        object.__setattr__(self, "further", self._further(shapes))

    def _further(self, shapes: Any) -> tuple[str, ...]:
        """The names of the further sums. Raises UsageError for a loss that gives something else."""
        batch = {name: jax.ShapeDtypeStruct((2, *x.shape), x.dtype) for name, x in self.row.items()}
        found = jax.eval_shape(lambda params, batch: self.loss(params, batch, Constrain(None)), shapes, batch)
        sums = found[2] if isinstance(found, tuple) and len(found) == 3 else {}
        is_sums = isinstance(found, tuple) and len(found) in (2, 3) and isinstance(sums, dict)
        if not is_sums or any(x.shape for x in jax.tree.leaves(found)):
            raise UsageError(
                f"task: loss gives {jax.tree.map(lambda x: x.shape, found)} (shapes); expected (sum over the batch, "
                "its weight) or (sum, weight, {name: further sum}), all scalars"
            )
        if taken := [name for name in sums if name in METRICS]:
            raise UsageError(f"task: a further sum of the loss is called {taken[0]!r}, as one of a run's own metrics")
        weight = self.weight({name: np.zeros((2, *x.shape), x.dtype) for name, x in self.row.items()})
        if np.shape(weight):
            raise UsageError(
                f"task: weight gives an array of shape {np.shape(weight)}; expected one number for a batch"
            )
        return tuple(sums)

    @property
    def row(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in self.data.items()}

    @property
    def units(self) -> int:
        return 1

    @property
    def least(self) -> dict[str, int]:
        return {}

    @property
    def eval_loss(self) -> Callable[..., Any]:
        return self.loss

    def eval_rows(self, most: int, multiple: int) -> int:
        """So many that most of eval_data is read: all of it, where there is such a number."""
        held_out = len(next(iter(self.eval_data.values())))
        sizes = range(multiple, min(most, held_out) + 1, multiple)
        if not sizes:
            raise UsageError(f"task: eval_data has {held_out} rows, and an evaluation reads {multiple} at a time")
        return max(sizes, key=lambda rows: (held_out // rows * rows, rows))

    def flops(self) -> None:
        return None

    def about(self) -> list[tuple[str, str]]:
        return []

    def read(self, c: Any, **how: Any) -> Arrays:
        return Arrays(self.data, self.eval_data)

    def layers(self) -> int:
        return num_layers(jax.eval_shape(self.init, jax.eval_shape(lambda: jax.random.key(0))), self.axes)


def num_layers(shapes: Any, axes: Any) -> int:
    """Of params["blocks"], 1 without any. shapes, axes: of the parameters."""
    blocks = jax.tree.leaves(shapes.get("blocks", ()))
    own = jax.tree.leaves(axes.get("blocks", ()), is_leaf=lambda x: isinstance(x, tuple))
    return math.prod(blocks[0].shape[: 1 + (own[0][0] == "repeats")]) if blocks and blocks[0].shape else 1


def arrays(what: str, found: Any) -> dict[str, np.ndarray]:
    """As JAX holds them: 32 bits. Raises UsageError for what is no {name: [N, …]}."""
    if not isinstance(found, Mapping) or not found:
        raise UsageError(f"{what}={type(found).__name__}: expected a dictionary of arrays {{name: [N, …]}}")
    kept = {name: np.asarray(x) for name, x in found.items()}
    if odd := [name for name, x in kept.items() if not x.ndim or x.dtype.kind not in "fiub"]:
        raise UsageError(f"{what}[{odd[0]!r}] is no array of numbers whose first dimension counts the examples")
    sizes = {name: len(x) for name, x in kept.items()}
    if len(set(sizes.values())) > 1 or not min(sizes.values()):
        raise UsageError(f"{what}: the arrays have {sizes} rows; expected as many in each, and at least one")
    return {name: x.astype(jax.dtypes.canonicalize_dtype(x.dtype), copy=False) for name, x in kept.items()}


def check_params(shapes: Any) -> None:
    """Raises UsageError for parameters that a state cannot name: what is on the disk is named by their keys."""
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    if not isinstance(shapes, dict) or not leaves:
        raise UsageError(f"task: init gives {type(shapes).__name__}; expected a dictionary of arrays, the parameters")
    for path, x in leaves:
        keys = [getattr(part, "key", None) for part in path]
        name = keystr(path, simple=True, separator="/")
        if not all(isinstance(key, str) and key and "/" not in key for key in keys) or keys[0] == RESERVED:
            raise UsageError(
                f"task: init gives a parameter {name!r}; expected dictionaries whose keys are names without a /, none "
                f"of them {RESERVED!r} at the top"
            )
        if x.dtype != np.float32:
            raise UsageError(f"task: init gives {name} as {x.dtype}; expected float32, as messages and moments are")


def check_axes(shapes: Any, axes: Any) -> None:
    """Raises UsageError where a parameter lacks its axes, or they are not those of its dimensions."""
    is_axes = lambda x: not isinstance(x, dict)
    named = dict(jax.tree_util.tree_leaves_with_path(axes, is_leaf=is_axes))
    known = ", ".join(RULES)
    for path, x in jax.tree_util.tree_leaves_with_path(shapes):
        own, name = named.pop(path, None), keystr(path, simple=True, separator="/")
        if not isinstance(own, tuple) or len(own) != len(x.shape):
            raise UsageError(
                f"task: axes of {name} are {own!r}, and its shape is {x.shape}: expected a tuple with, for each "
                f"dimension, one of {known} or None"
            )
        if odd := [axis for axis in own if axis is not None and axis not in RULES]:
            raise UsageError(f"task: axes of {name} have {odd[0]!r}; expected one of {known}, or None")
    if named:
        names = [keystr(path, simple=True, separator="/") for path in named]
        raise UsageError(f"task: axes has {', '.join(names)}, and init gives no such parameter")

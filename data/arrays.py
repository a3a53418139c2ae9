"""Examples in memory, as a caller's task has them: named arrays whose first dimension counts the examples.

Shapes: N examples, B batch, R rows asked for.
"""

import functools
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data.loader import Batch, Batches, RowIds, order_of_epoch

Named = Mapping[str, np.ndarray]


class Numbered(Batches):
    """Batches of examples, in an order like that of `data.loader`: a pure function of (seed, step, row).

    num: N. take: gives the arrays {name: [R, …]} of the examples with these numbers.
    """

    def __init__(self, num: int, take: Callable[[list[int]], Batch], *, batch_size: int, seed: int):
        import grain

        self.batch_size, self._num, self._take = batch_size, num, take
        order = functools.partial(order_of_epoch, [grain.MapDataset.range(num)], seed, 0)
        self._order = functools.lru_cache(maxsize=2)(order)

    def rows(self, step: int, row_ids: RowIds) -> dict[str, np.ndarray]:
        ids = range(*row_ids.indices(self.batch_size)) if isinstance(row_ids, slice) else row_ids
        picks = []
        for row in ids:
            epoch, place = divmod(step * self.batch_size + int(row), self._num)
            order, turned = self._order(epoch)
            picks.append(int(order[(place + turned) % self._num]))
        return self._take(picks)


class ArrayLoader(Numbered):
    """Of arrays."""

    def __init__(self, arrays: Named, *, batch_size: int, seed: int):
        take = lambda picks: {name: x[picks] for name, x in arrays.items()}
        super().__init__(len(next(iter(arrays.values()))), take, batch_size=batch_size, seed=seed)


class Arrays:
    """Examples for training, and others that are held out; both {name: [N, …]}. What a run asks of its data."""

    compared_with: ClassVar[tuple[str, ...]] = ()

    def __init__(self, train: Named, held_out: Named):
        self._train, self._held_out = train, held_out

    @property
    def digest(self) -> str:
        """sha256 of all that is in them."""
        found = hashlib.sha256()
        for split in (self._train, self._held_out):
            for name, x in sorted(split.items()):
                found.update(f"{name} {x.shape} {x.dtype}\n".encode())
                found.update(np.ascontiguousarray(x).data)
        return found.hexdigest()

    @property
    def tokenizer(self) -> None:
        """There is no text."""

    def facts(self) -> dict[str, str]:
        return {"data": self.digest}

    def describe(self, units: int, rows: int) -> list[tuple[str, str]]:
        """Rows of the start-up table. units: how many examples a run of full length trains on; rows: that are evaluated
        at a time."""
        sizes = [len(next(iter(split.values()))) for split in (self._train, self._held_out)]
        left_out = f", of which {left} are not read: {rows} are at a time" if (left := sizes[1] % rows) else ""
        shapes = ", ".join(f"{name} {list(x.shape[1:])} {x.dtype}" for name, x in self._train.items())
        return [
            ("data", f"{shapes}, each"),
            (
                "  examples",
                f"{sizes[0]:,} for training, {units / sizes[0]:.3g} epochs; {sizes[1]:,} held out{left_out}",
            ),
        ]

    def keep(self, workdir: Path) -> None:
        """Nothing: a run that goes on is given its task again."""

    def loader(self, seed: int, batch_size: int) -> ArrayLoader:
        return ArrayLoader(self._train, batch_size=batch_size, seed=seed)

    def eval_batches(self, rows: int, batch_size: int, most: int | None) -> list[dict[str, np.ndarray]]:
        """All that is held out, in whole batches of so many rows, whatever the others are."""
        return whole_batches(self._held_out, rows)

    def num_bytes(self, batches: Any) -> None:
        """Of text: there is none."""

    def first_words(self) -> str:
        """Of text: there is none."""
        return ""

    def prompt(self, text: str) -> np.ndarray:
        """Of text: there is none."""
        return np.zeros(0, np.int32)

    def baselines(self, batches: Any) -> dict[str, float | None]:
        return {}


def whole_batches(arrays: Named, rows: int) -> list[dict[str, np.ndarray]]:
    size = len(next(iter(arrays.values())))
    return [{name: x[n : n + rows] for name, x in arrays.items()} for n in range(0, size - rows + 1, rows)]

"""Batches of token windows as a pure function of (seed, step, row): resuming is arithmetic, and no state is saved.

The tokens are cut into S windows of T, each with its T targets one token later. Row b of step n is number i = n * B + b
of the order: place i mod S of epoch i div S, whose permutation is Grain's shuffled range. It is indexed directly, so
any process can build any rows of any step, and the batch does not depend on who asks.

Of a mixture, a fixed pattern says which part a row is from, and each part has an order of its own (`data.mixture`).

Shapes: N tokens, B batch, R rows asked for, T sequence.
"""

import functools
import hashlib
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import numpy as np

from data.mixture import Mixture, rows_in_order

Batch = dict[str, np.ndarray]
RowIds = slice | Sequence[int]


class Batches:
    """What asks `rows` for the rows of each step."""

    batch_size: int

    def rows(self, step: int, row_ids: RowIds) -> Batch:
        """{name: [R, …]}: some rows of the batch of step n, from 0; row_ids: which of the B rows."""
        raise NotImplementedError

    def batches(
        self,
        start: int,
        stop: int,
        place: Callable[[list[Callable[[RowIds], Batch]]], Any],
        steps_per_call: int = 1,
        prefetch: int = 2,
    ) -> "Prefetched":
        """place(rows of the K steps of a call) for the calls of [start, stop), built ahead by a background thread.

        `place` runs on that thread, where contexts of the caller such as `jax.set_mesh` do not hold: it must name its
        shardings. What it raises is raised by the `next` that would have given its result.

        Args:
            place: puts a call's batch where it is needed; gets, for each of its K steps, a function from row ids to
                their arrays.
            steps_per_call: K, which divides stop - start.
            prefetch: how many results wait ready at most.
        """

        def build(call: int) -> Any:
            first = start + call * steps_per_call
            return place([functools.partial(self.rows, step) for step in range(first, first + steps_per_call)])

        return Prefetched(build, 0, (stop - start) // steps_per_call, prefetch)


class Loader(Batches):
    """Training batches of one array of tokens.

    Args:
        tokens_N: token ids, in memory or memory-mapped, or several such by weight; only the windows asked for are read.
        seq_len: T.
        batch_size: B, of all processes together.
        seed: decides the order; each epoch has its own.
        document_mask: add "segments" and leave targets across a document border out of the loss.
        eos: the id that ends a document; needed with document_mask.
    """

    def __init__(
        self,
        tokens_N: np.ndarray | Mixture,
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        document_mask: bool = False,
        eos: int | None = None,
    ):
        import grain

        if document_mask and (eos is None or eos < 0):
            raise ValueError(
                "data.document_mask=True needs eos, the id that ends a document, and none is known for these tokens: "
                "set data.end_of_document to it, as a number."
            )
        if batch_size < 1:
            raise ValueError(f"The batch size is {batch_size}; it must be 1 or more.")
        if not 0 <= seed < 2**32:
            raise ValueError(f"The data seed is {seed}; Grain takes 0 to 2**32 - 1.")
        self._mixture = Mixture.of(tokens_N)
        self._windows = _num_windows(self._mixture, seq_len)
        if max(self._windows) > 2**32:
            raise ValueError(
                f"There are {max(self._windows):,} windows of {seq_len} tokens, and Grain shuffles 2**32 at most. "
                f"Raise data.seq_len to {-(-max(map(len, self._mixture.arrays)) // 2**32)} or more."
            )
        self.num_windows = sum(self._windows)
        self.batch_size = batch_size
        self._seq_len = seq_len
        self._eos = eos if document_mask else None
        ranges = [grain.MapDataset.range(windows) for windows in self._windows]
        order = functools.partial(order_of_epoch, ranges, seed)
        self._order = functools.lru_cache(maxsize=2 * len(ranges))(order)

    def rows(self, step: int, row_ids: RowIds) -> Batch:
        """Some rows of the batch of one step.

        Args:
            step: n, from 0.
            row_ids: which of the B rows, as a slice or a list.

        Returns:
            "tokens" and "targets" int32 [R, T], "mask" float32 [R, T], all ones; with document_mask also "segments"
            int32 [R, T], the number of the document inside its window from 1, and mask 0 where the target is the first
            token of another document.
        """
        ids = range(*row_ids.indices(self.batch_size)) if isinstance(row_ids, slice) else row_ids
        for row in ids:
            if not 0 <= row < self.batch_size:
                raise IndexError(
                    f"Row {row} was asked of a batch of {self.batch_size} rows, 0 to {self.batch_size - 1}."
                )
        picks = []
        for row in ids:
            part, number = self._mixture.locate(step * self.batch_size + int(row))
            epoch, place = divmod(number, self._windows[part])
            order, turned = self._order(part, epoch)
            picks.append((part, order[(place + turned) % self._windows[part]]))
        return _cut(self._mixture, picks, self._seq_len, self._eos)


class Prefetched(Iterator[Any]):
    """Results of build(step), ahead of time. The thread ends at the last step, at `close`, or with the iterator."""

    def __init__(self, build: Callable[[int], Any], start: int, stop: int, prefetch: int):
        if prefetch < 1:
            raise ValueError(f"prefetch is {prefetch}; at least 1 batch must be built ahead.")
        self._ready: SimpleQueue[tuple[bool, Any]] = SimpleQueue()
        self._room, closed = threading.Semaphore(prefetch), threading.Event()
        # The thread holds no reference to the iterator: one dropped halfway is collected, which ends it.
        arguments = (build, start, stop, self._ready, self._room, closed)
        thread = threading.Thread(target=_fill, args=arguments, name="slackline-data", daemon=True)
        self.close = weakref.finalize(self, _end, thread, self._room, closed)  # also runs at interpreter exit
        thread.start()

    def __next__(self) -> Any:
        if not self.close.alive:
            raise StopIteration
        ok, value = self._ready.get()
        if ok:
            self._room.release()
            return value
        self.close()
        raise value


def _fill(
    build: Callable[[int], Any],
    start: int,
    stop: int,
    ready: SimpleQueue,
    room: threading.Semaphore,
    closed: threading.Event,
) -> None:
    try:
        for step in range(start, stop):
            room.acquire()
            if closed.is_set():
                return
            ready.put((True, build(step)))
        ready.put((False, StopIteration()))
    except BaseException as error:  # the consumer's to handle: here it would only be printed
        ready.put((False, error))


def _end(thread: threading.Thread, room: threading.Semaphore, closed: threading.Event) -> None:
    closed.set()
    room.release()
    if thread is not threading.current_thread():
        thread.join()


def threads_beside_grain(count: int) -> ThreadPoolExecutor:
    """Threads that may import and trace. Grain is imported first: while it is, it replaces Python's own import for a
    moment (etils.epy.lazy_imports), and what other threads import just then fails."""
    import grain  # noqa: F401

    return ThreadPoolExecutor(count)


def order_of_epoch(ranges: list[Any], seed: int, part: int, epoch: int) -> tuple[Any, int]:
    """(a permutation of the windows of a part, by how many places it is turned): each seed, part and epoch has its own.

    ranges: Grain's range of each part's windows. Its own `repeat` shuffles epoch e with seed + e, so that epoch 1 of
    seed 0 would be epoch 0 of seed 1. Here all but the first are made from a hash; Grain's seeds have 32 bits of it.
    """
    if part == epoch == 0:
        return ranges[0].shuffle(seed), 0
    text = f"slackline order {seed} {epoch}" + (f" {part}" if part else "")
    mixed = hashlib.blake2b(text.encode(), digest_size=12).digest()
    shuffled, turned = int.from_bytes(mixed[:4], "little"), int.from_bytes(mixed[4:], "little")
    return ranges[part].shuffle(shuffled), turned % len(ranges[part])


def eval_batches(
    tokens_N: np.ndarray | Mixture,
    *,
    seq_len: int,
    batch_size: int,
    num_batches: int | None,
    document_mask: bool = False,
    eos: int = 0,
) -> list[Batch]:
    """The first num_batches * B windows of the held-out split (None: all), in order, of a mixture by its weights: the
    same at every evaluation.

    With fewer windows than that there are fewer batches, and the last one is filled up with rows of zeros and mask 0.

    Returns:
        batches laid out as `Loader.rows`, [B, T].
    """
    mixture = Mixture.of(tokens_N)
    rows = rows_in_order(_num_windows(mixture, seq_len), mixture)
    picks = list(itertools.islice(rows, None if num_batches is None else num_batches * batch_size))
    batches = []
    for first in range(0, len(picks), batch_size):
        some = picks[first : first + batch_size]
        batch = _cut(mixture, some, seq_len, eos if document_mask else None)
        missing = batch_size - len(some)
        batches.append({name: np.pad(array_RT, ((0, missing), (0, 0))) for name, array_RT in batch.items()})
    return batches


def num_bytes(bytes_V: np.ndarray, batches: list[Batch]) -> float:
    """Of the text that is predicted in these batches. bytes_V: of text that each token stands for."""
    return sum(float(np.sum(bytes_V[batch["targets"]] * batch["mask"])) for batch in batches)


def _num_windows(mixture: Mixture, seq_len: int) -> tuple[int, ...]:
    """How many windows each part has."""
    for tokens_N in mixture.arrays:
        if len(tokens_N) <= seq_len:
            raise ValueError(
                f"data.seq_len is {seq_len}, so a window takes {seq_len + 1} tokens, but there are {len(tokens_N)}. "
                "Lower data.seq_len or give more text."
            )
    return tuple((len(tokens_N) - 1) // seq_len for tokens_N in mixture.arrays)


def _cut(mixture: Mixture, picks: list[tuple[int, int]], seq_len: int, eos: int | None) -> Batch:
    """picks: (part, window) of each row."""
    window_RT = np.zeros((len(picks), seq_len + 1), np.int32)
    for row_T, (part, window) in zip(window_RT, picks, strict=True):
        row_T[:] = mixture.arrays[part][window * seq_len : (window + 1) * seq_len + 1]
    tokens_RT, targets_RT = window_RT[:, :-1], window_RT[:, 1:]
    batch = {"tokens": tokens_RT, "targets": targets_RT, "mask": np.ones(tokens_RT.shape, np.float32)}
    if eos is not None:
        ended_RT = tokens_RT == eos
        batch["mask"] = (~ended_RT).astype(np.float32)  # after EOS comes another document: nothing here predicts it
        # EOS itself still belongs to its document, hence the count of EOS before each token.
        batch["segments"] = (1 + np.cumsum(ended_RT, axis=1) - ended_RT).astype(np.int32)
    return {name: np.ascontiguousarray(array_RT) for name, array_RT in batch.items()}

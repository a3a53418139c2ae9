"""data/loader.py: the batch of a step is a pure function of (seed, step, global batch)."""

import itertools
import threading
import time

import grain
import numpy as np
import pytest

from data import loader

TOKENS_N = np.arange(1005, dtype=np.uint16)  # T = 4: 251 windows, the first token of each says which one


def make(seed=3, batch_size=8, tokens_N=TOKENS_N, **changes):
    return loader.Loader(tokens_N, seq_len=4, batch_size=batch_size, seed=seed, **changes)


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], strict=True)


def test_rows_are_a_pure_function_of_seed_and_step():
    first, again = make(), make()
    batch = first.rows(100, slice(None))
    first.rows(5, slice(None))
    assert_same(batch, again.rows(100, slice(None)))
    assert_same(batch, first.rows(100, slice(None)))
    assert batch["tokens"].dtype == batch["targets"].dtype == np.int32 and batch["mask"].dtype == np.float32
    np.testing.assert_array_equal(batch["targets"], batch["tokens"] + 1)
    assert (batch["tokens"][:, 0] % 4 == 0).all() and (batch["mask"] == 1).all()
    assert (make(seed=4).rows(100, slice(None))["tokens"] != batch["tokens"]).any()
    assert (first.rows(101, slice(None))["tokens"] != batch["tokens"]).any()


@pytest.mark.parametrize("parts", [[[0, 1, 2, 3], [4, 5, 6, 7]], [[7], [0, 2], [1, 3, 5]], [slice(6, 8), slice(0, 6)]])
def test_rows_do_not_depend_on_who_asks(parts):
    whole = make().rows(9, slice(None))
    for part in parts:
        ids = list(range(8))[part] if isinstance(part, slice) else part
        assert_same(make().rows(9, part), {name: array[ids] for name, array in whole.items()})
    with pytest.raises(IndexError, match="Row 8 .* 0 to 7"):
        make().rows(0, [8])


def test_each_epoch_covers_each_window_once():
    data = make(batch_size=1)
    assert data.num_windows == 251
    epochs = [[int(data.rows(251 * e + i, [0])["tokens"][0, 0]) // 4 for i in range(251)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(251))
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])


def test_no_epoch_of_two_seeds_is_alike():
    """Of 8 seeds × 8 epochs of 251 windows no two have the same order, nor one that looks like another's."""
    orders = {}
    for seed in [0, 1, 2, 3, 4, 5, 2**31, 2**32 - 1]:
        data = make(seed=seed, batch_size=251)
        for epoch in range(8):
            orders[seed, epoch] = data.rows(epoch, slice(None))["tokens"][:, 0] // 4
            assert sorted(orders[seed, epoch]) == list(range(251))
    for a, b in itertools.combinations(orders, 2):
        alike = int((orders[a] == orders[b]).sum())  # two random orders share 1 place on average
        assert alike < 12, f"seed and epoch {a} and {b} share {alike} of 251 places"


def test_the_first_epoch_is_grains_shuffle_of_the_seed():
    """So that results of one epoch stay what they were."""
    shuffled = grain.MapDataset.range(251).shuffle(3)
    tokens_RT = make(batch_size=251).rows(0, slice(None))["tokens"]
    assert (tokens_RT[:, 0] // 4).tolist() == [shuffled[i] for i in range(251)]


def test_another_batch_size_reads_the_same_order():
    by_eight = np.concatenate([make(batch_size=8).rows(s, slice(None))["tokens"] for s in range(4)])
    by_sixteen = np.concatenate([make(batch_size=16).rows(s, slice(None))["tokens"] for s in range(2)])
    np.testing.assert_array_equal(by_eight, by_sixteen)


def test_resuming_is_arithmetic():
    straight = list(make().batches(0, 12, lambda steps: steps[0](slice(None))))
    resumed = list(make().batches(7, 12, lambda steps: steps[0](slice(None))))
    assert len(straight) == 12
    for n, batch in enumerate(straight):
        assert_same(batch, make().rows(n, slice(None)))
    for batch, again in zip(straight[7:], resumed, strict=True):
        assert_same(batch, again)


def test_a_call_gets_the_rows_of_its_steps():
    calls = list(make().batches(4, 12, lambda steps: [rows(slice(None)) for rows in steps], steps_per_call=4))
    assert [len(call) for call in calls] == [4, 4]
    for n, batch in enumerate(batch for call in calls for batch in call):
        assert_same(batch, make().rows(4 + n, slice(None)))


def test_document_mask():
    tokens_N = np.array([5, 0, 6, 7, 0, 0, 8, 9, 1], np.uint16)  # 5. | 6 7. | . | 8 9 1
    batch = loader.eval_batches(tokens_N, seq_len=8, batch_size=1, num_batches=1, document_mask=True, eos=0)[0]
    assert batch["tokens"].tolist() == [[5, 0, 6, 7, 0, 0, 8, 9]]
    assert batch["segments"].tolist() == [[1, 1, 2, 2, 2, 3, 4, 4]] and batch["segments"].dtype == np.int32
    assert batch["mask"].tolist() == [[1, 0, 1, 1, 0, 0, 1, 1]]
    trained = loader.Loader(tokens_N, seq_len=8, batch_size=1, seed=0, document_mask=True, eos=0).rows(0, [0])
    assert_same(trained, batch)
    assert "segments" not in loader.eval_batches(tokens_N, seq_len=8, batch_size=1, num_batches=1)[0]
    with pytest.raises(ValueError, match="needs eos"):
        make(document_mask=True)


def test_batches_are_built_ahead_and_bounded():
    built = []
    batches = make().batches(0, 100, lambda steps: built.append(threading.get_ident()) or len(built), prefetch=3)
    assert next(batches) == 1
    deadline = time.monotonic() + 5
    while len(built) < 4 and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.05)
    assert len(built) == 4, "the batch taken and three waiting"
    assert threading.get_ident() not in built
    batches.close()


def data_threads():
    return [thread for thread in threading.enumerate() if thread.name == "slackline-data"]


@pytest.mark.parametrize("end", ["close", "drop", "exhaust", "unstarted"])
def test_the_thread_ends(end):
    before = time.monotonic()
    count = itertools.count()
    batches = make().batches(0, 5, lambda steps: next(count))
    if end != "unstarted":
        next(batches)
    if end == "exhaust":
        assert list(batches) == [1, 2, 3, 4]
    elif end == "drop":
        del batches
    else:
        batches.close()
        assert list(batches) == []
    assert data_threads() == [] and time.monotonic() - before < 2


def test_an_error_in_the_thread_reaches_the_consumer():
    count = itertools.count()

    def place(steps):
        if (step := next(count)) == 2:
            raise RuntimeError("no room on the device")
        return step

    batches = make().batches(0, 5, place)
    assert [next(batches), next(batches)] == [0, 1]
    with pytest.raises(RuntimeError, match="no room on the device"):
        next(batches)
    assert list(batches) == [] and data_threads() == []


def test_eval_batches_are_fixed_and_padded():
    batches = loader.eval_batches(TOKENS_N[:29], seq_len=4, batch_size=3, num_batches=2)
    assert [batch["tokens"][:, 0].tolist() for batch in batches] == [[0, 4, 8], [12, 16, 20]]
    batches = loader.eval_batches(TOKENS_N[:29], seq_len=4, batch_size=3, num_batches=9, document_mask=True, eos=999)
    assert [batch["tokens"][:, 0].tolist() for batch in batches] == [[0, 4, 8], [12, 16, 20], [24, 0, 0]]
    assert batches[-1]["mask"].sum(axis=1).tolist() == [4, 0, 0]
    assert all(array.shape == (3, 4) for array in batches[-1].values())
    with pytest.raises(ValueError, match=r"data\.seq_len is 4"):
        loader.eval_batches(TOKENS_N[:4], seq_len=4, batch_size=1, num_batches=1)


def test_the_loader_is_fast_enough():
    data = loader.Loader(np.zeros(2**20, np.uint16), seq_len=256, batch_size=32, seed=0)
    start = time.perf_counter()
    for _ in data.batches(0, 100, lambda steps: steps[0](slice(None))):
        pass
    assert 100 * 32 * 256 / (time.perf_counter() - start) > 500_000, "tokens per second"

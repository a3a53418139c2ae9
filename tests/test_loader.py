"""data/loader.py: the batch of a step is a pure function of (seed, step, global batch)."""

import itertools
import threading
import time

import grain
import numpy as np
import pytest

from data import loader, mixture

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
    """No two orders are the same, nor does one look like another."""
    orders = {}
    for seed in [0, 1, 2, 3, 2**32 - 1]:
        data = make(seed=seed, batch_size=251)
        for epoch in range(5):
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
    with pytest.raises(ValueError, match=r"needs eos.*data\.end_of_document"):
        make(document_mask=True, eos=-1)


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


def mixed(weights=(0.7, 0.3), seed=3, batch_size=8, **changes):
    """Parts of 25, 10 and 3 windows; the first token of a row says which part and which window it is from."""
    arrays = [np.arange(4 * n + 1, dtype="<u4") + 10_000 * part for part, n in enumerate((25, 10, 3))]
    both = mixture.Mixture(tuple(arrays[: len(weights)]), weights)
    return loader.Loader(both, seq_len=4, batch_size=batch_size, seed=seed, **changes)


def picks(data, start, stop):
    first = np.concatenate([data.rows(step, slice(None))["tokens"][:, 0] for step in range(start, stop)])
    return np.stack(np.divmod(first, 10_000)) // np.array([[1], [4]])  # (part, window) of each row


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, 2, 3), (0.999, 0.001), (5.0,)])
def test_a_mixture_has_its_shares_everywhere_and_each_part_its_epochs(weights):
    data = mixed(weights)
    located = [data._mixture.locate(row) for row in range(2 * mixture.PLACES + 100)]
    part_i = np.array([part for part, _ in located])
    for part, weight in enumerate(weights):
        number_i = np.cumsum(part_i == part)
        expected_i = weight / sum(weights) * np.arange(1, len(part_i) + 1)
        assert np.abs(number_i - expected_i).max() <= 1.5, "at any row the part has its share so far"
        assert [rank for p, rank in located if p == part] == list(range(number_i[-1]))
    part_i, window_i = picks(data, 0, 20)
    for part in range(len(weights)):
        S, own = (25, 10, 3)[part], window_i[part_i == part]
        for epoch in range(len(own) // S):
            assert sorted(own[epoch * S : (epoch + 1) * S]) == list(range(S))


def test_a_mixture_is_resumed_by_arithmetic_and_does_not_depend_on_who_asks():
    whole = picks(mixed(), 0, 40)
    np.testing.assert_array_equal(picks(mixed(), 17, 40), whole[:, 17 * 8 :])
    assert_same(mixed().rows(9, [5, 2]), {k: v[[5, 2]] for k, v in mixed().rows(9, slice(None)).items()})
    assert (picks(mixed(seed=4), 0, 40)[1] != whole[1]).any()


def test_a_lone_part_is_read_as_without_a_mixture():
    lone = loader.Loader(mixture.Mixture((TOKENS_N,), (3.0,)), seq_len=4, batch_size=8, seed=3)
    for step in (0, 31, 100, 5000):
        assert_same(lone.rows(step, slice(None)), make().rows(step, slice(None)))


def test_held_out_windows_of_a_mixture_come_by_weight_and_each_once():
    arrays = (np.arange(41, dtype="<u2"), 1000 + np.arange(401, dtype="<u4"))
    both = mixture.Mixture(arrays, (0.5, 0.5))
    batches = loader.eval_batches(both, seq_len=4, batch_size=10, num_batches=2)
    first = np.concatenate([batch["tokens"][:, 0] for batch in batches])
    assert (first < 1000).sum() == 10, "half of 20 rows, which are all that this part has"
    batches = loader.eval_batches(both, seq_len=4, batch_size=10, num_batches=100)
    rows = sum(int(batch["mask"][:, 0].sum()) for batch in batches)
    assert rows == 110 and len({int(batch["tokens"][r, 0]) for batch in batches for r in range(10)}) == 110


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("a", [("a", 1.0)]),
        ("a:0.7,b:0.3", [("a", 0.7), ("b", 0.3)]),
        ("dir/a.txt:7, /x/b.bin:3", [("dir/a.txt", 7.0), ("/x/b.bin", 3.0)]),
        ("a:1e-1,b:9e-1", [("a", 0.1), ("b", 0.9)]),
        ("c:/texts", [("c:/texts", 1.0)]),
    ],
)
def test_weights_are_read(path, parts):
    assert mixture.parse(path) == parts


@pytest.mark.parametrize(
    "path", ["a,b", "a:0.5,b", "a:0,b:1", "a:-1,b:2", ":1,b:1", "a:nan,b:1", "a:1,b:1e9", "a:1,a:2"]
)
def test_weights_that_are_none_are_refused(path):
    with pytest.raises(ValueError, match=r"data\.path is .*as in a:0\.7,b:0\.3"):
        mixture.parse(path)


def test_a_path_that_looks_like_a_mixture_and_exists_is_one_path(tmp_path):
    odd = tmp_path / "a:0.5,b:0.5"
    odd.mkdir()
    assert mixture.parse(str(odd)) == [(str(odd), 1.0)]


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

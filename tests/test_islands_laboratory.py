"""The laboratory: the same view and fold on a clock of events; what its logs must hold, and what schemes do in it."""

import dataclasses
import math
import subprocess
import sys
import time
from collections import Counter

import helpers
import numpy as np
import pytest

from islands import decode, experiments, payload, toys
from islands import record as records
from islands.experiments import EXPERIMENTS, MIXTURE, TEXTBOOK, interval
from islands.laboratory import PATIENCE, SPEED, Scheme, play
from islands.merge import Average, Compensated, Nesterov, Outer, Quorum
from islands.pace import Site, local_steps
from islands.regions import Region, Regional
from islands.view import View
from runtime.config import UsageError

SGD = Outer("sgd", 1.0, 0.0)
TASK = toys.Textbook()
DOWNPOUR = TEXTBOOK["downpour"]


def pushes(outcome, name: str = "") -> list:
    return [record for record in outcome.log if record.type == "push" and name in ("", record.island)]


def uneven(rng: np.random.Generator, islands: int = 5, seconds: float = 400.0) -> list[Site]:
    """Islands of all speeds that straggle, fail, come back or not, join late and leave."""
    often = lambda p, draw, other: draw() if rng.random() < p else other
    when = lambda: float(rng.uniform(0, seconds))
    return [
        Site(
            speed=float(rng.choice([0.2, 0.5, 1.0, 4.0])), spread=float(rng.choice([0.0, 0.5])),
            straggle=0.05, bandwidth=often(0.5, lambda: float(rng.uniform(1, 100)), math.inf),
            latency=float(rng.choice([0.0, 0.3])), joins=often(0.3, when, 0.0), leaves=often(0.2, when, math.inf),
            fails=tuple(sorted(when() for _ in range(rng.integers(3)))), away=often(0.7, when, math.inf),
        )
        for _ in range(islands)
    ]  # fmt: skip


# ── the log ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_same_seed_is_the_same_run_to_the_bit_and_another_one_is_not():
    sites = uneven(np.random.default_rng(0))
    a, b, c = (play(TASK, sites, DOWNPOUR, 100, seed) for seed in (0, 0, 1))
    assert a.log == b.log and a.losses == b.losses and a.state.digest() == b.state.digest()
    assert a.log != c.log


def test_a_log_is_one_that_real_islands_could_have_written():
    """A chain of records that fit their limits, each of which counts, for a reader who knows nothing else."""
    found = play(TASK, uneven(np.random.default_rng(8)), Scheme(Nesterov(SGD), 3, staleness=2), 400)
    assert {record.type for record in found.log} == {"join", "push", "leave", "expire"}
    view, previous = View(), records.digest(b"")
    for record in found.log:
        assert records.parse(record.encode()) == record and record.previous == previous
        previous = records.digest(record.encode())
        view, verdict = view.after(record)
        assert verdict.folded
    assert view == found.view


def ahead(log) -> list[int]:
    """Of every push, by how many rounds its island was ahead of the slowest live one when it took the version that it
    began with. From the records alone: by nothing that islands decide with."""
    clocks: list[dict[str, int]] = []  # after each record, the next round of each live island
    found, now = [], {}
    for record in log:
        if record.type == "push":
            at_base = clocks[record.base]
            found.append(record.clock - min(at_base.values()))
            assert at_base[record.island] == record.clock, "a version that is older than what it has pushed itself"
        now = dict(now)
        if record.type in ("join", "push"):
            now[record.island] = record.clock + (record.type == "push")
        else:
            now.pop(record.target or record.island)
        clocks.append(now)
    return found


def assert_bounded(seed: int, staleness: int, rule, steps: int = 3) -> int:
    sites = uneven(np.random.default_rng(seed))
    found = play(TASK, sites, Scheme(rule, steps, staleness), 400, seed)
    most = max(ahead(found.log), default=0)
    assert most <= staleness
    return most


@pytest.mark.parametrize("staleness", [0, 1, 4])
def test_no_island_runs_more_than_the_bound_ahead(staleness):
    """Over random sites; and the bound is reached."""
    rules = [Nesterov(SGD, 1), Nesterov(Outer("nesterov", 0.1, 0.9)), Average(SGD, staleness), Quorum(SGD, 2)]
    assert max(assert_bounded(seed, staleness, rules[seed % len(rules)]) for seed in range(8)) == staleness


def test_without_a_bound_islands_run_further_ahead():
    """So the test before this one can fail."""
    assert max(ahead(play(TASK, [Site(4.0), Site(0.5)], DOWNPOUR, 100).log)) > 100


@pytest.mark.prove
def test_no_schedule_is_found_that_breaks_the_bound():
    hypothesis = pytest.importorskip("hypothesis", reason="pip install -r requirements-prove.txt")
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=1000, deadline=None, derandomize=True, database=None)
    @hypothesis.given(st.integers(0, 2**32), st.integers(0, 6), st.booleans())
    def search(seed: int, staleness: int, average: bool) -> None:
        assert_bounded(seed, staleness, Average(SGD, staleness) if average else Nesterov(SGD, 1))

    search()


# ── time ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_round_takes_its_steps_and_its_bytes_their_link():
    """Two weights of 4 bytes: pulled once with the first version, and then what the other one has pushed."""
    times: list[float] = []
    slow = Site(speed=2.0, bandwidth=4.0, latency=0.5)  # 8 bytes take 2.5 s, 4 steps 2 s
    sites = [slow, Site(speed=0.1, joins=8.0)]  # whose first push is there at 8 + 40 s
    play(TASK, sites, Scheme(Nesterov(SGD, 1), 4), 60, watch=lambda now, _: times.append(now))
    first, alone = 2.5 + 2 + 2.5, 0.5 + 2 + 2.5
    assert times == pytest.approx([*(first + alone * i for i in range(9)), 48, 52, 52 + first])


def test_speeds_vary_as_they_are_said_to():
    rng = np.random.default_rng(0)
    assert Site(speed=4.0).seconds(20, rng) == 5.0
    varied = [Site(speed=4.0, spread=0.4).seconds(20, rng) for _ in range(20_000)]
    assert np.mean(varied) == pytest.approx(5.0, rel=0.01)
    assert np.std(np.log(varied)) == pytest.approx(0.4, rel=0.02)
    straggling = np.array([Site(speed=4.0, straggle=0.1).seconds(20, rng) for _ in range(20_000)])
    assert set(straggling) == {5.0, 50.0} and np.mean(straggling == 50.0) == pytest.approx(0.1, rel=0.1)
    with pytest.raises(ValueError, match="an island of 0 steps and inf bytes a second never ends a round"):
        Site(speed=0.0)


def test_dynamic_local_updates_are_in_proportion_to_speed():
    assert [local_steps(50, v, 4.0) for v in (4.0, 2.0, 1.0, 0.33, 0.01)] == [50, 25, 12, 4, 1]
    found = play(
        TASK, [Site(v) for v in (1.0, 1.0, 2.0, 4.0)], dataclasses.replace(DOWNPOUR, interval=20, dylu=True), 200
    )
    for i, wanted in enumerate((5, 5, 10, 20)):
        own = pushes(found, f"island-{i}")
        assert own[0].steps == 20 and {record.steps for record in own[2:]} == {wanted}
        assert all(record.number(SPEED) == pytest.approx((1.0, 1.0, 2.0, 4.0)[i]) for record in own)
    ends = Counter(record.island for record in pushes(found)[8:])
    assert max(ends.values()) - min(ends.values()) <= 3, "all end a round at about the same time"


def test_an_island_that_dies_holds_others_back_until_it_is_taken_to_be_gone_and_comes_back_as_another_one():
    """Without staleness: all wait for it, go on without it, and with it again."""
    sites = [Site(1.0), Site(1.0), Site(1.0, fails=(10.5,), away=200.0)]
    times: list[float] = []
    found = play(TASK, sites, Scheme(Average(SGD), 2, 0), 400, watch=lambda now, _: times.append(now))
    kinds = [(record.type, record.island) for record in found.log if record.type != "push"]
    assert kinds == [("join", f"island-{i}") for i in range(3)] + [("expire", "island-0"), ("join", "island-2")]
    (expire,) = (record for record in found.log if record.type == "expire")
    assert expire.target == "island-2" and PATIENCE == 60.0
    gap = max(np.diff(times))
    assert gap == pytest.approx(10.5 + PATIENCE + 2 - 12)
    own = pushes(found, "island-2")
    assert [record.clock for record in own][:6] == [0, 1, 2, 3, 4, own[5].clock]
    assert own[5].clock > 60 and own[5].incarnation == 2 and found.view.islands["island-2"].live
    assert len({len(pushes(found, f"island-{i}")) for i in (0, 1)}) == 1


def test_islands_join_late_and_leave_early():
    found = play(TASK, [Site(1.0), Site(1.0, joins=50.5), Site(1.0, leaves=30.5)], Scheme(Average(SGD), 2, 0), 100)
    assert [record.clock for record in pushes(found, "island-0")] == list(range(49))
    assert [record.clock for record in pushes(found, "island-1")] == list(range(25, 49))
    assert [record.clock for record in pushes(found, "island-2")] == list(range(15))
    assert [record.island for record in found.log if record.type == "leave"] == ["island-2"]


def test_who_has_died_before_it_was_to_leave_does_not_come_back_after_that():
    found = play(TASK, [Site(1.0), Site(1.0, fails=(20.5,), away=20.0, leaves=30.0)], Scheme(Average(SGD), 2, 0), 100)
    assert [record.type for record in found.log if record.type != "push"] == ["join", "join", "expire"]


def test_who_is_left_alone_goes_on_and_who_comes_back_alone_too():
    """All die at once: nobody can propose anything until one is back."""
    sites = [Site(1.0, fails=(10.0,), away=100.0), Site(1.0, fails=(10.0,))]
    found = play(TASK, sites, Scheme(Average(SGD), 1, 0), 400)
    assert [record.type for record in found.log if record.type != "push"] == ["join", "join", "join", "expire"]
    assert pushes(found)[-1].clock > 200


# ── what is pushed ───────────────────────────────────────────────────────────────────────────────────────────────


def test_one_island_alone_trains_as_if_there_were_no_laboratory():
    task = toys.Mixture()
    found = play(task, [Site(1.0)], Scheme(Nesterov(SGD), 5), 20.0)
    params, own = task.init(), task.begin(0)
    for done in range(0, 20, 5):
        params, own, _ = task.steps(params, own, 0, done, 5)
    for leaf, x in params.items():
        np.testing.assert_allclose(found.state.arrays[f"params/{leaf}"], x, rtol=0, atol=1e-6)
    assert found.steps == 20 and found.losses[-1] == pytest.approx(task.loss(params), abs=1e-6)


@pytest.mark.parametrize("rule", [Compensated(SGD), Nesterov(SGD, 1)])
def test_a_rule_that_pins_gets_rounds_that_began_at_the_islands_own_last_version(rule):
    found = play(TASK, [Site(1.0), Site(2.0, latency=0.4), Site(0.3)], Scheme(rule, 2, 3), 60)
    last, pinned = {}, []
    for record in found.log:
        if record.type == "push":
            pinned.append(record.base == last[record.island])
        last[record.island] = record.sequence
    assert all(pinned) == rule.pins


@pytest.mark.parametrize("name", ["int4", pytest.param("none", marks=pytest.mark.slow)])
def test_a_codec_is_that_of_real_payloads(name):
    codec, task = decode.build(name), toys.Mixture(hidden=8)
    sites, scheme = [Site(1.0), Site(2.0)], Scheme(Nesterov(Outer("nesterov", 0.7, 0.9)), 5)
    plain = play(task, sites, scheme, 60)
    coded = play(task, sites, dataclasses.replace(scheme, codec=codec), 60)
    sizes = {leaf: x.size for leaf, x in task.init().items()}
    assert coded.bytes == len(pushes(coded)) * payload.payload_bytes(sizes, codec)
    assert (coded.state.digest() == plain.state.digest()) == (name == "none")
    assert coded.losses[-1] == pytest.approx(plain.losses[-1], rel=0.02) and coded.losses[-1] < 0.99 * coded.losses[0]


# ── regions ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_region_that_adds_nothing_is_no_region():
    """Its server takes the parameters of the log for its own, and a worker's step for its step."""
    task, sites = toys.Mixture(hidden=8), [Site(1.0), Site(2.0)]
    scheme = Scheme(Nesterov(Outer("nesterov", 0.7, 0.9)), 5)
    plain = play(task, sites, scheme, 40)
    region = Region(interval=5, lr=1.0, momentum=0.0, buffer=1, mixing=1.0)
    found = play(Regional(task, region), sites, scheme, 40)
    np.testing.assert_allclose(found.losses, plain.losses, rtol=1e-5)
    assert [record.base for record in found.log] == [record.base for record in plain.log]


class Line:
    """One parameter x, and a worker whose every step is x -> 0.9 x - 0.1."""

    tokens = 1

    def init(self):
        return {"x": np.ones(1, np.float32)}

    def begin(self, island):
        return 0

    def steps(self, params, own, island, done, count):
        assert own == done, "what a worker keeps stays with it"
        x = params["x"]
        for _ in range(count):
            x = np.float32(0.9) * x - np.float32(0.1)
        return {"x": x}, own + count, 0.0

    def loss(self, params):
        return float(params["x"][0])


def halos(pushes: int, interval: int, region: Region, lr: float, beta: float, count: int = 1) -> float:
    """Algorithm 1 of the paper with one region and one worker, in float64: the server of all folds each push."""

    def delayed(state, delta, lr, beta, buffer):
        x, m, total, t = state
        total, t = total + delta, t + 1
        if t % buffer == 0:
            m, total = beta * m + total / buffer, 0.0
            return x - lr * (beta * m + delta / buffer), m, total, t
        return x - lr * delta / buffer, m, total, t

    own, all_of_them = (1.0, 0.0, 0.0, 0), (1.0, 0.0, 0.0, 0)
    for push in range(pushes):
        if push:
            own = (own[0] + region.mixing * (all_of_them[0] - own[0]), *own[1:])
        begun = own[0]
        for _ in range(interval // region.interval):
            x = own[0]
            for _ in range(region.interval):
                x = 0.9 * x - 0.1
            own = delayed(own, own[0] - x, region.lr, region.momentum, region.buffer)
        all_of_them = delayed(all_of_them, begun - own[0], lr, beta, count)
    return all_of_them[0]


@pytest.mark.parametrize("region", [Region(2, 0.4, 0.9, 2), Region(3, 0.7, 0.5, 3, 0.6), Region(6, 1.0, 0.0)])
def test_a_region_is_that_of_the_paper(region):
    scheme = Scheme(Nesterov(Outer("nesterov", 0.3, 0.5)), 6)
    found = play(Regional(Line(), region), [Site(1.0)], scheme, 42.0)
    assert found.losses[-1] == pytest.approx(halos(7, 6, region, 0.3, 0.5), abs=1e-5)


@pytest.mark.parametrize(("change", "said"), [
    ({"interval": 0}, "interval=0"), ({"buffer": 0}, "buffer=0"), ({"mixing": 0.0}, "mixing=0.0"),
    ({"mixing": 1.5}, "mixing=1.5"),
])  # fmt: skip
def test_a_region_that_cannot_be_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        Region(**{"interval": 5, "lr": 0.4} | change)


# ── tasks ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_gradient_of_the_mixture_is_that_of_its_loss():
    task = toys.Mixture(hidden=6, inputs=5)
    x, y = (each[:40] for each in task._held_out)
    params = {name: v.astype(np.float64) for name, v in task.init().items()}
    gradient = task._split(np.empty(task._size, np.float32))
    task._loss(task.init(), x, y, gradient)
    for name, v in params.items():
        for i in range(0, v.size, 7):
            there = [params | {name: v + step * (np.arange(v.size) == i)} for step in (1e-5, -1e-5)]
            slope = (task._loss(there[0], x, y) - task._loss(there[1], x, y)) / 2e-5
            assert slope == pytest.approx(gradient[name][i], abs=1e-5)


def test_islands_have_clusters_of_their_own():
    task, rng = toys.Mixture(skew=0.5), np.random.default_rng(0)
    for island in (0, 3, 11):
        clusters = task._clusters_of(rng, island, (50, 200)).reshape(-1)
        own = np.mean(clusters % toys.SHARDS == island % toys.SHARDS)
        assert own == pytest.approx(0.5 + 0.5 / toys.SHARDS, abs=0.02) and len(set(clusters)) == 32


def test_the_optimum_of_the_textbook_example_is_one():
    optimum = TASK.optimum()
    around = optimum + 0.01 * np.array([[1, 0], [-1, 0], [0, 1], [0, -1]])
    best = TASK.losses(optimum[None])[0]
    assert (TASK.losses(around) > best).all()
    assert len(TASK._data[1]) == 1000 and TASK.lr == 0.1


# ── what schemes do ──────────────────────────────────────────────────────────────────────────────────────────────


def final_losses(name: str, seeds, seconds: float, factor: float = 1.0) -> list[float]:
    """factor: of the outer learning rate."""
    found, scheme = EXPERIMENTS["mixture"], MIXTURE[name]
    sites = [Site(speed) for speed in np.resize(found.speeds, found.islands)]
    outer = dataclasses.replace(scheme.rule.outer, lr=scheme.rule.outer.lr * factor)
    scheme = dataclasses.replace(scheme, rule=dataclasses.replace(scheme.rule, outer=outer))
    return [play(toys.Mixture(seed), sites, scheme, seconds, seed).loss for seed in seeds]


@pytest.mark.slow
def test_naive_asynchronous_nesterov_ends_above_delayed_nesterov():
    """Of one seed, in a quarter of the time."""
    naive, delayed = (final_losses(name, [0], 500.0)[0] for name in ("naive", "delayed"))
    assert naive > delayed + 0.03


@pytest.mark.slow
def test_naive_asynchronous_nesterov_ends_above_delayed_nesterov_in_5_of_5_seeds():
    naive, delayed = (final_losses(name, range(5), EXPERIMENTS["mixture"].seconds) for name in ("naive", "delayed"))
    assert all(a > b for a, b in zip(naive, delayed, strict=True))
    assert interval(naive)[0] > interval(delayed)[2]


@pytest.mark.slow
@pytest.mark.parametrize("factor", [0.25, 0.5, 2.0, 4.0])
def test_naive_asynchronous_nesterov_is_worse_at_other_rates(factor):
    """So that it is not compared at a bad one. On other seeds than those that are compared."""
    seconds = EXPERIMENTS["mixture"].seconds
    other, own = (float(np.mean(final_losses("naive", [10, 11], seconds, each))) for each in (factor, 1.0))
    assert other > own


def test_downpour_reaches_the_optimum_of_the_textbook_example_before_stale_synchronous_islands():
    sites = [Site(speed) for speed in EXPERIMENTS["textbook"].speeds]
    near = TASK.losses(TASK.optimum()[None])[0] + 0.02
    seconds = {
        name: play(TASK, sites, TEXTBOOK[name], 200.0).seconds_to(near) for name in ("ssp-0", "ssp-4", "downpour")
    }
    assert seconds["downpour"] < 0.75 * seconds["ssp-4"] and seconds["ssp-4"] < 200.0 > seconds["ssp-0"]


@pytest.mark.slow
def test_a_thousand_islands_are_played_within_a_minute():
    sites = [Site(float(speed), spread=0.3, straggle=0.02) for speed in np.resize([1, 1, 2, 4], 1000)]
    began = time.process_time()
    found = play(toys.Mixture(), sites, Scheme(Nesterov(Outer("nesterov", 0.7, 0.9)), 10), 30.0)
    assert time.process_time() - began < 60
    assert len(found.view.live()) == 1000 and len(pushes(found)) > 4000


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_the_command_prints_a_table_and_draws(tmp_path, capsys):
    workdir = tmp_path / "lab"
    options = ["--task=textbook", "--seeds=2", "--seconds=20", "--schemes=ssp-0,downpour", f"--workdir={workdir}"]
    assert experiments.main(options) == 0
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines() if line.startswith(("scheme", "ssp-0 ", "downpour "))] == [
        "scheme", "ssp-0", "downpour",
    ]  # fmt: skip
    assert {path.name for path in workdir.iterdir()} == {"table.md", "loss.png", "staleness.png", "path.png"}
    assert all(
        (workdir / name).read_bytes().startswith(b"\x89PNG") for name in ("loss.png", "staleness.png", "path.png")
    )
    rows = (workdir / "table.md").read_text().splitlines()
    assert len(rows) == 4 and rows[3].startswith("| downpour | 0.")


def test_the_command_makes_sites_of_its_options():
    parse = lambda *options: experiments._sites(
        experiments._parser().parse_args(["--task=textbook", *options]), EXPERIMENTS["textbook"]
    )
    sites = parse(
        "--islands=3", "--speeds=1,2", "--latency=0.5", "--fail=2@30+10", "--fail=2@70", "--join=1@5", "--leave=0@9"
    )
    assert [site.speed for site in sites] == [1.0, 2.0, 1.0]
    assert sites[0].leaves == 9.0 and sites[1].joins == 5.0 and {site.latency for site in sites} == {0.5}
    assert sites[2].fails == (30.0, 70.0) and sites[2].away == 10.0


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--schemes=ssp-0,ssp", "--schemes=ssp-0,ssp: 'ssp' is none of ssp-0, ssp-1, ssp-4, downpour"),
        ("--codec=powersgd", "--codec=powersgd: sync.codec=powersgd: needs rounds"),
        ("--speeds=1,fast", "--speeds=1,fast: could not convert"),
        ("--speeds=0", "never ends a round"),
        ("--fail=7@1", "--fail=7@1: expected I@T+S (without +S it stays away), with an island I from 0 to 3"),
        ("--join=1", "--join=1: expected I@T, with"),
        ("--leave=1@5+6", "--leave=1@5+6: expected I@T, with"),
    ],
)
def test_bad_options_are_one_sentence(option, said):
    with pytest.raises(UsageError) as error:
        experiments.main(["--task=textbook", option])
    assert said in str(error.value)


def test_without_matplotlib_the_command_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match="pictures need matplotlib, which is not installed: pip install -r"):
        experiments.main(["--task=textbook", "--seeds=1", "--seconds=1", f"--workdir={tmp_path}"])


@pytest.mark.slow
def test_the_module_is_a_command():
    run = lambda *options: subprocess.run(
        [sys.executable, "-m", "islands.laboratory", *options], cwd=helpers.ROOT, capture_output=True, text=True
    )
    shown = run("--help")
    assert shown.returncode == 0 and shown.stdout.startswith("usage: python -m islands.laboratory --task=")
    refused = run("--task=textbook", "--schemes=none")
    assert refused.returncode == 2 and "is none of" in refused.stderr and "Traceback" not in refused.stderr


def test_an_interval_is_students():
    low, mean, high = interval([1.0, 2.0, 3.0])
    assert (
        mean == 2.0
        and high - mean == pytest.approx(4.302653 / math.sqrt(3))
        and mean - low == pytest.approx(high - mean)
    )
    assert interval([5.0]) == (5.0, 5.0, 5.0)

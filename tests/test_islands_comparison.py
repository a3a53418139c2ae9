"""A comparison whose rows are islands: what its config may say, what its table says, and that an island of the
laboratory trains a language model as train.py does."""

import json
import math
import os
import subprocess
import sys

import helpers
import jax
import numpy as np
import pytest

import compare
from configs.compare import asynchronous
from data.loader import Batches
from islands import compared, comparison, language, toys
from islands.compared import Found, reached, tabulate
from islands.comparison import NAMES, described
from islands.experiments import interval
from islands.laboratory import Measured, Scheme, play
from islands.language import Language, Programs
from islands.merge import Average, Compensated, Nesterov, Outer, Quorum
from islands.pace import Site
from recipes import fit
from recipes.programs import compile_init, compile_steps
from runtime import lock
from runtime.config import UsageError

TASK = toys.Textbook()
SGD = Outer("sgd", 1.0, 0.0)
CONFIG = """
from configs import tiny
SEEDS, TUNING_SEED, SECONDS = (0, 1, 2), 7, 12.0
SITES = {"calm": [{"speed": 1.0}, {"speed": 2.0}], "late": [{"speed": 1.0}, {"speed": 2.0, "joins": 5.0}]}
def get_config():
    c = tiny.get_config()
    c.data.batch_size, c.data.eval_fraction, c.sync.interval = 2, 0.001, 2
    return c
def row(name, sites="calm", **changes):
    return {"name": name, "sites": sites, "changes": {key.replace("__", "."): x for key, x in changes.items()},
            "tune": ("sync.outer.lr", (0.1, 0.4))}
ROWS = [row("all wait", island__merge="average", island__staleness=0, sync__outer__lr=0.4),
        row("none waits", sync__outer__optimizer="sgd", island__dylu=True),
        row("none waits", "late", sync__codec="int4")]
"""

# ── what a config may say ────────────────────────────────────────────────────────────────────────────────────────


def rows_of(tmp_path, text=CONFIG, only=""):
    (tmp_path / "two.py").write_text(text)
    return comparison.found("two.py", *comparison.configuration.execute(str(tmp_path / "two.py")), only)


def test_rows_are_schemes_on_sites(tmp_path):
    waits, goes_on, late = rows_of(tmp_path)
    (first, *_), scheme = waits.jobs, waits.jobs[0].scheme
    assert scheme == Scheme(Average(Outer("nesterov", 0.4, 0.9), 0), 2, staleness=0)
    assert goes_on.jobs[0].scheme == Scheme(Nesterov(Outer("sgd", 0.7, 0.0)), 2, dylu=True)
    assert late.jobs[0].scheme.codec.bits == 4 and late.jobs[0].sites == (Site(1.0), Site(2.0, joins=5.0))
    assert [job.seed for job in waits.jobs] == [0, 1, 2] and first.seconds == 12.0
    tried = waits.candidates[0.1]
    assert tried.seed == 7 and tried.scheme.rule.outer.lr == 0.1 and tried.name == "all wait, calm, sync.outer.lr=0.1"
    assert len({row.jobs[0].config.to_json() for row in (waits, goes_on, late)}) == 1, "they train the same"


def test_a_run_is_kept_by_all_that_it_depends_on(tmp_path):
    files = lambda text: {job.file(tmp_path) for row in rows_of(tmp_path, text) for job in row.jobs}
    assert len(files(CONFIG)) == 9
    changes = [("SECONDS = (0, 1, 2), 7, 12.0", "SECONDS = (0, 1, 2), 7, 13.0"), ("c.sync.interval = 2", "c.seed = 2"),
               ('[{"speed": 1.0}, {"speed": 2.0}]', '[{"speed": 1.5}, {"speed": 2.0}]'),
              ('row("', 'dict(region={"interval": 1, "lr": 1.0}) | row("')]  # fmt: skip
    for change in changes:
        assert change[0] in CONFIG
        assert len(files(CONFIG) & files(CONFIG.replace(*change))) == (3 if "speed" in change[0] else 0)


def test_the_first_row_of_each_sites_is_always_there(tmp_path):
    names = lambda only: [f"{row.name}, {row.sites}" for row in rows_of(tmp_path, only=only)]
    assert names("all") == ["all wait, calm", "none waits, late"]
    assert names("none waits, calm") == ["all wait, calm", "none waits, calm", "none waits, late"]


@pytest.mark.parametrize(
    ("merge", "rule"),
    [("average", Average(SGD, 1)), ("nesterov", Nesterov(SGD)), ("compensated", Compensated(SGD)),
     ("quorum", Quorum(SGD, 3))],
)  # fmt: skip
def test_every_merge_rule_can_be_compared(merge, rule):
    island = {"island.merge": merge, "island.staleness": 1, "island.quorum": 3, "sync.interval": 20}
    outer = {"sync.outer.optimizer": "sgd", "sync.outer.lr": 1.0}
    config, scheme = described(asynchronous.get_config(), island | outer, "row 'a' sets")
    assert scheme == Scheme(rule, 20, staleness=1)
    assert (config.sync.replicas, config.sync.strategy) == (1, "sync")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("SEEDS, TUNING_SEED, SECONDS = (0, 1, 2)", "SEEDS, TUNING_SEED, SECONDS = (0, 1)"), "needs 3 seeds or more"),
        (("SECONDS = (0, 1, 2), 7, 12.0", "LENGTH = (0, 1, 2), 7, 12.0"), "--config=two.py has no SECONDS"),
        (('"speed": 2.0}', '"sped": 2.0}'), "SITES: .*'sped'.*islands/pace.py says what a site has"),
        (('"speed": 2.0}', '"speed": 0.0}'), "SITES: an island of 0 steps"),
        (('"none waits", "late"', '"none waits", "never"'), "row 'none waits': sites='never' is none of calm, late"),
        (("island__dylu", "island__dilu"), "row 'none waits' sets the unknown config key 'island.dilu'"),
        (('"average"', '"mean"'), "row 'all wait' sets what cannot be: island.merge=mean: expected one of average"),
        (('"int4"', '"powersgd"'), "row 'none waits' sets what cannot be: sync.codec=powersgd: needs rounds"),
        (("ROWS = [", "ROWS = [3, "), "row 3: expected a dictionary"),
        (('row("all', 'dict(region={"lr": 1.0}) | row("all'), "row 'all wait': region: .*'interval'"),
        (('row("all', 'dict(region={"lr": 1.0, "interval": 0}) | row("all'), "row 'all wait': region: interval=0"),
    ],
)
def test_bad_comparisons_are_one_sentence(tmp_path, change, said):
    assert change[0] in CONFIG
    with pytest.raises(UsageError, match=said):
        rows_of(tmp_path, CONFIG.replace(*change))


def test_the_shipped_comparison_is_of_islands_of_four_speeds():
    rows = comparison.found("x", asynchronous.get_config(), {name: getattr(asynchronous, name) for name in NAMES})
    steady = [row for row in rows if row.sites == "steady"]
    assert [site.speed for site in steady[0].jobs[0].sites] == [1.0, 1.0, 2.0, 4.0]
    grid = set(asynchronous.OUTER_LR[1])
    assert all(row.key == "sync.outer.lr" and grid <= row.candidates.keys() for row in steady), "tuned alike"
    seeds = {job.seed for row in rows for job in row.jobs}
    assert asynchronous.TUNING_SEED not in seeds
    for row in steady:
        assert row.jobs[0].scheme.rule.outer.lr in row.candidates
    for row in rows:
        (same,) = (other for other in steady if other.name == row.name)
        assert same.jobs[0].scheme == row.jobs[0].scheme, "rates are not tuned anew where there is trouble"


def test_compare_takes_it_and_locks_its_folder(tmp_path):
    (tmp_path / "two.py").write_text(CONFIG)
    options = [f"--config={tmp_path}/two.py", f"--workdir={tmp_path}/out"]
    with pytest.raises(UsageError, match="--simulate: the islands of such a comparison train one after another"):
        compare.main([*options, "--simulate=8"])
    lock.hold(tmp_path / "out")
    with pytest.raises(UsageError, match=f"out is in use by process {os.getpid()}"):
        compare.main(options)
    lock.release()
    with pytest.raises(UsageError, match="no row has `tune`"):
        comparison.main(rows_of(tmp_path, CONFIG.replace("(0.1, 0.4)", "()")), tmp_path, tune=True, processes=1)


# ── what is shown ────────────────────────────────────────────────────────────────────────────────────────────────


def falling(start: float, slope: float, steps: int = 64) -> Measured:
    """A line, whose smoothed curve is itself but for its ends."""
    return Measured(times=[10.0 * i for i in range(steps + 1)], losses=[start - slope * i for i in range(steps + 1)])


def test_a_loss_is_reached_between_two_points():
    run = falling(5.0, 0.1)
    assert reached(run, 4.05) == pytest.approx(95.0) and reached(run, 5.1) == 0.0
    assert reached(run, -2.0) == math.inf


def test_a_moments_luck_is_not_a_loss_that_is_reached():
    run = falling(5.0, 0.1)
    run.losses[10] = 3.6  # where it is at 4.0
    assert reached(run, 3.5) == pytest.approx(150.0)
    assert run.seconds_to(3.6) == 100.0


def test_rows_are_compared_seed_by_seed_with_the_first_of_their_sites():
    slow = [falling(5.0, 0.02), falling(6.0, 0.03), falling(7.0, 0.04)]
    fast = [falling(5.0, 0.04), falling(6.0, 0.09), falling(7.0, 0.08)]
    rows = [Found("a", "x", 1, slow), Found("b", "x", 1, fast), Found("a", "y", 1, fast)]
    first, second, other = tabulate(rows)
    assert first["sooner"] == pytest.approx((1, 1, 1)) and other["sooner"] == pytest.approx((1, 1, 1))
    assert second["sooner"] == pytest.approx(interval([2.0, 3.0, 2.0])), (
        "of rates that are twice and three times as high"
    )
    assert second["seconds"] == pytest.approx([each / x for each, x in zip(first["seconds"], (2, 3, 2), strict=True)])


def test_who_never_comes_to_the_target_has_no_interval():
    rows = tabulate([Found("a", "x", 1, [falling(5.0, 0.1)] * 3), Found("b", "x", 1, [falling(5.0, 0.01)] * 3)])
    cells = dict(zip(compared.HEAD, compared.cells(rows[1]), strict=True))
    assert cells["s to target"] == "never / never / never" and cells["× sooner"] == "" == compared.cells(rows[1])[6]


def test_what_islands_were_at_adds_up():
    """Of islands that wait for the slowest, and of one that dies, is away, and comes back."""
    sites = [
        Site(1.0, bandwidth=8.0),
        Site(4.0, bandwidth=8.0),
        Site(1.0, fails=(41.0,), away=70.0),
        Site(1.0, joins=10.0),
    ]
    found = play(TASK, sites, Scheme(Average(SGD), 4, 0), 200.0)
    assert found.away == [(3, 0.0, 10.0), (2, 41.0, 111.0)]
    for i in range(4):
        own = [each for each in found.rounds if each.island == i]
        assert all(a.ended <= b.began for a, b in zip(own, own[1:], strict=False)), "one after another"
        whole = [each for each in own if each.counts]
        assert len(whole) == sum(record.type == "push" and record.island == f"island-{i}" for record in found.log)
        assert [each.last - each.first for each in whole] == pytest.approx([1.0 if i == 1 else 4.0] * len(whole))
        cut = [each.ended for each in own if not each.counts]
        assert cut[:-1] == [] and cut[-1:] in ([], [200.0]) if i != 2 else cut[0] == 41.0
    pushed = [sum(each.counts and each.island == i for each in found.rounds) for i in range(4)]
    spent = [seconds * pushes / 200.0 for seconds, pushes in zip((4, 1, 4, 4), pushed, strict=True)]
    assert compared.busy(Found("a", "x", 4, [found])) == pytest.approx(spent)
    assert compared.busy(Found("a", "x", 4, [found, found])) == pytest.approx(spent), "the mean of the seeds"


@pytest.mark.slow
def test_a_table_and_three_plots_are_written(tmp_path):
    sites, scheme = [Site(1.0), Site(2.0)], lambda dylu: Scheme(Nesterov(SGD), 4, dylu=dylu)
    runs = {dylu: [play(TASK, sites, scheme(dylu), 40.0, seed) for seed in range(3)] for dylu in (False, True)}
    rows = [Found("as they are", "x", 2, runs[False]), Found("by speed", "x", 2, runs[True])]
    shown = compared.write(rows, tmp_path)
    assert shown.splitlines()[0].split()[0] == "scheme" and len(shown.splitlines()) == 3
    assert (tmp_path / "table.csv").read_text().splitlines()[2].startswith("by speed,x,0.")
    assert len(json.loads((tmp_path / "table.json").read_text())["rows"][1]["losses"]) == 3
    assert (tmp_path / "table.md").read_text().count("\n| ") == 4
    plots = {path.name: path.read_bytes() for path in (tmp_path / "plots").iterdir()}
    assert plots.keys() == {"loss.png", "staleness.png", "time.png"}
    assert all(data.startswith(b"\x89PNG") for data in plots.values())


# ── a language model ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def programs() -> Programs:
    config = helpers.tiny(data__batch_size=4, data__eval_fraction=0.001, model__num_layers=1)
    return Programs(config)


@pytest.mark.slow
def test_rounds_of_an_island_are_the_steps_of_one_replica(programs):
    """To the bit: with its optimizer's state and its place in the text from round to round."""
    task, params, own = Language(programs, 3), Language(programs, 3).init(), Language(programs, 3).begin(1)
    before = {name: x.copy() for name, x in params.items()}
    first, own, _ = task.steps(params, own, 1, 0, 3)
    then, own, mean = task.steps(first, own, 1, 3, 2)
    loader = language._loader(programs, 3, 1)
    updates = fit.Steps(programs.parts, programs.steps, programs.init(np.uint32(3)), loader, 0, 5)
    losses = [float(metrics["loss"][0]) for _, metrics in updates]
    alone = programs.vectors(updates.state.params)
    assert then.keys() == alone.keys()
    assert all((then[name] == alone[name]).all() for name in alone)
    assert int(own.step) == 5 and mean == pytest.approx(np.mean(losses[3:]), rel=1e-6)
    assert all((params[name] == before[name]).all() for name in before), "what others begin with, too"
    assert task.loss(then) < task.loss(params) and task.loss(then) == task.loss(then)
    assert task.tokens == 4 * 32


@pytest.mark.slow
def test_each_island_reads_the_text_in_an_order_of_its_own(programs):
    rows = lambda seed, island: language._loader(programs, seed, island).rows(0, [0, 1])["tokens"].tobytes()
    assert len({rows(seed, island) for seed in range(3) for island in range(4)}) == 12
    assert rows(1, 2) == language._loader.__wrapped__(programs, 1, 2).rows(0, [0, 1])["tokens"].tobytes()


class Share(Batches):
    """What one of two replicas reads of the batches of both."""

    def __init__(self, whole, replica):
        self.whole, self.replica, self.batch_size = whole, replica, whole.batch_size // 2

    def rows(self, step, row_ids):
        ids = np.arange(self.batch_size)[row_ids] + self.replica * self.batch_size
        return self.whole.rows(step, list(map(int, ids)))


@pytest.mark.slow
def test_islands_of_one_speed_that_wait_for_each_other_are_diloco(programs, monkeypatch):
    """The strategy of parallel/strategies/local.py, with two replicas, on the same rows of the text."""
    changes = {"sync__replicas": 2, "sync__strategy": "diloco", "sync__interval": 3, "sync__outer__lr": 0.6}
    config = helpers.tiny(data__batch_size=8, data__eval_fraction=0.001, model__num_layers=1, **changes)
    parts = helpers.build(config, (1, 1, 1))
    whole = programs.data.loader(0, 8)
    updates = fit.Steps(parts, compile_steps(parts), compile_init(parts)(np.uint32(5)), whole, 0, 9)
    for _ in updates:
        pass
    monkeypatch.setattr(language, "_loader", lambda programs, seed, island: Share(whole, island))
    scheme = Scheme(Average(Outer("nesterov", 0.6, 0.9)), 3, staleness=0)
    found = play(Language(programs, 5), [Site(1.0), Site(1.0)], scheme, 9.0)
    for name, x in programs.vectors(jax.device_get(updates.state.params)).items():
        np.testing.assert_allclose(found.state.arrays[f"params/{name}"], x, rtol=0, atol=2e-6)
    assert found.steps == 18


@pytest.mark.slow
def test_a_comparison_of_islands_is_made_and_goes_on_where_it_was_stopped(tmp_path):
    config = tmp_path / "two.py"
    config.write_text(CONFIG)
    command = [sys.executable, "compare.py", f"--config={config}", f"--workdir={tmp_path}/out"]
    run = lambda *more: subprocess.run([*command, *more], cwd=helpers.ROOT, capture_output=True, text=True, timeout=500)
    done = run("--only=all wait")
    assert done.returncode == 0, done.stderr
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "results").glob("*.json")}
    assert len(files) == 6
    done = run("--processes=2")
    assert done.returncode == 0, done.stderr
    assert all(file.stat().st_mtime_ns == before for file, before in files.items()), "nothing is run twice"
    assert done.stdout.count("none waits, calm | seed") == 3 and "| loss " in done.stdout
    rows = json.loads((tmp_path / "out" / "table.json").read_text())["rows"]
    assert [(row["name"], row["sites"]) for row in rows] == [
        ("all wait", "calm"), ("none waits", "calm"), ("none waits", "late"),
    ]  # fmt: skip
    assert rows[0]["steps"] == 24 and rows[1]["steps"] == 36 and rows[1]["losses"][0][-1] < rows[1]["losses"][0][0]
    done = run("--tune")
    assert done.returncode == 0, done.stderr
    assert "all wait | sync.outer.lr | 0.1: " in done.stdout and "at the edge: try more" in done.stdout

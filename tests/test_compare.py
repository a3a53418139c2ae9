"""compare.py: the same seeds for every row, the arithmetic of its table, and going on where it was stopped."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import helpers
import jax
import numpy as np
import pytest

import compare
from data.tokenizer import ByteTokenizer
from recipes import fit
from recipes.compare import Plan, search, summary
from recipes.language import Text
from recipes.runner import Job, Runner
from recipes.table import fitting, header, markdown, student_t, tabulate, verdict, write
from runtime import lock
from runtime.config import UsageError
from runtime.metrics import write_json

CONFIG = """
from configs import tiny
SEEDS = (0, 1, 2)
def get_config():
    c = tiny.get_config()
    c.steps, c.eval_every, c.sync.replicas = 6, 2, 2
    c.data.batch_size, c.data.eval_fraction = 8, 0.001
    return c
def row(name, **changes):
    return {"name": name, "changes": {k.replace("__", "."): v for k, v in changes.items()},
            "tune": ("optimizer.lr", (1e-3, 4e-3))}
LATE = {"sync__strategy": "diloco", "sync__interval": 3}
ROWS = [row("base"), row("signs", sync__codec="sign") | {"floor": True}, row("late", **LATE),
        row("warm", sync__warm_steps=3, **LATE) | {"tune": None}]
"""


def summary_of(name, finals, size=100.0, ended="", floor=False):
    none = [0] * len(finals)
    method = {"bytes_per_parameter": 4.0, "interval": 1, "fragments": 1, "overlap": 0}
    return {"name": name, "floor": floor, "steps": [1], "eval_losses": [[x] for x in finals], "final_losses": finals,
            "seconds": [1.0] * len(finals), "wire_bytes_per_step": size, "wire_bytes_from": "", "parameters": 10,
            "method": method, "skipped": none, "clipped": none, "ended": [ended]}  # fmt: skip


def test_gaps_are_paired_by_seed_with_student_intervals():
    table = tabulate([summary_of("a", [2.0, 3.0, 4.0]), summary_of("b", [2.1, 3.1, 4.4], 25.0)], {})
    row = table["rows"][1]
    gaps = 100 * np.array([0.1, 0.1, 0.4]) / 3.0
    half = 4.302653 * gaps.std(ddof=1) / np.sqrt(3)
    assert row["gap_percent"] == pytest.approx(gaps.mean()) and row["ratio"] == 4.0
    assert (row["gap_low"], row["gap_high"]) == pytest.approx((gaps.mean() - half, gaps.mean() + half))
    assert table["rows"][0]["gap_percent"] == 0 == table["rows"][0]["gap_low_pooled"]


def test_rows_that_lose_little_share_their_deviation():
    """4 degrees of freedom instead of 2: Student's quantile is 2.776. A row that was ended is not one of them, nor is
    one that loses much, or a floor row."""
    rows = [summary_of("a", [2.0, 3.0, 4.0]), summary_of("b", [2.01, 3.01, 4.04]), summary_of("c", [2.0, 3.01, 4.01])]
    others = [summary_of("d", [np.nan, 3.0, 4.0]), summary_of("e", [2.2, 3.2, 4.9])]
    others += [summary_of("b, moved", [2.0, 3.0, 4.2], floor=True)]
    table = tabulate([*rows, *others], {"replicas": 2, "steps": 1, "tokens": 1, "seeds": 3})
    found = table["rows"]
    assert all(np.isnan(row["gap_low_pooled"]) and np.isnan(row["gap_high_pooled"]) for row in found[3:])
    assert "+nan … +nan |  |" in markdown(table), "an interval of its own that is not a number, and no pooled one"
    gaps = 100 * np.array([[0.01, 0.01, 0.04], [0.0, 0.01, 0.01]]) / 3.0
    half = 2.7764451 * np.sqrt(gaps.var(axis=1, ddof=1).mean() / 3)
    for row, gap in zip(found[1:3], gaps, strict=True):
        assert (row["gap_low_pooled"], row["gap_high_pooled"]) == pytest.approx((gap.mean() - half, gap.mean() + half))


def test_students_quantiles_for_any_number_of_seeds():
    """Of the tables in Student's and Fisher's books, two-sided 95 %."""
    known = {1: 12.706, 2: 4.303, 4: 2.776, 9: 2.262, 10: 2.228, 30: 2.042, 120: 1.980}
    assert {n: round(student_t(n), 3) for n in known} == known
    seeds = np.linspace(2, 3, 11)
    rows = tabulate([summary_of("a", list(seeds)), summary_of("b", list(seeds + 0.1))], {})["rows"]
    assert rows[1]["gap_low"] == pytest.approx(4.0) == rows[1]["gap_high"]


def test_a_row_whose_run_was_ended_says_so_and_leaves_the_others_alone(tmp_path):
    rows = [summary_of("a", [2.0, 3.0, 4.0]), summary_of("b", [np.nan, 3.1, 4.4], ended="20 updates were skipped")]
    rows[1]["skipped"] = [20, 0, 1]
    table = tabulate(rows, {"replicas": 2, "steps": 3, "tokens": 4, "seeds": 3})
    assert verdict(table["rows"][1], 1.0) == "unresolved"
    text = markdown(table)
    assert "| 20 / 0 / 1 | 0 / 0 / 0 |" in text and text.endswith("- b: 20 updates were skipped")
    write(table, tmp_path)  # and the plots are drawn


@pytest.mark.parametrize("width", [400, 160, 100, 80, 30])
def test_a_terminal_is_shown_as_many_columns_as_fit(width):
    rows = [summary_of("a", [2.0, 3.0, 4.0]), summary_of("a long name of 33 letters, no less", [2.1, 3.1, 4.4])]
    table = tabulate([*rows, summary_of("c", [np.nan, 3.1, 4.4], ended="20 updates were skipped")], {})
    text = fitting(table, width)
    lines = text.split("\n\n")[0].splitlines()
    assert max(map(len, lines)) <= width and len(lines) == 2 + 3
    assert "gap %" in lines[0], "what the table is about stays longest"
    left_out = text.rpartition("also has: ")[2] if "also has" in text else ""
    for name in header(table):
        assert (name in lines[0]) != (name in left_out), name
    assert ("95 % interval" in lines[0]) == (width >= 80) and (left_out == "") == (width == 400)
    assert "- c: 20 updates were skipped" in text


def test_the_table_is_cut_for_a_terminal_only(monkeypatch):
    table = tabulate([summary_of("a", [2.0, 3.0, 4.0])], {"replicas": 2, "steps": 3, "tokens": 4, "seeds": 3})
    assert compare.shown(table) == markdown(table)
    monkeypatch.setattr(compare, "is_terminal", lambda stream: stream is sys.stdout)
    monkeypatch.setattr(compare, "terminal_columns", lambda: 70)
    assert compare.shown(table) == fitting(table, 70) != fitting(table, 200)


def kept(runner: Runner, job: Job, loss: float, **more) -> None:
    """A result as if it had been trained."""
    found = {"steps": [2], "eval_loss": [loss], "final_loss": loss, "skipped": job.seed, "clipped": 0, "ended": "",
             "seconds": 1.0, "parameters": 1, "wire_bytes_per_step": 4.0, "wire_bytes_from": "",
             "method": summary_of("", [])["method"]}  # fmt: skip
    write_json(runner.file(job), found | more)


def plan_of(tmp_path, text=CONFIG, only="") -> Plan:
    (tmp_path / "three.py").write_text(text)
    return Plan.read(str(tmp_path / "three.py"), only)


def test_a_row_is_summed_up_from_the_files_of_its_runs(tmp_path):
    row, *_ = plan_of(tmp_path).jobs()
    runner = Runner(tmp_path, row)
    for job in row:
        kept(runner, job, np.nan if job.seed == 1 else 2.0)
    found = summary(runner, row)
    assert found["skipped"] == [0, 1, 2]
    np.testing.assert_array_equal(found["final_losses"], [2.0, np.nan, 2.0])
    assert "| 0 / 1 / 2 | 0 / 0 / 0 |" in markdown(tabulate([found], plan_of(tmp_path).about()))


def test_a_search_tells_the_best_candidate_and_whether_it_is_at_the_edge(tmp_path, monkeypatch):
    """One whose loss is not a number is not chosen."""
    plan = plan_of(tmp_path, CONFIG.replace("(1e-3, 4e-3)", "(1e-3, 2e-3, 4e-3)"))
    losses = {"base": {1e-3: 3.0, 2e-3: 2.0, 4e-3: np.nan}, "signs": {1e-3: 1.0, 2e-3: 2.0, 4e-3: 3.0}}

    def train(self, jobs):
        for job in jobs:
            name, _, value = job.name.partition(", optimizer.lr=")
            assert job.config.optimizer.lr == float(value) and (job.config.steps, job.seed) == (2, 0)
            kept(self, job, losses.get(name, losses["base"])[float(value)])

    monkeypatch.setattr(Runner, "train", train)
    found = {row.name: row for row in search(plan, tmp_path)}
    assert list(found) == ["base", "signs", "late"], "and no floor"
    assert (found["base"].best, found["base"].edge) == (2e-3, False)
    assert (found["signs"].best, found["signs"].edge) == (1e-3, True)
    with pytest.raises(UsageError, match="no row has `tune`"):
        search(plan_of(tmp_path, CONFIG.replace('"tune": ("optimizer.lr", (1e-3, 4e-3))', "")), tmp_path)


@pytest.mark.slow
def test_updates_that_are_refused_are_counted_and_end_a_run_as_in_training(tmp_path, capsys, monkeypatch):
    two = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda: two)
    text = CONFIG.replace("steps, c", "model.num_layers = 1\n    c.steps, c")
    text = text.replace("    return c", "    c.guard.abort_after, c.optimizer.lr = 3, 1e30\n    return c")
    row, *_ = plan_of(tmp_path, text).jobs()
    runner = Runner(tmp_path, row)

    def run():
        runner.train(row[:1])
        return runner.result(row[0])

    bad = run()
    assert bad["skipped"] == 3 and "the last 3 updates were skipped or scaled (guard.abort_after)" in bad["ended"]
    assert len(bad["eval_loss"]) == 3 and np.isnan(bad["eval_loss"][-1]), "evaluations that were not made"
    assert "skipped 3" in capsys.readouterr().out
    assert run()["skipped"] == 3, "read again from the file"


def test_a_claim_holds_fails_or_is_unresolved():
    found = lambda low, high: verdict({"gap_low": low, "gap_high": high}, 1.0)
    assert (found(-1, 0.9), found(1.1, 2), found(0.5, 1.5)) == ("holds", "fails", "unresolved")


def test_a_comparison_cuts_its_batches_as_training_does():
    """Both take the loader of their data, which marks the documents."""
    corpus = SimpleNamespace(tokenizer=ByteTokenizer(), train_N=helpers.text())
    text = Text(corpus, 32, document_mask=True)
    loader = text.loader(seed=0, batch_size=8)
    assert "segments" in loader.rows(0, [0])


def test_what_is_due_every_so_many_updates_is_due_after_the_last_one_too():
    due = lambda every: [done for done in range(1, 8) if fit.due(done, every, last=7)]
    assert (due(3), due(7), due(0)) == ([3, 6, 7], [7], [7])


@pytest.mark.slow
def test_documents_are_masked_in_a_comparison_too(tmp_path):
    masked = "c.data.batch_size, c.data.eval_fraction, c.data.document_mask, c.sync.replicas = 8, 0.001, True, 8"
    row, *_ = plan_of(tmp_path, CONFIG.replace("c.data.batch_size, c.data.eval_fraction = 8, 0.001", masked)).jobs()
    runner = Runner(tmp_path, row)
    runner.train(row[:1])
    found = runner.result(row[0])
    assert found["steps"] == [2, 4, 6] and 3 < found["eval_loss"][0] < 6


@pytest.mark.slow
def test_a_comparison_is_made_and_goes_on_where_it_was_stopped(tmp_path):
    config = tmp_path / "three.py"
    config.write_text(CONFIG)
    command = [sys.executable, "compare.py", f"--config={config}", f"--workdir={tmp_path}/out", "--simulate=2"]
    done = subprocess.run([*command, "--only=signs"], cwd=helpers.ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "results").glob("*.json")}
    assert len(files) == 3 * 3 and "ETA" in done.stdout, "the baseline, signs, and these with weights that are moved"
    command += ["--processes=2"]
    done = subprocess.run(command, cwd=helpers.ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert all(file.stat().st_mtime_ns == before for file, before in files.items()), "nothing is run twice"
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    names = [row["name"] for row in table["rows"]]
    assert names == ["base", "base, weights moved by 1e-06", "signs", "signs, weights moved by 1e-06", "late", "warm"]
    base, floor, signs, other, late, warm = table["rows"]
    assert abs(floor["gap_percent"]) < 0.01 and floor["eval_losses"] != base["eval_losses"]
    assert other["final_losses"] != signs["final_losses"] and other["ratio"] == signs["ratio"]
    assert signs["ratio"] > 20 and base["wire_bytes_from"] == "compiled program"
    assert late["wire_bytes_per_step"] == pytest.approx(base["wire_bytes_per_step"] / 3, rel=0.01)
    assert warm["wire_bytes_per_step"] == pytest.approx(base["wire_bytes_per_step"] * (3 + 1) / 6, rel=0.01)
    markdown = (tmp_path / "out" / "table.md").read_text()
    assert markdown.count("\n| ") == 7 and (tmp_path / "out" / "table.csv").read_text().count("\n") == 7
    for plot in ("loss_steps", "loss_bytes", "utilisation"):
        assert (tmp_path / "out" / "plots" / f"{plot}.png").read_bytes().startswith(b"\x89PNG")
    assert signs["config"]["sync.codec"] == "sign" and table["about"]["environment"]["versions.jax"]
    page = (tmp_path / "out" / "report.html").read_text()
    assert all(json.dumps(row["final_losses"], separators=(",", ":")) in page for row in table["rows"])


@pytest.mark.slow
def test_a_row_with_warm_steps_begins_with_the_baselines_state(tmp_path):
    """To the same losses as by itself, on programs that were compiled apart."""
    rows = {row[0].name: row for row in plan_of(tmp_path).jobs()}
    jobs, two = [*rows["base"], *rows["warm"]], jax.devices()[:2]
    both = Runner(tmp_path / "both", jobs, two)
    both.train(rows["base"][:1])
    both.train(rows["warm"][:1])
    alone = Runner(tmp_path / "alone", jobs, two)
    alone._keep = lambda *_: None
    alone.train(rows["warm"][:1])
    found, expected = both.result(rows["warm"][0]), alone.result(rows["warm"][0])
    assert found["eval_loss"] == expected["eval_loss"] and found["final_loss"] == expected["final_loss"]
    assert found["eval_loss"][0] == both.result(rows["base"][0])["eval_loss"][0], "of the steps that both have made"
    assert len(list((tmp_path / "both" / "states").iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (("SEEDS = (0, 1, 2)", "SEEDS = (0, 1)"), "an interval needs 3 seeds or more, all different"),
        (("SEEDS = (0, 1, 2)", "SEEDS = (0, 1, 2, 2)"), "an interval needs 3 seeds or more, all different"),
        (('sync__codec="sign"', "log_every=None"), "row 'signs' sets log_every=None: expected an integer"),
        (('sync__codec="sign"', 'sync__codek="sign"'), "row 'signs' sets the unknown config key 'sync.codek'"),
        (("    return c", "    c.optimizer.b1 = None\n    return c"), "sets optimizer.b1=None: expected a number"),
        (('sync__codec="sign"', "optimizer__warmup_steps=5"), "optimizer.warmup_steps=5: must be less than steps=2"),
        (("(1e-3, 4e-3)", "(1e-3, 2e-3, 3e-3, 4e-3)"), "4 candidates; every row has at most 3"),
        (('sync__codec="sign"', 'sync__codec="sing"'), "did you mean 'sign'"),
        (("ROWS = ", "LINES = "), "has no ROWS"),
        (('sync__codec="sign"', 'sync__strategy="island"'), "'signs' sets sync.strategy=island: it trains with others"),
    ],
)
def test_bad_comparisons(tmp_path, change, part):
    config = tmp_path / "bad.py"
    config.write_text(CONFIG.replace(*change))
    with pytest.raises(UsageError, match=part):
        Plan.read(str(config), "")
    with pytest.raises(UsageError, match="no such file"):
        Plan.read(f"{tmp_path}/none.py", "")


def test_a_comparison_that_runs_is_not_started_twice(tmp_path, capsys):
    (tmp_path / "config.py").write_text(CONFIG)
    lock.hold(tmp_path / "results")
    options = [f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/results"]
    with pytest.raises(UsageError, match=f"workdir: {tmp_path}/results is in use by process {os.getpid()}"):
        compare.main(options)
    lock.release()


@pytest.mark.parametrize("option", ["processes", "simulate"])
def test_a_number_of_processes_or_devices_is_at_least_1(option, capsys):
    for text in ("0", "-2", "two"):
        with pytest.raises(SystemExit, match="2"):
            compare.main(["--config=configs/compare/quickstart.py", f"--{option}={text}"])
        assert f"argument --{option}: invalid positive value: '{text}'" in capsys.readouterr().err


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_comparison_is_kept_in_a_folder(tmp_path, scheme):
    (tmp_path / "config.py").write_text(CONFIG)
    with pytest.raises(UsageError, match=f"--workdir={scheme}://bucket/x: {scheme}:// is not supported"):
        compare.main([f"--config={tmp_path}/config.py", f"--workdir={scheme}://bucket/x"])


@pytest.mark.parametrize(("codec", "built"), [("randk", 3), ("sign", 3), ("int8", 1)])
def test_what_a_codec_draws_varies_with_the_seed(tmp_path, monkeypatch, codec, built):
    """Only programs that draw are built for each seed."""
    config = helpers.tiny(sync__codec=codec, sync__replicas=2)
    runner = Runner(tmp_path, [])
    seeds = []

    def stop(config, own):
        seeds.append(config.seed)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "_build", stop)
    for seed in (0, 1, 2):
        with pytest.raises(KeyboardInterrupt):
            runner._train(Job(codec, config, seed))
    assert len(set(seeds)) == built

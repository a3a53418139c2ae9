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
from recipes.compare import Plan, Row, Runner
from recipes.language import Text
from recipes.table import markdown, student_t, tabulate, verdict, write
from runtime import lock
from runtime.config import UsageError
from runtime.metrics import write_json

CONFIG = """
from configs import tiny
SEEDS = (0, 1, 2)
def get_config():
    c = tiny.get_config()
    c.steps, c.eval_every, c.sync.replicas = 6, 2, 2
    c.data.batch_size = 8
    return c
def row(name, **changes):
    return {"name": name, "changes": {k.replace("__", "."): v for k, v in changes.items()},
            "tune": ("optimizer.lr", (1e-3, 4e-3))}
ROWS = [row("base"), row("signs", sync__codec="sign"), row("late", sync__strategy="diloco", sync__interval=3)]
"""


def summary(name, finals, size=100.0, ended=""):
    none = [0] * len(finals)
    return {"name": name, "tuned": "", "steps": [1], "eval_losses": [[x] for x in finals], "wire_bytes_per_step": size,
            "wire_bytes_from": "", "parameters": 10, "method": {"bytes_per_parameter": 4.0, "interval": 1,
            "fragments": 1, "overlap": 0}, "skipped": none, "clipped": none, "ended": [ended]}  # fmt: skip


def test_gaps_are_paired_by_seed_with_student_intervals():
    table = tabulate([summary("a", [2.0, 3.0, 4.0]), summary("b", [2.1, 3.1, 4.4], 25.0)], {})
    row = table["rows"][1]
    gaps = 100 * np.array([0.1, 0.1, 0.4]) / 3.0
    half = 4.302653 * gaps.std(ddof=1) / np.sqrt(3)
    assert row["gap_percent"] == pytest.approx(gaps.mean()) and row["ratio"] == 4.0
    assert (row["gap_low"], row["gap_high"]) == pytest.approx((gaps.mean() - half, gaps.mean() + half))
    assert table["rows"][0]["gap_percent"] == 0


def test_students_quantiles_for_any_number_of_seeds():
    """Of the tables in Student's and Fisher's books, two-sided 95 %."""
    known = {1: 12.706, 2: 4.303, 4: 2.776, 9: 2.262, 10: 2.228, 30: 2.042, 120: 1.980}
    assert {n: round(student_t(n), 3) for n in known} == known
    seeds = np.linspace(2, 3, 11)
    rows = tabulate([summary("a", list(seeds)), summary("b", list(seeds + 0.1))], {})["rows"]
    assert rows[1]["gap_low"] == pytest.approx(4.0) == rows[1]["gap_high"]


def test_a_row_whose_run_was_ended_says_so_and_leaves_the_others_alone(tmp_path):
    rows = [summary("a", [2.0, 3.0, 4.0]), summary("b", [np.nan, 3.1, 4.4], ended="20 updates were skipped")]
    rows[1]["skipped"] = [20, 0, 1]
    table = tabulate(rows, {"replicas": 2, "steps": 3, "tokens": 4, "seeds": 3})
    assert verdict(table["rows"][1], 1.0) == "unresolved"
    text = markdown(table)
    assert "| 20 / 0 / 1 | 0 / 0 / 0 |" in text and text.endswith("- b: 20 updates were skipped")
    write(table, tmp_path)  # and the plots are drawn


def test_a_row_is_summed_up_from_the_files_of_its_runs(tmp_path):
    """A candidate whose loss is not a number, null in its file, is not chosen."""
    config = tmp_path / "three.py"
    config.write_text(CONFIG)
    plan = Plan.read(str(config), "")
    runner, row, method = Runner(plan, tmp_path), plan.rows[0], summary("", [])["method"]
    for value, loss in zip(row.candidates, (2.0, np.nan), strict=True):
        for steps, seed in {(plan.third, 0), *((plan.steps, seed) for seed in plan.seeds)}:
            found = {"steps": [2], "eval_loss": [loss], "skipped": seed, "clipped": 0, "ended": "", "parameters": 1,
                     "wire_bytes_per_step": 4.0, "wire_bytes_from": "", "method": method}  # fmt: skip
            write_json(runner._file(row, value, seed, steps), found)
    found = runner.summary(row)
    assert found["tuned"].startswith("optimizer.lr=0.001 of") and found["eval_losses"] == [[2.0]] * 3
    assert found["skipped"] == [0, 1, 2] and runner.finished(row)
    assert "| 0 / 1 / 2 | 0 / 0 / 0 |" in markdown(tabulate([found], plan.about()))


@pytest.mark.slow
def test_updates_that_are_refused_are_counted_and_end_a_run_as_in_training(tmp_path, capsys, monkeypatch):
    two = jax.devices()[:2]
    monkeypatch.setattr(jax, "devices", lambda: two)
    config = tmp_path / "one.py"
    text = CONFIG.replace("(1e-3, 4e-3)", "(1e-3, 1e30)").replace("steps, c", "model.num_layers = 1\n    c.steps, c")
    config.write_text(text.replace("    return c", "    c.guard.abort_after = 3\n    return c"))
    plan = Plan.read(str(config), "")
    run = lambda: Runner(plan, tmp_path).result(plan.rows[0], 1e30, 0, 6)
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
    config = tmp_path / "masked.py"
    masked = "c.data.batch_size, c.data.document_mask, c.sync.replicas = 8, True, 8"
    config.write_text(CONFIG.replace("c.data.batch_size = 8", masked))
    plan = Plan.read(str(config), "base")
    found = Runner(plan, tmp_path).result(plan.rows[0], 1e-3, 0, 2)
    assert found["steps"] == [2] and 3 < found["eval_loss"][0] < 6


@pytest.mark.slow
def test_a_comparison_is_made_and_goes_on_where_it_was_stopped(tmp_path):
    config = tmp_path / "three.py"
    config.write_text(CONFIG)
    command = [sys.executable, "compare.py", f"--config={config}", f"--workdir={tmp_path}/out", "--simulate=2"]
    done = subprocess.run([*command, "--only=signs"], cwd=helpers.ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "out" / "results").glob("*.json")}
    # Of each row 2 candidates and 3 seeds; without the floor, which `--only` leaves out.
    assert len(files) == 2 * (2 + 3) and "ETA" in done.stdout
    done = subprocess.run(command, cwd=helpers.ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert all(file.stat().st_mtime_ns == before for file, before in files.items()), "nothing is run twice"
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    names = [row["name"] for row in table["rows"]]
    assert names == ["base", "base, weights moved by 1e-06", "signs", "late"]
    base, floor, signs, late = table["rows"]
    assert abs(floor["gap_percent"]) < 0.01 and floor["eval_losses"] != base["eval_losses"]
    assert signs["ratio"] > 20 and base["wire_bytes_from"] == "compiled program"
    assert late["wire_bytes_per_step"] == pytest.approx(base["wire_bytes_per_step"] / 3, rel=0.01)
    markdown = (tmp_path / "out" / "table.md").read_text()
    assert markdown.count("\n| ") == 5 and (tmp_path / "out" / "table.csv").read_text().count("\n") == 5
    for plot in ("loss_steps", "loss_bytes", "utilisation"):
        assert (tmp_path / "out" / "plots" / f"{plot}.png").read_bytes().startswith(b"\x89PNG")


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


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_a_comparison_is_kept_in_a_folder(tmp_path, scheme):
    (tmp_path / "config.py").write_text(CONFIG)
    with pytest.raises(UsageError, match=f"--workdir={scheme}://bucket/x: {scheme}:// is not supported"):
        compare.main([f"--config={tmp_path}/config.py", f"--workdir={scheme}://bucket/x"])


@pytest.mark.parametrize(("codec", "built"), [("randk", 3), ("sign", 3), ("int8", 1)])
def test_what_a_codec_draws_varies_with_the_seed(tmp_path, monkeypatch, codec, built):
    """Only programs that draw are built for each seed."""
    config = helpers.tiny(sync__codec=codec, sync__replicas=2)
    runner = Runner(Plan(config, [], (0, 1, 2)), tmp_path)
    seeds = []

    def stop(config):
        seeds.append(config.seed)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "_build", stop)
    for seed in (0, 1, 2):
        with pytest.raises(KeyboardInterrupt):
            runner._train(Row(codec, {}, None), config.copy_and_resolve_references(), seed)
    assert len(set(seeds)) == built

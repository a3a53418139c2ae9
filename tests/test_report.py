"""The page of a run, of several, and of a comparison: every number on it is its file's, and it asks for nothing.

The folders are written here as a run or compare.py writes them; what a whole run leaves is in test_ending.py.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import helpers
import numpy as np
import pytest
from test_compare import summary_of

from recipes import table
from runtime import exits, report
from runtime.config import UsageError, base_values
from runtime.metrics import MetricsLog, write_json

BROWSER = shutil.which("chromium") or shutil.which("google-chrome") or ""
HOSTILE = "</script><script>alert(1)</script> <!-- & \u2028 {{DATA}} {{TITLE}} 日本 \udc80"


def rows_of(steps: int) -> list[dict]:
    """As `Recorder` makes them, with an evaluation after every 10th."""
    rng, rows = np.random.default_rng(0), []
    for step in range(1, steps + 1):
        size = {"replica": 100.0, "fsdp": 7}
        row = {
            "step": step,
            "loss": np.float32(5 / step + rng.random()),
            "grad_norm": np.float32(rng.random()),
            "lr": 1e-3,
        }
        rows.append(row | {"tokens": 32 * step, "tokens_per_second": 64.5, "mfu": None, "wire_bytes": size,
                           "skipped": 0, "clipped": 0, "train_seconds": step / 2})  # fmt: skip
        if step % 10 == 0:
            rows.append({"step": step, "eval_loss": 5 / step, "eval_bits_per_byte": 7 / step})
    return rows


def make_run(folder: Path, rows: list[dict], sample: str = "def f():", done: bool = True, **changes) -> Path:
    config = helpers.tiny(**changes)
    config.steps = rows[-1]["step"] if rows else 9
    log = MetricsLog(folder)
    for row in rows:
        log.write(row)
    log.close()
    write_json(folder / "config.json", config.to_dict())
    summary = {
        "starts": [{"time": 1.5e9, "restored_step": None}],
        "environment": {"versions.jax": "0.9", "devices": {"cpu": 8}},
    }
    if done:
        summary |= {"step": config.steps, "parameters": 98_624, "mesh": {"replica": 2, "fsdp": 4}, "final_loss": 1.25,
                    "unigram_bits_per_byte": 4.6, "phases": {"import": 0.5, "compile": 2.25, "total": 2.75},
                    "memory": {"step": {"arguments": 1000, "temporary": 2345}}}  # fmt: skip
        (folder / "samples.txt").write_text(sample + "\n", errors="surrogateescape")
    write_json(folder / "summary.json", summary)
    return folder


def make_comparison(folder: Path, rows: int = 2, **more) -> Path:
    made = [summary_of(f"row {i}", [2.0 + i, 3.0, 4.0 - i / 9], 100.0 / (i + 1)) | more for i in range(rows)]
    (folder / "results").mkdir(parents=True)
    (folder / "results" / "0a.json").write_text("{}")
    write_json(folder / "table.json", table.tabulate(made, {"replicas": 2, "steps": 3, "tokens": 4, "seeds": 3}))
    return folder


class Page(HTMLParser):
    """What a browser makes of it: elements with their attributes, and the text of each script."""

    def __init__(self, text: str):
        super().__init__()
        self.text, self.elements, self.scripts = text, [], []
        self.feed(text)
        self.data = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.elements and self.elements[-1][0] == "script" and data.strip():
            self.scripts.append(data)


def page_of(*paths: Path) -> Page:
    return Page(report.page(paths))


# ── what is on it ────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_number_of_a_run_is_its_files(tmp_path):
    rows = rows_of(40)
    (run,) = page_of(make_run(tmp_path / "mine", rows)).data["runs"]
    written = [json.loads(line) for line in (tmp_path / "mine" / "metrics.jsonl").read_text().splitlines()]
    for key in ("loss", "grad_norm", "eval_loss", "eval_bits_per_byte", "tokens", "train_seconds"):
        found = [(row["step"], row[key]) for row in written if key in row]
        assert list(zip(*run["series"][key].values(), strict=True)) == found, key
    level = {"lr": 1e-3, "tokens_per_second": 64.5, "wire_bytes.replica": 100.0, "wire_bytes.fsdp": 7, "skipped": 0}
    for key, value in level.items():
        assert run["series"][key] == {"step": [1, 40], "value": [value, value]}, "the ends say it all"
    assert "mfu" not in run["series"], "null where it is not known, which is no number that was lost"
    summary = json.loads((tmp_path / "mine" / "summary.json").read_text())
    assert run["summary"] == summary and run["rows"] == 44
    assert run["samples"] == [{"step": None, "text": "def f():\n", "left_out": 0}]
    config = helpers.tiny()
    assert run["config"]["model.num_layers"] == config.model.num_layers and run["config"]["steps"] == 40


def test_every_number_of_a_comparison_is_its_tables(tmp_path):
    path = make_comparison(tmp_path / "three", rows=30)
    (found,) = page_of(path).data["comparisons"]
    assert found["table"] == json.loads((path / "table.json").read_text()) and found["results"] == 1
    assert len(found["table"]["rows"]) == 30


def test_the_defaults_stand_beside_what_a_run_has(tmp_path):
    """A key that came later than the run has its default, and does not look as if it had been changed."""
    path = make_run(tmp_path / "old", rows_of(3))
    config = json.loads((path / "config.json").read_text())
    del config["sync"]["warm_steps"]
    write_json(path / "config.json", config | {"objects": {"sync.codec": {"class": "Mine"}}})
    data = page_of(path).data
    assert data["base"] == json.loads(json.dumps(base_values()))
    assert data["runs"][0]["config"]["sync.warm_steps"] == data["base"]["sync.warm_steps"]
    assert data["runs"][0]["objects"] == {"sync.codec": {"class": "Mine"}}


def test_several_runs_are_told_apart(tmp_path):
    paths = [make_run(tmp_path / name, rows_of(3)) for name in ("a/mine", "b/mine", "b/other")]
    data = page_of(*paths, make_comparison(tmp_path / "compared")).data
    assert [run["name"] for run in data["runs"]] == ["a/mine", "b/mine", "b/other"]
    assert [found["name"] for found in data["comparisons"]] == [f"{tmp_path.name}/compared"]


# ── a page by itself ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_page_asks_for_nothing_outside_of_it(tmp_path):
    pages = [page_of(make_run(tmp_path / "mine", rows_of(3))), page_of(make_comparison(tmp_path / "three"))]
    for page in pages:
        for tag, attributes in page.elements:
            assert tag not in ("link", "img", "iframe", "object", "embed", "base", "form"), tag
            assert not {"src", "href", "srcset", "action", "data"} & attributes.keys(), (tag, attributes)
        policy = next(found["content"] for _, found in page.elements if found.get("http-equiv"))
        assert policy.startswith("default-src 'none'") and "http" not in policy, "and the browser sees to it"
        code = page.text.replace(page.scripts[0], "")
        assert not re.search(r"//[\w-]+\.|https?:|@import|url\(|fetch\(|XMLHttpRequest|WebSocket|import\(", code)


def test_markup_in_a_sample_a_config_or_a_name_stays_text(tmp_path):
    plain = page_of(make_run(tmp_path / "plain", rows_of(3)))
    hostile = make_run(tmp_path / "<b>&", rows_of(3), HOSTILE, data__text_key=HOSTILE.replace("\udc80", ""))
    page = page_of(hostile)
    assert page.elements == plain.elements and page.scripts[1:] == plain.scripts[1:]
    (run,) = page.data["runs"]
    (sample,) = run["samples"]
    assert sample["text"] == HOSTILE.replace("\udc80", "\ufffd") + "\n" and run["name"] == "<b>&"
    assert run["config"]["data.text_key"] == HOSTILE.replace("\udc80", "")
    assert "<title>&lt;b&gt;&amp;</title>" in page.text
    assert "innerHTML" not in page.text and "insertAdjacentHTML" not in page.text and "document.write" not in page.text


def test_a_page_stays_below_2_megabytes_and_says_what_it_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "LONG", 10**9)
    rows = rows_of(6000)
    values = {row["step"]: row for row in rows if "loss" in row}
    values[3333]["loss"], values[4444]["loss"] = 99.0, -3.5
    values[5555]["loss"] = math.nan
    path = make_run(tmp_path / "long", rows, "x" * 30_000)
    (run,) = page_of(path).data["runs"]
    curve = run["series"]["loss"]
    assert curve["of"] == 6000 and len(curve["step"]) <= report.POINTS and run["samples"][0]["left_out"] > 0
    found = dict(zip(curve["step"], curve["value"], strict=True))
    assert (found[3333], found[4444], found[5555]) == (99.0, -3.5, None), "spikes and holes stay"
    assert found.keys() >= {1, 6000} and all(y == values[step]["loss"] for step, y in found.items() if y is not None)
    many = [make_run(tmp_path / f"{i}", rows[:1], "x" * 20_000) for i in range(2)]
    for other in many:
        os.replace(other / "metrics.jsonl", other / "gone")
        os.link(path / "metrics.jsonl", other / "metrics.jsonl")
    monkeypatch.setattr(report, "LIMIT", 200_000)
    text = report.page([path, *many])
    assert len(text) < 200_000 and all(len(x["series"]["loss"]["step"]) > 16 for x in Page(text).data["runs"])
    monkeypatch.setattr(report, "LIMIT", 60_000)
    with pytest.raises(UsageError, match=r"a page of 3 runs would be larger than 0\.06 MB: give fewer"):
        report.page([path, *many])


def test_a_page_of_2_megabytes_is_the_most(tmp_path):
    assert report.LIMIT <= 2_000_000
    assert len(report.page([make_comparison(tmp_path / "all", rows=30)])) < 300_000


@pytest.mark.slow
@pytest.mark.skipif(not BROWSER, reason="needs Chromium")
def test_a_browser_draws_all_of_it_without_an_error(tmp_path):
    """Runs that are complete, go on, have no row, no finite loss or another unit; comparisons with and without a
    table."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "config.json").write_text("")
    (tmp_path / "new" / "results").mkdir(parents=True)
    own = [{"step": step, "loss": 1 / step, "accuracy": 0.5, "examples": step, "examples_per_second": 3.0,
            "wire_bytes": {}, "train_seconds": 1.0 * step, "skipped": step // 9} for step in range(1, 30)]  # fmt: skip
    folders = [
        make_run(tmp_path / "mine", rows_of(200), HOSTILE),
        make_run(tmp_path / "now", rows_of(15), done=False),
        make_run(tmp_path / "nothing", [row | {"loss": math.nan} for row in rows_of(200)]),
        make_run(tmp_path / "own", own),
        make_comparison(tmp_path / "three"),
        make_comparison(tmp_path / "ended", final_losses=[math.nan, 3.0, 4.0]),
        *(tmp_path / "empty", tmp_path / "new"),
    ]
    for paths in (folders[:1], folders[-2:-1], folders[-1:], folders):
        report.write(paths, tmp_path / "page.html")
        command = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=1000"]
        command += ["--enable-logging=stderr", "--dump-dom", f"file://{tmp_path}/page.html"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        drawn = done.stdout.split("<main")[1].split("</main>")[0]
        assert "Uncaught" not in done.stderr and "undefined" not in drawn and "NaN" not in drawn, (paths, done.stderr)
        found = [path.name for path in paths if path.name in drawn]
        assert found == [path.name for path in paths], "the page's last line has been reached"
    assert drawn.count("alert(1)") == 1 and "&lt;script&gt;alert(1)" in drawn and drawn.count("row 1") > 6
    assert drawn.count('<svg viewBox="0 0') > 20


# ── what is not finished ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_that_goes_on_has_a_page(tmp_path):
    path = make_run(tmp_path / "now", rows_of(15), done=False)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 16, "lo')
    (path / "summary.json").write_text('{"starts": [')
    (run,) = page_of(path).data["runs"]
    assert run["series"]["loss"]["step"][-1] == 15 and run["samples"] == [] and run["summary"] == {}
    assert len(run["notes"]) == 1 and "summary.json cannot be read" in run["notes"][0]


def test_samples_are_shown_by_their_steps_as_far_as_the_run_has_come(tmp_path):
    """Those of steps that a restart has taken back are not; of many, some."""
    path = make_run(tmp_path / "mine", rows_of(40))
    (path / "samples").mkdir()
    for step in (9, 10, 40, 50):
        (path / "samples" / f"{step}.txt").write_text(f"of {step}")
    (path / "samples" / ".60.txt.1.tmp").write_text("half")
    (run,) = page_of(path).data["runs"]
    assert [(x["step"], x["text"]) for x in run["samples"]] == [
        *((9, "of 9"), (10, "of 10"), (40, "of 40")),
        (None, "def f():\n"),
    ]
    for step in range(1, 41):
        (path / "samples" / f"{step}.txt").write_text("x" * 9000)
    (run,) = page_of(path).data["runs"]
    steps = [x["step"] for x in run["samples"]]
    assert (
        len(steps) == report.SAMPLES + 1
        and (steps[0], steps[-2:]) == (1, [40, None])
        and steps[:-1] == sorted(steps[:-1])
    )
    assert sum(len(x["text"]) for x in run["samples"]) <= 8 * report.POINTS and run["samples"][0]["left_out"] > 0


@pytest.mark.parametrize("name", ["config.json", "summary.json", "metrics.jsonl"])
def test_one_file_is_enough(name, tmp_path):
    """Empty, as it is between its creation and its first byte."""
    (tmp_path / name).write_text("")
    (run,) = page_of(tmp_path).data["runs"]
    assert run["series"] == {} and run["config"] == {} and run["updated"] is None


def test_damaged_lines_are_left_out_and_said(tmp_path):
    path = make_run(tmp_path / "hurt", rows_of(3))
    text = (path / "metrics.jsonl").read_text()
    (path / "metrics.jsonl").write_text('{"loss": 1}\n{"step": NaN, "loss": 1}\nnonsense\n' + text)
    (run,) = page_of(path).data["runs"]
    assert run["series"]["loss"]["step"] == [1, 2, 3]
    assert run["notes"] == ["metrics.jsonl: 1 damaged lines are left out, the first is 3"]


def test_losses_that_are_not_finite_are_holes(tmp_path):
    rows = rows_of(4)
    rows[1]["loss"], rows[2]["loss"], rows[3]["wire_bytes"] = math.nan, math.inf, {"replica": math.nan}
    path = make_run(tmp_path / "holes", rows)
    (run,) = page_of(path).data["runs"]
    first, _, _, last = (float(str(row["loss"])) for row in rows)
    assert run["series"]["loss"] == {"step": [1, 2, 3, 4], "value": [first, None, None, last]}
    assert run["series"]["wire_bytes.replica"]["value"][-1] is None
    nothing = make_run(tmp_path / "nothing", [row | {"loss": math.nan} for row in rows_of(200)])
    assert set(page_of(nothing).data["runs"][0]["series"]["loss"]["value"]) == {None}


def test_a_comparison_without_a_table_yet_or_with_ended_runs(tmp_path):
    (tmp_path / "new" / "results").mkdir(parents=True)
    assert page_of(tmp_path / "new").data["comparisons"][0]["table"] == {}
    path = make_comparison(tmp_path / "ended", final_losses=[math.nan, 3.0, 4.0])
    assert page_of(path).data["comparisons"][0]["table"]["rows"][1]["final_losses"] == [None, 3.0, 4.0]


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_folder_that_is_no_run_is_one_sentence(tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    assert exits.guarded(lambda: report.main([str(tmp_path / "runs")]), "") == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"error: {tmp_path}/runs is neither a run nor a comparison (none of " in said
    with pytest.raises(UsageError, match="there is no such folder"):
        report.page([tmp_path / "away"])
    make_run(tmp_path / "runs" / "mine", rows_of(1))
    with pytest.raises(UsageError, match=f"give what is inside it, such as {tmp_path}/runs/mine"):
        report.page([tmp_path / "runs"])


def test_where_the_page_goes(tmp_path, capsys, monkeypatch):
    paths = [str(make_run(tmp_path / name, rows_of(2))) for name in "ab"]
    monkeypatch.chdir(tmp_path)
    assert report.main(paths[:1]) == 0 and (tmp_path / "a" / "report.html").is_file()
    assert report.main([*paths, paths[0]]) == 0 and len(Page((tmp_path / "report.html").read_text()).data["runs"]) == 2
    assert report.main([paths[1], "--out=pages/b.html"]) == 0 and (tmp_path / "pages" / "b.html").is_file()
    assert re.fullmatch(r"\S+/a/report\.html \(\d+ kB\)\nreport\.html .*\npages/b\.html .*\n", capsys.readouterr().out)


def test_the_module_is_a_command(tmp_path):
    run = lambda *given: subprocess.run(
        [sys.executable, "-m", "runtime.report", *given], cwd=helpers.ROOT, capture_output=True, text=True, timeout=60
    )
    done = run(str(tmp_path))
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "Traceback" not in done.stderr

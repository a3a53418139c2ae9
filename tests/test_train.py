"""One run as a user makes it: what it writes, what it shows, and that the device never waits for the host."""

import json
import re
import subprocess
import sys

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.tokenizer import from_text
from recipes import programs
from runtime.metrics import read
from runtime.steps import read_record


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    options = ["--config.mesh.replica=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.eval_every=10"]
    options += ["--config.checkpoint.every=10", "--config.profile.steps=3:5", "--config.sample.every=10"]
    return workdir, helpers.train(workdir, *options)


def test_the_workdir_holds_what_is_promised(finished):
    workdir, _ = finished
    made = "config.json metrics.jsonl summary.json checkpoints plots/loss.png samples.txt report.html"
    for name in made.split():
        assert (workdir / name).exists(), name
    samples = {path.name: path.read_text() for path in (workdir / "samples").iterdir()}
    assert [*samples] == ["10.txt"] and samples["10.txt"] != (workdir / "samples.txt").read_text()
    assert list((workdir / "profile").rglob("*.xplane.pb")), "the trace that was asked for"


def test_the_workdir_says_what_the_run_was_trained_on(finished):
    workdir, output = finished[0], finished[1].stdout
    kept, summary = (json.loads((workdir / name).read_text()) for name in ("data.json", "summary.json"))
    (source,) = kept["sources"]
    assert source["name"] == "stdlib" and "json/decoder.py" in [name for name, *_ in source["files"]]
    tokenizer = from_text((workdir / "tokenizer.json").read_text(), "")
    step = max((workdir / "checkpoints").iterdir(), key=lambda path: int(path.name))
    record = read_record(step)
    assert record, "an intact one"
    facts = record["facts"]
    assert facts["data"] == summary["data_digest"] and facts["data.tokenizer"] == tokenizer.digest
    size = sum(size for _, size, _ in source["files"])
    assert re.search(
        rf"^    data +stdlib: {len(source['files'])} files, \d+ documents, {size} bytes$", output, re.MULTILINE
    )
    assert re.search(
        r"^      tokens +[\d,]+ for training, [\d,]+ held out \(5\.\d%\); 0\.0\d+ epochs$", output, re.MULTILINE
    )
    assert re.search(r"^      tokenizer +bytes, 256 ids; a document ends with byte 0$", output, re.MULTILINE)


def test_the_summary_has_its_keys(finished):
    workdir, _ = finished
    summary = json.loads((workdir / "summary.json").read_text())
    for key in (
        "parameters mesh step skipped tokens final_loss final_eval_loss final_eval_bits_per_byte unigram_bits_per_byte "
        "bigram_bits_per_byte params_digest wire_bytes_per_step compiles phases goodput starts"
    ).split():
        assert key in summary, key
    assert summary["mesh"] == {"replica": 2, "fsdp": 2, "tensor": 2} and (summary["step"], summary["skipped"]) == (
        20,
        0,
    )
    assert summary["tokens"] == 20 * 32 * 32 and summary["compiles"] == 1
    assert len(summary["params_digest"]) == 64 and 0 < summary["goodput"] <= 1
    assert summary["starts"][0]["restored_step"] is None
    assert {"import", "data", "compile", "restore", "first step", "total"} <= summary["phases"].keys()
    assert summary["memory"]["step"]["arguments"] > 0 and summary["peak_memory"]["process"] > 10**8
    assert summary["environment"]["versions.jax"] == jax.__version__ and summary["environment"]["devices"] == {"cpu": 8}
    assert 4 < summary["unigram_bits_per_byte"] < 5.5 and summary["bigram_bits_per_byte"] < 4.2


def test_each_row_of_metrics_has_its_keys(finished):
    workdir, _ = finished
    rows = read(workdir / "metrics.jsonl")
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 21))
    for row in steps:
        for key in "loss grad_norm param_norm lr tokens tokens_per_second step_seconds mfu wire_bytes".split():
            assert key in row, key
        assert row["mfu"] is None and set(row["wire_bytes"]) == {"replica", "fsdp", "tensor"}
        assert repr(row["loss"]) == str(np.float32(row["loss"])), "full float32 precision, and no more"
    evaluations = [row for row in rows if "eval_loss" in row]
    assert [row["step"] for row in evaluations] == [10, 20]
    assert evaluations[-1]["eval_loss"] == json.loads((workdir / "summary.json").read_text())["final_eval_loss"]


def test_the_user_sees_the_table_and_the_steps(finished):
    _, done = finished
    for text in (
        "simulating 8 devices", "parameters", "replica 2 × fsdp 2 × tensor 2 = 8 devices", "none; gather", "attention",
        "FLOPs per token", "memory per device", "temporary", "wire per step, replica", "start-up", "step 20/20",
        "MFU n/a", "ETA", "bits per byte", "a sample:", "stray, replica", "beside the step", "evaluation",
    ):  # fmt: skip
        assert text in done.stdout, text
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_dry_run_compiles_and_trains_nothing(tmp_path):
    done = helpers.run_here(tmp_path / "never", "--dry_run", "--config.mesh.fsdp=8")
    for text in ("configs/tiny.py, dry run\n", "memory per device"):
        assert text in done.stdout, text
    assert "step 1/" not in done.stdout
    assert "across replicas" not in done.stdout, "there is one"
    assert re.search(r"^    attention +auto: reference; cudnn runs on NVIDIA", done.stdout, re.MULTILINE)
    for program in ("evaluation", "sample", "digest", "init"):
        assert re.search(rf"^    {program} +\S+ [KM]iB temporary per device$", done.stdout, re.MULTILINE), program
    assert not (tmp_path / "never").exists()


WATCH = """
import sys, threading
from etils import epy

def lazy_imports(original=epy.lazy_imports, **options):
    print("Python's import is replaced beside", [thread.name for thread in threading.enumerate()], flush=True)
    return original(**options)

epy.lazy_imports = lazy_imports
import train
sys.exit(train.run(sys.argv))
"""


@pytest.mark.slow  # a race that needs a process of its own; Loader's own tests read through the same import
def test_no_other_thread_imports_while_grain_replaces_pythons_import(tmp_path):
    """A thread that traced in that moment failed: No module named 'jax._src.hijax.HiType'."""
    _, *arguments = helpers.command(tmp_path / "run", "--config.steps=1")
    done = subprocess.run(
        [sys.executable, "-c", WATCH, *arguments[1:]], cwd=helpers.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    waits = "SIGTERM"  # a thread that has imported what it needs (runtime/preemption.py)
    assert re.findall(r"replaced beside (.*)", done.stdout) == [str(["MainThread", waits])]


@pytest.mark.slow
def test_llama3_8b_is_described_on_64_simulated_devices():
    command = [sys.executable, "train.py", "--config=configs/llama3_8b.py", "--simulate=64", "--dry_run"]
    done = subprocess.run(command, cwd=helpers.ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and "8.0 B" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow  # in the default run: the guard by itself, test_optimizer.py
def test_a_bad_gradient_is_skipped_counted_and_leaves_no_trace():
    config = helpers.tiny(sync__codec="bf16")
    parts = helpers.build(config, (2, 2, 1))
    step, state = programs.compile_steps(parts)["step"], helpers.init_state(config, parts)
    good = helpers.batch(config, parts, 0)
    bad = dict(good, mask=good["mask"] * np.float32("nan"))
    before = jax.device_get((state.params, state.opt))
    state, metrics = step(state, bad)
    assert int(metrics["skipped"][0]) == 1 and int(metrics["skipped_in_a_row"][0]) == 1
    after = jax.device_get((state.params, state.opt))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    state, metrics = step(state, good)
    assert int(metrics["skipped"][0]) == 1 and int(metrics["skipped_in_a_row"][0]) == 0
    assert np.isfinite(float(metrics["loss"][0]))


@pytest.mark.slow
def test_a_run_of_bad_gradients_ends_with_a_message(tmp_path):
    options = ["--config.optimizer.lr=1e30", "--config.optimizer.clip_norm=0.0", "--config.guard.abort_after=3"]
    done = helpers.run_here(tmp_path, *options, check=False)
    assert done.returncode == 1 and "the last 3 updates were skipped" in done.stderr
    assert "guard.abort_after" in done.stderr and "Traceback" not in done.stderr


def test_metrics_are_read_one_step_late(tmp_path, monkeypatch):
    """When step n is dispatched, step n−1 has not been read yet."""
    from runtime.console import Console
    from runtime.progress import Recorder

    reads = []
    monkeypatch.setattr(jax, "device_get", lambda x: reads.append(x["step"]) or x)
    options = {"log_every": 1, "abort_after": 9, "units": 0, "flops_per_unit": 1.0, "wire_bytes": {}}
    recorder = Recorder(
        None, Console(9, 1, quiet=True), flops_per_second_at_full_speed=None, train_seconds=0.0, **options
    )
    names = ("loss", "grad_norm", "param_norm", "lr", "skipped", "skipped_in_a_row")
    for step in (1, 2, 3):
        recorder.step(step, dict.fromkeys(names, jnp.zeros(1)) | {"step": jnp.array([step])}, units=1)
        assert [int(r[0]) for r in reads] == list(range(1, step)), "one behind"
    recorder.flush()
    assert [int(r[0]) for r in reads] == [1, 2, 3]


def test_nothing_compiles_after_the_first_step():
    config = helpers.tiny()
    parts = helpers.build(config, (2, 2, 1))
    step, state = programs.compile_steps(parts)["step"], helpers.init_state(config, parts)
    batches = [helpers.batch(config, parts, n) for n in range(4)]
    state, metrics = step(state, batches[0])
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    for batch in batches[1:]:
        with jax.transfer_guard("disallow"):
            state, metrics = step(state, batch)
        jax.device_get(metrics)
    assert compiled == []


def test_the_model_and_the_exchange_trace_under_strict_promotion():
    """No silent float64, no silent broadcasting of ranks."""
    config = helpers.tiny()
    parts = helpers.build(config, (2, 2, 1))
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        batch_RBT = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), parts.batch)
        messages_R, *_ = jax.eval_shape(parts.strategy.messages, parts.state, batch_RBT)
        jax.eval_shape(parts.strategy.exchange.mean, messages_R, parts.state.codec, parts.state.step)

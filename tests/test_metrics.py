"""runtime/metrics.py: exact numbers, a file without duplicate or torn rows after a restart, loud write errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from runtime import metrics, plot
from runtime.progress import Profiler

REPOSITORY = Path(__file__).resolve().parents[1]


def write_steps(workdir: Path, steps) -> Path:
    log = metrics.MetricsLog(workdir)
    for step in steps:
        log.write({"step": step, "loss": step / 10})
    log.close()
    return log.path


def files_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def steps_of(path: Path) -> list[int]:
    return [row["step"] for row in metrics.read(path)]


# ------------------------------------------------------------------------------------------------ numbers


def test_a_float32_is_written_short(tmp_path):
    metrics.MetricsLog(tmp_path).write({"step": np.int64(3), "loss": np.float32(5.5451775), "ok": np.bool_(True)})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 3, "loss": 5.5451775, "ok": true}\n'


def test_every_float32_reads_back_to_the_same_bits(tmp_path):
    bits = np.random.default_rng(0).integers(0, 2**32, size=20_000, dtype=np.uint32)
    extremes = np.array([0x00000001, 0x80000000, 0x007FFFFF, 0x00800000, 0x7F7FFFFF], dtype=np.uint32)
    values = np.concatenate([bits, extremes]).view(np.float32)
    values = values[np.isfinite(values)]
    log = metrics.MetricsLog(tmp_path)
    log.write({"step": 0, "values": list(values)})
    log.close()
    back = np.array(metrics.read(log.path)[0]["values"], dtype=np.float32)
    np.testing.assert_array_equal(back.view(np.uint32), values.view(np.uint32))


def test_a_python_float_keeps_all_its_digits(tmp_path):
    metrics.write_json(tmp_path / "x.json", {"seconds": 0.1 + 0.2})
    assert json.loads((tmp_path / "x.json").read_text())["seconds"] == 0.1 + 0.2


def test_a_value_that_is_not_finite_is_null_and_listed(tmp_path):
    log = metrics.MetricsLog(tmp_path)
    log.write({"step": 1, "loss": float("nan"), "norms": {"replica": np.float32("inf")}, "lr": 0.1})
    (row,) = metrics.read(log.path)
    assert row == {
        "step": 1,
        "loss": None,
        "norms": {"replica": None},
        "lr": 0.1,
        "nonfinite": ["loss", "norms.replica"],
    }


def test_a_value_json_cannot_hold_is_named(tmp_path):
    with pytest.raises(TypeError, match="'grads.w' is a ndarray"):
        metrics.MetricsLog(tmp_path).write({"step": 1, "grads": {"w": np.zeros(3)}})


# ------------------------------------------------------------------------------------------------ restarts


def test_each_row_is_on_disk_when_write_returns(tmp_path):
    log = metrics.MetricsLog(tmp_path)
    log.write({"step": 1})
    assert metrics.read(log.path) == [{"step": 1}]


def test_rewind_removes_the_rows_that_will_be_computed_again(tmp_path):
    path = write_steps(tmp_path, range(1, 8))
    log = metrics.MetricsLog(tmp_path)
    assert log.rewind(5) == 0
    log.write({"step": 6})
    log.close()
    assert steps_of(path) == [1, 2, 3, 4, 5, 6]


def test_rewind_drops_a_torn_last_line_and_counts_other_damage(tmp_path):
    path = write_steps(tmp_path, [1, 2])
    with path.open("ab") as file:
        file.write(b'{"step": 3, "lo\n\x00\xff\x00\n{"step": 4, "loss": 0.125}\n{"step": 5, "loss": 0.')
    assert metrics.MetricsLog(tmp_path).rewind(10) == 2
    assert path.read_bytes() == b'{"step": 1, "loss": 0.1}\n{"step": 2, "loss": 0.2}\n{"step": 4, "loss": 0.125}\n'
    assert files_in(tmp_path) == ["metrics.jsonl"]


def test_a_row_that_only_lacks_its_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    metrics.MetricsLog(tmp_path).rewind(2)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_crash_while_rewinding_leaves_the_old_file(tmp_path, monkeypatch):
    path = write_steps(tmp_path, [1, 2, 3])
    before = path.read_bytes()

    def crash(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", crash)
    with pytest.raises(OSError, match=r"No space left on device.*metrics\.jsonl"):
        metrics.MetricsLog(tmp_path).rewind(1)
    assert path.read_bytes() == before and files_in(tmp_path) == ["metrics.jsonl"]


def test_the_new_file_is_forced_to_disk_before_it_takes_the_old_ones_place(tmp_path, monkeypatch):
    calls = []
    real_fsync, real_replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), real_fsync(fd)))
    monkeypatch.setattr(Path, "replace", lambda a, b: (calls.append("replace"), real_replace(a, b)))
    write_steps(tmp_path, [1])
    metrics.MetricsLog(tmp_path).rewind(1)
    assert calls == ["fsync", "replace", "fsync"]


def test_a_fresh_run_refuses_a_folder_with_the_metrics_of_another(tmp_path):
    metrics.MetricsLog(tmp_path).rewind(None)
    write_steps(tmp_path, [1])
    with pytest.raises(FileExistsError, match="Choose another --workdir"):
        metrics.MetricsLog(tmp_path).rewind(None)


def test_read_leaves_out_a_torn_last_line_but_reports_damage_before_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2, "l')
    assert steps_of(path) == [1]
    path.write_bytes(b'{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2 is not a JSON object"):
        metrics.read(path)


# ------------------------------------------------------------------------------------------------ full disks

FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from runtime import metrics
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)         # so that the limit is an OSError, as a full disk is
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
log = metrics.MetricsLog(Path(sys.argv[1]))
step = 0
try:
    if sys.argv[2] == "json":
        metrics.write_json(Path(sys.argv[1]) / "config.json", {"text": "x" * 2000})
    while step < 1000:
        log.write({"step": step, "loss": 1.25})
        step += 1
except OSError as error:
    print(step, error)
log.close()
"""


@pytest.mark.parametrize(("what", "name"), [("rows", "metrics.jsonl"), ("json", "config.json")])
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, what, name):
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path), what],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 0, done.stderr
    assert "check free space" in done.stdout and str(tmp_path / name) in done.stdout
    if what == "rows":  # everything written before is there
        assert steps_of(tmp_path / name) == list(range(int(done.stdout.split()[0])))
    else:
        assert files_in(tmp_path) == []


# ------------------------------------------------------------------------------------------------ write_json


def test_write_json_keeps_the_order_and_replaces_the_file(tmp_path):
    path = tmp_path / "summary.json"
    metrics.write_json(path, {"old": 1})
    metrics.write_json(path, {"z": np.float32(0.1), "a": [np.int32(1), Path("x")]})
    assert path.read_text() == '{\n  "z": 0.1,\n  "a": [\n    1,\n    "x"\n  ]\n}\n'
    assert files_in(tmp_path) == ["summary.json"]


# ------------------------------------------------------------------------------------------------ other writers

FAKE_TENSORBOARDX = """
class SummaryWriter:
    def __init__(self, folder): self.file = open(folder + ".txt", "w")
    def add_scalar(self, name, value, step): print(name, value, step, file=self.file)
    def close(self): self.file.close()
"""
FAKE_WANDB = """
calls = []
class Run:
    def log(self, values, step): calls.append((values, step))
    def finish(self): calls.append("finish")
def init(**settings): calls.append(settings); return Run()
"""


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """An empty folder first on the import path, and neither tensorboardX nor wandb installed elsewhere."""
    folder = tmp_path / "packages"
    folder.mkdir()
    for name in ("tensorboardX", "wandb"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    site = {name: getattr(metrics.importlib.util.find_spec(name), "origin", None) for name in ("tensorboardX", "wandb")}
    if any(site.values()):
        pytest.skip("needs an environment without tensorboardX and wandb")
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in ("tensorboardX", "wandb"):
        sys.modules.pop(name, None)


def test_what_is_asked_for_but_not_installed_is_an_error_with_the_command(tmp_path, packages):
    assert metrics.optional_writers(tmp_path, tensorboard=None, wandb="") == []
    with pytest.raises(ModuleNotFoundError, match="pip install tensorboardX"):
        metrics.optional_writers(tmp_path, tensorboard=True, wandb="")
    (packages / "wandb").mkdir()  # the folder wandb leaves behind where it ran is not the package
    with pytest.raises(ModuleNotFoundError, match="pip install wandb"):
        metrics.optional_writers(tmp_path, tensorboard=False, wandb="slackline")


def test_tensorboard_gets_every_number(tmp_path, packages):
    (packages / "tensorboardX.py").write_text(FAKE_TENSORBOARDX)
    assert metrics.optional_writers(tmp_path, tensorboard=False, wandb="") == []
    log = metrics.MetricsLog(tmp_path, metrics.optional_writers(tmp_path, tensorboard=None, wandb=""))
    log.write(
        {
            "step": 2,
            "loss": np.float32(0.5),
            "grad_norm": float("nan"),
            "mfu": None,
            "wire_bytes": {"replica": 7},
            "note": "text",
        }
    )
    log.close()
    assert (tmp_path / "tensorboard.txt").read_text() == "loss 0.5 2\nwire_bytes/replica 7.0 2\n"


def test_a_restarted_run_continues_the_same_wandb_run(tmp_path, packages):
    (packages / "wandb.py").write_text(FAKE_WANDB)
    for step in (1, 2):
        log = metrics.MetricsLog(tmp_path, metrics.optional_writers(tmp_path, tensorboard=False, wandb="slackline"))
        log.write({"step": step, "loss": 0.5})
        log.close()
    first, row, finish, second, *_ = sys.modules["wandb"].calls
    assert first == second and first["project"] == "slackline" and first["resume"] == "allow"
    assert row == ({"step": 1.0, "loss": 0.5}, 1) and finish == "finish"


# ------------------------------------------------------------------------------------------------ the picture


@pytest.mark.parametrize("loss", [2.0, None], ids=["finite", "all-null"])
def test_the_loss_curve_is_a_png_of_the_promised_size(tmp_path, loss):
    rows = [{"step": step, "loss": loss, "lr": 0.1, "skipped": step // 50} for step in range(200)]
    rows.append({"step": 199, "eval_loss": 2.5})
    plot.plot_loss(rows, tmp_path / "loss.png", "a run", {"unigram": 3.0})
    header = (tmp_path / "loss.png").read_bytes()[:24]
    assert header[1:4] == b"PNG"
    assert (int.from_bytes(header[16:20]), int.from_bytes(header[20:24])) == (1200, 700)


def test_one_spike_does_not_bend_the_smooth_curve():
    loss = np.full(200, 2.0)
    loss[100], loss[50] = 40.0, np.nan
    _, medians = plot.smooth(np.arange(200.0), loss, 5)
    np.testing.assert_array_equal(medians, 2.0)


def test_importing_costs_neither_matplotlib_nor_jax():
    code = (
        "import sys, runtime.console, runtime.metrics, runtime.plot, runtime.launch\n"
        "print(sorted({'jax', 'matplotlib', 'rich', 'wandb', 'tensorboardX'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.stdout == "[]\n", done.stderr


def test_a_profile_range_inside_one_call_is_traced(tmp_path):
    """A call of 15 steps holds the steps 10 to 12: the whole of it is traced, and nothing else."""
    state = jnp.zeros(3)
    profiler = Profiler("10:13", tmp_path)
    tracing = []
    for step in (0, 15, 30):
        profiler.before(step, state, 15)
        tracing.append(profiler._tracing)
    profiler.stop(state)
    assert tracing == [True, False, False] and list(tmp_path.rglob("*.xplane.pb"))

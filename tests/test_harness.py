"""The evaluation harness lm-eval, over HTTP: its log-likelihoods are those of a forward pass in Python."""

import importlib.util
import json
import re
import subprocess
import sys

import helpers
import jax
import numpy as np
import pytest

import slackline as sl
from parallel.layout.rules import Constrain

NEEDED = ("lm_eval", "transformers", "datasets", "starlette")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.prove,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}: pip install -r requirements-prove.txt"),
]
TASK = """
task: ours
dataset_path: json
dataset_kwargs:
  data_files: {{validation: {rows}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{text}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""
ROWS = [("The king and", ["the queen", "her crown", "!"]), ("O sweet", ["lord", "night, sweet night"])]


def test_the_harness_finds_what_a_forward_pass_says(tmp_path):
    workdir, steps = tmp_path / "mine", ["--config.steps=5", "--config.data.seq_len=64"]
    tokens = ["--config.data.tokenizer=bpe", "--config.data.vocab_size=400"]
    command = [sys.executable, "train.py", "--config=configs/tiny.py", f"--workdir={workdir}", *steps, *tokens]
    subprocess.run(command, cwd=helpers.ROOT, check=True, capture_output=True)
    found = {(text, choice): said for text, choice, said in asked(workdir, tmp_path)}
    run = sl.open(workdir)
    assert len(found) == 5
    for (text, choice), (logprob, is_greedy) in found.items():
        before, whole = run.tokenizer.encode(text).tolist(), run.tokenizer.encode(f"{text} {choice}").tolist()
        logprobs_TV = direct(run, whole)
        own = range(len(before), len(whole))
        assert sum(logprobs_TV[at - 1, whole[at]] for at in own) == pytest.approx(logprob, abs=1e-3)
        assert all(logprobs_TV[at - 1].argmax() == whole[at] for at in own) == is_greedy


def direct(run, ids):
    """[T, V], natural logarithms."""
    tokens_BT = np.zeros((1, 64), np.int32)
    tokens_BT[0, : len(ids)] = ids
    x_BTD, head_DV, _ = run.parts.task.model.features(run.params, tokens_BT, Constrain(None))
    return np.asarray(jax.nn.log_softmax(x_BTD @ head_DV))[0]


def asked(workdir, folder):
    """(text, choice, (its log-likelihood, whether it is the likeliest)), as lm-eval has them."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": t, "choices": c, "answer": 0}) + "\n" for t, c in ROWS))
    (folder / "tasks").mkdir()
    (folder / "tasks" / "ours.yaml").write_text(TASK.format(rows=rows))
    names = folder / "tokenizer"
    names.mkdir()
    (names / "tokenizer.json").write_text((workdir / "tokenizer.json").read_text())
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
    (names / "tokenizer_config.json").write_text(json.dumps(about))
    command = [sys.executable, "serve.py", f"--workdir={workdir}", "--port=0", "--slots=4"]
    server = subprocess.Popen(command, cwd=helpers.ROOT, stdout=subprocess.PIPE, text=True)
    try:
        url = next(found[1] for line in server.stdout if (found := re.match(r"mine at (\S+):", line)))
        model = (
            f"model=mine,base_url={url}/v1/completions,max_length=64,tokenizer={names},tokenizer_backend=huggingface"
        )
        command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", model]
        command += ["--include_path", f"{folder}/tasks", "--tasks", "ours", "--batch_size", "4", "--log_samples"]
        subprocess.run([*command, "--output_path", f"{folder}/out"], check=True, timeout=600)
    finally:
        server.kill()
    (samples,) = folder.glob("out/**/samples_ours_*.jsonl")
    for line in samples.read_text().splitlines():
        row = json.loads(line)
        for choice, (said,) in zip(row["doc"]["choices"], row["resps"], strict=True):
            yield row["doc"]["text"], choice, (float(said[0]), said[1] == "True")

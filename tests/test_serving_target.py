"""What answers is compiled for machines that are not here."""

import re

import pytest

import serve
from runtime.config import UsageError

LLAMA = "--config=configs/llama3_8b.py"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([LLAMA, "--target=v5e-9", "--dry_run"], "v5e-8"),
        ([LLAMA, "--target=v5e-8"], "belong together"),
        ([LLAMA], "belong together"),
        (["--target=v5e-8", "--dry_run"], "either --workdir=PATH of a run, or --config=FILE"),
        ([], "--workdir=PATH is needed"),
        (
            [LLAMA, "--target=v5e-8", "--dry_run", "--config.mesh.stage=2"],
            "--config.mesh.stage changes nothing of an answer",
        ),
    ],
)
def test_what_does_not_belong_together_is_refused(argv, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        serve.main(argv)


@pytest.mark.slow
@pytest.mark.prove
@pytest.mark.parametrize(
    ("target", "package", "weights", "sends"),
    [
        ("h100:1", "jax_cuda13_plugin", "14.96 GiB", "nothing"),
        ("v5e-8", "libtpu", "1.87 GiB", r"[\d.]+ MiB over tensor"),
    ],
)
def test_llama3_8b_answers_on_one_h100_and_on_v5e_8(target, package, weights, sends, capsys):
    pytest.importorskip(package, reason="see requirements-prove.txt")
    assert serve.main([LLAMA, f"--target={target}", "--dry_run", "--context=4096"]) == 0
    said = capsys.readouterr().out
    assert f"of each chip {weights} of weights" in said
    assert re.search(rf"a token for 16 slots: peak .*; sends {sends};", said) and "\nfits: " in said


@pytest.mark.slow
@pytest.mark.prove
def test_experts_of_devices_of_their_own_answer_on_8_h100(capsys):
    pytest.importorskip("jax_cuda13_plugin", reason="see requirements-prove.txt")
    options = ["--target=h100:8", "--dry_run", "--context=4096", "--config.mesh.expert=8", "--config.mesh.tensor=1"]
    assert serve.main(["--config=configs/mixtral_8x7b.py", *options]) == 0
    said = capsys.readouterr().out
    assert "of each chip 13.49 GiB of weights" in said and re.search(
        r"slots: peak .*; sends [\d.]+ MiB over expert;", said
    )
    with pytest.raises(UsageError, match=re.escape("mesh.expert=8: this model has no experts")):
        serve.main([LLAMA, *options])


@pytest.mark.slow
@pytest.mark.prove
def test_what_does_not_fit_ends_with_1(capsys):
    pytest.importorskip("libtpu", reason="see requirements-prove.txt")
    assert serve.main(["--config=configs/llama3_70b.py", "--target=v5e-8", "--dry_run"]) == 1
    assert "the compiler refuses it" in capsys.readouterr().out

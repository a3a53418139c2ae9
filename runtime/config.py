"""The command line: flags, config file, overrides; config.json; and every check that needs no device.

A Python config file is executed when it is given as --config. A config.json is data: resuming never executes anything.
"""

import contextlib
import difflib
import importlib.util
import json
import math
import runpy
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict

BASE = str(Path(__file__).parent.parent / "configs" / "base.py")  # every key that there is

# What each strategy and each codec reads of the group sync; tests hold this against the classes' fields.
LOCAL = {"interval", "outer.optimizer", "outer.lr", "outer.momentum"}
STRATEGIES = {
    "sync": set(),
    "stale": {"staleness", "compensation"},
    "diloco": LOCAL,
    "eager": LOCAL,
    "streaming": LOCAL | {"fragments", "overlap", "mix"},
}
STRATEGY_KEYS = set.union(*STRATEGIES.values())
CODECS = {
    **dict.fromkeys(("none", "bf16"), set()),
    **dict.fromkeys(("fp8", "fp4", "int8", "int4", "int2"), {"block", "stochastic"}),
    "sign": {"block", "stochastic"},
    "topk": {"density", "bits"},
    "randk": {"density"},
    "demo": {"density"},
    "powersgd": {"rank"},
}
CODEC_KEYS = set.union(*CODECS.values())

CHOICES = {
    "model.norm": ("rms", "layer"),
    "model.mlp": ("swiglu", "gelu"),
    "model.position": ("rope", "learned"),
    "compute.dtype": ("auto", "float32", "bfloat16"),
    "compute.attention": ("auto", "reference", "cudnn", "splash"),
    "compute.remat": ("none", "matmuls", "dots", "full"),
    "data.corpus": ("stdlib", "asv"),
    "optimizer.name": ("adamw", "sgd", "muon", "lion", "sign", "signum", "onebit_adam"),
    "optimizer.schedule": ("cosine", "wsd", "constant"),
    "sync.strategy": tuple(STRATEGIES),
    "sync.codec": tuple(CODECS),
    "sync.algorithm": ("auto", "gather", "two_stage", "psum"),
    "sync.error_feedback": ("auto", "on", "off"),
    "sync.residual_dtype": ("float32", "bfloat16"),
    "sync.outer.optimizer": ("nesterov", "sgd", "adam"),
    "metrics.tensorboard": ("auto", "on", "off"),
}
POSITIVE = (
    "steps log_every eval_batches model.num_layers model.model_dim model.num_heads model.num_kv_heads model.head_dim "
    "model.mlp_dim model.norm_eps model.rope_theta model.init_std compute.loss_chunk_mib data.vocab_size data.seq_len "
    "data.batch_size optimizer.accumulate guard.window guard.abort_after checkpoint.keep sync.interval sync.fragments"
).split()
NOT_NEGATIVE = (
    "seed eval_every model.sliding_window model.rope_scaling.factor optimizer.lr optimizer.warmup_steps "
    "optimizer.final_lr_fraction optimizer.weight_decay optimizer.clip_norm optimizer.z_loss guard.zscore "
    "optimizer.freeze_steps "
    "sync.replicas sync.staleness sync.compensation sync.overlap sync.mix sync.decay sync.outer.lr sync.outer.momentum "
    "checkpoint.every checkpoint.keep_every sample.tokens sample.temperature"
).split()

# {key: {value: the keys that nothing reads then}}. To set one of them on the command line would be a mistake.
UNREAD: dict[str, dict[Any, str]] = {
    "model.position": {"learned": "model.rope_theta model.rope_scaling.factor"},
    "model.rope_scaling.factor": {
        0: "model.rope_scaling.low_freq_factor model.rope_scaling.high_freq_factor model.rope_scaling.original_max_len"
    },
    "optimizer.name": {
        "adamw": "optimizer.momentum optimizer.freeze_steps",
        "lion": "optimizer.momentum optimizer.eps optimizer.freeze_steps",
        "muon": "optimizer.freeze_steps",
        "sgd": "optimizer.b1 optimizer.b2 optimizer.eps optimizer.freeze_steps",
        "sign": "optimizer.b1 optimizer.b2 optimizer.eps optimizer.momentum optimizer.freeze_steps",
        "signum": "optimizer.b1 optimizer.b2 optimizer.eps optimizer.clip_norm optimizer.freeze_steps",
        "onebit_adam": "optimizer.momentum optimizer.clip_norm",
    },
    "optimizer.schedule": {"constant": "optimizer.final_lr_fraction"},
    "guard.zscore": {0: "guard.window"},
    "sample.tokens": {0: "sample.prompt sample.temperature"},
    "sync.strategy": {
        name: " ".join(f"sync.{key}" for key in sorted(STRATEGY_KEYS - read)) for name, read in STRATEGIES.items()
    },
    "sync.codec": {name: " ".join(f"sync.{key}" for key in sorted(CODEC_KEYS - read)) for name, read in CODECS.items()},
    "sync.error_feedback": {"off": "sync.decay sync.residual_dtype"},
    "sync.outer.optimizer": {"sgd": "sync.outer.momentum"},
}
PARSERS = {
    int: flags.IntegerParser(),
    float: flags.FloatParser(),
    bool: flags.BooleanParser(),
    str: flags.ArgumentParser(),
}

# A change here makes another model: the checkpoint's weights mean something else.
MODEL_KEYS = ("model.", "data.vocab_size", "data.tokenizer")


class RunError(Exception):
    """Training cannot go on; the message says why and what to do. No traceback is shown."""


class UsageError(Exception):
    """Bad input, in one message for the user. No traceback is shown."""


@contextlib.contextmanager
def bad_input() -> Iterator[None]:
    """Inside, what the rooms below find wrong is the user's input: shown as a message, without a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(str(error)) from error


def define_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string(
        "workdir", None, "Where the run lives; default runs/<config>-<date>-<hash>.", flag_values=values
    )
    flags.DEFINE_integer(
        "simulate", None, "Train on this many simulated CPU devices.", flag_values=values, lower_bound=1
    )
    flags.DEFINE_bool("dry_run", False, "Build, compile, print the table; train nothing.", flag_values=values)
    flags.DEFINE_bool("resume", True, "Go on if the workdir has a run; --noresume refuses to.", flag_values=values)
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, for several processes.", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "How many processes there are.", flag_values=values, lower_bound=1)
    flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.", flag_values=values, lower_bound=0)
    flags.DEFINE_integer(
        "heartbeat", 30, "Seconds after which a silent process is dead.", flag_values=values, lower_bound=1
    )
    flags.DEFINE_bool("help", False, "Show this help.", flag_values=values, short_name="h")


def parse(argv: Sequence[str], doc: str) -> tuple[Any, Any]:
    """argv (with the program's name first) -> (config, flags). Raises UsageError; prints help and exits if asked.

    Of an option given twice the last one counts.
    """
    values = flags.FlagValues()
    define_flags(values)
    if {"-h", "-help", "--help"} & set(argv):
        options = values.get_help(include_special_flags=False)
        print(f"{doc}\n{options}\n  --config: a Python config file.\n  --config.KEY=VALUE: overrides one of its keys.")
        raise SystemExit(0)
    given = dict(map(_split, argv[1:]))
    workdir = given.get("workdir")
    config_file = given.pop("config") or "" if "config" in given else None
    if "workdir" in given and not workdir:
        raise UsageError("--workdir needs a folder, as in --workdir=runs/first")
    if config_file is not None:
        config = _execute(config_file)
    elif workdir and (Path(workdir) / "config.json").is_file():
        config = read_json(Path(workdir))
    elif workdir:
        raise UsageError(f"--workdir={workdir} has no config.json to resume from: give a --config=configs/….py")
    else:
        raise UsageError("--config is missing, as in --config=configs/quickstart.py (or --workdir of an earlier run)")
    before = dict(flatten(config))
    _check_names(given, before, values)
    wrong, overridden = [], {}
    for name, text in given.items():
        key = name.removeprefix("config.")
        try:
            if key != name:
                overridden[key] = _value(name, text, PARSERS.get(type(before[key]), PARSERS[str]))
            elif name in values:
                setattr(values, name, _value(name, text, values[name].parser))
            else:  # --noresume
                setattr(values, name.removeprefix("no"), not _value(name, text, flags.BooleanParser()))
        except ValueError as error:
            wrong.append(str(error))
    config.update_from_flattened_dict(overridden)
    wrong += _unread(dict(flatten(config)), [key for key, value in overridden.items() if value != before[key]])
    if wrong:
        raise UsageError("\n".join(wrong))
    flags.DEFINE_string("config_name", config_file or workdir, "", flag_values=values)
    values.mark_as_parsed()
    return config.lock(), values


def _split(argument: str) -> tuple[str, str | None]:
    if not argument.startswith("-"):
        raise UsageError(f"unexpected argument {argument!r}: options start with -- and take their value after =")
    name, equals, value = argument.lstrip("-").partition("=")
    return name, value if equals else None


def _value(name: str, text: str | None, parser: Any) -> Any:
    """What `text` means to this option; an option without = is a switch, turned on."""
    expected = parser.syntactic_help or ("true or false" if isinstance(parser, flags.BooleanParser) else "a value")
    if text is None and expected != "true or false":
        raise ValueError(f"--{name} needs {expected}, as in --{name}=…")
    try:
        return parser.parse("true" if text is None else text)
    except (ValueError, TypeError):
        raise ValueError(f"--{name}={text}: expected {expected}") from None


def _execute(config_file: str) -> Any:
    """What get_config() in this Python file returns."""
    if not Path(config_file).is_file():
        raise UsageError(f"--config={config_file}: there is no such file. Look into configs/.")
    try:
        config = runpy.run_path(config_file)["get_config"]()
    except Exception as error:  # whatever the user's own Python file raises
        if isinstance(error, KeyError) and error.args == ("get_config",):
            raise UsageError(f"--config={config_file} has no function get_config(): see configs/tiny.py") from error
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == config_file]
        where = f", line {lines[-1]}" if lines else ""
        raise UsageError(f"--config={config_file} fails{where}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ConfigDict):
        raise UsageError(f"--config={config_file}: get_config() returns {config!r}, not a config: see configs/tiny.py")
    keys, known = [key for key, _ in flatten(config)], [key for key, _ in flatten(runpy.run_path(BASE)["get_config"]())]
    for key in keys:
        if key not in known:
            raise UsageError(f"--config={config_file} sets the {_unknown(key, known)}")
    if missing := [key for key in known if key not in keys]:
        raise UsageError(f"--config={config_file} has no {', '.join(missing)}: start from base.get_config()")
    return config


def _check_names(given: Iterable[str], config: dict[str, Any], values: flags.FlagValues) -> None:
    keys = list(config)
    groups = {".".join(parts[:n]) for parts in (key.split(".") for key in keys) for n in range(1, len(parts))}
    for name in given:
        if name.startswith("config."):
            key = name.removeprefix("config.")
            if key in groups:
                example = next(k for k in keys if k.startswith(f"{key}."))
                raise UsageError(f"--config.{key} is a group; set one of its keys, as in --config.{example}=…")
            if key not in keys:
                raise UsageError(_unknown(key, keys))
        elif name not in values and not (name.startswith("no") and name[2:] in values and values[name[2:]].boolean):
            options = [*(f for f in values if len(f) > 1), "config"]
            raise UsageError(f"unknown option --{name}: did you mean --{_nearest(name, options)}? See --help.")


def _unread(flat: dict[str, Any], changed: list[str]) -> Iterator[str]:
    """One line for each changed key that nothing reads."""
    deciders = {key: name for name, cases in UNREAD.items() for key in cases.get(flat.get(name), "").split()}
    if flat.get("data.path"):
        deciders["data.corpus"] = "data.path"
    for key in changed:
        if key in deciders:
            name = deciders[key]
            yield f"{key}={flat[key]} is not read when {name}={flat[name]}: leave it out, or change {name}"


def _unknown(key: str, keys: list[str]) -> str:
    group = key.rpartition(".")[0]
    siblings = ", ".join(k.rpartition(".")[2] for k in keys if k.rpartition(".")[0] == group)
    where = f"{group} has {siblings}" if group and siblings else "see configs/base.py"
    return f"unknown config key {key!r}: did you mean {_nearest(key, keys)!r}? ({where})"


def _nearest(name: str, known: Sequence[str]) -> str:
    """The most similar name; the last part of a dotted key counts most."""
    last = name.rpartition(".")[2]

    def likeness(k: str) -> float:
        whole = difflib.SequenceMatcher(None, name, k).ratio()
        return whole + difflib.SequenceMatcher(None, last, k.rpartition(".")[2]).ratio()

    return max(known, key=likeness)


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, (ConfigDict, dict)):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def read_json(workdir: Path) -> Any:
    path = workdir / "config.json"
    try:
        config = json.loads(path.read_text())
        if not isinstance(config, dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        raise UsageError(
            f"{path} is damaged ({error}). Restore it from a backup, or start a new run with another --workdir."
        ) from error
    return ConfigDict(config)


def validate(config: Any) -> None:
    """Every check that needs no device; all that is wrong in one UsageError."""
    flat = dict(flatten(config))
    wrong = []
    for key in (*POSITIVE, *NOT_NEGATIVE, *CHOICES):
        if key not in flat:
            raise UsageError(f"this config has no {key}: was it made by another version? See configs/base.py.")
    for key, value in flat.items():
        if isinstance(value, float) and not math.isfinite(value):
            wrong.append(f"{key}={value}: must be a finite number")
        elif key in (*POSITIVE, *NOT_NEGATIVE) and not isinstance(value, (int, float)):
            wrong.append(f"{key}={value!r}: must be a number")
        elif key in POSITIVE and not value > 0:
            wrong.append(f"{key}={value}: must be greater than 0")
        elif key in NOT_NEGATIVE and value < 0:
            wrong.append(f"{key}={value}: must not be negative")
    for key, choices in CHOICES.items():
        if flat[key] not in choices:
            near = _nearest(str(flat[key]), choices)
            wrong.append(f"{key}={flat[key]!r} is none of {', '.join(choices)}: did you mean {near!r}?")
    if not wrong:
        wrong += _relations(flat)
        base = dict(flatten(runpy.run_path(BASE)["get_config"]()))
        changed = [key for key, value in flat.items() if key.startswith("sync.") and value != base.get(key, value)]
        wrong += _unread(flat, changed)
    if wrong:
        raise UsageError("\n".join(wrong))


def _relations(flat: dict[str, Any]) -> Iterator[str]:
    heads, kv = flat["model.num_heads"], flat["model.num_kv_heads"]
    if heads % kv:
        yield f"model.num_heads={heads} is not a multiple of model.num_kv_heads={kv}: each group has the same size"
    if flat["model.position"] == "rope" and flat["model.head_dim"] % 2:
        yield f"model.head_dim={flat['model.head_dim']}: rotary positions turn pairs, so it must be even"
    if not 0 < flat["data.eval_fraction"] < 1:
        yield f"data.eval_fraction={flat['data.eval_fraction']}: must lie between 0 and 1"
    if flat["optimizer.warmup_steps"] >= flat["steps"] and flat["optimizer.warmup_steps"]:
        yield f"optimizer.warmup_steps={flat['optimizer.warmup_steps']}: must be less than steps={flat['steps']}"
    if flat["compute.attention"] == "cudnn" and flat["data.document_mask"]:
        yield "compute.attention=cudnn cannot mask documents: set compute.attention=reference"
    if flat["sync.algorithm"] == "psum" and flat["sync.codec"] != "none":
        yield "sync.algorithm=psum adds up on the wire and knows no codec: set sync.codec=none or another algorithm"
    if flat["compute.attention"] == "cudnn" and flat["compute.dtype"] == "float32":
        yield "compute.attention=cudnn knows no compute.dtype=float32: set bfloat16, or compute.attention=reference"
    yield from _sync_relations(flat)
    if flat["seed"] >= 2**32:
        yield f"seed={flat['seed']}: must be less than 2**32"
    if flat["profile.steps"]:
        try:
            if profile_range(flat["profile.steps"]).start >= flat["steps"]:
                yield f"profile.steps={flat['profile.steps']}: the run ends before, at steps={flat['steps']}"
        except ValueError:
            yield f"profile.steps={flat['profile.steps']!r}: expected FIRST:LAST, as in 10:13"
    for key, wanted, package in (
        ("metrics.tensorboard", flat["metrics.tensorboard"] == "on", "tensorboardX"),
        ("metrics.wandb", flat["metrics.wandb"], "wandb"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            yield f"{key}={flat[key]} needs {package}, which is not installed: `pip install {package}`, or turn it off"


def _sync_relations(flat: dict[str, Any]) -> Iterator[str]:
    codec, strategy = flat["sync.codec"], flat["sync.strategy"]
    if flat["optimizer.name"] == "sign" and codec == "powersgd":
        yield (
            "optimizer.name=sign with sync.codec=powersgd: the sign of a sum of rank-1 matrices says little about the "
            "gradient's signs. Choose another codec, or another optimizer"
        )
    name, feedback = flat["optimizer.name"], flat["sync.error_feedback"]
    if name in ("signum", "onebit_adam") and strategy not in ("sync", "stale"):
        yield f"optimizer.name={name} exchanges momentum at every step; sync.strategy={strategy} does not: set adamw"
    if name == "signum" and (codec, feedback, flat["sync.stochastic"]) not in (
        *(("none", "auto", False), ("none", "off", False), ("sign", "off", True)),
    ):
        yield (
            f"optimizer.name=signum votes with signs: set sync.codec=sign sync.error_feedback=off sync.stochastic=true "
            f"(ties get a random sign), or sync.codec=none; not {codec}"
        )
    if name == "onebit_adam" and strategy != "sync":
        yield f"optimizer.name=onebit_adam has two phases of sync.strategy=sync, not of {strategy}"
    if flat["sync.error_feedback"] == "on" and codec == "none":
        yield "sync.error_feedback=on: sync.codec=none loses nothing that could be fed back"
    if codec == "int2" and flat["sync.stochastic"] and feedback != "off":
        yield (
            "sync.codec=int2 with sync.stochastic rounds to values larger than the error it leaves, so residuals would "
            "grow: set sync.error_feedback=off, or leave sync.stochastic out"
        )
    if flat["sync.decay"] > 1:
        yield f"sync.decay={flat['sync.decay']}: residuals would grow without end; must be between 0 and 1"
    if flat["sync.mix"] > 1:
        yield f"sync.mix={flat['sync.mix']}: must be between 0 (global parameters) and 1 (the replica's own)"
    if strategy == "eager":
        yield from _whole_rounds(flat, flat["sync.interval"], "sync.interval")
    if strategy != "streaming":
        return
    H, fragments, layers = flat["sync.interval"], flat["sync.fragments"], flat["model.num_layers"]
    legal = ", ".join(str(n) for n in range(1, layers + 1) if layers % n == 0)
    if layers % fragments:
        yield f"sync.fragments={fragments} does not divide model.num_layers={layers}: choose one of {legal}"
    if H % fragments:
        yield f"sync.interval={H} is not a multiple of sync.fragments={fragments}. Nearest legal sizes: " + (
            nearest_multiples(H, fragments)
        )
        return
    K = H // fragments
    if flat["sync.overlap"] > K:
        yield f"sync.overlap={flat['sync.overlap']}: one fragment is on the wire at a time, for at most {K} steps"
    yield from _whole_rounds(flat, K, "sync.interval / sync.fragments")


def _whole_rounds(flat: dict[str, Any], K: int, name: str) -> Iterator[str]:
    for key in ("steps", "eval_every", "checkpoint.every"):
        if flat[key] % K:
            yield (
                f"{key}={flat[key]} is not a multiple of {name} = {K}, the steps between two exchanges. "
                f"Nearest legal sizes: {nearest_multiples(flat[key], K)}"
            )


def profile_range(text: str) -> range:
    first, last = map(int, text.split(":"))
    if not 0 <= first < last:
        raise ValueError(text)
    return range(first, last)


def check_batch(batch_size: int, replicas: int, fsdp: int, accumulate: int) -> None:
    unit = replicas * fsdp * accumulate
    if batch_size % unit:
        raise UsageError(
            f"data.batch_size={batch_size} cannot be cut into {replicas} replicas × mesh.fsdp={fsdp} × "
            f"optimizer.accumulate={accumulate} = {unit} equal parts. "
            f"Nearest legal sizes: {nearest_multiples(batch_size, unit)}"
        )


def nearest_multiples(size: int, unit: int) -> str:
    below = size // unit * unit
    return f"{below} or {below + unit}" if below else f"{unit}"


def difference(old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """[(key, old value, new value)] of the keys that differ."""
    a, b = dict(flatten(old)), dict(flatten(new))
    return [(key, a.get(key), b.get(key)) for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]


def check_resume(old: Any, new: Any) -> list[str]:
    """The changes since the run began, one line each. Raises UsageError if one changes the model."""
    rows = difference(old, new)
    fatal = [row for row in rows if row[0].startswith(MODEL_KEYS)]
    if fatal:
        lines = "\n".join(f"  {key}: {a!r} in config.json, {b!r} now" for key, a, b in fatal)
        raise UsageError(
            f"this workdir holds a run of another model:\n{lines}\n"
            "Go on with --workdir alone (it uses config.json), or give this config another --workdir."
        )
    return [f"{key}: {a!r} -> {b!r}" for key, a, b in rows]

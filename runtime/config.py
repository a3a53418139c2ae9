"""The command line: flags, config file, overrides; config.json; and every check that needs no device.

A Python config file is executed when it is given as --config. A config.json is data: resuming never executes anything.
"""

import difflib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

CHOICES = {
    "model.norm": ("rms", "layer"),
    "model.mlp": ("swiglu", "gelu"),
    "model.position": ("rope", "learned"),
    "compute.dtype": ("auto", "float32", "bfloat16"),
    "compute.attention": ("auto", "reference", "cudnn", "splash"),
    "compute.remat": ("none", "matmuls", "dots", "full"),
    "data.corpus": ("stdlib", "asv"),
    "optimizer.name": ("adamw", "sgd", "muon", "lion"),
    "optimizer.schedule": ("cosine", "wsd", "constant"),
    "sync.strategy": ("sync",),
    "sync.codec": ("none", "bf16"),
    "sync.algorithm": ("auto", "gather", "two_stage", "psum"),
    "metrics.tensorboard": ("auto", "on", "off"),
}
POSITIVE = (
    "steps log_every eval_batches model.num_layers model.model_dim model.num_heads model.num_kv_heads model.head_dim "
    "model.mlp_dim model.norm_eps model.rope_theta model.init_std compute.loss_chunk_mib data.vocab_size data.seq_len "
    "data.batch_size optimizer.accumulate guard.window guard.abort_after checkpoint.keep"
).split()
NOT_NEGATIVE = (
    "seed eval_every model.sliding_window model.rope_scaling.factor optimizer.lr optimizer.warmup_steps "
    "optimizer.final_lr_fraction optimizer.weight_decay optimizer.clip_norm optimizer.z_loss guard.zscore "
    "sync.replicas checkpoint.every checkpoint.keep_every sample.tokens sample.temperature"
).split()

# A change here makes another model: the checkpoint's weights mean something else.
MODEL_KEYS = ("model.", "data.vocab_size", "data.tokenizer")


class UsageError(Exception):
    """Bad input, in one message for the user. No traceback is shown."""


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
    flags.DEFINE_integer("heartbeat", 30, "Seconds after which a silent process is dead.", flag_values=values)
    flags.DEFINE_bool("help", False, "Show this help.", flag_values=values, short_name="h")


def parse(argv: Sequence[str], doc: str) -> tuple[Any, Any]:
    """argv (with the program's name first) -> (config, flags). Raises UsageError; prints help and exits if asked."""
    values = flags.FlagValues()
    define_flags(values)
    given = [a.lstrip("-").partition("=") for a in argv[1:] if a.startswith("-")]
    config_file = next((v for name, _, v in given if name == "config"), None)
    workdir = next((v for name, _, v in given if name == "workdir"), None)
    if any(name in ("help", "h") for name, _, _ in given):
        print(f"{doc}\n{values.get_help()}\n  --config: a Python config file.\n  --config.KEY=VALUE: overrides.")
        raise SystemExit(0)
    if config_file is not None:
        if not Path(config_file.split(":")[0]).is_file():
            raise UsageError(f"--config={config_file}: there is no such file. Look into configs/.")
        config_flags.DEFINE_config_file("config", flag_values=values, lock_config=True)
        known = _load_for_checking(config_file)
    elif workdir and (Path(workdir) / "config.json").is_file():
        known = read_json(Path(workdir))
        config_flags.DEFINE_config_dict("config", known, flag_values=values, lock_config=True)
    elif workdir:
        raise UsageError(f"--workdir={workdir} has no config.json to resume from: give a --config=configs/….py")
    else:
        raise UsageError("--config is missing, as in --config=configs/quickstart.py (or --workdir of an earlier run)")
    _check_override_names([name for name, _, _ in given], known, values)
    try:
        rest = values(list(argv))
    except (flags.Error, TypeError, ValueError, AttributeError, KeyError) as error:
        raise UsageError(f"the command line cannot be read: {error}") from error
    if len(rest) > 1:
        raise UsageError(f"unexpected argument {rest[1]!r}: options start with -- and take their value after =")
    flags.DEFINE_string("config_name", config_file or str(workdir), "", flag_values=values)
    values.mark_as_parsed()
    return values["config"].value, values


def _load_for_checking(config_file: str) -> Any:
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values)
    try:
        values(["train.py", f"--config={config_file}"])
        return values["config"].value
    except Exception as error:  # whatever the user's own Python file raises
        raise UsageError(f"--config={config_file} cannot be loaded: {type(error).__name__}: {error}") from error


def _check_override_names(names: list[str], config: Any, values: flags.FlagValues) -> None:
    keys = [key for key, _ in flatten(config)]
    groups = {key.rpartition(".")[0] for key in keys}
    for name in names:
        if name.startswith("config."):
            key = name.removeprefix("config.")
            if key in groups:
                raise UsageError(
                    f"--config.{key} is a group; set one of its keys, as in --config.{_nearest(key, keys)}=…"
                )
            if key not in keys:
                raise UsageError(
                    f"unknown config key {key!r}: did you mean {_nearest(key, keys)!r}? See configs/base.py."
                )
        elif name != "config" and name not in values and name.removeprefix("no") not in values:
            options = [*(f for f in values if len(f) > 1), "config"]
            raise UsageError(f"unknown option --{name}: did you mean --{_nearest(name, options)}? See --help.")


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
    return ConfigDict(json.loads((workdir / "config.json").read_text()))


def validate(config: Any) -> None:
    """Every check that needs no device; all that is wrong in one UsageError."""
    flat = dict(flatten(config))
    wrong = []
    for key, value in flat.items():
        if isinstance(value, float) and not math.isfinite(value):
            wrong.append(f"{key}={value}: must be a finite number")
    for key in POSITIVE:
        if not flat[key] > 0:
            wrong.append(f"{key}={flat[key]}: must be greater than 0")
    for key in NOT_NEGATIVE:
        if flat[key] < 0:
            wrong.append(f"{key}={flat[key]}: must not be negative")
    for key, choices in CHOICES.items():
        if flat[key] not in choices:
            near = _nearest(str(flat[key]), choices)
            wrong.append(f"{key}={flat[key]!r} is none of {', '.join(choices)}: did you mean {near!r}?")
    if not wrong:
        wrong += _relations(flat)
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
    if flat["profile.steps"]:
        try:
            profile_range(flat["profile.steps"])
        except ValueError:
            yield f"profile.steps={flat['profile.steps']!r}: expected FIRST:LAST, as in 10:13"


def profile_range(text: str) -> range:
    first, last = map(int, text.split(":"))
    if not 0 <= first < last:
        raise ValueError(text)
    return range(first, last)


def check_batch(batch_size: int, replicas: int, fsdp: int, accumulate: int) -> None:
    unit = replicas * fsdp * accumulate
    if batch_size % unit:
        below = batch_size // unit * unit
        legal = f"{below} or {below + unit}" if below else f"{unit}"
        raise UsageError(
            f"data.batch_size={batch_size} cannot be cut into {replicas} replicas × mesh.fsdp={fsdp} × "
            f"optimizer.accumulate={accumulate} = {unit} equal parts. Nearest legal sizes: {legal}"
        )


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

"""What is known of each key: its base value, its legal values, what reads it."""

import functools
import math
import numbers
import os
import re
import runpy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import ConfigDict

from runtime.config.errors import UsageError
from runtime.config.suggest import unknown_key

BASE = str(Path(__file__).parents[2] / "configs" / "base.py")  # every key that there is

CHOICES = {
    "model.norm": ("rms", "layer"),
    "model.bias": ("none", "qkv", "all"),
    "model.mlp": ("swiglu", "gelu"),
    "model.position": ("rope", "learned"),
    "model.router": ("softmax", "sigmoid"),
    "model.balance": ("loss", "bias", "none"),
    "moe.dispatch": ("auto", "grouped", "capacity", "mosaic"),
    "compute.dtype": ("auto", "float32", "bfloat16"),
    "compute.attention": ("auto", "reference", "cudnn", "splash"),
    "pipeline.remat": ("layer", "stage"),
    "pipeline.gather": ("tick", "step"),
    "attention.context": ("auto", "ring", "gather", "heads"),
    "compute.remat": ("none", "matmuls", "dots", "offload", "full"),
    "data.corpus": ("stdlib", "asv"),
    "data.changed": ("refuse", "accept"),
    "optimizer.name": ("adamw", "sgd", "muon", "lion", "sign", "signum", "onebit_adam"),
    "optimizer.schedule": ("cosine", "wsd", "constant"),
    "optimizer.moment_dtype": ("float32", "bfloat16"),
    "sync.algorithm": ("auto", "gather", "two_stage", "psum"),
    "sync.exchange": ("after", "backward"),
    "sync.error_feedback": ("auto", "on", "off"),
    "sync.residual_dtype": ("float32", "bfloat16"),
    "sync.outer.optimizer": ("nesterov", "sgd", "adam"),
    "island.merge": ("average", "compensated", "nesterov", "quorum"),
    "metrics.tensorboard": ("auto", "on", "off"),
}


class Methods(NamedTuple):
    """What `sync.strategy` and `sync.codec` may be: {name: its keys of the group `sync`, without the group's name}.
    optimizer: what `optimizer.name` may be besides, an object that reads no keys."""

    strategies: dict[str, frozenset[str]]
    codecs: dict[str, frozenset[str]]
    optimizer: str = ""
    chosen: tuple[str, ...] = ()  # keys that are decided later: whatever they decide may be read

    def choices(self) -> dict[str, tuple[str, ...]]:
        """CHOICES, and these."""
        own = {"optimizer.name": (*CHOICES["optimizer.name"], self.optimizer)} if self.optimizer else {}
        return CHOICES | own | {"sync.strategy": tuple(self.strategies), "sync.codec": tuple(self.codecs)}

    def unread(self) -> dict[str, dict[Any, str]]:
        """UNREAD, and these: what another one reads and this one does not."""
        kept = ("optimizer.name", "optimizer.accumulate", "optimizer.z_loss")
        keys = " ".join(key for key in _base() if key.startswith("optimizer.") and key not in kept)
        own = {"optimizer.name": UNREAD["optimizer.name"] | {self.optimizer: keys}} if self.optimizer else {}
        strategies = _unread(self.strategies)
        for name in strategies:
            strategies[name] += f" {UNREAD_BY_ISLANDS if name == ISLAND else UNREAD_BY_OTHERS}"
        known = UNREAD | own | {"sync.strategy": strategies, "sync.codec": _unread(self.codecs)}
        return {key: cases for key, cases in known.items() if key not in self.chosen}


def _unread(kinds: dict[str, frozenset[str]]) -> dict[Any, str]:
    every = frozenset[str]().union(*kinds.values())
    return {name: " ".join(f"sync.{key}" for key in sorted(every - own)) for name, own in kinds.items()}


class Range(NamedTuple):
    """The numbers from low to high; `ends` says whether each of the two is one of them: "[)", as in [0, 1)."""

    low: float
    high: float
    ends: str

    def __contains__(self, x: Any) -> bool:
        above = x >= self.low if self.ends[0] == "[" else x > self.low
        return above and (x <= self.high if self.ends[1] == "]" else x < self.high)

    def __str__(self) -> str:
        low = f"{'at least' if self.ends[0] == '[' else 'greater than'} {self.low}"
        high = f" and {'at most' if self.ends[1] == ']' else 'less than'} {self.high}"
        return f"must be {low}{high if self.high < math.inf else ''}"


# Every number has a range here, or is in `CHECKED_ELSEWHERE`.
RANGES: dict[Range, str] = {
    Range(0, math.inf, "()"): (
        "model.norm_eps model.rope_theta model.init_std model.rope_scaling.low_freq_factor "
        "model.rope_scaling.high_freq_factor lora.alpha optimizer.eps"
    ),
    Range(1, math.inf, "[)"): (
        "steps log_every eval_batches model.num_layers model.model_dim model.num_heads model.num_kv_heads "
        "model.head_dim model.mlp_dim model.rope_scaling.original_max_len data.vocab_size "
        "data.seq_len data.batch_size model.experts_per_token optimizer.accumulate guard.window guard.abort_after "
        "checkpoint.keep sync.interval sync.fragments island.quorum pipeline.interleave"
    ),
    Range(0, math.inf, "[)"): (
        "eval_every lora.rank model.experts model.shared_experts model.dense_layers model.dense_dim "
        "moe.balance_weight moe.balance_rate moe.z_loss "
        "model.sliding_window model.rope_scaling.factor compute.loss_chunk_mib optimizer.lr optimizer.warmup_steps "
        "optimizer.final_lr_fraction optimizer.weight_decay optimizer.clip_norm optimizer.z_loss "
        "optimizer.freeze_steps guard.zscore sync.replicas sync.warm_steps sync.staleness sync.compensation "
        "sync.overlap sync.outer.lr island.norm_bound checkpoint.every checkpoint.keep_every sample.tokens "
        "sample.every sample.temperature"
    ),
    Range(0, 1, "[)"): "optimizer.b1 optimizer.b2 optimizer.momentum sync.outer.momentum",  # 1: nothing is forgotten
    Range(0, 1, "[]"): "sync.decay sync.mix",
    Range(0, 1, "()"): "data.eval_fraction",
    Range(0, 2**32, "[)"): "seed",
    Range(-1, math.inf, "[)"): "island.staleness",
}
CHECKED_ELSEWHERE = (  # -1 means something of its own there
    "mesh.replica mesh.stage mesh.fsdp mesh.expert mesh.context mesh.tensor sync.block sync.density sync.bits sync.rank"
).split()
SMALLEST_VOCABULARY = {"bytes": 256, "bpe": 257}  # by data.tokenizer; of a file it is not known before it is read
PATHS = ("data.path", "data.tokenizer", "init.workdir")  # in these ~ is the home
EXPECTED = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}

# {key: {value: the keys that nothing reads then}}. To set one of them on the command line would be a mistake.
UNREAD: dict[str, dict[Any, str]] = {
    "model.position": {"learned": "model.rope_theta model.rope_scaling.factor"},
    "model.rope_scaling.factor": {
        0: "model.rope_scaling.low_freq_factor model.rope_scaling.high_freq_factor model.rope_scaling.original_max_len"
    },
    "model.experts": {
        0: "model.experts_per_token model.shared_experts model.router model.normalise_gates model.balance moe.dispatch "
        "moe.rows moe.balance_weight moe.balance_rate moe.z_loss model.dense_layers model.dense_dim"
    },
    "model.dense_layers": {0: "model.dense_dim"},
    "model.balance": {
        "loss": "moe.balance_rate",
        "bias": "moe.balance_weight",
        "none": "moe.balance_weight moe.balance_rate",
    },
    "optimizer.name": {
        "adamw": "optimizer.momentum optimizer.freeze_steps",
        "lion": "optimizer.momentum optimizer.eps optimizer.freeze_steps",
        "muon": "optimizer.freeze_steps",
        "sgd": "optimizer.b1 optimizer.b2 optimizer.eps optimizer.freeze_steps",
        "sign": "optimizer.b1 optimizer.b2 optimizer.eps optimizer.momentum optimizer.freeze_steps "
        "optimizer.moment_dtype",
        "signum": "optimizer.b1 optimizer.b2 optimizer.eps optimizer.clip_norm optimizer.freeze_steps "
        "optimizer.moment_dtype",
        "onebit_adam": "optimizer.momentum optimizer.clip_norm optimizer.moment_dtype",
    },
    "mesh.stage": {1: "pipeline.remat pipeline.gather pipeline.interleave"},
    "mesh.context": {1: "attention.context"},
    "lora.rank": {0: "lora.alpha lora.pattern lora.rs lora.freeze_a"},
    "optimizer.schedule": {"constant": "optimizer.final_lr_fraction"},
    "guard.zscore": {0: "guard.window"},
    "sample.tokens": {0: "sample.prompt sample.temperature sample.every"},
    "sync.error_feedback": {"off": "sync.decay sync.residual_dtype"},
    "sync.outer.optimizer": {"sgd": "sync.outer.momentum"},
    "island.merge": dict.fromkeys(("average", "compensated", "nesterov"), "island.quorum"),
}


ISLAND = "island"  # of sync.strategy
UNREAD_BY_ISLANDS = "sync.replicas sync.algorithm sync.exchange sync.warm_steps sync.decay sync.residual_dtype"
UNREAD_BY_OTHERS = "island.log island.name island.merge island.staleness island.quorum island.dylu island.norm_bound"


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, (ConfigDict, dict)):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


@functools.cache
def _base() -> dict[str, Any]:
    return dict(flatten(runpy.run_path(BASE)["get_config"]()))


def base_values() -> dict[str, Any]:
    """{key: its default}, every key that there is. A default's type is the key's."""
    return dict(_base())


def convert(key: str, value: Any) -> Any:
    """A value as the key holds it, wherever it comes from: of the type of the key's default, with ~ as the home in
    paths. Whole numbers may be written as floats. Raises ValueError, with what was expected."""
    kind = type(_base().get(key, value))
    number: Any = value if isinstance(value, numbers.Real) and not isinstance(value, bool) else None
    if number is not None and (kind is float or kind is int and number == number // 1):
        return kind(number)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise ValueError(f"{key}={value!r}: expected {EXPECTED.get(kind, kind.__name__)}")
    return local_path(key, str(value)) if key in PATHS else value


def converted(flat: Mapping[str, Any], source: str) -> dict[str, Any]:
    """All of them; in one UsageError, what is wrong with each. source: who says so, as in "mine.py sets"."""
    found, wrong = {}, []
    for key, value in flat.items():
        if key not in _base():
            wrong.append(f"{source} the {unknown_key(key, list(_base()))}")
            continue
        try:
            found[key] = convert(key, value)
        except ValueError as error:
            wrong.append(f"{source} {error}")
    if wrong:
        raise UsageError("\n".join(wrong))
    return found


def read_text(kind: type, text: str) -> Any:
    """What is typed, as a value of this type; `1e3` is a whole number. Raises ValueError."""
    if kind is bool:
        return flags.BooleanParser().parse(text)
    if kind is int and re.fullmatch(r"[+-]?\d+", text):
        return int(text)
    return float(text) if kind in (int, float) else text


def local_path(name: str, path: str) -> str:
    """With ~ as the home. Raises ValueError for an address of a store, which would become a folder called `gs:`."""
    if found := re.search(r"(?:^|,)\s*([A-Za-z][\w+.-]*)://", path):
        raise ValueError(
            f"{name}={path}: {found[1]}:// is not supported, only folders and files of this machine. Mount the store, "
            "or copy what is needed"
        )
    return expand_home(path)


def expand_home(path: str) -> str:
    """~ as the home, in each of several paths with commas between them."""
    return ",".join(map(os.path.expanduser, path.split(",")))


def changed(config: Any, changes: Mapping[str, Any]) -> Any:
    """A copy with these keys' values in place of its own."""
    found = config.copy_and_resolve_references()
    with found.unlocked():
        found.update_from_flattened_dict(dict(changes))
    return found


def nested(flat: Mapping[str, Any]) -> Any:
    """The config with these keys."""
    groups: dict[str, Any] = {}
    for key, value in flat.items():
        node = groups
        *path, name = key.split(".")
        for group in path:
            node = node.setdefault(group, {})
        node[name] = value
    return ConfigDict(groups)

"""What is known of each key: its base value, its legal values, what reads it."""

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

BASE = str(Path(__file__).parents[2] / "configs" / "base.py")  # every key that there is

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


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, (ConfigDict, dict)):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def base_values() -> dict[str, Any]:
    """{key: its default}, every key that there is."""
    return dict(flatten(runpy.run_path(BASE)["get_config"]()))

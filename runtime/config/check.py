"""Every check of a config that needs no device."""

import importlib.util
import math
from collections.abc import Iterator
from typing import Any

from runtime.config.errors import UsageError
from runtime.config.keys import CHOICES, NOT_NEGATIVE, POSITIVE, UNREAD, base_values, flatten
from runtime.config.suggest import nearest_multiples, nearest_name


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
            near = nearest_name(str(flat[key]), choices)
            wrong.append(f"{key}={flat[key]!r} is none of {', '.join(choices)}: did you mean {near!r}?")
    if not wrong:
        wrong += _relations(flat)
        base = base_values()
        changed = [key for key, value in flat.items() if key.startswith("sync.") and value != base.get(key, value)]
        wrong += unread(flat, changed)
    if wrong:
        raise UsageError("\n".join(wrong))


def unread(flat: dict[str, Any], changed: list[str]) -> Iterator[str]:
    """One line for each changed key that nothing reads."""
    deciders = {key: name for name, cases in UNREAD.items() for key in cases.get(flat.get(name), "").split()}
    if flat.get("data.path"):
        deciders["data.corpus"] = "data.path"
    for key in changed:
        if key in deciders:
            name = deciders[key]
            yield f"{key}={flat[key]} is not read when {name}={flat[name]}: leave it out, or change {name}"


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

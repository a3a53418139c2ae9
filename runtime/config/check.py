"""Every check of a config that needs no device."""

import importlib.util
import math
import re
from collections.abc import Iterator
from typing import Any

from runtime.config.errors import UsageError
from runtime.config.keys import ISLAND, RANGES, Methods, base_values, convert, flatten
from runtime.config.suggest import nearest_multiples, nearest_name


def validate(config: Any, methods: Methods) -> None:
    """Every check of the values that needs no device; all that is wrong in one UsageError."""
    flat, base = dict(flatten(config)), base_values()
    if missing := [key for key in base if key not in flat]:
        raise UsageError(f"this config has no {', '.join(missing)}: start from base.get_config() of configs/base.py")
    wrong = [*_values(flat, methods.choices())] or [*relations(flat)]
    if not wrong:
        slow = {key: value for key, value in flat.items() if key.startswith(("sync.", "island."))}
        changed = [key for key, value in slow.items() if value != base.get(key, value)]
        wrong += unread(flat, changed, methods)
    if wrong:
        raise UsageError("\n".join(wrong))


def _values(flat: dict[str, Any], choices: dict[str, tuple[str, ...]]) -> Iterator[str]:
    """What is wrong with each value by itself."""
    limits = {key: limit for limit, keys in RANGES.items() for key in keys.split()}
    for key, value in flat.items():
        try:
            value = convert(key, value)
        except ValueError as error:
            yield str(error)
            continue
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{key}={value}: must be a finite number"
        elif key in limits and value not in limits[key]:
            yield f"{key}={value}: {limits[key]}"
        elif key in choices and value not in choices[key]:
            near = nearest_name(str(value), choices[key])
            yield f"{key}={value!r} is none of {', '.join(choices[key])}: did you mean {near!r}?"


def unread(flat: dict[str, Any], changed: list[str], methods: Methods) -> Iterator[str]:
    """One line for each changed key that nothing reads."""
    deciders = {key: name for name, cases in methods.unread().items() for key in cases.get(flat.get(name), "").split()}
    if flat.get("data.path"):
        deciders["data.corpus"] = "data.path"
    for key in changed:
        if key in deciders:
            name = deciders[key]
            yield f"{key}={flat[key]} is not read when {name}={flat[name]}: leave it out, or change {name}"


def relations(flat: dict[str, Any], offer: bool = True) -> Iterator[str]:
    """What is wrong with values together. offer: say which would be right."""
    heads, kv = flat["model.num_heads"], flat["model.num_kv_heads"]
    if heads % kv:
        yield f"model.num_heads={heads} is not a multiple of model.num_kv_heads={kv}: each group has the same size"
    if flat["model.position"] == "rope" and flat["model.head_dim"] % 2:
        yield f"model.head_dim={flat['model.head_dim']}: rotary positions turn pairs, so it must be even"
    if flat["model.rope_scaling.factor"] and not (
        flat["model.rope_scaling.low_freq_factor"] < flat["model.rope_scaling.high_freq_factor"]
    ):
        yield (
            f"model.rope_scaling.low_freq_factor={flat['model.rope_scaling.low_freq_factor']}: must be less than "
            f"model.rope_scaling.high_freq_factor={flat['model.rope_scaling.high_freq_factor']}"
        )
    if flat["optimizer.warmup_steps"] >= flat["steps"] and flat["optimizer.warmup_steps"]:
        yield f"optimizer.warmup_steps={flat['optimizer.warmup_steps']}: must be less than steps={flat['steps']}"
    if flat["compute.attention"] == "cudnn" and flat["data.document_mask"]:
        yield "compute.attention=cudnn cannot mask documents: set compute.attention=reference"
    if flat["compute.attention"] == "cudnn" and flat["compute.dtype"] == "float32":
        yield "compute.attention=cudnn knows no compute.dtype=float32: set bfloat16, or compute.attention=reference"
    yield from _sync_relations(flat, offer)
    if flat["model.experts"]:
        yield from _expert_relations(flat)
    elif flat["model.dense_layers"]:
        yield f"model.dense_layers={flat['model.dense_layers']} come before layers with experts: set model.experts"
    if flat["lora.rank"]:
        yield from _lora_relations(flat)
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


def _expert_relations(flat: dict[str, Any]) -> Iterator[str]:
    experts, chosen, rows = flat["model.experts"], flat["model.experts_per_token"], flat["moe.rows"]
    if chosen > experts:
        yield f"model.experts_per_token={chosen}: a token cannot choose more than model.experts={experts}"
    if flat["model.dense_layers"] and not flat["model.dense_dim"]:
        near = flat["model.mlp_dim"] * (chosen + flat["model.shared_experts"])
        yield (
            f"model.dense_layers={flat['model.dense_layers']} needs model.dense_dim, the size of their feed-forward "
            f"half: all experts of a token have {near} together"
        )
    if flat["model.mlp"] != "swiglu":
        yield f"model.mlp={flat['model.mlp']} with model.experts={experts}: experts are swiglu"
    try:
        is_bound = rows == "worst" or 0 < float(rows) < math.inf
    except ValueError:
        is_bound = False
    if not is_bound:
        yield f"moe.rows={rows!r}: expected a number above 0, in multiples of an even load, or worst"
    if flat["model.balance"] == "bias" and flat["sync.strategy"] == ISLAND:
        yield "model.balance=bias with sync.strategy=island: pushes are rounded, and counts must not be: set loss"
    if flat["model.balance"] == "bias" and flat["optimizer.name"] in ("signum", "onebit_adam"):
        yield (
            f"model.balance=bias with optimizer.name={flat['optimizer.name']}: it exchanges momentum, and the bias "
            "follows counts: set model.balance=loss, or adamw"
        )


def _sync_relations(flat: dict[str, Any], offer: bool) -> Iterator[str]:
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
    if codec in ("int2", "sign") and flat["sync.stochastic"] and feedback != "off" and name != "signum":
        yield (
            f"sync.codec={codec} with sync.stochastic rounds to values larger than the error it leaves, so residuals "
            "would grow: set sync.error_feedback=off, or leave sync.stochastic out"
        )
    yield from _warm_relations(flat)
    if strategy == ISLAND:
        yield from _island_relations(flat)
    if flat["sync.exchange"] == "backward":
        yield from _backward_relations(flat)
    if strategy == "eager":
        yield from _whole_rounds(flat, flat["sync.interval"], "sync.interval", offer)
    if strategy != "streaming":
        return
    H, fragments, layers = flat["sync.interval"], flat["sync.fragments"], flat["model.num_layers"]
    legal = ", ".join(str(n) for n in range(1, layers + 1) if layers % n == 0)
    if layers % fragments:
        yield f"sync.fragments={fragments} does not divide model.num_layers={layers}: choose one of {legal}"
    if H % fragments:
        sizes = _nearest_legal(flat, "sync.interval", fragments) if offer else ""
        yield f"sync.interval={H} is not a multiple of sync.fragments={fragments}. {sizes}"
        return
    K = H // fragments
    if flat["sync.overlap"] > K:
        yield f"sync.overlap={flat['sync.overlap']}: one fragment is on the wire at a time, for at most {K} steps"
    yield from _whole_rounds(flat, K, "sync.interval / sync.fragments", offer)


def _lora_relations(flat: dict[str, Any]) -> Iterator[str]:
    said = f"lora.rank={flat['lora.rank']}"
    if not flat["init.workdir"]:
        yield f"{said} trains an adapter beside a model that is there: name the run that holds it in init.workdir"
    if flat["sync.exchange"] == "backward":
        yield (
            f"{said}: sync.exchange=backward sends whole layers' gradients while the next one's is made, and an "
            "adapter has too few to be worth that: set sync.exchange=after"
        )
    try:
        re.compile(flat["lora.pattern"])
    except re.error as error:
        yield f"lora.pattern={flat['lora.pattern']!r} is no regular expression: {error}"


def _warm_relations(flat: dict[str, Any]) -> Iterator[str]:
    warm, H = flat["sync.warm_steps"], flat["sync.interval"]
    if not warm:
        return
    said = f"sync.warm_steps={warm}"
    if (flat["sync.strategy"], flat["sync.codec"]) == ("sync", "none"):
        yield f"{said}: with sync.strategy=sync and sync.codec=none all steps are like that. Leave it out"
    if flat["optimizer.name"] == "onebit_adam":
        yield f"{said}: optimizer.name=onebit_adam has a warm-up of its own, optimizer.freeze_steps"
    if warm >= flat["steps"]:
        yield f"{said}: must be less than steps={flat['steps']}"
    elif flat["sync.strategy"] in ("diloco", "eager", "streaming") and warm % H:
        near = " or ".join(str(n) for n in (warm // H * H, (warm // H + 1) * H) if 0 < n < flat["steps"])
        yield f"{said} is not a multiple of sync.interval={H}: rounds begin at its multiples. Nearest: {near or 'none'}"


def _island_relations(flat: dict[str, Any]) -> Iterator[str]:
    if flat["mesh.replica"] > 1:
        yield (
            f"mesh.replica={flat['mesh.replica']} with sync.strategy=island: an island is one replica, and the log is "
            "its slow link. Leave it at 1, and start one job for each island"
        )
    if flat["island.merge"] == "average" and flat["island.staleness"] < 0:
        yield (
            "island.merge=average with island.staleness=-1: it keeps a sum for each round that may be open, so it "
            "needs a bound: set island.staleness to 0 or more"
        )
    if flat["island.merge"] == "nesterov" and flat["sync.outer.optimizer"] == "adam":
        yield "island.merge=nesterov takes sync.outer.optimizer=nesterov, or sgd (no momentum), not adam"
    if flat["lora.rank"]:
        yield "lora.rank with sync.strategy=island: islands train all weights, so far"


def _backward_relations(flat: dict[str, Any]) -> Iterator[str]:
    said, strategy, optimizer = "sync.exchange=backward", flat["sync.strategy"], flat["optimizer.name"]
    if strategy != "sync":
        yield f"{said} sends what a backward pass finds at once, and sync.strategy={strategy} does not: set sync"
    if optimizer in ("signum", "onebit_adam"):
        yield f"{said} sends a layer's gradient, and optimizer.name={optimizer} a momentum: set sync.exchange=after"
    if flat["compute.unroll"]:
        yield f"{said} is a part of the loop over layers, and compute.unroll=True leaves none: set compute.unroll=False"


def _whole_rounds(flat: dict[str, Any], K: int, name: str, offer: bool) -> Iterator[str]:
    for key in ("steps", "eval_every", "checkpoint.every", "sample.every"):
        if flat[key] % K:
            sizes = _nearest_legal(flat, key, K) if offer else ""
            yield f"{key}={flat[key]} is not a multiple of {name} = {K}, the steps between two exchanges. {sizes}"


def _nearest_legal(flat: dict[str, Any], key: str, unit: int) -> str:
    """The nearest multiples of `unit` that nothing else forbids."""
    others = {line for line in relations(flat, offer=False) if not line.startswith(f"{key}=")}

    def legal(size: int) -> bool:
        return size > 0 and set(relations(flat | {key: size}, offer=False)) <= others

    start = flat[key] // unit
    below = next((n * unit for n in range(start, max(0, start - 1000), -1) if legal(n * unit)), None)
    above = next((n * unit for n in range(start + 1, start + 1000) if legal(n * unit)), None)
    found = [str(size) for size in (below, above) if size]
    return f"Nearest legal sizes: {' or '.join(found)}" if found else f"No multiple of {unit} fits the other values"


def profile_range(text: str) -> range:
    first, last = map(int, text.split(":"))
    if not 0 <= first < last:
        raise ValueError(text)
    return range(first, last)


def check_batch(batch_size: int, replicas: int, cut: tuple[str, int], accumulate: int) -> None:
    """cut: the mesh axes over which a replica's batch is cut, by name, and into how many parts."""
    over, shards = cut
    unit = replicas * shards * accumulate
    if batch_size % unit:
        raise UsageError(
            f"data.batch_size={batch_size} cannot be cut into {replicas} replicas × {over}={shards} × "
            f"optimizer.accumulate={accumulate} = {unit} equal parts. "
            f"Nearest legal sizes: {nearest_multiples(batch_size, unit)}"
        )

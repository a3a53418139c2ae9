"""From a config to the parts of a run: the one place that takes a config apart. Used by train.py and bench/."""

import dataclasses
import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from model import kernels
from model.transformer import Compute, ModelConfig, RopeScaling, Transformer
from optim import guard, optimizer
from optim.messages import OneBitAdam, Signum
from parallel.cost import stray
from parallel.cost.bytes import exchange_bytes
from parallel.cost.hardware import peak_flops
from parallel.exchange import codecs, residuals, units
from parallel.exchange.codecs.plain import is_round
from parallel.exchange.exchange import Feedback
from parallel.layout import mesh as meshes
from parallel.layout import placement, roles, rules
from parallel.strategies import eager, local, resume, stale, streaming
from parallel.strategies.base import Strategy
from parallel.strategies.sync import Sync
from parallel.strategies.warmed import Warmed
from runtime import config as configuration
from runtime.config import UsageError, check_batch, nearest_multiples
from runtime.console import human_bytes, human_count
from runtime.digest import named_arrays


@dataclass(frozen=True)
class Parts:
    """What a run is made of, before anything is compiled or any array exists."""

    model: Transformer
    attention: str  # the kernel, and why that one
    mesh: Mesh
    replicas: int
    strategy: Strategy
    param_shapes: Any
    state: Any  # abstract: shapes, dtypes, shardings
    batch: Any  # abstract
    eval_batch: Any  # abstract; as large as a micro-step's, so that evaluation never needs more memory than training


def build_model(c: Any, device_kind: str) -> tuple[Transformer, str]:
    """(the network that config c describes; its attention kernel and why that one). device_kind: the chip it will run
    on, which decides what `auto` means."""
    fields = {k: v for k, v in c.model.items() if k != "rope_scaling"}
    scaling = RopeScaling(**c.model.rope_scaling) if c.model.rope_scaling.factor else None
    config = ModelConfig(vocab_size=c.data.vocab_size, max_seq_len=c.data.seq_len, rope_scaling=scaling, **fields)
    auto = "float32" if device_kind == "cpu" else "bfloat16"
    dtype = jnp.dtype(auto if c.compute.dtype == "auto" else c.compute.dtype)
    queries = (c.data.batch_size, c.data.seq_len, config.num_heads, config.head_dim)
    try:
        kernel, passed = kernels.choose(c.compute.attention, queries, dtype, device_kind, c.data.document_mask)
    except ValueError as error:
        raise UsageError(str(error)) from error
    options = {k: v for k, v in c.compute.items() if k not in ("dtype", "attention")}
    compute = Compute(dtype=dtype, attention=kernel, **options)
    why = "; ".join((f"auto: {kernel}", *passed.values())) if c.compute.attention == "auto" else f"{kernel}, as asked"
    return Transformer(config, compute, z_loss=c.optimizer.z_loss), why


def build_schedule(c: Any) -> optimizer.Schedule:
    o = c.optimizer
    return optimizer.schedule(o.schedule, o.lr, o.warmup_steps, c.steps, o.final_lr_fraction)


def build_optimizer(c: Any, axes: Any) -> optimizer.Optimizer:
    o, schedule = c.optimizer, build_schedule(c)
    if o.name == "signum":
        return Signum(schedule=schedule, momentum=o.momentum, weight_decay=o.weight_decay)
    if o.name == "onebit_adam":
        return OneBitAdam(schedule=schedule, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay)
    names = ("b1", "b2", "eps", "momentum", "weight_decay", "clip_norm")
    return optimizer.build(o.name, schedule, axes, **{name: o[name] for name in names})


def build(c: Any, mesh: Mesh) -> Parts:
    """Checks everything that depends on the mesh, then puts the parts together.

    Raises UsageError for a dimension or batch that the mesh does not divide.
    """
    model, attention = build_model(c, mesh.devices.flat[0].device_kind)
    replicas = c.sync.replicas or mesh.shape["replica"]
    check_batch(c.data.batch_size, replicas, mesh.shape["fsdp"], c.optimizer.accumulate)
    if c.data.seq_len % mesh.shape["tensor"]:
        raise UsageError(
            f"data.seq_len={c.data.seq_len} cannot be cut over mesh.tensor={mesh.shape['tensor']} (between blocks the "
            f"sequence is sharded over it). Nearest legal sizes: "
            f"{nearest_multiples(c.data.seq_len, mesh.shape['tensor'])}"
        )
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(model.init, key)
    try:
        least = {"vocab": configuration.SMALLEST_VOCABULARY.get(c.data.tokenizer, 1)}
        rules.check_divisible(shapes, model.axes, mesh.shape, least)
        strategy = build_strategy(c, model, mesh, replicas, shapes)
    except ValueError as error:
        raise UsageError(str(error)) from error
    state = jax.eval_shape(lambda key: strategy.init(model.init(key)), key)
    shardings = rules.shardings(mesh, roles.specs_of(strategy.declare(state)))
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
    sizes, masked = (c.data.batch_size, c.data.seq_len), c.data.document_mask
    leading = (strategy.steps_per_call,)
    batch = placement.abstract_batch(mesh, leading, replicas, *sizes, placement.TRAIN, masked)
    micro = (c.data.batch_size // c.optimizer.accumulate, c.data.seq_len)
    eval_batch = placement.abstract_batch(mesh, (), mesh.shape["replica"], *micro, placement.EVAL, masked)
    return Parts(model, attention, mesh, replicas, strategy, shapes, state, batch, eval_batch)


def build_codec(s: Any) -> Any:
    """The codec of config group `sync`. Raises ValueError for options that it does not take."""
    kind = codecs.CODECS[s.codec]
    names = {field.name for field in dataclasses.fields(kind)} & configuration.CODEC_KEYS
    return kind(**{name: s[name] for name in names if s[name] != -1})


def draws(s: Any) -> bool:
    """Whether that codec draws random numbers: what it draws follows from `seed`, and is a part of the programs."""
    codec = build_codec(s)
    return is_round(codec) or codec.uses_key


def build_strategy(c: Any, model: Transformer, mesh: Mesh, replicas: int, shapes: Any) -> Strategy:
    """The strategy of config group `sync`, with its exchange. Raises ValueError, with the config's keys."""
    s = c.sync
    if replicas == 1 and (s.strategy, s.codec, s.algorithm) != ("sync", "none", "auto"):
        raise ValueError(
            f"sync.strategy={s.strategy}, sync.codec={s.codec}, sync.algorithm={s.algorithm} with one replica: nothing "
            "is exchanged. Set mesh.replica or sync.replicas to 2 or more, or leave these three as they are by default"
        )
    codec = build_codec(s)
    wanted = codec.wants_error_feedback if s.error_feedback == "auto" else s.error_feedback == "on"
    feedback = Feedback(s.decay, s.residual_dtype) if wanted and replicas > 1 else None
    leaves = units.leaves(shapes, model.axes)

    def exchange(leaves: Any) -> Any:
        return residuals.build(codec, s.algorithm, mesh, replicas, leaves, feedback, c.seed)

    shared = {
        "loss_fn": model.loss,
        "optimizer": build_optimizer(c, model.axes),
        "mesh": mesh,
        "specs": rules.specs(model.axes),
        "accumulate": c.optimizer.accumulate,
        "guard": guard.Guard(c.guard.zscore, c.guard.window),
    }
    if c.optimizer.name == "onebit_adam":
        exact = residuals.build(codecs.Identity(), s.algorithm, mesh, replicas, leaves)
        warm = Sync(exchange=exact, **shared | {"optimizer": dataclasses.replace(shared["optimizer"], frozen=False)})
        return Warmed(exchange=exchange(leaves), warm=warm, warm_steps=c.optimizer.freeze_steps, **shared)
    if s.strategy == "sync":
        return Sync(exchange=exchange(leaves), **shared)
    if s.strategy == "stale":
        late = {"staleness": s.staleness, "compensation": s.compensation}
        return stale.Stale(exchange=exchange(leaves), **late, **shared)
    shared |= {"interval": s.interval, "outer": local.Outer(**s.outer.to_dict())}
    if s.strategy == "diloco":
        return local.DiLoCo(exchange=exchange(leaves), **shared)
    if s.strategy == "eager":
        return eager.Eager(exchange=exchange(leaves), **shared)
    layers = jax.tree.map(lambda leaf: leaf.with_layers(c.model.num_layers // s.fragments), leaves["blocks"])
    rest = exchange({name: leaf for name, leaf in leaves.items() if name != "blocks"})
    parts = {"fragments": s.fragments, "overlap": s.overlap, "mix": s.mix}
    return streaming.Streaming(exchange=exchange({"blocks": layers}), rest=rest, **parts, **shared)


def shardings_of(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)


def compile_steps(parts: Parts, options: Any = None) -> dict[str, Any]:
    """The strategy's programs, compiled ahead of time: calling them can never compile again. options: XLA's."""
    outputs = (shardings_of(parts.state), None)
    with ThreadPoolExecutor(2) as pool:
        lower = lambda f: jax.jit(f, donate_argnums=0, out_shardings=outputs).lower(parts.state, parts.batch)
        compile_one = lambda f: lower(f).compile(compiler_options=options)
        found = {name: pool.submit(compile_one, f) for name, f in parts.strategy.programs().items()}
        return {name: future.result() for name, future in found.items()}


def traffic(parts: Parts, programs: dict[str, Any]) -> dict[str, stray.Traffic]:
    """What each of the strategy's programs sends, and what of it over `replica` is not its exchange's."""
    exchanges = parts.strategy.exchanges()
    predicted = {name: sum(sum(exchange_bytes(e).values()) for e in exchanges[name]) for name in programs}
    return {name: stray.traffic(program, parts.mesh, predicted[name]) for name, program in programs.items()}


def refuse_stray(found: dict[str, stray.Traffic], allow: bool) -> None:
    """Raises UsageError where a program sends over `replica` what is not ours, unless sync.allow_stray_bytes."""
    lines = [f"  {name}: {t.stray:,} bytes a call: {t.culprits}" for name, t in found.items() if t.stray]
    if lines and not allow:
        raise UsageError(
            "the compiled programs send bytes over the slow axis, mesh.replica, that the exchange did not ask for:\n"
            + "\n".join(lines)
            + "\nXLA added them, to lay out an array anew. Another mesh, batch or version of JAX may need none; "
            "sync.allow_stray_bytes=True trains with them"
        )


def wire_bytes(parts: Parts, found: dict[str, stray.Traffic], steps: int) -> dict[str, float]:
    """{mesh axis: bytes that one device sends per step}, on average over a run of so many steps; {} if a program's
    text was not understood. found: of `traffic`."""
    if any(t.not_counted for t in found.values()):
        return {}
    K = parts.strategy.steps_per_call
    calls = [parts.strategy.program_at(step, steps) for step in range(0, steps, K)]
    total = {axis: sum(found[name].per_axis[axis] for name in calls) for axis in parts.mesh.axis_names}
    return {axis: round(size / (len(calls) * K)) for axis, size in total.items()}


def compile_init(parts: Parts, given: bool = False) -> Any:
    """seed (uint32), or with `given` the parameters, which it takes over -> a fresh state. Every array is born in its
    shards: no host ever holds a whole one."""

    def init(seed_or_params: Any) -> Any:
        params = seed_or_params if given else parts.model.init(jax.random.key(seed_or_params))
        return parts.strategy.init(params)

    argument = parts.state.params if given else jax.ShapeDtypeStruct((), np.uint32)
    donated = (0,) if given else ()
    lowered = jax.jit(init, out_shardings=shardings_of(parts.state), donate_argnums=donated).lower(argument)
    # It runs once: level 1 compiles in a third of the time, to the same bits.
    options: Any = {"xla_backend_optimization_level": 1}
    return lowered.compile(compiler_options=options)


def kinds(parts: Parts) -> dict[str, str]:
    """What each array of the state is (parallel/layout/roles.py), by name."""
    return {name: role.kind for name, role in named_arrays(parts.strategy.declare(parts.state)).items()}


def adapter(parts: Parts, seed: int) -> Any:
    """What makes this run's state out of one with another codec, strategy, mesh or number of replicas."""
    leaves = units.leaves(parts.param_shapes, parts.model.axes)

    def fresh(names: Iterable[str]) -> dict[str, Any]:
        begun = named_arrays(compile_init(parts)(np.uint32(seed)))
        return {name: begun[name] for name in names}

    return lambda saved, wanted: resume.adapt(saved, wanted, kinds(parts), leaves, fresh, parts.mesh)


def num_parameters(parts: Parts) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(parts.param_shapes))


# ── what the user is told at the start ───────────────────────────────────────────────────────────────────────────


def describe(
    parts: Parts,
    programs: dict[str, Any],
    found: dict[str, stray.Traffic],
    per_step: dict[str, float],
    phases: dict[str, float],
) -> list[tuple[str, str]]:
    """Rows of the start-up table. Memory and wire bytes are those of the compiled programs, not estimates.

    found: what these programs send, and those beside them that are compiled already.
    """
    mesh, seq_len = parts.mesh, parts.batch["tokens"].shape[-1]
    need = max((memory(program) for program in programs.values()), key=lambda sizes: sizes[-1])
    state = sum(_shard_bytes(x) for x in jax.tree.leaves(parts.state))
    kinds = {d.device_kind for d in mesh.devices.flat}
    rows = [
        ("parameters", human_count(num_parameters(parts))),
        ("mesh", f"{meshes.describe(mesh)} = {mesh.size} devices ({', '.join(sorted(kinds))})"),
        ("replicas", f"{parts.replicas}, {_exchange(parts)}"),
        ("attention", parts.attention),
        ("tokens per step", human_count(math.prod(parts.batch["tokens"].shape[1:]))),
        (
            "FLOPs per token",
            f"{human_count(parts.model.flops_per_token(seq_len, causal=False))} (training, full attention)",
        ),
        ("state per device", f"{human_bytes(state)}; as much again while a checkpoint is being copied"),
        ("temporary per device", said_bytes(need[1])),
        ("in all per device", said_bytes(sum(need))),
    ]
    largest = sorted(named_arrays(parts.state.params).items(), key=lambda row: -math.prod(row[1].shape))[:4]
    for name, x in largest:
        rows.append((f"  {name}", f"{list(x.shape)} as {x.sharding.spec}, {human_bytes(_shard_bytes(x))} per device"))
    for axis, size in per_step.items():
        if mesh.shape[axis] > 1:
            rows.append((f"wire per step, {axis}", f"{human_bytes(size)} sent by each device"))
    if len(programs) > 1 and per_step:
        for name in programs:
            rows.append((f"  {name}", f"{human_bytes(found[name].per_axis['replica'])} over replica per call"))
    rows.append(("stray, replica", stray_row(found)))
    rows.append(("start-up", ", ".join(f"{name} {seconds:.1f} s" for name, seconds in phases.items())))
    return rows


def memory(program: Any) -> tuple[float, float]:
    """Bytes of a compiled program's arguments and temporaries on one device; NaN where the backend does not say: that
    is no reason not to train."""
    try:
        found = program.memory_analysis()
        return found.argument_size_in_bytes, found.temp_size_in_bytes
    except Exception:  # of whatever type the backend raises; some give None
        return math.nan, math.nan


def said_bytes(number: float) -> str:
    return "not known" if math.isnan(number) else human_bytes(number)


def stray_row(found: dict[str, stray.Traffic]) -> str:
    """What of these programs crosses `replica` and is not ours."""
    said = {name: t.not_counted or f"{human_bytes(t.stray)} a call" for name, t in found.items()}
    odd = [f"{name}: {said[name]}" for name, t in found.items() if t.stray or t.not_counted]
    fine = [name for name, t in found.items() if not (t.stray or t.not_counted)]
    return "; ".join(([f"0 B in {', '.join(fine)}"] if fine else []) + odd)


def _exchange(parts: Parts) -> str:
    strategy, exchange = parts.strategy, parts.strategy.exchange
    if parts.replicas == 1:
        return "so nothing is exchanged"
    kinds = {
        type(unit.codec).__name__: exchange.net.form(unit.codec) for unit in exchange.units if not is_round(unit.codec)
    }
    kinds |= {type(unit.codec).__name__: "in rounds" for unit in exchange.units if is_round(unit.codec)}
    parts_of_model = {id(e): e for exchanges in strategy.exchanges().values() for e in exchanges}  # streaming has two
    size = sum(sum(exchange_bytes(e).values()) for e in parts_of_model.values())
    how = ", ".join(f"{name} ({form})" for name, form in kinds.items())
    feedback = ", error feedback" if exchange.feedback else ""
    return f"{type(strategy).__name__}, {how}{feedback}, {human_bytes(size)} per exchange predicted"


def _shard_bytes(x: Any) -> int:
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def full_speed(parts: Parts) -> float | None:
    """FLOP/s of the whole mesh at its peak, None if the chip is not known."""
    peak = peak_flops(parts.mesh.devices.flat[0].device_kind)
    return peak * parts.mesh.size if peak else None


def use_compilation_cache(cache_directory: Path) -> None:
    """Compiled programs are kept in a private folder (whoever can write there runs code here), unless the user has
    set JAX_COMPILATION_CACHE_DIR."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        folder = cache_directory / "xla"
        folder.mkdir(mode=0o700, exist_ok=True)
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
        # Else a program of another version of this code comes back with that one's names, by which traffic is told.
        jax.config.update("jax_compilation_cache_include_metadata_in_key", True)

"""From a config to the parts of a run: model, optimizer, codec, strategy. Nothing is compiled here."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from model import kernels
from model.config import Compute, ModelConfig, RopeScaling
from model.transformer import Transformer
from optim import build as optim
from optim import guard
from optim.messages import OneBitAdam, Signum
from optim.optimizer import Optimizer, Schedule
from parallel.exchange import exchange as exchanges
from parallel.exchange import units
from parallel.exchange.codecs.plain import Identity
from parallel.exchange.exchange import Feedback
from parallel.layout import placement, roles, rules
from parallel.layout.axes import SLOW
from parallel.layout.mesh import check_divisible
from parallel.strategies.base import Strategy
from parallel.strategies.sync import Sync
from parallel.strategies.warmed import Warmed
from recipes import methods
from runtime import config as configuration
from runtime.config import UsageError, check_batch, nearest_multiples


@dataclass(frozen=True)
class Phase:
    """The steps of a run that one strategy makes: those from `first` on."""

    first: int
    strategy: Strategy
    state: Any  # abstract: shapes, dtypes, shardings
    batch: Any  # abstract
    prefix: str = ""  # of the names of its programs


@dataclass(frozen=True)
class Parts:
    """What a run is made of, before anything is compiled or any array exists."""

    model: Transformer
    attention: str  # the kernel, and why that one
    mesh: Mesh
    replicas: int
    phases: tuple[Phase, ...]  # one, or with sync.warm_steps two
    param_shapes: Any
    eval_batch: Any  # abstract; as large as a micro-step's, so that evaluation never needs more memory than training
    own: methods.Own  # objects of the caller's

    # Of the last phase: what the run is about.
    strategy = property(lambda self: self.phases[-1].strategy)
    state = property(lambda self: self.phases[-1].state)
    batch = property(lambda self: self.phases[-1].batch)


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


def build_schedule(c: Any) -> Schedule:
    o = c.optimizer
    return optim.schedule(o.schedule, o.lr, o.warmup_steps, c.steps, o.final_lr_fraction)


def build_optimizer(c: Any, axes: Any) -> Optimizer:
    o, schedule = c.optimizer, build_schedule(c)
    if o.name == "signum":
        return Signum(schedule=schedule, momentum=o.momentum, weight_decay=o.weight_decay)
    if o.name == "onebit_adam":
        return OneBitAdam(schedule=schedule, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay)
    names = ("b1", "b2", "eps", "momentum", "weight_decay", "clip_norm")
    return optim.optimizer(o.name, schedule, axes, **{name: o[name] for name in names})


def build(c: Any, mesh: Mesh, own: methods.Own = methods.NONE) -> Parts:
    """Checks everything that depends on the mesh, then puts the parts together.

    Raises UsageError for a dimension or batch that the mesh does not divide.
    """
    model, attention = build_model(c, mesh.devices.flat[0].device_kind)
    replicas = c.sync.replicas or mesh.shape[SLOW]
    check_batch(c.data.batch_size, replicas, rules.cut("batch", mesh.shape), c.optimizer.accumulate)
    over, shards = rules.cut("sequence", mesh.shape)
    if c.data.seq_len % shards:
        raise UsageError(
            f"data.seq_len={c.data.seq_len} cannot be cut over {over}={shards} (between blocks the sequence is sharded "
            f"over it). Nearest legal sizes: {nearest_multiples(c.data.seq_len, shards)}"
        )
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(model.init, key)
    try:
        least = {"vocab": configuration.SMALLEST_VOCABULARY.get(c.data.tokenizer, 1)}
        check_divisible(shapes, model.axes, mesh.shape, least)
        strategy = build_strategy(c, model, mesh, replicas, shapes, methods.chosen(c.sync, own))
        warm = build_strategy(c, model, mesh, replicas, shapes, methods.EXACT) if c.sync.warm_steps else None
        strategy.check_begin(c.sync.warm_steps, c.steps)
    except ValueError as error:
        raise UsageError(str(error)) from error
    masked = c.data.document_mask

    def phase(first: int, strategy: Strategy, prefix: str = "") -> Phase:
        state = jax.eval_shape(lambda key: strategy.init(model.init(key)), key)
        shardings = rules.shardings(mesh, roles.specs_of(strategy.declare(state)))
        state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
        leading, sizes = (strategy.steps_per_call,), (c.data.batch_size, c.data.seq_len)
        batch = placement.abstract_batch(mesh, leading, replicas, *sizes, placement.TRAIN, masked)
        return Phase(first, strategy, state, batch, prefix)

    phases = (phase(0, warm, "warm "),) if warm else ()
    micro = (c.data.batch_size // c.optimizer.accumulate, c.data.seq_len)
    eval_batch = placement.abstract_batch(mesh, (), mesh.shape[SLOW], *micro, placement.EVAL, masked)
    phases += (phase(c.sync.warm_steps, strategy),)
    return Parts(model, attention, mesh, replicas, phases, shapes, eval_batch, own)


def build_strategy(
    c: Any, model: Transformer, mesh: Mesh, replicas: int, shapes: Any, chosen: methods.Chosen
) -> Strategy:
    """The strategy that was chosen, with its exchange. Raises ValueError, with the config's keys."""
    s = c.sync
    if replicas == 1 and (s.strategy, s.codec, s.algorithm) != ("sync", "none", "auto"):
        raise ValueError(
            f"sync.strategy={s.strategy}, sync.codec={s.codec}, sync.algorithm={s.algorithm} with one replica: nothing "
            "is exchanged. Set mesh.replica or sync.replicas to 2 or more, or leave these three as they are by default"
        )
    codec, kind, fields = chosen
    wanted = codec.wants_error_feedback if s.error_feedback == "auto" else s.error_feedback == "on"
    feedback = Feedback(s.decay, s.residual_dtype) if wanted and replicas > 1 else None
    leaves = units.leaves(shapes, model.axes)

    def exchange(leaves: Any) -> Any:
        return exchanges.build(codec, s.algorithm, mesh, replicas, leaves, feedback, c.seed)

    shared = {
        "loss_fn": model.loss,
        "optimizer": build_optimizer(c, model.axes),
        "mesh": mesh,
        "specs": rules.specs(model.axes),
        "accumulate": c.optimizer.accumulate,
        "guard": guard.Guard(c.guard.zscore, c.guard.window),
    }
    if c.optimizer.name == "onebit_adam":
        exact = exchanges.build(Identity(), s.algorithm, mesh, replicas, leaves)
        warm = Sync(exchange=exact, **shared | {"optimizer": dataclasses.replace(shared["optimizer"], frozen=False)})
        return Warmed(exchange=exchange(leaves), warm=warm, warm_steps=c.optimizer.freeze_steps, **shared)
    parts = {field: exchange(part) for field, part in kind.divide(leaves, **fields).items()}
    return kind(**parts, **fields, **shared)


def num_parameters(parts: Parts) -> int:
    return sum(math.prod(x.shape) for x in jax.tree.leaves(parts.param_shapes))

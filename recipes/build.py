"""From a config to the parts of a run: what is trained, optimizer, codec, strategy. Nothing is compiled here."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.sharding import Mesh

from optim import build as optim
from optim import guard
from optim.messages import OneBitAdam, Signum
from optim.optimizer import Optimizer, Schedule
from optim.own import from_optax
from parallel.exchange import exchange as exchanges
from parallel.exchange import units
from parallel.exchange.codecs.plain import Identity
from parallel.exchange.exchange import Feedback
from parallel.layout import placement, roles, rules
from parallel.layout.axes import SLOW
from parallel.layout.mesh import check_divisible, cut
from parallel.strategies.backward import Backward
from parallel.strategies.base import Strategy
from parallel.strategies.island import Island
from parallel.strategies.local import Outer
from parallel.strategies.sync import Sync
from parallel.strategies.warmed import Warmed
from recipes import experts, methods, pipeline, tuned, xla
from recipes.task import Trainable
from runtime.config import UNREAD, UsageError, check_batch


@dataclass(frozen=True)
class Phase:
    """The steps of a run that one strategy makes: those from `first` on."""

    first: int
    strategy: Strategy
    state: Any  # abstract: shapes, dtypes, shardings
    batch: Any  # abstract
    prefix: str = ""  # of the names of its programs
    fixed: Any = field(default_factory=dict)  # the roles of state.fixed, of which the strategy knows nothing


@dataclass(frozen=True)
class Parts:
    """What a run is made of, before anything is compiled or any array exists."""

    task: Trainable
    mesh: Mesh
    replicas: int
    phases: tuple[Phase, ...]  # one, or with sync.warm_steps two
    param_shapes: Any  # of what is trained
    frozen: tuple[Any, ...]  # abstract: weights beside the state, further arguments of every program
    eval_batch: Any  # abstract; as large as a micro-step's, so that evaluation never needs more memory than training
    own: methods.Own  # objects of the caller's
    xla_options: dict[str, Any]  # with which all is compiled

    # Of the last phase: what the run is about.
    strategy = property(lambda self: self.phases[-1].strategy)
    state = property(lambda self: self.phases[-1].state)
    batch = property(lambda self: self.phases[-1].batch)

    @property
    def whole(self) -> Any:
        """Abstract: what the task's losses take for their parameters."""
        return self.task.whole(self.state.params, self.state.fixed, *self.frozen)


def build_schedule(c: Any) -> Schedule:
    o = c.optimizer
    return optim.schedule(o.schedule, o.lr, o.warmup_steps, c.steps, o.final_lr_fraction)


def has_moments(c: Any) -> bool:
    """That can be kept in bfloat16."""
    o = c.optimizer
    return "optimizer.moment_dtype" not in UNREAD["optimizer.name"][o.name] and (o.name != "sgd" or o.momentum > 0)


def build_optimizer(c: Any, axes: Any) -> Optimizer:
    o, schedule = c.optimizer, build_schedule(c)
    if o.name == "signum":
        return Signum(schedule=schedule, momentum=o.momentum, weight_decay=o.weight_decay)
    if o.name == "onebit_adam":
        return OneBitAdam(schedule=schedule, b1=o.b1, b2=o.b2, eps=o.eps, weight_decay=o.weight_decay)
    names = ("b1", "b2", "eps", "momentum", "weight_decay", "clip_norm")
    options = {name: o[name] for name in names} | {"balance_rate": c.moe.balance_rate}
    if o.moment_dtype == "bfloat16" and not has_moments(c):
        raise ValueError(
            f"optimizer.moment_dtype=bfloat16 with optimizer.name={o.name}: it has no moments: leave it out"
        )
    if o.moment_dtype == "bfloat16":
        from optim.narrow import Narrow  # which no other run reads

        options["kind"] = Narrow
    return optim.optimizer(o.name, schedule, axes, **options)


def build(c: Any, mesh: Mesh, own: methods.Own = methods.NONE) -> Parts:
    """Checks everything that depends on the mesh, then puts the parts together.

    Raises UsageError for a dimension or batch that the mesh does not divide.
    """
    task = own.task or tuned.build(c, mesh)
    xla_options = xla.options(c.compute.xla_options, mesh, is_small=own.task is not None)
    if own.task and c.sync.exchange == "backward":
        raise UsageError(
            "sync.exchange=backward is a part of our models' loop over layers, and a task of your own has none that it "
            "knows: set sync.exchange=after"
        )
    for axis, what in (("positions", "sequences"), ("layers", "layers"), ("experts", "experts")) if own.task else ():
        key, count = cut(axis, mesh.shape)
        if count > 1:
            raise UsageError(
                f"{key}={count}: {what} are cut over it, and a task of your own has none that it knows: leave it at 1"
            )
    if own.optimizer and c.model.experts and c.model.balance == "bias":
        raise UsageError("model.balance=bias with an optimizer of your own, which knows no counts: set loss, or none")
    pipeline.check(c, mesh.shape)
    experts.check(c, mesh.shape)
    replicas, batch_size = c.sync.replicas or mesh.shape[SLOW], c.data.batch_size
    check_batch(batch_size, replicas, cut("batch", mesh.shape), c.optimizer.accumulate)
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(task.init, key)
    try:
        check_cut(task, shapes, mesh.shape)
        optimizer = from_optax(own.optimizer, shapes) if own.optimizer else build_optimizer(c, task.axes)
        make = functools.partial(build_strategy, c, task, mesh, replicas, shapes, optimizer)
        strategy = make(methods.chosen(c.sync, own))
        warm = make(methods.EXACT) if c.sync.warm_steps else None
        methods.check_begin(strategy.steps_per_call, c.sync.warm_steps, c.steps)
    except ValueError as error:
        raise UsageError(str(error)) from error

    def phase(first: int, strategy: Strategy, prefix: str = "") -> Phase:
        state = jax.eval_shape(functools.partial(begin_state, strategy, task), shapes, key)
        fixed = roles.like(roles.FIXED, rules.specs(task.fixed_axes))
        declared = dataclasses.replace(strategy.declare(state), fixed=fixed)
        state = placement.placed(mesh, state, roles.specs_of(declared))
        leading = (strategy.steps_per_call,)
        batch = placement.abstract_batch(mesh, leading, replicas, batch_size, task.row, placement.TRAIN)
        return Phase(first, strategy, state, batch, prefix, fixed)

    phases, groups = (phase(0, warm, "warm "),) if warm else (), mesh.shape[SLOW]
    phases += (phase(c.sync.warm_steps, strategy),)
    rows = task.eval_rows(batch_size // c.optimizer.accumulate, groups * cut("batch", mesh.shape)[1])
    eval_batch = placement.abstract_batch(mesh, (), groups, rows, task.row, placement.EVAL)
    frozen = tuple(placement.placed(mesh, weights, rules.specs(axes)) for weights, axes in task.frozen)
    return Parts(task, mesh, replicas, phases, shapes, frozen, eval_batch, own, xla_options)


def check_cut(task: Trainable, trained: Any, sizes: Mapping[str, int]) -> None:
    """Raises ValueError for a weight, trained (of these shapes) or not, that a mesh of these sizes does not divide."""
    for shapes, axes in (*task.frozen, (trained, task.axes)):
        check_divisible(shapes, axes, sizes, task.least)


def begin_state(strategy: Strategy, task: Trainable, params: Any, key: jax.Array) -> Any:
    """Of a run that begins with these parameters."""
    return dataclasses.replace(strategy.init(params), fixed=task.fixed(key))


def build_strategy(
    c: Any, task: Trainable, mesh: Mesh, replicas: int, shapes: Any, optimizer: Optimizer, chosen: methods.Chosen
) -> Strategy:
    """The strategy that was chosen, with its exchange. Raises ValueError, with the config's keys."""
    s = c.sync
    how = {key: s[key] for key in ("strategy", "codec", "algorithm", "exchange")}
    codec, kind, fields = chosen
    if kind is not Island and replicas == 1 and tuple(how.values()) != ("sync", "none", "auto", "after"):
        raise ValueError(
            f"{', '.join(f'sync.{key}={value}' for key, value in how.items())} with one replica: nothing is exchanged. "
            "Set mesh.replica or sync.replicas to 2 or more, or leave these four as they are by default"
        )
    algorithm = "gather" if kind is Backward else s.algorithm
    wanted = codec.wants_error_feedback if s.error_feedback == "auto" else s.error_feedback == "on"
    if isinstance(fields.get("outer"), Outer):
        axes = jax.tree_util.tree_leaves_with_path(task.axes, is_leaf=lambda x: isinstance(x, tuple))
        averaged = tuple({path[-1].key for path, names in axes if "counts" in names})
        fields = fields | {"outer": dataclasses.replace(fields["outer"], averaged=averaged)}
    if kind is Island:  # what it sends is encoded outside of its programs
        fields, codec = fields | {"feedback": wanted}, Identity()
    feedback = Feedback(s.decay, s.residual_dtype) if wanted and replicas > 1 else None
    leaves = units.leaves(shapes, task.axes)

    def exchange(leaves: Any) -> Any:
        return exchanges.build(codec, algorithm, mesh, replicas, leaves, feedback, c.seed)

    shared = {
        "loss_fn": task.loss,
        "optimizer": optimizer,
        "mesh": mesh,
        "specs": rules.specs(task.axes),
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

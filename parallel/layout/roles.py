"""What each array of a state is: declared once, by the strategy or the exchange that makes it.

Placement, checkpoints and resuming ask the declaration, and guess nothing from names and shapes.
"""

from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

SHARED = "shared"  # the same for all replicas
REPLICA = "replica"  # each replica's own, [R, …]
IN_FLIGHT = "in flight"  # what each replica has sent and nobody has applied yet, [R, …]
OWED = "owed"  # residuals of error feedback
DRAWN = "drawn"  # a codec's own state, drawn anew where it does not fit
FLAG = "flag"  # what is known of something in flight
WINDOW = "window"  # the last sizes that the guard judges by, […, W]
TALLY = "tally"  # counts that are added up over replicas
FIXED = "fixed"  # weights that are saved with the others, and not trained


@dataclass(frozen=True)
class Role:
    kind: str
    spec: P


def like(kind: str, specs: Any, *leading: Any) -> Any:
    """Arrays that lie like the parameters of these specs, behind some leading dimensions."""
    return jax.tree.map(lambda spec: Role(kind, P(*leading, *spec)), specs, is_leaf=is_spec)


def each(kind: str, tree: Any, *leading: Any) -> Any:
    """Arrays of any shape, cut along their leading dimensions only."""
    return jax.tree.map(lambda _: Role(kind, P(*leading)), tree)


def of_optimizer(optimizer: Any, state: Any, specs: Any, axis: str, own: bool = False) -> Any:
    """An optimizer's state: arrays beside the weight they belong to, and counters; or where its `weight_of` says. own:
    every replica has one."""
    beside = lambda path: [key.key for key in path[:-1]]
    weight_of = getattr(optimizer, "weight_of", beside)

    def role(path, _) -> Role:
        weight = weight_of(path)
        slot = getattr(path[-1], "key", None)
        leading = (axis,) if own or slot in getattr(optimizer, "per_replica", ()) else ()
        spec = specs
        for name in weight:
            spec = spec[name]
        return Role(REPLICA if leading else SHARED, P(*leading, *spec) if weight else P(*leading))

    return jax.tree_util.tree_map_with_path(role, state)


def of_guard(counters: Any, axis: str | None = None) -> Any:
    """A guard's counters and windows. axis: every replica has some."""
    leading, kind = ((axis,), REPLICA) if axis else ((), SHARED)

    def role(path, _) -> Role:
        name = path[-1].name
        return Role(WINDOW if name.endswith("_W") else TALLY if name in ("skipped", "clipped") else kind, P(*leading))

    return jax.tree_util.tree_map_with_path(role, counters)


def is_spec(x: Any) -> bool:
    return isinstance(x, P)


def specs_of(declared: Any) -> Any:
    return jax.tree.map(lambda role: role.spec, declared)

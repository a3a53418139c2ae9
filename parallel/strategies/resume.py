"""Going on with another number of replicas, another mesh, codec or strategy: what becomes of what replicas remember.

The rule, by the declared role of each array (layout/roles.py). What is there in the same shape is taken as it is, to
the bit. With another number of replicas every new one gets the mean of the old ones', so that the mean over replicas,
which is all that the mathematics sees, is kept. What has no counterpart is made from what means the same: a replica's
own from what all shared, and the other way round by the mean. Residuals of error feedback lie by chunks that move with
R and the mesh where their server holds them; then they are folded into the workers', e'_i = e_i + e_server. What was in
flight and has no place any more is owed, if what is owed has the same unit: gradients in `sync` and `stale`,
pseudo-gradients in the local strategies. What is drawn is drawn anew. Every array of which this is not enough to go on
unchanged is named, and so is what is dropped.

Arrays are made one after another: what is needed of memory is the new state, and the sources of its largest part.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from parallel.exchange import fold
from parallel.exchange.units import Leaf
from parallel.layout import roles

Arrays = dict[str, jax.Array]
OWN = "strategy/replicas/"  # what each replica of a local strategy has, and by the same name without it all share
EAGER = "strategy/outer/replicas/"  # what each replica of an eager one has besides
WORKER = "codec/worker/"
TOGETHER = 2**27  # bytes on one device
FROM_MEAN = "carried over as its mean, so that every replica starts from the same"
FROM_SHARED = "made for every replica from what all share"
ADDED_UP = "carried over as its sum"
ESSENTIAL = ("params/", "opt/", "fixed/", "step")  # without these it is another model, or another optimizer


@dataclass(frozen=True)
class Step:
    """load: arrays of the checkpoint, and where to put them. make: from those, arrays of the new state."""

    load: dict[str, jax.ShapeDtypeStruct]
    make: Callable[[Arrays], Arrays] = dict


@dataclass
class Adapted:
    """How to make the new state: the steps, what must be said, and what cannot be made: it is another model's."""

    steps: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)

    @property
    def load(self) -> dict[str, jax.ShapeDtypeStruct]:
        return {name: x for step in self.steps for name, x in step.load.items()}


def adapt(
    saved: Mapping[str, Mapping[str, Any]],
    wanted: Mapping[str, jax.ShapeDtypeStruct],
    kinds: Mapping[str, str],
    leaves: Any,
    fresh: Callable[[Iterable[str], Arrays], Arrays],
    mesh: Mesh,
) -> Adapted:
    """saved: {name: {"shape", "dtype", "kind"}} of the checkpoint. wanted: {name: abstract array} of the new state, and
    their kinds. leaves: the units.Leaf of all parameters. fresh(names, parameters): of a state that begins with these
    parameters, for what must begin anew."""
    plan = _Plan(saved, wanted, kinds, jax.tree.leaves(leaves), mesh)
    for name in wanted:
        plan.place(name)
    plan.fold()
    return plan.finish(fresh)


class _Plan:
    def __init__(self, saved: Any, wanted: Any, kinds: Any, leaves: list[Leaf], mesh: Mesh):
        self.saved, self.wanted, self.kinds, self.leaves, self.mesh = saved, wanted, kinds, leaves, mesh
        self.said: dict[str, list[str]] = {}
        self.kept: dict[str, jax.ShapeDtypeStruct] = {}
        self.fresh: list[str] = []
        self.missing: list[str] = []
        self.parts: list[tuple[list[str], list[str], Callable[[Arrays], Arrays]]] = []  # as _step takes them
        self.read: set[str] = set()
        self.old_leaves = [_as_stored(leaf, saved) for leaf in leaves]
        self.same_counts = self.old_leaves == leaves  # of layers
        servers = lambda names, shape: {name: tuple(shape(name)) for name in names if fold.server_of(name)}
        old, new = servers(saved, lambda n: saved[n]["shape"]), servers(wanted, lambda n: wanted[n].shape)
        local = lambda names: any(name.startswith(OWN) for name in names)
        self.same_unit = local(saved) == local(wanted)  # of what is owed
        self.leaves_eager = any(n.startswith(EAGER) for n in saved) and not any(n.startswith(EAGER) for n in wanted)
        self.old_servers, self.servers_stay = old, old == new and self.same_unit and self.same_counts

    # ── each array by itself ─────────────────────────────────────────────────────────────────────────────────────

    def place(self, name: str) -> None:
        if fold.server_of(name):
            self._keep(name) if self.servers_stay else self.fresh.append(name)
        elif name.startswith(WORKER):
            pass  # with its server, in fold
        elif self.leaves_eager and name.startswith(f"{OWN}params/"):
            self._make(name, name.removeprefix(OWN), _resize, FROM_SHARED)  # they were a part of their round ahead
        elif self.kinds[name] == roles.DRAWN and not self.same_counts:
            self.fresh.append(name)  # by device, which have other layers now
        elif self._fits(name):
            self._keep(name)
        elif source := self._counterpart(name):
            convert = {roles.WINDOW: _window, roles.TALLY: _tally}.get(self.kinds[name], _resize)
            how = ADDED_UP if convert is _tally else FROM_MEAN if self._is_own(source) else FROM_SHARED
            self._make(name, source, convert, how)
        elif not name.startswith(ESSENTIAL):
            self.fresh.append(name)
        else:
            self.missing.append(name)

    def _fits(self, name: str) -> bool:
        x = self.saved.get(name)
        return x is not None and tuple(x["shape"]) == self.wanted[name].shape and x["dtype"] == self.wanted[name].dtype

    def _is_own(self, name: str) -> bool:
        return self.saved[name]["kind"] in (roles.REPLICA, roles.IN_FLIGHT) or name.startswith(OWN)

    def _counterpart(self, name: str) -> str | None:
        """What means the same in the checkpoint: by this name of another R or another window, or a replica's own for
        what is shared, and the other way round."""
        if name in self.saved:
            old, new = tuple(self.saved[name]["shape"]), self.wanted[name].shape
            other_replicas = self.kinds[name] in (roles.REPLICA, roles.IN_FLIGHT, roles.TALLY) and old[1:] == new[1:]
            return (
                name if old and len(old) == len(new) and (other_replicas or self.kinds[name] == roles.WINDOW) else None
            )
        if name.startswith(f"{EAGER}params/"):
            source = name.removeprefix(EAGER)
        elif name.startswith(f"{EAGER}opt/"):
            source = "strategy/outer/shared/" + name.removeprefix(f"{EAGER}opt/")
        else:
            source = name.removeprefix(OWN) if name.startswith(OWN) else OWN + name
        return source if source in self.saved else None

    # ── what is owed ─────────────────────────────────────────────────────────────────────────────────────────────

    def fold(self) -> None:
        """Workers' residuals: their own, their server's if it does not stay, and what was in flight without a place."""
        servers = (
            {} if self.servers_stay or not self.same_unit else fold.owners(list(self.old_servers), self.old_leaves)
        )
        flying = [n for n, x in self.saved.items() if x["kind"] == roles.IN_FLIGHT and n not in self.wanted]
        left: dict[str, list[str]] = {}
        for name in flying if self.same_unit else ():
            for leaf in self.leaves:
                if name.endswith(f"/{leaf.name}"):
                    left.setdefault(leaf.name, []).append(name)
        groups = [[leaf.name for leaf in own] for own in servers.values()]
        grouped = {name for group in groups for name in group}
        groups += [[leaf.name] for leaf in self.leaves if leaf.name not in grouped]
        for group in groups:
            members = [leaf for leaf in group if WORKER + leaf in self.wanted]
            if members:
                self._fold(members, {s: own for s, own in servers.items() if own[0].name in group}, left)

    def _fold(self, members: list[str], servers: dict[str, list[Leaf]], left: dict[str, list[str]]) -> None:
        flying = [name for leaf in members for name in left.get(leaf, ())]
        names = [WORKER + leaf for leaf in members]
        own = [name for name in names if name in self.saved and self.same_unit]
        if not servers and not flying and all(map(self._fits, own)) and len(own) == len(names):
            for name in names:
                self._keep(name)
            return
        if not (own or servers or flying):
            self.fresh += names
            return

        def make(arrays: Arrays) -> Arrays:
            owed = {}
            for server, leaves in servers.items():
                owed |= fold.unfold(server, arrays[server], leaves)
            found = {}
            for leaf in members:
                x, name = self.wanted[WORKER + leaf], WORKER + leaf
                parts = [_to_replicas(arrays[n], x.shape) for n in [name, *left.get(leaf, ())] if n in arrays]
                parts += [owed[leaf].reshape(1, *x.shape[1:])] if leaf in owed else []
                found[name] = jnp.broadcast_to(sum(parts), x.shape).astype(x.dtype)
            return found

        if any(self.saved[n]["shape"][0] != self.wanted[names[0]].shape[0] for n in [*own, *flying]):
            self._say(FROM_MEAN, names)
        if servers:
            self._say("folded, mean of the workers' + the server's: nothing owed is lost", [*servers, *names])
        if flying:
            self._say("in flight without a place now, and so owed", [*flying, *names])
        self._step([*own, *servers, *flying], names, make)

    # ── steps ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _keep(self, name: str) -> None:
        self.kept[name] = self.wanted[name]
        self.read.add(name)

    def _say(self, what: str, names: Iterable[str]) -> None:
        self.said.setdefault(what, []).extend(names)

    def _make(self, name: str, source: str, convert: Callable, what: str) -> None:
        self._say(what, [name])
        self._step([source], [name], lambda arrays: {name: convert(arrays[source], self.wanted[name])})

    def _step(self, load: list[str], names: list[str], make: Callable[[Arrays], Arrays]) -> None:
        self.read |= set(load)
        self.parts.append((load, names, make))

    def _steps(self) -> Iterator[Step]:
        """Parts that need little memory are one step: each is a program to be compiled."""
        group: list[tuple] = []
        for part in self.parts:
            if group and sum(self._size(load) for load, *_ in [*group, part]) > TOGETHER * self.mesh.size:
                yield self._together(group)
                group = []
            group.append(part)
        if group:
            yield self._together(group)

    def _size(self, load: list[str]) -> int:
        return sum(math.prod(self.saved[name]["shape"]) * np.dtype(self.saved[name]["dtype"]).itemsize for name in load)

    def _together(self, group: list[tuple]) -> Step:
        def make(arrays: Arrays) -> Arrays:
            found: Arrays = {}
            for load, _, one in group:
                found |= one({name: arrays[name] for name in load})
            return found

        shardings = {name: self.wanted[name].sharding for _, names, _ in group for name in names}
        load = {name: self._spread(name) for names, *_ in group for name in names}
        return Step(load, jax.jit(make, out_shardings=shardings))

    def _spread(self, name: str) -> jax.ShapeDtypeStruct:
        """Where to put an old array: cut over every mesh axis that divides one of its dimensions."""
        shape = tuple(self.saved[name]["shape"])
        spec: list[Any] = [None] * len(shape)
        for axis, size in self.mesh.shape.items():
            place = next((i for i, n in enumerate(shape) if n % size == 0 and n >= size and spec[i] is None), None)
            if place is not None and size > 1:
                spec[place] = axis
        sharding = NamedSharding(self.mesh, P(*spec))
        return jax.ShapeDtypeStruct(shape, np.dtype(self.saved[name]["dtype"]), sharding=sharding)

    def finish(self, fresh: Callable[[Iterable[str], Arrays], Arrays]) -> Adapted:
        steps = [Step(self.kept)] if self.kept else []
        steps += self._steps()
        if self.fresh:
            params = {name: x for name, x in self.wanted.items() if name.startswith("params/")}
            steps.append(Step(params, lambda params: fresh(self.fresh, params)))
            known = [name for name in self.fresh if not fold.server_of(name) or name not in self.saved]
            self._say("begun anew, for it has another shape or was not there", known)
        left = sorted(set(self.saved) - self.read)
        other_model = [name for name in left if name.startswith(("params/", "opt/", "fixed/", f"{OWN}opt/"))]
        self._say("dropped, for there is no place for it now", left)
        notes = [f"{what}: {', '.join(names)}" for what, names in self.said.items() if names]
        return Adapted(steps, notes, self.missing + other_model)


def _as_stored(leaf: Leaf, saved: Mapping[str, Mapping[str, Any]]) -> Leaf:
    """As it was in the checkpoint, whose layers may be counted otherwise (runtime/runs.py)."""
    x = saved.get(f"params/{leaf.name}", {})
    if "layers_at" not in x:
        return leaf
    _, theirs, ours = x["layers_at"]
    spec = (*[None] * (theirs - 1), leaf.spec[ours - 1], *leaf.spec[ours:])
    return replace(leaf, shape=tuple(x["stored_shape"]), spec=P(*spec), batch_dims=leaf.batch_dims + theirs - ours)


def _to_replicas(x_R: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """As it is where there are as many replicas, else their mean; float32."""
    x_R = x_R.astype(jnp.float32)
    return x_R if x_R.shape == shape else jnp.broadcast_to(jnp.mean(x_R, axis=0), shape)


def _resize(x: jax.Array, wanted: Any) -> jax.Array:
    """For other replicas: the mean of the old ones, or what they shared; of counters the largest, so that the learning
    rate goes on."""
    if x.ndim == len(wanted.shape) or x.shape[1:] == wanted.shape:
        is_float = jnp.issubdtype(x.dtype, jnp.floating)
        x = jnp.mean(x.astype(jnp.float32), axis=0) if is_float else jnp.max(x, axis=0)
    return jnp.broadcast_to(x, wanted.shape).astype(wanted.dtype)


def _tally(x: jax.Array, wanted: Any) -> jax.Array:
    """Where each replica counts for itself, the first one has counted what was before."""
    total = jnp.sum(x).astype(wanted.dtype)
    return jnp.zeros(wanted.shape, wanted.dtype).at[0].set(total) if wanted.shape else total


def _window(x_W: jax.Array, wanted: Any) -> jax.Array:
    """The newest values, of several replicas their mean; where there are fewer, the oldest places are empty."""
    *leading, count = wanted.shape
    if x_W.ndim > 1 and list(x_W.shape[:-1]) != leading:
        x_W = jnp.where(jnp.min(x_W, axis=0) < 0, -1.0, jnp.mean(x_W, axis=0))
    missing = jnp.full((*x_W.shape[:-1], count), -1.0, x_W.dtype)
    return jnp.broadcast_to(jnp.concatenate([missing, x_W], axis=-1)[..., -count:], wanted.shape)

"""The exchange: the mean over replicas of a tree of arrays, through a codec, with error feedback.

It is a shard_map that is manual over all mesh axes: every device encodes the shard it already holds, bytes move over
`replica` only, every device decodes. Nothing is gathered over a fast axis, whatever the model parallelism.

R replicas on D devices of the `replica` axis, k = R/D of them on each. N elements of one device's shard of what is
encoded together (a Unit), C = N/R of one chunk. Sums are float32 in the order of the replicas whatever the layout, so
that R replicas give the same bits on any number of devices.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from parallel.exchange import pairwise, residuals, units
from parallel.exchange.codecs.base import HOP_DIMS, in_turn, is_round, pick
from parallel.exchange.codecs.rounds import in_lockstep
from parallel.exchange.net import FLOAT32, Net, check
from parallel.exchange.units import Unit
from parallel.layout import roles
from parallel.layout.axes import SLOW


@dataclass(frozen=True)
class Feedback:
    """What a replica could not send is added to what it sends next (Seide et al. 2014): p = x + decay · residual."""

    decay: float = 1.0
    dtype: str = "float32"


@dataclass(frozen=True)
class Exchange:
    """Mean over replicas of a tree of arrays [R, …], whose leaves are sharded as P(SLOW, *spec).

    leaves: the tree of units.Leaf. units: which of them travel together, and how. declared: the roles of the residuals
    and the codec's own state (residuals.py), state_specs: their places. feedback: None, or how residuals are kept.
    seed: of the codecs that draw.
    """

    net: Net
    mesh: Mesh
    leaves: Any
    units: tuple[Unit, ...]
    declared: Any
    state_specs: Any
    feedback: Feedback | None = None
    seed: int = 0

    @property
    def replicas(self) -> int:
        return self.net.replicas

    def mean(self, tree_R: Any, state: Any, step: jax.Array) -> tuple[Any, Any]:
        """(leaves [R, …] float32 -> […], replicated over `replica`, sharded over the fast axes as before; state)."""
        body = lambda tree, state, step: self._finish(*self._start(tree, state, step), step)
        return self._on_devices(body, self._sharded(SLOW), self._sharded())(tree_R, state, step)

    def start(self, tree_R: Any, state: Any, step: jax.Array) -> tuple[Any, Any]:
        """The first hop of `mean` by itself: (what is in flight, state). `finish` is the rest."""

        def body(tree, state, step):
            flight, state = self._start(tree, state, step)
            return jax.tree.map(lambda x: x[(None,) * len(self.mesh.axis_names)], flight), state

        return self._on_devices(body, self._sharded(SLOW), P(*self.mesh.axis_names))(tree_R, state, step)

    def finish(self, flight: Any, state: Any, step: jax.Array) -> tuple[Any, Any]:
        def body(flight, state, step):
            return self._finish(jax.tree.map(lambda x: x[(0,) * len(self.mesh.axis_names)], flight), state, step)

        return self._on_devices(body, P(*self.mesh.axis_names), self._sharded())(flight, state, step)

    def scalars(self, xs_R: Sequence[jax.Array], name: str) -> jax.Array:
        """Sums over replicas of a few float32 scalars, [R] each, named in the program; TPUs name none that is alone."""
        body = lambda *xs_k: lax.psum(jnp.stack([*map(jnp.sum, xs_k), 0.0][: max(2, len(xs_k))]), SLOW)[: len(xs_k)]
        with jax.named_scope(f"scalars_{name}"):
            return jax.shard_map(body, mesh=self.mesh, in_specs=P(SLOW), out_specs=P(), check_vma=False)(*xs_R)

    def _sharded(self, *leading: str) -> Any:
        return jax.tree.map(lambda leaf: P(*leading, *leaf.spec), self.leaves)

    def _on_devices(self, body: Any, in_spec: Any, out_spec: Any) -> Any:
        def named(*args):
            with jax.named_scope("exchange"):
                return body(*args)

        specs = {"in_specs": (in_spec, self.state_specs, P()), "out_specs": (out_spec, self.state_specs)}
        return jax.shard_map(named, mesh=self.mesh, check_vma=False, **specs)

    # ── on one device ────────────────────────────────────────────────────────────────────────────────────────────

    def _start(self, tree_k: Any, state: Any, step: jax.Array) -> tuple[dict[str, Any], Any]:
        """({unit: what is in flight}, state with the workers' new residuals)."""
        leaves, (worker, treedef) = jax.tree.leaves(tree_k), jax.tree.flatten(state["worker"])
        rounds, messages, codec = {}, {}, FLOAT32
        for unit in self.units:
            x_kP, owed_kP = _join(unit, leaves), _join(unit, worker) if self.feedback else None
            if is_round(unit.codec):
                rounds[unit.name] = self._with_owed(x_kP, owed_kP)
                continue
            codec = unit.codec  # one for all that are not exchanged in rounds
            encode = functools.partial(self._encode, unit, x_kP, step)
            owed_kP, messages[unit.name] = in_turn(unit.pieces, encode, owed_kP, HOP_DIMS[self.net.form(codec)])
            if self.feedback:
                _part(unit, owed_kP, worker, 1)
        return rounds | self.net.first_hop(messages, codec), state | {"worker": treedef.unflatten(worker)}

    def _finish(self, flights: dict[str, Any], state: Any, step: jax.Array) -> tuple[Any, Any]:
        leaves, treedef = jax.tree.flatten(self.leaves)
        means: list[Any] = [None] * len(leaves)
        worker, worker_treedef = jax.tree.flatten(state["worker"])
        server, rounds, messages = dict(state["server"]), dict(state["rounds"]), {}
        runs: dict[str, Any] = {}
        for unit in self.units:
            flight = flights[unit.name]
            if is_round(unit.codec):
                own = residuals.here(rounds[unit.name], 0)
                runs[unit.name] = unit.codec.mean(flight, own, self._key(unit, step, 0), unit.local, self.net)
            elif self.net.form(unit.codec) == "two_stage":
                owed_kPC = residuals.here(server[unit.name], 1) if unit.name in server else None
                add_up = functools.partial(self._add_up, unit, flight, step)
                owed_kPC, messages[unit.name] = in_turn(unit.pieces, add_up, owed_kPC, 1)
                if unit.name in server:
                    server[unit.name] = residuals.put_back(owed_kPC, 1)
        flights = flights | self.net.second_hop(messages)
        returned = in_lockstep(runs) if runs else {}
        for unit in self.units:
            if is_round(unit.codec):
                mean, owed_kN, own = returned[unit.name]
                rounds[unit.name] = residuals.put_back(own, 0)
                if self.feedback:
                    _part(unit, owed_kN.astype(self.feedback.dtype), worker, 1)
            else:
                _, mean = in_turn(unit.pieces, functools.partial(self._decode, unit, flights[unit.name]), None, 0)
            _part(unit, mean, means, 0)
        state = {"worker": worker_treedef.unflatten(worker), "server": server, "rounds": rounds}
        return treedef.unflatten(means), state

    # Of piece i of a unit: (what is owed now, what is sent or found). Owed is None without error feedback.

    def _encode(self, unit: Unit, x_kP: jax.Array, step: jax.Array, i: Any, owed_k: Any) -> tuple[Any, Any]:
        p_kN = self._with_owed(pick(x_kP, i, 1), owed_k)
        message, _, owed_kN = self.net.encode(p_kN, unit.codec, self._key(unit, step, i))
        return owed_kN.astype(owed_k.dtype).reshape(owed_k.shape) if self.feedback else None, message

    def _add_up(self, unit: Unit, received: Any, step: jax.Array, i: Any, owed_kC: Any) -> tuple[Any, Any]:
        n, key, decay = unit.size // unit.pieces, self._key(unit, step, i), getattr(self.feedback, "decay", 1.0)
        message, owed_kC = self.net.round_sum(pick(received, i, 2), n, unit.codec, key, owed_kC, decay)
        return owed_kC, message

    def _decode(self, unit: Unit, received: Any, i: Any, _: None) -> tuple[None, jax.Array]:
        received = pick(received, i, min(1, HOP_DIMS[self.net.form(unit.codec)]))
        return None, self.net.decode(received, unit.size // unit.pieces, unit.codec).reshape(unit.piece)

    def _with_owed(self, x_k: jax.Array, owed_k: Any) -> jax.Array:
        x_kN = x_k.reshape(x_k.shape[0], -1)
        return x_kN + self.feedback.decay * owed_k.reshape(x_kN.shape).astype(jnp.float32) if self.feedback else x_kN

    def _key(self, unit: Unit, step: jax.Array, i: Any) -> jax.Array | None:
        """One key a step, piece and shard. No axis is folded in over which the unit is not sharded: the copies of a
        replicated array would silently become different. Replicas are told apart by Net."""
        if not is_round(unit.codec) and not unit.codec.uses_key:
            return None
        places = [lax.axis_index(axis) for axis in unit.axes]
        return functools.reduce(jax.random.fold_in, [unit.salt, step, i, *places], jax.random.key(self.seed))


def _join(unit: Unit, leaves: Sequence[jax.Array]) -> jax.Array:
    """[k, P, …], the pieces of a unit, out of all leaves [k, …]."""
    own = [leaves[i] for i in unit.leaves]
    k = own[0].shape[0]
    joined = own[0] if len(own) == 1 else jnp.concatenate([x.reshape(k, -1) for x in own], axis=1)
    return joined.reshape(k, unit.pieces, *unit.piece)


def _part(unit: Unit, x: jax.Array, leaves: list, dims: int) -> None:
    """[dims…, …] of a unit into its places among all leaves."""
    sizes = [math.prod(shape) for shape in unit.shapes]
    parts = jnp.split(x.reshape(*x.shape[:dims], -1), np.cumsum(sizes)[:-1], -1)
    for i, part, shape in zip(unit.leaves, parts, unit.shapes, strict=True):
        leaves[i] = part.reshape(*x.shape[:dims], *shape)


def build(
    codec: Any, algorithm: str, mesh: Mesh, replicas: int, leaves: Any, feedback: Feedback | None = None, seed: int = 0
) -> Exchange:
    """The exchange of a tree of units.Leaf. Raises ValueError, with the config's keys, for what does not fit."""
    devices = mesh.shape[SLOW]
    if replicas % devices:
        raise ValueError(
            f"sync.replicas={replicas} is not a multiple of mesh.{SLOW}={devices}: "
            "each device of the slow axis holds the same number of replicas"
        )
    check(algorithm, codec)
    codec = codec if replicas > 1 else FLOAT32  # nothing is sent, so nothing is rounded
    if is_round(codec):
        codec.check([leaf.shard(mesh.shape) for leaf in jax.tree.leaves(leaves)])
    over_gloo = jax.process_count() > 1 and mesh.devices.flat[0].platform == "cpu"
    net = Net(algorithm, replicas, devices, **pairwise.collectives(devices) if over_gloo else {})
    plan = units.plan(leaves, codec, mesh)
    declared = residuals.declare(net, leaves, plan, feedback)
    return Exchange(net, mesh, leaves, plan, declared, roles.specs_of(declared), feedback, seed)

"""Streaming DiLoCo: fragments of the model are exchanged in turn while training goes on (Douillard et al. 2025,
algorithm 2)."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from parallel.exchange import residuals
from parallel.exchange.exchange import Exchange
from parallel.layout import roles
from parallel.strategies.base import Batch, State, part
from parallel.strategies.local import Local, joined


@dataclass(frozen=True)
class Streaming(Local):
    """Fragments of the model are exchanged in turn, and while they are, training goes on.

    A call is K = H / fragments inner steps. Fragment p, every `fragments`-th layer from p on, is on the wire during
    the last `overlap` of them, then outer-updated and mixed into the replicas: θ_i ← mix·θ_i + (1 − mix)·θ_global.
    Fragment 0 takes embedding, head and final norm with it. With one fragment, no overlap and mix 0 it is DiLoCo.
    p is an index of the program, so there are two: with and without the embedding.
    rest: the exchange of embedding, head and norm; `exchange` is that of one fragment's layers.
    """

    fragments: int = 2
    overlap: int = 0
    mix: float = 0.0
    rest: Any = None

    @property
    def hidden_steps(self) -> int:
        return self.overlap

    @classmethod
    def divide(cls, leaves: Any, *, fragments: int, **own: Any) -> dict[str, Any]:
        blocks = leaves.get("blocks")
        if not isinstance(blocks, dict) or any(not leaf.batch_dims for leaf in jax.tree.leaves(blocks)):
            raise ValueError(
                "sync.strategy=streaming exchanges layers in turn, and this model has no parameters 'blocks', a "
                "dictionary of arrays whose first axis is 'layers'"
            )
        fragment = jax.tree.map(lambda leaf: leaf.with_layers(leaf.shape[0] // fragments), blocks)
        return {"exchange": {"blocks": fragment}, "rest": _rest(leaves)}

    @property
    def steps_per_call(self) -> int:
        return self.interval // self.fragments

    def init(self, params: Any) -> State:
        state, F = super().init(params), self.fragments
        stack = lambda tree: jax.tree.map(lambda x: jnp.broadcast_to(x, (F, *x.shape)), tree)
        counts = {name: stack(x) for name, x in state.strategy["outer"]["shared"].items() if name == "count"}
        outer = {"shared": state.strategy["outer"]["shared"] | counts}
        own, rest = residuals.init(self.exchange), residuals.init(self.rest)
        worker = jax.tree.map(lambda x: jnp.repeat(x, F, axis=1), own.pop("worker")) | rest.pop("worker")
        codec = {"worker": worker, "fragments": stack(own), "rest": rest}
        strategy = state.strategy | {"outer": outer, "rounds": stack(state.strategy["rounds"])}
        return replace(state, strategy=strategy, codec=codec)

    def declare(self, state: State) -> Any:
        stacked = lambda role: roles.Role(role.kind, P(None, *role.spec))
        own, rest = dict(self.exchange.declared), dict(self.rest.declared)
        worker = own.pop("worker") | rest.pop("worker")
        codec = {"worker": worker, "fragments": jax.tree.map(stacked, own), "rest": rest}
        return replace(super().declare(state), codec=codec)

    def programs(self) -> dict[str, Callable]:
        whole = {"fragment+embedding": lambda state, batch: self._call(state, batch, True)}
        return whole | (
            {"fragment": lambda state, batch: self._call(state, batch, False)} if self.fragments > 1 else {}
        )

    def exchanges(self) -> dict[str, tuple[Exchange, ...]]:
        return {"fragment": (self.exchange,), "fragment+embedding": (self.exchange, self.rest)}

    def program_at(self, step: int, last: int) -> str:
        return "fragment" if step // self.steps_per_call % self.fragments else "fragment+embedding"

    def _call(self, state: State, batch_KRBT: Batch, with_rest: bool) -> tuple[State, dict[str, jax.Array]]:
        K, own = self.steps_per_call, state.strategy
        p = state.step // K % self.fragments
        inner_R, metrics = self.inner_steps(own["replicas"], part(batch_KRBT, 0, K - self.overlap))
        fragment = functools.partial(self._fragment, p=p, with_rest=with_rest)
        ours, theirs_R = fragment(state.params), fragment(inner_R["params"], axis=1)
        guard = _pick(own["rounds"], p)
        delta_R = jax.tree.map(jnp.subtract, ours, theirs_R)
        delta_R, new = self.judge_round(guard, delta_R, self.rate(state.step + K - self.overlap))
        exchanges = {"own": (self.exchange, {"blocks": delta_R["blocks"]})}
        if with_rest:
            exchanges["rest"] = (self.rest, _rest(delta_R))
        codec = self._codec(state.codec, p, with_rest)
        done, inner_R, during = self.exchange_meanwhile(
            state.step, exchanges, codec, inner_R, part(batch_KRBT, K - self.overlap, K)
        )
        metrics = jax.tree.map(joined, metrics, during) if during else metrics
        mean = {name: x for found, _ in done.values() for name, x in found.items()}
        new_codec = {name: found for name, (_, found) in done.items()}
        outer = self._outer(own["outer"]["shared"], fragment, p)
        specs = {name: self.specs[name] for name in mean}
        rate = self.rate(state.step + K)
        (after, outer), _, usable, used = self.settle(
            guard, self.outer.apply, specs, mean, (ours, outer), new.applied, rate, judged=True
        )
        codec = self.guard.commit(usable, new_codec, codec)
        later_R = fragment(inner_R["params"], axis=1)
        # Of a refused fragment the replicas keep nothing: what they have may not even be finite.
        mix = jnp.where(used.applied, self.mix, 0.0)
        mixed_R = jax.tree.map(lambda x_R, x: jnp.where(mix > 0, mix * x_R, 0) + (1 - mix) * x, later_R, after)
        inner_R = inner_R | {"params": self._with_fragment(inner_R["params"], mixed_R, p, axis=1)}
        state = replace(
            state,
            step=state.step + K,
            params=self._with_fragment(state.params, after, p),
            strategy={
                "replicas": inner_R,
                "outer": {"shared": self._with_outer(own["outer"]["shared"], outer, p)},
                "rounds": _put(own["rounds"], self.guard.count(guard, new, used), p),
            },
            codec=self._with_codec(state.codec, codec, p),
        )
        return state, self.report(state, K, metrics)

    def _outer(self, shared: Any, fragment: Any, p: jax.Array) -> Any:
        """The outer optimizer's state of a fragment. It lies in the order of the model, as the parameters do; each
        fragment has a count of its own."""
        counts = {"count": _pick(shared["count"], p)} if "count" in shared else {}
        return (fragment(_weights(shared)) if _weights(shared) else {}) | counts

    def _with_outer(self, shared: Any, own: Any, p: jax.Array) -> Any:
        counts = {"count": _put(shared["count"], own["count"], p)} if "count" in shared else {}
        return (self._with_fragment(_weights(shared), _weights(own), p) if _weights(shared) else {}) | counts

    def _codec(self, codec: Any, p: jax.Array, with_rest: bool) -> dict[str, Any]:
        """What the exchanges of a fragment remember. The workers' residuals lie like the parameters."""
        worker = codec["worker"]
        own = {"own": {"worker": self._fragment(worker, p, False, axis=1) if worker else {}}}
        own["own"] |= _pick(codec["fragments"], p)
        return own | ({"rest": {"worker": _rest(worker)} | codec["rest"]} if with_rest else {})

    def _with_codec(self, codec: Any, own: Any, p: jax.Array) -> dict[str, Any]:
        layers, rest = dict(own["own"]), dict(own.get("rest", {"worker": {}} | codec["rest"]))
        new = layers.pop("worker") | rest.pop("worker")
        worker = self._with_fragment(codec["worker"], new, p, axis=1) if new else {}
        return {"worker": worker, "fragments": _put(codec["fragments"], layers, p), "rest": rest}

    def _fragment(self, params: Any, p: jax.Array, with_rest: bool, axis: int = 0) -> dict[str, Any]:
        """{"blocks": layers p, p + F, p + 2F, … of the layers along `axis`}, and the rest."""

        def pick(x: jax.Array) -> jax.Array:
            groups = x.reshape(*x.shape[:axis], -1, self.fragments, *x.shape[axis + 1 :])
            return lax.dynamic_index_in_dim(groups, p, axis + 1, keepdims=False)

        return {"blocks": jax.tree.map(pick, params["blocks"])} | (_rest(params) if with_rest else {})

    def _with_fragment(self, params: Any, new: Any, p: jax.Array, axis: int = 0) -> Any:
        def put(x: jax.Array, layers: jax.Array) -> jax.Array:
            groups = x.reshape(*x.shape[:axis], -1, self.fragments, *x.shape[axis + 1 :])
            return lax.dynamic_update_index_in_dim(groups, layers, p, axis + 1).reshape(x.shape)

        return params | new | {"blocks": jax.tree.map(put, params["blocks"], new["blocks"])}


def _rest(params: Any) -> dict[str, Any]:
    """Embedding, head, final norm: everything but the layers."""
    return {name: x for name, x in params.items() if name != "blocks"}


def _weights(outer: Any) -> dict[str, Any]:
    return {name: x for name, x in outer.items() if name != "count"}


def _pick(stacked: Any, p: jax.Array) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, p, keepdims=False), stacked)


def _put(stacked: Any, own: Any, p: jax.Array) -> Any:
    return jax.tree.map(lambda x, y: lax.dynamic_update_index_in_dim(x, y, p, 0), stacked, own)

"""Streaming DiLoCo: fragments of the model are exchanged in turn while training goes on (Douillard et al. 2025,
algorithm 2)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec as P

from parallel import residuals
from parallel.exchange import Exchange
from parallel.local import Local
from parallel.strategies import Batch, State


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
    def steps_per_call(self) -> int:
        return self.interval // self.fragments

    def init(self, params: Any) -> State:
        state, F = super().init(params), self.fragments
        pieces = jax.tree.map(lambda x: x.reshape(-1, F, *x.shape[1:]).swapaxes(0, 1), params["blocks"])
        state.opt_state = {"fragments": jax.vmap(self.outer.init)(pieces), "rest": self.outer.init(_rest(params))}
        own = jax.tree.map(lambda x: jnp.broadcast_to(x, (F, *x.shape)), residuals.init(self.exchange))
        state.codec = {"fragments": own, "rest": residuals.init(self.rest)}
        return state

    def codec_specs(self) -> Any:
        stacked = jax.tree.map(lambda s: P(None, *s), self.exchange.state_specs, is_leaf=lambda x: isinstance(x, P))
        return {"fragments": stacked, "rest": self.rest.state_specs}

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
        K, p = self.steps_per_call, state.step % self.fragments
        part = lambda a, b: jax.tree.map(lambda x: x[a:b], batch_KRBT)
        inner_R, metrics = self.inner_steps(state.strategy["replicas"], part(0, K - self.overlap))
        ours, theirs_R = self._fragment(state.params, p), self._fragment(inner_R["params"], p, axis=1)
        codec, opt_state = ({"own": _pick(tree["fragments"], p)} for tree in (state.codec, state.opt_state))
        if with_rest:
            ours, theirs_R = ours | _rest(state.params), theirs_R | _rest(inner_R["params"])
            codec["rest"], opt_state["rest"] = state.codec["rest"], state.opt_state["rest"]
        delta_R = jax.tree.map(lambda x, x_R: x - x_R, ours, theirs_R)
        finite = self.all_finite(delta_R)
        exchanges = {"own": (self.exchange, {"blocks": delta_R["blocks"]})}
        if with_rest:
            exchanges["rest"] = (self.rest, _rest(delta_R))
        done, inner_R, during = self.exchange_meanwhile(
            state.step, exchanges, codec, inner_R, part(K - self.overlap, K)
        )
        mean = {name: x for found, _ in done.values() for name, x in found.items()}
        new_codec = {name: new for name, (_, new) in done.items()}
        blocks, new_own = self.outer.update(mean["blocks"], opt_state["own"], ours["blocks"])
        updates, new_opt_state = {"blocks": blocks}, {"own": new_own}
        if with_rest:
            rest, new_opt_state["rest"] = self.outer.update(_rest(mean), opt_state["rest"], _rest(ours))
            updates |= rest
        keep = lambda new, old: jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, old)
        params = keep(optax.apply_updates(ours, updates), ours)
        codec, opt_state = keep(new_codec, codec), keep(new_opt_state, opt_state)
        later_R = self._fragment(inner_R["params"], p, axis=1) | (_rest(inner_R["params"]) if with_rest else {})
        mixed_R = jax.tree.map(
            lambda x_R, x: jnp.where(finite, self.mix * x_R + (1 - self.mix) * x, x_R), later_R, params
        )
        inner_R = inner_R | {"params": self._with_fragment(inner_R["params"], mixed_R, p, axis=1)}
        after = State(
            state.step + 1,
            self._with_fragment(state.params, params, p),
            {
                "fragments": _put(state.opt_state["fragments"], opt_state["own"], p),
                "rest": opt_state.get("rest", state.opt_state["rest"]),
            },
            {"replicas": inner_R},
            self.guard.update(state.guard, optax.tree.norm(mean), finite),
            {
                "fragments": _put(state.codec["fragments"], codec["own"], p),
                "rest": codec.get("rest", state.codec["rest"]),
            },
        )
        metrics = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), metrics, during) if during else metrics
        return after, self.report(state.step, after.params, after.guard, metrics)

    def _fragment(self, params: Any, p: jax.Array, axis: int = 0) -> dict[str, Any]:
        """{"blocks": layers p, p + F, p + 2F, … of the layers along `axis`}."""

        def pick(x: jax.Array) -> jax.Array:
            groups = x.reshape(*x.shape[:axis], -1, self.fragments, *x.shape[axis + 1 :])
            return lax.dynamic_index_in_dim(groups, p, axis + 1, keepdims=False)

        return {"blocks": jax.tree.map(pick, params["blocks"])}

    def _with_fragment(self, params: Any, new: Any, p: jax.Array, axis: int = 0) -> Any:
        def put(x: jax.Array, layers: jax.Array) -> jax.Array:
            groups = x.reshape(*x.shape[:axis], -1, self.fragments, *x.shape[axis + 1 :])
            return lax.dynamic_update_index_in_dim(groups, layers, p, axis + 1).reshape(x.shape)

        return params | new | {"blocks": jax.tree.map(put, params["blocks"], new["blocks"])}


def _rest(params: Any) -> dict[str, Any]:
    """Embedding, head, final norm: everything but the layers."""
    return {name: x for name, x in params.items() if name != "blocks"}


def _pick(stacked: Any, p: jax.Array) -> Any:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, p, keepdims=False), stacked)


def _put(stacked: Any, own: Any, p: jax.Array) -> Any:
    return jax.tree.map(lambda x, y: lax.dynamic_update_index_in_dim(x, y, p, 0), stacked, own)

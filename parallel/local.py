"""Local strategies: replicas train by themselves and exchange the way they have gone, not the gradient of each step.

DiLoCo (Douillard et al. 2023, algorithm 1) and Streaming DiLoCo (Douillard et al. 2025, algorithm 2). Replicas count
equally, whatever their numbers of tokens. `params` are the global parameters: they are what is evaluated (2.67 against
2.77 for a replica's own, in the Streaming paper), and they only change where something is exchanged.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from parallel import residuals
from parallel.exchange import AXIS
from parallel.strategies import Batch, State, Strategy

LOCAL_METRICS = ("loss", "grad_norm", "tokens", "skipped", "skipped_in_a_row")  # [K, R]: not added up over the link


def outer_optimizer(optimizer: str, lr: float, momentum: float) -> optax.GradientTransformation:
    """What is done with the mean pseudo-gradient: nesterov, sgd (without momentum), adam."""
    if optimizer == "adam":
        return optax.adam(lr, b1=momentum, b2=0.95)
    return optax.sgd(lr, momentum=momentum if optimizer == "nesterov" else None, nesterov=True)


@dataclass(frozen=True)
class Local(Strategy):
    """interval: H inner steps from exchange to exchange. outer: of the pseudo-gradients."""

    interval: int = 30
    outer: Any = None

    def init(self, params: Any) -> State:
        R = self.exchange.replicas
        copies = lambda tree: jax.tree.map(lambda x: jnp.broadcast_to(x, (R, *x.shape)), tree)
        inner = {"params": params, "opt_state": self.optimizer.init(params), "guard": self.guard.init()}
        zero = jnp.zeros((), jnp.int32)
        return State(
            zero,
            params,
            self.outer.init(params),
            {"replicas": copies(inner)},
            self.guard.init(),
            residuals.init(self.exchange),
        )

    def inner_step(self, inner_R: Any, batch_RBT: Batch) -> tuple[Any, dict[str, jax.Array]]:
        """One step of every replica by itself: nothing crosses `replica`, not even the loss."""

        def one(inner: Any, batch_BT: Batch) -> tuple[Any, dict[str, jax.Array]]:
            loss, grads = self.loss_and_gradient(inner["params"], batch_BT)
            tokens = jnp.maximum(jnp.sum(batch_BT["mask"]), 1)
            grads = jax.tree.map(lambda g: g / tokens, grads)
            norm, guard = optax.tree.norm(grads), inner["guard"]
            allowed = self.guard.allows(guard, norm, jnp.isfinite(norm) & jnp.isfinite(loss))
            params, opt_state = self.optimizer.apply(grads, inner["opt_state"], inner["params"])
            keep = lambda new, old: jnp.where(allowed, new, old)
            after = self.guard.update(guard, norm, allowed)
            metrics = (loss / tokens, norm, tokens, after.skipped, after.in_a_row)
            return {
                "params": jax.tree.map(keep, params, inner["params"]),
                "opt_state": jax.tree.map(keep, opt_state, inner["opt_state"]),
                "guard": after,
            }, dict(zip(LOCAL_METRICS, metrics, strict=True))

        return jax.vmap(one, spmd_axis_name=AXIS)(inner_R, batch_RBT)

    def inner_steps(self, inner_R: Any, batch_KRBT: Batch) -> tuple[Any, dict[str, jax.Array]]:
        if batch_KRBT["tokens"].shape[0] == 1:
            inner_R, metrics = self.inner_step(inner_R, jax.tree.map(lambda x: x[0], batch_KRBT))
            return inner_R, jax.tree.map(lambda x: x[None], metrics)
        return lax.scan(self.inner_step, inner_R, batch_KRBT)

    def all_finite(self, tree_R: Any) -> jax.Array:
        """Agreed by all replicas, before anything is encoded."""
        norm_R = jax.vmap(optax.tree.norm, spmd_axis_name=AXIS)(tree_R)
        bad_R = 1.0 - jnp.isfinite(norm_R).astype(jnp.float32)
        return self.exchange.scalars(bad_R[:, None], "round")[0] == 0

    def report(self, calls: jax.Array, params: Any, metrics: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """[K, R] of each replica, and [K] of what all share. calls: made before this one."""
        K = metrics["loss"].shape[0]
        lr = jnp.asarray(self.optimizer.schedule(K * calls + jnp.arange(K)), jnp.float32)
        return metrics | {
            "param_norm": jnp.broadcast_to(optax.tree.norm(params), (K,)),
            "lr": jnp.broadcast_to(lr, (K,)),
        }

    def spread(self, tree: Any, specs: Any) -> Any:
        """One copy for each replica, laid where the replica is."""
        R = self.exchange.replicas

        def copies(x: jax.Array, spec: P) -> jax.Array:
            x_R = jnp.broadcast_to(x, (R, *x.shape))
            return lax.with_sharding_constraint(x_R, NamedSharding(self.mesh, P(AXIS, *spec)))

        return jax.tree.map(copies, tree, specs)


@dataclass(frozen=True)
class DiLoCo(Local):
    """H inner steps; Δ = mean over replicas of θ_global − θ_i; θ_global ← outer(θ_global, Δ); θ_i ← θ_global.

    Inner optimizer states stay with their replicas. A last round of fewer steps is exchanged like the others. With
    H = 1, SGD inside and outside (rate 1, no momentum) it is synchronous SGD.
    """

    def programs(self) -> dict[str, Callable]:
        inner = {"inner": self.inner} if self.interval > 1 else {}
        return inner | {"inner+exchange": self.inner_and_exchange}

    def program_at(self, step: int, last: int) -> str:
        return "inner+exchange" if (step + 1) % self.interval == 0 or step + 1 == last else "inner"

    def inner(self, state: State, batch_KRBT: Batch) -> tuple[State, dict[str, jax.Array]]:
        inner_R, metrics = self.inner_steps(state.strategy["replicas"], batch_KRBT)
        metrics = self.report(state.step, state.params, metrics)
        return State(
            state.step + 1, state.params, state.opt_state, {"replicas": inner_R}, state.guard, state.codec
        ), metrics

    def inner_and_exchange(self, state: State, batch_KRBT: Batch) -> tuple[State, dict[str, jax.Array]]:
        state, metrics = self.inner(state, batch_KRBT)
        inner_R = state.strategy["replicas"]
        delta_R = jax.tree.map(lambda ours, theirs_R: ours - theirs_R, state.params, inner_R["params"])
        finite = self.all_finite(delta_R)
        mean, codec = self.exchange.mean(delta_R, state.codec, state.step)

        def applied() -> tuple:
            updates, opt_state = self.outer.update(mean, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            return params, opt_state, codec, self.spread(params, self.specs)

        def kept() -> tuple:
            return state.params, state.opt_state, state.codec, inner_R["params"]

        params, opt_state, codec, params_R = lax.cond(finite, applied, kept)
        counters = self.guard.update(state.guard, optax.tree.norm(mean), finite)
        strategy = {"replicas": inner_R | {"params": params_R}}
        return State(state.step, params, opt_state, strategy, counters, codec), metrics


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
        mean, new_codec, inner_R, during = self._exchange_meanwhile(
            state.step, delta_R, codec, inner_R, part(K - self.overlap, K)
        )
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
        return after, self.report(state.step, after.params, metrics)

    def _exchange_meanwhile(self, step: jax.Array, delta_R: Any, codec: Any, inner_R: Any, batch_KRBT: Batch) -> tuple:
        """The exchange during these inner steps: the first hop during the first half, the second during the rest."""
        exchanges = {"own": (self.exchange, {"blocks": delta_R["blocks"]})}
        if "rest" in codec:
            exchanges["rest"] = (self.rest, _rest(delta_R))
        K = batch_KRBT["tokens"].shape[0]
        if not K or self.exchange.replicas == 1:
            done = {name: exchange.mean(tree, codec[name], step) for name, (exchange, tree) in exchanges.items()}
            inner_R, metrics = (inner_R, None) if not K else self.inner_steps(inner_R, batch_KRBT)
        else:
            half = -(-K // 2)
            part = lambda a, b: jax.tree.map(lambda x: x[a:b], batch_KRBT)
            flights: Any = {
                name: exchange.start(tree, codec[name], step) for name, (exchange, tree) in exchanges.items()
            }
            inner_R, metrics = self.inner_steps(inner_R, part(0, half))
            flights, inner_R = lax.optimization_barrier((flights, inner_R))
            done = {name: exchanges[name][0].finish(flight, own, step) for name, (flight, own) in flights.items()}
            if half < K:
                inner_R, more = self.inner_steps(inner_R, part(half, K))
                metrics = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), metrics, more)
                done, inner_R = lax.optimization_barrier((done, inner_R))
        means = {name: mean for found, _ in done.values() for name, mean in found.items()}
        return means, {name: new for name, (_, new) in done.items()}, inner_R, metrics

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

"""Every program of the engine, compiled before the first request: afterwards nothing compiles.

A *lane* holds requests whose prompt and answer fit its length S; its state has a row for each of n slots, and n is a
*rung* of a ladder. A prompt goes through the layers one at a time in its bucket of T positions, so one program serves
all layers (another one those without experts before others).

n rows, S positions kept, T positions of a prompt, L layers, G key/value heads, K head size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from model.config import ModelConfig
from parallel.layout.rules import RULES, shards
from serving import forward, sampling, weights

OVER = RULES["batch"]  # slots
ROWS, KEPT = P(OVER), P(OVER, "tensor")  # how [n, …] and [n, G, S, K] are cut
SMALLEST_BUCKET = 16
SCORED = 64  # positions of a prompt, whose logits are held at a time

State = dict[str, Any]  # {"layers": L × (keys, values) [n, G, S, K], "rows": {name: [n, …]}}


def bucket(size: int, length: int) -> int:
    """Positions of the program that reads so many of a prompt, in a lane of this length."""
    return min(max(SMALLEST_BUCKET, 1 << (size - 1).bit_length()), length)


def buckets(length: int) -> list[int]:
    return sorted({bucket(size, length) for size in (*(1 << i for i in range((length - 1).bit_length())), length)})


class Programs:
    """rungs: numbers of slots, smallest first; lengths: of the lanes, shortest first. given: the weights, or what is
    known of them (weights.abstract)."""

    def __init__(
        self, c: ModelConfig, mesh: Mesh, dtype: Any, given: Any, rungs: Sequence[int], lengths: Sequence[int]
    ):
        self.c, self.mesh, self.dtype, self.rungs, self.lengths = c, mesh, dtype, tuple(rungs), tuple(lengths)
        self._weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), given)
        self._specs = weights.specs(c)
        self._vocab = given["embed"].shape[0]
        self.first = c.moe.dense_layers if c.moe else 0  # layers that are not as those after them
        self._found: dict[tuple, Any] = {}

    def __getitem__(self, key: tuple) -> Any:
        return self._found[key]

    def compile(self, options: dict[str, Any], tell: Callable[[float], None] = lambda share: None) -> None:
        """options: XLA's. tell(share): after each program, how much is done; one that holds all layers takes as much
        time as so many others."""
        todo, done = list(self.lowerings().items()), 0
        takes = lambda key: self.c.depth if key[0] == "decode" else 1
        compile_one = lambda item: (item[0], item[1]().compile(compiler_options=options))
        with ThreadPoolExecutor(2) as pool:
            for key, program in pool.map(compile_one, todo):
                self._found[key] = program
                done += takes(key)
                tell(done / sum(takes(key) for key, _ in todo))

    def lowerings(self) -> dict[tuple, Callable[[], Any]]:
        """{name and sizes: lowers it}. The largest first: one thread would end with it alone."""
        pairs = [(n, length) for length in self.lengths for n in self.rungs]
        found = {("decode", n, length): partial(self._decode, n, length) for n, length in pairs}
        sizes = sorted({size for length in self.lengths for size in buckets(length)})
        for size in sizes:
            found |= {(name, size): partial(getattr(self, f"_{name}"), size) for name in ("read", "layer", "score")}
            found |= {("first", size): partial(self._layer, size, 0)} if self.first else {}
        for n, length in pairs:
            found |= {("init", n, length): partial(self._init, n, length)}
            found |= {("insert", n, length, size): partial(self._insert, n, length, size) for size in buckets(length)}
        for a, b in zip(self.rungs, self.rungs[1:], strict=False):
            for n, m in ((a, b), (b, a)):
                found |= {("resize", n, m, length): partial(self._resize, n, m, length) for length in self.lengths}
        return found | {("admit", n): partial(self._admit, n) for n in self.rungs}

    # ── shapes ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _array(self, shape: tuple[int, ...], dtype: Any, spec: P) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec))

    def _cache(self, n: int, length: int) -> Any:
        return self._array((n, self.c.num_kv_heads, length, self.c.head_dim), self.dtype, KEPT)

    @property
    def row(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What is known of a slot besides its keys and values."""
        dtypes = sampling.FIELDS | {"token": jnp.int32, "position": jnp.int32, "wants": jnp.bool}
        found = {name: jax.ShapeDtypeStruct((), dtype) for name, dtype in dtypes.items()}
        return found | {"seen": jax.ShapeDtypeStruct((self._vocab,), jnp.bool)}

    def _rows(self, n: int) -> dict[str, Any]:
        return {name: self._array((n, *x.shape), x.dtype, ROWS) for name, x in self.row.items()}

    def state(self, n: int, length: int) -> State:
        """What a lane's state is like."""
        cache = self._cache(n, length)
        return {"layers": [(cache, cache) for _ in range(self.c.depth)], "rows": self._rows(n)}

    def _on_devices(self, f: Callable, in_specs: Any, out_specs: Any, donate: tuple[int, ...] = ()) -> Any:
        mapped = jax.shard_map(f, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)
        return jax.jit(mapped, donate_argnums=donate)

    def _ends(self, tree: Any) -> Any:
        return {name: x for name, x in tree.items() if name != "layers"}

    # ── one token for every slot ─────────────────────────────────────────────────────────────────────────────────────

    def _decode(self, n: int, length: int) -> Any:
        """(weights, state) -> (state, {token [n], logprob [n], top_ids, top_logprobs [n, MOST_TOP]})."""
        c = self.c

        def decode(w: Any, state: State) -> tuple[State, dict[str, jax.Array]]:
            rows, layers = state["rows"], []
            at_N = jnp.minimum(rows["position"], length - 1)  # a free slot's goes on
            x_ND, tables = forward.embedded(c, w, rows["token"], at_N), forward.rope(c, at_N)
            for layer, (keys, values) in zip(w["layers"], state["layers"], strict=True):
                x_ND, kept = forward.block(c, layer, x_ND, tables, forward.cached(c, keys, values, at_N), apart=True)
                layers.append(kept)
            logits_NV = forward.logits(c, w, x_ND)
            token_N = sampling.next_tokens(logits_NV, rows["seen"], at_N + 1, rows)
            about = lax.cond(
                jnp.any(rows["wants"]),
                lambda: sampling.logprobs(logits_NV, token_N),
                lambda: jax.tree.map(
                    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(sampling.logprobs, logits_NV, token_N)
                ),
            )
            seen_NV = rows["seen"].at[jnp.arange(token_N.shape[0]), token_N].set(True)
            rows = rows | {"token": token_N, "position": at_N + 1, "seen": seen_NV}
            return {"layers": layers, "rows": rows}, dict(zip(ANSWER, (token_N, *about), strict=True))

        specs = self._state_specs()
        f = self._on_devices(decode, (self._specs, specs), (specs, dict.fromkeys(ANSWER, ROWS)), donate=(1,))
        return f.lower(self._weights, self.state(n, length))

    def _state_specs(self) -> Any:
        return {"layers": [(KEPT, KEPT)] * self.c.depth, "rows": dict.fromkeys(self.row, ROWS)}

    # ── a prompt ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _read(self, size: int) -> Any:
        """(weights but the layers', tokens [T]) -> x [T, D]."""
        read = lambda w, tokens_T: forward.embedded(self.c, w, tokens_T, jnp.arange(size))
        f = self._on_devices(read, (self._ends(self._specs), P()), P())
        return f.lower(self._ends(self._weights), self._array((size,), jnp.int32, P()))

    def _x(self, size: int) -> Any:
        return self._array((size, self.c.model_dim), self.dtype, P())

    def _layer(self, size: int, number: int = -1) -> Any:
        """(weights of a layer, x [T, D]) -> (x, (keys, values) [G, T, K]). number: of one that is like it."""

        def layer(w: Any, x_TD: jax.Array) -> tuple[jax.Array, Any]:
            return forward.block(self.c, w, x_TD, forward.rope(self.c, jnp.arange(size)), forward.causal(self.c))

        out_specs = (P(), (P("tensor"), P("tensor")))
        f = self._on_devices(layer, (self._specs["layers"][number], P()), out_specs, donate=(1,))
        return f.lower(self._weights["layers"][number], self._x(size))

    def _score(self, size: int) -> Any:
        """(weights but the layers', x [T, D], ids that follow [T]) -> as sampling.logprobs, [T, …]."""

        def score(w: Any, x_TD: jax.Array, next_T: jax.Array) -> Any:
            rows = min(SCORED, size)
            some = lambda x: sampling.logprobs(forward.logits(self.c, w, x[0]), x[1])
            parts = jax.tree.map(lambda x: x.reshape(-1, rows, *x.shape[1:]), (x_TD, next_T))
            return jax.tree.map(lambda x: x.reshape(size, *x.shape[2:]), lax.map(some, parts))

        f = self._on_devices(score, (self._ends(self._specs), P(), P()), P())
        return f.lower(self._ends(self._weights), self._x(size), self._array((size,), jnp.int32, P()))

    # ── slots ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _init(self, n: int, length: int) -> Any:
        """() -> a state of free slots."""
        state = self.state(n, length)
        zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
        return jax.jit(zeros, out_shardings=jax.tree.map(lambda x: x.sharding, state)).lower()

    def _insert(self, n: int, length: int, size: int) -> Any:
        """((keys, values) of a layer [n, G, S, K], those of a prompt [G, T, K], slot) -> the former."""

        def insert(cache: Any, kept: Any, slot: jax.Array) -> Any:
            own = n // shards(OVER, self.mesh.shape)
            row = slot - lax.axis_index(OVER) * own
            row = jnp.where((row >= 0) & (row < own), row, own)  # of another device: dropped
            return jax.tree.map(lambda x, new: x.at[row, :, :size].set(new, mode="drop"), cache, kept)

        cache, new = self._cache(n, length), (self.c.num_kv_heads, size, self.c.head_dim)
        kept = self._array(new, self.dtype, P("tensor"))
        specs = ((KEPT, KEPT), (P("tensor"), P("tensor")), P())
        f = self._on_devices(insert, specs, (KEPT, KEPT), donate=(0,))
        return f.lower((cache, cache), (kept, kept), self._array((), jnp.int32, P()))

    def _admit(self, n: int) -> Any:
        """(rows, slot, {name: value of that slot}) -> rows."""
        rows = self._rows(n)
        value = {name: self._array(x.shape, x.dtype, P()) for name, x in self.row.items()}
        admit = lambda rows, slot, new: jax.tree.map(lambda x, y: x.at[slot].set(y), rows, new)
        shardings = jax.tree.map(lambda x: x.sharding, rows)
        f = jax.jit(admit, donate_argnums=0, out_shardings=shardings)
        return f.lower(rows, self._array((), jnp.int32, P()), value)

    def _resize(self, n: int, m: int, length: int) -> Any:
        """(state of n slots, which of them each of m is [m]) -> state of m."""
        shardings = jax.tree.map(lambda x: x.sharding, self.state(m, length))
        resize = lambda state, of: jax.tree.map(lambda x: jnp.take(x, of, axis=0), state)
        f = jax.jit(resize, out_shardings=shardings)
        return f.lower(self.state(n, length), self._array((m,), jnp.int32, P()))

    def put(self, x: Any) -> jax.Array:
        """A value of the host on every device."""
        return jax.device_put(np.asarray(x), NamedSharding(self.mesh, P()))


ANSWER = ("token", "logprob", "top_ids", "top_logprobs")

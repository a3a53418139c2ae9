"""What is compiled, ahead of time: the steps of training, a fresh state, and the programs beside the step (evaluation,
sample, digest). None of these needs more memory than the step, and only a digest's sums cross `replica`."""

import functools
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from model import decode
from parallel.layout import placement
from parallel.layout.axes import SLOW
from parallel.layout.rules import Constrain
from parallel.strategies import beside as with_frozen
from recipes.build import Parts, Phase, begin_state
from recipes.language import Language
from runtime.digest import digest_all, named_arrays


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


# ── training ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def shardings_of(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.sharding, tree)


def compile_steps(parts: Parts, options: Any = None) -> dict[str, Any]:
    """The strategies' programs, compiled ahead of time: calling them can never compile again. options: XLA's."""
    compile_one = lambda lower: lower().compile(compiler_options=parts.xla_options | (options or {}))
    with ThreadPoolExecutor(2) as pool:
        found = {name: pool.submit(compile_one, lower) for name, lower in steps(parts).items()}
        return {name: future.result() for name, future in found.items()}


def steps(parts: Parts) -> dict[str, Callable[[], Any]]:
    """{program of a strategy: lowers it}."""

    def lower(phase: Phase, f: Callable) -> Any:
        outputs = (shardings_of(phase.state), None)
        return jax.jit(f, donate_argnums=0, out_shardings=outputs).lower(phase.state, phase.batch, *parts.frozen)

    return {
        phase.prefix + name: functools.partial(lower, phase, f)
        for phase in parts.phases
        for name, f in calls(parts, phase).items()
    }


def calls(parts: Parts, phase: Phase) -> dict[str, Callable]:
    """{program of its strategy: f(state, batch, *frozen)}."""
    if not parts.frozen:
        return phase.strategy.programs()
    return with_frozen.programs(phase.strategy, parts.task.whole)


def takes_over(config: Any, parts: Parts) -> bool:
    """Whether the first state has the parameters of another run, and not a base beside it."""
    return bool(config.init.workdir) and not parts.frozen


def compile_init(parts: Parts, given: bool = False) -> Any:
    """It runs once: level 1 compiles sooner, to the same bits."""
    return lower_init(parts, given).compile(compiler_options=parts.xla_options | {"xla_backend_optimization_level": 1})


def lower_init(parts: Parts, given: bool = False) -> Any:
    """seed (uint32), or with `given` the parameters, which it takes over -> a fresh state. Every array is born in its
    shards: no host ever holds a whole one."""
    first = parts.phases[0]

    def init(seed_or_params: Any) -> Any:
        key = jax.random.key(0 if given else seed_or_params)
        params = seed_or_params if given else parts.task.init(key)
        return begin_state(first.strategy, parts.task, params, key)

    argument = first.state.params if given else jax.ShapeDtypeStruct((), np.uint32)
    donated = (0,) if given else ()
    return jax.jit(init, out_shardings=shardings_of(first.state), donate_argnums=donated).lower(argument)


# ── beside the step ───────────────────────────────────────────────────────────────────────────────────────────────────


def compile_beside(parts: Parts, sample: Any, options: Any = None) -> dict[str, Any]:
    """{evaluation, sample, digest (of the whole state)}. sample: the config's group; without tokens, none. options:
    XLA's."""
    options = parts.xla_options | (options or {})
    return {name: lower().compile(compiler_options=options) for name, lower in beside(parts, sample).items()}


def beside(parts: Parts, sample: Any) -> dict[str, Callable[[], Any]]:
    """{program beside the step: lowers it}."""
    found: dict[str, Callable[[], Any]] = {"evaluation": functools.partial(lower_evaluation, parts)}
    if sample.tokens:
        found["sample"] = functools.partial(lower_sample, parts, sample.tokens, sample.temperature)
    return found | {"digest": lambda: digest_all.lower(named_arrays(parts.state))}


class Later:
    """The programs beside the step by name, compiled on another thread once training runs. The first one that is asked
    for waits for all, and `tell` hears of them then: before the first evaluation."""

    def __init__(self, parts: Parts, sample: Any, threads: Executor, tell: Callable[[dict[str, Any]], None]):
        self._compile = functools.cache(lambda: threads.submit(compile_beside, parts, sample))
        self._tell, self._programs = tell, None

    def start(self) -> None:
        """Call when the first step is done: earlier, it would be delayed."""
        self._compile()

    def __getitem__(self, name: str) -> Any:
        if self._programs is None:
            programs = self._compile().result()
            self._tell(programs)
            self._programs = programs
        return self._programs[name]


# ── evaluation ────────────────────────────────────────────────────────────────────────────────────────────────────────


def compile_evaluation(parts: Parts, options: Any = None) -> Any:
    return lower_evaluation(parts).compile(compiler_options=parts.xla_options | (options or {}))


def lower_evaluation(parts: Parts) -> Any:
    """(params, batch[D, B, …] of `parts.eval_batch`'s shape) -> the sums that the task's loss gives."""
    evaluate = jax.jit(placement.evaluation(parts.task.eval_loss, parts.mesh))
    return evaluate.lower(parts.whole, parts.eval_batch)


@dataclass(frozen=True)
class Evaluation:
    """Of what is held out. NaN: of no weight, or no byte."""

    loss: float  # per weight; of text in nats per token
    bits_per_byte: float | None  # None: it is no text
    nats_of_a_bit: float | None  # nats per token where a byte has one bit: from bits per byte to the loss's unit
    further: Mapping[str, float]  # per weight, what else the loss sums up

    def values(self) -> dict[str, float]:
        bits = {} if self.bits_per_byte is None else {"bits_per_byte": self.bits_per_byte}
        return {"loss": self.loss} | bits | dict(self.further)


NOT_EVALUATED = Evaluation(math.nan, math.nan, math.nan, {})


class Evaluator:
    """params -> Evaluation of what is held out, the same batches each time."""

    def __init__(
        self,
        parts: Parts,
        host_batches: list[dict[str, np.ndarray]],
        num_bytes: float | None,
        program: Callable[[], Any],
    ):
        """num_bytes: of the text in these batches; None: it is no text. program: gives the compiled evaluation; asked
        at the first evaluation, so that nobody waits for it before."""
        groups, size = parts.mesh.shape[SLOW], rows_of_evaluation(parts)
        self._program, self._bytes = program, num_bytes
        self._weight = sum(float(parts.task.weight(batch)) for batch in host_batches)
        micro = [
            {name: x[first : first + size] for name, x in batch.items()}
            for batch in host_batches
            for first in range(0, len(next(iter(batch.values()))), size)
        ]
        self._batches = [placement.place_eval(parts.mesh, groups, size, b) for b in micro]

    def __call__(self, params: Any) -> Evaluation:
        found = jax.device_get([self._program()(params, batch) for batch in self._batches])
        loss, _, *further = jax.tree.map(lambda *x: float(np.sum(x, dtype=np.float64)), *found)
        means = {name: _ratio(x, self._weight) for sums in further for name, x in sums.items()}
        if self._bytes is None:
            return Evaluation(_ratio(loss, self._weight), None, None, means)
        bits = math.log(2) * self._bytes
        return Evaluation(_ratio(loss, self._weight), _ratio(loss, bits), _ratio(bits, self._weight), means)


def rows_of_evaluation(parts: Parts) -> int:
    """Of a batch of the compiled evaluation."""
    return math.prod(next(iter(parts.eval_batch.values())).shape[:2])


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan


# ── the sample ────────────────────────────────────────────────────────────────────────────────────────────────────────


def compile_sample(parts: Parts, num_tokens: int, temperature: float, options: Any = None) -> Any:
    return lower_sample(parts, num_tokens, temperature).compile(compiler_options=options)


def lower_sample(parts: Parts, num_tokens: int, temperature: float) -> Any:
    """(params, window [T], length, seed) -> ids [D, B, N], the same text from each shard of the batch in each of D
    replica groups: no device waits for another group's, and nothing need be sent to tell it."""
    assert isinstance(parts.task, Language)  # no other writes text
    one = decode.generator(parts.task.plain, Constrain(parts.mesh), num_tokens, temperature)
    groups, _, seq_len = parts.eval_batch["tokens"].shape
    by_group = NamedSharding(parts.mesh, P(SLOW))

    def generate(params: Any, window_T: jax.Array, length: jax.Array, seed: jax.Array) -> jax.Array:
        window_DT = jax.lax.with_sharding_constraint(jnp.broadcast_to(window_T, (groups, seq_len)), by_group)
        return jax.vmap(one, in_axes=(None, 0, None, None), spmd_axis_name=SLOW)(params, window_DT, length, seed)

    scalar = lambda dtype: jax.ShapeDtypeStruct((), dtype)
    arguments = jax.ShapeDtypeStruct((seq_len,), np.int32), scalar(np.int32), scalar(np.uint32)
    own = NamedSharding(parts.mesh, placement.EVAL)
    return jax.jit(generate, out_shardings=own).lower(parts.whole, *arguments)


def sample_text(program: Any, params: Any, prompt_P: np.ndarray, seq_len: int, seed: int, tokenizer: Any) -> str:
    """A sample from the trained model. Called by every process: the parameters stay in their shards."""
    window_T = np.zeros((seq_len,), np.int32)
    window_T[: len(prompt_P)] = prompt_P
    ids_DBN = program(params, window_T, np.int32(len(prompt_P)), np.uint32(seed))
    new_N = np.asarray(ids_DBN.addressable_shards[0].data)[0, 0]
    return tokenizer.decode(np.concatenate([prompt_P, new_N]))

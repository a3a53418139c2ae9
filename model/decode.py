"""Sampling text from the training model: a plain loop without a key/value cache, for the sample at a run's end."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from model.transformer import Params, Transformer


def sample(
    model: Transformer,
    params: Params,
    prompt_P: np.ndarray,
    num_tokens: int,
    seq_len: int,
    temperature: float,
    seed: int,
) -> np.ndarray:
    """Token ids [P + num_tokens]: the prompt and what follows it. temperature 0: the likeliest token each time.

    Params stay in their shards; the window slides when the text grows past seq_len.
    """
    assert len(prompt_P), "sampling starts from at least one token"
    prompt_P = prompt_P[-seq_len + 1 :]
    window_T = np.zeros((seq_len,), np.int32)
    window_T[: len(prompt_P)] = prompt_P
    everywhere = NamedSharding(jax.tree.leaves(params)[0].sharding.mesh, PartitionSpec())
    generate = jax.jit(partial(_generate, model, num_tokens, temperature), out_shardings=everywhere)
    new_N = generate(params, window_T, np.int32(len(prompt_P)), np.uint32(seed))
    return np.concatenate([prompt_P, np.asarray(new_N)])


def _generate(model: Transformer, num_tokens: int, temperature: float, params, window_T, length, seed) -> jax.Array:
    seq_len, key = window_T.shape[0], jax.random.key(seed)

    def step(carry, index):
        window_T, length = carry
        logits_TV = model.logits(params, window_T[None], lambda x, axes: x)[0]
        logits_V = logits_TV[length - 1]
        if temperature:
            token = jax.random.categorical(jax.random.fold_in(key, index), logits_V / temperature)
        else:
            token = jnp.argmax(logits_V)
        token = token.astype(jnp.int32)
        full = length == seq_len
        window_T = jnp.where(full, jnp.roll(window_T, -1), window_T)
        length = jnp.where(full, length, length + 1)
        return (window_T.at[length - 1].set(token), length), token

    return jax.lax.scan(step, (window_T, length), jnp.arange(num_tokens))[1]

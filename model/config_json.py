"""What a config.json of Hugging Face's says of a model, in our keys, read and written."""

from collections.abc import Mapping
from typing import Any

from model.families import FAMILIES, Family


def read_config(theirs: Mapping[str, Any]) -> tuple[Family, dict[str, Any]]:
    """(the family, our keys of model.*, data.vocab_size and data.seq_len). Raises ValueError for what we have not."""
    kind = theirs.get("model_type")
    if kind not in FAMILIES:
        raise ValueError(f"model_type={kind!r} is of no family that is known: {', '.join(FAMILIES)}")
    if quantised := theirs.get("quantization_config"):
        method = quantised.get("quant_method", "unknown")
        raise ValueError(f"the weights are quantised ({method}): take the float32, bfloat16 or float16 ones")
    family = FAMILIES[kind]
    keys = (_of_gpt2 if kind == "gpt2" else _of_llama)(theirs) | (_of_experts(theirs) if family.is_routed else {})
    return family, {f"model.{key}": value for key, value in family.fixed.items()} | keys


def _of_gpt2(c: Mapping[str, Any]) -> dict[str, Any]:
    _expect(c, activation_function="gelu_new", scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False)
    D, H = c["n_embd"], c["n_head"]
    return {
        "model.num_layers": c["n_layer"], "model.model_dim": D, "model.num_heads": H, "model.num_kv_heads": H,
        "model.head_dim": D // H, "model.mlp_dim": c.get("n_inner") or 4 * D,
        "model.norm_eps": c.get("layer_norm_epsilon", 1e-5), "model.tie_embeddings": c.get("tie_word_embeddings", True),
        "data.vocab_size": c["vocab_size"], "data.seq_len": c.get("n_positions", 1024),
    }  # fmt: skip


def _of_llama(c: Mapping[str, Any]) -> dict[str, Any]:
    _expect(c, hidden_act="silu", mlp_bias=False)
    if c["model_type"] in ("llama", "mistral", "qwen3", "qwen3_moe"):
        _expect(c, attention_bias=False)
    D, H = c["hidden_size"], c["num_attention_heads"]
    rope = _rope(c)
    return {
        "model.num_layers": c["num_hidden_layers"], "model.model_dim": D, "model.num_heads": H,
        "model.num_kv_heads": c.get("num_key_value_heads") or H, "model.head_dim": c.get("head_dim") or D // H,
        "model.mlp_dim": c["intermediate_size"], "model.norm_eps": c.get("rms_norm_eps", 1e-6),
        "model.tie_embeddings": c.get("tie_word_embeddings", False), "model.sliding_window": _window(c),
        "data.vocab_size": c["vocab_size"], "data.seq_len": c["max_position_embeddings"], **rope,
    }  # fmt: skip


def _of_experts(c: Mapping[str, Any]) -> dict[str, Any]:
    is_mixtral = c["model_type"] == "mixtral"
    chosen = c.get("num_experts_per_tok", 2 if is_mixtral else 8)
    # Theirs is of all layers with experts at once, and worth k where the load is even; ours is each one's, and worth 1.
    layers = c["num_hidden_layers"] - len(c.get("mlp_only_layers") or [])
    weight = c.get("router_aux_loss_coef", 0.001) * chosen / layers
    keys = {"model.experts_per_token": chosen, "moe.balance_weight": weight}
    if is_mixtral:
        return keys | {"model.experts": c.get("num_local_experts", 8)}
    dense = c["num_hidden_layers"] - layers
    _expect(c, decoder_sparse_step=1, mlp_only_layers=[*range(dense)])  # the first ones, if any
    keys |= {"model.num_layers": layers, "model.dense_layers": dense}
    keys |= {"model.dense_dim": c["intermediate_size"]} if dense else {}
    normalise = {"model.normalise_gates": c.get("norm_topk_prob", False)}
    count = c["num_experts"] if "num_experts" in c else c["num_local_experts"]  # as transformers 4 has it, and 5
    return keys | normalise | {"model.experts": count, "model.mlp_dim": c["moe_intermediate_size"]}


def _expect(c: Mapping[str, Any], **wanted: Any) -> None:
    for key, value in wanted.items():
        if c.get(key, value) != value:
            raise ValueError(f"{key}={c[key]!r}: only {value!r} is known for {c['model_type']}")


def _window(c: Mapping[str, Any]) -> int:
    """Qwen's configs have a window that is not used."""
    used = c.get("use_sliding_window", c["model_type"] in ("mistral", "mixtral"))
    if not (window := c.get("sliding_window")) or not used:
        return 0
    kinds = set(c.get("layer_types") or [])
    if len(kinds) > 1 or c.get("max_window_layers") not in (None, 0):
        raise ValueError("a sliding window of some layers only is not known: layer_types, max_window_layers")
    return window


def _rope(c: Mapping[str, Any]) -> dict[str, Any]:
    """As transformers 4 writes it and as 5 does; where a file has both they must agree."""
    new, old = c.get("rope_parameters") or {}, dict(c.get("rope_scaling") or {})
    if "rope_theta" in c:
        old["rope_theta"] = c["rope_theta"]
    differ = [key for key in new.keys() & old.keys() if new[key] != old[key]]
    if differ:
        key = sorted(differ)[0]
        raise ValueError(f"rope_parameters says {key}={new[key]!r}, and the older keys {old[key]!r}: which is right?")
    found = old | new
    kind = found.get("rope_type", found.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"rope_type={kind!r} is not known: default and llama3 are")
    keys = {"model.rope_theta": float(found.get("rope_theta", 10_000.0))}
    if kind == "llama3":
        named = {key: float(found[key]) for key in ("factor", "low_freq_factor", "high_freq_factor")}
        named["original_max_len"] = found["original_max_position_embeddings"]
        keys |= {f"model.rope_scaling.{key}": value for key, value in named.items()}
    return keys


def write_config(family: Family, c: Any, dtype: str) -> dict[str, Any]:
    """Their config.json of a config of ours, in the spelling of transformers 4 and in that of 5."""
    m, data = c.model, c.data
    shared = {
        "architectures": [family.architecture], "model_type": family.name, "vocab_size": data.vocab_size,
        "tie_word_embeddings": m.tie_embeddings, "initializer_range": m.init_std, "dtype": dtype, "torch_dtype": dtype,
        "use_cache": True,
    }  # fmt: skip
    if family.name == "gpt2":
        return shared | {
            "n_embd": m.model_dim, "n_layer": m.num_layers, "n_head": m.num_heads, "n_inner": m.mlp_dim,
            "n_positions": data.seq_len, "layer_norm_epsilon": m.norm_eps, "activation_function": "gelu_new",
        }  # fmt: skip
    scaling = {}
    if m.rope_scaling.factor:
        s = m.rope_scaling
        scaling = {"rope_type": "llama3", "factor": s.factor, "low_freq_factor": s.low_freq_factor}
        scaling |= {"high_freq_factor": s.high_freq_factor, "original_max_position_embeddings": s.original_max_len}
    rope = {"rope_type": "default"} | scaling | {"rope_theta": m.rope_theta}
    window = {"sliding_window": m.sliding_window or None} if family.name != "llama" else {}
    if family.name.startswith("qwen") and m.sliding_window:
        window |= {"use_sliding_window": True, "max_window_layers": 0}
    return shared | window | _experts_of(family, c) | {
        "hidden_size": m.model_dim, "num_hidden_layers": m.dense_layers + m.num_layers,
        "num_attention_heads": m.num_heads, "num_key_value_heads": m.num_kv_heads, "head_dim": m.head_dim,
        "intermediate_size": m.dense_dim if m.dense_layers else m.mlp_dim,
        "rms_norm_eps": m.norm_eps, "hidden_act": "silu", "max_position_embeddings": data.seq_len,
        "rope_theta": m.rope_theta, "rope_scaling": scaling or None, "rope_parameters": rope,
    }  # fmt: skip


def _experts_of(family: Family, c: Any) -> dict[str, Any]:
    if not family.is_routed:
        return {}
    m = c.model
    weight = c.moe.balance_weight * m.num_layers / m.experts_per_token if m.balance == "loss" else 0.0
    keys = {"num_experts_per_tok": m.experts_per_token, "router_aux_loss_coef": weight, "num_local_experts": m.experts}
    if family.name == "mixtral":
        return keys
    sizes = {"num_experts": m.experts, "moe_intermediate_size": m.mlp_dim, "norm_topk_prob": m.normalise_gates}
    return keys | sizes | {"decoder_sparse_step": 1, "mlp_only_layers": [*range(m.dense_layers)]}

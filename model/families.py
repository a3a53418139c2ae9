"""Whose weights are whose: for each family of Hugging Face's a table of their names, our paths and how both lie, read
in both directions, and what their config.json says of a model in our keys.

A row's letters are dimensions: D model, H query heads, G key/value heads, K head size, F feed-forward, V vocabulary,
P positions, 3 the three that GPT-2 keeps in one array. Theirs are written with those that are one dimension there in
parentheses: "(H K) D" is [H·K, D]. What is sizes and names here is code nowhere else. Experts, of which they have an
array each, are one more stack of ours: [layers, experts, …].
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

BLOCKS = "blocks/"  # begins our paths of arrays that are stacked over layers
EXPERT = "{expert}"  # in their names, the number of one


@dataclass(frozen=True)
class Row:
    """ours: a path of the parameters. theirs: their name, {layer} and {expert} the numbers. our_dims: of what has one
    name there. part: which of several that are one array there."""

    ours: str
    theirs: str
    our_dims: str
    their_dims: str
    part: int | None = None

    @property
    def stacks(self) -> int:
        """Leading dimensions of ours that count arrays of theirs."""
        return self.ours.startswith(BLOCKS) + (EXPERT in self.theirs)

    def places(self, layers: int = 0, experts: int = 0) -> dict[str, tuple[int, ...]]:
        """{their name: where it is in ours}."""
        counts = (layers, experts)[: self.stacks]
        named = lambda place: dict(zip(("layer", "expert"), place, strict=False))
        return {self.theirs.format(**named(place)): place for place in np.ndindex(*counts)}

    def their_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(math.prod(sizes[letter] for letter in group) for group in _groups(self.their_dims))

    def our_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Of one of theirs."""
        return tuple(sizes[letter] for letter in self.our_dims.split())

    @property
    def first(self) -> str:
        """The dimension that is outermost in their files: a range of it is a range of bytes."""
        return _groups(self.their_dims)[0][0]

    def to_ours(self, theirs: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """One of their arrays, or that part of it whose size of `first` is in sizes. A view."""
        letters = [letter for group in _groups(self.their_dims) for letter in group]
        x = theirs.reshape([sizes[letter] for letter in letters])
        if self.part is not None:
            x = x.take(self.part, axis=letters.index("3"))
            letters.remove("3")
        return x.transpose([letters.index(letter) for letter in self.our_dims.split()])

    def to_theirs(self, ours: np.ndarray, sizes: Mapping[str, int]) -> np.ndarray:
        """The inverse; of an array of several parts with ours stacked in front [3, …]."""
        letters = (["3"] if self.part is not None else []) + self.our_dims.split()
        wanted = [letter for group in _groups(self.their_dims) for letter in group]
        return ours.transpose([letters.index(letter) for letter in wanted]).reshape(self.their_shape(sizes))


def _groups(dims: str) -> list[list[str]]:
    return [found.strip("()").split() for found in re.findall(r"\([^)]*\)|\S+", dims)]


# ── the tables ────────────────────────────────────────────────────────────────────────────────────────────────────────

_LAYER = "model.layers.{layer}."
_ENDS = (
    Row("embed", "model.embed_tokens.weight", "V D", "V D"),
    Row("final_norm/scale", "model.norm.weight", "D", "D"),
    Row("head", "lm_head.weight", "D V", "V D"),  # not of a model whose embedding is its head
)
_SHARED = (
    *_ENDS,
    Row("blocks/attention_norm/scale", f"{_LAYER}input_layernorm.weight", "D", "D"),
    Row("blocks/attention/q", f"{_LAYER}self_attn.q_proj.weight", "D H K", "(H K) D"),
    Row("blocks/attention/k", f"{_LAYER}self_attn.k_proj.weight", "D G K", "(G K) D"),
    Row("blocks/attention/v", f"{_LAYER}self_attn.v_proj.weight", "D G K", "(G K) D"),
    Row("blocks/attention/out", f"{_LAYER}self_attn.o_proj.weight", "H K D", "D (H K)"),
    Row("blocks/mlp_norm/scale", f"{_LAYER}post_attention_layernorm.weight", "D", "D"),
)


def _swiglu(at: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    return (
        Row("blocks/mlp/gate", f"{_LAYER}{at}.{gate}.weight", "D F", "F D"),
        Row("blocks/mlp/up", f"{_LAYER}{at}.{up}.weight", "D F", "F D"),
        Row("blocks/mlp/down", f"{_LAYER}{at}.{down}.weight", "F D", "D F"),
    )


_PROJECTIONS = "gate_proj", "up_proj", "down_proj"
_LLAMA = _SHARED + _swiglu("mlp", *_PROJECTIONS)
_MIXTRAL = (
    *_SHARED,
    Row("blocks/mlp/router", f"{_LAYER}block_sparse_moe.gate.weight", "D E", "E D"),
    *_swiglu(f"block_sparse_moe.experts.{EXPERT}", "w1", "w3", "w2"),
)
_QWEN3_MOE = (
    *_SHARED,
    Row("blocks/mlp/router", f"{_LAYER}mlp.gate.weight", "D E", "E D"),
    *_swiglu(f"mlp.experts.{EXPERT}", *_PROJECTIONS),
)
_QKV_BIAS = (
    Row("blocks/attention/q_bias", f"{_LAYER}self_attn.q_proj.bias", "H K", "(H K)"),
    Row("blocks/attention/k_bias", f"{_LAYER}self_attn.k_proj.bias", "G K", "(G K)"),
    Row("blocks/attention/v_bias", f"{_LAYER}self_attn.v_proj.bias", "G K", "(G K)"),
)
_QK_NORM = (
    Row("blocks/attention/q_norm/scale", f"{_LAYER}self_attn.q_norm.weight", "K", "K"),
    Row("blocks/attention/k_norm/scale", f"{_LAYER}self_attn.k_norm.weight", "K", "K"),
)
_H = "transformer.h.{layer}."
_GPT2 = (  # whose linear maps lie as ours do, [in, out], q, k and v side by side
    Row("embed", "transformer.wte.weight", "V D", "V D"),
    Row("position", "transformer.wpe.weight", "P D", "P D"),
    Row("final_norm/scale", "transformer.ln_f.weight", "D", "D"),
    Row("final_norm/bias", "transformer.ln_f.bias", "D", "D"),
    Row("head", "lm_head.weight", "D V", "V D"),
    Row("blocks/attention_norm/scale", f"{_H}ln_1.weight", "D", "D"),
    Row("blocks/attention_norm/bias", f"{_H}ln_1.bias", "D", "D"),
    *(Row(f"blocks/attention/{x}", f"{_H}attn.c_attn.weight", "D H K", "D (3 H K)", i) for i, x in enumerate("qkv")),
    *(Row(f"blocks/attention/{x}_bias", f"{_H}attn.c_attn.bias", "H K", "(3 H K)", i) for i, x in enumerate("qkv")),
    Row("blocks/attention/out", f"{_H}attn.c_proj.weight", "H K D", "(H K) D"),
    Row("blocks/attention/out_bias", f"{_H}attn.c_proj.bias", "D", "D"),
    Row("blocks/mlp_norm/scale", f"{_H}ln_2.weight", "D", "D"),
    Row("blocks/mlp_norm/bias", f"{_H}ln_2.bias", "D", "D"),
    Row("blocks/mlp/up", f"{_H}mlp.c_fc.weight", "D F", "D F"),
    Row("blocks/mlp/up_bias", f"{_H}mlp.c_fc.bias", "F", "F"),
    Row("blocks/mlp/down", f"{_H}mlp.c_proj.weight", "F D", "F D"),
    Row("blocks/mlp/down_bias", f"{_H}mlp.c_proj.bias", "D", "D"),
)


@dataclass(frozen=True)
class Family:
    """name: their `model_type`. architecture: their class. rows: every weight that one may have. fixed: our keys
    that all of them share. buffers: names in old files of what is no weight."""

    name: str
    architecture: str
    rows: tuple[Row, ...]
    fixed: dict[str, Any]
    buffers: str = r"rotary_emb\.inv_freq$"
    prefix: str = ""  # of names, which some files leave out

    @property
    def is_routed(self) -> bool:
        """Whether it has experts."""
        return "experts" not in self.fixed

    def table(self, tied: bool) -> list[Row]:
        return [row for row in self.rows if not (tied and row.ours == "head")]


ROUTING = ("shared_experts", "router", "normalise_gates", "balance")  # our keys
_PLAIN = {"norm": "rms", "mlp": "swiglu", "position": "rope", "bias": "none", "qk_norm": False, "experts": 0}
_ROUTED = {key: x for key, x in _PLAIN.items() if key != "experts"} | {"shared_experts": 0, "router": "softmax"}
FAMILIES = {
    family.name: family
    for family in (
        Family("llama", "LlamaForCausalLM", _LLAMA, _PLAIN),
        Family("mistral", "MistralForCausalLM", _LLAMA, _PLAIN),
        Family("qwen2", "Qwen2ForCausalLM", _LLAMA + _QKV_BIAS, _PLAIN | {"bias": "qkv"}),
        Family("qwen3", "Qwen3ForCausalLM", _LLAMA + _QK_NORM, _PLAIN | {"qk_norm": True}),
        Family("mixtral", "MixtralForCausalLM", _MIXTRAL, _ROUTED | {"normalise_gates": True}),
        Family("qwen3_moe", "Qwen3MoeForCausalLM", _QWEN3_MOE + _QK_NORM, _ROUTED | {"qk_norm": True}),
        Family(
            "gpt2", "GPT2LMHeadModel", _GPT2,
            {"norm": "layer", "mlp": "gelu", "position": "learned", "bias": "all", "qk_norm": False, "experts": 0},
            buffers=r"\.attn\.(bias|masked_bias)$", prefix="transformer.",
        ),
    )
}  # fmt: skip


def sizes(model: Any, vocab_size: int, positions: int) -> dict[str, int]:
    """Of each letter. model: our keys."""
    return {
        "D": model.model_dim, "H": model.num_heads, "G": model.num_kv_heads, "K": model.head_dim, "F": model.mlp_dim,
        "V": vocab_size, "P": positions, "3": 3, "E": model.experts,
    }  # fmt: skip


def of(model: Any) -> Family:
    """The family that a model of ours belongs to. Raises ValueError where there is none."""
    fixed = lambda family: {key: model[key] for key in family.fixed}
    found = [family for family in FAMILIES.values() if fixed(family) == family.fixed]
    if model.experts:
        found = [family for family in found if family.is_routed and model.balance != "bias"]
    if model.sliding_window:
        found = [family for family in found if family.name == "mistral"] or [f for f in found if f.name != "gpt2"]
    if not found or (found[0].name == "gpt2" and model.num_heads != model.num_kv_heads):
        keys = FAMILIES["llama"].fixed | (dict.fromkeys(ROUTING) if model.experts else {})
        said = ", ".join(f"model.{key}={model[key]}" for key in keys)
        raise ValueError(f"no family of Hugging Face's has {said}: those that are known are {', '.join(FAMILIES)}")
    return found[0]


# ── config.json ───────────────────────────────────────────────────────────────────────────────────────────────────────


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
    # Theirs is of all layers at once, and worth k where the load is even; ours is each layer's, and worth 1.
    weight = c.get("router_aux_loss_coef", 0.001) * chosen / c["num_hidden_layers"]
    keys = {"model.experts_per_token": chosen, "moe.balance_weight": weight}
    if is_mixtral:
        return keys | {"model.experts": c.get("num_local_experts", 8)}
    _expect(c, decoder_sparse_step=1, mlp_only_layers=[])
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
        "hidden_size": m.model_dim, "num_hidden_layers": m.num_layers, "num_attention_heads": m.num_heads,
        "num_key_value_heads": m.num_kv_heads, "head_dim": m.head_dim, "intermediate_size": m.mlp_dim,
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
    return keys | sizes | {"decoder_sparse_step": 1, "mlp_only_layers": []}

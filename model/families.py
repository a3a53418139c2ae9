"""Whose weights are whose: for each family of Hugging Face's a table of their names, our paths and how both lie, read
in both directions. Their config.json is read and written in model/config_json.py.

A row's letters are dimensions: D model, H query heads, G key/value heads, K head size, F feed-forward, V vocabulary,
P positions, E experts, W the F of layers without them before those that have some, 3 the three that GPT-2 keeps in one
array. Theirs are written with those that are one dimension there in parentheses: "(H K) D" is [H·K, D]. What is sizes
and names here is code nowhere else. Experts, of which they have an array each, are one more stack of ours: [layers,
experts, …].
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

BLOCKS, FIRST = "blocks/", "first/"  # begin our paths of arrays that are stacked over layers; FIRST: those before
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
        return self.ours.startswith((BLOCKS, FIRST)) + (EXPERT in self.theirs)

    def places(self, model: Any) -> dict[str, tuple[int, ...]]:
        """{their name: where it is in ours}. model: our keys. They count all layers together."""
        layers, before = (model.dense_layers, 0) if self.is_first else (model.num_layers, model.dense_layers)
        counts = (layers, model.experts)[: self.stacks]
        number = lambda layer=0, expert=0: {"layer": before + layer, "expert": expert}
        return {self.theirs.format(**number(*place)): place for place in np.ndindex(*counts)}

    @property
    def is_first(self) -> bool:
        """Of layers without experts, before those that have some."""
        return self.ours.startswith(FIRST)

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
_DENSE_FIRST = tuple(
    replace(row, ours=row.ours.replace(BLOCKS, FIRST), **{
        dims: getattr(row, dims).replace("F", "W") for dims in ("our_dims", "their_dims")
    })
    for row in (*_SHARED, *_QK_NORM, *_swiglu("mlp", *_PROJECTIONS)) if row.ours.startswith(BLOCKS)
)  # fmt: skip
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

    def table(self, model: Any) -> list[Row]:
        """Of what a model has. model: our keys."""
        without = {"head"} if model.tie_embeddings else set()
        return [row for row in self.rows if row.ours not in without and (model.dense_layers or not row.is_first)]


ROUTING = ("shared_experts", "router", "normalise_gates", "balance", "dense_layers")  # our keys
_RMS = {"norm": "rms", "mlp": "swiglu", "position": "rope", "bias": "none", "qk_norm": False}
_NO_EXPERTS = {"experts": 0, "dense_layers": 0}
_PLAIN = _RMS | _NO_EXPERTS
_ROUTED = _RMS | {"shared_experts": 0, "router": "softmax"}
FAMILIES = {
    family.name: family
    for family in (
        Family("llama", "LlamaForCausalLM", _LLAMA, _PLAIN),
        Family("mistral", "MistralForCausalLM", _LLAMA, _PLAIN),
        Family("qwen2", "Qwen2ForCausalLM", _LLAMA + _QKV_BIAS, _PLAIN | {"bias": "qkv"}),
        Family("qwen3", "Qwen3ForCausalLM", _LLAMA + _QK_NORM, _PLAIN | {"qk_norm": True}),
        Family("mixtral", "MixtralForCausalLM", _MIXTRAL, _ROUTED | {"normalise_gates": True, "dense_layers": 0}),
        Family("qwen3_moe", "Qwen3MoeForCausalLM", _QWEN3_MOE + _QK_NORM + _DENSE_FIRST, _ROUTED | {"qk_norm": True}),
        Family(
            "gpt2", "GPT2LMHeadModel", _GPT2,
            {"norm": "layer", "mlp": "gelu", "position": "learned", "bias": "all", "qk_norm": False} | _NO_EXPERTS,
            buffers=r"\.attn\.(bias|masked_bias)$", prefix="transformer.",
        ),
    )
}  # fmt: skip


def sizes(model: Any, vocab_size: int, positions: int) -> dict[str, int]:
    """Of each letter. model: our keys."""
    return {
        "D": model.model_dim, "H": model.num_heads, "G": model.num_kv_heads, "K": model.head_dim, "F": model.mlp_dim,
        "V": vocab_size, "P": positions, "3": 3, "E": model.experts,
        "W": model.dense_dim if model.dense_layers else 0,
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

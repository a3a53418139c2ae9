"""A .gguf file as a folder of Hugging Face's would be: its config, its tokenizer, its weights by their names there.
Quantised weights are read as the numbers that they stand for, in float32.

llama.cpp's names. Of architecture `llama` its converter interleaves the halves of each head of q and k, for another
form of rotary embedding; that is undone here.
"""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}  # fmt: skip
LAYER = {
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
INTERLEAVED = {"attn_q.weight": "num_attention_heads", "attn_k.weight": "num_key_value_heads"}
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # tokenizer.ggml.token_type
DIGITS = {"type": "Digits", "individual_digits": True}
SPLITS = {"gpt-2": [], "smollm": [DIGITS]}  # tokenizer.ggml.pre: what comes before the split into words


@dataclass(frozen=True)
class Entry:
    """An array in a file; as model/safetensors.py has them."""

    path: Path
    tensor: Any
    heads: int = 0  # whose halves are interleaved
    dtype: np.dtype = np.dtype(np.float32)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(n) for n in reversed(self.tensor.shape))

    def read(self, rows: tuple[int, int] | None = None) -> np.ndarray:
        """It, or these of its first dimension."""
        from gguf.quants import dequantize

        first, last = rows or (0, self.shape[0])
        x = dequantize(self.tensor.data[first:last], self.tensor.tensor_type).astype(np.float32)
        if not self.heads:
            return x
        half = self.shape[0] // self.heads // 2
        return x.reshape(-1, half, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def open_file(path: Path) -> tuple[dict[str, Any], dict[str, Entry], dict[str, str]]:
    """(their config.json, {their name: where it lies}, {name of a small file: its text}). Raises ValueError for what is
    no such file, or one that we have not; ImportError without the package that reads it."""
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ImportError("reading a .gguf needs the package gguf: `pip install -r requirements-deploy.txt`") from error
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise ValueError(f"{path} is no .gguf file, or a damaged one ({error})") from error
    said = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {str(tensor.name): tensor for tensor in reader.tensors}
    kind = said.get("general.architecture")
    if kind not in ("llama", "qwen2", "qwen3"):
        raise ValueError(f"{path} is of the architecture {kind!r}: llama, qwen2 and qwen3 are known")
    if "rope_freqs.weight" in tensors:
        raise ValueError(
            f"{path} has rope_freqs.weight, a scaling of rotary embedding that is not known: take safetensors"
        )
    config = _config(kind, said, tied="output.weight" not in tensors)
    interleaved = {name: config[key] for name, key in INTERLEAVED.items()} if kind == "llama" else {}
    entries = {}
    for name, tensor in tensors.items():
        heads = interleaved.get(name.partition(".")[2].partition(".")[2], 0)
        entries[_their_name(name)] = Entry(path, tensor, heads)
    small = {"config.json": json.dumps(config, indent=2), "tokenizer.json": json.dumps(_tokenizer(path, said))}
    return config, entries, small | {"tokenizer_config.json": json.dumps(_tokenizer_config(said), indent=2)}


def _config(kind: str, said: dict[str, Any], tied: bool) -> dict[str, Any]:
    of = partial(_of, said, kind)
    heads, D, theta = of("attention.head_count"), of("embedding_length"), f"{kind}.rope.freq_base"
    width = said.get(f"{kind}.attention.key_length", D // heads)
    return {
        "model_type": kind, "hidden_size": D, "num_hidden_layers": of("block_count"), "num_attention_heads": heads,
        "num_key_value_heads": said.get(f"{kind}.attention.head_count_kv", heads),
        "head_dim": width, "intermediate_size": of("feed_forward_length"),
        "rms_norm_eps": float(f"{of('attention.layer_norm_rms_epsilon'):.6g}"),  # written as a float32
        "rope_theta": said.get(theta, 10_000.0), "max_position_embeddings": of("context_length"),
        "vocab_size": len(said["tokenizer.ggml.tokens"]), "tie_word_embeddings": tied,
        "bos_token_id": said.get("tokenizer.ggml.bos_token_id"), "eos_token_id": said["tokenizer.ggml.eos_token_id"],
    }  # fmt: skip


def _of(said: dict[str, Any], kind: str, key: str) -> Any:
    if f"{kind}.{key}" not in said:
        raise ValueError(f"the .gguf says nothing of {kind}.{key}")
    return said[f"{kind}.{key}"]


def _their_name(name: str) -> str:
    """Hugging Face's; one that is not known stays, and is refused as a weight of no model."""
    ends = {ours: theirs for theirs, ours in NAMES.items()}
    block, _, rest = name.partition(".")
    layer, _, rest = rest.partition(".")
    part, _, kind = rest.rpartition(".")
    known = {ours: theirs for theirs, ours in LAYER.items()}
    if block == "blk" and part in known:
        return f"model.layers.{layer}.{known[part]}.{kind}"
    return ends.get(name, name)


def _tokenizer(path: Path, said: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json. Raises ValueError for another kind than byte-level BPE, or one whose words are split in a way
    that we have not."""
    kind, split = said.get("tokenizer.ggml.model"), said.get("tokenizer.ggml.pre", "gpt-2")
    if kind != "gpt2" or split not in SPLITS:
        known = ", ".join(SPLITS)
        raise ValueError(
            f"{path} has a tokenizer of the kind {kind!r}, words split as {split!r}: gpt2 is known, with {known}"
        )
    tokens, types = said["tokenizer.ggml.tokens"], said["tokenizer.ggml.token_type"]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": tokens[i], "special": kind == CONTROL} | flags
        for i, kind in enumerate(types)
        if kind in (CONTROL, USER_DEFINED)
    ]
    bytes_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {
        "type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False, "byte_fallback": False,
        "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": [pair.split(" ") for pair in said["tokenizer.ggml.merges"]],
    }  # fmt: skip
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*SPLITS[split], bytes_level]}, "post_processor": None,
        "decoder": bytes_level, "model": model,
    }  # fmt: skip


def _tokenizer_config(said: dict[str, Any]) -> dict[str, Any]:
    tokens, found = said["tokenizer.ggml.tokens"], {"tokenizer_class": "PreTrainedTokenizerFast"}
    for ours, theirs in (
        ("bos", "bos_token"),
        ("eos", "eos_token"),
        ("padding", "pad_token"),
        ("unknown", "unk_token"),
    ):
        if (index := said.get(f"tokenizer.ggml.{ours}_token_id")) is not None:
            found[theirs] = tokens[index]
    if template := said.get("tokenizer.chat_template"):
        found["chat_template"] = template
    return found

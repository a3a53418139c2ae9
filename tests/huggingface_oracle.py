"""Hugging Face's own models, for tests/test_weights.py, in a Python that has transformers and torch (CPU):

python tests/huggingface_oracle.py make FOLDER     a tiny random model of each family, its logits and all its gradients
python tests/huggingface_oracle.py read FOLDER     what transformers makes of a folder: logits and greedy tokens
python tests/huggingface_oracle.py chat FOLDER     ids of the conversations in its chats.json, but for the last message
python tests/huggingface_oracle.py peft FOLDER     what PEFT makes of an adapter, beside the base that it names: logits
"""

import json
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

V, T, GREEDY = 320, 24, 200
SHARED = {
    "vocab_size": V, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "eos_token_id": 0, "bos_token_id": 0,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SHARED, rope_parameters=LLAMA3),
    "llama-tied": lambda: transformers.LlamaConfig(**SHARED, tie_word_embeddings=True),
    "mistral": lambda: transformers.MistralConfig(**SHARED, sliding_window=7),
    "qwen2": lambda: transformers.Qwen2Config(**SHARED, sliding_window=9, use_sliding_window=False),
    "qwen3": lambda: transformers.Qwen3Config(**SHARED, head_dim=16),
    "mixtral": lambda: transformers.MixtralConfig(**SHARED, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SHARED, head_dim=16, moe_intermediate_size=40, num_experts=6, num_experts_per_tok=3, norm_topk_prob=False
    ),
    "qwen3_moe-dense": lambda: transformers.Qwen3MoeConfig(
        **SHARED, head_dim=16, moe_intermediate_size=40, num_experts=6, num_experts_per_tok=3, mlp_only_layers=[0]
    ),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=V, n_embd=48, n_layer=3, n_head=6, n_positions=256, eos_token_id=0, bos_token_id=0,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0,
    ),
}  # fmt: skip


_QWEN3 = ("mlp", "gate_proj", "up_proj", "down_proj")
EXPERTS = {  # names in their files: of a layer's experts; of gate, up and down
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen3_moe": _QWEN3, "qwen3_moe-dense": _QWEN3,
}  # fmt: skip


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(1, V, (2, T + 1))


def make(folder: Path) -> None:
    for name, config in CONFIGS.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config(), attn_implementation="eager").float().eval()
        with torch.no_grad():  # as drawn, biases are 0 and norms 1: nothing would show that they are read
            for weight in model.parameters():
                weight.add_(0.1 * torch.randn_like(weight))
        model.save_pretrained(folder / name)
        if name in EXPERTS:
            model.save_pretrained(folder / f"{name}-fused", save_original_format=False)
        words = {"<eos>": 0} | {chr(0x100 + i): i for i in range(1, V)}
        tokenizer = Tokenizer(models.BPE(words, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<eos>")
        fast.save_pretrained(folder / name)
        ids = torch.from_numpy(tokens())
        logits = model(ids[:, :-1]).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        grads = {key: weight.grad.numpy() for key, weight in model.named_parameters()}
        grads = dict(pair for key, x in grads.items() for pair in as_in_files(name, key, x))
        np.savez(folder / f"{name}.npz", logits=logits.detach().numpy(), **{f"grad/{k}": x for k, x in grads.items()})


def as_in_files(model: str, name: str, x: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Of experts, which are one array in memory, the names and arrays of their files."""
    if model not in EXPERTS or ".mlp." not in name:
        yield name, x
        return
    layer, _, what = name.partition(".mlp.")
    where, gate, up, down = EXPERTS[model]
    if "_proj.weight" in what:  # of a layer without any
        yield name, x
    if what == "gate.weight":
        yield f"{layer}.{where}.gate.weight", x
    for number, own in enumerate(x if what.startswith("experts.") else ()):
        parts = zip((gate, up), np.split(own, 2), strict=True) if "gate_up" in what else [(down, own)]
        for part, weight in parts:
            yield f"{layer}.{where}.experts.{number}.{part}.weight", weight


def read(folder: Path) -> None:
    """Ends with 1 where transformers warns."""
    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        transformers.AutoTokenizer.from_pretrained(folder)
    heard += [str(w.message) for w in caught]
    ids = torch.from_numpy(tokens())
    with torch.no_grad():
        logits = model(ids[:, :-1]).logits.numpy()
        how = {"max_new_tokens": GREEDY, "min_new_tokens": GREEDY, "do_sample": False, "pad_token_id": 0}
        greedy = model.generate(ids[:1, :8], attention_mask=torch.ones_like(ids[:1, :8]), **how).numpy()
    np.savez(folder.with_suffix(".read.npz"), logits=logits, greedy=greedy)
    sys.exit("\n".join(heard) or 0)


def chat(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    talks = json.loads((folder / "chats.json").read_text())
    found = [tokenizer.apply_chat_template(x[:-1], add_generation_prompt=True, return_dict=False) for x in talks]
    (folder / "chats.ids.json").write_text(json.dumps(found))


def peft(folder: Path) -> None:
    """Also those of the base alone. Ends with 1 where PEFT warns: it does of weights that it does not find."""
    from peft import PeftConfig, PeftModel

    base = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    ids = torch.from_numpy(tokens())[:, :-1]
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        alone = model(ids).logits.numpy()
        logits = PeftModel.from_pretrained(model, str(folder)).eval()(ids).logits.numpy()
    np.savez(folder.with_suffix(".peft.npz"), logits=logits, base=alone)
    # What one library says of the other's age is no matter of ours.
    sys.exit("\n".join(said for w in caught if "deprecated" not in (said := str(w.message))) or 0)


if __name__ == "__main__":
    {"make": make, "read": read, "chat": chat, "peft": peft}[sys.argv[1]](Path(sys.argv[2]))

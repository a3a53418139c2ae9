"""Weights of Hugging Face's: every row of every table goes both ways, what is imported is what lies in the files, an
export is what was imported to the bit, and logits and gradients are those of transformers."""

import hashlib
import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import slackline as sl
from model import config_json, families, huggingface
from model import safetensors as files
from model.families import FAMILIES
from parallel.layout.rules import Constrain
from runtime import config as configuration
from runtime import verify
from runtime.config import UsageError
from runtime.digest import named_arrays

SIZES = {"D": 8, "H": 6, "G": 2, "K": 4, "F": 10, "V": 12, "P": 5, "3": 3, "E": 7, "W": 9}
ROWS = [(family, row) for family in FAMILIES.values() for row in family.rows]
LLAMA = {
    "model_type": "llama", "vocab_size": 320, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "rope_theta": 500.0, "tie_word_embeddings": False,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "vocab_size": 320, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
TOKENIZER = {
    "version": "1.0", "added_tokens": [{"id": 0, "content": "<eos>", "special": True, "single_word": False, "lstrip":
    False, "rstrip": False, "normalized": False}], "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False,
    "trim_offsets": True, "use_regex": True}, "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets":
    True, "use_regex": True}, "normalizer": None, "post_processor": None, "truncation": None, "padding": None, "model":
    {"type": "BPE", "vocab": {"<eos>": 0, "a": 1, "b": 2}, "merges": [], "dropout": None, "unk_token": None},
}  # fmt: skip


@pytest.mark.parametrize(("family", "row"), ROWS, ids=lambda x: getattr(x, "name", getattr(x, "ours", None)))
def test_every_row_is_a_bijection(family, row):
    theirs = np.arange(np.prod(row.their_shape(SIZES))).reshape(row.their_shape(SIZES))
    parts = [r for r in family.rows if r.theirs == row.theirs] if row.part is not None else [row]
    ours = [r.to_ours(theirs, SIZES) for r in parts]
    assert [x.shape for x in ours] == [r.our_shape(SIZES) for r in parts]
    assert sorted(np.concatenate([x.ravel() for x in ours])) == list(range(theirs.size))
    back = row.to_theirs(np.stack(ours) if row.part is not None else ours[0], SIZES)
    np.testing.assert_array_equal(back, theirs)


def test_no_two_rows_have_one_weight():
    for family in FAMILIES.values():
        assert len({row.ours for row in family.rows}) == len(family.rows)
        model = SimpleNamespace(dense_layers=2, num_layers=3, experts=2)
        alone = [name for row in family.rows if row.part is None for name in row.places(model)]
        assert len(set(alone)) == len(alone)


def write(folder: Path, config: dict[str, Any] = LLAMA, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """A folder of theirs, by their library; its weights."""
    family, keys = config_json.read_config(config)
    model = SimpleNamespace(**{key.removeprefix("model."): x for key, x in keys.items() if key.startswith("model.")})
    sizes = families.sizes(model, config["vocab_size"], keys["data.seq_len"])
    draw = np.random.default_rng(0)
    weights = {
        name: draw.normal(size=row.their_shape(sizes)).astype(dtype)
        for row in family.table(model)
        for name in row.places(model)
    }
    folder.mkdir(exist_ok=True)
    safetensors.numpy.save_file(weights, folder / files.SINGLE, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    return weights


def command(*arguments: Any) -> None:
    assert huggingface.main([str(a) for a in arguments]) == 0


@pytest.mark.parametrize(
    "dtype",
    [ml_dtypes.bfloat16, *(pytest.param(t, marks=pytest.mark.slow) for t in (np.float32, np.float16))],
    ids=lambda t: np.dtype(t).name,
)
def test_what_is_imported_is_what_lies_in_the_file_and_an_export_gives_it_back(dtype, tmp_path):
    theirs = write(tmp_path / "in", dtype=dtype)
    command("import", tmp_path / "in", tmp_path / "run")
    run = sl.open(tmp_path / "run", mesh={"fsdp": 2, "tensor": 2}, data={"batch_size": 8})
    found = {name: np.asarray(x) for name, x in named_arrays(run.params).items()}
    D, H, K, layers = 16, 4, 4, 2
    expected = {
        "embed": theirs["model.embed_tokens.weight"],
        "head": theirs["lm_head.weight"].T,
        "blocks/attention/q": [
            theirs[f"model.layers.{i}.self_attn.q_proj.weight"].T.reshape(D, H, K) for i in range(layers)
        ],
        "blocks/attention/out": [
            theirs[f"model.layers.{i}.self_attn.o_proj.weight"].T.reshape(H, K, D) for i in range(layers)
        ],
        "blocks/mlp/down": [theirs[f"model.layers.{i}.mlp.down_proj.weight"].T for i in range(layers)],
        "blocks/mlp_norm/scale": [theirs[f"model.layers.{i}.post_attention_layernorm.weight"] for i in range(layers)],
    }
    for name, x in expected.items():
        np.testing.assert_array_equal(found[name], np.asarray(x).astype(np.float32), name)
    command("export", tmp_path / "run", tmp_path / "out")
    back = safetensors.numpy.load_file(tmp_path / "out" / files.SINGLE)
    assert back.keys() == theirs.keys()
    assert all(back[name].dtype == x.dtype and np.array_equal(back[name], x) for name, x in theirs.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 500.0}
    assert config["dtype"] == config["torch_dtype"] == np.dtype(dtype).name and config["rope_theta"] == 500.0
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (tmp_path / "in" / "tokenizer.json").read_bytes()


def test_old_files_of_gpt2_have_shorter_names_and_buffers(tmp_path):
    theirs = write(tmp_path / "in", GPT2)
    short = {name.removeprefix("transformer."): x for name, x in theirs.items()}
    buffers = {f"h.{i}.attn.{name}": np.ones((8, 8), np.float32) for i in range(2) for name in ("bias", "masked_bias")}
    safetensors.numpy.save_file(short | buffers, tmp_path / "in" / files.SINGLE)
    command("import", tmp_path / "in", tmp_path / "run")
    found = sl.open(tmp_path / "run").params
    fused = theirs["transformer.h.1.attn.c_attn.weight"]
    for i, name in enumerate("qkv"):
        part = fused[:, 16 * i : 16 * i + 16].reshape(16, 4, 4)
        np.testing.assert_array_equal(found["blocks"]["attention"][name][1], part)
    command("export", tmp_path / "run", tmp_path / "out")
    back = safetensors.numpy.load_file(tmp_path / "out" / files.SINGLE)
    assert back.keys() == theirs.keys() and all(np.array_equal(back[name], x) for name, x in theirs.items())


def write_gguf(path: Path, weights: dict[str, np.ndarray], spoil: Any = lambda writer: None) -> None:
    """As llama.cpp's converter does, with LLAMA's sizes; the embedding quantised to 8 bits."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(24)
    writer.add_context_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(500.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<eos>", "a", "b", "ab", *(chr(0x200 + i) for i in range(316))])
    writer.add_token_types([3] + [1] * 319)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    spoil(writer)
    for name, x in weights.items():
        short = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
        stem, _, kind = name.rpartition(".")
        parts = dict(zip(
            "input_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
            "post_attention_layernorm mlp.gate_proj mlp.up_proj mlp.down_proj".split(),
            "attn_norm attn_q attn_k attn_v attn_output ffn_norm ffn_gate ffn_up ffn_down".split(), strict=True,
        ))  # fmt: skip
        if stem not in short:
            layer, _, part = stem.removeprefix("model.layers.").partition(".")
            short[stem] = f"blk.{layer}.{parts[part]}"
            if part in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}[part]
                x = x.reshape(heads, 2, x.shape[0] // heads // 2, x.shape[1]).swapaxes(1, 2).reshape(x.shape)
        if stem == "model.embed_tokens":
            kind8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{short[stem]}.{kind}", gguf.quants.quantize(x, kind8), raw_dtype=kind8)
        else:
            writer.add_tensor(f"{short[stem]}.{kind}", np.ascontiguousarray(x))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


WIDE = LLAMA | {"hidden_size": 32, "head_dim": 8}  # blocks of 32 numbers are quantised together


def test_a_gguf_file_holds_what_a_folder_does(tmp_path):
    weights = write(tmp_path / "in", WIDE)
    write_gguf(tmp_path / "in.gguf", weights)
    command("import", tmp_path / "in", tmp_path / "a")
    command("import", tmp_path / "in.gguf", tmp_path / "b")
    a, b = (sl.open(tmp_path / name) for name in "ab")
    assert a.config.model == b.config.model
    params, other = named_arrays(a.params), named_arrays(b.params)
    embed, coarse = np.asarray(params.pop("embed")), np.asarray(other.pop("embed"))
    assert all(np.array_equal(x, other[name]) for name, x in params.items())
    assert 0 < np.abs(embed - coarse).max() <= np.abs(embed).max() / 127
    assert b.tokenizer.eos == 0 and b.tokenizer.vocab_size == 320


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda writer: writer.add_tokenizer_pre("llama-bpe"), "words split as 'llama-bpe': gpt2 is known, with"),
        (lambda writer: writer.add_tensor("rope_freqs.weight", np.ones(4, np.float32)), "has rope_freqs.weight"),
        (
            lambda writer: writer.add_tensor("blk.0.other.weight", np.ones(4, np.float32)),
            "no weights of llama",
        ),
    ],
    ids=["words", "scaled rotation", "unknown weight"],
)
def test_a_gguf_file_that_we_have_not_is_refused(spoil, said, tmp_path):
    weights = write(tmp_path / "in", WIDE)
    write_gguf(tmp_path / "in.gguf", weights, spoil)
    with pytest.raises(UsageError, match=said):
        huggingface.main(["import", str(tmp_path / "in.gguf"), str(tmp_path / "run")])


@pytest.mark.slow
def test_verify_shows_the_files_that_a_run_came_from(tmp_path, capsys):
    write(tmp_path / "in")
    command("import", tmp_path / "in", tmp_path / "run")
    digest = hashlib.sha256((tmp_path / "in" / files.SINGLE).read_bytes()).hexdigest()
    assert verify.main(["verify", str(tmp_path / "run")]) == 0
    assert f"step 0: intact\n  from {files.SINGLE}, SHA-256 {digest}\n" in capsys.readouterr().out


@pytest.mark.slow
def test_an_import_is_what_another_run_begins_with(tmp_path):
    theirs = write(tmp_path / "in")
    command("import", tmp_path / "in", tmp_path / "base")
    (tmp_path / "text.txt").write_text("ab\n" * 4000)
    changes = {"init.workdir": str(tmp_path / "base"), "data.path": str(tmp_path / "text.txt"), "optimizer.lr": 0.0}
    changes |= {"data.seq_len": 32, "data.batch_size": 2, "optimizer.warmup_steps": 0}
    run = sl.fit("tiny", steps=1, workdir=tmp_path / "run", **changes)
    np.testing.assert_array_equal(run.params["embed"], theirs["model.embed_tokens.weight"])
    assert run.config.model.rope_theta == 500.0
    command("export", tmp_path / "run", tmp_path / "out", "--dtype=bfloat16")
    back = safetensors.numpy.load_file(tmp_path / "out" / files.SINGLE)
    assert np.array_equal(back["lm_head.weight"], theirs["lm_head.weight"].astype(ml_dtypes.bfloat16))


@pytest.mark.slow
def test_several_files_go_both_ways(tmp_path, monkeypatch):
    theirs = write(tmp_path / "in")
    command("import", tmp_path / "in", tmp_path / "run")
    monkeypatch.setattr("recipes.exported.SHARD", 5000)
    command("export", tmp_path / "run", tmp_path / "out")
    index = json.loads((tmp_path / "out" / files.INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 3
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in theirs.values())
    command("import", tmp_path / "out", tmp_path / "again")
    a, b = (sl.open(tmp_path / name).params for name in ("run", "again"))
    assert jax.tree.all(jax.tree.map(np.array_equal, a, b))


# ── bad input ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def change(name: str, value: Any):
    return lambda folder: (folder / "config.json").write_text(json.dumps(LLAMA | {name: value}))


def rewrite(edit) -> Any:
    def apply(folder: Path) -> None:
        weights = safetensors.numpy.load_file(folder / files.SINGLE)
        edit(weights)
        safetensors.numpy.save_file(weights, folder / files.SINGLE)

    return apply


def header_lies(folder: Path) -> None:
    content = (folder / files.SINGLE).read_bytes()
    (folder / files.SINGLE).write_bytes(content[:-100])


def long_header(folder: Path) -> None:
    (folder / files.SINGLE).write_bytes((10**12).to_bytes(8, "little") + b"{}")


BAD = {
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        "has no config.json: is it the folder of a model, or a .gguf file?",
    ),
    "no weights": (lambda folder: (folder / files.SINGLE).unlink(), "holds no .safetensors"),
    "another family": (change("model_type", "gemma3"), "is of no family that is known: llama, mistral, qwen2"),
    "quantised": (change("quantization_config", {"quant_method": "gptq"}), "the weights are quantised (gptq)"),
    "yarn": (change("rope_scaling", {"rope_type": "yarn"}), "rope_type='yarn' is not known: default and llama3 are"),
    "two thetas": (change("rope_parameters", {"rope_theta": 1.0}), "says rope_theta=1.0, and the older keys 500.0"),
    "biases": (change("attention_bias", True), "attention_bias=True: only False is known for llama"),
    "broken json": (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
    "missing": (rewrite(lambda w: w.pop("model.norm.weight")), "1 are missing: model.norm.weight"),
    "extra": (rewrite(lambda w: w.update(x=np.zeros(3))), "is F64, and F32, F16, BF16 are what can be read"),
    "unknown": (rewrite(lambda w: w.update(x=np.zeros(3, np.float32))), "1 are no weights of llama: x"),
    "shape": (
        rewrite(lambda w: w.update({"model.norm.weight": np.zeros(3, np.float32)})),
        "1 have another shape: model.norm.weight [3] instead of [16]",
    ),
    "nan": (rewrite(lambda w: w["lm_head.weight"].fill(np.nan)), "lm_head.weight is not finite everywhere"),
    "short file": (header_lies, "bytes, and its header speaks of"),
    "long header": (long_header, "is no safetensors file: its header would have 1,000,000,000,000 bytes of 10"),
    "both": (lambda folder: (folder / files.INDEX).write_text("{}"), "which are the weights? Move the other away"),
    "tokenizer": (
        change("vocab_size", 2),
        "has ids up to 2, and the embedding 2 rows: it is another model's tokenizer",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_refused_in_a_sentence_and_nothing_is_left(name, tmp_path):
    write(tmp_path / "in", LLAMA | ({"vocab_size": 2} if name == "tokenizer" else {}))
    spoil, said = BAD[name]
    spoil(tmp_path / "in")
    with pytest.raises(UsageError) as error:
        huggingface.main(["import", str(tmp_path / "in"), str(tmp_path / "run")])
    assert said in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_a_run_of_an_earlier_release_has_the_biases_that_it_had(tmp_path):
    for before, now in {True: "all", False: "none"}.items():
        config = configuration.base_values() | {"model.bias": before}
        (tmp_path / "config.json").write_text(json.dumps(configuration.nested(config).to_dict()))
        assert configuration.read_json(tmp_path).model.bias == now


def test_a_target_that_is_there_is_refused(tmp_path):
    with pytest.raises(UsageError, match="is not empty: name a folder that there is not"):
        huggingface.main(["import", str(tmp_path), str(Path(__file__).parent)])


@pytest.mark.parametrize("edit", [{"data_offsets": [4, 68]}, {"shape": [99]}, {"data_offsets": [0]}, {"dtype": "I8"}])
def test_a_header_that_lies_is_refused_before_anything_is_read(edit, tmp_path):
    path = tmp_path / files.SINGLE
    safetensors.numpy.save_file({"x": np.zeros(16, np.float32)}, path)
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    said = json.loads(content[8 : 8 + length])
    said["x"] |= edit
    text = json.dumps(said).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(ValueError, match="cannot be|damaged header|what can be read"):
        files.header(path)


MIXTRAL = LLAMA | {
    "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 3, "router_aux_loss_coef": 0.02,
    "sliding_window": 16,
}  # fmt: skip


def test_a_window_and_a_balance_of_mixtral_come_in_and_go_out(tmp_path):
    """Its balancing loss is of all layers at once, and worth k where the load is even."""
    theirs = write(tmp_path / "in", MIXTRAL)
    command("import", tmp_path / "in", tmp_path / "run")
    config = configuration.read_json(tmp_path / "run")
    assert config.model.sliding_window == 16 and config.model.experts == 4
    assert config.moe.balance_weight == pytest.approx(0.02 * 3 / 2)
    command("export", tmp_path / "run", tmp_path / "out")
    back = safetensors.numpy.load_file(tmp_path / "out" / files.SINGLE)
    assert back.keys() == theirs.keys() and all(np.array_equal(back[name], x) for name, x in theirs.items())
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: said[key] for key in MIXTRAL if key not in ("model_type", "router_aux_loss_coef")} == {
        key: x for key, x in MIXTRAL.items() if key not in ("model_type", "router_aux_loss_coef")
    }
    assert said["model_type"] == "mixtral" and said["router_aux_loss_coef"] == pytest.approx(0.02)


QWEN3_MOE = LLAMA | {
    "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
    "norm_topk_prob": True, "num_hidden_layers": 3, "mlp_only_layers": [0], "router_aux_loss_coef": 0.02,
}  # fmt: skip


def test_layers_without_experts_come_in_before_the_others_and_go_out(tmp_path):
    theirs = write(tmp_path / "in", QWEN3_MOE)
    assert theirs["model.layers.0.mlp.gate_proj.weight"].shape == (24, 16)
    assert "model.layers.2.mlp.experts.3.gate_proj.weight" in theirs and "model.layers.0.mlp.gate.weight" not in theirs
    command("import", tmp_path / "in", tmp_path / "run")
    model = configuration.read_json(tmp_path / "run").model
    assert (model.dense_layers, model.dense_dim, model.num_layers, model.mlp_dim) == (1, 24, 2, 12)
    assert configuration.read_json(tmp_path / "run").moe.balance_weight == pytest.approx(0.02 * 2 / 2)
    command("export", tmp_path / "run", tmp_path / "out")
    back = safetensors.numpy.load_file(tmp_path / "out" / files.SINGLE)
    assert back.keys() == theirs.keys() and all(np.array_equal(back[name], x) for name, x in theirs.items())
    said = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {key: said[key] for key in QWEN3_MOE if key != "router_aux_loss_coef"} == {
        key: x for key, x in QWEN3_MOE.items() if key != "router_aux_loss_coef"
    }


@pytest.mark.parametrize("layers", [[1], [0, 2]])
def test_layers_without_experts_among_the_others_are_refused(layers):
    with pytest.raises(ValueError, match="mlp_only_layers"):
        config_json.read_config(QWEN3_MOE | {"mlp_only_layers": layers})


# ── transformers ──────────────────────────────────────────────────────────────────────────────────────────────────────

ROUTED = ["mixtral", "qwen3_moe", "qwen3_moe-dense"]
MESHES = {"one device": {}, "fsdp 2, tensor 2": {"fsdp": 2, "tensor": 2}}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Any]:
    """(folder of models, what runs the oracle)."""
    python = os.environ.get("SLACKLINE_TORCH_PYTHON")
    if not python or subprocess.run([python, "-c", "import torch, transformers"], capture_output=True).returncode:
        pytest.skip("SLACKLINE_TORCH_PYTHON names no Python with torch and transformers: make prove makes one")
    folder = tmp_path_factory.mktemp("models")

    def oracle(what: str, where: Path, packages: str = "") -> None:
        """packages: a folder of others than this Python's own."""
        command = [python, str(Path(__file__).with_name("huggingface_oracle.py")), what, str(where)]
        environment = os.environ | ({"PYTHONPATH": packages} if packages else {})
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr

    oracle.python = python
    oracle("make", folder)
    return folder, oracle


@pytest.mark.slow
@pytest.mark.prove
@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "gpt2", *ROUTED])
def test_logits_and_gradients_are_those_of_transformers(name, made, tmp_path):
    folder, oracle = made
    wanted = np.load(folder / f"{name}.npz")
    command("import", folder / name, tmp_path / "run")
    ids = np.random.default_rng(0).integers(1, 320, (2, 25))
    batch = {"tokens": ids[:, :-1], "targets": ids[:, 1:], "mask": np.ones((2, 24), np.float32)}
    data = {"batch_size": 4, "seq_len": 24 if name != "gpt2" else 256}
    for sizes in [*MESHES.values(), *([{"expert": 2, "tensor": 2}] if name in ROUTED else [])]:
        run = sl.open(tmp_path / "run", mesh=sizes, data=data, moe={"rows": "worst"} if name in ROUTED else {})
        model, mesh = run.parts.task.model, run.parts.mesh
        arrays = {key: jnp.asarray(x) for key, x in batch.items()}

        def logits(params, tokens, model=model, mesh=mesh):
            x_BTD, head_DV, _ = model.features(params, tokens, Constrain(mesh))
            return x_BTD @ head_DV

        def loss(params, arrays, model=run.parts.task.plain, mesh=mesh):
            total, weight, *_ = model.loss(params, arrays, Constrain(mesh))
            return total / weight

        found = np.asarray(jax.jit(logits)(run.params, arrays["tokens"]))
        assert np.abs(found - wanted["logits"]).max() <= 1e-4 * np.abs(wanted["logits"]).max()
        gradients = named_arrays(jax.jit(jax.grad(loss))(run.params, arrays))
        check_gradients(gradients, wanted, run.config)
    command("export", tmp_path / "run", tmp_path / "out")
    oracle("read", folder / name)
    before = np.load((folder / name).with_suffix(".read.npz"))
    for packages in ("", *filter(None, [os.environ.get("SLACKLINE_TRANSFORMERS4")])):
        oracle("read", tmp_path / "out", packages)  # it ends with 1 where transformers warns
        again = np.load(tmp_path / "out.read.npz")
        if packages and name in ROUTED:  # other products of the same experts
            np.testing.assert_allclose(again["logits"], before["logits"], atol=1e-5)
        else:
            np.testing.assert_array_equal(again["logits"], before["logits"])
        np.testing.assert_array_equal(again["greedy"], before["greedy"])


@pytest.mark.slow
@pytest.mark.prove
@pytest.mark.parametrize("name", ROUTED)
def test_experts_in_one_array_are_read_too(name, made, tmp_path):
    """As transformers 5 holds them, and saves them with save_original_format=False."""
    folder, _ = made
    found = []
    for kind in (name, f"{name}-fused"):
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / kind / file).write_bytes((folder / name / file).read_bytes())
        command("import", folder / kind, tmp_path / kind)
        found.append(named_arrays(sl.open(tmp_path / kind, data={"batch_size": 8}).params))
    assert sorted(found[0]) == sorted(found[1])
    for key, x in found[0].items():
        np.testing.assert_array_equal(x, found[1][key], key)


def check_gradients(gradients: dict[str, Any], wanted: Any, config: Any) -> None:
    family = families.of(config.model)
    sizes = families.sizes(config.model, config.data.vocab_size, config.data.seq_len)
    total = np.sqrt(sum(np.sum(wanted[key] ** 2) for key in wanted.files if key.startswith("grad/")))
    for row in family.table(config.model):
        for name, place in row.places(config.model).items():
            theirs = row.to_ours(wanted[f"grad/{name}"], sizes)
            ours = np.asarray(gradients[row.ours])[place]
            bound = 1e-4 * max(np.linalg.norm(theirs), 1e-3 * total)
            assert np.linalg.norm(ours - theirs) <= bound, name

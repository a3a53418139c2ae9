"""A language model on text, as what a run trains (recipes/task.py)."""

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from data import conversations
from data import corpus as corpora
from data.loader import Loader, eval_batches, num_bytes
from data.mixture import Mixture
from model import kernels
from model.config import Compute, ModelConfig, RopeScaling
from model.transformer import Transformer
from parallel.cost import flops
from parallel.layout.axes import AXES
from parallel.layout.mesh import cut
from recipes import context, experts, pipeline
from recipes.task import AllTrained
from runtime import config as configuration
from runtime.config import UsageError, nearest_multiples

WHOLE = dict.fromkeys(AXES, 1)
PROMPT_TOKENS, PROMPT_WORDS = 64, 4  # of the sample, where none is given


def build_model(c: Any, device_kind: str, sizes: Mapping[str, int] = WHOLE) -> tuple[Transformer, str]:
    """(the network that config c describes; its attention kernel and why that one). device_kind: the chip it will run
    on, and sizes of the mesh, which decide what `auto` means."""
    fields = {k: v for k, v in c.model.items() if k not in ("rope_scaling", *experts.KEYS)}
    scaling = RopeScaling(**c.model.rope_scaling) if c.model.rope_scaling.factor else None
    fields |= {"vocab_size": c.data.vocab_size, "max_seq_len": c.data.seq_len, "moe": experts.of(c)}
    fields["others"] = c.model.dense_layers
    config = ModelConfig(rope_scaling=scaling, **fields)
    auto = "float32" if device_kind == "cpu" else "bfloat16"
    dtype = jnp.dtype(auto if c.compute.dtype == "auto" else c.compute.dtype)
    way, why_way = context.choose(c, sizes, dtype.itemsize)
    asked, positions = context.kernel(c, way, sizes)
    queries = (c.data.batch_size, positions, config.num_heads, config.head_dim)
    try:
        kernel, passed = kernels.choose(asked, queries, dtype, device_kind, c.data.document_mask)
    except ValueError as error:
        raise UsageError(str(error)) from error
    options = {k: v for k, v in c.compute.items() if k not in ("dtype", "attention", "xla_options")}
    options["loss_chunk_mib"] = c.compute.loss_chunk_mib or chunk_of(device_kind)
    form = c.pipeline.remat, c.pipeline.gather, pipeline.repeats(c, sizes)
    options |= {"pipeline": form, "dispatch": experts.dispatch(c, device_kind)}
    compute = Compute(dtype=dtype, attention=kernel, context=way, **options)
    why = "; ".join((f"auto: {kernel}", *passed.values())) if asked == "auto" else f"{kernel}, as asked"
    why = "; ".join(filter(None, (why, why_way)))
    losses = c.optimizer.z_loss, (c.moe.balance_weight, c.moe.z_loss)
    return Transformer(config, compute, *losses), why


def chunk_of(device_kind: str) -> int:
    """MiB of logits at a time. A TPU's compiler finds room for more beside what else a step holds; on a GPU the chunk
    would be on top of it."""
    return 32 if device_kind == "cpu" else 512 if "TPU" in device_kind else 128


def read_corpus(data: Any, **how: Any) -> corpora.Corpus:
    """The text of the config's group `data`, by way of the user's cache. how: as in `corpora.load`."""
    keys = {key: data[key] for key in corpora.KEYS}
    return corpora.load(cache_dir=corpora.cache_directory(), **keys, **how)


@dataclass(frozen=True)
class Language(AllTrained):
    """attention: the kernel, and why that one. least: the smallest size of a logical axis."""

    model: Transformer
    attention: str
    row: dict[str, jax.ShapeDtypeStruct]
    least: dict[str, int]
    unit: ClassVar[str] = "tokens"

    @property
    def further(self) -> tuple[str, ...]:
        return self.model.config.moe.metrics if self.model.config.moe else ()

    def notable(self, means: Mapping[str, float]) -> str:
        net, compute = self.model.config, self.model.compute
        return experts.notable(net.moe, net.num_layers, compute.dispatch[1], means) if net.moe else ""

    @property
    def axes(self) -> Any:
        return self.model.axes

    @property
    def units(self) -> int:
        return self.row["tokens"].shape[0]

    @functools.cached_property
    def plain(self) -> Transformer:
        """Whose loss is the cross-entropy alone."""
        return Transformer(self.model.config, self.model.compute)

    def init(self, key: jax.Array) -> Any:
        return self.model.init(key)

    @property
    def loss(self) -> Callable[..., tuple]:
        return self.model.loss

    @property
    def eval_loss(self) -> Callable[..., tuple]:
        return self.plain.loss

    def weight(self, batch: Any) -> Any:
        return np.sum(batch["mask"])

    def eval_rows(self, most: int, multiple: int) -> int:
        return most

    def flops(self) -> float:
        shapes = jax.eval_shape(self.model.init, jax.eval_shape(lambda: jax.random.key(0)))
        return flops.per_token(shapes, self.model.axes, self.model.config, self.units, causal=False)

    def about(self) -> list[tuple[str, str]]:
        return [("attention", self.attention)]

    def read(self, c: Any, **how: Any) -> "Text | conversations.Conversations":
        if conversations.are_in(c.data.path, c.data.text_key):
            keys = {key: c.data[key] for key in conversations.KEYS}
            return conversations.load(cache_dir=corpora.cache_directory(), **keys, **how)
        return Text(read_corpus(c.data, **how), c.data.seq_len, c.data.document_mask)


@dataclass(frozen=True)
class Text:
    """A corpus in windows. What a run asks of its data."""

    corpus: corpora.Corpus
    seq_len: int
    document_mask: bool
    compared_with: ClassVar[tuple[str, ...]] = ("unigram", "bigram")

    @property
    def tokenizer(self) -> Any:
        return self.corpus.tokenizer

    @property
    def digest(self) -> str:
        return self.corpus.digest

    def facts(self) -> dict[str, str]:
        return {"data": self.digest, "data.tokenizer": self.tokenizer.digest}

    def describe(self, units: int, rows: int) -> list[tuple[str, str]]:
        return self.corpus.describe(units)

    def keep(self, workdir: Path) -> None:
        self.corpus.keep(workdir)

    def loader(self, seed: int, batch_size: int) -> Loader:
        return Loader(self.corpus.train_N, seed=seed, **self._shape(batch_size))

    def eval_batches(self, rows: int, batch_size: int, most: int | None) -> list[dict[str, np.ndarray]]:
        """So many batches as are trained on, at most; None: all."""
        return eval_batches(self.corpus.eval_N, num_batches=most, **self._shape(batch_size))

    def _shape(self, batch_size: int) -> dict[str, Any]:
        mask = {"document_mask": self.document_mask, "eos": self.tokenizer.eos}
        return {"seq_len": self.seq_len, "batch_size": batch_size} | mask

    def num_bytes(self, batches: list[dict[str, np.ndarray]]) -> float:
        """Of the text in these batches."""
        return num_bytes(self.corpus.token_bytes(), batches)

    def first_words(self) -> str:
        """Of what is held out; a model of few steps knows the kind of text at best."""
        return first_words(Mixture.of(self.corpus.eval_N).arrays[0], self.tokenizer)

    def prompt(self, text: str) -> np.ndarray:
        return corpora.encode_prompt(self.tokenizer, text)

    def baselines(self, batches: list[dict[str, np.ndarray]]) -> dict[str, float | None]:
        """Bits per byte of what counting alone achieves on these."""
        return dict(zip(self.compared_with, corpora.ngram_bits_per_byte(self.corpus, batches), strict=True))


def first_words(ids_N: np.ndarray, tokenizer: Any) -> str:
    """Of a text: a few whole ones, within the first tokens."""
    return "".join(re.findall(r"\s*\S+(?=\s)", tokenizer.decode(ids_N[:PROMPT_TOKENS]))[:PROMPT_WORDS])


def build(c: Any, mesh: Mesh) -> Language:
    """What config c describes. Raises UsageError for windows that the mesh does not divide."""
    over, shards = cut("sequence", mesh.shape)
    if c.data.seq_len % shards:
        raise UsageError(
            f"data.seq_len={c.data.seq_len} cannot be cut over {over}={shards} (between blocks the sequence is sharded "
            f"over it). Nearest legal sizes: {nearest_multiples(c.data.seq_len, shards)}"
        )
    dtypes = {"tokens": np.int32, "targets": np.int32, "mask": np.float32}
    if c.data.document_mask:
        dtypes["segments"] = np.int32
    row = {name: jax.ShapeDtypeStruct((c.data.seq_len,), dtype) for name, dtype in dtypes.items()}
    least = {"vocab": configuration.SMALLEST_VOCABULARY.get(c.data.tokenizer, 1)}
    return Language(*build_model(c, mesh.devices.flat[0].device_kind, mesh.shape), row, least)

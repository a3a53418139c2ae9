"""Every default, once. A variant calls `base.get_config()` and changes values.

Override any of them on the command line: `--config.optimizer.lr=1e-3`.
"""

from typing import Any

from ml_collections import ConfigDict


def get_config() -> Any:
    c: Any = ConfigDict()  # dynamic: type checkers cannot see its keys
    c.seed = 0  # of the weights and of the data order
    c.steps = 1000  # optimizer updates
    c.log_every = 10  # steps between rows of metrics.jsonl
    c.eval_every = 100  # steps between evaluations; 0: only at the end
    c.eval_batches = 8  # batches of held-out text per evaluation

    c.init = ConfigDict()  # what a fresh run begins with
    c.init.workdir = ""  # of another run, whose parameters, model.* and tokenizer are taken; empty: drawn weights

    c.lora = ConfigDict()  # an adapter that is trained in place of the model, which init.workdir gives
    c.lora.rank = 0  # r of the matrices beside each weight; 0: all weights are trained
    c.lora.alpha = 16.0  # their product is scaled by alpha / rank
    c.lora.pattern = "attention|mlp"  # matrices whose path has this regular expression in it
    c.lora.rs = False  # scaled by alpha / sqrt(rank)
    c.lora.freeze_a = False  # train B alone, so that the mean of adapters is the adapter of the mean

    c.mesh = ConfigDict()
    c.mesh.replica = 1  # machines joined by the slow link
    c.mesh.stage = 1  # shards of the layers: a pipeline, whose micro-batches are those of optimizer.accumulate
    c.mesh.fsdp = -1  # shards of the weights and of each replica's batch; -1: all devices that are left
    c.mesh.expert = 1  # shards of the experts, and of each replica's batch and of the other weights beside fsdp
    c.mesh.context = 1  # shards of sequences, and of the weights beside fsdp: for windows that one device cannot hold
    c.mesh.tensor = 1  # shards of heads, features, vocabulary, and of the sequence between blocks

    c.model = ConfigDict()
    c.model.num_layers = 4
    c.model.model_dim = 128
    c.model.num_heads = 8
    c.model.num_kv_heads = 8  # fewer than num_heads: grouped-query attention
    c.model.head_dim = 16
    c.model.mlp_dim = 512
    c.model.norm = "rms"  # rms, layer
    c.model.norm_eps = 1e-5
    c.model.mlp = "swiglu"  # swiglu, gelu
    c.model.position = "rope"  # rope, learned
    c.model.rope_theta = 10_000.0
    c.model.rope_scaling = ConfigDict()  # Llama 3.1's long-context stretching
    c.model.rope_scaling.factor = 0.0  # 0: off
    c.model.rope_scaling.low_freq_factor = 1.0
    c.model.rope_scaling.high_freq_factor = 4.0
    c.model.rope_scaling.original_max_len = 8192
    c.model.qk_norm = False  # RMSNorm on queries and keys
    c.model.bias = "none"  # none; qkv: of queries, keys and values (Qwen 2); all: of every linear map but swiglu's
    c.model.tie_embeddings = True  # the head is the transposed embedding
    c.model.sliding_window = 0  # positions that a query sees, itself included; 0: all before it
    c.model.init_std = 0.02
    c.model.experts = (
        0  # feed-forward halves among which a router chooses, each of model.mlp_dim; 0: one for all tokens
    )
    c.model.experts_per_token = 2
    c.model.shared_experts = 0  # as large, for every token
    c.model.router = "softmax"  # softmax, sigmoid
    c.model.normalise_gates = True  # the scores of a token's experts add up to 1
    c.model.balance = "loss"  # loss, bias (on the scores, moved against the load), none
    c.model.dense_layers = 0  # before the num_layers with experts: one feed-forward half for all tokens, of dense_dim
    c.model.dense_dim = 0

    c.moe = ConfigDict()  # how experts are trained
    # grouped (no slot is multiplied in vain), capacity; mosaic: as grouped, by kernels for H100 and H200 whose values
    # no chip has checked; auto: capacity on GPUs, else grouped
    c.moe.dispatch = "auto"
    c.moe.rows = "1.25"  # room for tokens, in multiples of what an even load takes, or worst: none is ever dropped
    c.moe.balance_weight = 0.01  # of the loss of model.balance=loss
    c.moe.balance_rate = 0.001  # of a step of the bias of model.balance=bias
    c.moe.z_loss = 0.0  # weight of the router's logsumexp²

    c.pipeline = ConfigDict()  # over mesh.stage
    c.pipeline.interleave = 1  # times that a micro-batch goes through all stages: a stage has so many runs of layers
    c.pipeline.remat = "layer"  # worked out again in the backward pass: layer (as compute.remat says); stage: all of it
    c.pipeline.gather = "tick"  # weights over mesh.fsdp: tick (each layer's in every tick), step (once, and kept)

    c.attention = ConfigDict()
    c.attention.context = "auto"  # over mesh.context: heads, ring, gather; auto: the first of these that fits

    c.compute = ConfigDict()  # how the model is executed: nothing here changes the mathematics
    c.compute.dtype = "auto"  # auto: bfloat16 on accelerators, float32 on CPU
    c.compute.attention = "auto"  # cudnn, splash, reference; auto: the first of these that fits the model and the chip
    c.compute.remat = "matmuls"  # kept for the backward pass: none (everything), matmuls, dots, offload, full (nothing)
    c.compute.unroll = False  # compile each layer by itself: slower to compile, sometimes faster to run
    c.compute.loss_chunk_mib = 0  # float32 logits that one device holds at a time; 0: what suits the chip
    c.compute.xla_options = ""  # name=value,… of the compiler, in place of what recipes/xla.py sets for the chip

    c.data = ConfigDict()
    c.data.corpus = "stdlib"  # stdlib, asv
    c.data.path = ""  # your own text: a file, a folder, tokens in a flat .bin, or several by weight: a:0.7,b:0.3
    c.data.suffixes = ".txt,.jsonl,.parquet"  # of the files that are read, also compressed; others are plain text
    c.data.text_key = "text"  # what holds the text, in .jsonl and .parquet
    c.data.changed = "refuse"  # refuse, accept: a resumed run whose text is not what it was trained on
    c.data.tokenizer = "bytes"  # bytes, bpe, or the path of a Hugging Face tokenizer.json
    c.data.end_of_document = ""  # the special token that ends a document; empty: the tokenizer's own
    c.data.vocab_size = 256  # rows of the embedding
    c.data.seq_len = 256  # tokens per window
    c.data.batch_size = 32  # windows per update, over all replicas and all micro-steps
    c.data.eval_fraction = 0.05  # of the documents, held out
    c.data.document_mask = False  # attend within a document only

    c.optimizer = ConfigDict()
    c.optimizer.name = "adamw"  # adamw, sgd, muon, lion, sign, signum, onebit_adam
    c.optimizer.lr = 1e-3
    c.optimizer.schedule = "cosine"  # cosine, wsd, constant
    c.optimizer.warmup_steps = 50
    c.optimizer.final_lr_fraction = 0.1
    c.optimizer.weight_decay = 0.1
    c.optimizer.clip_norm = 1.0  # of the exchanged gradient, or of a local replica's own; 0: off
    c.optimizer.accumulate = 1  # micro-steps per update
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.95
    c.optimizer.eps = 1e-8
    c.optimizer.momentum = 0.95  # sgd, muon, signum
    c.optimizer.moment_dtype = "float32"  # bfloat16: half of the memory, stochastically rounded
    c.optimizer.freeze_steps = 100  # onebit_adam: exact steps before the variance is frozen
    c.optimizer.z_loss = 0.0  # weight of logsumexp²: keeps logits from drifting

    c.guard = ConfigDict()  # against bad gradients and updates: docs/methods.md
    c.guard.zscore = 6.0  # a size so many deviations above the last ones is a spike; 0: only NaN and inf
    c.guard.window = 64
    c.guard.abort_after = 20  # updates in a row, left out or scaled, that end the run

    c.sync = ConfigDict()  # the slow axis
    c.sync.replicas = 0  # R; 0: the size of mesh.replica. A multiple of it puts several replicas on each device
    c.sync.strategy = "sync"  # sync, stale, diloco, eager, streaming, island
    c.sync.codec = "none"  # none (float32), bf16, fp8, fp4, int8, int4, int2, sign, topk, randk, powersgd, demo
    c.sync.algorithm = "auto"  # gather, two_stage, psum; auto: gather for 2 replicas, else two_stage
    c.sync.exchange = "after"  # after: when all gradients are there; backward: layer by layer, hidden by the rest
    c.sync.error_feedback = "auto"  # on, off; auto: as the codec wants
    c.sync.warm_steps = 0  # steps before the strategy and the codec begin: synchronous, float32 (post-local SGD)
    c.sync.allow_stray_bytes = False  # go on where XLA sends more over the slow axis than the exchange asked for
    c.sync.decay = 1.0  # of the residuals of error feedback
    c.sync.residual_dtype = "float32"  # float32, bfloat16
    # Codecs; -1: the codec's own default (docs/methods.md).
    c.sync.block = -1  # fp8, fp4, int8, int4, int2, sign: elements that share a scale
    c.sync.stochastic = False  # fp8, fp4, int8, int4, int2: round without bias; sign: for votes
    c.sync.density = -1.0  # topk, randk, demo: share of the elements sent
    c.sync.bits = -1  # topk: of a value
    c.sync.rank = -1  # powersgd
    # Strategies.
    c.sync.staleness = 1  # stale: steps by which a gradient is late
    c.sync.compensation = 0.0  # stale: λ of delay compensation; 0: off
    c.sync.interval = 30  # diloco, eager, streaming, island: inner steps H from exchange to exchange
    c.sync.fragments = 2  # streaming: parts of the model that are exchanged in turn
    c.sync.overlap = 0  # streaming: inner steps τ during which a fragment is on the wire
    c.sync.mix = 0.0  # streaming: α, how much of a replica's own parameters it keeps
    c.sync.outer = ConfigDict()  # diloco, eager, streaming, island: what is done with the mean pseudo-gradient
    c.sync.outer.optimizer = "nesterov"  # nesterov, sgd, adam
    c.sync.outer.lr = 0.7  # with adam, whose steps are of unit size, about 1e-3
    c.sync.outer.momentum = 0.9

    c.island = ConfigDict()  # sync.strategy=island: a job of its own, joined to others by a log: docs/islands.md
    c.island.log = ""  # where the log is: a folder, s3://BUCKET/PATH, gs://…, az://…
    c.island.name = ""  # of this island: a-z, 0-9, - and _
    c.island.merge = "nesterov"  # average, compensated, nesterov, quorum
    c.island.staleness = -1  # rounds by which an island may be ahead of the slowest; -1: no bound
    c.island.quorum = 2  # quorum: pushes that make a step
    c.island.dylu = False  # rounds in proportion to speed: the fastest makes sync.interval steps
    c.island.norm_bound = 0.0  # of what one push may change; 0: none

    c.checkpoint = ConfigDict()
    c.checkpoint.every = 200  # steps; 0: only at the end
    c.checkpoint.keep = 2  # the newest so many, and the best by eval loss
    c.checkpoint.keep_every = 0  # and every so many steps for ever; 0: none

    c.sample = ConfigDict()
    c.sample.tokens = 256  # of text to write at the end; 0: none
    c.sample.every = 0  # steps between samples that are kept while it trains; 0: only the one at the end
    c.sample.prompt = "auto"  # auto: the first words of the held-out text
    c.sample.temperature = 0.8

    c.metrics = ConfigDict()
    c.metrics.tensorboard = "auto"  # auto: when tensorboardX is installed; on, off
    c.metrics.wandb = ""  # a Weights & Biases project; empty: off

    c.profile = ConfigDict()
    c.profile.steps = ""  # "10:13" writes an XProf trace of steps 10, 11 and 12
    return c

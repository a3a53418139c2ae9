"""What crosses `replica` in programs for real chips is the closed form, to the byte: every codec in each of its forms,
and every program of every strategy."""

from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import recipes.build
from model.attention import KERNELS
from model.fused import PRODUCTS
from parallel.cost import compilers, hardware, hlo, schedule, targets, wire
from parallel.cost.bytes import exchange_bytes
from parallel.exchange import exchange as exchanges
from parallel.exchange import residuals, units
from parallel.exchange.codecs import CODECS, rounds
from parallel.exchange.codecs.base import is_round
from parallel.exchange.exchange import Feedback
from parallel.layout import experts, ring
from parallel.layout import mesh as meshes
from parallel.layout.rules import Constrain
from recipes import aot, context, memory, methods, programs, xla
from recipes.experts import described, sent

EVERY = [pytest.mark.slow, pytest.mark.prove]
SIZES = {"replica": 2, "fsdp": 2, "tensor": 2}
FORMS = [
    (name, form)
    for name, kind in CODECS.items()
    for form in (("gather",) if not is_round(kind) and kind.sparse else ("gather", "two_stage"))
]
STRATEGIES: dict[str, dict[str, Any]] = {
    "sync": {},
    "stale": {},
    "diloco": {"interval": 10},
    "eager": {"interval": 4},
    "streaming": {"interval": 8, "overlap": 4},
}
SAMPLE = [
    ("int8", "two_stage"),
    ("powersgd", "gather"),
    ("topk", "gather"),
]  # in the default run, where a compiler is installed


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """So that arrays are coded in several, as those of large models are."""
    monkeypatch.setattr(rounds, "PIECE", 2**15)


def devices_of(machine: str) -> list[Any]:
    target = targets.parse(machine, hardware.by_name(hardware.CHIPS))
    try:
        compilers.check_compiler(target.chip)
    except ImportError as error:
        pytest.skip(str(error))
    compilers.prepare(target.chip)
    return compilers.devices(target)


@pytest.fixture(scope="module", params=["2xv5p-8", "h100:2x4"])
def chips(request) -> list[Any]:
    return devices_of(request.param)


def build(chips: list[Any], **overrides: Any):
    """A million parameters and more: large enough that TPUs do not widen what is sent of an array. The plain attention,
    which compiles in a quarter of the kernel's time."""
    config = helpers.tiny(
        model__model_dim=256, model__head_dim=128, model__num_heads=4, model__num_kv_heads=2, model__mlp_dim=512,
        data__seq_len=256, data__batch_size=32, compute__attention="reference", **overrides,
    )  # fmt: skip
    return recipes.build.build(config, meshes.build(SIZES, chips))


@pytest.mark.parametrize(("codec", "form"), [x if x in SAMPLE else pytest.param(*x, marks=EVERY) for x in FORMS])
def test_every_codec_sends_the_bytes_of_its_closed_form(chips, codec, form):
    parts = build(chips)
    leaves = units.leaves(parts.param_shapes, parts.task.axes)
    exchange = exchanges.build(CODECS[codec](), form, parts.mesh, 2, leaves, Feedback())
    shaped = lambda shape, dtype, spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(parts.mesh, spec))
    tree = jax.tree.map(lambda leaf: shaped((2, *leaf.shape), np.float32, P("replica", *leaf.spec)), leaves)
    state = jax.eval_shape(lambda: residuals.init(exchange))
    state = jax.tree.map(lambda x, spec: shaped(x.shape, x.dtype, spec), state, exchange.state_specs)
    program = jax.jit(exchange.mean).lower(tree, state, shaped((), np.int32, P())).compile()
    assert helpers.exchanged(program.as_text(), exchange.mesh) == exchange_bytes(exchange)


def options(strategy: str, codec: str) -> dict[str, Any]:
    return {"sync__strategy": strategy, "sync__codec": codec} | {
        f"sync__{k}": v for k, v in STRATEGIES[strategy].items()
    }


def test_every_strategy_is_here():
    assert STRATEGIES.keys() == methods.STRATEGIES.keys()


@pytest.mark.slow
@pytest.mark.prove
@pytest.mark.parametrize("codec", ["none", "int4"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_program_of_a_strategy_sends_the_bytes_of_its_closed_form(chips, strategy, codec):
    parts = build(chips, **options(strategy, codec))
    for name, lower in programs.steps(parts).items():
        program = lower().compile(compiler_options=parts.xla_options)
        expected = aot.predicted(name, parts).get("replica", {})
        assert helpers.exchanged(program.as_text(), parts.mesh) == expected, name


def check_hops_are_hidden(text: str, mesh: Any) -> None:
    """Every permute of a ring's loops, forward, worked out again and backward, stands around a kernel."""
    hidden = schedule.hidden(hlo.Program.read(text))
    in_loop = lambda c: c.kind == "collective-permute" and "while/body" in c.scope.rpartition(f"/{ring.SCOPE}/")[2]
    hops = [c for c in wire.collectives(text, mesh) if in_loop(c)]
    assert {c.dtype for c in hops} == {"bf16", "f32"}
    assert all(c.name in hidden for c in hops), hops


@pytest.mark.slow
@pytest.mark.prove
@pytest.mark.parametrize("way", ["ring", "heads"])
def test_sequences_that_are_cut_attend_by_fused_kernels_and_send_the_closed_form(chips, way):
    config = helpers.tiny(
        model__model_dim=256, model__head_dim=128, model__num_heads=8, model__num_kv_heads=4, model__mlp_dim=512,
        data__seq_len=1024, data__batch_size=4, attention__context=way, compute__remat="full", sync__codec="int4",
    )  # fmt: skip
    parts = recipes.build.build(config, meshes.build({"replica": 2, "context": 4}, chips))
    assert parts.task.model.compute.attention in ("cudnn", "splash")
    ((name, lower),) = programs.steps(parts).items()
    text = lower().compile(compiler_options=parts.xla_options).as_text()
    assert ("fmhaSoftmaxBackward" if chips[0].platform != "tpu" else "splash_mha_dq") in text
    assert helpers.exchanged(text, parts.mesh) == aot.predicted(name, parts)["replica"]
    if way == "ring" and chips[0].platform != "tpu":  # where the scheduler sends gradients behind the kernels
        check_hops_are_hidden(text, parts.mesh)
    kind = {"ring": "collective-permute", "heads": "all-to-all"}[way]  # of these the embedding sends a hundredth
    sent = sum(c.sent for c in wire.collectives(text, parts.mesh) if (c.axis, c.kind) == ("context", kind))
    wanted = context.described(config, parts.mesh.shape, 2).sent(way) * config.model.num_layers
    assert abs(sent / wanted - 1) <= 0.05


@pytest.mark.slow
@pytest.mark.prove
@pytest.mark.parametrize("machine", ["h100:4x8", "v5p-64"])
def test_attention_as_a_ring_holds_what_a_device_has_of_the_sequence(machine):
    """32,768 positions a device, 16 query and 4 key heads of 128, two layers of attention alone, forward and backward,
    worked out again: 3 GiB at most, with 4 devices in a ring as with 8, and half with half of the positions."""
    chips = devices_of(machine)
    name = "splash" if chips[0].platform == "tpu" else "cudnn"
    D, H, G, K, layers = 4096, 32, 8, 128, 2

    def held(own: int, count: int) -> float:
        mesh = meshes.build({"replica": 2, "context": count, "tensor": 2}, chips[: 4 * count])
        constrain = Constrain(mesh)
        attend = constrain.sequences("ring").attention(KERNELS[name], PRODUCTS[name])

        @jax.checkpoint
        def layer(x_BTD, w):
            h_BTD = constrain(x_BTD, ("batch", "positions", None))
            q, k, v = (jnp.einsum("btd,dhk->bthk", h_BTD, w[n].astype(jnp.bfloat16)) for n in "qkv")
            y_BTHK = attend(q, k, v, None, None, constrain)
            y_BTD = jnp.einsum("bthk,hkd->btd", y_BTHK, w["out"].astype(jnp.bfloat16))
            return constrain(x_BTD + y_BTD, ("batch", "sequence", None)), None

        loss = lambda w, x_BTD: jnp.sum(jax.lax.scan(layer, x_BTD, w)[0].astype(jnp.float32) ** 2)
        shaped = lambda shape, dtype, *spec: jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))
        heads = {"q": H, "k": G, "v": G}
        w = {n: shaped((layers, D, count, K), np.float32, None, None, "tensor") for n, count in heads.items()}
        w["out"] = shaped((layers, H, K, D), np.float32, None, "tensor")
        x = shaped((2, 1, own * count, D), jnp.bfloat16, "replica", None, ("context", "tensor"))
        each = jax.tree.map(lambda x: NamedSharding(mesh, P("replica", *x.sharding.spec)), w)
        gradient = jax.vmap(jax.value_and_grad(loss), in_axes=(None, 0), spmd_axis_name="replica")
        lowered = jax.jit(gradient, out_shardings=(None, each)).lower(w, x)
        program = lowered.compile(compiler_options=xla.options("", mesh, is_small=False))
        return program.memory_analysis().temp_size_in_bytes / 2**30

    most = held(32_768, 8)
    assert most <= 3
    assert held(32_768, 4) == pytest.approx(most, rel=0.01)
    assert held(16_384, 8) == pytest.approx(most / 2, rel=0.15)


@pytest.mark.slow
@pytest.mark.prove
@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("gather", ["tick", "step"])
def test_over_stages_go_two_activations_a_tick_and_pass(chips, gather, repeats):
    """Exactly, in V · M + S - 1 ticks. Nothing else over stages, and of weights that are gathered once nothing over
    shards, depends on the number of micro-batches."""
    rest, over_fsdp = [], []
    for micro in (2, 4):
        config = helpers.tiny(
            model__model_dim=256, model__head_dim=128, model__num_heads=4, model__num_kv_heads=2, model__mlp_dim=512,
            model__num_layers=4, data__seq_len=256, data__batch_size=32, compute__attention="reference",
            compute__remat="full", pipeline__remat="stage", pipeline__gather=gather, optimizer__accumulate=micro,
            pipeline__interleave=repeats, sync__codec="int4",
        )  # fmt: skip
        parts = recipes.build.build(config, meshes.build({"replica": 2, "stage": 2, "fsdp": 2}, chips))
        ((name, lower),) = programs.steps(parts).items()
        text = lower().compile(compiler_options=parts.xla_options).as_text()
        assert helpers.exchanged(text, parts.mesh) == aot.predicted(name, parts)["replica"]
        found = wire.collectives(text, parts.mesh)
        sent = lambda axis, handed, found=found: sum(
            c.sent for c in found if c.axis == axis and (c.kind == "collective-permute") == handed
        )
        activation = 32 // (2 * 2 * micro) * 256 * 256 * 2
        assert sent("stage", True) == 4 * (repeats * micro + 1) * activation
        if chips[0].platform == "gpu":  # whose text says how often a loop is run
            assert f'"known_trip_count":{{"n":"{repeats * micro + 1}"}}' in text
        rest.append(sent("stage", False))
        over_fsdp.append(sent("fsdp", False))
    assert rest[0] == rest[1]
    assert over_fsdp[0] == over_fsdp[1] if gather == "step" else over_fsdp[0] < over_fsdp[1]


@pytest.mark.slow
@pytest.mark.prove
@pytest.mark.parametrize("chosen", [2, 4])
def test_on_the_way_to_experts_goes_the_closed_form_and_little_is_multiplied_in_vain(chips, chosen):
    config = helpers.tiny(
        model__model_dim=256, model__head_dim=128, model__num_heads=4, model__num_kv_heads=2, model__mlp_dim=512,
        model__experts=8, model__experts_per_token=chosen, data__seq_len=256, data__batch_size=32,
        compute__attention="reference", compute__remat="full", sync__codec="int4",
    )  # fmt: skip
    parts = recipes.build.build(config, meshes.build({"replica": 2, "expert": 4}, chips))
    ((name, lower),) = programs.steps(parts).items()
    compiled = lower().compile(compiler_options=parts.xla_options)
    text = compiled.as_text()
    assert helpers.exchanged(text, parts.mesh) == aot.predicted(name, parts)["replica"]
    own, found = described(config, parts.mesh.shape, parts.task.model.compute), wire.collectives(text, parts.mesh)
    named, more = [c for c in found if experts.SCOPE in c.scope], 0
    if not named:  # on TPUs nothing says whose they are: an all-to-all, either way, brings embeddings, too
        rows, layers = own.tokens * own.dim * own.itemsize * (own.count - 1), config.model.num_layers
        over = [c for c in found if c.axis == "expert"]
        named = [c for c in over if c.sent == layers * rows or (c.kind == "all-to-all" and chosen < own.count)]
        more = 2 * rows // own.count * (chosen < own.count)
    assert {c.axis for c in named} == {"expert"}
    assert sum(c.sent for c in named) - more == pytest.approx(sent(config, parts), rel=0.05)
    assert own.multiplied <= 1.3 * own.tokens * own.chosen


@pytest.mark.slow
@pytest.mark.prove
@pytest.mark.parametrize("machine", ["h100:8x8", "2xv5p-64"])
def test_all_six_axes_at_two_send_the_closed_form(machine):
    """With a ring, tokens to experts, and a pipeline: over `replica` the exchange and nothing else; over stages two
    activations a tick and pass; what attention and experts send as in closed form."""
    chips = devices_of(machine)
    is_tpu = chips[0].platform == "tpu"
    config = helpers.tiny(
        model__model_dim=256, model__head_dim=128, model__num_heads=4, model__num_kv_heads=4, model__mlp_dim=256,
        model__num_layers=4, model__experts=4, model__experts_per_token=1, data__seq_len=512, data__batch_size=32,
        compute__remat="full", optimizer__accumulate=2, attention__context="ring", sync__codec="int4",
    )  # fmt: skip
    sizes = dict.fromkeys(meshes.AXES, 2)
    parts = recipes.build.build(config, meshes.build(sizes, chips))
    ((name, lower),) = programs.steps(parts).items()
    text = lower().compile(compiler_options=parts.xla_options).as_text()
    assert helpers.exchanged(text, parts.mesh) == aot.predicted(name, parts)["replica"]
    found = wire.collectives(text, parts.mesh)
    handed = sum(c.sent for c in found if c.kind == "collective-permute" and c.axis == "stage")
    activation = 32 // (2 * 2 * 2 * 2) * 512 // 2 * 256 * 2 // 2
    assert handed == 4 * 3 * activation
    hops = sum(c.sent for c in found if c.kind == "collective-permute" and c.axis == "context")
    assert hops == pytest.approx(context.sent(config, parts), rel=0.001)
    if not is_tpu:  # where nothing says whose an all-to-all is
        routed = sum(c.sent for c in found if experts.SCOPE in c.scope)
        assert routed == pytest.approx(sent(config, parts), rel=0.05)


@pytest.mark.slow
@pytest.mark.prove
def test_what_is_kept_with_the_host_is_what_matmuls_keeps_on_the_device(chips):
    found = {}
    for remat in ("matmuls", "offload", "full"):
        parts = build(chips, compute__remat=remat)
        ((_, lower),) = programs.steps(parts).items()
        program = lower().compile(compiler_options=parts.xla_options)
        found[remat] = memory.on_host(program)
    tokens, heads, layers = 32 // (2 * 2) * 256, 128 // 2, 2
    kept = layers * tokens * (2 * (4 + 2) * heads + 2 * 512 // 2) * 2
    padded = 1.5 if chips[0].platform == "tpu" else 1.0  # few heads, to whole tiles
    assert found == {"matmuls": 0, "offload": padded * kept, "full": 0}

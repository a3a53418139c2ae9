"""The train step compiled for TPUs, on a machine without one: libtpu compiles for a topology that it is told."""

import helpers
import jax
import pytest
from ml_collections import ConfigDict

import recipes.build
from parallel.cost import wire
from parallel.cost.bytes import exchange_bytes
from parallel.layout import mesh as meshes
from recipes import describe
from recipes.programs import compile_beside, compile_init, compile_steps

pytest.importorskip(
    "libtpu", reason="libtpu is not installed: pip install -r requirements-prove.txt on Python 3.12 or newer"
)
pytestmark = pytest.mark.prove


@pytest.fixture(scope="module", params=["v5e:2x4"])
def chips(request):
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=request.param).devices


def build(chips, **overrides):
    config = helpers.tiny(
        model__model_dim=256, model__head_dim=128, model__num_heads=4, model__num_kv_heads=2, model__mlp_dim=512,
        data__seq_len=512, data__batch_size=32, **overrides,
    )  # fmt: skip
    sizes = {"replica": 2, "fsdp": 2, "tensor": 2}
    return recipes.build.build(config, meshes.build(sizes, chips))


@pytest.mark.parametrize("codec", ["none", "bf16"])
def test_the_bytes_over_replica_are_the_closed_form_on_tpu_too(chips, codec):
    parts = build(chips, sync__codec=codec)
    programs = compile_steps(parts)
    assert describe.traffic(parts, programs)["step"].stray == 0
    found = wire.collectives(programs["step"].as_text(), parts.mesh)
    slow = [c for c in found if c.axis == "replica" and "scalars_step" not in c.scope]
    exchange = parts.strategy.exchange
    assert sum(c.sent for c in slow) == sum(exchange_bytes(exchange).values())
    assert {c.dtype for c in slow} == set(exchange_bytes(exchange))


def test_tpu_runs_splash_attention_in_bf16_and_gathers_weights_in_bf16(chips):
    parts = build(chips)
    assert parts.task.model.compute.attention == "splash" and parts.task.model.compute.dtype == jax.numpy.bfloat16
    compiled = compile_steps(parts)["step"]
    text = compiled.as_text()
    assert "tpu_custom_call" in text, "the Pallas kernel is in the program"
    gathered = wire.count(text, parts.mesh)["fsdp"]
    assert gathered.get("bf16", 0) > gathered.get("f32", 0), gathered
    assert compiled.memory_analysis().temp_size_in_bytes > 0


@pytest.mark.parametrize("masked", [False, True])
def test_document_masks_and_windows_compile_for_tpu(chips, masked):
    compile_steps(build(chips, data__document_mask=masked, model__sliding_window=128))


def test_micro_steps_compile_where_the_head_is_a_weight_of_its_own(chips):
    """Its gradient is summed over devices in bfloat16, and added up in float32."""
    compile_steps(build(chips, model__tie_embeddings=False, optimizer__accumulate=2, compute__attention="reference"))


@pytest.mark.slow
@pytest.mark.parametrize(("topology", "slices"), [("v5e:2x4", 1), ("v5p:2x2x1", 2)])
def test_no_program_of_a_tpu_sends_what_nobody_asked_for(topology, slices):
    """Small: a TPU widens short messages, and between slices it drops the names of some."""
    from jax.experimental import topologies

    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology, num_slices=slices).devices
    config = helpers.tiny(data__seq_len=128, data__vocab_size=4096, sync__codec="int4")
    parts = recipes.build.build(config, meshes.build({"replica": 2, "fsdp": 2, "tensor": 2}, chips))
    found = describe.traffic(parts, compile_steps(parts))
    others = compile_beside(parts, ConfigDict({"tokens": 4, "temperature": 0.8}))
    found |= describe.traffic_beside(parts, others | {"init": compile_init(parts)})
    assert {name: t.culprits + t.not_counted for name, t in found.items()} == dict.fromkeys(found, "")

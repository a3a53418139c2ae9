"""Whatever crosses the slow axis unasked is found before it runs (parallel/cost/stray.py), and nothing does, in the
step or in the programs beside it (recipes/programs.py)."""

from types import SimpleNamespace

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from parallel.cost import stray
from parallel.cost.bytes import exchange_bytes
from parallel.layout import mesh as meshes
from parallel.layout.axes import AXES
from recipes import describe
from recipes.programs import compile_beside, compile_init, shardings_of
from runtime.config import UsageError

SAMPLE = ConfigDict({"tokens": 3, "temperature": 0.8})


@pytest.fixture(scope="module")
def mesh():
    return meshes.build({"replica": 2, "fsdp": 4, "tensor": 1}, jax.devices())


def compiled(f, mesh, out):
    """f on each device's 100 rows of 4 bytes."""
    run = jax.shard_map(f, mesh=mesh, in_specs=P(("replica", "fsdp")), out_specs=out, check_vma=False)
    return jax.jit(run).lower(jax.ShapeDtypeStruct((800,), np.float32)).compile(helpers.QUICKLY)


# ── what is found ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_collective_that_nobody_predicted_is_named_with_its_bytes_and_its_line(mesh):
    found = stray.traffic(compiled(lambda x: lax.psum(x, "replica"), mesh, P()), mesh, 0)
    assert found.stray == found.per_axis["replica"] == 400 and not found.not_counted
    assert "all-reduce of f32, 400 bytes" in found.culprits and "test_stray.py:" in found.culprits
    with pytest.raises(UsageError, match=r"step: 400 bytes a call: all-reduce(.|\n)*sync.allow_stray_bytes"):
        describe.refuse_stray({"step": found}, allow=False)
    describe.refuse_stray({"step": found}, allow=True)
    assert "step: 400 B a call" in describe.stray_row({"step": found})


def test_predicted_bytes_named_scalars_and_fast_axes_are_not_stray(mesh):
    def f(x):
        with jax.named_scope("exchange"):
            x = lax.psum(x, "replica")
        with jax.named_scope("scalars_loss"):
            total = lax.psum(jnp.sum(x), "replica")
        return lax.psum(x * total, "fsdp")

    program = compiled(f, mesh, P())
    assert stray.traffic(program, mesh, 400).stray == 0
    assert stray.traffic(program, mesh, 399).stray == 1
    assert stray.traffic(program, mesh, 399).per_axis == dict.fromkeys(AXES, 0) | {"replica": 404, "fsdp": 600}


def test_a_name_makes_no_large_array_a_scalar(mesh):
    def f(x):
        with jax.named_scope("scalars_loss"):
            return lax.all_gather(jnp.tile(x, 20), "replica")

    assert stray.traffic(compiled(f, mesh, P(None, ("replica", "fsdp"))), mesh, 0).stray == 8000


@pytest.mark.parametrize("text", ["", "HloModule m\n\nENTRY %main (p: f32[8]) -> f32[8] {\n  %a = f32[8] "
    "all-reduce(%p), replica_groups=@new, to_apply=%add\n}\n"])  # fmt: skip
def test_a_text_that_is_not_understood_stops_the_counting_and_nothing_else(mesh, text):
    found = {"step": stray.traffic(SimpleNamespace(as_text=lambda: text), mesh, 0)}
    assert found["step"].not_counted.startswith("not counted: ")
    describe.refuse_stray(found, allow=False)
    assert "step: not counted: " in describe.stray_row(found)
    assert describe.wire_bytes(SimpleNamespace(mesh=mesh), found, 10) == {}


def test_a_backend_that_does_not_say_what_a_program_needs_stops_nothing_either():
    silent = SimpleNamespace(memory_analysis=lambda: None)
    assert describe.rows_beside({"sample": silent}) == [("sample", "not known temporary per device")]


# ── nothing of ours is ───────────────────────────────────────────────────────────────────────────────────────────


def strays(parts) -> dict[str, str]:
    """What any program of these parts sends over `replica` unasked, and what could not be counted."""
    outputs = (shardings_of(parts.state), None)
    programs = {
        name: jax.jit(f, out_shardings=outputs).lower(parts.state, parts.batch).compile(helpers.QUICKLY)
        for name, f in parts.strategy.programs().items()
    }
    others = compile_beside(parts, SAMPLE, options=helpers.QUICKLY)
    others |= {"init": compile_init(parts), "init from parameters": compile_init(parts, given=True)}
    found = describe.traffic(parts, programs) | describe.traffic_beside(parts, others)
    sent = {name: found[name].per_axis["replica"] for name in programs}
    predicted = sum(sum(exchange_bytes(e).values()) for e in parts.strategy.exchanges()[list(programs)[-1]])
    assert predicted and list(sent.values())[-1] >= predicted, "the exchange itself was counted"
    return {name: f"{t.culprits}{t.not_counted}" for name, t in found.items() if t.stray or t.not_counted}


@pytest.mark.slow
def test_no_program_sends_what_nobody_asked_for():
    """A vocabulary of 4,096 rows: a look-up in a table of that size, left to XLA, crosses the slow axis."""
    assert strays(helpers.build(helpers.tiny(data__vocab_size=4096), (2, 2, 2))) == {}


def test_a_look_up_that_is_left_to_xla_would_be_found():
    """The control of the test above: today's compilers lay this one out over `replica`."""
    parts = helpers.build(helpers.tiny(data__vocab_size=4096), (2, 2, 2))
    named = lambda spec: jax.sharding.NamedSharding(parts.mesh, spec)

    def look_up(table_VD, ids_RBT):
        table_VD = lax.with_sharding_constraint(table_VD, named(P("tensor", None)))

        def one(ids_BT):
            x_BTD = jnp.take(table_VD, ids_BT, axis=0)
            return lax.with_sharding_constraint(x_BTD, named(P("fsdp", "tensor", None)))

        return jax.vmap(one, spmd_axis_name="replica")(ids_RBT)

    shapes = (
        parts.state.params["embed"],
        jax.ShapeDtypeStruct((2, 16, 32), np.int32, sharding=named(P("replica", "fsdp"))),
    )
    program = jax.jit(look_up).lower(*shapes).compile(helpers.QUICKLY)
    assert stray.traffic(program, parts.mesh, 0).stray > 0


@pytest.mark.prove
def test_no_mesh_vocabulary_or_batch_makes_any_program_send_more():
    hypothesis = pytest.importorskip("hypothesis", reason="pip install -r requirements-prove.txt")
    st = hypothesis.strategies
    small = {
        "model__model_dim": 16,
        "model__num_heads": 4,
        "model__num_kv_heads": 4,
        "model__head_dim": 4,
        "model__mlp_dim": 32,
    }
    sizes = st.sampled_from([m for m in meshes.factorings(8) + meshes.factorings(4) + meshes.factorings(2) if m[0] > 1])
    tried = []

    @hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @hypothesis.given(
        mesh=sizes,
        vocabulary=st.one_of(st.integers(32, 1250), st.sampled_from([512, 1024, 1250])),
        rows=st.integers(1, 3),
        accumulate=st.integers(1, 3),
        length=st.integers(1, 8),
        position=st.sampled_from(["rope", "learned"]),
        tied=st.booleans(),
        masked=st.booleans(),
        sync=st.sampled_from(
            [("sync", "none"), ("sync", "int4"), ("sync", "topk"), ("stale", "int4"), ("diloco", "none")]
        ),
    )
    def no_stray(mesh, vocabulary, rows, accumulate, length, position, tied, masked, sync):
        replica, fsdp, tensor = mesh
        hypothesis.assume(small["model__num_kv_heads"] % tensor == 0)
        config = helpers.tiny(
            **small, data__vocab_size=8 * vocabulary, data__batch_size=replica * fsdp * accumulate * rows,
            data__seq_len=8 * length, data__document_mask=masked, optimizer__accumulate=accumulate,
            model__position=position, model__tie_embeddings=tied, sync__strategy=sync[0], sync__codec=sync[1],
        )  # fmt: skip
        assert strays(helpers.build(config, mesh)) == {}
        tried.append(mesh)

    no_stray()
    assert len(tried) >= 100

"""Layers before those with experts, each with one feed-forward half: what they compute tests/test_experts.py holds to a
plain derivation; here, that they lie and train alike on every mesh, with every strategy, with adapters, and come back.
"""

import functools

import helpers
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_another_mesh import go_on, owed, same_owed, saved

from model.families import FAMILIES
from parallel.cost import wire
from parallel.exchange import units
from parallel.layout import ring
from recipes import context, describe, predicted
from recipes.programs import compile_steps
from runtime.config import UsageError

SLOW = pytest.mark.slow
DENSE = {"model__dense_layers": 2, "model__dense_dim": 96} | helpers.dropless(4)
ONE = (1, 1, 1, 1, 1, 1)


@functools.cache
def one_device(masked: bool) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    config = helpers.tiny(data__document_mask=masked, **DENSE)
    parts = helpers.build(config, ONE)
    return helpers.losses(config, parts, 8, True), helpers.first_gradients(config, parts, True)


# replica × stage × fsdp × expert × context × tensor
CASES = [
    ((1, 2, 1, 2, 2, 1), {"optimizer__accumulate": 2, "data__document_mask": True}),
    ((2, 1, 1, 2, 1, 2), {}),
    ((1, 2, 2, 1, 1, 2), {"optimizer__accumulate": 4, "pipeline__remat": "stage", "compute__remat": "full"}),
    ((1, 2, 1, 1, 2, 2), {"optimizer__accumulate": 2, "model__num_layers": 2, "attention__context": "gather"}),
    ((1, 1, 2, 2, 1, 1), {"compute__unroll": True}),
    ((1, 1, 2, 2, 1, 2), {"optimizer__accumulate": 2, "compute__remat": "none", "data__document_mask": True}),
    ((2, 1, 2, 2, 1, 1), {"sync__exchange": "backward", "sync__codec": "none"}),
]


@pytest.mark.parametrize(
    ("mesh", "more"),
    [pytest.param(*case, marks=[] if i == 0 else [SLOW]) for i, case in enumerate(CASES)],
    ids=lambda x: helpers.name(x) if isinstance(x, tuple) else None,
)
def test_every_mesh_trains_like_one_device(mesh, more):
    config = helpers.tiny(**DENSE | more)
    parts = helpers.build(config, mesh)
    wanted, wanted_gradients = one_device(config.data.document_mask)
    assert wanted[-1] < 0.9 * wanted[0]
    assert helpers.relative(helpers.losses(config, parts, 8, True), wanted) <= 5e-6
    gradients = {} if config.sync.exchange == "backward" else helpers.first_gradients(config, parts, True)
    total = np.sqrt(sum(np.sum(g**2) for g in wanted_gradients.values()))
    assert any(name.startswith("first/") for name in wanted_gradients)
    for name, found in gradients.items():
        bound = 1e-5 * max(np.linalg.norm(wanted_gradients[name]), 1e-3 * total)
        assert np.linalg.norm(found - wanted_gradients[name]) <= bound, name


@SLOW
@pytest.mark.parametrize("name", helpers.EXCHANGES)
def test_over_replica_goes_the_exchange_alone_and_the_loss_falls(name):
    config = helpers.tiny(**DENSE, **helpers.EXCHANGES[name])
    helpers.check_exchange_alone(config, helpers.build(config, (2, 1, 2, 2, 1, 1)))


@SLOW
@pytest.mark.parametrize("more", [
    {"sync__strategy": "streaming", "sync__interval": 2, "sync__fragments": 2, "sync__codec": "int4"},
    {"optimizer__name": "muon"},
], ids=["streaming", "muon"])  # fmt: skip
def test_it_trains(more):
    config = helpers.tiny(**DENSE, **more)
    parts = helpers.build(config, (2, 1, 1, 2, 1, 1))
    found = helpers.losses(config, parts, 16)
    assert found[-1] < found[0] - 0.3


@SLOW
def test_a_sample_is_what_one_device_writes():
    assert helpers.sampled((1, 2, 1, 2, 2, 1), **DENSE) == helpers.sampled(ONE, **DENSE)


@SLOW
@pytest.mark.parametrize("mesh", [(1, 2, 1, 1, 2, 2), (1, 1, 2, 1, 4, 1)], ids=helpers.name)
def test_what_their_attention_sends_over_context_is_said(mesh):
    config = helpers.tiny(**DENSE, optimizer__accumulate=2, attention__context="ring", compute__remat="full")
    parts = helpers.build(config, mesh)
    (program,) = compile_steps(parts, helpers.QUICKLY).values()
    found = [c.sent for c in wire.collectives(program.as_text(), parts.mesh) if ring.SCOPE in c.scope]
    assert sum(found) == context.sent(config, parts)


@SLOW
def test_a_run_goes_on_on_another_mesh_and_owes_what_it_owed(tmp_path):
    config = helpers.tiny(sync__codec="int4", **DENSE)
    old, state, _ = saved(tmp_path, config, (2, 2, 1, 2, 1, 1), 3)
    parts, restored, step, _ = go_on(tmp_path, config, (2, 1, 2, 1, 1, 2))
    assert step == 3
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored.params), jax.device_get(state.params))
    same_owed(owed(old, state), owed(parts, restored))


def test_they_count_matrices_and_are_cut_over_stages_by_the_model_dimension():
    parts = helpers.build(helpers.tiny(sync__codec="powersgd", **DENSE), (2, 2, 2, 1, 1, 1))
    leaves = {leaf.name: leaf for leaf in jax.tree.leaves(units.leaves(parts.param_shapes, parts.task.axes))}
    up = leaves["first/mlp/up"]
    assert up.matrix == (2, 64, 96) and up.spec == P(None, ("fsdp", "expert", "stage", "context"), "tensor")
    assert leaves["blocks/mlp/up"].matrix == (2 * 4, 64, 128)


def test_they_are_said_and_counted():
    config = helpers.tiny(**DENSE)
    parts = helpers.build(config, (1, 1, 4, 2, 1, 1))
    (program,) = compile_steps(parts, helpers.QUICKLY).values()
    shown = dict(describe.read(config, parts, {"step": program}, {}, {})[0])
    assert shown["experts"].startswith("4, 2 of a token, 2 layers before without, balanced by a loss; ")
    less = helpers.build(helpers.tiny(**DENSE | {"model__dense_layers": 1}), ONE).task.flops()
    attention, mlp = 4 * 64 * 64, 3 * 64 * 96
    assert parts.task.flops() - less == 6 * (attention + mlp) + 12 * 64 * parts.task.units
    sent = wire.per_axis(program.as_text(), parts.mesh)
    said = predicted.of(config, parts).wire
    assert said["expert"] == pytest.approx(sent["expert"], rel=1e-3)
    assert said["fsdp"] == pytest.approx(sent["fsdp"], rel=0.05)


def test_only_families_that_have_some_are_theirs():
    assert [name for name, family in FAMILIES.items() if any(row.is_first for row in family.rows)] == ["qwen3_moe"]


@pytest.mark.parametrize(("more", "said"), [
    ({"model__dense_layers": 1, "model__experts": 4}, ["model.dense_layers=1", "model.dense_dim", "256"]),
    ({"model__dense_layers": -1, "model__dense_dim": 8, "model__experts": 4}, ["model.dense_layers=-1", "at least 0"]),
])  # fmt: skip
def test_what_cannot_be_is_said(more, said):
    with pytest.raises(UsageError) as error:
        helpers.build(helpers.tiny(**more), ONE)
    assert all(word in str(error.value) for word in said), error.value

"""Going on with another R, mesh, codec or strategy: what is owed stays owed, and what is dropped is said."""

import helpers
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from parallel.exchange import fold, units
from parallel.exchange.codecs import rounds
from parallel.layout import mesh as meshes
from parallel.layout import roles
from recipes import phases
from recipes.programs import compile_steps, shardings_of
from runtime import runs
from runtime.checkpoint import Checkpoints, load_params
from runtime.digest import named_arrays, params_digest

SLOW = pytest.mark.slow


def steps(config, mesh, count: int, state=None, first: int = 0):
    parts = helpers.build(config, mesh)
    programs = compile_steps(parts, helpers.QUICKLY)
    state = helpers.init_state(config, parts) if state is None else state
    losses, K = [], parts.strategy.steps_per_call
    for n in range(first, first + count, K):
        program = programs[parts.strategy.program_at(n, 10**6)]
        rows = [helpers.batch(config, parts, n + i) for i in range(K)]
        batch = jax.device_put(jax.tree.map(lambda *x: np.concatenate(x), *rows), shardings_of(parts.batch))
        state, metrics = program(state, batch)
        losses.append(float(np.mean(metrics["loss"])))
    return parts, state, losses


def owed(parts, state) -> dict[str, np.ndarray]:
    """ē of each parameter: mean of the workers' residuals + the server's, and what is in flight, as a mean too."""
    leaves = jax.tree.leaves(units.leaves(parts.param_shapes, parts.task.axes))
    arrays = jax.device_get(named_arrays(state))
    kinds = phases.kinds(parts.phases[0])
    found = {leaf.name: np.zeros(leaf.shape) for leaf in leaves}
    servers = {name: x for name, x in arrays.items() if fold.server_of(name)}
    for name, own in fold.owners(list(servers), leaves).items():
        for leaf, x in jax.jit(lambda x, name=name, own=own: fold.unfold(name, x, own))(servers[name]).items():
            found[leaf] += np.asarray(x, np.float64)
    for name, x in arrays.items():
        if kinds[name] == roles.IN_FLIGHT or name.startswith("codec/worker/"):
            leaf = next(leaf.name for leaf in leaves if name.endswith(f"/{leaf.name}"))
            found[leaf] += np.asarray(x, np.float64).mean(axis=0)
    return found


def same_owed(theirs: dict[str, np.ndarray], ours: dict[str, np.ndarray]) -> None:
    assert any(np.any(x) for x in theirs.values()), "something is owed, else this shows nothing"
    for name, x in theirs.items():
        np.testing.assert_allclose(ours[name].reshape(x.shape), x, rtol=1e-5, atol=1e-6 * np.abs(x).max(), err_msg=name)


def go_on(folder, config, mesh):
    parts, notes = helpers.build(config, mesh), []
    state, step = Checkpoints(folder).restore(lambda _: parts.state, notes.append, phases.adapter(parts))
    return parts, state, step, notes


def saved(folder, config, mesh, count: int):
    parts, state, losses = steps(config, mesh, count)
    checkpoints = Checkpoints(folder, kinds=phases.kinds(parts.phases[0]))
    checkpoints.save(count, state, None)
    checkpoints.close()
    return parts, state, losses


def options(codec: str, **more):
    return helpers.tiny(sync__codec=codec, **more)


@SLOW  # in the default run test_seams.py::test_what_is_owed_of_pieces_is_conserved, on a model that is not trained
@pytest.mark.parametrize("codec", ["int4", "topk", "sign"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((4, 2, 1), (4, 1, 2)), ((4, 2, 1), (2, 2, 1)), ((2, 1, 1), (4, 2, 1)),
        ((4, 1, 2, 1), (4, 2, 1)), ((4, 2, 1), (2, 1, 2, 2)),
    ],
)  # fmt: skip
def test_residuals_are_folded_onto_another_mesh_and_number_of_replicas(tmp_path, codec, before, after, monkeypatch):
    monkeypatch.setattr(units, "SMALL", 2**11)  # some arrays together, some by themselves, some in pieces
    monkeypatch.setattr(rounds, "PIECE", 2**11)
    old, state, _ = saved(tmp_path, options(codec), before, 3)
    pieces = [unit.pieces for unit in old.strategy.exchange.units]
    assert min(pieces) == 1 and max(pieces) > 1, pieces
    parts, restored, step, notes = go_on(tmp_path, options(codec), after)
    assert step == 3
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored.params), jax.device_get(state.params))
    same_owed(owed(old, state), owed(parts, restored))
    if before != (2, 1, 1):
        assert any("nothing owed is lost" in note for note in notes) or codec == "topk", notes
    steps(options(codec), after, 2, restored, first=3)


ONCE, TWICE = ({"model__num_layers": 4, "pipeline__interleave": count} for count in (1, 2))


@pytest.mark.parametrize(
    ("before", "counted", "after", "recounted"),
    [
        ((4, 2, 1, 1, 1), TWICE, (2, 2, 1, 1, 1), ONCE),
        *(
            pytest.param(*case, marks=SLOW)
            for case in [
                ((4, 2, 1, 1, 1), ONCE, (4, 2, 1, 1, 1), TWICE),
                ((4, 2, 1, 1, 1), TWICE, (4, 2, 1), ONCE),
                ((4, 1, 2), ONCE, (2, 2, 2, 1, 1), TWICE),
                ((2, 2, 2, 1, 1), TWICE, (2, 4, 1, 1, 1), ONCE),
                ((4, 2, 1, 1, 1), TWICE | {"model__num_layers": 8}, (4, 2, 1, 1, 1), {"model__num_layers": 8,
                 "pipeline__interleave": 4}),
            ]
        ),
    ],
    ids=str,
)  # fmt: skip
def test_layers_that_stages_have_in_other_runs_are_the_same_layers(tmp_path, before, counted, after, recounted):
    """pipeline.interleave has changed: a state is read by the order of its layers, to the bit."""
    old, state, _ = saved(tmp_path, options("int4", **counted), before, 2)
    parts, restored, step, notes = go_on(tmp_path, options("int4", **recounted), after)
    assert step == 2
    wanted, found = (jax.device_get(named_arrays(s)) for s in (state, restored))
    for name, x in found.items():
        if name.startswith(("params/", "opt/")):
            np.testing.assert_array_equal(x.reshape(wanted[name].shape), wanted[name], err_msg=name)
    same_owed(owed(old, state), owed(parts, restored))
    assert before[0] == 2 or any("nothing owed is lost" in note for note in notes), notes  # of two, none is a server's
    given = load_params(tmp_path, parts.state.params, notes.append)
    assert given.digest == params_digest(state.params)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(given.params), jax.device_get(restored.params))


def test_weights_of_another_shape_are_no_other_runs_of_layers():
    """Of a caller's model, whose layers are no runs: arrays of as many numbers are not taken for each other."""
    shaped = lambda shapes: {f"params/blocks/{name}": {"shape": list(x)} for name, x in shapes.items()}
    abstract = lambda shapes: {
        f"params/blocks/{name}": jax.ShapeDtypeStruct(
            x, np.float32, sharding=NamedSharding(meshes.build({}, jax.devices()[:1]), P("stage"))
        )
        for name, x in shapes.items()
    }
    for old, new in (
        ({"w": (4, 64)}, {"w": (2, 128)}),
        ({"w": (8,)}, {"w": (2, 4)}),
        ({"w": (2, 4)}, {"w": (8,)}),
        ({"b": (4, 64), "w": (4, 64, 3)}, {"b": (2, 128), "w": (2, 128, 3)}),
    ):
        record = {"arrays": shaped(old)}
        assert runs.translate(record, abstract(new)) == record


@SLOW
def test_the_next_losses_are_those_of_the_old_mesh():
    """Without a codec there is nothing to fold, and 4 replicas or 2 train alike."""
    config = options("none")
    parts, state, _ = steps(config, (4, 1, 1), 3)
    _, _, expected = steps(config, (4, 1, 1), 3, state, first=3)
    _, _, found = steps(config, (2, 2, 1), 6)
    assert helpers.relative(np.array(found[3:]), np.array(expected)) <= 5e-6


@SLOW
@pytest.mark.parametrize(
    ("codec", "other", "said"),
    [
        ("int4", "int8", "dropped, for there is no place for it now: codec/server"),
        ("int4", "topk", "nothing owed is lost"),
        ("powersgd", "topk", "dropped, for there is no place for it now: codec/rounds"),
        ("topk", "powersgd", "begun anew, for it has another shape or was not there: codec/rounds"),
    ],
)
def test_another_codec_keeps_what_is_owed_and_says_what_is_dropped(tmp_path, codec, other, said):
    saved(tmp_path, options(codec), (4, 1, 1), 2)
    parts, restored, _, notes = go_on(tmp_path, options(other), (4, 1, 1))
    assert any(said in note for note in notes), notes
    if other != "int8":
        assert any(np.any(np.asarray(x)) for x in jax.tree.leaves(restored.codec["worker"])), "still owed"
    steps(options(other), (4, 1, 1), 1, restored, first=2)


@SLOW
def test_local_replicas_go_on_from_their_mean(tmp_path):
    config = options("int4", sync__strategy="diloco", sync__interval=4)
    _, state, _ = saved(tmp_path, config, (4, 1, 1), 6)  # two steps into the second round
    _, restored, _, notes = go_on(tmp_path, config, (2, 1, 1))
    old, new = state.strategy["replicas"]["params"], restored.strategy["replicas"]["params"]
    for a, b in zip(jax.tree.leaves(old), jax.tree.leaves(new), strict=True):
        assert b.shape[0] == 2
        np.testing.assert_allclose(np.asarray(b).mean(axis=0), np.asarray(a).mean(axis=0), rtol=1e-6, atol=1e-8)
    assert any("as its mean" in note for note in notes)
    steps(config, (2, 1, 1), 2, restored, first=6)


@SLOW  # in the default run: test_seams.py, with nothing trained
def test_the_same_mesh_and_codec_restores_the_same_bits(tmp_path):
    _, state, _ = saved(tmp_path, options("int4"), (4, 2, 1), 2)
    _, restored, _, notes = go_on(tmp_path, options("int4"), (4, 2, 1))
    assert not notes
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))


# (strategy, mesh) before and after: what is owed and in flight belongs to the same unit.
CHANGES = [
    ("streaming", (4, 2, 1), "diloco", (4, 2, 1)),
    ("streaming", (4, 1, 1), "streaming", (4, 2, 1)),
    ("stale", (4, 1, 1), "stale", (4, 2, 1)),
    ("stale", (4, 1, 1), "sync", (2, 2, 1)),
    ("eager", (4, 1, 1), "eager", (4, 2, 1)),
    ("eager", (4, 1, 1), "diloco", (2, 1, 1)),
    ("diloco", (2, 2, 1), "streaming", (4, 1, 1)),
]


@SLOW  # in the default run test_seams.py::test_a_few_changes_of_mesh_and_replicas, on a model that is not trained
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_what_is_owed_and_in_flight_is_conserved_by_a_change_of_mesh_and_strategy(tmp_path, change):
    before, mesh, after, other = change
    local = {"sync__interval": 2, "sync__outer__optimizer": "sgd"}
    more = {"sync": {}, "stale": {"sync__staleness": 2}}
    make = lambda strategy: options("int4", sync__strategy=strategy, **more.get(strategy, local))
    parts, state, _ = saved(tmp_path, make(before), mesh, 4)
    changed, restored, step, notes = go_on(tmp_path, make(after), other)
    assert step == 4 == int(restored.step)
    same_owed(owed(parts, state), owed(changed, restored))
    if before == after:
        assert bool(in_flight(restored)) == bool(in_flight(state))
    named, arrays = " ".join(notes), (named_arrays(x) for x in (state, restored))
    old, new = (jax.device_get(x) for x in arrays)
    for name in {*old, *new}:
        same = name in old and name in new and old[name].shape == new[name].shape
        if not (same and np.array_equal(old[name], new[name])):
            assert name in named, f"{name} is another one, and that is not said: {notes}"


def in_flight(state) -> bool:
    """Whether a message waits to be applied."""
    return any(bool(x) for name, x in named_arrays(state).items() if name.endswith("finite"))


@SLOW
def test_a_synchronous_run_goes_on_with_a_local_strategy_from_its_parameters_and_its_optimizer(tmp_path):
    """Pretraining, then DiLoCo, as it was published."""
    _, state, _ = saved(tmp_path, options("none"), (2, 2, 1), 3)
    for strategy in ("diloco", "streaming", "eager"):
        config = options("int4", sync__strategy=strategy, sync__interval=2)
        K = 2 if strategy == "eager" else 1
        parts, restored, _, notes = go_on(tmp_path, config, (2, 2, 1))
        own = restored.strategy["replicas"]
        for shared, theirs in ((state.params, own["params"]), (state.opt, own["opt"])):
            jax.tree.map(lambda a, b: np.testing.assert_array_equal(*np.broadcast_arrays(a, b)), shared, theirs)
        assert any("made for every replica from what all share" in note for note in notes)
        assert parts.strategy.steps_per_call == K

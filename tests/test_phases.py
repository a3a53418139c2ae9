"""sync.warm_steps: the first steps of a run are synchronous, in float32, and then another strategy begins."""

import helpers
import jax
import numpy as np
import pytest

import recipes.fit
from data.loader import Loader
from recipes import describe, methods, phases
from recipes.programs import compile_steps
from runtime.checkpoint import Checkpoints
from runtime.config import UsageError
from runtime.digest import named_arrays

WARM, LAST, H = 4, 8, 2
MESH = (2, 2, 1)
LOCAL = {"sync__interval": H}
CASES = {
    "diloco int4": LOCAL | {"sync__strategy": "diloco", "sync__codec": "int4"},
    "sync powersgd": {"sync__codec": "powersgd"},
    "stale int4": {"sync__strategy": "stale", "sync__codec": "int4"},
    "streaming fp4": LOCAL | {"sync__strategy": "streaming", "sync__codec": "fp4", "sync__overlap": 1},
    "eager int4": LOCAL | {"sync__strategy": "eager", "sync__codec": "int4"},
    "diloco none, adam outside": LOCAL | {"sync__strategy": "diloco", "sync__outer__optimizer": "adam"},
}
DILOCO = CASES["diloco int4"]


def config_of(case: dict, **more):
    return helpers.tiny(steps=LAST, eval_every=LAST, checkpoint__every=0, **case, **more)


def run(parts, programs, state, start: int, config) -> recipes.fit.Steps:
    loader = Loader(helpers.text(), seq_len=config.data.seq_len, batch_size=config.data.batch_size, seed=0)
    return recipes.fit.Steps(parts, programs, state, loader, start, LAST)


def kept(folder, parts, states: dict[int, object]) -> None:
    kinds = {name: kind for phase in parts.phases for name, kind in phases.kinds(phase).items()}
    checkpoints = Checkpoints(folder, keep=len(states) + 1, kinds=kinds)
    for step, state in states.items():
        checkpoints.save(step, state, None)
    checkpoints.close()


def trained(parts, programs, state, start, config, folder=None, at=()) -> dict[str, np.ndarray]:
    """Arrays at the end; on the way, checkpoints of these steps in the folder."""
    updates = run(parts, programs, state, start, config)
    for state, _ in updates:
        if updates.done in at:
            kept(folder / str(updates.done), parts, {updates.done: state})
    assert updates.done == LAST
    return jax.device_get(named_arrays(state))


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_it_is_a_synchronous_run_that_goes_on_with_another_strategy(tmp_path, case):
    """To the bit, in every array; and so is a run that is stopped before the border, at it, or after it."""
    stops = (WARM - 2, WARM, LAST - H)
    plain, cold = helpers.build(config_of({}), MESH), helpers.build(config_of(CASES[case]), MESH)
    config = config_of(CASES[case], sync__warm_steps=WARM)
    warm = helpers.build(config, MESH)
    programs = compile_steps(warm, helpers.QUICKLY)
    found = trained(warm, programs, helpers.init_state(config, warm), 0, config, tmp_path, stops)

    exact = {"step": programs["warm step"]}
    updates = run(plain, exact, helpers.init_state(config, plain), 0, config)
    stopped = next(state for state, _ in updates if updates.done == WARM)
    kept(tmp_path / "plain", plain, {WARM: stopped})
    restored, step = Checkpoints(tmp_path / "plain").restore(lambda _: cold.state, print, phases.adapter(cold))
    after = {name: program for name, program in programs.items() if not name.startswith("warm ")}
    same(found, trained(cold, after, restored, step, config))

    state_at = lambda step: phases.at(warm, step).state
    for stop in stops:
        restored, step = Checkpoints(tmp_path / str(stop)).restore(state_at, print, phases.adapter(warm))
        assert step == stop
        same(found, trained(warm, programs, restored, step, config))


@pytest.mark.slow  # in the default run: bytes of each phase by itself, as everywhere
def test_its_bytes_are_those_of_both_phases():
    """Counted in the compiled programs: whole gradients in the first steps, then one exchange a round."""
    bytes_of = {}
    for name, case in {"warm": DILOCO | {"sync__warm_steps": WARM}, "cold": DILOCO, "plain": {}}.items():
        parts = helpers.build(config_of(case), MESH)
        programs = compile_steps(parts, helpers.QUICKLY)
        bytes_of[name] = describe.wire_bytes(parts, describe.traffic(parts, programs), LAST)["replica"]
    mean = (WARM * bytes_of["plain"] + (LAST - WARM) * bytes_of["cold"]) / LAST
    assert bytes_of["plain"] > 4 * bytes_of["cold"] and bytes_of["warm"] == pytest.approx(mean, abs=1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (DILOCO | {"sync__warm_steps": LAST}, "sync.warm_steps=8: must be less than steps=8"),
        (DILOCO | {"sync__warm_steps": 3}, "sync.warm_steps=3 is not a multiple of sync.interval=2.*2 or 4"),
        ({"sync__warm_steps": 4}, "with sync.strategy=sync and sync.codec=none all steps are like that"),
        (
            {"sync__warm_steps": 4, "sync__codec": "sign", "optimizer__name": "onebit_adam"},
            "has a warm-up of its own, optimizer.freeze_steps",
        ),
    ],
)
def test_what_cannot_be_is_said(changes, said):
    config = config_of({})
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    with pytest.raises(UsageError, match=said):
        methods.validate(config)

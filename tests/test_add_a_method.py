"""docs/add-a-method.md is a tutorial that runs: its two blocks of code are taken out of the page and tested here.

The codec goes through tests/test_exchange.py itself, which is what the page promises to whoever adds one.
"""

import dataclasses
import importlib.util
import re
import shlex
import subprocess
import sys

import helpers
import jax
import numpy as np
import pytest
import taken_out
import test_exchange
import test_strategies

from parallel.cost import wire
from parallel.cost.bytes import exchange_bytes
from parallel.exchange.codecs import CODECS
from parallel.layout import roles, rules
from parallel.strategies import local
from parallel.strategies.base import Strategy
from parallel.strategies.sync import Sync
from recipes import describe, methods
from recipes.programs import compile_steps
from runtime.progress import on_host

PAGE = helpers.ROOT / "docs" / "add-a-method.md"
CASE = ("int6", ())
FORMS = pytest.mark.parametrize("algorithm", ["gather", "two_stage"])


def block(kind: str) -> str:
    """The page's code block of this kind."""
    (found,) = re.findall(rf"^```python {kind}\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """(the codec's class, the strategy's class), imported from what the page shows."""

    def load(kind: str, name: str):
        file = tmp_path_factory.mktemp("page") / f"{kind}.py"
        file.write_text(block(kind))
        spec = importlib.util.spec_from_file_location(f"page_{kind}", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, name)

    return load("codec", "Int6"), load("strategy", "PostLocal")


@pytest.fixture
def registered(page, monkeypatch):
    """The codec, registered as the page says."""
    monkeypatch.setitem(CODECS, "int6", page[0])
    monkeypatch.setitem(test_exchange.ERROR, "int6", 0.05)
    return page[0]


def test_the_blocks_are_as_short_as_the_page_says():
    assert "A codec in 30 lines and a strategy in 60" in PAGE.read_text()
    assert len(block("codec").splitlines()) <= 30
    assert len(block("strategy").splitlines()) <= 60
    assert all(len(line) <= 120 for kind in ("codec", "strategy") for line in block(kind).splitlines())


# ── the codec ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_codec_reads_the_keys_that_are_its_fields(registered):
    assert {field.name for field in dataclasses.fields(registered)} == methods.known().codecs["int6"] == set()


def round_trip(codec, x: np.ndarray) -> tuple[dict, np.ndarray]:
    """(message, what it decodes to)."""

    def both(x):
        message = codec.encode(x, None)
        return message, codec.decode(message)

    return jax.device_get(jax.jit(both, compiler_options=helpers.QUICKLY)(x.reshape(-1)))


def test_every_code_comes_back(registered):
    """All 63 levels, with a scale that bfloat16 holds exactly."""
    codec = registered()
    x = np.zeros((2, codec.block), np.float32)
    x[0, :63] = np.arange(-31, 32) * 0.25
    x[1, :63] = np.arange(31, -32, -1) * 8.0
    message, decoded = round_trip(codec, x)
    np.testing.assert_array_equal(decoded, x.reshape(-1))
    assert sum(m.nbytes for m in message.values()) == codec.wire(x.size)["u8"]


def test_the_error_is_within_what_the_page_says(registered):
    codec, x = registered(), np.random.default_rng(0).standard_normal(64 * 128).astype(np.float32)
    error = np.abs(round_trip(codec, x)[1] - x).reshape(-1, codec.block)
    # The scale is rounded up to bfloat16: by up to 2^-7 of itself.
    assert np.all(error.max(axis=1) <= np.abs(x).reshape(-1, codec.block).max(axis=1) / 62 * (1 + 2**-7) + 1e-6)


def test_bytes_per_element_are_what_the_page_says(registered):
    each = sum(registered().wire(128 * 1000).values()) / (128 * 1000)
    assert f"0.75 + 2/128 = {each:.3f} bytes an element" in PAGE.read_text()


@FORMS
def test_the_exchange_is_the_mean_over_replicas(registered, algorithm, monkeypatch):
    monkeypatch.setitem(test_exchange.ERROR, CASE[0], 0.05)
    test_exchange.test_the_exchange_is_the_mean_over_replicas_as_exactly_as_the_codec_promises(CASE, algorithm)


@pytest.mark.slow  # in the default run: the same of the codecs that there are
def test_replicas_on_any_number_of_devices_give_the_same_bits(registered):
    test_exchange.test_replicas_on_any_number_of_devices_give_the_same_bits(CASE, "two_stage")


@FORMS
def test_nothing_is_lost_what_is_applied_and_what_is_owed_add_up(registered, algorithm):
    test_exchange.test_nothing_is_lost_what_is_applied_and_what_is_owed_add_up(CASE, algorithm, 0.95)


def test_zeros_stay_zeros_and_are_survived(registered):
    test_exchange.test_zeros_stay_zeros_and_are_survived(CASE, "two_stage")


@FORMS
def test_the_exchange_sends_the_bytes_of_the_closed_form(registered, algorithm):
    test_exchange.test_the_compiled_exchange_sends_the_bytes_of_the_closed_form((2, 2, 2), CASE, algorithm)


# ── the strategy ─────────────────────────────────────────────────────────────────────────────────────────────────


def of(kind, parts, **fields):
    """These parts with another strategy, that shares what all strategies share."""
    shared = {field.name: getattr(parts.strategy, field.name) for field in dataclasses.fields(Strategy)}
    strategy = kind(**fields, **shared)
    state = jax.eval_shape(lambda: strategy.init(parts.task.init(jax.random.key(0))))
    shardings = rules.shardings(parts.mesh, roles.specs_of(strategy.declare(state)))
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
    return helpers.replaced(parts, strategy=strategy, state=state)


@pytest.mark.slow  # in the default run: what the strategy equals, on the problem of test_strategies.py, below
def test_the_strategy_trains_and_sends_the_bytes_that_the_page_says(page, registered):
    """With the page's codec: 5 exchanges at the start, then after steps 8 and 12, and after 14, the last."""
    config, steps = helpers.tiny(sync__codec="int6", optimizer__lr=4e-3), 14
    parts = of(page[1], helpers.build(config, (4, 1, 1)), interval=4, together=5)
    exchange = parts.strategy.exchange
    assert exchange.feedback, "the codec wants it"
    names = [parts.strategy.program_at(step, steps) for step in range(steps)]
    assert [step + 1 for step, name in enumerate(names) if name == "inner+exchange"] == [1, 2, 3, 4, 5, 8, 12, 14]

    programs, scalar = compile_steps(parts, helpers.QUICKLY), 2 * 4 * 2 * 3 / 4
    sent = {name: wire.count(program.as_text(), parts.mesh) for name, program in programs.items()}
    expected = exchange_bytes(exchange)
    assert sent == {"inner": {}, "inner+exchange": {"replica": expected | {"f32": scalar}}}
    average = describe.wire_bytes(parts, describe.traffic(parts, programs), steps)["replica"]
    assert average == round(8 / steps * (sum(expected.values()) + scalar))

    state, losses = helpers.init_state(config, parts), []
    for step, name in enumerate(names):
        state, metrics = programs[name](state, helpers.batch(config, parts, step))
        losses.append(float(on_host(metrics)["loss"][0]))
    assert losses[-1] < losses[0] - 0.8, losses
    own_R = jax.device_get(state.strategy["replicas"]["params"])
    jax.tree.map(lambda x_R, x: np.testing.assert_array_equal(x_R, np.broadcast_to(x, x_R.shape)), own_R, state.params)


def toy(kind, steps: int, **fields):
    """Final parameters of 3 replicas on the least-squares problem of tests/test_strategies.py."""
    strategy, params = test_strategies.toy(kind, 3, **fields)
    return test_strategies.run_toy(strategy, params, *test_strategies.toy_batches(3, steps))


def same(found, expected) -> None:
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=2e-6, atol=1e-7)


@pytest.mark.slow
def test_without_a_start_together_it_is_diloco_that_takes_the_mean(page):
    outer = local.Outer("sgd", 1.0, 0.0)
    same(toy(page[1], 10, interval=4, together=0), toy(local.DiLoCo, 10, interval=4, outer=outer))


def test_with_an_exchange_after_every_step_it_is_synchronous_sgd(page):
    same(toy(page[1], 10, interval=4, together=10), toy(Sync, 10))


def test_a_replica_with_a_gradient_of_nan_leaves_out_its_step(page):
    strategy, params = test_strategies.toy(page[1], 3, interval=2, together=0)
    state, (x, y) = jax.jit(strategy.init)(params), test_strategies.toy_batches(3, 2)
    for n in range(2):
        mask = np.ones((1, *y[n].shape, 1), np.float32)
        mask[0, 1] = np.nan if n == 0 else 1.0
        program = jax.jit(strategy.programs()[strategy.program_at(n, 2)])
        state, metrics = program(state, {"tokens": x[n][None], "targets": y[n][None, ..., None], "mask": mask})
    assert np.asarray(metrics["skipped"]).tolist() == [[0, 1, 0]]
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves((state.params, state.strategy)))
    assert any(np.any(a != b) for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(params), strict=True))


# ── registered, in a copy of the project, and tested by the page's own commands ──────────────────────────────────

EDITS = {
    "int6": [
        (
            "parallel/exchange/codecs/__init__.py",
            "CODECS = {\n",
            "from parallel.exchange.codecs.int6 import Int6\n\nCODECS = {\n",
        ),
        ("parallel/exchange/codecs/__init__.py", "CODECS = {\n", 'CODECS = {\n    "int6": Int6,\n'),
        ("tests/test_exchange.py", "ERROR = {", 'ERROR = {"int6": 0.05, '),
    ],
    "postlocal": [
        (
            "recipes/methods.py",
            "\nSTRATEGIES: dict[str, type[Strategy]] = {\n",
            "\nfrom parallel.strategies.postlocal import PostLocal\n\nSTRATEGIES: dict[str, type[Strategy]] = {\n"
            '    "postlocal": PostLocal,\n',
        ),
        (
            "configs/base.py",
            "    c.sync.interval = 30",
            "    c.sync.together = 2  # postlocal: steps at the start that are each followed by an exchange\n"
            "    c.sync.interval = 30",
        ),
        ("runtime/config/keys.py", "sync.staleness sync.comp", "sync.together sync.staleness sync.comp"),
        ("tests/test_strategies.py", "OPTIONS = {\n", 'OPTIONS = {\n    "postlocal": {"sync__interval": 4},\n'),
        ("tests/test_resume.py", "STRATEGIES = {\n", 'STRATEGIES = {\n    "postlocal": "interval=4 together=2",\n'),
    ],
}


@pytest.fixture
def commands(tmp_path):
    """commands(name) registers the method in a copy of the project, and returns the command that tests it."""

    def commands(name: str) -> list[str]:
        taken_out.copy(tmp_path)
        kind, place = {
            "int6": ("codec", "exchange/codecs/int6.py"),
            "postlocal": ("strategy", "strategies/postlocal.py"),
        }[name]
        (tmp_path / "parallel" / place).write_text(block(kind))
        for file, before, after in EDITS[name]:
            text = (tmp_path / file).read_text()
            assert text.count(before) == 1, (file, before)
            (tmp_path / file).write_text(text.replace(before, after))
        (line,) = re.findall(rf"^python (-m pytest .*{name}.*)$", PAGE.read_text(), re.MULTILINE)
        return [sys.executable, *shlex.split(line), "-q", "-p", "no:cacheprovider"]

    return commands


def outcome(command: list[str], folder) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow  # in the default run the same tests are called by their names, above
def test_the_page_s_command_runs_every_test_of_the_codec(commands, tmp_path):
    printed = outcome(commands("int6"), tmp_path)
    assert int(re.findall(r"(\d+) passed", printed)[-1]) >= 28 and " failed" not in printed


@pytest.mark.slow
def test_the_page_s_command_selects_the_tests_of_the_strategy(commands, tmp_path):
    printed = outcome([*commands("postlocal"), "--collect-only"], tmp_path)
    for test in (
        "test_four_replicas_train_alike_on_every_mesh[mesh0-postlocal]",
        "test_every_program_sends_its_exchange_and_named_scalars_over_the_slow_axis_and_nothing_else[postlocal-int4]",
        "test_every_strategy_killed_and_resumed_ends_with_the_same_bits[postlocal-int4]",
    ):
        assert test in printed, test

"""The exchange inside the backward pass: bit for bit what the same messages do that are sent after it, no byte beyond
its closed form, and nothing lasting of a gradient that is refused."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import recipes.build
from parallel.cost import compilers, hardware, schedule, stray, targets, wire
from parallel.cost.bytes import exchange_bytes
from parallel.cost.hlo import Program
from parallel.exchange import residuals
from parallel.layout import mesh as meshes
from parallel.strategies.backward import BLOCKS, Backward, Layer
from parallel.strategies.base import take
from parallel.strategies.sync import Sync
from recipes import programs
from recipes.programs import compile_steps, shardings_of
from runtime.config import UsageError

SLOW = pytest.mark.slow
LAYERS = 4


@cache
def made(mesh: tuple[int, int, int], codec: str, **more) -> tuple[Any, Any, Any]:
    """(config, parts, its program)."""
    options = {"model__num_layers": LAYERS, "sync__codec": codec, "sync__exchange": "backward"} | more
    config = helpers.tiny(**options)
    parts = helpers.build(config, mesh)
    (program,) = compile_steps(parts).values()
    return config, parts, program


def afterwards(strategy: Backward) -> Any:
    """A step that sends the same messages, one layer after another, when all gradients are there."""
    after = Sync(**{name: x for name, x in vars(strategy).items() if name not in ("layer", "rest")})
    rest = lambda tree: {name: x for name, x in tree.items() if name != BLOCKS}
    state_of = lambda owed: residuals.nothing() | {"worker": owed}

    def step(state, batch_KRBT):
        messages_R, opt, new, _ = after.messages(state, take(batch_KRBT, 0))
        owed = state.codec["worker"]
        mean, codec = strategy.rest.mean(rest(messages_R), state_of(rest(owed)), state.step)
        layers, stack = [], lambda axis, trees: jax.tree.map(lambda *x: jnp.stack(x, axis), *trees)
        for layer in range(LAYERS):
            own = jax.tree.map(lambda x: x[:, layer], (messages_R[BLOCKS], owed.get(BLOCKS, {})))  # noqa: B023
            layers.append(strategy.layer.mean(own[0], state_of(own[1]), state.step * LAYERS + layer))
        mean[BLOCKS] = stack(0, [found for found, _ in layers])
        if owed:
            codec["worker"][BLOCKS] = stack(1, [found["worker"] for _, found in layers])
        state, used, _ = after.update(replace(state, opt=opt), mean, codec, new.applied)
        return replace(state, guard=after.guard.count(state.guard, new, used))

    return step


# With `tensor` and a lighter rematerialisation XLA lays out the products of two programs differently, and a gradient's
# last bit with them; with two micro-steps it takes apart the loop of one turn that sums them, and the embedding's last
# bit differs.
FULL = {"compute__remat": "full"}
CASES = [
    ((2, 2, 2), "int8", FULL),
    *(
        pytest.param(mesh, codec, more, marks=SLOW)
        for mesh, codec, more in [
            ((2, 4, 1), "int4", {"optimizer__accumulate": 4}),
            ((2, 2, 2), "none", FULL),
            ((4, 1, 2), "bf16", FULL),
            ((4, 1, 2), "int8", {"compute__remat": "none"}),
            ((2, 4, 1), "int4", {"sync__residual_dtype": "bfloat16", "model__tie_embeddings": False}),
        ]
    ),
]
# With these XLA:CPU adds a product to what is owed without rounding it first (a fused multiply-add), in one of the two
# programs and not in the other.
FUSED = [
    pytest.param(mesh, codec, more, marks=SLOW)
    for mesh, codec, more in [
        ((4, 2, 1), "int4", {}),
        ((4, 1, 2), "int4", FULL),
        ((2, 2, 2), "int4", FULL | {"optimizer__accumulate": 4}),
        ((2, 1, 1), "sign", {"sync__replicas": 4}),
        ((2, 2, 1), "topk", {"sync__replicas": 4}),
        ((2, 2, 2), "fp4", FULL | {"sync__stochastic": True}),
        ((1, 2, 2), "int4", FULL | {"sync__replicas": 2}),
        ((2, 2, 2), "int4", FULL | {"compute__dtype": "bfloat16", "model__norm": "layer", "model__bias": "all"}),
    ]
]
UNFUSED = "--xla_cpu_max_isa=AVX"  # which has no such instruction; XLA reads it once, when a process begins


@SLOW  # in the default run: what crosses the slow axis, below
@pytest.mark.parametrize(("mesh", "codec", "more"), CASES)
def test_a_step_is_that_of_the_same_messages_sent_after_the_backward_pass(mesh, codec, more):
    config, parts, program = made(mesh, codec, **more)
    expected = jax.jit(afterwards(parts.strategy), out_shardings=shardings_of(parts.state))
    here, there = helpers.init_state(config, parts), helpers.init_state(config, parts)
    for n in range(3):
        batch = helpers.batch(config, parts, n, uneven=True)
        here, metrics = program(here, batch)
        there = expected(there, batch)
    for name in ("params", "opt", "codec"):
        jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(getattr(x, name)) for x in (here, there)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), here.guard, there.guard)
    assert not metrics["skipped"][0] and np.isfinite(metrics["loss"][0])


@pytest.mark.parametrize(("mesh", "codec", "more"), FUSED)
def test_so_is_a_step_in_which_xla_would_round_one_of_the_two_otherwise(mesh, codec, more, request):
    flags = os.environ.get("XLA_FLAGS", "")
    if UNFUSED in flags:
        test_a_step_is_that_of_the_same_messages_sent_after_the_backward_pass(mesh, codec, more)
        return
    command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider", request.node.nodeid]
    environment = os.environ | {"XLA_FLAGS": f"{flags} {UNFUSED}".strip()}
    done = subprocess.run(command, cwd=helpers.ROOT, env=environment, capture_output=True, text=True)
    assert not done.returncode and "1 passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize(("mesh", "codec", "more"), CASES + FUSED)
def test_what_crosses_the_slow_axis_is_a_message_a_layer_one_more_and_the_ends(mesh, codec, more):
    _, parts, program = made(mesh, codec, **more)
    found = [c for c in wire.collectives(program.as_text(), parts.mesh) if c.axis == "replica"]
    sent: dict[str, float] = {}
    for c in found:
        if "/scalars_" not in c.scope:
            sent[c.dtype] = sent.get(c.dtype, 0) + c.sent
    layer, rest = exchange_bytes(parts.strategy.layer), exchange_bytes(parts.strategy.rest)
    assert sent == {dtype: (LAYERS + 1) * layer[dtype] + rest[dtype] for dtype in layer}
    messages = parts.strategy.exchanges()["step"]
    assert sum(sent.values()) == sum(sum(exchange_bytes(message).values()) for message in messages)


@SLOW
def test_a_gradient_that_is_refused_leaves_no_trace():
    """Not finite, or a spike: known only when all has been sent. Counted; what is owed, too, stays as it was."""
    config, parts, program = made((4, 2, 1), "int4")
    state, (first, second, third) = (
        helpers.init_state(config, parts),
        (helpers.batch(config, parts, n) for n in range(3)),
    )
    state, _ = program(state, first)

    def with_window(state: Any, norm: float) -> Any:
        """As if all gradients so far had this norm; −1: none."""
        window_W = state.guard.norms_W
        filled_W = jax.device_put(np.full(window_W.shape, norm, np.float32), window_W.sharding)
        return replace(state, guard=replace(state.guard, norms_W=filled_W))

    of = lambda state: jax.device_get((state.params, state.opt, state.codec))
    for count, (mask, norm) in enumerate([(np.nan, -1.0), (1.0, 1e-6)], start=1):
        before = of(state)
        state, metrics = program(with_window(state, norm), dict(second, mask=second["mask"] * np.float32(mask)))
        jax.tree.map(np.testing.assert_array_equal, of(state), before)
        assert metrics["skipped"][0] == count
        state, metrics = program(with_window(state, -1.0), third)
        assert np.isfinite(metrics["loss"][0]) and metrics["skipped"][0] == count
        assert not np.array_equal(jax.device_get(state.params["embed"]), before[0]["embed"])


@SLOW
def test_a_spike_that_stays_is_applied_scaled_to_the_limit():
    """After three refusals in a row; as `after` does it, but for what is owed."""
    ends = []
    for exchange in ("after", "backward"):
        config = helpers.tiny(sync__exchange=exchange, guard__window=2, optimizer__clip_norm=0.0, optimizer__name="sgd")
        parts = helpers.build(config, (2, 2, 1))
        (program,) = compile_steps(parts, helpers.QUICKLY).values()
        state = helpers.init_state(config, parts)
        window_W = jax.device_put(np.full((2,), 0.01, np.float32), state.guard.norms_W.sharding)
        state = replace(state, guard=replace(state.guard, norms_W=window_W))
        for _ in range(4):
            state, metrics = program(state, helpers.batch(config, parts, 0))
        assert (metrics["skipped"][0], metrics["clipped"][0]) == (3, 1)
        ends.append(jax.device_get(state.params))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7), *ends)


@SLOW
def test_a_run_that_is_resumed_ends_with_the_same_bits(tmp_path):
    options = ["--config.mesh.replica=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.sample.tokens=0"]
    options += ["--config.sync.codec=int4", "--config.sync.exchange=backward", "--config.checkpoint.every=2"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    helpers.run_here(whole, *options, "--config.steps=4")
    helpers.run_here(parts, *options, "--config.steps=2")
    done = helpers.run_here(parts, *options, "--config.steps=4")
    digests = [json.loads((workdir / "summary.json").read_text())["params_digest"] for workdir in (whole, parts)]
    assert digests[0] == digests[1] and "backward pass" in done.stdout


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"sync__codec": "powersgd"}, ["PowerSGD", "several rounds", "sync.exchange=after", "sync.codec"]),
        ({"sync__codec": "demo"}, ["DeMo", "several rounds"]),
        ({"sync__algorithm": "two_stage"}, ["sync.algorithm=two_stage", "one hop", "leave sync.algorithm out"]),
        ({"sync__algorithm": "psum"}, ["sync.algorithm=psum", "sync.exchange=after"]),
        ({"sync__strategy": "stale"}, ["sync.strategy=stale", "set sync"]),
        ({"sync__strategy": "diloco", "sync__interval": 4}, ["sync.strategy=diloco", "set sync"]),
        ({"optimizer__name": "signum"}, ["optimizer.name=signum", "momentum", "sync.exchange=after"]),
        ({"compute__unroll": True}, ["compute.unroll=True", "compute.unroll=False"]),
    ],
)
def test_what_cannot_be_sent_from_layer_to_layer_is_refused(options, parts):
    with pytest.raises(UsageError) as refused:
        helpers.tiny(sync__exchange="backward", **options)
    assert all(part in str(refused.value) for part in ["sync.exchange=backward", *parts])


def test_one_replica_has_nobody_to_exchange_with():
    with pytest.raises(UsageError, match=r"sync.exchange=backward with one replica: nothing is exchanged"):
        helpers.build(helpers.tiny(sync__exchange="backward"), (1, 2, 1))


# ── what hides it, on real chips' compilers ──────────────────────────────────────────────────────────────────────


def compiled(target: str, codec: str) -> tuple[list[wire.Collective], set[str]]:
    """(messages over the slow axis, names of what is under way while matrices are multiplied), of a step compiled for
    chips that are not here: large enough that weights are gathered in loops, and small enough to compile soon. It sends
    nothing that is not ours."""
    pytest.importorskip("libtpu" if "v5p" in target else "jax_cuda13_plugin", reason="see requirements-prove.txt")
    chips = targets.parse(target, hardware.by_name(hardware.CHIPS))
    compilers.prepare(chips.chip)
    replicas = chips.slices if chips.chip.is_tpu else chips.hosts
    config = helpers.tiny(
        model__model_dim=512, model__head_dim=128, model__num_heads=4, model__num_kv_heads=2, model__mlp_dim=2048,
        model__num_layers=6, data__seq_len=256, data__batch_size=32, compute__attention="reference",
        compute__dtype="bfloat16", compute__remat="full", sync__codec=codec, sync__exchange="backward",
    )  # fmt: skip
    sizes = {"replica": replicas, "fsdp": chips.chips // replicas, "tensor": 1}
    mesh = meshes.build(sizes, compilers.devices(chips))
    parts = recipes.build.build(config, mesh)
    text = programs.steps(parts)["step"]().compile(compiler_options=parts.xla_options).as_text()
    slow = [c for c in wire.collectives(text, mesh) if c.axis == "replica"]
    predicted = sum(sum(exchange_bytes(message).values()) for message in parts.strategy.exchanges()["step"])
    traffic = stray.traffic(SimpleNamespace(as_text=lambda: text), mesh, predicted)
    assert traffic.not_counted == "" and traffic.stray == 0, traffic
    assert all(c.dtype == "u8" or "/scalars_" in c.scope for c in slow), slow
    return [c for c in slow if c.dtype == "u8"], schedule.hidden(Program.read(text))


CHIPS = ("h100:2x4", "h100:4x2", "2xv5p-8", "4xv5p-8")


@pytest.mark.prove
@SLOW
@pytest.mark.parametrize("codec", ["int8", "int4"])
@pytest.mark.parametrize("target", CHIPS)
def test_every_layers_message_but_the_last_stands_around_matrix_products(target, codec):
    found, hidden = compiled(target, codec)
    in_loop = [c for c in found if "while/body" in c.scope]
    assert in_loop and all(c.name in hidden for c in in_loop)
    assert sum(c.sent for c in in_loop) >= 0.84 * sum(c.sent for c in found)


@pytest.mark.prove
@SLOW
@pytest.mark.parametrize("target", CHIPS[::2])
def test_a_message_that_is_received_in_the_turn_that_sends_it_is_not_hidden(target, monkeypatch):
    """So what is carried to the next layer is needed."""
    send, receive, sent = Layer.send, Layer.receive, {}

    def keep(self, *args):
        sent["slot"], *rest = found = send(self, *args)
        return found

    monkeypatch.setattr(Layer, "send", keep)
    monkeypatch.setattr(Layer, "receive", lambda self, _: receive(self, sent["slot"]))
    found, hidden = compiled(target, "int8")
    assert not [c.name for c in found if c.name in hidden]

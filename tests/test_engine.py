"""The engine says what the model says, and an answer's bits are those of its request alone."""

import threading
import time
from functools import cache
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from crowds import GREEDY, OCCUPANCIES, Crowd, pool_of, prompt

from parallel.layout import rules
from serving import ladder, sampling, weights
from serving.engine import Engine, Full, Ticket
from serving.lane import Lane
from serving.programs import Programs, bucket, buckets
from serving.requests import MOST_TOP, End, Request, Sampling

FAMILIES = {
    "llama": {"model__num_kv_heads": 4},
    "gpt2": {"model__norm": "layer", "model__mlp": "gelu", "model__position": "learned", "model__bias": "all",
             "model__tie_embeddings": True},
    "mistral": {"model__sliding_window": 6, "model__num_kv_heads": 2},
    "qwen2": {"model__bias": "qkv", "model__num_kv_heads": 4, "model__tie_embeddings": True},
    "qwen3": {"model__qk_norm": True, "model__head_dim": 16, "model__num_kv_heads": 4},
    "mixtral": {"model__experts": 4, "model__num_kv_heads": 4},
    "shared experts": {"model__experts": 4, "model__shared_experts": 1, "model__router": "sigmoid",
                       "model__balance": "bias", "model__normalise_gates": False},
    "dense first": {"model__experts": 4, "model__dense_layers": 2, "model__dense_dim": 96, "model__num_layers": 1},
}  # fmt: skip


class Made:
    """A random model, by itself and laid out for decoding. params: on the host."""

    def __init__(self, mesh: tuple[int, ...] = (1, 1, 1), family: str = "llama"):
        self.parts = helpers.build(helpers.tiny(model__init_std=0.2, **FAMILIES[family]), mesh)
        self.model, task = self.parts.task.model, self.parts.task
        shardings = rules.shardings(self.parts.mesh, rules.specs(task.axes))
        draw = lambda key: jax.tree.map(lambda x: x + 0.1 * jax.random.normal(key, x.shape), task.init(key))
        params = jax.jit(draw, out_shardings=shardings)(jax.random.key(0))
        self.params = jax.device_get(params)
        self.weights = weights.unstack(params, task.axes, self.model.config, jnp.float32, self.parts.mesh)
        self.used_up = jax.tree.leaves(params)

    def programs(self, rungs: list[int], lengths: list[int]) -> Programs:
        found = Programs(self.model.config, self.parts.mesh, jnp.dtype("float32"), self.weights, rungs, lengths)
        found.compile(self.parts.xla_options)
        return found

    def engine(self, programs: Programs, **options: Any) -> Engine:
        engine = Engine(programs, self.weights, "f0", 0, **options)
        engine.start()
        return engine

    def logprobs(self, ids: list[int]) -> np.ndarray:
        """[T, V], natural logarithms, as training has them: no keys or values kept."""
        tokens_BT = np.zeros((1, 32), np.int32)
        tokens_BT[0, : len(ids)] = ids
        return np.asarray(self._forward(self.params, tokens_BT))[0, : len(ids)]

    @property
    def _forward(self) -> Any:
        def forward(params: Any, tokens_BT: jax.Array) -> jax.Array:
            x_BTD, head_DV, _ = self.model.features(params, tokens_BT, rules.Constrain(None))
            return jax.nn.log_softmax(x_BTD @ head_DV)

        return jitted(self.model, forward)


@cache
def jitted(model: Any, forward: Any) -> Any:
    return jax.jit(forward)


made = cache(Made)


@cache
def small() -> tuple[Made, Programs]:
    """What the default run compiles."""
    found = made()
    return found, found.programs([4, 8], [32])


def check_against_training(made: Made, engine: Engine) -> None:
    for size in (1, 2, 11, 17):
        request = Request(prompt(size), 8, GREEDY, top_logprobs=3, echo=True)
        tokens, end = engine.answer(request)
        ids = [token.id for token in tokens]
        assert end == End("length") and len(ids) == size + 8 and tuple(ids[:size]) == request.prompt
        assert [token.is_prompt for token in tokens] == [True] * size + [False] * 8
        expected_TV = made.logprobs(ids)
        assert tokens[0].logprob is None
        for before_V, token in zip(expected_TV, tokens[1:], strict=False):
            np.testing.assert_allclose(token.logprob, before_V[token.id], atol=2e-5, rtol=1e-4)
            top = np.sort(before_V)[::-1][:3]
            np.testing.assert_allclose([logprob for _, logprob in token.top], top, atol=2e-5, rtol=1e-4)
            if not token.is_prompt:
                assert before_V[token.id] >= top[0] - 1e-4


@pytest.mark.slow
def test_an_answer_is_what_training_s_own_forward_pass_says():
    made, programs = small()
    engine = made.engine(programs)
    check_against_training(made, engine)
    engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 2, 1), (1, 1, 2), (1, 2, 2)], ids=helpers.name)
@pytest.mark.parametrize("family", FAMILIES)
def test_so_it_is_for_every_family_on_every_mesh(family, mesh):
    found = Made(mesh, family)
    engine = found.engine(found.programs([4 * mesh[1]], [32]))
    check_against_training(found, engine)
    engine.close()


# replica × stage × fsdp × expert × context × tensor
WITH_EXPERTS = [(1, 1, 1, 4, 1, 1), (1, 1, 1, 2, 1, 2), (1, 1, 2, 2, 1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", WITH_EXPERTS, ids=helpers.name)
@pytest.mark.parametrize("family", ["mixtral", "shared experts", "dense first"])
def test_so_it_is_with_experts_on_devices_of_their_own(family, mesh):
    found = Made(mesh, family)
    held = found.weights["layers"][-1]["experts_up"]
    assert held.addressable_shards[0].data.shape[0] == held.shape[0] // mesh[3]
    engine = found.engine(found.programs([4 * mesh[2] * mesh[3]], [32]))
    check_against_training(found, engine)
    engine.close()


@pytest.mark.slow
def test_parameters_are_used_up():
    """No second copy stays: each array is given back, but an embedding that decoding takes as it is."""
    found = made()
    left = [x for x in found.used_up if not x.is_deleted()]
    assert not left


# ── bits ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def check_crowds(made: Made, programs: Programs, schedules: int, pool: int, longest: int) -> None:
    engine = made.engine(programs)
    crowd = Crowd(engine, pool_of(pool, longest))
    for seed in range(schedules):
        draw = np.random.default_rng(seed)
        count = int(draw.choice(OCCUPANCIES))
        crowd.run(crowd.drawn(draw, count), crowd.drawn(draw, count))
    engine.close()
    assert crowd.most == programs.rungs[-1]


def test_an_answer_in_a_crowd_has_the_bits_that_it_has_alone():
    made, programs = small()
    assert ladder.agreeing(programs, made.weights) == (4, 8)
    check_crowds(made, programs, schedules=12, pool=12, longest=16)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 2, 1), (1, 1, 4), (1, 2, 2)], ids=helpers.name)
def test_so_it_is_over_several_lanes_and_on_every_mesh(mesh):
    found = Made(mesh)
    programs = found.programs([4 * mesh[1], 8 * mesh[1]], [32, 64])
    programs.rungs = ladder.agreeing(programs, found.weights)
    check_crowds(found, programs, schedules=40, pool=48, longest=40)


@pytest.mark.slow
def test_so_it_is_with_experts_on_devices_of_their_own_too():
    found = Made((1, 1, 2, 2, 1, 1), "mixtral")
    programs = found.programs([16, 32], [32])
    programs.rungs = ladder.agreeing(programs, found.weights)
    check_crowds(found, programs, schedules=20, pool=24, longest=16)


@pytest.mark.slow
def test_a_rung_that_rounds_otherwise_is_seen():
    """One row alone is multiplied in another order."""
    made, _ = small()
    programs = made.programs([1, 4], [32])
    assert ladder.agreeing(programs, made.weights) == (4,)


# ── what is asked for ────────────────────────────────────────────────────────────────────────────────────────────────


def test_what_is_kept_is_what_sorting_keeps():
    draw = np.random.default_rng(0)
    logits_NV = draw.normal(size=(64, 50)).astype(np.float32) * 3
    how = {
        "top_k": draw.integers(0, 12, 64).astype(np.int32),
        "top_p": draw.choice([1.0, 0.9, 0.5, 0.1, 0.0], 64).astype(np.float32),
        "min_p": draw.choice([0.0, 0.05, 0.5, 1.0], 64).astype(np.float32),
    }
    found_NV = np.asarray(jax.jit(sampling.kept)(logits_NV, how))
    for logits_V, found_V, k, p, least in zip(logits_NV, found_NV, *how.values(), strict=True):
        order = np.argsort(-logits_V)[: k or 50]
        share = np.exp(logits_V[order].astype(np.float64) - logits_V.max())
        share /= share.sum()
        enough = 1 + int(np.sum(np.cumsum(share) < p - 1e-7)) if p < 1 else len(order)
        wanted = [i for i, x in zip(order[:enough], share, strict=False) if x >= least * share[0] * (1 - 1e-6)]
        assert sorted(np.flatnonzero(found_V)) == sorted(wanted)


def test_draws_follow_the_distribution():
    """Chi-square, of a row's seeds; and a penalty on what was seen."""
    count, logits_V = 4000, np.array([2.0, 1.0, 0.0, -1.0, 3.0, 0.5], np.float32)
    how = {name: np.zeros(count, dtype) for name, dtype in sampling.FIELDS.items()}
    how |= {
        "temperature": np.full(count, 0.7, np.float32),
        "top_k": np.full(count, 5, np.int32),
        "top_p": np.ones(count, np.float32),
    }
    how |= {"seed": np.arange(count, dtype=np.uint32), "repetition_penalty": np.full(count, 2.0, np.float32)}
    seen_NV = np.zeros((count, 6), bool)
    seen_NV[:, 4] = True
    logits_NV, at_N = np.tile(logits_V, (count, 1)), np.full(count, 9, np.int32)
    ids_N = jax.jit(sampling.next_tokens)(logits_NV, seen_NV, at_N, how)
    share_V = np.exp(np.array([2.0, 1.0, 0.0, -np.inf, 1.5, 0.5]) / 0.7)
    expected_V = share_V / share_V.sum() * count
    found_V = np.bincount(np.asarray(ids_N), minlength=6)
    assert found_V[3] == 0
    kept = expected_V > 0
    assert np.sum((found_V - expected_V)[kept] ** 2 / expected_V[kept]) < 18.5  # 99.9 % of chi-square with 4 freedoms


def test_a_seed_draws_the_same_and_another_another():
    made, programs = small()
    engine = made.engine(programs)
    of = lambda seed: [token.id for token in engine.answer(Request(prompt(3), 12, Sampling(1.0, seed=seed)))[0]]
    assert of(1) == of(1) != of(2)
    engine.close()


def test_a_stop_id_ends_an_answer_and_is_not_in_it():
    made, programs = small()
    engine = made.engine(programs)
    whole = [token.id for token in engine.answer(Request(prompt(5), 12, GREEDY))[0]]
    at = next(i for i, id in enumerate(whole) if id not in whole[:i] and i > 2)
    tokens, end = engine.answer(Request(prompt(5), 12, GREEDY, frozenset({whole[at]})))
    assert ([token.id for token in tokens], end) == (whole[:at], End("stop"))
    engine.close()


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request((), 4), "empty"),
        (Request((1, 256), 4), r"\[0, 256\)"),
        (Request((1,) * 30, 4), "max_tokens=4: after a prompt of 30 there is room for 2"),
        (Request((1,), 0), "max_tokens=0"),
        (Request((1,), 4, top_logprobs=MOST_TOP + 1), "top_logprobs=21"),
    ],
)
def test_what_cannot_be_answered_is_refused(request_, message):
    made, programs = small()
    with pytest.raises(ValueError, match=message):
        Engine(programs, made.weights, "f0", 0).submit(request_, print)


# ── a crowd's house rules ────────────────────────────────────────────────────────────────────────────────────────────


def test_beyond_what_may_wait_there_is_no_room():
    made, programs = small()
    engine = made.engine(programs, most_waiting=2)
    heard: list[Any] = []
    with pytest.raises(Full):
        for _ in range(200):
            engine.submit(Request(prompt(4), 28, GREEDY), heard.append)
    engine.close()
    assert {what.reason for what in heard if isinstance(what, End)} <= {"cancelled", "length"}
    with pytest.raises(Full):
        engine.submit(Request(prompt(4), 4, GREEDY), heard.append)


def test_new_weights_are_taken_when_those_before_have_answered():
    made, programs = small()
    other = jax.tree.map(lambda x: x * 1.1, made.weights)
    engine = made.engine(programs)
    request = Request(prompt(4), 28, GREEDY)
    before = [token.id for token in engine.answer(request)[0]]
    answers: list[list[Any]] = [[] for _ in range(3)]
    tickets: list[Ticket] = [engine.submit(request, heard.append) for heard in answers]
    while not answers[-1]:
        time.sleep(0.001)
    engine.swap(lambda: (other, "f1", 7))
    tokens, _ = engine.answer(request)
    assert [ticket.fingerprint for ticket in tickets] == ["f0"] * 3 and (engine.fingerprint, engine.step) == ("f1", 7)
    assert all([token.id for token in heard[:-1]] == before for heard in answers)
    assert [token.id for token in tokens] != before
    engine.close()


def test_a_receiver_that_fails_takes_no_slot_any_more():
    made, programs = small()
    engine = made.engine(programs)

    def gone(what: Any) -> None:
        raise ConnectionResetError

    engine.submit(Request(prompt(4), 28, GREEDY), gone)
    assert engine.answer(Request(prompt(4), 4, GREEDY))[1] == End("length")
    engine.drain(5)
    assert not engine.running and not engine.ready
    engine.close()


def test_nothing_compiles_when_requests_come():
    made, programs = small()
    compiled: list[str] = []
    listen = lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    jax.monitoring.register_event_duration_secs_listener(listen)
    engine = made.engine(programs)
    pending = [threading.Thread(target=engine.answer, args=(request,)) for request in pool_of(12, 16)]
    for thread in pending:
        thread.start()
    for thread in pending:
        thread.join()
    engine.answer(Request(prompt(9), 3, GREEDY, top_logprobs=2, echo=True))
    engine.close()
    assert compiled == []


def test_buckets_are_powers_of_two_up_to_the_lane_s_length():
    assert (
        buckets(100) == [16, 32, 64, 100] and bucket(65, 100) == 100 and bucket(3, 100) == 16 and bucket(16, 100) == 16
    )
    assert buckets(8) == [8]


def test_a_lane_takes_the_smallest_rung_that_holds_what_runs():
    made, programs = small()
    lane = Lane(programs, 32)
    lane.fit(1)
    assert len(lane.slots) == 4
    lane.slots = [object()] * 4
    lane.fit(1)
    assert len(lane.slots) == 8 and lane.running == 4
    lane.slots = [None] * 5 + [object()] * 3
    lane.fit()
    assert len(lane.slots) == 4 and lane.running == 3
    lane.slots = [None] * 4
    lane.fit()
    assert lane.state is None

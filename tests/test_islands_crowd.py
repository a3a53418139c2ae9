"""bench/crowd_islands.py: what a crowd of islands asks of the store, counted for fewer of them."""

from collections import Counter

import pytest

from bench.crowd_islands import AWAIT, Crowd, Fast
from islands import trust

COUNT = 12


@pytest.fixture(autouse=True)
def without_signatures(monkeypatch):
    monkeypatch.setattr(trust, "genuine", lambda public, message, signature: True)


def test_pushes_spread_evenly_need_few_requests_and_one_try():
    crowd = Crowd(COUNT)
    crowd.play(lambda i: i * (2 * COUNT + 10) * AWAIT)
    others = COUNT * (COUNT - 1)
    asked = sum(crowd.asked(), Counter())
    assert asked["create records"] == asked["create payloads"] == COUNT
    assert asked["get payloads"] == others, "of every push but the own one"
    probes = asked["get records"] - others  # of a number that has no record yet: before a push, and at the end
    assert COUNT <= probes <= 3 * COUNT
    assert crowd.per_record() == pytest.approx((2 * others + 2 * COUNT + probes) / (COUNT * COUNT))
    assert crowd.per_record() <= 4


def test_who_pushes_with_all_others_at_once_tries_again():
    crowd = Crowd(COUNT)
    crowd.play(lambda i: 0.0)
    tries = [asked["create records"] for asked in crowd.asked()]
    assert min(tries) == 1 and COUNT / 2 < max(tries) <= COUNT
    pushed = [entry.record.island for _, _, entry in Fast.made.values() if entry.record.type == "push"]
    assert {f"island-{i}" for i in range(COUNT)} <= set(pushed)
    assert all(log.view == crowd.logs[0].view and log.view.complete == 1 for log in crowd.logs)

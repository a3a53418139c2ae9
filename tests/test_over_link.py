"""--link: what is sent on a slow link, and what would leave more of the time for computing."""

from types import SimpleNamespace

import helpers
import pytest

from parallel.cost.bytes import bytes_per_step
from parallel.cost.link import FRAME, Link
from recipes import methods, over_link
from runtime.config import UsageError


def test_a_link_is_a_rate_and_perhaps_a_latency():
    assert Link.parse("100mbit") == Link("100mbit", 100e6)
    assert Link.parse("2.5Gbit, 20ms") == Link("2.5Gbit, 20ms", 2.5e9, 0.02)
    assert Link.parse("800kbit,300us").latency == pytest.approx(3e-4)
    assert Link.parse("100mbit,20ms").seconds(1e6, hops=2) == pytest.approx(0.08 * FRAME + 0.04)


@pytest.mark.parametrize("text", ["100", "0mbit", "mbit", "-1mbit", "100mb", "100mbit,20", "100mbit,20m", "1e3mbit"])
def test_what_is_no_link_is_a_sentence(text):
    with pytest.raises(UsageError, match=rf"link={text}: expected a rate above 0 with its unit"):
        over_link.read(text, None, False, 2)


def test_what_is_not_read_is_said():
    assert over_link.read(None, None, False, 1) is None
    with pytest.raises(UsageError, match="one replica sends nothing"):
        over_link.read("1mbit", None, False, 1)
    for text, dry_run in ((None, True), ("1mbit", False)):
        with pytest.raises(UsageError, match="--step_seconds is read with --link and --dry_run"):
            over_link.read(text, 1.0, dry_run, 2)


def said(parts, link: str, step_seconds: float | None) -> dict[str, str]:
    sent = bytes_per_step(parts.strategy, 20)
    return dict(over_link.rows(Link.parse(link), parts, sent, step_seconds))


def test_the_time_on_the_wire_is_that_of_a_whole_replica():
    """2 replicas of 2 devices each: both send through the one link."""
    parts = helpers.build(helpers.tiny(), (2, 2, 1))
    sent = 2 * bytes_per_step(parts.strategy, 20)
    found = said(parts, "100mbit", None)
    assert "computing" not in found and "--step_seconds" in found[""]
    wire = 8 * FRAME * sent / 1e8
    assert f"{wire / (2 * wire):.0%} of the time, if nothing is hidden" in said(parts, "100mbit", wire)["computing"]


def test_the_catalogue_keeps_of_each_strategy_what_sends_most():
    """On a link fast enough for all that is float32; on a slower one something that sends less, or nothing at all."""
    parts = helpers.build(helpers.tiny(), (2, 1, 1))
    fast = said(parts, "1000gbit", 1.0)["90% would keep"]
    assert fast == "sync none 100%; stale none 100%; diloco none 100%; streaming none 100%; eager none 100%"
    kept = {k.strategy: k.codec for k in over_link.catalogue(Link.parse("10mbit"), parts, _workload(parts, 0.1))}
    assert kept["eager"] == "none" and kept["sync"] not in ("none", "bf16")
    assert not over_link.catalogue(Link.parse("1kbit"), parts, _workload(parts, 0.001))


def test_every_strategy_is_tried():
    assert over_link.TRIED.keys() == methods.STRATEGIES.keys()


def _workload(parts, seconds: float):
    from parallel.cost.utilisation import Workload
    from recipes.build import num_parameters

    return Workload(num_parameters(parts), 2, seconds)


def test_devices_behind_one_link():
    """Simulated, or of a slice, or of a host."""

    def mesh(platform, where, replicas, fast):
        devices = [SimpleNamespace(platform=platform, **where(i)) for i in range(replicas * fast)]
        return SimpleNamespace(devices=SimpleNamespace(flat=devices), size=len(devices), shape={"replica": replicas})

    of_slice = lambda i: {"slice_index": i // 8, "process_index": i // 4}
    assert over_link.senders(mesh("cpu", of_slice, 2, 8)) == 8
    assert over_link.senders(mesh("tpu", of_slice, 2, 8)) == 8
    assert over_link.senders(mesh("gpu", of_slice, 2, 8)) == 4, "a replica of two hosts: each has a link"

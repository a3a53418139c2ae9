"""Reading ahead saves time to who catches up, and costs nothing to who follows (islands/ahead.py)."""

import pytest

from islands.ahead import RECORDS, Ahead
from islands.reader import record_key
from islands.record import LIMIT
from islands.schedule import Memory
from islands.store import run


class Log:
    """Of records that name no payloads; how many requests were under way after each other."""

    def __init__(self):
        self.memory, self.size, self.next = Memory(lambda: 0.0), 0, 0
        self.ahead = Ahead(self.memory, payloads=True)

    def grow(self, count: int) -> None:
        for number in range(self.size, self.size + count):
            run(self.memory.create(record_key(number), b'{"number":%d}' % number))
        self.size += count

    def read(self) -> None:
        """All there is, one after another, up to the first that is not there."""
        while (data := run(self.ahead.get(record_key(self.next), LIMIT + 1))) is not None:
            assert data == b'{"number":%d}' % self.next
            self.next += 1
        assert self.next == self.size


def test_who_catches_up_asks_for_many_at_a_time_and_for_few_that_are_not_there():
    log, calls = Log(), []
    log.grow(1000)
    fetch = log.ahead._fetch_from
    log.ahead._fetch_from = lambda number, count: calls.append(count) or fetch(number, count)
    log.read()
    assert sum(calls) >= 980 and len(calls) <= 1000 / RECORDS + 6
    assert log.ahead.requests <= 1000 + RECORDS + 10
    log.next = 0  # another reader of the same store begins anew, and is no slower
    first, calls[:] = len(calls), []
    log.read()
    assert len(calls) == first


@pytest.mark.parametrize("together", [1, 2, 3, 5, 8, 20])
def test_who_follows_asks_once_for_each_and_seldom_for_what_is_not_there(together):
    """A member that polls finds what others have pushed since."""
    log = Log()
    for _ in range(50):
        log.grow(together)
        log.read()
    # Of each poll one that finds nothing, and at most as many again as were there.
    assert log.ahead.requests <= 50 * (2 * together + 1)
    if together < 8:
        assert log.ahead.requests == 50 * (together + 1)


def test_who_reads_a_log_again_asks_once_and_keeps_nothing_afterwards():
    log = Log()
    log.ahead.keeps = True
    log.grow(100)
    log.read()
    asked, log.next = log.ahead.requests, 0
    log.read()
    assert log.ahead.requests <= asked + 64 + 1, "what is not there yet is asked for again"
    log.ahead.forget()
    log.next = 0
    log.read()
    assert log.ahead.requests >= asked + 100 and not log.ahead._kept

"""What a crowd of islands asks of the store: requests for each record that an island writes or reads, when pushes are
spread evenly over a round and when all push at once.

python bench/crowd_islands.py                      five minutes
python bench/crowd_islands.py --islands=100

A store in memory, and the clock and turns of islands/schedule.py: at every await another island may go on. Each island
reads what it has not read yet (records and their payloads), and pushes. Signatures are left out, and what all make of
the same bytes is made once: neither changes what is asked.
"""

import hashlib
import random
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np  # noqa: E402

from bench import common  # noqa: E402
from islands import record as records  # noqa: E402
from islands import trust  # noqa: E402
from islands.faulty import Chance  # noqa: E402
from islands.log import Entry, Log  # noqa: E402
from islands.record import OWNER, PUSH, Run  # noqa: E402
from islands.schedule import Memory, Schedule  # noqa: E402
from islands.store import Routine, run  # noqa: E402
from islands.view import Member, View  # noqa: E402
from runtime import usage  # noqa: E402

AWAIT = 0.01  # seconds of the schedule's clock that each takes


class Counted(Memory):
    """The same objects as another one has, and what of them was asked for here."""

    def __init__(self, other: Memory):
        self.objects, self._now, self.asked = other.objects, other._now, Counter()

    def create(self, key: str, data: bytes) -> Routine[bool]:
        self.asked["create " + key.partition("/")[0]] += 1
        return (yield from super().create(key, data))

    def get(self, key: str, most: int) -> Routine[bytes | None]:
        self.asked["get " + key.partition("/")[0]] += 1
        return (yield from super().get(key, most))


class Seal:
    """In the place of a key of islands/trust.py: signs a hundred times faster."""

    def __init__(self, name: str):
        self.public = hashlib.sha256(name.encode()).hexdigest()

    def sign(self, record: records.Record) -> records.Record:
        return records.with_signature(record, "0" * 128)


class Fast(Log):
    """What readers at the same place make of the same bytes is made by the first."""

    made: dict[tuple[str, bytes], tuple[View, str, Entry]] = {}

    def _take(self, data: bytes) -> Routine[Entry]:
        place = self.tail, data
        if place not in self.made:
            entry = yield from super()._take(data)
            self.made[place] = self.view, self.tail, entry
            return entry
        self.view, self.tail, entry = self.made[place]
        self._unread.append((entry, self.view))
        if entry.record and self._is_mine(entry.record):
            self._mine = entry
        return entry


class Crowd:
    """So many islands that have joined, one after another, and have read up to the last join."""

    def __init__(self, count: int):
        self.schedule = Schedule(Chance(random.Random(0), {}))
        memory, owner = Memory(self.schedule.now), Seal(OWNER)
        names = [f"island-{i}" for i in range(count)]
        members = {name: Member(Seal(name).public) for name in names}
        about = Run(owner=owner.public, budget=1000, facts={})
        log = run(Log.begin(memory, about, members, owner))  # type: ignore[arg-type]
        self.logs: list[Fast] = []
        Fast.made.clear()
        for i, name in enumerate(names):
            place, nonce = (log.view, log.tail), f"{i:032x}"
            log = run(Fast.open(Counted(memory), name, Seal(name), place, self.schedule, nonce=nonce))  # type: ignore[arg-type]
            run(log.join())
            self.logs.append(log)
        for log in self.logs:
            run(log.read())
            log.store.store.asked.clear()  # type: ignore[attr-defined]
        self.first = log.view.next

    def play(self, after: Callable[[int], float]) -> None:
        """Each pushes once, after so many seconds; at the end all have read all."""
        for i, log in enumerate(self.logs):
            self.schedule.start(self._round(log), after=after(i))
        while self.schedule.processes:
            self.schedule.step()
        for log in self.logs:
            run(_read(log))

    def _round(self, log: Log) -> Routine[None]:
        yield from _read(log)
        clock = log.view.islands[log.island].clock
        yield from log.push([f"{log.island} {clock}".encode()], clock=clock, base=log.view.version, steps=1, tokens=1)

    def asked(self) -> list[Counter]:
        return [log.store.store.asked for log in self.logs]  # type: ignore[attr-defined]

    def per_record(self) -> float:
        """Requests of an island for each record that it has read or written since all had joined."""
        records_each = self.logs[0].view.next - self.first
        return sum(asked.total() for asked in self.asked()) / (len(self.logs) * records_each)


def _read(log: Log) -> Routine[None]:
    for entry in (yield from log.read()):
        if entry.record and entry.record.type == PUSH and entry.record.island != log.island:
            for payload in entry.record.payloads:
                yield from log.download(payload)


def main() -> None:
    parser = usage.parser(__doc__, "python bench/crowd_islands.py")
    parser.add_argument("--islands", type=usage.positive, default=1000, metavar="N", help="how many")
    count = parser.parse_args().islands
    trust.genuine = lambda public, message, signature: True
    report = common.Report("crowd_islands")
    even = Crowd(count)
    even.play(lambda i: i * (2 * count + 10) * AWAIT)  # an island has read all others' before the next one begins
    report.row(f"{count} islands, pushes spread evenly: requests per record", even.per_record(), at_most=4)
    tries = [asked["create records"] for asked in even.asked()]
    report.row("  of one island: creates of a record until its push is there, at most", max(tries))
    once = Crowd(count)
    once.play(lambda i: 0.0)
    report.row(f"{count} islands, all push at once: requests per record", once.per_record())
    tries = np.array([asked["create records"] for asked in once.asked()])
    for share in (50, 99, 100):
        report.row(f"  creates of a record until its push is there, p{share}", float(np.percentile(tries, share)))
    for name, crowd in (("spread evenly", even), ("at once", once)):
        report.details[name] = dict(sum(crowd.asked(), Counter()))
    report.finish()


if __name__ == "__main__":
    main()

"""What a log says of its members: who is live, at which clock, and which records count. No arrays, no store, no clock.

`View.after(record)` gives the next view and the verdict. Every reader begins with the same view and takes the same
records, so all have the same verdicts at the same sequence numbers: nothing else decides what is folded.

What makes a record count (all others are dropped, and the verdict says why):
- push: of a live island, of its newest incarnation, and exactly the round that comes next for it. A request that lands
  after its sender has died, or twice, is therefore harmless.
- join: its incarnation is the one after the newest of that name, so that of two that join at once one has lost. Its
  clock is neither one that the island has pushed nor one that all live islands have completed.
- leave: of a live island, of its newest incarnation.
- expire: by a live island, of a live one whose last record is not after `base`, the last version that the writer saw.
- members: the new list counts from here on. Who is not on it, or may no longer push, is not live any more.
- snapshot: of a version that is there. Every record of the same version and manifest confirms it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from islands import record as records
from islands.record import Record

ROLES = "push", "read", "own"  # own: push, and sign member lists


@dataclass(frozen=True)
class Member:
    """Of the member list. key: public, hex. norm_bound: of what it may push, by float.hex; "": none."""

    key: str
    role: str = "push"
    norm_bound: str = ""
    revoked: bool = False

    @property
    def writes(self) -> bool:
        return self.role != "read" and not self.revoked


@dataclass(frozen=True)
class Island:
    """incarnation: the newest. clock: of its next push. live: joined, and neither gone nor taken to be gone.
    version: of its last push, or join. last: the number of its last record that counts."""

    incarnation: int
    clock: int
    live: bool
    version: int
    last: int


@dataclass(frozen=True)
class Verdict:
    """why: it was dropped; "" if it was folded. live: so many islands are, after it. complete: every round below this
    has been pushed by all live islands, and is never pushed again."""

    why: str
    live: int
    complete: int

    @property
    def folded(self) -> bool:
        return not self.why


@dataclass(frozen=True)
class View:
    """islands: who has ever joined, by name. members: the list in force. version: of the last record folded.
    next: the number of the next record. complete: as in Verdict. snapshots: {version: {manifest: who confirms it}}."""

    islands: Mapping[str, Island] = field(default_factory=dict)
    members: Mapping[str, Member] = field(default_factory=dict)
    version: int = -1
    next: int = 0
    complete: int = 0
    snapshots: Mapping[int, Mapping[str, frozenset[str]]] = field(default_factory=dict)

    def live(self) -> dict[str, Island]:
        return {name: island for name, island in self.islands.items() if island.live}

    def live_minimum(self) -> int:
        """The smallest next clock of live islands; when there are none, the rounds that were complete before.

        The staleness gate of an island with bound s: before it starts round c, c - live_minimum() <= s.
        """
        return self.complete

    def as_fields(self) -> dict[str, Any]:
        """As canonical JSON has it: numbers are no keys there."""
        snapshots = {
            str(version): {manifest: sorted(names) for manifest, names in of_version.items()}
            for version, of_version in self.snapshots.items()
        }
        tables = {name: {own: asdict(x) for own, x in getattr(self, name).items()} for name in ("islands", "members")}
        return {"version": self.version, "next": self.next, "complete": self.complete, "snapshots": snapshots, **tables}

    @classmethod
    def from_fields(cls, found: Mapping[str, Any]) -> "View":
        """Of what `as_fields` gave, which is trusted."""
        snapshots = {
            int(version): {manifest: frozenset(names) for manifest, names in of_version.items()}
            for version, of_version in found["snapshots"].items()
        }
        islands = {name: Island(**own) for name, own in found["islands"].items()}
        members = {name: Member(**own) for name, own in found["members"].items()}
        counts = {name: found[name] for name in ("version", "next", "complete")}
        return cls(islands, members, snapshots=snapshots, **counts)

    def after(
        self, record: Record | None, refused: str = "", members: Mapping[str, Member] | None = None
    ) -> tuple["View", Verdict]:
        """(the view after the next record, what became of it).

        refused: why it is not trusted (islands/trust.py), which nothing here can tell; None for what is no record.
        members: of a `members` record, the list.
        """
        why = refused or (self._why_dropped(record) if record else "it is no record")
        changed = self._changed_by(record, members) if record and not why else {}
        view = replace(self, next=self.next + 1, **changed)
        return view, Verdict(why, sum(island.live for island in view.islands.values()), view.complete)

    def _why_dropped(self, record: Record) -> str:
        if record.base > self.version:
            return f"its base is version {record.base}, and the version before it is {self.version}"
        return {
            records.PUSH: self._why_no_push,
            records.JOIN: self._why_no_join,
            records.LEAVE: self._why_not_live,
            records.EXPIRE: self._why_no_expiry,
            records.MEMBERS: lambda record: "",
            records.SNAPSHOT: lambda record: "" if record.manifest else "it names no manifest",
        }[record.type](record)

    def _why_not_live(self, record: Record) -> str:
        """Of the newest incarnation, and live."""
        island = self.islands.get(record.island)
        if island is None:
            return f"{record.island} has not joined"
        if record.incarnation != island.incarnation:
            return f"it is of incarnation {record.incarnation} of {record.island}, whose newest is {island.incarnation}"
        return "" if island.live else f"{record.island} is not live: it has left, has expired, or may not push"

    def _why_no_push(self, record: Record) -> str:
        if why := self._why_not_live(record):
            return why
        island = self.islands[record.island]
        if record.clock < island.clock:
            return f"round {record.clock} of {record.island} is folded already"
        if record.clock > island.clock:
            return f"it is round {record.clock} of {record.island}, whose next is {island.clock}"
        return ""

    def _why_no_join(self, record: Record) -> str:
        before = self.islands.get(record.island)
        incarnation, clock = (before.incarnation, before.clock) if before else (0, 0)
        if record.incarnation != incarnation + 1:
            return f"it is incarnation {record.incarnation} of {record.island}, whose next is {incarnation + 1}"
        if record.clock < max(clock, self.complete):
            return (
                f"it would push round {record.clock}: {record.island} has pushed those below {clock}, "
                f"and all islands those below {self.complete}"
            )
        return ""

    def _why_no_expiry(self, record: Record) -> str:
        if why := self._why_not_live(record):
            return why
        target = self.islands.get(record.target)
        if target is None or not target.live:
            return f"{record.target or 'nobody'} is not live, and cannot expire"
        if target.last > record.base:
            return f"{record.target} has written record {target.last}, after the last one seen ({record.base})"
        return ""

    def _changed_by(self, record: Record, members: Mapping[str, Member] | None) -> dict[str, Any]:
        """What is another one after a record that counts."""
        number, name, islands = self.next, record.island, dict(self.islands)
        changed: dict[str, Any] = {"version": number, "islands": islands}
        if record.type == records.JOIN:
            islands[name] = Island(record.incarnation, record.clock, live=True, version=number, last=number)
        elif record.type == records.PUSH:
            islands[name] = replace(islands[name], clock=record.clock + 1, version=number, last=number)
        elif record.type == records.LEAVE:
            islands[name] = replace(islands[name], live=False, last=number)
        elif record.type == records.EXPIRE:
            islands[record.target] = replace(islands[record.target], live=False)
            islands[name] = replace(islands[name], last=number)
        elif record.type == records.MEMBERS:
            changed["members"] = members or {}
            for other, island in self.islands.items():
                if other not in changed["members"] or not changed["members"][other].writes:
                    islands[other] = replace(island, live=False)
        elif record.type == records.SNAPSHOT:
            of_version = dict(self.snapshots.get(record.base, {}))
            of_version[record.manifest] = of_version.get(record.manifest, frozenset()) | {name}
            changed["snapshots"] = {**self.snapshots, record.base: of_version}
        # Never less than before: a join begins no earlier, and everybody else's clock only grows.
        complete = min((island.clock for island in islands.values() if island.live), default=self.complete)
        return changed | {"complete": complete}

"""What a log says of its run, for people and for programs. It reads every record, and writes nothing."""

import json
import time
from collections.abc import Iterator
from typing import Any

from islands import record as records
from islands import snapshot
from islands.ahead import Ahead
from islands.reader import Entry, Reader
from islands.store import Store, run
from islands.view import View
from runtime.console import aligned

BEAT_LIMIT = 1 << 16  # bytes of a heartbeat


def of(store: Store) -> dict[str, Any]:
    """version, records, oldest_replayable, members, refused, snapshots: see docs/islands.md.

    Raises UsageError where there is no log."""
    store = Ahead(store)
    log = run(snapshot.begin(store, Reader))
    oldest, entries = log.view.version, run(log.read())
    run(log.look_ahead())
    view, names = log.view, sorted({*log.view.members, *log.view.islands})
    beats = {name: _beat(store, name) for name in names}
    return {
        "version": view.version,
        "records": view.next,
        "oldest_replayable": oldest,
        "members": [_member(name, view, entries, beats[name]) for name in names],
        "refused": sorted(
            [_refused(entry.sequence, entry.island, entry.verdict.why) for entry in entries if not entry.verdict.folded]
            + _told(beats, entries),
            key=lambda each: each["sequence"],
        ),
        "snapshots": [
            {"version": version, "digest": manifest, "confirmed_by": sorted(names)}
            for version, of_version in sorted(view.snapshots.items())
            for manifest, names in sorted(of_version.items())
        ],
    }


def _member(name: str, view: View, entries: list[Entry], beat: dict[str, Any]) -> dict[str, Any]:
    """staleness: rounds ahead of the slowest live island. lag_records: that it has not read yet, by what it said last.
    age_s: since then, by the store's clock and this machine's; null: it has never said anything."""
    member, island = view.members.get(name), view.islands.get(name)
    return {
        "name": name,
        "role": member.role if member else "",
        "state": _state(name, view, entries),
        "incarnation": island.incarnation if island else 0,
        "clock": island.clock if island else 0,
        "staleness": island.clock - view.live_minimum() if island and island.live else 0,
        "lag_records": view.version - beat["version"] if beat else None,
        "age_s": round(time.time() - beat["modified"], 1) if beat else None,
    }


def _state(name: str, view: View, entries: list[Entry]) -> str:
    """live, left, expired, revoked, or waiting: it has never joined."""
    member, island = view.members.get(name), view.islands.get(name)
    if island and island.live:
        return "live"
    if not member or member.revoked:
        return "revoked"
    for entry in reversed(entries):
        if entry.record and entry.verdict.folded:
            if entry.record.type == records.LEAVE and entry.island == name:
                return "left"
            if entry.record.type == records.EXPIRE and entry.record.target == name:
                return "expired"
    return "waiting"


def _refused(sequence: int, island: str, reason: str) -> dict[str, Any]:
    return {"sequence": sequence, "island": island, "reason": reason}


def _told(beats: dict[str, dict[str, Any]], entries: list[Entry]) -> list[dict[str, Any]]:
    """What members have refused when they had seen the payload, and forks that they have found, as each tells it."""
    number = {entry.sequence: entry.island for entry in entries if entry.verdict.folded}
    found = {
        (sequence, island, f"folded as zeros: {reason}")
        for beat in beats.values()
        for sequence, island, reason in beat.get("refused", ())
        if number.get(sequence) == island
    }
    forks = {
        (version, island, f"its snapshot is {theirs[:16]}…, and {name} has folded {ours[:16]}…: a fork")
        for name, beat in beats.items()
        for version, island, theirs, ours in beat.get("forks", ())
    }
    return [_refused(*each) for each in sorted(found | forks)]


def _beat(store: Store, name: str) -> dict[str, Any]:
    """What its last heartbeat says. Nobody signs it, and nothing but this picture comes of it."""
    key = f"heartbeats/{name}"
    data, modified = run(store.get(key, BEAT_LIMIT)), run(store.last_modified(key))
    try:
        found = json.loads(data or b"")
        told = {
            "refused": [(int(n), str(island), str(why)[:300]) for n, island, why in found.get("refused", ())],
            "forks": [(int(v), str(by), str(a), str(b)) for v, by, a, b in found.get("forks", ())],
        }
        return {"version": int(found["version"]), "modified": modified, **told} if modified else {}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def lines(status: dict[str, Any]) -> Iterator[str]:
    oldest = status["oldest_replayable"]
    begin = "the first parameters" if oldest < 0 else f"version {oldest}"
    yield f"version {status['version']}, {status['records']} records, replayable from {begin}"
    columns = ("name", "role", "state", "incarnation", "clock", "staleness", "lag_records", "age_s")
    yield aligned([columns, *([_shown(member[column]) for column in columns] for member in status["members"])])
    for refused in status["refused"]:
        yield f"refused: record {refused['sequence']} of {refused['island'] or 'nobody known'}: {refused['reason']}"
    for each in status["snapshots"]:
        by = ", ".join(each["confirmed_by"])
        yield f"snapshot of version {each['version']}: {each['digest'][:16]}…, confirmed by {by}"


def _shown(value: Any) -> str:
    return "-" if value is None else str(value)

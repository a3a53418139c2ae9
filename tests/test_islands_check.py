"""`python -m islands check` and `status`: what they refuse, what they show, and how they end."""

import contextlib
import io
import json
import re
import time
from typing import Any

import helpers
import pytest

pytest.importorskip("cryptography", reason="pip install -r requirements-islands.txt")

from islands import check, trust
from islands.__main__ import main
from islands.folder import Folder
from islands.log import Dropped, Log
from islands.record import LEAVE, Run
from islands.schedule import Memory
from islands.store import Call, run
from islands.view import Member
from runtime.config import UsageError


def said(*argv: str) -> tuple[int, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = main(argv)
    return code, out.getvalue()


class Forgetful(Memory):
    """Everybody who creates an object has created it."""

    def _create(self, key: str, data: bytes) -> bool:
        self._put(key, data)
        return True


class Racy(Memory):
    """Looks whether the object is there, and stores it, but not in one step."""

    def create(self, key: str, data: bytes) -> Any:
        is_there = yield Call("get", lambda: self._get(key, 0, 1) is not None)
        if not is_there:
            time.sleep(0.05)
            yield Call("put", lambda: self._put(key, data))
        return not is_there


class Closed(Memory):
    """As a bucket's policy may be: nothing is overwritten or deleted."""

    def put(self, key: str, data: bytes) -> Any:
        yield Call("put", lambda: None)

    def delete(self, key: str) -> Any:
        yield Call("delete", lambda: None)


def test_the_page_has_the_objects_of_a_log(tmp_path):
    """docs/islands.md, its first table."""
    page = (helpers.ROOT / "docs" / "islands.md").read_text()
    table = page.split("## The log", 1)[1].split("\n\n", 2)[1]
    named = re.findall(r"^\| `(\S+)`", table, re.MULTILINE)
    key = trust.Key.new()
    log = run(Log.begin(Folder(tmp_path), Run(owner=key.public, budget=1000, facts={}), {}, key))
    assert run(log.beat())
    shape = {rf"records/{0:020d}": "records/%020d", "heartbeats/owner": "heartbeats/NAME"}
    made = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert {shape.get(key, re.sub("[0-9a-f]{64}", "SHA256", key)) for key in made} == set(named)


@pytest.mark.parametrize("make", [lambda path: Folder(path), lambda _: Memory(time.time)], ids=["folder", "memory"])
def test_a_sound_store_is_found_sound_and_nothing_is_left_in_it(make, tmp_path):
    store = make(tmp_path)
    found = check.of(store)
    assert found.sound and "may overwrite" in str(found.findings)
    assert run(store.list("payloads")) == []


def test_a_store_that_lets_everybody_win_is_refused():
    found = check.of(Forgetful(time.time))
    assert not found.sound and any("a second time" in f.what for f in found.findings if f.bad)


def test_a_store_that_lets_two_win_at_once_is_refused():
    found = check.of(Racy(time.time))
    assert [f.bad for f in found.findings][0] is False, "one after another, it does as it should"
    assert any("at once were told that they had" in f.what for f in found.findings if f.bad)


def test_where_nobody_may_overwrite_or_delete_it_says_so_and_what_stays():
    found = check.of(Closed(time.time))
    assert found.sound
    assert {"this identity may not overwrite payloads"} <= {f.what for f in found.findings}
    assert "5 objects" in found.findings[-1].what and "stay there" in found.findings[-1].what


def test_a_clock_that_is_off_is_said():
    assert "differ by 3,600 s" in str(check.of(Memory(lambda: time.time() - 3600)).findings)


def test_the_commands_end_as_they_say(tmp_path, capsys):
    code, out = said("check", str(tmp_path / "log"), "--json")
    assert code == 0 and json.loads(out)["sound"] is True
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UsageError, match="file"):
        main(["check", str(blocked)])
    with pytest.raises(UsageError, match="there is no log"):
        main(["status", str(tmp_path / "log")])
    with pytest.raises(SystemExit):
        main(["check", "x", "--watch"])
    assert "--watch goes with status" in capsys.readouterr().err


def test_status_shows_who_takes_part_and_what_was_refused(tmp_path):
    keys = {name: trust.Key.new() for name in ("owner", "a", "b", "c")}
    members = {name: Member(keys[name].public) for name in "abc"}
    store = Folder(tmp_path)
    run(Log.begin(store, Run(owner=keys["owner"].public, budget=1000, facts={}), members, keys["owner"]))
    logs = {}
    for name in "ab":
        logs[name] = run(Log.open(store, name, keys[name]))
        run(logs[name].read())
        run(logs[name].join())
        run(logs[name].beat())
    run(logs["a"].read())
    run(logs["a"].push([b"payload"], clock=0, base=logs["a"].view.version))
    run(logs["b"].read())
    run(logs["b"].append(logs["b"].draft(LEAVE, clock=0)))
    run(logs["b"].read())
    stranger = run(Log.open(store, "z", trust.Key.new()))
    run(stranger.read())
    with pytest.raises(Dropped):
        run(stranger.join())
    run(store.create(f"records/{stranger.view.next:020d}", b"{}"))

    code, out = said("status", str(tmp_path), "--json")
    found = json.loads(out)
    by_name = {member["name"]: member for member in found["members"]}
    assert code == 0 and found["records"] == 6 and found["version"] == 4
    assert {name: by_name[name]["state"] for name in "abc"} == {"a": "live", "b": "left", "c": "waiting"}
    assert by_name["a"]["clock"] == 1 and by_name["a"]["staleness"] == 0 and by_name["c"]["age_s"] is None
    assert 0 <= by_name["a"]["age_s"] < 60 and by_name["a"]["lag_records"] >= 2
    assert found["refused"][0]["sequence"] == 5 and found["snapshots"] == []
    code, out = said("status", str(tmp_path))
    assert "version 4, 6 records" in out and "refused: record 5 of nobody known" in out

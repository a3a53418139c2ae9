"""`python -m islands check` and `status`: what they refuse, what they show, and how they end."""

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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


def command(*argv: str) -> tuple[int, str]:
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


class Http(ThreadingHTTPServer):
    """Speaks S3 as far as `check` asks. wins: (server, key, body) -> whether a PUT with If-None-Match has won."""

    daemon_threads = True

    def __init__(self, wins: Callable[["Http", str, bytes], bool]):
        super().__init__(("127.0.0.1", 0), HttpHandler)
        self.wins, self.objects, self.lock = wins, {}, threading.Lock()


class HttpHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Http

    def do_PUT(self) -> None:
        body, won = self.rfile.read(int(self.headers["Content-Length"])), True
        if self.headers["If-None-Match"] == "*":
            won = self.server.wins(self.server, self.path, body)
        else:
            self.server.objects[self.path] = body
        self.answer(200 if won else 412, b"" if won else b"<Error><Code>PreconditionFailed</Code></Error>")

    def do_GET(self) -> None:
        if "list-type=2" in self.path:
            keys = (key.partition("/bucket/")[2] for key in self.server.objects)
            entry = (
                "<Contents><Key>{}</Key><Size>5</Size><LastModified>2026-11-29T12:00:00.000Z</LastModified></Contents>"
            )
            self.answer(200, f"<ListBucketResult>{''.join(map(entry.format, keys))}</ListBucketResult>".encode())
        elif self.path in self.server.objects:
            data, wanted = self.server.objects[self.path], self.headers["Range"]
            first, last = map(int, wanted.removeprefix("bytes=").split("-")) if wanted else (0, len(data))
            part = data[first : last + 1]
            span = {"Content-Range": f"bytes {first}-{first + len(part) - 1}/{len(data)}"} if wanted else {}
            self.answer(206 if wanted else 200, part, **span)
        else:
            self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")

    do_HEAD = do_GET

    def do_DELETE(self) -> None:
        self.server.objects.pop(self.path, None)
        self.answer(204)

    def do_POST(self) -> None:
        """Of many keys, in XML."""
        for key in re.findall("<Key>(.*?)</Key>", self.rfile.read(int(self.headers["Content-Length"])).decode()):
            self.server.objects.pop(f"/bucket/{key}", None)
        self.answer(200, b"<DeleteResult></DeleteResult>")

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("ETag", '"1"')
        self.send_header("Last-Modified", time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime()))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def ignores_the_condition(server: Http, key: str, body: bytes) -> bool:
    server.objects[key] = body
    return True


def looks_first(server: Http, key: str, body: bytes) -> bool:
    """And by the time that it stores, others have looked, too."""
    if key in server.objects:
        return False
    time.sleep(0.05)
    server.objects[key] = body
    return True


def looks_under_a_lock(server: Http, key: str, body: bytes) -> bool:
    with server.lock:
        return looks_first(server, key, body)


@pytest.mark.parametrize(
    "wins, code, said",
    [
        (ignores_the_condition, 1, "REFUSED an object that is there is created a second time"),
        (looks_first, 1, "writers that created one object at once were told that they had"),
        (looks_under_a_lock, 0, "sound: a log can be kept there"),
    ],
)
def test_a_store_over_http_is_refused_if_two_may_win(wins, code, said, monkeypatch):
    pytest.importorskip("obstore", reason="pip install -r requirements-islands.txt")
    server = Http(wins)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "word", "AWS_REGION": "here",
        "AWS_ALLOW_HTTP": "true", "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    ended, out = command("check", "s3://bucket/run")
    assert ended == code and said in out, out
    assert not server.objects, "nothing is left in it"
    server.shutdown()
    server.server_close()


def test_where_nobody_may_overwrite_or_delete_it_says_so_and_what_stays():
    found = check.of(Closed(time.time))
    assert found.sound
    assert {"this identity may not overwrite payloads"} <= {f.what for f in found.findings}
    assert "5 objects" in found.findings[-1].what and "stay there" in found.findings[-1].what


def test_a_clock_that_is_off_is_said():
    assert "differ by 3,600 s" in str(check.of(Memory(lambda: time.time() - 3600)).findings)


def test_the_commands_end_as_they_say(tmp_path, capsys):
    code, out = command("check", str(tmp_path / "log"), "--json")
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

    code, out = command("status", str(tmp_path), "--json")
    found = json.loads(out)
    by_name = {member["name"]: member for member in found["members"]}
    assert code == 0 and found["records"] == 6 and found["version"] == 4
    assert {name: by_name[name]["state"] for name in "abc"} == {"a": "live", "b": "left", "c": "waiting"}
    assert by_name["a"]["clock"] == 1 and by_name["a"]["staleness"] == 0 and by_name["c"]["age_s"] is None
    assert 0 <= by_name["a"]["age_s"] < 60 and by_name["a"]["lag_records"] >= 2
    assert found["refused"][0]["sequence"] == 5 and found["snapshots"] == []
    code, out = command("status", str(tmp_path))
    assert "version 4, 6 records" in out and "refused: record 5 of nobody known" in out


@pytest.mark.slow
def test_without_its_package_a_command_says_what_to_install(tmp_path):
    (tmp_path / "cryptography.py").write_text("raise ImportError")
    done = subprocess.run(
        [sys.executable, "-m", "islands", "status", "runs/shared"], cwd=helpers.ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    sentence = "error: islands sign their records with cryptography: `pip install -r requirements-islands.txt`\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", sentence)

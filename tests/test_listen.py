"""A server on a real socket: clients that vanish or dawdle, TLS, and an end in order."""

import contextlib
import json
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import helpers
import pytest
from scripted import TEXT, Scripted, Template

import serve
from data.tokenizer import ByteTokenizer
from runtime.config import RunError, UsageError

pytest.importorskip("starlette", reason="pip install -r requirements-deploy.txt")

from serving import api, keys, listen
from serving.replies import Limits

BODY = json.dumps({"model": "mine", "prompt": "hi", "max_tokens": 200, "temperature": 0}).encode()
STREAM = BODY[:-1] + b', "stream": true}'
TOOLS = pytest.mark.skipif(shutil.which("openssl") is None, reason="makes certificates with openssl")


class Server:
    """On a free port, in a thread. said: what it told."""

    def __init__(self, engine=None, tls=None, **options):
        self.engine, self.said = (engine or Scripted(seconds=0.01)).start(), []
        self.service = api.Service(self.engine, ByteTokenizer(), "mine", **({"template": Template()} | options))
        listener = listen.bind("127.0.0.1", 0)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # so that one who reads nothing is soon noticed
        listener.listen()
        self.port = listener.getsockname()[1]
        self.server = listen.Server(self.service, tls, self.said.append)
        self.thread = threading.Thread(target=self.server.run, args=([listener],))
        self.thread.start()

    def connect(self, data=b""):
        found = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        found.sendall(data)
        return found

    def ask(self, data):
        """The whole reply to what is sent."""
        with self.connect(data) as connection:
            return rest(connection)

    def end(self):
        self.server.should_exit = True
        self.thread.join(20)
        self.engine.close()
        assert not self.thread.is_alive()


def rest(connection):
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            found += part
    return found


def until(connection, what):
    found = b""
    while what not in found:
        part = connection.recv(65536)
        assert part, found
        found += part
    return found


def post(body, path="/v1/completions", *more, length=None):
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", "Connection: close", *more]
    lines += [f"Content-Length: {len(body) if length is None else length}"]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def servers():
    """Makes a server, and ends all that it made."""
    made = []

    def make(*given, **options):
        made.append(Server(*given, **options))
        return made[-1]

    yield make
    for found in made:
        found.end()


server = pytest.fixture(servers, name="server")


def wait_for(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


# ── clients that go ──────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("body", [BODY, STREAM], ids=["whole", "stream"])
@pytest.mark.parametrize("phase", ["sending", "queued", "prefill", "decoding"])
def test_a_client_that_vanishes_frees_what_it_had(phase, body, server):
    engine = Scripted(slots=1, seconds=0.01)
    found = server(engine)
    others = []
    if phase in ("queued", "prefill"):
        engine.gate.clear()
    if phase == "queued":
        others.append(found.connect(post(BODY)))
        wait_for(lambda: engine.running == 1)
    client = found.connect(post(body[:20], length=len(body)) if phase == "sending" else post(body))
    if phase == "sending":
        wait_for(lambda: found.service._bodies._held == 20)
    else:
        wait_for(lambda: len(engine.seen) == 1 + len(others))
    if phase == "decoding" and body == STREAM:
        until(client, b"data: ")
    client.close()
    for other in others:
        other.close()
    engine.gate.set()
    if phase != "sending":
        wait_for(lambda: found.service.metrics.gone == 1 + len(others))
        assert engine.is_idle(1.0), "long before 200 tokens"
    wait_for(lambda: found.service._bodies._held == 0)
    assert b'"text":"H"' in found.ask(post(BODY.replace(b"200", b"1"))), "the next one is answered"


def test_a_client_that_reads_nothing_holds_no_slot(server):
    found = server(Scripted(slots=1, seconds=0.0), limits=Limits(send_seconds=0.2))
    lots = json.dumps({"model": "mine", "prompt": ["a"] * 8, "max_tokens": 250, "logprobs": 5, "stream": True}).encode()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", found.port))
    client.sendall(post(lots))
    wait_for(lambda: found.service.metrics.gone == 1)
    assert found.engine.is_idle(1.0)
    assert b'"text":"H"' in found.ask(post(BODY.replace(b"200", b"1")))
    client.close()


# ── clients that dawdle, or send what is no request ──────────────────────────────────────────────────────────────


def test_a_body_has_so_much_time(server):
    found = server(limits=Limits(body_seconds=0.2))
    for sent in (post(BODY[:9], length=len(BODY)), post(b"", length=10)):
        assert re.match(rb"HTTP/1.1 408 .*\"code\":\"timeout\"", found.ask(sent), re.DOTALL)
    assert not found.engine.seen


def test_headers_have_so_much_time_and_so_much_room(server, monkeypatch):
    monkeypatch.setattr(listen, "HEADER_SECONDS", 0.2)
    found = server()
    for sent in (b"", b"POST /v1/comp", post(b"")[:40]):
        began = time.monotonic()
        assert found.ask(sent) == b"" and time.monotonic() - began < 3
    kept = found.connect(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")  # one that answers, and then dawdles
    until(kept, b'"ready"')
    kept.sendall(b"GET /hea")
    assert rest(kept) == b""
    kept.close()
    for many in ([f"X-{n}: {'x' * 50}" for n in range(1000)], ["X: " + "x" * 100_000]):
        reply = found.ask(post(BODY, "/v1/completions", *many))
        assert (reply == b"" or re.match(rb"HTTP/1.1 4(00|31)", reply)) and len(reply) < 500


@pytest.mark.parametrize(
    "path",
    ["/v1/../v1/models", "/../../etc/passwd", "/./v1/models", "http://evil.example/v1/models", "/v1/models?x=" * 9],
)
def test_paths_are_taken_as_they_are(path, server):
    reply = server().ask(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert re.match(rb"HTTP/1.1 (404|400|200)", reply) and b"evil" not in reply and b"root:" not in reply
    assert (b" 200 " in reply[:20]) == path.startswith("/v1/models?")


def test_what_is_no_http(server, monkeypatch):
    monkeypatch.setattr(listen, "HEADER_SECONDS", 0.3)
    found = server()
    for sent in (b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"GET / HTTP/9\r\n\r\n", b"\0" * 100, post(BODY, "/v1/x y")):
        assert re.match(rb"HTTP/1.1 400|$", found.ask(sent))
    twice = post(BODY, "/v1/completions", "Transfer-Encoding: chunked")  # smuggling: two lengths
    assert found.ask(twice).startswith(b"HTTP/1.1 4")
    assert b'"ready"' in found.ask(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")


# ── the end ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_first_signal_lets_answers_end(server):
    found = server()
    client = found.connect(post(STREAM.replace(b"200", b"40")))
    until(client, b"data: ")
    found.server.handle_exit(signal.SIGTERM, None)
    wait_for(lambda: found.service.draining)
    assert b" 503 " in found.ask(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")[:20]
    assert rest(client).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    found.thread.join(5)
    assert not found.thread.is_alive() and found.said[0].startswith("stopping: 1 requests are under way")


def test_the_second_signal_ends_at_once(server):
    found = server(Scripted(seconds=0.1))
    client = found.connect(post(STREAM))
    until(client, b"data: ")
    for _ in range(2):
        found.server.handle_exit(signal.SIGINT, None)
    found.thread.join(5)
    assert not found.thread.is_alive() and b"[DONE]" not in rest(client)
    assert found.engine.is_idle(1.0)


def test_a_server_whose_engine_has_failed_ends(server):
    found = server()
    found.engine.fails = True
    found.thread.join(5)
    assert not found.thread.is_alive() and found.server.failed
    engine = Scripted()  # never started
    with pytest.raises(RunError, match="computation has failed"):
        service = api.Service(engine, ByteTokenizer(), "mine")
        listen.serve(service, listen.bind("127.0.0.1", 0), None, print)


# ── TLS ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """{name: its certificate and key}: of a server, and of a client that this has signed; and of a stranger."""
    folder = tmp_path_factory.mktemp("tls")

    def make(name, *more):
        paths = folder / f"{name}.pem", folder / f"{name}.key"
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
        command += ["-subj", f"/CN={name}", "-out", paths[0], "-keyout", paths[1], *more]
        subprocess.run(command, check=True, capture_output=True)
        return paths

    found = {"server": make("localhost", "-addext", "subjectAltName=DNS:localhost"), "stranger": make("stranger")}
    signer = found["server"]
    return found | {"client": make("client", "-CA", signer[0], "-CAkey", signer[1])}


def over_tls(found, certificates, change=lambda context: None):
    context = ssl.create_default_context(cafile=str(certificates["server"][0]))
    change(context)
    with context.wrap_socket(found.connect(), server_hostname="localhost") as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        return rest(connection)


@TOOLS
def test_tls_and_nothing_below_it(certificates, server):
    found = server(tls=listen.Tls(*certificates["server"]).context())
    assert b'"ready"' in over_tls(found, certificates)
    assert b"HTTP" not in found.ask(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"), "no plain text on this port"

    def old(context):
        context.set_ciphers("ALL:@SECLEVEL=0")
        context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1

    with pytest.warns(DeprecationWarning), pytest.raises((ssl.SSLError, ConnectionError)):
        over_tls(found, certificates, old)
    assert b'"ready"' in over_tls(found, certificates)


@TOOLS
def test_clients_with_a_certificate(certificates, server):
    found = server(tls=listen.Tls(*certificates["server"], certificates["server"][0]).context())
    assert b'"ready"' in over_tls(found, certificates, lambda context: context.load_cert_chain(*certificates["client"]))
    for change in (lambda context: None, lambda context: context.load_cert_chain(*certificates["stranger"])):
        with contextlib.suppress(ssl.SSLError, ConnectionError):
            assert over_tls(found, certificates, change) == b""


@TOOLS
def test_files_that_are_no_certificates(certificates, tmp_path):
    certificate, key = certificates["server"]
    for files in ((tmp_path / "none", key), (key, certificate), (certificate, certificates["stranger"][1])):
        with pytest.raises(UsageError, match="--tls_cert=.* are no certificate and its key"):
            listen.Tls(*files).context()
    with pytest.raises(UsageError, match="--client_ca=.* is no certificate"):
        listen.Tls(certificate, key, key).context()


# ── serve.py ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def opened(monkeypatch):
    """serve.py without a model."""
    monkeypatch.setattr(serve, "Template", types.SimpleNamespace(read=lambda folder: Template()))
    opened_model = types.SimpleNamespace(tokenizer=ByteTokenizer(), workdir=Path("nowhere"))
    monkeypatch.setattr(serve.loaded, "open_model", lambda *_: opened_model)
    engines = []

    def open_engine(model, *given):
        engines.append((Scripted(), given))
        return engines[-1][0]

    monkeypatch.setattr(serve.loaded, "open_engine", open_engine)
    return engines


@pytest.mark.parametrize(
    "options, said",
    [
        (["--host=0.0.0.0"], "lets other machines in: give --keys, --tls_cert, --tls_key, or --insecure"),
        (["--host=0.0.0.0", "--keys=k"], "give --tls_cert, --tls_key, or"),
        (["--host=::", "--tls_cert=a", "--tls_key=b"], "give --keys, or"),
        (["--host=example.com"], "lets other machines in"),
        (["--tls_cert=a"], "belong together"),
        (["--client_ca=a"], "needs --tls_cert"),
        (["--tls_cert=nowhere", "--tls_key=nowhere"], "are no certificate"),
        (["--port=70000"], "from 0 to 65535"),
        (["--wrong=1"], "not an option"),
        (["--port=0", "--keys=nowhere"], "nowhere"),
    ],
)
def test_serving_refuses_what_would_let_others_in_by_mistake(options, said, opened):
    with pytest.raises(UsageError, match=re.escape(said)):
        serve.main(["--workdir=runs/mine", *options])


def test_a_port_that_is_taken(opened):
    with listen.bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=rf"--port={port}: nobody can listen there \(Address already in use\)"):
            serve.main(["--workdir=runs/mine", f"--port={port}"])
    assert not opened, "said before a model is loaded"


def test_packages_that_are_missing(monkeypatch):
    monkeypatch.setattr(serve, "NEEDED", ("starlette", "no_such_package"))
    with pytest.raises(UsageError, match=r"needs no_such_package: `pip install -r requirements-deploy.txt`"):
        serve.main(["--workdir=runs/mine"])


def test_addresses_of_this_machine():
    assert all(map(serve.is_local, ["127.0.0.1", "127.1.2.3", "::1", "localhost"]))
    assert not any(map(serve.is_local, ["0.0.0.0", "::", "10.0.0.1", "localhost.example", "fe80::1", ""]))


def test_only_without_keys_and_on_loopback_is_the_address_checked(opened, tmp_path):
    made = lambda *more: serve.service_of(serve.parse(["--workdir=runs/mine", *more])[0], Scripted(), ByteTokenizer())
    keys.add(tmp_path / "keys", "a", 0, [])
    assert made().only_local and made().keys is None and made().name == "mine"
    assert not made("--host=0.0.0.0", "--insecure").only_local
    assert not made(f"--keys={tmp_path / 'keys'}").only_local


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_serving_from_the_command_line(number, tmp_path):
    command = [sys.executable, "-m", "tests.scripted", f"--workdir={tmp_path}/mine", "--port=0"]
    process = subprocess.Popen(command, cwd=helpers.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        first = process.stdout.readline()
        port = int(re.fullmatch(r"mine at http://127.0.0.1:(\d+): Ctrl-C ends it\n", first)[1])
        with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
            client.sendall(post(STREAM.replace(b"200", b"40")))
            until(client, b"data: ")
            process.send_signal(number)
            assert rest(client).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert (process.returncode, err) == (0, "")
    assert out == "stopping: 1 requests are under way; once more ends at once\nstopped\n"


# ── OpenAI's own client ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_the_official_client(server, tmp_path):
    openai = pytest.importorskip("openai")
    key = keys.add(tmp_path / "keys", "a", 0, [])
    found = server(keys=keys.Keys(tmp_path / "keys"))
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{found.port}/v1", api_key=key, max_retries=0)
    messages = [{"role": "user", "content": "hi"}]
    asked = {"model": "mine", "max_tokens": 30, "temperature": 0}
    expected = TEXT.encode()[:30].decode()
    assert [model.id for model in client.models.list()] == ["mine"]
    whole = client.chat.completions.create(messages=messages, logprobs=True, top_logprobs=2, n=2, **asked)
    assert [choice.message.content for choice in whole.choices] == [expected] * 2
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 2 and whole.usage.completion_tokens == 60
    stream = client.chat.completions.create(
        messages=messages, stream=True, stream_options={"include_usage": True}, **asked
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == expected
    assert chunks[-2].choices[0].finish_reason == "length" and chunks[-1].usage.completion_tokens == 30
    assert client.completions.create(prompt="a", echo=True, **asked).choices[0].text == "a" + expected
    parts = [c.choices[0].text for c in client.completions.create(prompt="a", stream=True, stop=["wö"], **asked)]
    assert "".join(parts) == "Hëllo, "
    for error, change in (
        (openai.NotFoundError, {"model": "another"}), (openai.BadRequestError, {"n": 99}),
        (openai.BadRequestError, {"max_tokens": 9999}),
    ):  # fmt: skip
        with pytest.raises(error) as raised:
            client.chat.completions.create(messages=messages, **(asked | change))
        assert raised.value.body["message"]
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()
    gone = client.chat.completions.create(messages=messages, stream=True, **(asked | {"max_tokens": 200}))
    next(iter(gone))
    gone.close()
    assert found.engine.is_idle(1.0), "cancelled when the client goes"
    found.engine.gate.clear()
    full = []
    while found.engine.waiting < 8:
        full.append(found.connect(post(BODY, "/v1/completions", f"Authorization: Bearer {key}")))
        wait_for(lambda: found.engine.running + found.engine.waiting == len(full))
    with pytest.raises(openai.RateLimitError):
        client.chat.completions.create(messages=messages, **asked)
    for connection in full:
        connection.close()
    found.engine.gate.set()
    assert found.engine.is_idle()
    with pytest.raises(openai.APIError, match="computation failed"):
        for _ in client.chat.completions.create(messages=messages, stream=True, **asked):
            found.engine.fails = True

"""The HTTP interface, over an engine whose answers are known: what clients see, what is refused, who may ask."""

import json
import re
import threading
import time

import pytest
from scripted import EOS, TEXT, Scripted, Template, answer

from data.tokenizer import ByteTokenizer
from runtime.config import UsageError

pytest.importorskip("starlette", reason="pip install -r requirements-deploy.txt")

from starlette.testclient import TestClient

from serving import api, keys, schema
from serving.replies import Limits
from serving.requests import Sampling

NAME = "mine"


class Site:
    """A service, its engine and a client of it."""

    def __init__(self, engine=None, **options):
        self.engine = (engine or Scripted()).start()
        self.service = api.Service(self.engine, ByteTokenizer(), NAME, **({"template": Template()} | options))
        self.client = TestClient(self.service.app(), raise_server_exceptions=False)

    def complete(self, prompt="hi", **more):
        return self.client.post("/v1/completions", json={"model": NAME, "prompt": prompt} | more)

    def chat(self, content="hi", **more):
        messages = [{"role": "user", "content": content}]
        return self.client.post("/v1/chat/completions", json={"model": NAME, "messages": messages} | more)

    def ask(self, kind, content="hi", **more):
        return (self.chat if kind == "chat" else self.complete)(content, **more)


@pytest.fixture
def site(request):
    made = []

    def make(engine=None, **options):
        made.append(Site(engine, **options))
        return made[-1]

    yield make
    for found in made:
        found.engine.close()


def events(reply):
    """Of a stream: its events, without the last, which says that it is done."""
    assert reply.headers["content-type"].startswith("text/event-stream")
    parts = reply.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""] and all(part.startswith("data: ") for part in parts[:-1])
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def error(reply, status, code=None):
    """A reply that says what is wrong, in OpenAI's form, and briefly."""
    assert reply.status_code == status, reply.text
    assert len(reply.content) <= 4096
    found = reply.json()["error"]
    assert set(found) == {"message", "type", "param", "code"} and found["message"]
    assert code is None or found["code"] == code
    return found


BOTH = pytest.mark.parametrize("kind", ["completion", "chat"])

# ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_completion(site):
    reply = site().complete("hi", max_tokens=9, temperature=0).json()
    assert reply["id"].startswith("cmpl-") and reply["object"] == "text_completion" and reply["model"] == NAME
    (choice,) = reply["choices"]
    assert choice == {"index": 0, "text": "Hëllo, w", "logprobs": None, "finish_reason": "length"}
    assert reply["usage"] == {"prompt_tokens": 2, "completion_tokens": 9, "total_tokens": 11}
    assert reply["system_fingerprint"] == "f" * 8


def test_a_chat(site):
    found = site()
    reply = found.chat("short", temperature=0).json()
    assert reply["id"].startswith("chatcmpl-") and reply["object"] == "chat.completion"
    (choice,) = reply["choices"]
    assert choice["message"]["role"] == "assistant" and choice["message"]["content"].startswith("Hëllo, wörld! 😀 It")
    (seen,) = found.engine.seen
    assert bytes(seen.prompt) == b"user: short\n" and seen.stop_ids == {EOS, 10}
    assert seen.max_tokens == found.engine.context - len(seen.prompt), "none was said: as many as there is room for"


def test_a_stop_token_ends_and_gives_no_text(site):
    reply = site().complete("short").json()
    assert reply["choices"][0]["text"] == "abc" and reply["choices"][0]["finish_reason"] == "stop"
    assert reply["usage"]["completion_tokens"] == 3


def test_the_form_of_a_chat_stream(site):
    chunks = events(site().chat(max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert len({(c["id"], c["created"], c["model"], c["system_fingerprint"]) for c in chunks}) == 1
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    first, *middle, last, usage = chunks
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"]["content"] for c in middle) == TEXT.encode()[:12].decode()
    assert all(c["choices"][0]["finish_reason"] is None and c["usage"] is None for c in [first, *middle])
    assert last["choices"][0]["delta"] == {} and last["choices"][0]["finish_reason"] == "length"
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] == 12


def test_usage_comes_only_when_it_is_asked_for(site):
    assert not any("usage" in chunk for chunk in events(site().complete(stream=True)))


def joined(kind, chunks, n):
    """Of a stream's chunks, (text, logprobs, finish reason) of each choice, as in a whole answer."""
    found = [["", None, None] for _ in range(n)]
    for chunk in chunks:
        for choice in chunk["choices"]:
            mine = found[choice["index"]]
            assert mine[2] is None, "nothing comes after the end"
            mine[0] += (choice["delta"].get("content") or "") if kind == "chat" else choice["text"]
            mine[2] = choice["finish_reason"]
            for name, values in (choice["logprobs"] or {}).items():
                mine[1] = mine[1] or {}
                mine[1][name] = None if values is None else [*mine[1].get(name, []), *values]
    return found


@BOTH
@pytest.mark.parametrize("seed", range(12))
def test_a_stream_joined_is_the_whole_answer(kind, seed, site):
    """With several answers, stop strings, logprobs and echo; torn characters are in all of them."""
    n, more = 1 + seed % 3, {"seed": seed, "max_tokens": 5 + 3 * seed}
    more |= {"stop": ["wörld! 😀 I", "on. H"][: seed % 3]} if seed % 2 else {}
    if kind == "chat":
        more |= {"logprobs": True, "top_logprobs": seed % 4} if seed > 5 else {}
    else:
        more |= ({"logprobs": seed % 6} if seed > 5 else {}) | {"echo": seed % 4 == 3}
    found = site()
    content = "tör"
    whole = found.ask(kind, content, n=n, **more).json()["choices"]
    streamed = joined(kind, events(found.ask(kind, content, n=n, stream=True, **more)), n)
    for choice, (text, logprobs, finish) in zip(whole, streamed, strict=True):
        assert text == (choice["message"]["content"] if kind == "chat" else choice["text"])
        assert finish == choice["finish_reason"]
        assert logprobs == choice["logprobs"] or (logprobs is None and not (choice["logprobs"] or {}).get("content"))
    numbers = [request.sampling.seed for request in found.engine.seen[:n]]
    assert numbers == list(range(seed, seed + n))
    texts = [answer(request) for request in found.engine.seen[:n]]
    if not more.get("stop") and not more.get("echo"):
        expected = [bytes(ids[: more["max_tokens"]]).decode(errors="replace") for ids in texts]
        assert [text for text, _, _ in streamed] == expected


@BOTH
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_and_leaks_nowhere(kind, stream, site):
    found = site()
    more = {"logprobs": True} if kind == "chat" else {"logprobs": 0}
    reply = found.ask(kind, max_tokens=200, temperature=0, stop=["nothing", "örld"], stream=stream, **more)
    if stream:
        text, logprobs, finish = joined(kind, events(reply), 1)[0]
    else:
        (choice,) = reply.json()["choices"]
        text = choice["message"]["content"] if kind == "chat" else choice["text"]
        logprobs, finish = choice["logprobs"], choice["finish_reason"]
    assert (text, finish) == ("Hëllo, w", "stop")
    bytes_ = [e["bytes"][0] for e in logprobs["content"]] if kind == "chat" else logprobs["tokens"]
    assert len(bytes_) == len(text.encode()), "not one token of what was cut away"
    assert found.engine.is_idle(), "the engine was told"


def test_logprobs_of_a_completion(site):
    (choice,) = site().complete("a\u0304", max_tokens=2, temperature=0, logprobs=2, echo=True).json()["choices"]
    assert choice["text"] == "a\u0304H\ufffd"
    assert choice["logprobs"] == {
        "tokens": ["a", "bytes:\\xcc", "bytes:\\x84", "H", "bytes:\\xc3"],
        "token_logprobs": [None, -20.4, -13.2, -7.2, -19.5],
        "top_logprobs": [
            None,
            {"\x01": -0.1, "\x02": -0.2, "bytes:\\xcc": -20.4},
            {"\x01": -0.1, "\x02": -0.2, "bytes:\\x84": -13.2},
            {"\x01": -0.1, "\x02": -0.2, "H": -7.2},
            {"\x01": -0.1, "\x02": -0.2, "bytes:\\xc3": -19.5},
        ],
        "text_offset": [0, 1, 1, 2, 3],
    }


def test_logprobs_of_a_chat(site):
    (choice,) = site().chat(max_tokens=2, temperature=0, logprobs=True, top_logprobs=1).json()["choices"]
    one = {"token": "\x01", "logprob": -0.1, "bytes": [1]}
    assert choice["logprobs"]["content"] == [
        {"token": "H", "logprob": -7.2, "bytes": [72], "top_logprobs": [one]},
        {"token": "\ufffd", "logprob": -19.5, "bytes": [195], "top_logprobs": [one]},
    ]


def test_what_the_evaluation_harness_asks(site):
    """lm-eval's local-completions: ids of a context and what follows, of which it reads all logprobs but the last."""
    found = site()
    found.engine.script = lambda request: [EOS]  # even the end of a text is a token here, or one too few would be read
    rows = [[1, 2, 3, 4], [5, 6]]
    reply = found.complete(rows, max_tokens=1, logprobs=1, echo=True, temperature=0, seed=1234).json()
    assert [choice["index"] for choice in reply["choices"]] == [0, 1]
    for row, choice in zip(rows, reply["choices"], strict=True):
        logprobs = choice["logprobs"]
        assert logprobs["token_logprobs"][1:-1] == [-id / 10 for id in row[1:]]
        assert [max(top.values()) for top in logprobs["top_logprobs"][1:-1]] == [-0.1] * (len(row) - 1)
        assert choice["finish_reason"] == "stop"
    scored = found.complete([1, 2, 3], max_tokens=0, logprobs=0, echo=True).json()["choices"][0]
    assert scored["logprobs"]["token_logprobs"] == [None, -0.2, -0.3]


def test_several_prompts_with_several_answers_each(site):
    reply = site().complete(["a", "bc"], n=2, max_tokens=1, echo=True).json()
    assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
    assert [choice["text"][0] for choice in reply["choices"]] == ["a", "a", "b", "b"]
    assert reply["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}


def test_what_is_asked_of_the_engine(site):
    found = site()
    more = {"temperature": 0.5, "top_p": 0.9, "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.1, "seed": -1}
    found.complete("ab", max_tokens=3, logprobs=4, presence_penalty=0, user="me", tools=[], stop=None, **more)
    (seen,) = found.engine.seen
    assert seen.sampling == Sampling(0.5, 40, 0.9, 0.1, 1.1, 2**31 - 1)
    assert (seen.prompt, seen.max_tokens, seen.top_logprobs, seen.echo) == ((97, 98), 3, 4, False)
    found.chat(max_completion_tokens=4)
    assert found.engine.seen[-1].max_tokens == 4 and found.engine.seen[-1].top_logprobs == -1
    found.complete("", max_tokens=1)
    assert found.engine.seen[-1].prompt == (EOS,), "a text that begins"


def test_a_chat_of_parts_and_of_a_developer(site):
    found = site()
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    before = [{"role": "developer", "content": "be brief"}, {"role": "assistant", "content": "ok", "refusal": None}]
    found.client.post(
        "/v1/chat/completions",
        json={"model": NAME, "messages": [*before, {"role": "user", "content": parts}], "max_tokens": 1},
    )
    assert bytes(found.engine.seen[0].prompt) == b"system: be brief\nassistant: ok\nuser: ab\n"


def test_without_a_template_nobody_invents_one(site):
    said = error(site(template=None).chat(), 400, "no_chat_template")
    assert "/v1/completions" in said["message"]


def test_what_a_template_refuses_is_told(site):
    messages = [{"role": "assistant", "content": "x"}]
    reply = site().client.post("/v1/chat/completions", json={"model": NAME, "messages": messages})
    assert "last message to be the user's" in error(reply, 400, "chat_template")["message"]


def test_an_answer_says_which_checkpoint_made_it(site):
    found = site()
    assert found.complete().json()["system_fingerprint"] == "f" * 8
    found.engine.fingerprint = "e" * 8
    assert {c["system_fingerprint"] for c in events(found.chat(max_tokens=5, stream=True))} == {"e" * 8}


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────

SECRET = "4d5e6f"
LONG = SECRET * 1000
BAD = {  # {what is wrong: (keys beside model and prompt, what is said)}
    "n": ({"n": schema.MOST_N + 1}, "from 1 to 16"),
    "n huge": ({"n": 10**300}, "from 1 to 16"),
    "n of another kind": ({"n": "1"}, "whole number"),
    "n true": ({"n": True}, "whole number"),
    "too many answers": ({"prompt": ["a"] * 100, "n": 2}, "at most 128"),
    "too many prompts": ({"prompt": ["a"] * 129}, "at most 128"),
    "no prompts": ({"prompt": []}, "one at least"),
    "no prompt": ({"prompt": None}, "is a text"),
    "prompts of both kinds": ({"prompt": ["a", 1]}, "is a text"),
    "an id that is none": ({"prompt": [256]}, "from 0 to 255"),
    "an id below": ({"prompt": [1, -1]}, "from 0 to 255"),
    "an id that is a switch": ({"prompt": [1, True]}, "from 0 to 255"),
    "half a character": ({"prompt": "\ud800" + SECRET}, "half a character"),
    "what the tokenizer keeps": ({"prompt": "\0" + SECRET}, "cannot be encoded"),
    "a prompt that is too long": ({"prompt": LONG}, "256 tokens together"),
    "ids that are too many": ({"prompt": [1] * 257}, "256 tokens together"),
    "an answer that is too long": ({"max_tokens": 256}, "256 tokens together"),
    "no tokens": ({"max_tokens": 0}, "1 or more"),
    "logprobs": ({"logprobs": 6}, "from 0 to 5"),
    "logprobs below": ({"logprobs": -1}, "from 0 to 5"),
    "logprobs of a chat": ({"logprobs": True}, "from 0 to 5"),
    "temperature": ({"temperature": 2.1}, "from 0 to 2"),
    "temperature without end": ({"temperature": 10**400}, "from 0 to 2"),
    "top_p": ({"top_p": -0.1}, "from 0 to 1"),
    "top_k": ({"top_k": -1}, "from 0"),
    "stop list": ({"stop": ["a"] * 17}, "at most 16"),
    "stop length": ({"stop": LONG}, "at most 256 characters"),
    "stop empty": ({"stop": [""]}, "empty"),
    "stop of another kind": ({"stop": {SECRET: 1}}, "a text, or a list"),
    "an unknown key": ({SECRET: 1}, "not known here"),
    "what is not there": ({"presence_penalty": 1}, "has not got it"),
    "tools": ({"tools": [{SECRET: 1}]}, "has not got it"),
    "stream": ({"stream": SECRET}, "true or false"),
    "usage without a stream": ({"stream": False, "stream_options": {"include_usage": True}}, "with stream=true"),
    "another option": ({"stream": True, "stream_options": {SECRET: True}}, "with stream=true"),
    "model": ({"model": LONG}, "at most 256 characters"),
}
BAD_CHAT = {
    "no messages": ({"messages": []}, "1 to 1024"),
    "too many messages": ({"messages": [{"role": "user", "content": ""}] * 1025}, "1 to 1024"),
    "another role": ({"messages": [{"role": SECRET, "content": ""}]}, "role, one of"),
    "no content": ({"messages": [{"role": "user"}]}, "is a text"),
    "another key": ({"messages": [{"role": "user", "content": "", SECRET: 1}]}, "nothing else"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": SECRET}]}]},
        "type text",
    ),
    "a text that is too long": ({"messages": [{"role": "user", "content": LONG}]}, "256 tokens together"),
    "both, unequal": ({"max_tokens": 1, "max_completion_tokens": 2}, "another value"),
    "top_logprobs alone": ({"top_logprobs": 1}, "logprobs=true"),
    "top_logprobs": ({"logprobs": True, "top_logprobs": 21}, "from 0 to 20"),
    "a template of one's own": ({"chat_template": SECRET}, "not known here"),
}


@pytest.fixture(scope="module")
def plain():
    """A service that nothing of what is refused reaches."""
    found = Site()
    yield found
    assert not found.engine.seen
    found.engine.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("what", BAD)
def test_bad_completions_are_refused_in_a_sentence_that_repeats_nothing(what, stream, plain):
    more, said = BAD[what]
    body = json.dumps({"model": NAME, "prompt": "x", "stream": stream} | more)  # with half characters escaped
    reply = plain.client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert said in error(reply, 400)["message"] and SECRET not in reply.text


@pytest.mark.parametrize("what", BAD_CHAT)
def test_bad_chats_are_refused_in_a_sentence_that_repeats_nothing(what, plain):
    more, said = BAD_CHAT[what]
    reply = plain.chat(**more)
    assert said in error(reply, 400)["message"] and SECRET not in reply.text


def test_another_model_is_not_here(plain):
    error(plain.complete(model="gpt"), 404, "model_not_found")
    error(plain.client.get(f"/v1/models/{SECRET}"), 404, "model_not_found")
    assert plain.client.get(f"/v1/models/{NAME}").json()["id"] == NAME


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[1]", b"null", b'{"a": NaN}', b'{"a": Infinity}', b"\xff\xfe", b"[" * 100_000, b"9" * 5000,
     b'{"model": "mine"' + b"," * 10, '{"model": "é"}'.encode("utf-16"), b"\0"],
    ids=range(12),
)  # fmt: skip
def test_broken_json(body, plain):
    reply = plain.client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    error(reply, 400)


def test_a_body_is_json_and_says_so(plain):
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        error(plain.client.post("/v1/completions", content=b"{}", headers={"content-type": kind}), 415)
    gzip = {"content-type": "application/json", "content-encoding": "gzip"}
    error(plain.client.post("/v1/completions", content=b"{}", headers=gzip), 415)


def test_a_body_is_counted_as_it_comes(site):
    found = site(limits=Limits(body_bytes=1000))
    read = []

    def body():
        for _ in range(100):
            read.append(1)
            yield b" " * 100

    headers = {"content-type": "application/json"}
    error(found.client.post("/v1/completions", content=body(), headers=headers), 413)  # in chunks, no length said
    error(found.client.post("/v1/completions", content=b" " * 1001, headers=headers), 413)
    assert found.service._bodies._held == 0


def test_all_bodies_together_are_bounded(site):
    found = site(limits=Limits(bodies_bytes=1000))
    found.service._bodies._held = 990
    assert error(found.complete(), 429)
    assert found.service._bodies._held == 990
    found.service._bodies._held = 0
    assert found.complete().status_code == 200


@pytest.mark.parametrize(
    "path",
    ["/nothing", "/v1", "/v1/", "//v1/models", "/v1/models/", "/%2e%2e/%2e%2e/etc/passwd", "/v1/models/..%2f",
     "/v1/models/%00", "/page.html", "/serving/keys.py", "/v1/completions/", f"/{SECRET}" * 500, "/%ff%fe"],
)  # fmt: skip
def test_there_are_no_other_pages(path, plain):
    reply = plain.client.get(path, follow_redirects=False)
    error(reply, 404)
    assert SECRET not in reply.text


def test_a_page_asked_in_another_way(plain):
    reply = plain.client.get("/v1/completions")
    error(reply, 405)
    assert reply.headers["allow"] == "POST"
    error(plain.client.delete("/v1/models"), 405)


# ── load, failures, the end ──────────────────────────────────────────────────────────────────────────────────────


def test_a_full_queue_refuses_and_keeps_nothing_of_the_request(site):
    found = site(Scripted(slots=1, most_waiting=4))
    found.engine.gate.clear()
    reply = found.complete(["a"] * 8)
    error(reply, 429, "overloaded")
    assert int(reply.headers["retry-after"]) >= 1
    assert found.engine.is_idle(), "those that had a place in the queue have left it"
    found.engine.gate.set()
    assert found.complete().status_code == 200


@BOTH
def test_a_failing_computation(kind, site):
    found = site()
    found.engine.gate.clear()
    replies = []
    asking = [
        threading.Thread(target=lambda stream=stream: replies.append((stream, found.ask(kind, stream=stream))))
        for stream in (False, True)
    ]
    for thread in asking:
        thread.start()
    while len(found.engine.seen) < 2:
        time.sleep(0.005)
    found.engine.fails = True
    for thread in asking:
        thread.join()
    whole, streamed = (reply for _, reply in sorted(replies, key=lambda pair: pair[0]))
    error(whole, 500)
    assert whole.headers["x-should-retry"] == "false"
    assert streamed.status_code == 200 and streamed.text.count("data: ") == 1 and "[DONE]" not in streamed.text
    assert json.loads(streamed.text.removeprefix("data: "))["error"]["type"] == "server_error"
    error(found.complete(), 503)
    assert found.client.get("/health").status_code == 503


def test_an_answer_that_takes_too_long_is_given_up(site):
    found = site(Scripted(seconds=0.02), limits=Limits(answer_seconds=0.15))
    reply = found.complete(max_tokens=200)
    error(reply, 504, "timeout")
    assert found.engine.is_idle()
    streamed = found.complete(max_tokens=200, stream=True)
    *parts, last, end = streamed.text.split("\n\n")
    assert parts and json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout" and not end


def test_a_stream_that_waits_says_that_it_lives(site):
    found = site(limits=Limits(beat_seconds=0.02))
    found.engine.gate.clear()
    threading.Timer(0.15, found.engine.gate.set).start()
    text = found.complete(max_tokens=1, stream=True).text
    assert 2 <= text.count(": still here\n\n") <= 10 and text.endswith("data: [DONE]\n\n")


def test_draining_lets_answers_end_and_takes_no_more(site):
    found = site(Scripted(seconds=0.01))
    replies = []
    asking = threading.Thread(target=lambda: replies.append(found.complete(max_tokens=50)))
    asking.start()
    while not found.engine.running:
        time.sleep(0.002)
    draining = threading.Thread(target=found.service.drain, args=(10,))
    draining.start()
    while not found.service.draining:
        time.sleep(0.002)
    reply = found.complete()
    error(reply, 503)
    assert reply.headers["retry-after"]
    assert found.client.get("/health").json() == {"status": "draining"}
    asking.join()
    draining.join()
    assert replies[0].json()["usage"]["completion_tokens"] == 50


# ── keys ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def bearer(key):
    return {"authorization": f"Bearer {key}"}


@pytest.fixture
def locked(site, tmp_path):
    """A service with keys, its file of them, and a clock that the test turns."""
    file, clock = tmp_path / "keys.jsonl", [0.0]
    key = keys.add(file, "alice", 2, [])
    found = site(keys=keys.Keys(file, lambda: clock[0]))
    return found, file, key, clock


def test_who_has_a_key_may_ask(locked):
    found, file, key, _ = locked
    assert key not in file.read_text() and file.stat().st_mode & 0o077 == 0
    for headers in ({}, bearer("wrong"), bearer(""), {"authorization": key}, bearer(key + "x"), bearer("é" * 10)):
        found.client.headers = headers if "é" not in str(headers) else {"authorization": b"Bearer \xff\xfe"}
        for path in ("/v1/models", f"/v1/models/{NAME}", "/metrics"):
            reply = found.client.get(path)
            error(reply, 401)
            assert reply.headers["www-authenticate"] == "Bearer"
        error(found.complete(), 401, "invalid_api_key")
        error(found.chat(), 401)
    found.client.headers = bearer(key)
    assert found.complete().status_code == 200 and found.client.get("/v1/models").status_code == 200
    found.client.headers = {}
    assert all(found.client.get(path).status_code == 200 for path in ("/", "/health", "/openapi.json"))


def test_without_a_key_the_body_is_not_read(locked):
    found, *_ = locked
    reply = found.client.post("/v1/completions", content=b"{" * 10**6)
    error(reply, 401)
    assert reply.headers["connection"] == "close"


def test_a_key_has_a_rate(locked):
    found, _, key, clock = locked
    found.client.headers = bearer(key)
    assert [found.complete().status_code for _ in range(3)] == [200, 200, 429]
    reply = found.complete()
    error(reply, 429, "rate_limit_exceeded")
    assert reply.headers["retry-after"] == "30"
    clock[0] += 30
    assert [found.complete().status_code for _ in range(2)] == [200, 429]


def test_a_revoked_key_is_none(locked):
    found, file, key, _ = locked
    other = keys.add(file, "bob", 0, ["another"])
    found.client.headers = bearer(key)
    assert found.complete().status_code == 200
    keys.remove(file, "alice")
    error(found.complete(), 401)
    found.client.headers = bearer(other)
    error(found.complete(), 403, "model_not_allowed")
    assert found.client.get("/v1/models").json()["data"] == []


def test_with_a_damaged_file_of_keys_nobody_comes_in(locked):
    found, file, key, _ = locked
    found.client.headers = bearer(key)
    kept = file.read_text()
    for damaged in (kept + "{", kept.replace('"sha256": "', '"sha256": "zz'), '{"name": 1}\n'):
        file.write_text(damaged)
        for _ in range(2):
            error(found.complete(), 503, "no_keys")
    file.unlink()
    error(found.complete(), 503)
    file.write_text(kept)
    assert found.complete().status_code == 200


def test_keys_on_the_command_line(tmp_path, capsys):
    file = tmp_path / "keys.jsonl"
    assert keys.main(["add", str(file), "--name=a", "--per_minute=5", "--models=x,y"]) == 0
    shown = capsys.readouterr().out.strip()
    (key,) = keys.read(file)
    assert shown.startswith("sl-") and key == keys.Key("a", keys.digest_of(shown), 5, ("x", "y"))
    with pytest.raises(UsageError, match="--name=a has a key"):
        keys.main(["add", str(file), "--name=a"])
    with pytest.raises(UsageError, match="those that have one: a"):
        keys.main(["remove", str(file), "--name=b"])
    with pytest.raises(UsageError, match="expected 0 or more"):
        keys.main(["add", str(file), "--name=b", "--per_minute=-1"])
    keys.main(["remove", str(file), "--name=a"])
    assert keys.read(file) == ()
    file.write_text("hello\n")
    with pytest.raises(UsageError, match="line 1: this is no key"):
        keys.main(["add", str(file), "--name=b"])


# ── pages ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_models_say_what_is_served(plain):
    (model,) = plain.client.get("/v1/models").json()["data"]
    wanted = {"id": NAME, "object": "model", "step": 7, "fingerprint": "f" * 8, "context": 256, "chat": True}
    assert wanted.items() <= model.items()


def test_health_and_metrics(site):
    found = site()
    assert found.client.get("/health").json() == {"status": "ready"}
    found.complete("abc", max_tokens=5)
    found.complete("abc", max_tokens=5, stream=True)
    found.complete(n=0)
    found.client.get("/" + SECRET)
    lines = found.client.get("/metrics").text.splitlines()
    for line in (
        'slackline_requests_total{path="/v1/completions",status="200"} 2',
        'slackline_requests_total{path="/v1/completions",status="400"} 1',
        'slackline_requests_total{path="other",status="404"} 1',
        'slackline_tokens_total{of="prompts"} 6',
        'slackline_tokens_total{of="answers"} 10',
        "slackline_first_token_seconds_count 2",
        "slackline_next_token_seconds_count 8",
        "slackline_running 0",
        "slackline_slots 4",
        "slackline_ready 1",
    ):
        assert line in lines, line
    assert all(re.fullmatch(r"(# TYPE .*|slackline_\w+(\{.*\})? [-+.e\d]+)", line) for line in lines)


def test_the_page_is_one_file_that_asks_nobody_else(plain):
    reply = plain.client.get("/")
    policy = reply.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy and "style-src 'sha256-" in policy
    assert not re.search(r"https?://|<script [^>]|innerHTML| style=| on\w+=", reply.text)
    assert reply.headers["x-content-type-options"] == "nosniff"


def test_the_interface_describes_itself(plain):
    found = plain.client.get("/openapi.json").json()
    assert found["openapi"].startswith("3.1") and len(found["paths"]) == 6
    body = found["paths"]["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["n"]["maximum"] == schema.MOST_N and body["additionalProperties"] is False
    said = error(plain.complete(unknown=1), 400)["message"]
    described = set(body["properties"]) - set(schema.UNREAD)
    assert set(said.partition("Known are ")[2].rstrip(".").split(", ")) == described


def test_what_is_addressed_to_another_machine_is_turned_away(site):
    """A web page may make its own name point to 127.0.0.1, and then ask as itself."""
    found = site(only_local=True)
    for host in ("evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "", "[::1].x"):
        error(found.client.get("/v1/models", headers={"host": host}), 421)
    for host in ("localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000"):
        assert found.client.get("/v1/models", headers={"host": host}).status_code == 200

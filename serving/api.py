"""The HTTP interface: OpenAI's completions and chat, over an engine.

Nothing here computes: texts become ids, ids become text, and between them is `engine.submit`.
"""

import asyncio
import base64
import hashlib
import math
import re
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from data.tokenizer import Tokenizer, encode_prompt
from serving import openapi, schema
from serving.answers import Chat, Choice, Completion, Usage
from serving.body import Bodies
from serving.errors import ApiError, dumps
from serving.keys import Key, Keys, UnreadableKeys
from serving.metrics import Metrics
from serving.replies import CLIENT_GONE, Answering, Limits, Stream
from serving.requests import Full, Request
from serving.running import Engine, Gone, Running
from serving.schema import Asked
from serving.text import vocabulary

LOCAL = re.compile(r"(localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?")  # a Host header of this machine
HEADER_BYTES = 16 * 1024
PAGE = Path(__file__).with_name("page.html")
Handler = Callable[[HttpRequest], Awaitable[Response]]


class Template(Protocol):
    """What a server needs of `data.template.Template`. Both raise ValueError with a sentence."""

    def prompt(self, messages: Any, tokenizer: Any) -> list[int]: ...

    def closing(self, tokenizer: Any) -> Iterable[int]: ...


class Service:
    """One model on one engine.

    name: of the model. keys: without them everybody may ask. only_local: requests must be addressed to this machine by
    a name of its own, so that no web page can ask by a name that it has made point here.

    Raises ValueError for a template that closes no answer.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        name: str,
        template: Template | None = None,
        keys: Keys | None = None,
        only_local: bool = False,
        limits: Limits = Limits(),  # noqa: B008  frozen
    ):
        self.engine, self.tokenizer, self.name, self.template = engine, tokenizer, name, template
        self.keys, self.only_local, self.limits = keys, only_local, limits
        self.metrics, self.draining, self._created = Metrics(), False, int(time.time())
        self._bodies, self._page = Bodies(limits), PAGE.read_text()
        self._policy = _policy(self._page)
        self._longest = max(1, int(tokenizer.token_bytes().max())) * engine.context  # bytes of a prompt
        self._stop_ids = frozenset({tokenizer.eos} - {-1})
        vocabulary(tokenizer)  # read now, and not while somebody waits
        self._closing = self._stop_ids.union(template.closing(tokenizer) if template else ())

    def app(self) -> ASGIApp:
        routes: list[tuple[str, str, Handler]] = [
            ("/v1/completions", "POST", self.completions),
            ("/v1/chat/completions", "POST", self.chat),
            ("/v1/models", "GET", self.models),
            ("/v1/models/{name}", "GET", self.model),
            ("/health", "GET", self.health),
            ("/metrics", "GET", self.show_metrics),
            ("/openapi.json", "GET", self.describe),
            ("/", "GET", self.page),
        ]
        app = Starlette(
            routes=[Route(path, handler, methods=[method]) for path, method, handler in routes],
            exception_handlers={ApiError: _tell, HTTPException: _no_page, Gone: _nobody, Exception: _fault},  # pyright: ignore
        )
        app.router.redirect_slashes = False  # it would repeat what the client has sent
        return Door(app, self, {path for path, _, _ in routes})

    def drain(self, seconds: float) -> None:
        """Takes no more requests; returns when all have their answer, or after so many seconds."""
        self.draining = True
        self.engine.drain(seconds)

    @property
    def is_ready(self) -> bool:
        return self.engine.ready and not self.draining

    # ── pages ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def health(self, request: HttpRequest) -> Response:
        state = "ready" if self.is_ready else "draining" if self.draining else "not ready"
        return _json({"status": state}, 200 if self.is_ready else 503)

    async def show_metrics(self, request: HttpRequest) -> Response:
        self._key(request)
        engine = self.engine
        now = {"running": engine.running, "waiting": engine.waiting, "slots": engine.slots, "step": engine.step}
        return Response(self.metrics.text(now | {"ready": int(self.is_ready)}), media_type="text/plain; version=0.0.4")

    async def models(self, request: HttpRequest) -> Response:
        key = self._key(request)
        return _json({"object": "list", "data": [self._model()] if _may_ask(key, self.name) else []})

    async def model(self, request: HttpRequest) -> Response:
        self._check_model(self._key(request), request.path_params["name"])
        return _json(self._model())

    async def describe(self, request: HttpRequest) -> Response:
        engine, has_keys = self.engine, self.keys is not None
        return _json(openapi.describe(self.name, engine.context, engine.vocab_size, has_keys))

    async def page(self, request: HttpRequest) -> Response:
        return Response(self._page, 200, {"content-security-policy": self._policy}, "text/html")

    def _model(self) -> dict[str, Any]:
        engine = self.engine
        about = {"step": engine.step, "fingerprint": engine.fingerprint, "context": engine.context}
        about["chat"] = self.template is not None
        return {"id": self.name, "object": "model", "created": self._created, "owned_by": "slackline", **about}

    # ── answers ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def completions(self, request: HttpRequest) -> Response:
        key, body = await self._open(request)
        asked = schema.read_completion(schema.parse(body), self.engine.vocab_size, self.engine.context)
        self._check_model(key, asked.model)
        self._check_length(sum(len(prompt) for prompt in asked.prompts if isinstance(prompt, str)), len(asked.prompts))
        prompts = [await asyncio.to_thread(self._encode, prompt) for prompt in asked.prompts]
        form = Completion(self.name, self.tokenizer, asked.top_logprobs >= 0)
        return await self._answer(request, asked, prompts, form, self._stop_ids, goes_on=True)

    async def chat(self, request: HttpRequest) -> Response:
        key, body = await self._open(request)
        asked = schema.read_chat(schema.parse(body))
        self._check_model(key, asked.model)
        if self.template is None:
            message = "This model has no chat template, so that nobody knows how it was told who speaks."
            raise ApiError(400, f"{message} Ask it at /v1/completions.", "no_chat_template", "messages")
        self._check_length(sum(len(message["content"]) for message in asked.messages), 1)
        try:
            prompt = await asyncio.to_thread(self.template.prompt, list(asked.messages), self.tokenizer)
        except ValueError as error:
            raise ApiError(400, str(error), "chat_template", "messages") from None
        form = Chat(self.name, self.tokenizer, asked.top_logprobs >= 0)
        return await self._answer(request, asked, [tuple(prompt)], form, self._closing, goes_on=False)

    async def _answer(
        self,
        request: HttpRequest,
        asked: Asked,
        prompts: list[tuple[int, ...]],
        form: Completion,
        stop_ids: frozenset[int],
        goes_on: bool,
    ) -> Response:
        wanted = [self._request(asked, prompt, number, stop_ids) for prompt in prompts for number in range(asked.n)]
        if not self.is_ready:
            raise ApiError(503, "The server is not ready, or is stopping.", "not_ready", again_after=5)
        choices = [
            Choice(number, self.tokenizer, asked.stops, stop_ids, goes_on and not asked.echo)
            for number in range(len(wanted))
        ]
        try:
            running = Running(self.engine, wanted)
        except Full:
            wait = 1 + self.engine.waiting / max(1, self.engine.slots)
            raise ApiError(429, "Too many requests wait already.", "overloaded", again_after=wait) from None
        except ValueError as error:
            raise ApiError(400, str(error), "invalid_value") from None
        usage = Usage(sum(map(len, prompts)))
        self.metrics.tokens["prompts"] += usage.prompt
        answering = Answering(form, running, choices, usage, asked.include_usage, self.metrics, self.limits)
        return Stream(answering) if asked.stream else await answering.whole(request.receive)

    def _request(self, asked: Asked, prompt: tuple[int, ...], number: int, stop_ids: frozenset[int]) -> Request:
        room = self.engine.context - len(prompt)
        max_tokens = room if asked.max_tokens is None else asked.max_tokens
        if max_tokens > room or (not max_tokens and not asked.echo):
            raise schema.too_long(self.engine.context)
        # Who has a text scored asks for one token more, and takes the last logprob for that one's: it is handed out.
        stops = frozenset() if asked.echo and max_tokens == 1 else stop_ids
        sampling = replace(asked.sampling, seed=(asked.sampling.seed + number) % 2**31)
        return Request(prompt, max_tokens, sampling, stops, asked.top_logprobs, asked.echo)

    def _check_length(self, characters: int, texts: int) -> None:
        """Before anything is encoded: more characters than all tokens could have are too many."""
        if characters > self._longest * texts:
            raise schema.too_long(self.engine.context)

    def _encode(self, prompt: str | tuple[int, ...]) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return prompt
        self._check_length(len(prompt), 1)
        try:
            return tuple(encode_prompt(self.tokenizer, prompt).tolist())
        except ValueError:
            message = "This text cannot be encoded: it holds a character that the tokenizer keeps for itself."
            raise ApiError(400, message, "invalid_value", "prompt") from None

    # ── who may ask ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def _open(self, request: HttpRequest) -> tuple[Key | None, bytes]:
        """Whose request it is, which counts, and its body."""
        key = self._key(request)
        if key and (seconds := self.keys.wait(key) if self.keys else 0):
            message = f"This key may ask {key.per_minute} times a minute."
            raise ApiError(429, message, "rate_limit_exceeded", again_after=math.ceil(seconds), close=True)
        return key, await self._bodies.read(request)

    def _key(self, request: HttpRequest) -> Key | None:
        if self.keys is None:
            return None
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        try:
            key = self.keys.find(given.strip()) if scheme.lower() == "bearer" else None
        except UnreadableKeys:
            raise ApiError(503, "The server's file of keys cannot be read.", "no_keys", close=True) from None
        if key is None:
            message = "There is no such key. Send one that this server knows, as `authorization: Bearer KEY`."
            raise ApiError(401, message, "invalid_api_key", close=True)
        return key

    def _check_model(self, key: Key | None, name: str) -> None:
        if not _may_ask(key, self.name):
            raise ApiError(403, "This key may not ask this server's model.", "model_not_allowed", "model")
        if name not in ("", self.name):
            raise ApiError(
                404, "There is no such model here: /v1/models says which there is.", "model_not_found", "model"
            )


def _may_ask(key: Key | None, name: str) -> bool:
    return key is None or not key.models or name in key.models


class Door:
    """Around all of it: counts replies, and turns away headers that are too long, or addressed to another machine."""

    def __init__(self, app: ASGIApp, service: Service, paths: set[str]):
        self._app, self._service, self._paths = app, service, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self._service.metrics.replies[path, message["status"]] += 1
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        refused = self._refused(scope["headers"])
        await (refused.reply() if refused else self._app)(scope, receive, counted)

    def _refused(self, headers: list[tuple[bytes, bytes]]) -> ApiError | None:
        if sum(len(name) + len(value) for name, value in headers) > HEADER_BYTES:
            return ApiError(431, f"The headers have more than {HEADER_BYTES:,} bytes.", close=True)
        if {b"content-length", b"transfer-encoding"} <= {name for name, _ in headers}:  # a proxy may believe the other
            return ApiError(400, "The body has two lengths.", close=True)
        host = next((value.decode("latin-1") for name, value in headers if name == b"host"), "")
        if self._service.only_local and not LOCAL.fullmatch(host):
            message = "This server answers to localhost only. To be reached by another name it needs --keys."
            return ApiError(421, message, close=True)
        return None


# ── replies ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _json(x: Any, status: int = 200) -> Response:
    return Response(dumps(x), status, {"cache-control": "no-store"}, "application/json")


def _policy(page: str) -> str:
    """Nothing on the page is from elsewhere, and nothing runs in it but what it was shipped with."""
    allowed = [
        "default-src 'none'",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
    for tag, text in re.findall(r"<(script|style)>(.*?)</\1>", page, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        allowed.append(f"{tag}-src 'sha256-{digest}'")
    return "; ".join(allowed)


async def _tell(request: HttpRequest, error: ApiError) -> Response:
    return error.reply()


async def _nobody(request: HttpRequest, error: Gone) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _no_page(request: HttpRequest, error: HTTPException) -> Response:
    said = "There is no such page" if error.status_code == 404 else "This page is not asked in this way"
    reply = ApiError(error.status_code, f"{said}: /openapi.json lists what there is.").reply()
    reply.headers.update(error.headers or {})
    return reply


async def _fault(request: HttpRequest, error: Exception) -> Response:
    traceback.print_exception(error)  # whoever mends it needs to know where
    return ApiError(500, "The server has a fault, which its log describes.", "server_error").reply()

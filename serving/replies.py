"""An answer on its way to the client: whole, or as server-sent events."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from serving.answers import Choice, Completion, Piece, Usage
from serving.errors import ApiError, dumps
from serving.metrics import Metrics
from serving.requests import Token
from serving.running import Gone, Running

CLIENT_GONE = 499  # nobody reads it but the metrics: nginx's number
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}  # a proxy passes each event on at once


@dataclass(frozen=True)
class Limits:
    """Seconds and bytes. bodies_bytes: of all bodies that are being read. beat_seconds: after so long a silence a
    stream says that it lives. send_seconds: a client that takes nothing for so long has gone."""

    body_bytes: int = 4 * 2**20
    bodies_bytes: int = 64 * 2**20
    body_seconds: float = 30
    answer_seconds: float = 600
    send_seconds: float = 30
    beat_seconds: float = 15


@dataclass
class Answering:
    """What one HTTP request has asked, under way. choices: one for each ticket that is running."""

    form: Completion
    running: Running
    choices: Sequence[Choice]
    usage: Usage
    include_usage: bool
    metrics: Metrics
    limits: Limits

    async def pieces(self, receive: Receive) -> AsyncGenerator[tuple[Choice, Piece] | None, None]:
        """Until every choice has finished; None where it has been silent for long. Raises ApiError for what cannot be
        finished, Gone where nobody waits for it."""
        left, last, began = len(self.choices), [0.0] * len(self.choices), time.monotonic()
        items = self.running.items(receive, self.limits.answer_seconds, self.limits.beat_seconds)
        try:
            async with contextlib.aclosing(items):
                async for item in items:
                    if item is None:
                        yield None
                        continue
                    number, what = item
                    choice = self.choices[number]
                    if choice.finish:
                        continue
                    if isinstance(what, Token) and not what.is_prompt:
                        last[number] = self._clock(last[number], began)
                    piece = choice.take(what)
                    if choice.finish:
                        left -= 1
                        self._end(number, choice)
                    yield choice, piece
                    if not left:
                        return
        except TimeoutError:
            seconds = f"{self.limits.answer_seconds:g} seconds"
            raise ApiError(504, f"This took more than {seconds}: ask for fewer tokens.", "timeout") from None
        finally:
            self.usage.made = sum(choice.made for choice in self.choices)
            self.metrics.tokens["answers"] += self.usage.made

    def _clock(self, last: float, began: float) -> float:
        now = time.monotonic()
        (self.metrics.next.add(now - last) if last else self.metrics.first.add(now - began))
        return now

    def _end(self, number: int, choice: Choice) -> None:
        if choice.finish == "failed":
            raise ApiError(500, "The computation failed. Nothing of the request was wrong.", "server_error")
        if choice.finish == "cancelled":
            raise ApiError(503, "The server is stopping.", "stopping", again_after=10)
        self.running.tickets[number].cancel()

    def fingerprints(self, numbers: Sequence[int]) -> str:
        """Of the checkpoints that answered these choices: one, but where a new one came in between."""
        return ",".join(dict.fromkeys(self.running.tickets[number].fingerprint for number in numbers))

    async def whole(self, receive: Receive) -> Response:
        found: list[list[Piece]] = [[] for _ in self.choices]
        try:
            async with contextlib.aclosing(self.pieces(receive)) as pieces:
                async for item in pieces:
                    if item is not None:
                        found[item[0].index].append(item[1])
        except Gone:
            self.metrics.gone += 1
            return Response(status_code=CLIENT_GONE)
        choices = [self.form.complete(choice, found[choice.index]) for choice in self.choices]
        around = self.form.around(False, choices, self.fingerprints(range(len(choices))))
        return Response(dumps(around | {"usage": self.usage.json()}), 200, HEADERS, "application/json")


class Stream(Response):
    """The same as server-sent events. What goes wrong after the first one is told in an event of its own."""

    def __init__(self, answering: Answering):
        super().__init__(None, 200, HEADERS, "text/event-stream")
        del self.headers["content-length"]
        self._answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answering = self._answering

        async def say(text: str, more: bool = True) -> None:
            try:
                async with asyncio.timeout(answering.limits.send_seconds):
                    await send({"type": "http.response.body", "body": text.encode(), "more_body": more})
            except (TimeoutError, OSError):
                raise Gone from None

        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            try:
                async with contextlib.aclosing(self._events(receive)) as events:
                    async for event in events:
                        await say(event)
            except ApiError as error:
                await say(_event(error.body()), more=False)
            else:
                await say("data: [DONE]\n\n", more=False)
        except Gone:
            answering.metrics.gone += 1
        finally:
            answering.running.cancel()

    async def _events(self, receive: Receive) -> AsyncGenerator[str, None]:
        answering, begun = self._answering, set[int]()
        form, no_usage = answering.form, {"usage": None} if answering.include_usage else {}
        async with contextlib.aclosing(answering.pieces(receive)) as pieces:
            async for item in pieces:
                if item is None:
                    yield ": still here\n\n"
                    continue
                choice, piece = item
                for said in form.chunks(choice, piece, choice.index not in begun):
                    yield _event(form.around(True, [said], answering.fingerprints([choice.index])) | no_usage)
                begun.add(choice.index)
        if answering.include_usage:
            fingerprint = answering.fingerprints(range(len(answering.choices)))
            yield _event(form.around(True, [], fingerprint) | {"usage": answering.usage.json()})


def _event(x: Any) -> str:
    return f"data: {dumps(x)}\n\n"

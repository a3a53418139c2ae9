"""Requests of one client under way: from the engine's thread into the event loop, until all are answered, the client
goes, or the time is up. Whatever happens, what the engine still does for them is cancelled."""

import asyncio
import functools
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Any, Protocol

from starlette.types import Receive

from serving.requests import End, Request, Token


class Ticket(Protocol):
    @property
    def fingerprint(self) -> str: ...

    def cancel(self) -> None: ...


class Engine(Protocol):
    """What a server needs of `serving.engine.Engine`."""

    @property
    def context(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def step(self) -> int: ...
    @property
    def ready(self) -> bool: ...
    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def slots(self) -> int: ...

    def submit(self, request: Request, receive: Callable[[Token | End], None]) -> Ticket: ...

    def drain(self, seconds: float) -> None: ...


class Gone(Exception):
    """The client has gone."""


class Running:
    """One ticket for each request, in their order. Raises what the engine's `submit` raises, with none left behind."""

    def __init__(self, engine: Engine, requests: Sequence[Request]):
        self._loop, self._items = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Token | End] | None]()
        self.tickets: list[Ticket] = []
        try:
            for number, request in enumerate(requests):
                self.tickets.append(engine.submit(request, functools.partial(self._hear, number)))
        except BaseException:
            self.cancel()
            raise

    def _hear(self, number: int, item: Token | End) -> None:
        """In the engine's thread."""
        self._loop.call_soon_threadsafe(self._items.put_nowait, (number, item))

    def cancel(self) -> None:
        for ticket in self.tickets:
            ticket.cancel()

    async def items(
        self, receive: Receive, seconds: float, beat: float
    ) -> AsyncGenerator[tuple[int, Token | End] | None, None]:
        """(which request, what has come), without an end; None where nothing came for so many seconds (beat).

        receive: of the HTTP request, whose body has been read. Raises Gone when the client goes, TimeoutError after so
        many seconds in all.
        """
        watcher = asyncio.create_task(_until_gone(receive))
        watcher.add_done_callback(lambda _: self._items.put_nowait(None))  # which wakes the loop below
        end = self._loop.time() + seconds
        try:
            while True:
                try:
                    async with asyncio.timeout(min(beat, max(0.0, end - self._loop.time()))):
                        item = await self._items.get()
                except TimeoutError:
                    item = None
                if watcher.done():
                    raise Gone
                if self._loop.time() >= end:
                    raise TimeoutError
                yield item
                await asyncio.sleep(0)  # where much has come at once: others have their turn, and who goes is seen
        finally:
            self.cancel()
            watcher.cancel()


async def _until_gone(receive: Receive) -> None:
    message: Any = {}
    while message.get("type") != "http.disconnect":
        message = await receive()

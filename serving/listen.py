"""A service on a socket: TLS, limits of connections, and an end in order.

The first SIGTERM or Ctrl-C lets those who wait have their answers, the second one ends at once.
"""

import asyncio
import os
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from runtime.config import RunError, UsageError
from serving.api import HEADER_BYTES, Service

MOST_CONNECTIONS = 512
HEADER_SECONDS = 15.0  # until a request's first line and headers are there
DRAIN_SECONDS = 60.0
CLOSE_SECONDS = 5  # for connections, when all answers were sent


@dataclass(frozen=True)
class Tls:
    """Files in PEM. client_ca: whose certificate a client must have; None: it needs none."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def context(self) -> ssl.SSLContext:
        """Raises UsageError for files that are none."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        try:
            context.load_cert_chain(self.certificate, self.key, password=lambda: "")
        except (OSError, ssl.SSLError) as error:
            raise UsageError(
                f"--tls_cert={self.certificate} and --tls_key={self.key} are no certificate and its key, in PEM and "
                f"without a password ({_reason(error)})"
            ) from error
        if self.client_ca:
            try:
                context.load_verify_locations(self.client_ca)
            except (OSError, ssl.SSLError) as error:
                raise UsageError(f"--client_ca={self.client_ca} is no certificate in PEM ({_reason(error)})") from error
            context.verify_mode = ssl.CERT_REQUIRED
        return context


def _reason(error: OSError) -> str:
    return str(getattr(error, "reason", None) or error.strerror or error)


def bind(host: str, port: int) -> socket.socket:
    """Raises UsageError where the address is taken, or not this machine's."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        reason = error.strerror or os.strerror(error.errno or 0)
        raise UsageError(f"--host={host} --port={port}: nobody can listen there ({reason}): choose another") from error
    return found


def serve(service: Service, listener: socket.socket, tls: ssl.SSLContext | None, say: Callable[[str], None]) -> None:
    """Until it is told to stop. Raises RunError where the engine has failed."""
    server = Server(service, tls, say)
    server.run(sockets=[listener])
    if server.failed:
        raise RunError("the computation has failed, so that nothing can be answered any more: start the server again")


def _config(service: Service, tls: ssl.SSLContext | None) -> uvicorn.Config:
    return uvicorn.Config(
        service.app(),
        loop="asyncio",
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",  # of what clients do wrong, they are told; a fault of ours is shown by the service
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=MOST_CONNECTIONS,
        h11_max_incomplete_event_size=HEADER_BYTES,
        timeout_graceful_shutdown=CLOSE_SECONDS,
        ssl_context_factory=(lambda config, default: tls) if tls else None,
    )


class Server(uvicorn.Server):
    def __init__(self, service: Service, tls: ssl.SSLContext | None, say: Callable[[str], None]):
        super().__init__(_config(service, tls))
        self._service, self._say, self._told, self.failed = service, say, 0, False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._told += 1
        if self._told == 1:
            threading.Thread(target=self._end, name="drain", daemon=True).start()
        else:
            self.config.timeout_graceful_shutdown = 0
            self.force_exit = self.should_exit = True

    def _end(self) -> None:
        busy = self._service.engine.running + self._service.engine.waiting
        self._say(f"stopping: {busy} requests are under way; once more ends at once" if busy else "stopping")
        self._service.drain(DRAIN_SECONDS)
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        if not self._service.engine.ready and not self._service.draining:
            self.failed = self.should_exit = True
        return await super().on_tick(counter)


class _Protocol(H11Protocol):
    """A connection on which a request does not become complete is closed: its headers may not take for ever."""

    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_waiting()
        elif self._patience is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._patience = self.loop.call_later(HEADER_SECONDS, self._close)

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _close(self) -> None:
        self.transport.close()

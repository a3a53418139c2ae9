"""The body of a request, counted as it comes: what a client says of its length is not believed."""

import asyncio

from starlette.requests import Request
from starlette.types import Receive

from serving.errors import ApiError
from serving.replies import Limits
from serving.running import Gone


class Bodies:
    """All that are being read."""

    def __init__(self, limits: Limits):
        self._limits, self._held = limits, 0  # bytes

    async def read(self, request: Request) -> bytes:
        """Raises ApiError for one that is no JSON, too large, too slow, or too many at once; Gone."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # a page of somebody else's could post any other without being asked
            raise ApiError(415, "The body is JSON: send it with content-type: application/json.", close=True)
        if request.headers.get("content-encoding", "identity") != "identity":
            raise ApiError(415, "The body is sent as it is, without a content-encoding.", close=True)
        if request.headers.get("content-length", "0").rjust(20, "0") > str(self._limits.body_bytes).rjust(20, "0"):
            raise self._too_large()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                return await self._all(request.receive)
        except TimeoutError:
            seconds = f"{self._limits.body_seconds:g} seconds"
            raise ApiError(408, f"The body did not come within {seconds}.", "timeout", close=True) from None

    async def _all(self, receive: Receive) -> bytes:
        parts, size, more = [], 0, True
        try:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise Gone
                part, more = message.get("body", b""), message.get("more_body", False)
                size, self._held = size + len(part), self._held + len(part)
                if size > self._limits.body_bytes:
                    raise self._too_large()
                if self._held > self._limits.bodies_bytes:
                    raise ApiError(429, "Too much is being sent at once.", "overloaded", again_after=5, close=True)
                parts.append(part)
        finally:
            self._held -= size
        return b"".join(parts)

    def _too_large(self) -> ApiError:
        most = f"{self._limits.body_bytes / 2**20:g} MiB"
        return ApiError(413, f"The body has more than {most}.", "body_too_large", close=True)

"""What a client is told is wrong, in OpenAI's form: one sentence, which never holds what the client has sent."""

import json
from typing import Any

from starlette.responses import Response

LONGEST = 1_000  # characters of a message; with JSON's escapes the reply stays below 4 KiB
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A reply with this status. param: the key of the request that is wrong. again_after: seconds, for Retry-After;
    close: whether the connection is of no use after it."""

    def __init__(
        self, status: int, message: str, code: str = "", param: str = "", again_after: float = 0, close: bool = False
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.again_after, self.close = again_after, close

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        message = self.message if len(self.message) <= LONGEST else self.message[: LONGEST - 1] + "…"
        return {"error": {"message": message, "type": kind, "param": self.param or None, "code": self.code or None}}

    def reply(self) -> Response:
        headers = {"cache-control": "no-store"}
        if self.again_after:
            headers["retry-after"] = str(max(1, round(self.again_after)))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        if self.status in (500, 504):  # OpenAI's client would ask twice more for what has just failed
            headers["x-should-retry"] = "false"
        if self.close:
            headers["connection"] = "close"
        return Response(dumps(self.body()), self.status, headers, "application/json")


def dumps(x: Any) -> str:
    return json.dumps(x, allow_nan=False, separators=(",", ":"))

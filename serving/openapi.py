"""The description of the interface, of the tables by which requests are checked."""

from collections.abc import Mapping
from typing import Any

from runtime import VERSION
from serving import schema
from serving.schema import Number

TEXT, SWITCH, OBJECT = {"type": "string"}, {"type": ["boolean", "null"]}, {"type": "object"}
EVENT = {"type": "object", "required": ["data"], "properties": {"data": TEXT}}


def describe(model_name: str, context: int, vocab_size: int, has_keys: bool) -> dict[str, Any]:
    """OpenAPI 3.1."""
    known = {"enum": [model_name]}
    security = {"security": [{"key": []}]} if has_keys else {}
    answer = lambda name, about, body: (
        {"post": {**_asked(body), **_replies(about, streams=True), **security}} | {"summary": name}
    )
    page = lambda about, **more: {"get": {**_replies(about, **more), **security}}
    name = {"name": "name", "in": "path", "required": True, "schema": known}
    model = page("the model")
    model["get"]["parameters"] = [name]
    return {
        "openapi": "3.1.0",
        "info": {"title": "Slackline", "version": VERSION},
        "paths": {
            "/v1/completions": answer("Text that goes on", "the text", _completion(known, context, vocab_size)),
            "/v1/chat/completions": answer("The next message of a chat", "the message", _chat(known)),
            "/v1/models": page("the models that there are: one"),
            "/v1/models/{name}": model,
            "/health": {"get": _replies("ready") | {"summary": "Whether requests are taken"}},
            "/metrics": page("what has been done, for Prometheus", kind="text/plain"),
        },
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _asked(body: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": body}}}}


def _replies(about: str, streams: bool = False, kind: str = "application/json") -> dict[str, Any]:
    content = {kind: {"schema": TEXT if kind != "application/json" else OBJECT}}
    if streams:
        content["text/event-stream"] = {"schema": EVENT}
    error = {"description": "what is wrong", "content": {"application/json": {"schema": _error()}}}
    return {"responses": {"200": {"description": about, "content": content}, "4XX": error, "5XX": error}}


def _error() -> dict[str, Any]:
    maybe = {"type": ["string", "null"]}
    fields = {"message": TEXT, "type": TEXT, "param": maybe, "code": maybe}
    inside = {"type": "object", "required": list(fields), "properties": fields}
    return {"type": "object", "required": ["error"], "properties": {"error": inside}}


def _number(how: Number) -> dict[str, Any]:
    kind = "integer" if how.kind is int else "number"
    found = {"type": [kind, "null"], "minimum": how.least, "maximum": how.most, "description": how.says}
    return found if how.default is None else found | {"default": how.default}


def _body(
    model: dict[str, Any], required: str, properties: dict[str, Any], numbers: Mapping[str, Number]
) -> dict[str, Any]:
    stop = {"type": "string", "minLength": 1, "maxLength": schema.LONGEST_STOP}
    usage = {"type": "object", "properties": {"include_usage": SWITCH}, "additionalProperties": False}
    common = {
        "model": model,
        "stop": {"anyOf": [{"type": "null"}, stop, {"type": "array", "items": stop, "maxItems": schema.MOST_STOPS}]},
        "stream": SWITCH,
        "stream_options": {"anyOf": [{"type": "null"}, usage]},
    }
    nothing = {name: {"enum": [None, *harmless]} for name, harmless in schema.NOTHING.items()}
    unread = {name: {"description": "accepted, and not read"} for name in schema.UNREAD}
    asked = {name: _number(how) for name, how in numbers.items()}
    found = common | properties | asked | nothing | unread
    return {"type": "object", "required": [required], "properties": found, "additionalProperties": False}


def _completion(model: dict[str, Any], context: int, vocab_size: int) -> dict[str, Any]:
    id = {"type": "integer", "minimum": 0, "maximum": vocab_size - 1}
    ids = {"type": "array", "items": id, "minItems": 1, "maxItems": context}
    several = {"type": "array", "minItems": 1, "maxItems": schema.MOST_CHOICES}
    prompt = {"anyOf": [TEXT, ids, several | {"items": TEXT}, several | {"items": ids}]}
    return _body(model, "prompt", {"prompt": prompt, "echo": SWITCH}, schema.COMPLETION_NUMBERS)


def _chat(model: dict[str, Any]) -> dict[str, Any]:
    part = {"type": "object", "required": ["type", "text"], "properties": {"type": {"const": "text"}, "text": TEXT}}
    content = {"anyOf": [TEXT, {"type": "array", "items": part, "maxItems": schema.MOST_PARTS}]}
    fields = {"role": {"enum": list(schema.ROLES)}, "content": content}
    fields["name"] = {"type": ["string", "null"], "maxLength": schema.LONGEST_NAME}
    message = {"type": "object", "required": ["role", "content"], "properties": fields, "additionalProperties": False}
    messages = {"type": "array", "items": message, "minItems": 1, "maxItems": schema.MOST_MESSAGES}
    return _body(model, "messages", {"messages": messages, "logprobs": SWITCH}, schema.CHAT_NUMBERS)

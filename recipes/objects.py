"""What a workdir keeps of objects that a caller has passed: enough to say whether they are the same another time."""

import hashlib
import inspect
import types
from collections.abc import Iterator
from typing import Any


def described(kind: type, fields: dict[str, Any]) -> dict[str, Any]:
    """{class, fields, source: a digest of the text of the class, and of the functions in its fields}. A function is
    digested with what it closes over: optax's transformations are such."""
    seen: set[int] = set()
    texts = [_text(kind), *(line for value in fields.values() for line in _inside(value, seen))]
    source = hashlib.sha256("\n".join(map(str, texts)).encode()).hexdigest()[:16]
    name = lambda value: f"{value.__module__}.{value.__qualname__}" if callable(value) else repr(value)
    plain = {field: name(value) if _has_name(value) else repr(value) for field, value in fields.items()}
    return {"class": f"{kind.__module__}.{kind.__qualname__}", "fields": plain, "source": source}


def _has_name(value: Any) -> bool:
    return isinstance(value, types.FunctionType | type)


def _text(thing: Any) -> str | None:
    """None: there is no text of what was typed at a prompt."""
    try:
        return inspect.getsource(thing)
    except (OSError, TypeError):
        return None


def _inside(value: Any, seen: set[int]) -> Iterator[str | None]:
    """Texts of the functions in a value, and plain values as they are; of other objects their classes."""
    if isinstance(value, str | bytes | int | float | bool | None):  # equal ones may be one object: each counts
        yield repr(value)
        return
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, types.FunctionType):
        yield _text(value)
        for cell in value.__closure__ or ():
            yield from _inside(cell.cell_contents, seen)
        yield from map(repr, value.__defaults__ or ())
    elif isinstance(value, tuple | list):
        for one in value:
            yield from _inside(one, seen)
    elif isinstance(value, dict):
        for name in value:
            yield str(name)
            yield from _inside(value[name], seen)
    else:
        yield f"{type(value).__module__}.{type(value).__qualname__}"

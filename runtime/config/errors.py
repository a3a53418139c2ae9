"""The two errors that are shown as one message, without a traceback."""

import contextlib
from collections.abc import Iterator


class RunError(Exception):
    """Training cannot go on; the message says why and what to do. No traceback is shown."""


class UsageError(Exception):
    """Bad input, in one message for the user. No traceback is shown."""


@contextlib.contextmanager
def bad_input() -> Iterator[None]:
    """Inside, what the rooms below find wrong is the user's input: shown as a message, without a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(str(error)) from error

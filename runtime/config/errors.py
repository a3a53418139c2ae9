"""The two errors that are shown as one message, without a traceback."""

import contextlib
from collections.abc import Iterator


class Said(Exception):
    """Its message is for the user, who needs no traceback: notebooks show it without one, too."""

    def _render_traceback_(self) -> list[str]:  # asked for by IPython
        return [f"{type(self).__name__}: {self}"]


class RunError(Said):
    """Training cannot go on; the message says why and what to do. No traceback is shown."""


class UsageError(Said):
    """Bad input, in one message for the user. No traceback is shown."""


@contextlib.contextmanager
def bad_input() -> Iterator[None]:
    """Inside, what the rooms below find wrong is the user's input: shown as a message, without a traceback."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        raise UsageError(str(error)) from error

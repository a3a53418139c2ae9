"""Ctrl-C while the imports are under way: a library may swallow the exception, or show where it was."""

import os
import signal
from typing import Any


def end_at_ctrl_c() -> None:
    """Until `raise_at_ctrl_c`: at once, with one line. Not where Ctrl-C is ignored (nohup, a job in the background)."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_at_ctrl_c() -> None:
    """From now on KeyboardInterrupt, as usual."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(*_: Any) -> None:
    os.write(2, b"stopped by Ctrl-C: nothing was begun\n")
    os._exit(130)

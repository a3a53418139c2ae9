"""What has to be done before the imports. Ctrl-C while they are under way: a library may swallow the exception, or show
where it was. And how malloc keeps what is freed."""

import ctypes
import os
import platform
import signal
from typing import Any

ARENA_MAX = -8  # M_ARENA_MAX of malloc.h


def end_at_ctrl_c() -> None:
    """Until `raise_at_ctrl_c`: at once, with one line. Not where Ctrl-C is ignored (nohup, a job in the background)."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_at_ctrl_c() -> None:
    """From now on KeyboardInterrupt, as usual."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def one_arena() -> None:
    """What a thread has freed, glibc keeps for that thread: in writing a checkpoint as much as the largest array and
    more. It is too late for this when there are threads."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(ARENA_MAX, 1)


def _end(*_: Any) -> None:
    os.write(2, b"stopped by Ctrl-C: nothing was begun\n")
    os._exit(130)

"""How a program ends: one sentence and a code for each way."""

import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any

from runtime import agree, early, library_log, lock, preemption
from runtime.config import RunError, UsageError

CANNOT_GO_ON, BAD_INPUT, INTERRUPTED, NOBODY_READS = 1, 2, 130, 141  # the last two as a shell gives them
STATUS = re.compile(
    "(CANCELLED|UNKNOWN|INVALID_ARGUMENT|DEADLINE_EXCEEDED|NOT_FOUND|RESOURCE_EXHAUSTED|FAILED_PRECONDITION|ABORTED|"
    "OUT_OF_RANGE|UNIMPLEMENTED|INTERNAL|UNAVAILABLE|DATA_LOSS): "
)


def guarded(main: Callable[[], int], interrupted: str, leave: Callable[[int], Any] = int) -> int:
    """main(), with one sentence instead of a traceback for what is no fault of this program. Of several processes, the
    others hear it, and end, too.

    interrupted: said at Ctrl-C. leave: how to end after a failure: a process with threads under way may have to go at
    once (os._exit).
    """
    early.raise_at_ctrl_c()
    try:
        return main()
    except UsageError as error:
        code = _failed(BAD_INPUT, str(error))
    except BrokenPipeError:  # `| head`: there is nobody to tell
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = NOBODY_READS
    except KeyboardInterrupt:
        code = _failed(INTERRUPTED, interrupted, kind="stopped by Ctrl-C")
    except (RunError, OSError) as error:
        code = _failed(CANNOT_GO_ON, f"{error}{library_log.hint()}")
    except Exception as error:
        if STATUS.match(str(error)):  # of XLA, in exceptions of several types: a peer that is gone, no memory left
            library_log.note(traceback.format_exc())
            agree.hear()  # a peer that has gone is what this process ends with
            first = str(error).strip().splitlines()[0]
            code = _failed(CANNOT_GO_ON, f"a computation failed: {first}{library_log.hint()}")
        else:  # a fault of this program: whoever mends it needs to know where
            traceback.print_exc()
            agree.tell(CANNOT_GO_ON, f"{type(error).__name__}: {error}")
            code = CANNOT_GO_ON
    finally:
        preemption.done()
        lock.release()
        library_log.end()
    return leave(code)


def _failed(code: int, message: str, kind: str = "error") -> int:
    print(f"{kind}: {message}", file=sys.stderr, flush=True)
    agree.tell(code, message)
    return code

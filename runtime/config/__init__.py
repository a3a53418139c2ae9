"""The command line, the config and every check that needs no device.

`flags` reads argv, `keys` knows what each key may be, `check` validates a whole config, `resume` says what may change
while a run goes on.
"""

from runtime.config.check import check_batch, profile_range, validate
from runtime.config.errors import RunError, UsageError, bad_input
from runtime.config.flags import define_flags, execute, parse, version
from runtime.config.keys import (
    CHOICES,
    SMALLEST_VOCABULARY,
    UNREAD,
    Methods,
    base_values,
    convert,
    converted,
    expand_home,
    flatten,
    local_path,
)
from runtime.config.resume import changes_schedule, check_goal, check_resume, difference, read_json
from runtime.config.suggest import nearest_multiples

__all__ = [
    "CHOICES",
    "SMALLEST_VOCABULARY",
    "UNREAD",
    "Methods",
    "RunError",
    "UsageError",
    "bad_input",
    "base_values",
    "changes_schedule",
    "check_batch",
    "check_goal",
    "check_resume",
    "convert",
    "converted",
    "define_flags",
    "difference",
    "execute",
    "expand_home",
    "flatten",
    "local_path",
    "nearest_multiples",
    "parse",
    "profile_range",
    "read_json",
    "validate",
    "version",
]

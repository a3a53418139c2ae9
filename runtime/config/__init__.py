"""The command line, the config and every check that needs no device.

`flags` reads argv, `keys` knows what each key may be, `check` validates a whole config, `resume` says what may change
while a run goes on.
"""

from runtime.config.check import check_batch, profile_range, validate
from runtime.config.errors import RunError, UsageError, bad_input
from runtime.config.flags import checked, define_flags, execute, override, parse, typed, version, with_changes
from runtime.config.keys import (
    CHOICES,
    SMALLEST_VOCABULARY,
    UNREAD,
    Methods,
    base_values,
    changed,
    convert,
    converted,
    expand_home,
    flatten,
    local_path,
    nested,
)
from runtime.config.resume import (
    OBJECTS,
    changes_schedule,
    check_goal,
    check_resume,
    difference,
    objects_of,
    read_json,
)
from runtime.config.suggest import nearest_multiples

__all__ = [
    "CHOICES",
    "SMALLEST_VOCABULARY",
    "UNREAD",
    "OBJECTS",
    "Methods",
    "RunError",
    "UsageError",
    "bad_input",
    "base_values",
    "changed",
    "changes_schedule",
    "check_batch",
    "check_goal",
    "check_resume",
    "checked",
    "convert",
    "converted",
    "define_flags",
    "difference",
    "execute",
    "expand_home",
    "flatten",
    "local_path",
    "nearest_multiples",
    "nested",
    "objects_of",
    "override",
    "parse",
    "profile_range",
    "read_json",
    "typed",
    "validate",
    "version",
    "with_changes",
]

"""Islands: independent training jobs that are joined by a log in an object store (docs/islands.md).

python -m islands check runs/shared                 (a folder, s3://BUCKET/PATH, gs://…, az://…: can it hold a log?)
python -m islands status runs/shared                (who takes part, how far, and what was refused)
python -m islands status runs/shared --watch

`check` ends with 0 where the store is sound, 1 where it must not be used, 2 where nothing could be tried. With --json
both print an object for programs.
"""

import functools
import json
import sys
import time
from collections.abc import Sequence

from islands import check, status
from islands.store import Away, open_store
from runtime import exits, usage

UNUSABLE = 2
PAUSE = 5.0  # seconds


def main(argv: Sequence[str]) -> int:
    parser = usage.parser(__doc__, "python -m islands")
    parser.add_argument("what", choices=["check", "status"], metavar="check|status", help="what is asked")
    parser.add_argument("log", metavar="LOG", help="where the log is, or is going to be")
    parser.add_argument("--json", action="store_true", help="print an object for programs")
    parser.add_argument("--watch", action="store_true", help="status: again every 5 seconds")
    args = parser.parse_args(argv)
    if args.watch and args.what != "status":
        parser.error("--watch goes with status")
    store = open_store(args.log)
    if args.what == "check":
        try:
            found = check.of(store)
        except Away as error:
            print(f"error: {error}", file=sys.stderr)
            return UNUSABLE
        print(json.dumps(found.as_dict()) if args.json else "\n".join(check.lines(found)))
        return 0 if found.sound else 1
    while True:
        said = status.of(store)
        print(json.dumps(said) if args.json else "\n".join(status.lines(said)), flush=True)
        if not args.watch:
            return 0
        time.sleep(PAUSE)


if __name__ == "__main__":
    sys.exit(exits.guarded(functools.partial(main, sys.argv[1:]), "nothing was changed"))

"""Islands: independent training jobs that are joined by a log in an object store (docs/islands.md).

python -m islands check runs/shared                 (a folder, s3://BUCKET/PATH, gs://…, az://…: can it hold a log?)
python -m islands init runs/shared --config=configs/island.py        (begins a run; further options as of train.py)
python -m islands status runs/shared --watch                         (who takes part, how far, and what was refused)
python -m islands keys new runs/shared NAME         (a key on this machine; its public half is what the owner allows)
python -m islands keys allow runs/shared NAME --key=HEX --role=push --norm_bound=3.5
python -m islands keys revoke runs/shared NAME
python -m islands replay runs/shared --until=1200 --verify           (folds it again, and compares every snapshot)
python -m islands truncate runs/shared --before=1000                 (removes what nobody needs any more: the owner)

LOG is a folder, or s3://BUCKET/PATH, gs://…, az://…. `check` ends with 0 where the store is sound, 1 where it must not
be used, 2 where nothing could be tried; `replay --verify` with 0 where all is equal, 1 where something differs, 2 for
bad input. With --json check, status and replay print an object for programs.
"""

import argparse
import functools
import json
import sys
import time
from collections.abc import Sequence

from runtime import exits, usage
from runtime.config import UsageError

try:
    from islands import check, keyring, status
    from islands.reader import Reader
    from islands.store import Away, open_store, run
    from islands.view import ROLES
except ImportError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)

UNUSABLE = 2
PAUSE = 5.0  # seconds
COMMANDS = {
    "check": "LOG",
    "init": "LOG",
    "status": "LOG",
    "keys": "new|allow|revoke LOG NAME",
    "replay": "LOG",
    "truncate": "LOG",
}
GOES_WITH = {
    "json": "check status replay", "watch": "status", "snapshots": "init", "encrypt": "init", "config": "init",
    "key": "keys",
    "role": "keys", "norm_bound": "keys", "until": "replay", "verify": "replay", "before": "truncate",
}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    wanted = COMMANDS[args.what]
    if len(args.operands) != len(wanted.split()):
        parser.error(f"expected {args.what} {wanted}")
    for option, commands in GOES_WITH.items():
        if getattr(args, option) not in (None, False) and args.what not in commands.split():
            parser.error(f"--{option} goes with {' and '.join(commands.split())}")
    if rest and args.what != "init":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.log, args.rest = args.operands[args.what == "keys"], rest
    return {"check": _check, "init": _init, "status": _status, "keys": _keys, "replay": _replay, "truncate": _truncate}[
        args.what
    ](args)


def _parser() -> argparse.ArgumentParser:
    parser = usage.parser(__doc__, "python -m islands")
    names = ", ".join(COMMANDS)
    parser.add_argument("what", choices=list(COMMANDS), metavar="COMMAND", help=names)
    parser.add_argument(
        "operands", nargs="+", metavar="LOG", help="where the log is; of keys: new|allow|revoke LOG NAME"
    )
    parser.add_argument("--json", action="store_true", help="check, status, replay: print an object for programs")
    parser.add_argument("--watch", action="store_true", help="status: again every 5 seconds")
    parser.add_argument("--config", metavar="FILE", help="init: as of train.py, with --config.KEY=VALUE, --simulate=N")
    parser.add_argument(
        "--snapshots", type=usage.not_negative, metavar="N", help="init: versions between two; 0: none; default: 1000"
    )
    parser.add_argument("--encrypt", action="store_true", help="init: payloads, with a key that islands get a copy of")
    parser.add_argument("--key", metavar="HEX", help="keys allow: the public key; default: this machine's")
    parser.add_argument(
        "--role", choices=ROLES, metavar="|".join(ROLES), help="keys allow: own: push, and sign; default: push"
    )
    parser.add_argument("--norm_bound", type=float, metavar="X", help="keys allow: of what it may push; default: none")
    parser.add_argument("--until", type=usage.not_negative, metavar="V", help="replay: to this version; default: all")
    parser.add_argument("--verify", action="store_true", help="replay: compare each snapshot, and every stored object")
    parser.add_argument("--before", type=usage.not_negative, metavar="V", help="truncate: versions below this one")
    return parser


def _check(args: argparse.Namespace) -> int:
    try:
        found = check.of(open_store(args.log))
    except Away as error:
        print(f"error: {error}", file=sys.stderr)
        return UNUSABLE
    print(json.dumps(found.as_dict()) if args.json else "\n".join(check.lines(found)))
    return 0 if found.sound else 1


def _init(args: argparse.Namespace) -> int:
    from islands import founding  # which needs all that training needs

    config = [f"--config={args.config}"] if args.config else []
    snapshots = 1000 if args.snapshots is None else args.snapshots
    say = lambda line: print(line, flush=True)
    founding.init(
        args.log, ["python -m islands init", *config, *args.rest], snapshots, args.encrypt, __doc__ or "", say
    )
    return 0


def _status(args: argparse.Namespace) -> int:
    store = open_store(args.log)
    while True:
        said = status.of(store)
        print(json.dumps(said) if args.json else "\n".join(status.lines(said)), flush=True)
        if not args.watch:
            return 0
        time.sleep(PAUSE)


def _keys(args: argparse.Namespace) -> int:
    how, log, name = args.operands
    if how not in ("new", "allow", "revoke"):
        raise UsageError(f"keys {how}: expected new, allow or revoke")
    if how != "allow" and (args.key or args.role or args.norm_bound is not None):
        raise UsageError("--key, --role and --norm_bound go with keys allow")
    if args.norm_bound is not None and not 0 < args.norm_bound < float("inf"):
        raise UsageError(f"--norm_bound={args.norm_bound}: must be greater than 0")
    store = open_store(log)
    if how == "new":
        owner = run(Reader.open(store)).run.owner
        key = keyring.new(owner, name)
        print(f"{keyring.path(owner, name)}: made; the owner of the run allows it by")
        print(f"python -m islands keys allow {log} {name} --key={key.public}")
    elif how == "allow":
        member = keyring.allow(store, name, args.key or "", args.role or "push", args.norm_bound or 0.0)
        print(f"{name} has the role {member.role}, with the key {member.key}")
    else:
        keyring.revoke(store, name)
        print(f"nothing that {name} writes from here on counts")
    return 0


def _replay(args: argparse.Namespace) -> int:
    from islands import replay

    found = replay.of(open_store(args.log), args.until, args.verify, lambda line: print(line, file=sys.stderr))
    print(json.dumps(found.as_dict()) if args.json else "\n".join(replay.lines(found)))
    return 1 if args.verify and found.differs else 0


def _truncate(args: argparse.Namespace) -> int:
    from islands import truncate

    if args.before is None:
        raise UsageError("truncate needs --before=V: the log can be replayed from a snapshot of at most version V on")
    truncate.before(open_store(args.log), args.before, lambda line: print(line, flush=True))
    return 0


if __name__ == "__main__":
    sys.exit(exits.guarded(functools.partial(main, sys.argv[1:]), "nothing was changed"))

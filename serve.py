"""Serves a run over HTTP, as OpenAI's servers do: completions and chat, whole or as a stream, and a page to try it.

python serve.py --workdir=runs/x --port=8000
python serve.py --workdir=runs/x --simulate=6 --config.mesh.tensor=3 --config.mesh.fsdp=2
python serve.py --config=configs/llama3_8b.py --target=v5e-8 --dry_run
python serve.py --workdir=runs/x --host=0.0.0.0 --keys=keys.jsonl --tls_cert=cert.pem --tls_key=key.pem

While the run goes on, each new checkpoint is taken between two answers.

It answers to this machine alone, unless --host says otherwise; then it needs keys (python -m serving.keys) and TLS. The
first Ctrl-C or SIGTERM lets those who wait have their answers, the second one ends at once.
"""

if __name__ == "__main__":
    from runtime import early

    early.end_at_ctrl_c()

import argparse
import importlib.util
import ipaddress
import os
import ssl
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.template import KEPT, Template
from runtime import config as configuration
from runtime import exits, usage
from runtime.config import UsageError, bad_input
from serving import follow, loaded, options

NEEDED = ("starlette", "uvicorn", "h11")


def main(argv: list[str]) -> int:
    args, changes = parse(argv)
    if args.target or args.config or args.dry_run:
        from serving import on_target

        say = lambda line: print(line, flush=True)
        config = on_target.config_of(args)
        return on_target.dry_run(config, args.target, changes, args.slots, args.context, say)
    if not args.workdir:
        raise UsageError("--workdir=PATH is needed: a run, or an import of model.huggingface")
    check_packages()
    from serving import listen  # needs the packages

    say = lambda line: print(line, flush=True)
    check_reach(args)
    tls = tls_of(args)
    listener = listen.bind(args.host, args.port)  # before the model is loaded: that takes long
    model = loaded.open_model(args.workdir, changes, args.simulate)
    engine = loaded.open_engine(model, args.slots, args.context, not args.no_invariant, say, args.most_waiting)
    service = service_of(args, engine, model.tokenizer)
    engine.start()
    follower = follow.Follower(model, engine, say)
    follower.start()
    listener.listen()  # whoever reads the next line may come at once
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    say(f"{service.name} at {'https' if tls else 'http'}://{shown}:{port}: Ctrl-C ends it")
    try:
        listen.serve(service, listener, tls, say)
    finally:
        follower.close()
        engine.close()
    say("stopped")
    return 0


def service_of(args: argparse.Namespace, engine: Any, tokenizer: Any) -> Any:
    from serving.api import Service
    from serving.keys import Keys

    with bad_input():
        keys = Keys(args.keys) if args.keys else None
        template = Template.read(Path(args.workdir) / KEPT)
        template = template and replace(template, origin="this model")  # clients are not told where it lies
        only_local = is_local(args.host) and keys is None
        return Service(engine, tokenizer, Path(args.workdir).resolve().name, template, keys, only_local)


# ── who can reach it ──────────────────────────────────────────────────────────────────────────────────────────────────


def is_local(host: str) -> bool:
    """Whether only this machine reaches it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return False


def check_reach(args: argparse.Namespace) -> None:
    """Raises UsageError for what would let others in by mistake."""
    if bool(args.tls_cert) != bool(args.tls_key):
        raise UsageError("--tls_cert and --tls_key belong together: give both, or neither")
    if args.client_ca and not args.tls_cert:
        raise UsageError("--client_ca asks clients for certificates, which needs --tls_cert and --tls_key")
    if is_local(args.host) or args.insecure:
        return
    lacking = ["--keys"] * (not args.keys) + ["--tls_cert", "--tls_key"] * (not args.tls_cert)
    if lacking:
        raise UsageError(
            f"--host={args.host} lets other machines in: give {', '.join(lacking)}, or --insecure where something in "
            "front of this server sees to it (docs/serving.md)"
        )


def tls_of(args: argparse.Namespace) -> ssl.SSLContext | None:
    from serving.listen import Tls

    return Tls(args.tls_cert, args.tls_key, args.client_ca).context() if args.tls_cert else None


# ── the command line ──────────────────────────────────────────────────────────────────────────────────────────────────


def check_packages() -> None:
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UsageError(f"serving needs {' and '.join(missing)}: `pip install -r requirements-deploy.txt`")


def parse(argv: list[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """(options, changes of the config)."""
    parser = usage.parser(__doc__, "python serve.py")
    options.add(parser, workdir="a run, or an import of model.huggingface")
    parser.add_argument("--config", metavar="FILE", help="with --target, in place of a workdir")
    parser.add_argument("--target", metavar="MACHINE", help="what to compile for, as h100:1 or v5e-8; with --dry_run")
    parser.add_argument(
        "--dry_run", action="store_true", help="whether it fits there, what it sends; nothing is served"
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address of this machine at which it listens")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0: one that is free")
    parser.add_argument("--slots", type=usage.positive, default=16, metavar="N", help="answers that are made at once")
    parser.add_argument(
        "--most_waiting",
        type=usage.positive,
        default=256,
        metavar="N",
        help="requests that wait; a further one is refused",
    )
    parser.add_argument("--keys", type=Path, help="the file of those who may ask, of python -m serving.keys")
    parser.add_argument("--tls_cert", type=Path, help="this server's certificate, in PEM")
    parser.add_argument("--tls_key", type=Path, help="its private key, in PEM")
    parser.add_argument("--client_ca", type=Path, help="only clients with a certificate of this authority, in PEM")
    parser.add_argument("--insecure", action="store_true", help="let other machines in without keys and TLS")
    parser.add_argument("--version", action="version", version=configuration.version(), help="show versions")
    args, changes = options.parse(parser, argv)
    if not 0 <= args.port < 2**16:
        raise UsageError(f"--port={args.port}: expected a number from 0 to 65535")
    return args, changes


if __name__ == "__main__":
    sys.exit(exits.guarded(lambda: main(sys.argv[1:]), "nothing was begun", leave=os._exit))

"""Options that generate.py, chat.py and serve.py have in common."""

import argparse
from collections.abc import Sequence
from typing import Any

from runtime import config as configuration
from runtime import usage
from runtime.config import UsageError, bad_input
from serving.requests import Sampling

LIMITS = {
    "temperature": (0, 100), "top_k": (0, 2**31 - 1), "top_p": (0, 1), "min_p": (0, 1),
    "repetition_penalty": (0.01, 100), "seed": (0, 2**32 - 1),
}  # fmt: skip
KEYS = ("mesh.fsdp", "mesh.expert", "mesh.tensor", "compute.dtype", "compute.xla_options")


def add(parser: argparse.ArgumentParser, workdir: str = "") -> None:
    """workdir: what stands for it where none is given, for --help; "": one must be given."""
    about = workdir or "a run, or an import of model.huggingface"
    parser.add_argument("--workdir", required=not workdir, metavar="PATH", help=about)
    parser.add_argument(
        "--simulate", type=usage.positive, metavar="N", help="so many CPU devices, over which the mesh is laid"
    )
    parser.add_argument("--config.KEY", metavar="VALUE", help=f"{', '.join(KEYS)}: by default one device")
    parser.add_argument(
        "--context",
        type=usage.positive,
        metavar="N",
        help="tokens of prompt and answer, at most; default: data.seq_len",
    )
    parser.add_argument(
        "--no_invariant", action="store_true",
        help="faster for one request alone, whose last bits then depend on how many others run",
    )  # fmt: skip


def add_sampling(parser: argparse.ArgumentParser, temperature: float) -> None:
    whole, real = {"type": int, "metavar": "N"}, {"type": float, "metavar": "X"}
    parser.add_argument("--temperature", **real, default=temperature, help="0: the likeliest token each time")
    parser.add_argument("--top_k", **whole, default=0, help="of the N likeliest tokens; 0: of all")
    parser.add_argument("--top_p", **real, default=1.0, help="of the likeliest that together have this probability")
    parser.add_argument("--min_p", **real, default=0.0, help="of those X times as likely as the likeliest, or more")
    parser.add_argument("--repetition_penalty", **real, default=1.0, help="above 1: less of what was there already")
    parser.add_argument("--seed", **whole, default=0, help="the same one, the same answer")


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """(options, changes of the config)."""
    args, rest = configuration.with_changes(parser, argv)
    changes = {}
    for word in rest:
        key, _, text = word.removeprefix("--config.").partition("=")
        if key not in KEYS:
            raise UsageError(f"--config.{key} changes nothing of an answer: only {', '.join(KEYS)} can be set here")
        with bad_input():
            changes[key] = configuration.typed(key, text)
    return args, changes


def sampling_of(args: argparse.Namespace) -> Sampling:
    """Raises UsageError for what is out of bounds."""
    found = {name: getattr(args, name) for name in LIMITS}
    for name, (low, high) in LIMITS.items():
        if not low <= found[name] <= high:
            raise UsageError(f"--{name}={found[name]}: expected a value from {low} to {high}")
    return Sampling(**found)

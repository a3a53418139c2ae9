"""Stands in for the file of this name that is written beside this branch: what serve.py needs of it."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from runtime.config import UsageError

Say = Callable[[str], None]


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", required=True, metavar="PATH", help="a run, or an import of model.huggingface")
    parser.add_argument("--simulate", type=int, metavar="N", help="so many CPU devices, over which the mesh is laid")
    parser.add_argument("--config.KEY", metavar="VALUE", help="as --config.mesh.tensor=2, in place of one device")
    parser.add_argument(
        "--context", type=int, metavar="N", help="tokens of prompt and answer at most; default: data.seq_len"
    )
    parser.add_argument(
        "--no_invariant", action="store_true",
        help="faster for one request alone, whose last bits then depend on how many others run",
    )  # fmt: skip


def parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """(options, changes of the config)."""
    args, rest = parser.parse_known_args(argv)
    for word in rest:
        if not word.startswith("--config.") or "=" not in word:
            raise UsageError(f"{word}: not an option of {parser.prog}: see --help")
    pairs = (word.removeprefix("--config.").split("=", 1) for word in rest)
    return args, dict(pairs)


def open_model(workdir: str, changes: Mapping[str, Any], simulate: int | None) -> Any:
    raise NotImplementedError


def open_engine(model: Any, slots: int, context: int | None, invariant: bool, say: Say, most_waiting: int) -> Any:
    raise NotImplementedError

"""Continues a prompt, or many at once, with the newest parameters of a run, on any mesh.

python generate.py --workdir=runs/mine --prompt="Once" --max_tokens=100
python generate.py --workdir=runs/mine --prompt="def " --samples=4 --top_p=0.9 --seed=1
python generate.py --workdir=runs/base --prompts=questions.txt --temperature=0 --simulate=6 --config.mesh.tensor=3

One answer appears as it is made. Each is a function of its prompt, its seed, the checkpoint, the mesh and the machine:
what else runs does not change a bit of it.
"""

if __name__ == "__main__":
    from runtime import early

    early.end_at_ctrl_c()

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.tokenizer import encode_prompt
from runtime import exits, usage
from runtime.config import UsageError, bad_input
from serving import loaded, options
from serving.engine import Engine
from serving.requests import Request
from serving.said import said

MOST_SLOTS = 64  # answers at once


def main(argv: list[str]) -> int:
    args, changes = parse(argv)
    prompts = [args.prompt] if args.prompts is None else _lines(args.prompts)
    sampling = options.sampling_of(args)
    tell = lambda line: print(line, file=sys.stderr, flush=True)
    model = loaded.open_model(args.workdir, changes, args.simulate)
    with bad_input():
        ids = [tuple(encode_prompt(model.tokenizer, prompt).tolist()) for prompt in prompts]
    eos = frozenset({model.tokenizer.eos} - {-1})
    seeds = [replace(sampling, seed=(sampling.seed + i) % 2**32) for i in range(args.samples)]
    requests = [Request(prompt, args.max_tokens, how, eos) for prompt in ids for how in seeds]
    context = loaded.context_of(model, args.context)
    with bad_input():
        for request in requests:
            request.check(context, model.network.vocab_size)
    slots = min(len(requests), MOST_SLOTS)
    engine = loaded.open_engine(model, slots, context, not args.no_invariant, tell, len(requests))
    engine.start()
    with contextlib.closing(engine):
        if len(requests) == 1:
            print(prompts[0], end="", flush=True)
            for piece in said(engine, model.tokenizer, requests[0], args.stop):
                print(piece, end="", flush=True)
            print()
        else:
            _print_all(engine, model.tokenizer, [p for p in prompts for _ in range(args.samples)], requests, args)
    return 0


def _lines(file: Path) -> list[str]:
    with bad_input():
        if not file.is_file():
            raise UsageError(f"--prompts={file}: there is no such file")
        found = file.read_text().splitlines()
    if not found:
        raise UsageError(f"--prompts={file} is empty: expected a prompt a line")
    return found


def _print_all(engine: Engine, tokenizer: Any, prompts: list[str], requests: list[Request], args: Any) -> None:
    """A line of JSON for each, in the order in which they were given."""
    whole = lambda request: "".join(said(engine, tokenizer, request, args.stop))
    with ThreadPoolExecutor(MOST_SLOTS) as pool:
        for prompt, request, text in zip(prompts, requests, pool.map(whole, requests), strict=True):
            print(json.dumps({"prompt": prompt, "seed": request.sampling.seed, "text": text}, ensure_ascii=False))


def parse(argv: list[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    parser = usage.parser(__doc__, "python generate.py")
    options.add(parser)
    parser.add_argument("--prompt", default="", help="what is continued")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="in its place a prompt a line, all at once")
    parser.add_argument(
        "--max_tokens", type=usage.positive, metavar="N", default=100, help="tokens of an answer, at most"
    )
    parser.add_argument(
        "--samples", type=usage.positive, metavar="N", default=1, help="answers to each prompt, of seeds in a row"
    )
    parser.add_argument("--stop", action="append", default=[], help="text before which an answer ends; may be repeated")
    options.add_sampling(parser, temperature=0.8)
    return options.parse(parser, argv)


def run(argv: list[str], leave: Callable[[int], Any] = int) -> int:
    return exits.guarded(lambda: main(argv), "nothing was kept", leave)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], leave=os._exit))

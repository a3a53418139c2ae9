"""Shows what a model would learn of a file of conversations: its first rows, with what is learned coloured, or between
[[ and ]] where the output is no terminal; then what is to be known of the template, and counts of all rows.

python -m data.chat show chat.jsonl --workdir=runs/base

Learned are what the assistant says and the token that closes it. The template and the tokenizer are those of a workdir
that was imported (python -m model.huggingface import), or that began with one.
"""

if __name__ == "__main__":
    from runtime import early

    early.end_at_ctrl_c()

import sys
from pathlib import Path

import numpy as np

from data import conversations
from data.record import TOKENIZER
from data.subwords import JsonTokenizer
from data.template import KEPT, Example, Template, with_special
from data.tokenizer import from_text, read_file
from runtime import exits, usage
from runtime.config import UsageError, bad_input
from runtime.console import is_terminal

ROWS = 10
GREEN, PLAIN = "\x1b[32m", "\x1b[0m"


def main(argv: list[str]) -> int:
    parser = usage.parser(__doc__, "python -m data.chat")
    parser.add_argument("what", choices=["show"], metavar="show", help="the one thing that it does")
    parser.add_argument("file", type=Path, metavar="FILE", help="a .jsonl of conversations")
    parser.add_argument("--workdir", type=Path, required=True, help="whose template and tokenizer are taken")
    args = parser.parse_args(argv)
    colours = (GREEN, PLAIN) if is_terminal(sys.stdout) else ("[[", "]]")
    with bad_input():
        show(args.file.expanduser(), args.workdir.expanduser(), colours)
    return 0


def show(file: Path, workdir: Path, colours: tuple[str, str]) -> None:
    template = Template.read(workdir / KEPT)
    if template is None:
        raise UsageError(f"{workdir / KEPT} holds no chat template: name a workdir that was imported with one")
    tokenizer = with_special(from_text(*read_file(str(workdir / TOKENIZER))))
    num_rows, found = 0, []
    for where, _, examples in conversations.examples_of(file, template, tokenizer):
        num_rows += 1
        found += [(len(example.ids_N), int(example.supervised_N.sum())) for example in examples]
        for example in examples if num_rows <= ROWS else ():
            print(f"{where.removesuffix(',')}\n{coloured(example, tokenizer, colours)}\n")
    if not found:
        raise UsageError(f"{file} holds no row")
    lengths, learned = zip(*found, strict=True)
    print(template.verdict(tokenizer))
    print(
        f"{num_rows:,} rows, {len(found):,} examples, {sum(lengths):,} tokens, of which {sum(learned):,} are learned "
        f"({sum(learned) / sum(lengths):.1%}); half of the examples have up to {int(np.median(lengths)):,} tokens, the "
        f"longest has {max(lengths):,}"
    )


def coloured(example: Example, tokenizer: JsonTokenizer, colours: tuple[str, str]) -> str:
    """Its text, special tokens spelled out; colours: what begins and ends what is learned."""
    borders = np.flatnonzero(np.diff(example.supervised_N)) + 1
    begin, end = colours
    return "".join(
        f"{begin}{tokenizer.spell(ids)}{end}" if learned[0] else tokenizer.spell(ids)
        for ids, learned in zip(np.split(example.ids_N, borders), np.split(example.supervised_N, borders), strict=True)
    )


if __name__ == "__main__":
    sys.exit(exits.guarded(lambda: main(sys.argv[1:]), "nothing was changed"))

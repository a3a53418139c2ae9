"""One style of --help for all commands: how each is called, what it is, its options, and examples at the end. What it
is and the examples are the docstring of its file."""

import argparse
from pathlib import Path
from typing import Any

VALUES = {int: "N", float: "X", Path: "PATH", str: "TEXT", None: "TEXT"}  # how a value is called, by its type
COMMANDS = ("python ", "sudo python ")


def parser(doc: str | None, command: str, then: str = "") -> argparse.ArgumentParser:
    """doc: paragraphs; those whose lines begin with a command are the examples. command: how it is called, as in
    `python compare.py`. then: what follows after the options, where that is none of argparse's."""
    about, examples = apart(doc or "")
    text = "examples:\n" + "\n".join(f"  {line}" for line in examples)
    return _Parser(then, prog=command, description=about, epilog=text, formatter_class=_Style, allow_abbrev=False)


def positive(text: str) -> int:
    """Of an option that counts something."""
    if int(text) < 1:
        raise ValueError(text)
    return int(text)


def not_negative(text: str) -> int:
    if int(text) < 0:
        raise ValueError(text)
    return int(text)


def apart(doc: str) -> tuple[str, list[str]]:
    """(the paragraphs that are no examples, the lines of those that are)."""
    paragraphs = [part.strip("\n") for part in doc.strip().split("\n\n")]
    lines = [[line.strip() for line in part.splitlines()] for part in paragraphs]
    is_example = [all(line.startswith(COMMANDS) for line in part) for part in lines]
    about = [part for part, example in zip(paragraphs, is_example, strict=True) if not example]
    return "\n\n".join(about), [
        line for part, example in zip(lines, is_example, strict=True) if example for line in part
    ]


class _Parser(argparse.ArgumentParser):
    def __init__(self, then: str, **options: Any):
        super().__init__(**options, add_help=False)
        self._then = then
        self.add_argument("-h", "--help", action="help", help="show this help")

    def format_usage(self) -> str:
        self.usage = self._call()
        return super().format_usage()

    def format_help(self) -> str:
        self.usage = self._call()
        return super().format_help()

    def _call(self) -> str:
        needed = [_Style.called(action) for action in self._actions if action.option_strings and action.required]
        found = [action for action in self._actions if not action.option_strings]
        named = [f"{action.metavar or action.dest.upper()}{'...' * (action.nargs == '+')}" for action in found]
        return " ".join(filter(None, [self.prog, *needed, "[options]", *named, self._then]))


class _Style(argparse.RawDescriptionHelpFormatter):
    """Options as they are typed, each with what it is otherwise."""

    @staticmethod
    def called(action: argparse.Action) -> str:
        names = ", ".join(action.option_strings)
        return f"{names}={action.metavar or VALUES.get(action.type, 'TEXT')}" if action.nargs != 0 else names

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return self.called(action) if action.option_strings else super()._format_action_invocation(action)

    def _get_help_string(self, action: argparse.Action) -> str:
        said = action.help or ""
        has_one = action.nargs != 0 and action.default not in (None, "", argparse.SUPPRESS)
        return f"{said} (default: %(default)s)" if has_one and "default" not in said else said

"""Chat templates are programs of strangers: they run in a process of their own, in Jinja's sandbox, with limits of
time and memory. The process stays alive from one rendering to the next; this file is also what it runs.

A line of JSON in, a line of JSON out.
"""

import contextlib
import datetime
import importlib.util
import json
import resource
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

SECONDS = 5  # of the processor, for one call: a template cannot wait for anything else
MEMORY = 2**29  # bytes of address space
MOST_CHARS = 2**24  # of one conversation
Messages = Sequence[Mapping[str, Any]]


class Renderer:
    """One template. May be called by several threads.

    variables: what it is given besides the messages, such as bos_token. origin: where it is from, for messages.
    """

    def __init__(self, template: str, variables: Mapping[str, str], origin: str):
        self._setup = json.dumps({"template": template, "variables": dict(variables)})
        self._origin, self._alone = origin, threading.Lock()
        self._process: subprocess.Popen[str] | None = None

    def __call__(self, conversations: Sequence[tuple[Messages, bool]], day: str | None = None) -> list[str]:
        """The text of each conversation; with True, followed by what asks for an answer. day: YYYY-MM-DD, which the
        template takes for today; None: today.

        Raises ValueError for a template that fails, refuses a conversation or exceeds a limit; ImportError without the
        package that runs it.
        """
        request = json.dumps({"conversations": conversations, "day": day})
        with self._alone:
            process, self._process = self._process or self._started(), None  # kept only once it has answered
            assert process.stdin and process.stdout
            with contextlib.suppress(BrokenPipeError):  # it has ended: nothing will be read, either
                process.stdin.write(request + "\n")
                process.stdin.flush()
            answer = process.stdout.readline()
            if not answer:
                code = process.wait()
                why = f"takes more than {SECONDS} s" if code == -signal.SIGPROF else f"ended its process ({code})"
                raise ValueError(f"{self._origin}: the chat template {why}.")
            self._process = process
        found = json.loads(answer)
        if "error" in found:
            raise ValueError(f"{self._origin}: the chat template {found['error']}.")
        return found["texts"]

    def _started(self) -> subprocess.Popen[str]:
        if importlib.util.find_spec("jinja2") is None:
            raise ImportError("a chat template needs the package jinja2: `pip install -r requirements-deploy.txt`")
        command = [sys.executable, "-P", "-X", "utf8", __file__]  # -P: data/ is no place to import from
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
        weakref.finalize(self, _end, process)  # also at the end of the interpreter
        assert process.stdin
        process.stdin.write(self._setup + "\n")
        return process


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


# ── in the process of its own ─────────────────────────────────────────────────────────────────────────────────────────


def serve() -> None:
    """Answers until nobody asks any more."""
    import jinja2  # before memory is limited

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is its parent's to handle
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    setup, template = json.loads(sys.stdin.readline()), None
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # unhandled, its signal ends this process
        try:
            asked = json.loads(line)
            template = template or _environment().from_string(setup["template"])
            given = setup["variables"] | {"strftime_now": _clock(asked["day"]), "tools": None, "documents": None}
            texts = [_render(template, given, *one) for one in asked["conversations"]]
            answer = json.dumps({"texts": texts})
        except MemoryError:
            answer = _error(f"needs more than {MEMORY >> 20} MiB, or writes more than {MOST_CHARS:,} characters")
        except jinja2.TemplateSyntaxError as error:
            answer = _error(f"is no Jinja template (line {error.lineno}: {_short(error)})")
        except _Refused as error:
            answer = _error(f"refuses it: {_short(error).rstrip('.')}")
        except Exception as error:  # of whatever type: it is the template's
            answer = _error(f"fails ({type(error).__name__}: {_short(error)})")
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(answer, flush=True)


class _Refused(Exception):
    """What the template itself says against a conversation."""


def _error(text: str) -> str:
    return json.dumps({"error": text})


def _short(error: Exception) -> str:
    return " ".join(str(error)[:300].split())


def _clock(day: str | None) -> Callable[[str], str]:
    today = datetime.datetime.fromisoformat(day) if day else datetime.datetime.now()
    return today.strftime


def _render(template: Any, given: dict[str, Any], messages: Messages, ask: bool) -> str:
    parts, size = [], 0
    for part in template.generate(given | {"messages": messages, "add_generation_prompt": ask}):
        parts.append(part)
        size += len(part)
        if size > MOST_CHARS:
            raise MemoryError
    return "".join(parts)


def _environment() -> Any:
    """As transformers sets it up, and nothing more."""
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class Generation(Extension):
        """{% generation %} marks what an assistant says, in few templates: here it is no more than what it encloses."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Public(Namespace):
        def __setitem__(self, name: str, value: Any) -> None:
            if name.startswith("_"):
                raise SecurityError(f"a namespace has no {name}")
            super().__setitem__(name, value)

    def refuse(message: str) -> None:
        raise _Refused(message)

    def tojson(value: Any, ensure_ascii: bool = False, **how: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **how)

    extensions = [Generation, "jinja2.ext.loopcontrols"]
    found = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
    found.filters["tojson"] = tojson
    found.globals |= {"raise_exception": refuse, "namespace": Public}
    del found.globals["lipsum"]
    return found


if __name__ == "__main__":
    serve()

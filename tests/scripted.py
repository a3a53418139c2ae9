"""An engine whose answers are known beforehand, with the interface of the real one: a thread, slots, a queue.

As a program it is serve.py with that engine: python -m tests.scripted --workdir=X --port=0 …
"""

import sys
import threading
import time
import types
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data.tokenizer import ByteTokenizer
from serving.requests import End, Full, Request, Token

TEXT = "Hëllo, wörld! 😀 It goes on and on. "
EOS = ByteTokenizer.eos


def answer(request: Request) -> list[int]:
    """The text, turned by the seed: as many bytes as are asked for; of the prompt "short", three and an end."""
    if bytes(request.prompt) == b"short":
        return [*b"abc", EOS]
    body = list(TEXT.encode())
    turn = request.sampling.seed % 7 if request.sampling.temperature else 0
    return (body[turn:] + body[:turn]) * (1 + request.max_tokens // len(body))


class Ticket:
    def __init__(self, engine, request, receive):
        self.request, self.receive, self.fingerprint = request, receive, ""
        self.is_cancelled, self.ids = False, iter(())
        self._engine = engine

    def tell(self, what):
        """As the real one: a receiver that fails is one that has gone."""
        try:
            self.receive(what)
        except Exception:
            self.is_cancelled = True

    def cancel(self):
        self.is_cancelled = True
        self._engine.wake()


class Scripted:
    """gate: while it is not set, a request that has a slot does not begin ("prefill"). seconds: of one turn."""

    context, vocab_size, step = 256, 256, 7

    def __init__(self, script: Callable[[Request], list[int]] = answer, slots=4, most_waiting=8, seconds=0.0):
        self.script, self.slots, self.most_waiting, self.seconds = script, slots, most_waiting, seconds
        self.fingerprint, self.gate, self.fails = "f" * 8, threading.Event(), False
        self.gate.set()
        self.seen: list[Request] = []
        self._active: list[Ticket] = []
        self._queue: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._takes, self._is_open = True, False
        self._thread = threading.Thread(target=self._loop, daemon=True)

    ready = property(lambda self: self._is_open and self._takes and not self.fails)
    running = property(lambda self: len(self._active))
    waiting = property(lambda self: len(self._queue))

    def start(self):
        self._is_open = True
        self._thread.start()
        return self

    def submit(self, request, receive):
        with self._changed:
            if len(self._queue) >= self.most_waiting:
                raise Full
            ticket = Ticket(self, request, receive)
            self.seen.append(request)
            self._queue.append(ticket)
            self._changed.notify()
            return ticket

    def swap(self, load):
        _, self.fingerprint, self.step = load() or (None, self.fingerprint, self.step)

    def wake(self):
        with self._changed:
            self._changed.notify()

    def drain(self, seconds):
        self._takes, end = False, time.monotonic() + seconds
        while (self.running or self.waiting) and time.monotonic() < end:
            time.sleep(0.005)

    def close(self):
        with self._changed:
            self._is_open = False
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def is_idle(self, seconds=5.0):
        """Whether nothing runs or waits, now or soon."""
        end = time.monotonic() + seconds
        while (self.running or self.waiting) and time.monotonic() < end:
            time.sleep(0.005)
        return not self.running and not self.waiting

    def _loop(self):
        while self._is_open:
            with self._changed:
                if not (self._active or self._queue):
                    self._changed.wait()
                while self._queue and len(self._active) < self.slots:
                    self._active.append(self._queue.popleft())
                for ticket in [t for t in self._queue if t.is_cancelled]:
                    self._queue.remove(ticket)
                    ticket.tell(End("cancelled"))
            for ticket in list(self._active):
                self._turn(ticket)
            time.sleep(self.seconds if self.gate.is_set() else 0.005)
        for ticket in [*self._active, *self._queue]:
            ticket.tell(End("cancelled"))
        self._active, self._queue = [], deque()

    def _turn(self, ticket):
        request = ticket.request
        if ticket.is_cancelled or self.fails:
            return self._end(ticket, "failed" if self.fails else "cancelled")
        if not self.gate.is_set():
            return None
        if not ticket.fingerprint:
            ticket.fingerprint = self.fingerprint
            ticket.ids = iter(self.script(request)[: request.max_tokens])
            for n, id in enumerate(request.prompt if request.echo else ()):
                ticket.tell(self._token(request, id, is_prompt=True, is_first=n == 0))
        id = next(ticket.ids, None)
        if id is None:
            return self._end(ticket, "length")
        if id in request.stop_ids:
            return self._end(ticket, "stop")
        return ticket.tell(self._token(request, id))

    def _end(self, ticket, reason):
        self._active.remove(ticket)
        ticket.tell(End(reason))

    def _token(self, request, id, is_prompt=False, is_first=False):
        """Its logprob is minus its id, in tenths; the likeliest ones are the ids from 1 on."""
        if request.top_logprobs < 0 or is_first:
            return Token(id, None, (), is_prompt)
        top = tuple((n, -n / 10) for n in range(1, 1 + request.top_logprobs))
        return Token(id, -id / 10, top, is_prompt)


@dataclass
class Template:
    """A line for each message."""

    origin: str = ""

    def prompt(self, messages, tokenizer):
        if messages[-1]["role"] != "user":
            raise ValueError("This template wants the last message to be the user's")
        return tokenizer.encode("".join(f"{m['role']}: {m['content']}\n" for m in messages)).tolist()

    def closing(self, tokenizer):
        return (10,)


def main(argv):
    import serve
    from serving import loaded

    serve.Template = types.SimpleNamespace(read=lambda folder: Template())
    loaded.open_model = lambda workdir, *_: types.SimpleNamespace(tokenizer=ByteTokenizer(), workdir=Path(workdir))
    loaded.open_engine = open_engine
    return serve.main(argv)


def open_engine(model, slots, context, invariant, say, most_waiting):
    found = Scripted(slots=slots, most_waiting=most_waiting, seconds=0.01)
    found.context = context or found.context
    return found


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from runtime import exits

    sys.exit(exits.guarded(lambda: main(sys.argv[1:]), "nothing was begun"))

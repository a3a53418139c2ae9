"""An answer's text, as it is made."""

import queue
from collections.abc import Iterator, Sequence

from data.tokenizer import Tokenizer
from serving.engine import Engine
from serving.requests import End, Request, Token
from serving.text import Detokenizer, StopStrings


def said(engine: Engine, tokenizer: Tokenizer, request: Request, stops: Sequence[str] = ()) -> Iterator[str]:
    """Pieces of it, up to a stop string; nobody who stops listening leaves the engine at work.

    Raises RuntimeError where the engine has failed."""
    heard: queue.Queue[Token | End] = queue.Queue()
    ticket = engine.submit(request, heard.put)
    text, stop = Detokenizer(tokenizer, goes_on=True), StopStrings(stops)
    try:
        while isinstance(what := heard.get(), Token):
            piece, is_over = stop.push(text.push(what.id))
            if piece:
                yield piece
            if is_over:
                return
        if what.reason == "failed":
            raise RuntimeError("the engine has failed") from engine.error
        piece, is_over = stop.push(text.end())
        yield piece if is_over else piece + stop.end()
    finally:
        ticket.cancel()

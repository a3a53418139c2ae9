"""What `sync.strategy` and `sync.codec` may be. Each is registered once: its class, whose fields are its keys of the
config's group `sync`. Codecs are listed where they are, in parallel/exchange/codecs."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from parallel.exchange import net
from parallel.exchange.codecs import CODECS
from parallel.exchange.codecs.base import is_round
from parallel.strategies.base import Strategy
from parallel.strategies.eager import Eager
from parallel.strategies.local import DiLoCo, Outer
from parallel.strategies.stale import Stale
from parallel.strategies.streaming import Streaming
from parallel.strategies.sync import Sync
from runtime import config as configuration
from runtime.config import bad_input

STRATEGIES: dict[str, type[Strategy]] = {
    "sync": Sync,
    "stale": Stale,
    "diloco": DiLoCo,
    "eager": Eager,
    "streaming": Streaming,
}


def known() -> configuration.Methods:
    """The keys of each, as the config's checks want them."""
    return configuration.Methods(
        {name: frozenset(_keys(kind)) for name, kind in STRATEGIES.items()},
        {name: frozenset(_keys(kind)) for name, kind in CODECS.items()},
    )


def _keys(kind: type) -> list[str]:
    fields = {field.name for field in dataclasses.fields(kind)}
    group = [key.removeprefix("sync.") for key in configuration.base_values() if key.startswith("sync.")]
    return [key for key in group if key.partition(".")[0] in fields]


def parse(argv: Sequence[str], doc: str) -> tuple[Any, Any]:
    """argv -> (config, flags), as runtime.config.parse."""
    return configuration.parse(argv, doc, known())


def validate(config: Any) -> None:
    """Every check that needs no device. Raises UsageError."""
    configuration.validate(config, known())
    with bad_input():
        net.check(config.sync.algorithm, codec(config.sync))


def codec(s: Any) -> Any:
    """The codec of config group `sync`. Raises ValueError for options that it does not take."""
    kind = CODECS[s.codec]
    return kind(**{key: s[key] for key in _keys(kind) if s[key] != -1})


def draws(s: Any) -> bool:
    """Whether that codec draws random numbers: what it draws follows from `seed`, and is a part of the programs."""
    found = codec(s)
    return is_round(found) or found.uses_key


def strategy(s: Any) -> tuple[type[Strategy], dict[str, Any]]:
    """The class that config group `sync` names, and its own fields."""
    kind = STRATEGIES[s.strategy]
    own = {key.partition(".")[0] for key in _keys(kind)}
    return kind, {key: Outer(**s.outer.to_dict()) if key == "outer" else s[key] for key in own}

"""What `sync.strategy` and `sync.codec` may be. Each is registered once: its class, whose fields are its keys of the
config's group `sync`. Codecs are listed where they are, in parallel/exchange/codecs. From Python, objects of the
caller's stand beside them."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import optax

from parallel.exchange import net
from parallel.exchange.codecs import CODECS
from parallel.exchange.codecs.base import BlockCodec, RoundCodec, is_round
from parallel.exchange.codecs.plain import Identity
from parallel.strategies import backward
from parallel.strategies.backward import Backward
from parallel.strategies.base import Strategy
from parallel.strategies.eager import Eager
from parallel.strategies.island import Island
from parallel.strategies.local import DiLoCo, Outer
from parallel.strategies.stale import Stale
from parallel.strategies.streaming import Streaming
from parallel.strategies.sync import Sync
from recipes import objects
from recipes.task import Task
from runtime import config as configuration
from runtime.config import UsageError, bad_input

STRATEGIES: dict[str, type[Strategy]] = {
    "sync": Sync,
    "stale": Stale,
    "diloco": DiLoCo,
    "eager": Eager,
    "streaming": Streaming,
}
OUTSIDE = {"island": Island}  # which exchanges nothing over `replica`, but by a log


@dataclass(frozen=True)
class Own:
    """Objects of the caller's, where a config has names: a codec, the class of a strategy (an object of it cannot exist
    before its mesh), an optimizer of optax; and what is trained in place of a language model. A config names them by
    their classes."""

    codec: Any = None
    strategy: type[Strategy] | None = None
    optimizer: Any = None
    task: Task | None = None

    def __post_init__(self) -> None:
        """Raises UsageError for an object of another kind, which lacks what is needed of it."""
        if self.codec is not None and not isinstance(self.codec, BlockCodec | RoundCodec):
            raise UsageError(
                f"sync.codec={self.codec!r}: expected a name, or an object of a class derived from BlockCodec or "
                "RoundCodec (parallel/exchange/codecs/base.py): docs/add-a-method.md"
            )
        if self.strategy is not None and not (isinstance(self.strategy, type) and issubclass(self.strategy, Strategy)):
            raise UsageError(
                f"sync.strategy={self.strategy!r}: expected a name, or a class derived from Strategy "
                "(parallel/strategies/base.py): docs/add-a-method.md"
            )

        if self.optimizer is not None and not isinstance(self.optimizer, optax.GradientTransformation):
            raise UsageError(
                f"optimizer={self.optimizer!r}: expected a dictionary of keys of the group, or a transformation of "
                "optax, which has init and update"
            )
        if self.task is not None and not isinstance(self.task, Task):
            raise UsageError(f"task={self.task!r}: expected a Task(init, axes, loss, weight, data, eval_data)")

    def strategies(self) -> dict[str, type[Strategy]]:
        return STRATEGIES | OUTSIDE | ({self.strategy.__name__: self.strategy} if self.strategy else {})

    def describe(self) -> dict[str, Any]:
        """What config.json keeps of them: {key: {class, fields, digest of the source}}."""
        found = {}
        if self.codec is not None:
            found["sync.codec"] = objects.described(type(self.codec), vars(self.codec))
        if self.strategy is not None:
            found["sync.strategy"] = objects.described(self.strategy, {})
        if self.optimizer is not None:
            found["optimizer"] = objects.described(type(self.optimizer), self.optimizer._asdict())
        if self.task is not None:
            names = ("init", "axes", "loss", "weight")
            found["task"] = objects.described(Task, {name: getattr(self.task, name) for name in names})
        return found


NONE = Own()
OWN_OPTIMIZER = "own"  # in the config, for `optimizer.name`
OBJECT_KEYS = ("sync.codec", "sync.strategy")
# Keys of a language model's alone, and those of the group `data` that any task has.
TEXT = ("model.", "lora.", "compute.", "data.", "sample.", "eval_batches", "optimizer.z_loss")
ANY_DATA = ("data.batch_size",)


def apart(changes: Mapping[str, Any], before: Own = NONE) -> tuple[dict[str, Any], Own]:
    """({key: value}, the objects among them): what a call or a row changes. A dictionary changes the keys of its group;
    a key that holds an object is given the name of its class. before: objects that stay where nothing is changed."""
    changes = dict(changes)
    task, optimizer = changes.pop("task", None), changes.pop("optimizer", None)
    if isinstance(optimizer, Mapping):
        changes["optimizer"], optimizer = optimizer, None
    values = dict(configuration.flatten(changes))
    own: dict[str, Any] = {"task": task if task is not None else before.task}
    for name in ("codec", "strategy"):
        x = values.get(f"sync.{name}", getattr(before, name))
        own[name] = None if isinstance(x, str) else x
    if optimizer is None and "optimizer.name" not in values:
        optimizer = before.optimizer
    found = Own(**own, optimizer=optimizer)
    named = {key: (x if isinstance(x, type) else type(x)).__name__ for key, x in values.items() if key in OBJECT_KEYS}
    values |= {key: name for key, name in named.items() if not isinstance(values[key], str)}
    return values | ({"optimizer.name": OWN_OPTIMIZER} if optimizer is not None else {}), found


def check_unread(task: Task, values: Mapping[str, Any]) -> None:
    """Raises UsageError for a key that only a language model reads."""
    for key, value in values.items():
        if key.startswith(TEXT) and key not in ANY_DATA:
            raise UsageError(f"{key}={value!r} is not read with a task of your own: leave it out")


def known(own: Own = NONE) -> configuration.Methods:
    """The keys of each, as the config's checks want them. An own codec has its values already, and reads none."""
    codecs = {name: frozenset(_keys(kind)) for name, kind in CODECS.items()}
    if own.codec is not None:
        codecs[type(own.codec).__name__] = frozenset()
    strategies = {name: frozenset(_keys(kind)) for name, kind in own.strategies().items()}
    return configuration.Methods(strategies, codecs, OWN_OPTIMIZER if own.optimizer else "")


def _keys(kind: type) -> list[str]:
    shared = {field.name for field in dataclasses.fields(Strategy)}
    fields = {field.name for field in dataclasses.fields(kind)} - shared
    group = [key.removeprefix("sync.") for key in configuration.base_values() if key.startswith("sync.")]
    return [key for key in group if key.partition(".")[0] in fields]


def parse(argv: Sequence[str], doc: str) -> tuple[Any, Any]:
    """argv -> (config, flags), as runtime.config.parse."""
    return configuration.parse(argv, doc, known())


def validate(config: Any, own: Own = NONE) -> None:
    """Every check that needs no device. Raises UsageError."""
    configuration.validate(config, known(own))
    with bad_input():
        net.check(config.sync.algorithm, codec(config.sync, own))
        if config.sync.exchange == "backward":
            backward.check(config.sync.algorithm, codec(config.sync, own))


def codec(s: Any, own: Own = NONE) -> Any:
    """The codec of config group `sync`. Raises ValueError for options that it does not take."""
    if own.codec is not None:
        return own.codec
    kind = CODECS[s.codec]
    return kind(**{key: s[key] for key in _keys(kind) if s[key] != -1})


def draws(s: Any, own: Own = NONE) -> bool:
    """Whether that codec draws random numbers: what it draws follows from `seed`, and is a part of the programs."""
    found = codec(s, own)
    return is_round(found) or found.uses_key


SYMBOLS = {"interval": " H", "staleness": " s", "compensation": " λ", "overlap": " τ", "mix": " α"}


def say(name: str, s: Any, own: Own = NONE) -> str:
    """A strategy or a codec of config group `sync` in words: its name as it is typed, and its keys; what a codec's own
    default is, is left out."""
    methods, values = known(own), dict(configuration.flatten(s))
    keys = (methods.strategies | methods.codecs)[name]
    if s.outer.optimizer == "sgd":
        keys -= {"outer.momentum"}
    said = {key: values[key] for key in values if key in keys and values[key] not in (-1, False)}
    return ", ".join([name, *(f"{key}{SYMBOLS.get(key, '')} = {x}" for key, x in said.items())])


class Chosen(NamedTuple):
    """A codec, the class of a strategy, and its own fields."""

    codec: Any
    strategy: type[Strategy]
    fields: dict[str, Any]


EXACT = Chosen(Identity(), Sync, {})  # of the steps before sync.warm_steps


def chosen(s: Any, own: Own = NONE) -> Chosen:
    """What config group `sync` names."""
    return Chosen(codec(s, own), *strategy(s, own))


def strategy(s: Any, own: Own = NONE) -> tuple[type[Strategy], dict[str, Any]]:
    """The class that config group `sync` names, and its own fields."""
    kind = Backward if s.exchange == "backward" else own.strategies()[s.strategy]
    fields = {key.partition(".")[0] for key in _keys(kind)}
    return kind, {key: Outer(**s.outer.to_dict()) if key == "outer" else s[key] for key in fields}


def check_begin(K: int, step: int, last: int) -> None:
    """Raises ValueError where a run cannot go from here to there in whole calls of K steps: a part of one would be
    dropped, and no evaluation or checkpoint would fall on the end of one."""
    if step % K or last % K:
        fits = ", ".join(str(n) for n in range(1, step + 1) if step % n == 0 and last % n == 0)
        raise ValueError(
            f"sync.interval: this run goes on from step {step} to {last}, and {K} steps are made at a time, so it "
            f"would not end there. A number of steps that fits is one of {fits or K}"
        )

"""Programs of a strategy whose model has weights that are not trained, such as those beside an adapter (model/lora.py).

They lie beside the state, as further arguments of every program: neither returned nor donated, nor exchanged, nor saved
with a state. The loss closes over them where it is traced, so that they are the same array for all replicas, and a
strategy knows nothing of them: its parameters are what is trained.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

from parallel.strategies.base import Batch, State, Strategy


def programs(strategy: Strategy, whole: Callable[..., Any]) -> dict[str, Callable]:
    """{name: f(state, batch, *frozen) -> (state, metrics)}. whole(params, fixed, *frozen) -> what `loss_fn` takes for
    its parameters; fixed: of the state."""

    def call(name: str, state: State, batch: Batch, *frozen: Any) -> tuple[State, dict]:
        of_all = over(strategy, lambda params: whole(params, state.fixed, *frozen))
        return of_all.programs()[name](state, batch)

    return {name: functools.partial(call, name) for name in strategy.programs()}


def over(strategy: Strategy, whole: Callable[[Any], Any]) -> Strategy:
    """The strategy, and those that it has parts of, whose loss is of whole(params)."""
    own = {field.name: getattr(strategy, field.name) for field in dataclasses.fields(strategy)}
    parts = {name: over(part, whole) for name, part in own.items() if isinstance(part, Strategy)}
    loss = lambda params, *more: strategy.loss_fn(whole(params), *more)
    return dataclasses.replace(strategy, loss_fn=loss, **parts)

"""The phases of a run. With `sync.warm_steps` its first so many steps are synchronous, in float32, and the strategy and
the codec begin from what they leave (post-local SGD, Lin et al. 2018): to the bit as if such a run had been stopped
there and gone on with another strategy."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import jax

from parallel.exchange import units
from parallel.strategies import resume
from parallel.strategies.base import State
from recipes.build import Parts, Phase
from runtime.digest import named_arrays


class Call(NamedTuple):
    phase: Phase
    program: str
    step: int  # before it
    steps: int  # K


def at(parts: Parts, step: int) -> Phase:
    """The one that makes the update after `step`."""
    return [phase for phase in parts.phases if phase.first <= step][-1]


def spans(parts: Parts, start: int, last: int) -> list[tuple[Phase, int]]:
    """What is left at step `start` of a run that ends at `last`: (phase, its last step)."""
    ends = [phase.first for phase in parts.phases[1:]] + [last]
    return [(phase, end) for phase, end in zip(parts.phases, ends, strict=True) if start < end]


def calls(parts: Parts, last: int) -> Iterator[Call]:
    """Of a whole run."""
    for phase, end in spans(parts, 0, last):
        K = phase.strategy.steps_per_call
        for step in range(phase.first, end, K):
            yield Call(phase, phase.prefix + phase.strategy.program_at(step, end), step, K)


# ── from one state to another ─────────────────────────────────────────────────────────────────────────────────────────


def kinds(phase: Phase) -> dict[str, str]:
    """What each array of its state is (parallel/layout/roles.py), by name."""
    declared = replace(phase.strategy.declare(phase.state), fixed=phase.fixed)
    return {name: role.kind for name, role in named_arrays(declared).items()}


def adapter(parts: Parts) -> Callable[[int, Any, Any], resume.Adapted]:
    """(step, saved, wanted) -> how to make the state of that step out of one with another codec, strategy, mesh or
    number of replicas, as in `resume.adapt`."""
    leaves = units.leaves(parts.param_shapes, parts.task.axes)

    def adapt(step: int, saved: Any, wanted: Any) -> resume.Adapted:
        phase = at(parts, step)
        fresh = lambda names, params: begun_anew(phase, names, params)
        return resume.adapt(saved, wanted, kinds(phase), leaves, fresh, parts.mesh)

    return adapt


def begun_anew(phase: Phase, names: Iterable[str], params: resume.Arrays) -> resume.Arrays:
    """These arrays of a state that begins with these parameters (both by name), and no others."""
    wanted = named_arrays(phase.state)

    def begin(params: resume.Arrays) -> resume.Arrays:
        begun = named_arrays(phase.strategy.init(jax.tree.structure(phase.state.params).unflatten(params.values())))
        return {name: begun[name] for name in names}

    in_order = {name: params[name] for name in wanted if name in params}
    return jax.jit(begin, out_shardings={name: wanted[name].sharding for name in names})(in_order)


def cross(parts: Parts, phase: Phase, state: State) -> State:
    """The state that `phase` begins with, out of the one that the phase before has ended with, which is taken over:
    what is not needed any more is deleted on the way."""
    old, wanted = named_arrays(state), named_arrays(phase.state)
    known = kinds(at(parts, phase.first - 1))
    saved = {name: {"shape": x.shape, "dtype": str(x.dtype), "kind": known[name]} for name, x in old.items()}
    adapted = adapter(parts)(phase.first, saved, wanted)
    uses, found = Counter(name for step in adapted.steps for name in step.load), {}
    for step in adapted.steps:
        found |= step.make({name: old[name] for name in step.load})
        uses.subtract(list(step.load))
        for name in step.load:
            if not uses[name] and all(old[name] is not x for x in found.values()):
                old[name].delete()
    return jax.tree.structure(phase.state).unflatten([found[name] for name in wanted])

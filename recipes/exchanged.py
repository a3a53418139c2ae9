"""What the exchange of a run sends and holds, as the planner counts it (parallel/cost/held.py, pace.py)."""

from parallel.cost.bytes import bytes_per_step, in_flight_bytes
from parallel.cost.held import Flight
from parallel.cost.network import FLOAT32
from parallel.cost.pace import Exchange
from parallel.exchange.codecs.plain import BF16, Identity
from recipes import memory
from recipes.build import Parts

# Float32 copies of the weights that wait for the end of an exchange that is hidden, as compiled programs have them.
COPIES = {"Stale": 1.0, "Streaming": 2.5, "Eager": 6.5}
# Bytes of memory of a parameter that compiled exchanges read and write: in coding it in blocks, and with error
# feedback, for which the update is worked out once more to be judged.
CODED, FED_BACK = 54, 60


def sent(parts: Parts) -> Exchange:
    """Of a whole interval, and not of a run's last, which may have one exchange more."""
    strategy, H = parts.strategy, parts.strategy.interval
    one, two = (bytes_per_step(strategy, n * H) * n * H for n in (1, 2))
    each = CODED * is_coded(parts) + FED_BACK * (strategy.exchange.feedback is not None)
    return Exchange(two - one, H, strategy.fragments, strategy.hidden_steps, moved=each * _parameters(parts))


def held(parts: Parts) -> Flight:
    strategy, copies = parts.strategy, COPIES.get(type(parts.strategy).__name__, max(COPIES.values()))
    messages = max(sum(map(in_flight_bytes, found)) for found in strategy.exchanges().values())
    if not strategy.hidden_steps:
        return Flight(messages, is_coded(parts))
    if strategy.interval > 1 or is_coded(parts):
        return Flight(messages, is_coded(parts), FLOAT32 * copies * _parameters(parts))
    return Flight(messages, False, sent(parts).bytes)


def is_coded(parts: Parts) -> bool:
    """In blocks, and not as float32 or bfloat16."""
    return not all(isinstance(unit.codec, Identity | BF16) for unit in parts.strategy.exchange.units)


def _parameters(parts: Parts) -> float:
    """Of a device."""
    return memory.tree_bytes(parts.state.params, parts.mesh.shape) / FLOAT32

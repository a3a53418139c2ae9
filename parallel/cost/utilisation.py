"""Compute utilisation over a slow link: the share of wall-clock time that a replica computes instead of waiting.

The clock of one replica is simulated layer by layer, after Streaming DiLoCo (Douillard et al. 2025, arXiv 2501.18512,
Table 4). The simulator behind that table is not public. What the paper leaves open was inferred from its table, one
set for all fifteen rows, so these are our assumptions and not the paper's statements. In brackets: the cells of 75 that
come within one step of the table's bandwidth grid when only this assumption is changed; with all as stated it is 74.

1. All L layers have the same size, time and bytes; forward is 1/3 of a step and backward 2/3 [1/2 each: 53].
2. A layer's message is ready when its whole backward is done [when its first half is, the parameters' gradient coming
   before the activations': 72; at the step's end, first layer first: 27], and each layer is a message [a fragment: 20].
3. The link sends one message at a time, first come first served: within a step, the last layer leaves first.
4. A message that leaves in step t is due when step t + 1 + overlap runs that layer's forward [when that step starts:
   72], and compute waits until then. The paper's "overlap" row is an overlap of 1 step [2: 68].
5. A fragment is strided, every (number of fragments)-th layer [consecutive layers: 61]; fragments leave at equal
   distances within the interval.
6. Parameters are the nominal 1e9, 1e10, 1e11, in bf16 between two replicas: the collective's factor 2(M-1)/M is 1, so 2
   bytes per parameter [4, float32 or a factor of 2: 0], and 0.5 for FP4. No latency; codec and outer optimizer take no
   time; utilisation is that of the steady state, not of a finite run.

The match is close but not unbiased: of the 74 cells 13 are equal and 61 are one step above. Two other readings remove
this: the table prints the last bandwidth *before* the target is met (75 within one step, 61 equal), or a parameter has
13.5 bits (75 and 67). We keep the plain reading, which asks for up to 1.2 times the paper's bandwidth.

Times in seconds, link rates in Gbit/s (1e9 bits), bytes as sent by one replica. Letters in shapes: L layers,
W link rates simulated side by side, n messages of one step.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

GRID = np.logspace(-1, 3, 50)  # Gbit/s; rounded to one decimal these are the values that the paper's tables print
TARGETS = (0.50, 0.80, 0.90, 0.95, 0.99)  # the columns of the paper's Table 4
FORWARD = 1 / 3  # the forward pass's share of a step's time: 2 of 6 FLOPs per parameter and token


@dataclass(frozen=True)
class Workload:
    """A model on one replica's accelerators.

    parameters: number exchanged; layers: equal parts of them; step_seconds: one step's compute without any waiting.
    """

    parameters: float
    layers: int
    step_seconds: float

    def __post_init__(self):
        if self.layers < 1 or not (self.parameters > 0 and self.step_seconds > 0):
            raise ValueError(f"{self}: parameters and step_seconds must be positive and layers at least 1.")


# The models of Table 4. Step times as the paper states them; its text and caption disagree on the MFU behind them.
WORKLOADS = {
    "1B": Workload(1e9, 24, 0.1),
    "10B": Workload(10e9, 48, 0.8),
    "100B": Workload(100e9, 108, 4.9),
}


@dataclass(frozen=True)
class Method:
    """What a strategy and a codec put on the link, and when.

    bytes_per_parameter: sent by one replica when a parameter is exchanged, everything included: the codec's scales and
        padding, and the collective's factor (a ring all-reduce of float32 over R replicas: 4 * 2(R-1)/R).
    interval: H, the steps between two exchanges of the same parameter.
    fragments: groups of layers exchanged in turn, each once per interval. 1: all layers together.
    overlap: whole steps that an exchange may hide behind: the staleness s of stale, the overlap of streaming.

    | strategy | Method |
    |---|---|
    | sync | Method(b) |
    | stale(s) | Method(b, overlap=s) |
    | diloco | Method(b, interval=H) |
    | streaming | Method(b, interval=H, fragments=F, overlap=steps) |
    """

    bytes_per_parameter: float
    interval: int = 1
    fragments: int = 1
    overlap: int = 0

    def __post_init__(self):
        if self.interval < 1 or self.fragments < 1 or self.overlap < 0 or not self.bytes_per_parameter >= 0:
            raise ValueError(f"{self}: interval and fragments start at 1, overlap and bytes_per_parameter at 0.")


def utilisation(
    workload: Workload, method: Method, gbit_per_s: ArrayLike, latency_s: float = 0.0
) -> float | NDArray[np.float64]:
    """The share of time spent computing, in (0, 1], in the steady state.

    gbit_per_s: the rate at which one replica can send, a number or an array of any shape; infinity is allowed.
    latency_s: seconds between the end of sending and the arrival of the result, for each layer's message; messages
        behind it need not wait for it. For a collective of several hops: their sum.
    Returns a float for a number and an array of the same shape for an array.
    Raises ValueError for more fragments than layers, and for rates that are not positive or a negative latency.
    """
    rates = np.asarray(gbit_per_s, dtype=np.float64)
    if not (rates > 0).all() or not latency_s >= 0:
        raise ValueError(f"The link's rate must be positive and its latency at least 0, got {gbit_per_s}, {latency_s}.")
    layer_bits = 8e-9 * method.bytes_per_parameter * workload.parameters / workload.layers  # in 1e9 bits
    message_W = layer_bits / rates.reshape(-1)
    compute_s = method.interval * workload.step_seconds
    # The link's own limit needs no simulation, and a simulation that starts with an empty link takes long to see it:
    # a link a little too slow falls behind for many steps before the first message is late.
    round_W = np.maximum(_round_seconds(workload, method, message_W, latency_s), workload.layers * message_W)
    share = np.minimum(1.0, compute_s / round_W).reshape(rates.shape)
    return float(share) if share.ndim == 0 else share


def bandwidth_for(
    workload: Workload,
    method: Method,
    target: float,
    grid: Sequence[float] | NDArray[np.float64] = GRID,
    latency_s: float = 0.0,
) -> float:
    """The smallest rate of the grid, in Gbit/s, whose utilisation is at least the target (0.95, say).

    Infinity if none is: the link's latency can make it so at any rate. Arguments otherwise as utilisation's.
    """
    rates = np.sort(np.asarray(grid, dtype=np.float64))
    enough = np.asarray(utilisation(workload, method, rates, latency_s)) >= target - 1e-9  # 1e-9: rounding of sums
    return float(rates[np.argmax(enough)]) if enough.any() else math.inf


def _schedule(layers: int, method: Method) -> dict[int, NDArray[np.int64]]:
    """Step within the interval -> the layers [n] exchanged after it, in the order in which their backward ends."""
    if method.fragments > layers:
        raise ValueError(f"{method.fragments} fragments need as many layers, but the model has {layers}.")
    leaving = defaultdict(list)
    for fragment in range(method.fragments):
        leaving[fragment * method.interval // method.fragments] += range(fragment, layers, method.fragments)
    return {step: np.array(sorted(chosen, reverse=True)) for step, chosen in leaving.items()}


def _round_seconds(
    workload: Workload, method: Method, message_W: NDArray[np.float64], latency_s: float
) -> NDArray[np.float64]:
    """Seconds [W] that one interval takes in the steady state, when a layer's message keeps the link for message_W."""
    layers, interval = workload.layers, method.interval
    forward_s = FORWARD * workload.step_seconds / layers
    backward_s = (1 - FORWARD) * workload.step_seconds / layers
    schedule = _schedule(layers, method)
    # A wait comes back after the intervals that a deadline spans; the first ones do not wait yet for anything.
    span = 1 + method.overlap // interval
    warm, measured = 2 * span + 2, 12 * span

    clock_W = np.zeros_like(message_W)  # when this replica's compute is free
    link_W = np.zeros_like(message_W)  # when its link is free
    arrivals: dict[int, tuple[NDArray, NDArray]] = {}  # step -> layers [n] due in it, and when they come [n, W]
    warm_W = clock_W
    for step in range((warm + measured) * interval):
        if step == warm * interval:
            warm_W = clock_W
        if step in arrivals:
            due, arrival_nW = arrivals.pop(step)
            # Layer l runs l forwards after layer 0: a late message delays the pass by what those do not cover.
            clock_W = np.maximum(clock_W, (arrival_nW - forward_s * due[:, None]).max(axis=0))
        clock_W = clock_W + forward_s * layers
        if step % interval in schedule:
            leaving = schedule[step % interval]
            ready_nW = clock_W + backward_s * (layers - leaving)[:, None]
            sent_nW = _first_come_first_served(ready_nW, link_W, message_W)
            link_W = sent_nW[-1]
            arrivals[step + 1 + method.overlap] = leaving, sent_nW + latency_s
        clock_W = clock_W + backward_s * layers
    return (clock_W - warm_W) / measured


def _first_come_first_served(
    ready_nW: NDArray[np.float64], free_W: NDArray[np.float64], message_W: NDArray[np.float64]
) -> NDArray[np.float64]:
    """When each message has left, [n, W]: sent[i] = max(ready[i], sent[i-1]) + message, with sent[-1] = free.

    Subtracting the time of the messages in front turns the recurrence into a running maximum.
    """
    index_n1 = np.arange(len(ready_nW))[:, None]
    start_nW = np.maximum(ready_nW, free_W) - index_n1 * message_W
    return np.maximum.accumulate(start_nW, axis=0) + (index_n1 + 1) * message_W

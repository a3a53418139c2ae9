"""The utilisation simulator: a published table, and what must hold for any method, model and link."""

import math
import random

import numpy as np
import pytest

from parallel.cost.utilisation import GRID, TARGETS, WORKLOADS, Method, Workload, bandwidth_for, utilisation

# Streaming DiLoCo (arXiv 2501.18512), Table 4: Gbit/s needed for each of TARGETS; H=100, fragments of 3 layers.
TABLE_4 = {
    "1B": {
        "data parallel": (86.8, 152.6, 184.2, 222.3, 569.0),
        "diloco": (1.4, 6.2, 13.3, 23.3, 86.8),
        "streaming": (1.4, 5.2, 9.1, 16.0, 28.1),
        "streaming, overlapped": (1.4, 4.3, 6.2, 9.1, 11.0),
        "streaming, overlapped, fp4": (0.4, 0.9, 1.7, 2.0, 3.0),
    },
    "10B": {
        "data parallel": (104.8, 222.3, 222.3, 268.3, 471.5),
        "diloco": (1.7, 7.5, 16.0, 33.9, 104.8),
        "streaming": (1.7, 5.2, 9.1, 13.3, 19.3),
        "streaming, overlapped": (1.7, 3.6, 5.2, 6.2, 7.5),
        "streaming, overlapped, fp4": (0.4, 0.9, 1.4, 1.4, 1.7),
    },
    "100B": {
        "data parallel": (184.2, 323.8, 390.7, 390.7, 471.5),
        "diloco": (3.0, 11.0, 23.3, 49.4, 184.2),
        "streaming": (2.4, 6.2, 9.1, 11.0, 19.3),
        "streaming, overlapped": (1.7, 3.6, 4.3, 5.2, 5.2),
        "streaming, overlapped, fp4": (0.5, 0.9, 1.1, 1.1, 1.4),
    },
}
# Cells that differ by more than one step of the grid: (model, row, target): steps above the table.
MISMATCHES = {("100B", "streaming, overlapped", 0.5): 2}
EQUAL, ONE_ABOVE = 13, 61  # the rest: the simulator asks for slightly more than the paper (module docstring)

BF16, FP4 = 2.0, 0.5  # bytes per parameter; two replicas: the collective's factor 2(M-1)/M is 1


def methods(layers: int) -> dict[str, Method]:
    fragments = layers // 3
    return {
        "data parallel": Method(BF16),
        "diloco": Method(BF16, interval=100),
        "streaming": Method(BF16, interval=100, fragments=fragments),
        "streaming, overlapped": Method(BF16, interval=100, fragments=fragments, overlap=1),
        "streaming, overlapped, fp4": Method(FP4, interval=100, fragments=fragments, overlap=1),
    }


def grid_index(gbit_per_s: float) -> int:
    """Position on the grid; the table's rounding moves a value by less than half a step."""
    return int(np.argmin(np.abs(np.log(GRID / gbit_per_s))))


def differences() -> dict[tuple[str, str, float], int]:
    """(model, row, target) -> grid steps by which the simulator asks for more than the paper."""
    found = {}
    for model, rows in TABLE_4.items():
        for row, cells in rows.items():
            method = methods(WORKLOADS[model].layers)[row]
            for target, cell in zip(TARGETS, cells, strict=True):
                ours = bandwidth_for(WORKLOADS[model], method, target)
                found[model, row, target] = grid_index(ours) - grid_index(cell)
    return found


def test_the_table_is_on_the_grid():
    for cell in (cell for rows in TABLE_4.values() for cells in rows.values() for cell in cells):
        assert abs(GRID[grid_index(cell)] - cell) <= 0.06, cell


def test_streaming_diloco_table_4():
    steps = differences()
    assert len(steps) == 75
    assert sum(abs(step) <= 1 for step in steps.values()) >= 70
    assert {cell: step for cell, step in steps.items() if abs(step) > 1} == MISMATCHES, (
        "The simulator now disagrees with the paper in other cells. If that was intended, say so in the docstring of "
        "parallel/cost/utilisation.py and update MISMATCHES, EQUAL and ONE_ABOVE here."
    )
    counts = [sum(step == wanted for step in steps.values()) for wanted in (0, 1)]
    assert counts == [EQUAL, ONE_ABOVE]


# --- a slow, obvious reference -------------------------------------------------------------------------------------


def reference(workload: Workload, method: Method, gbit_per_s: float, latency_s: float, rounds: int) -> float:
    """One layer at a time, one link rate, the second half of a long run."""
    message = workload.parameters / workload.layers * method.bytes_per_parameter * 8 / (gbit_per_s * 1e9)
    part = workload.step_seconds / workload.layers / 3
    clock = link = half = 0.0
    due: dict[tuple[int, int], float] = {}
    for step in range(2 * rounds * method.interval):
        if step == rounds * method.interval:
            half = clock
        for layer in range(workload.layers):
            clock = max(clock, due.pop((step, layer), 0.0)) + part
        for layer in reversed(range(workload.layers)):
            clock += 2 * part
            leaves = layer % method.fragments * method.interval // method.fragments
            if leaves == step % method.interval:
                link = max(link, clock) + message
                due[step + 1 + method.overlap, layer] = link + latency_s
    return rounds * method.interval * workload.step_seconds / (clock - half)


SMALL = Workload(parameters=1e9, layers=6, step_seconds=1.0)
METHODS = {
    "sync": Method(4.0),
    "stale(1)": Method(4.0, overlap=1),
    "stale(3)": Method(4.0, overlap=3),
    "diloco": Method(4.0, interval=10),
    "eager": Method(4.0, interval=10, overlap=10),
    "streaming": Method(4.0, interval=10, fragments=3),
    "streaming, overlapped": Method(4.0, interval=10, fragments=3, overlap=2),
    "uneven fragments": Method(4.0, interval=7, fragments=4, overlap=1),
}


@pytest.mark.parametrize("latency_s", [0.0, 0.3])
@pytest.mark.parametrize("name", METHODS)
def test_equals_the_reference(name, latency_s):
    rates = np.geomspace(0.5, 200, 7)
    ours = utilisation(SMALL, METHODS[name], rates, latency_s)
    slow = [reference(SMALL, METHODS[name], rate, latency_s, rounds=120) for rate in rates]
    np.testing.assert_allclose(ours, slow, rtol=2e-3)  # what a finite run differs from the steady state


# --- what must hold --------------------------------------------------------------------------------------------------


def some_settings(number: int = 60) -> list[tuple[Workload, Method, float]]:
    """Random workloads and methods, each with a latency in seconds."""
    draw = random.Random(0)
    settings = []
    for _ in range(number):
        layers = draw.randint(1, 12)
        interval = draw.choice([1, 1, 2, 5, 12])
        method = Method(draw.choice([0.1, 1.0, 4.0]), interval, draw.randint(1, layers), draw.choice([0, 0, 1, 3, 14]))
        workload = Workload(10 ** draw.uniform(6, 11), layers, 10 ** draw.uniform(-2, 1))
        settings.append((workload, method, draw.choice([0.0, 0.01, 1.0])))
    return settings


@pytest.mark.parametrize("workload, method, latency_s", some_settings())
def test_any_method(workload, method, latency_s):
    here = utilisation(workload, method, GRID, latency_s)
    assert (here > 0).all() and (here <= 1).all()
    assert (np.diff(here) >= -1e-9).all(), "a faster link never lowers utilisation"
    more = Method(2 * method.bytes_per_parameter, method.interval, method.fragments, method.overlap)
    assert (utilisation(workload, more, GRID, latency_s) <= here + 1e-9).all(), "fewer bytes never lower it"
    assert (utilisation(workload, method, GRID, latency_s + 0.1) <= here + 1e-9).all(), "latency never raises it"
    later = Method(method.bytes_per_parameter, method.interval, method.fragments, method.overlap + 1)
    assert (utilisation(workload, later, GRID, latency_s) >= here - 1e-9).all(), "more overlap never lowers it"


@pytest.mark.parametrize("name", METHODS)
def test_limits(name):
    method = METHODS[name]
    assert utilisation(SMALL, method, math.inf) == pytest.approx(1, abs=1e-12)
    assert utilisation(SMALL, method, 1e-6) == pytest.approx(1e-6 / 32 * method.interval, rel=1e-3)  # the link alone
    assert utilisation(SMALL, Method(0.0, method.interval), 1e-6) == pytest.approx(1, abs=1e-12)  # nothing to send


def test_latency():
    # Sync: the first layer's message arrives `latency` after its backward, and the next forward waits for it.
    assert utilisation(SMALL, METHODS["sync"], math.inf, latency_s=0.25) == pytest.approx(1 / 1.25)
    assert utilisation(SMALL, METHODS["diloco"], math.inf, latency_s=0.25) == pytest.approx(10 / 10.25)
    assert utilisation(SMALL, METHODS["stale(1)"], math.inf, latency_s=0.25) == pytest.approx(1)  # hidden by a step
    assert bandwidth_for(SMALL, METHODS["sync"], 0.9, latency_s=0.25) == math.inf


def test_stale_hides_what_data_parallel_waits_for():
    sync, stale = (utilisation(WORKLOADS["1B"], Method(BF16, overlap=s), GRID) for s in (0, 1))
    assert (stale >= sync).all() and (stale > sync + 0.1).any()
    # With a whole step to hide in, nothing but the link's rate is left: 16 Gbit in 0.1 s.
    np.testing.assert_allclose(stale, np.minimum(1, GRID / 160), rtol=1e-9)


def test_numbers_and_arrays():
    grid = utilisation(SMALL, METHODS["diloco"], GRID.reshape(5, 10))
    assert grid.shape == (5, 10)
    one = utilisation(SMALL, METHODS["diloco"], float(GRID[13]))
    assert isinstance(one, float) and one == grid[1, 3]
    assert bandwidth_for(SMALL, METHODS["sync"], 0.5, grid=[100.0, 1.0, 10.0]) == 100.0


def test_bad_input():
    with pytest.raises(ValueError, match="7 fragments need as many layers, but the model has 6"):
        utilisation(SMALL, Method(4.0, interval=10, fragments=7), 1.0)
    with pytest.raises(ValueError, match="rate must be positive"):
        utilisation(SMALL, METHODS["sync"], 0.0)
    with pytest.raises(ValueError, match="interval and fragments start at 1"):
        Method(4.0, interval=0)
    with pytest.raises(ValueError, match="layers at least 1"):
        Workload(1e9, 0, 1.0)

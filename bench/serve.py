"""How fast the engine decodes SmolLM2-135M-Instruct on this CPU, beside transformers, and how long a request waits for
its first token under load.

python bench/serve.py --torch=/path/to/python        (a Python with torch, transformers, gguf and accelerate)

In each round each is measured once, in turn: transformers' generate on the same file, one request alone, 16 at once,
and the sum of an array as large as the weights, for a token of one request can take no less time than reading them.
"""

import contextlib
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from bench import common  # noqa: E402
from bench.torch_generate import Transformers  # noqa: E402
from recipes import published  # noqa: E402
from runtime import usage  # noqa: E402
from serving import loaded  # noqa: E402
from serving.engine import Engine  # noqa: E402
from serving.requests import Request, Sampling, Token  # noqa: E402

PROMPT, TOKENS, CROWD = 32, 64, 16
LOADED = 60  # requests under load


def request(seed: int = 0, tokens: int = TOKENS) -> Request:
    ids = np.random.default_rng(seed).integers(100, 40_000, PROMPT).tolist()
    return Request(tuple(ids), tokens, Sampling(0.0))


def alone(engine: Engine) -> float:
    seconds, (tokens, _) = common.clock(engine.answer, request())
    assert len(tokens) == TOKENS
    return seconds


def crowd(engine: Engine) -> float:
    """Seconds until all of them are answered."""
    return _at_times(engine, [0.0] * CROWD)[0]


def _at_times(engine: Engine, times: list[float]) -> tuple[float, list[float]]:
    """(seconds until all are answered, seconds to the first token of each) of requests that come at these seconds,
    whether those before have been answered or not."""
    firsts: list[float] = [0.0] * len(times)
    done = [threading.Event() for _ in times]
    start = time.perf_counter()

    def listener(i: int, came: float) -> Callable[[Any], None]:
        def receive(what: Any) -> None:
            if isinstance(what, Token):
                firsts[i] = firsts[i] or time.perf_counter() - start - came
            else:
                done[i].set()

        return receive

    for i, at in enumerate(times):
        time.sleep(max(0.0, at - (time.perf_counter() - start)))
        engine.submit(request(i), listener(i, time.perf_counter() - start))
    for event in done:
        event.wait()
    return time.perf_counter() - start, firsts


def reader(count: int) -> Callable[[], float]:
    """Seconds to read so many float32 once: their sum."""
    numbers, add = jnp.ones(count, jnp.float32), jax.jit(jnp.sum)
    return lambda: common.clock(lambda: add(numbers).block_until_ready())[0]


def main() -> None:
    parser = usage.parser(__doc__, "python bench/serve.py")
    parser.add_argument("--torch", required=True, metavar="PYTHON", help="that in which transformers runs")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="of which medians are taken")
    args = parser.parse_args()
    say = lambda line: print(line, flush=True)
    workdir = str(published.smollm2(say))
    engines = {}
    for name, slots, invariant in (("invariant", CROWD, True), ("not invariant", 1, False)):
        engines[name] = loaded.open_engine(loaded.open_model(workdir, {}, None), slots, 256, invariant, say, 256)
        engines[name].start()
    report = common.Report("serve")
    numbers = sum(x.size for x in jax.tree.leaves(engines["invariant"]._weights))
    read = reader(numbers)
    with contextlib.ExitStack() as stack:
        theirs = stack.enter_context(Transformers(args.torch, published.file_of_smollm2(say)))
        for engine in engines.values():
            stack.callback(engine.close)
        measured = {
            "transformers": lambda: theirs.greedy(list(request().prompt), TOKENS)["seconds"],
            "not invariant": lambda: alone(engines["not invariant"]),
            "invariant": lambda: alone(engines["invariant"]),
            "crowd": lambda: crowd(engines["invariant"]),
            "read": read,
        }
        found: dict[str, list[float]] = {name: [] for name in measured}
        for turn in range(args.rounds + 1):
            for name, measure in measured.items():
                seconds = measure()
                if turn:  # the first one warms up
                    found[name].append(seconds)
        tell(report, found, numbers)
        under_load(report, engines["invariant"], statistics.median(found["crowd"]))
    report.details |= {"seconds": found, "versions_of_theirs": theirs.versions, "load": os.getloadavg()}
    report.finish()


def tell(report: common.Report, found: dict[str, list[float]], numbers: int) -> None:
    rate = {name: TOKENS / statistics.median(seconds) for name, seconds in found.items() if name != "read"}
    rate["crowd"] *= CROWD
    for name in ("transformers", "not invariant", "invariant"):
        report.row(f"tokens/s, one request, {name}", rate[name])
    report.row(f"tokens/s, {CROWD} requests at once", rate["crowd"])

    def ratio(a: str, b: str) -> float:
        """Of the rates, median over the rounds."""
        return statistics.median(y / x for x, y in zip(found[a], found[b], strict=True))

    report.row("one request, not invariant / transformers", ratio("not invariant", "transformers"), at_least=1.0)
    report.row("one request, invariant / transformers", ratio("invariant", "transformers"), at_least=1.0)
    share = statistics.median(r / (x / TOKENS) for r, x in zip(found["read"], found["not invariant"], strict=True))
    report.row("weight bytes a second / bytes that a sum reads a second", share, at_least=0.6)
    fastest = max(("invariant", "not invariant"), key=lambda name: rate[name])
    together = statistics.median(CROWD * x / y for x, y in zip(found[fastest], found["crowd"], strict=True))
    report.row(f"{CROWD} at once / the fastest with one request", together, at_least=5.0)
    report.row("GB/s that a sum reads", 4e-9 * numbers / statistics.median(found["read"]))


def under_load(report: common.Report, engine: Engine, seconds: float) -> None:
    """seconds: of a crowd, which is the highest rate."""
    rate = CROWD / seconds / 2
    lone = [_at_times(engine, [0.0])[1][0] for _ in range(20)]
    gaps = np.random.default_rng(0).exponential(1 / rate, LOADED)
    _, firsts = _at_times(engine, np.cumsum(gaps).tolist())
    report.row("ms to the first token, alone, median", 1e3 * statistics.median(lone))
    report.row(f"ms to it at {rate:.2f} requests a second, p99", 1e3 * float(np.quantile(firsts, 0.99)))
    ratio = float(np.quantile(firsts, 0.99)) / statistics.median(lone)
    report.row("p99 at half of the highest rate / alone", ratio, at_most=3.0)


if __name__ == "__main__":
    main()

"""What the scripts of bench/ share: timing two things in turn, and a report as a table and as JSON."""

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
PACKAGES = "jax jaxlib flax optax orbax-checkpoint grain tokenizers numpy torch".split()


def in_turn(a: Callable[[], float], b: Callable[[], float], pairs: int, warmup: int = 2) -> dict[str, Any]:
    """Times a and b, each of which returns its seconds, as A B B A A B …: drift of the machine hits both alike.

    Returns medians, minima, and the median and quartiles of the ratios a/b of the pairs.
    """
    for _ in range(warmup):
        a()
        b()
    seconds_a, seconds_b = [], []
    for pair in range(pairs):
        for measure, seconds in ((a, seconds_a), (b, seconds_b))[:: 1 if pair % 2 == 0 else -1]:
            seconds.append(measure())
    ratios = sorted(x / y for x, y in zip(seconds_a, seconds_b, strict=True))
    return {
        "pairs": pairs,
        "a_seconds": spread(seconds_a),
        "b_seconds": spread(seconds_b),
        "ratio": statistics.median(ratios),
        "ratio_quartiles": [ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4]],
    }


def spread(seconds: list[float]) -> dict[str, float]:
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def clock(f: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = f(*args)
    return time.perf_counter() - start, result


class Report:
    """Rows of one script, each with its target if there is one. `finish` prints them and writes results/NAME.json."""

    def __init__(self, name: str):
        self.name, self.rows, self.details = name, [], {}
        self.started, self.load_before = time.time(), os.getloadavg()[0]

    def row(
        self, what: str, value: float, unit: str = "", at_most: float | None = None, at_least: float | None = None
    ) -> None:
        target, met = "", None
        if at_most is not None:
            target, met = f"<= {at_most:g}", value <= at_most
        if at_least is not None:
            target, met = f">= {at_least:g}", value >= at_least
        row = {"what": what, "value": value, "unit": unit, "target": target, "met": met}
        self.rows.append(row)
        print(_line(row), flush=True)

    def finish(self) -> None:
        missed = [row["what"] for row in self.rows if row["met"] is False]
        print(f"\n{self.name}: {len(missed)} target{'s' * (len(missed) != 1)} missed{': ' if missed else ''}", end="")
        print("; ".join(missed))
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{self.name}.json"
        content = {
            "command": shlex.join(["python", str(Path(sys.argv[0])), *sys.argv[1:]]),
            "date": time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(self.started)),
            "seconds": round(time.time() - self.started, 1),
            "versions": versions(),
            "machine": {**machine(), "load_before": self.load_before, "load_after": os.getloadavg()[0]},
            "rows": self.rows,
            "details": self.details,
        }
        path.write_text(json.dumps(content, indent=1) + "\n")
        print(f"written: {path.relative_to(ROOT)}")


def _line(row: dict[str, Any]) -> str:
    value = row["value"]
    text = f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"
    verdict = {None: "", True: "met", False: "MISSED"}[row["met"]]
    return f"  {row['what']:<64} {text:>14} {row['unit']:<10} {row['target']:<9} {verdict}".rstrip()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model or platform.processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "system": platform.platform(),
    }


def temporary_bytes(compiled: Any) -> int:
    """What a compiled JAX program needs on each device besides its arguments and results."""
    memory = compiled.memory_analysis()
    assert memory is not None, "this backend does not say how much memory a program needs"
    return memory.temp_size_in_bytes


def run_json(command: list[str], env: dict[str, str] | None = None) -> Any:
    """Runs a script that prints JSON as its last line."""
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def begin_worker() -> None:
    """Of a process that compiles: what compilers and plugins print by themselves goes to a file."""
    from parallel.layout import mesh
    from runtime import library_log

    library_log.begin()
    mesh.take_gpu_memory()

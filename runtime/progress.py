"""What a run tells while it trains: phases of the start, rows of metrics, traces."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from runtime.config import RunError, profile_range
from runtime.console import Console
from runtime.metrics import MetricsLog

COUNTS: tuple[str, ...] = ("skipped", "clipped", "rounds_skipped", "rounds_clipped")


class Phases:
    """Seconds of each phase since the process started."""

    def __init__(self, started: float):
        self._started = self._last = started
        self.seconds: dict[str, float] = {}
        self.console: Console | None = None

    def mark(self, name: str, then: str = "") -> None:
        """The phase `name` ends now. then: what is done next, said where it takes long."""
        if self.console:
            self.console.doing(then)
        now = time.time()
        self.seconds.pop("total", None)
        self.seconds[name] = round(now - self._last, 3)
        self.seconds["total"] = round(now - self._started, 3)  # the last one
        self._last = now

    def close(self) -> None:
        """Nothing more is announced: what was done has ended, or failed."""
        if self.console:
            self.console.doing("")


class Recorder:
    """Reads each step's metrics one step late, so that the device never waits for the host; logs and shows them."""

    def __init__(
        self,
        log: MetricsLog | None,
        console: Console,
        *,
        log_every: int,
        abort_after: int,
        unit: str = "tokens",
        units: int = 0,
        further: Sequence[str] = (),
        flops_per_second_at_full_speed: float | None = None,
        flops_per_unit: float | None = None,
        wire_bytes: dict[str, float] | None = None,
        train_seconds: float = 0,
        notable: Callable[[Mapping[str, float]], str] = lambda means: "",
    ):
        """unit: what is counted, and units: how many the steps so far have read. further: metrics of the task's own.
        notable: what a warning says of their means over the steps from row to row; "": nothing."""
        self.log, self.console = log, console
        self.log_every, self.abort_after = log_every, abort_after
        self.unit, self.units, self.further, self.notable = unit, units, further, notable
        self.wire_bytes = wire_bytes or {}
        self.flops_per_unit, self.peak = flops_per_unit, flops_per_second_at_full_speed
        self.train_seconds = train_seconds  # of all starts of this run
        self.last: dict[str, Any] = {}
        self.losses: list[float] = []  # of every update that this process has made
        self._pending: tuple[int, Any, int] | None = None
        self._clock = time.perf_counter()
        self._recent: list[float] = []
        self._further: list[dict[str, float]] = []
        self._noted = False
        self._newest: deque[float] = deque(maxlen=1000)
        self._counts: dict[str, int] | None = None if units else dict.fromkeys(COUNTS, 0)  # before; None: unknown

    def step(self, step: int, metrics: dict[str, jax.Array], units: int) -> None:
        """Takes the metrics [K] of the K steps that end with `step` (updates made) and how many tokens or examples they
        read; reads the metrics of the call before."""
        self._read()
        self._pending = step, metrics, units

    def flush(self) -> None:
        """Reads the newest metrics now, waiting for the device."""
        self._read()

    def counted(self) -> dict[str, int]:
        """What a checkpoint keeps of this; call it after `flush`."""
        return {self.unit: self.units}

    def resume_clock(self) -> None:
        """What has passed since the last step (an evaluation, a save) is not step time."""
        self._clock = time.perf_counter()

    def _read(self) -> None:
        if self._pending is None:
            return
        (step, metrics, units), self._pending = self._pending, None
        values = on_host(metrics)
        now, K = time.perf_counter(), len(values["loss"])
        seconds, self._clock = (now - self._clock) / K, now
        for i in range(K):
            self._record(step - K + 1 + i, seconds, {name: x[i] for name, x in values.items()}, units // K)

    def _record(self, step: int, seconds: float, values: dict[str, Any], units: int) -> None:
        self._recent.append(seconds)
        self._newest.append(seconds)
        self.train_seconds += seconds
        self.units += units
        # The middle of the steps since the last row: one slow step does not make the row look slow.
        seconds = statistics.median(self._recent)
        speed = units / seconds
        row = {
            "step": step,
            **{name: values[name] for name in ("loss", *self.further, "grad_norm", "param_norm")},
            **({"lr": values["lr"]} if "lr" in values else {}),
            self.unit: self.units,
            f"{self.unit}_per_second": round(speed, 1),
            "step_seconds": round(seconds, 6),
            "mfu": round(speed * self.flops_per_unit / self.peak, 4) if self.peak and self.flops_per_unit else None,
            "wire_bytes": self.wire_bytes,
            **{name: int(values[name]) for name in COUNTS if name in values},
            "train_seconds": round(self.train_seconds, 3),
        }
        self.last = row
        self.losses.append(float(values["loss"]))
        self.console.step(row)
        self._further.append({name: float(values[name]) for name in self.further})
        if step % self.log_every == 0:
            self._recent = []
            self._write(row)
            self._note()
        if said := refusal(step, values, self._counts):
            self.console.warn(said)
        self._counts = {name: int(values.get(name, 0)) for name in COUNTS}
        check_refusals(step, values, self.abort_after)

    def _note(self) -> None:
        """Once, until there is nothing to note."""
        means = {name: statistics.fmean(row[name] for row in self._further) for name in self.further}
        said, self._further = self.notable(means), []
        if said and not self._noted:
            self.console.warn(said)
        self._noted = bool(said)

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        row = {"step": step} | {f"eval_{name}": x for name, x in values.items()}
        self._write(row)
        self.console.evaluation(row)

    def median_seconds(self) -> float | None:
        """Of a step, of the newest thousand."""
        return statistics.median(self._newest) if self._newest else None

    def finish(self) -> None:
        """The last step is logged whatever log_every is."""
        if self.last and self.last["step"] % self.log_every:
            self._write(self.last)

    def failed_writers(self) -> list[str]:
        return self.log.failed if self.log else []

    def close(self) -> None:
        self.console.close()
        if self.log:
            self.log.close()

    def _write(self, row: dict) -> None:
        if self.log:
            self.log.write(row)


def refusal(step: int, values: Mapping[str, Any], before: Mapping[str, int] | None) -> str:
    """What the guard did to the update of this step, if anything: which, and by which limit."""
    if before is None or not (changed := [name for name in COUNTS if int(values.get(name, 0)) > before[name]]):
        return ""
    what = "round" if changed[0].startswith("rounds") else "update"
    done = "scaled to the limit" if changed[0].endswith("clipped") else "left out"
    size, limit = float(values["judged"]), float(values["limit"])
    why = (
        f"its size {size:.3g} is above the limit of {limit:.3g} (guard.zscore)" if size > limit else "it is not finite"
    )
    return f"step {step}: the {what} was {done}: {why}"


def check_refusals(step: int, values: Mapping[str, Any], abort_after: int) -> None:
    """Raises RunError where the guard has refused the last `abort_after` updates. values: the metrics of this step."""
    if int(values["skipped_in_a_row"]) >= abort_after:
        raise RunError(
            f"the last {abort_after} updates were skipped or scaled (guard.abort_after): every gradient was NaN, "
            f"infinite or a spike, up to step {step} (loss {values['loss']}, gradient norm {values['grad_norm']}). "
            "Lower optimizer.lr, look at the data around this step, or raise guard.zscore."
        )


def on_host(metrics: dict[str, jax.Array]) -> dict[str, np.ndarray]:
    """Metrics [K], read at once. What each replica has for itself, [K, R], is averaged over the replicas of this
    process, counts are added up, and of what came in a row the worst is taken: to do so for all replicas at every step
    would cost what local strategies save."""
    shared = jax.device_get({name: x for name, x in metrics.items() if x.is_fully_replicated})
    for name, x in metrics.items():
        if name not in shared:
            own = {str(shard.index): np.asarray(shard.data) for shard in x.addressable_shards}
            shared[name] = np.concatenate(list(own.values()), axis=1)
    merge = {"skipped": np.sum, "clipped": np.sum, "skipped_in_a_row": np.max, "judged": np.max, "limit": np.min}
    return {name: merge.get(name, np.mean)(x, axis=1) if x.ndim == 2 else x for name, x in shared.items()}


class Profiler:
    """Writes an XProf trace of the steps in `profile.steps` to workdir/profile."""

    def __init__(self, steps: str, workdir: Path):
        self._range = profile_range(steps) if steps else range(0)
        self._folder = workdir / "profile"
        self._tracing = False

    def before(self, step: int, state: Any, steps_per_call: int = 1) -> None:
        """Call before dispatching the steps from `step` on. Whole calls are traced."""
        wanted = step < self._range.stop and step + steps_per_call > self._range.start
        if wanted and not self._tracing:
            jax.block_until_ready(state)
            jax.profiler.start_trace(str(self._folder))
            self._tracing = True
        elif self._tracing and not wanted:
            self.stop(state)

    def stop(self, state: Any) -> None:
        if self._tracing:
            jax.block_until_ready(state)
            jax.profiler.stop_trace()
            self._tracing = False

"""One HTML page that shows a run, several side by side, or a comparison. It needs no server and no network.

python -m runtime.report runs/mine                               (writes runs/mine/report.html)
python -m runtime.report runs/mine runs/other --out=both.html
python -m runtime.report runs/compare-quickstart                 (the workdir of compare.py)

A run may still be going on: the page shows what there is. The end of every run and of every comparison writes it, too.
"""

import contextlib
import functools
import html
import json
import math
import re
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime import config as configuration
from runtime import exits, usage
from runtime.config import UsageError
from runtime.metrics import read_sound, replace_file
from runtime.plot import smooth

PAGE = "report.html"  # in the folder of a run or of a comparison
TEMPLATE = Path(__file__).with_suffix(".html")
OF_A_RUN = ("metrics.jsonl", "summary.json", "config.json")
OF_A_COMPARISON = ("table.json", "results")
LIMIT = 2_000_000  # bytes of a page
POINTS = 2048  # of a curve at most; fewer where the page would be too large
FEWEST = 16
SAMPLES = 12  # of those that a run keeps while it trains
LONG = 150  # rows from which on a running median is drawn beside the loss


def write(paths: Sequence[Path], out: Path) -> int:
    """The page of these workdirs, whole or not at all. Returns its bytes. Raises UsageError as `page` does."""
    content = page(paths).encode()
    replace_file(out, content)
    return len(content)


def page(paths: Sequence[Path]) -> str:
    """HTML of less than LIMIT bytes. Raises UsageError for a folder that is neither a run nor a comparison."""
    names = _names(paths)
    is_run = {path: _is_run(path) for path in paths}
    runs = [(names[path], path, *_read_rows(path)) for path in paths if is_run[path]]
    comparisons = [_comparison(names[path], path) for path in paths if not is_run[path]]
    title = ", ".join(names.values()) if len(paths) <= 3 else f"{len(paths)} runs"
    points = POINTS
    while points >= FEWEST:
        data = {
            "version": configuration.version(),
            "made": time.time(),
            "base": configuration.base_values(),
            "runs": [_run(*run, points) for run in runs],
            "comparisons": comparisons,
        }
        if len(text := _filled(title, data)) < LIMIT:
            return text
        points //= 2
    raise UsageError(f"a page of {len(paths)} runs would be larger than {LIMIT / 1e6:g} MB: give fewer of them")


def _filled(title: str, data: dict[str, Any]) -> str:
    """The data is JSON inside a script element: without <, > and & no text in it can end that."""
    text = json.dumps(_plain(data), allow_nan=False, separators=(",", ":"))
    text = re.sub("[<>&]", lambda found: f"\\u{ord(found[0]):04x}", text)
    parts = {"TITLE": html.escape(title), "DATA": text}
    return re.sub(r"\{\{(TITLE|DATA)\}\}", lambda found: parts[found[1]], TEMPLATE.read_text(encoding="utf-8"))


def _plain(value: Any) -> Any:
    """Numbers that are not finite become null, as in the files of a run."""
    if isinstance(value, dict):
        return {str(key): _plain(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ── folders ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _is_run(path: Path) -> bool:
    """Or a comparison. Raises UsageError for what is neither."""
    if any((path / name).exists() for name in OF_A_RUN):
        return True
    if any((path / name).exists() for name in OF_A_COMPARISON):
        return False
    inside = sorted({file.parent for name in OF_A_RUN for file in path.glob(f"*/{name}")})
    hint = f": give what is inside it, such as {inside[0]}" if inside else ": give the --workdir of a run"
    what = f"none of {', '.join(OF_A_RUN + OF_A_COMPARISON)} is there" if path.is_dir() else "there is no such folder"
    raise UsageError(f"{path} is neither a run nor a comparison ({what}){hint}")


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """The last part of each path, or as many as tell it from the others."""
    whole = {path: path.resolve().parts for path in paths}
    depth = 1
    while len({parts[-depth:] for parts in whole.values()}) < len(set(whole.values())):
        depth += 1
    return {path: "/".join(parts[-depth:]) for path, parts in whole.items()}


def _json(path: Path, notes: list[str]) -> dict[str, Any]:
    """{} where there is none, or where it is being written by something that does not write it whole."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        notes.append(f"{path.name} cannot be read ({error})")
        return {}
    return found if isinstance(found, dict) else {}


def _read_rows(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows of metrics.jsonl, what is to be said about them)."""
    try:
        rows, damaged = read_sound(path / "metrics.jsonl")
    except OSError:
        return [], ["no row of metrics yet"]
    said = [f"metrics.jsonl: {len(damaged)} damaged lines are left out, the first is {damaged[0]}"] if damaged else []
    return [row for row in rows if math.isfinite(row.get("step", math.nan))], said


# ── a run ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _run(name: str, path: Path, rows: list[dict[str, Any]], said: list[str], points: int) -> dict[str, Any]:
    notes = list(said)
    config, summary = _json(path / "config.json", notes), _json(path / "summary.json", notes)
    objects = config.pop(configuration.OBJECTS, {})
    samples, written = _samples(path, rows[-1]["step"] if rows else 0), path / "metrics.jsonl"
    curves, most = _series(rows), 8 * points // max(1, len(samples))
    values = dict(configuration.flatten(config))  # a key that came later than the run has its default
    return {
        "name": name,
        "path": str(path),
        "notes": notes,
        "rows": len(rows),
        "updated": written.stat().st_mtime if rows else None,
        "config": configuration.base_values() | values if values else {},
        "objects": objects,
        "summary": summary,
        "series": {key: _thinned(*curve, points) for key, curve in curves.items()},
        "median": _median(*curves["loss"]) if "loss" in curves and len(rows) >= LONG else None,
        "samples": [
            {"step": step, "text": text[:most], "left_out": max(0, len(text) - most)} for step, text in samples.items()
        ],
    }


def _samples(path: Path, last: int) -> dict[int | None, str]:
    """{step: text} of those kept until step `last`, some of them if there are many; None: the one at the end."""
    kept = {int(file.stem): file for file in (path / "samples").glob("*.txt") if file.stem.isdecimal()}
    chosen = sorted(step for step in kept if step <= last)
    if len(chosen) > SAMPLES:
        chosen = [chosen[round(i * (len(chosen) - 1) / (SAMPLES - 1))] for i in range(SAMPLES)]
    found: dict[int | None, str] = {}
    for step, file in [*((step, kept[step]) for step in chosen), (None, path / "samples.txt")]:
        with contextlib.suppress(OSError):
            found[step] = file.read_text(encoding="utf-8", errors="replace")
    return found


def _series(rows: Iterable[dict[str, Any]]) -> dict[str, tuple[list[float], list[float | None]]]:
    """{key: (steps, values)} of all that is a number, inside dictionaries as well; None: it was not finite."""
    found: dict[str, tuple[list[float], list[float | None]]] = {}
    for row in rows:
        nonfinite = row.get("nonfinite", ())
        for key, value in configuration.flatten(row):
            number = value if isinstance(value, int | float) and not isinstance(value, bool) else None
            if key != "step" and (number is not None or value is None and key in nonfinite):
                steps, values = found.setdefault(key, ([], []))
                steps.append(row["step"])
                values.append(number if number is not None and math.isfinite(number) else None)
    return found


def _thinned(steps: list[float], values: list[float | None], points: int) -> dict[str, Any]:
    """At most so many points of a curve, each as it stands in the file. First those inside a level stretch go. If there
    are still too many: of each bucket of neighbours the first, the lowest, the highest, the last and one that is not
    finite, so that spikes and holes stay. of: so many points there were, if buckets were made."""
    y_N = np.array([math.nan if value is None else value for value in values])
    same_N = (y_N[1:] == y_N[:-1]) | (np.isnan(y_N[1:]) & np.isnan(y_N[:-1]))
    kept = np.flatnonzero(~(np.append(False, same_N) & np.append(same_N, False)))
    whole = len(kept) <= points
    if not whole:
        kept = np.unique(np.concatenate([_extremes(b, y_N[b]) for b in np.array_split(kept, max(1, points // 5))]))
    curve = {"step": [steps[i] for i in kept], "value": [values[i] for i in kept]}
    return curve if whole else curve | {"of": len(values)}


def _extremes(indices_M: np.ndarray, y_M: np.ndarray) -> np.ndarray:
    finite_M, nan_M = np.flatnonzero(np.isfinite(y_M)), np.flatnonzero(np.isnan(y_M))
    places = [0, len(y_M) - 1, *nan_M[:1]]
    if len(finite_M):
        places += [finite_M[y_M[finite_M].argmin()], finite_M[y_M[finite_M].argmax()]]
    return indices_M[places]


def _median(steps: list[float], values: list[float | None]) -> dict[str, Any]:
    """The running median over `width` rows, which the page says."""
    width = max(3, len(values) // 50)
    at, medians = smooth(np.array(steps), np.array([math.nan if x is None else x for x in values]), width)
    return {"width": width, "step": at.tolist(), "value": [float(f"{x:.5g}") for x in medians]}


# ── a comparison ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _comparison(name: str, path: Path) -> dict[str, Any]:
    notes: list[str] = []
    table = _json(path / "table.json", notes)
    done = sum(1 for _ in (path / "results").glob("*.json"))
    return {"name": name, "path": str(path), "notes": notes, "table": table, "results": done}


# ── the command ───────────────────────────────────────────────────────────────────────────────────────────────────────


def main(argv: Sequence[str]) -> int:
    parser = usage.parser(__doc__, "python -m runtime.report")
    parser.add_argument("run", nargs="+", metavar="RUN", help="the workdir of a run or of a comparison")
    parser.add_argument("--out", metavar="FILE", help="default: report.html in the workdir, here if there are several")
    parser.add_argument("--version", action="version", version=configuration.version(), help="show versions")
    args = parser.parse_args(argv)
    paths = [Path(configuration.expand_home(run)) for run in dict.fromkeys(args.run)]
    out = Path(configuration.expand_home(args.out)) if args.out else (paths[0] if len(paths) == 1 else Path()) / PAGE
    size = write(paths, out)
    print(f"{out} ({size / 1000:,.0f} kB)")
    return 0


if __name__ == "__main__":
    sys.exit(exits.guarded(functools.partial(main, sys.argv[1:]), "no page was written"))

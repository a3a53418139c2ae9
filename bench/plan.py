"""The planner beside the compilers: what it predicts of a step, and what compiled programs hold, send, multiply, and
take when their schedule is played at the same rates (parallel/cost/play.py).

python bench/plan.py                          all rows (needs requirements-targets.txt), in bench/results/plan.json
python bench/plan.py --only=h100              rows whose name contains this
python bench/plan.py --held-out               those alone that were first compiled after the model was frozen
python bench/plan.py --pick=llama3_8b --hardware=h100:8x8     judges a pick: what is predicted to be nearly as fast

Each program is kept in runs/compiled/ under the digest of what was compiled, so that a run that was stopped goes on,
and a second one reads what is there. A row's figures are of one device and step.
"""

import json
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import common, picks  # noqa: E402
from bench.planned import GIB, ROWS, Row, Workers  # noqa: E402
from runtime import usage  # noqa: E402

RESULT = common.RESULTS / "plan.json"
NEAR = 0.10  # what misses by more is listed

# ── tables ────────────────────────────────────────────────────────────────────────────────────────────────────────────

SMALL = 64 * 2**20  # bytes over an axis that nobody waits for: no miss


def errors(found: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """(quantity, predicted / compiled − 1)."""
    said, is_ = found["predicted"], found["compiled"]
    for name in ("peak", "temporaries", "FLOPs", "seconds"):
        if math.isfinite(is_[name]) and is_[name]:
            yield name, said[name] / is_[name] - 1
    for axis, size in is_["bytes"].items():
        if max(size, said["bytes"][axis]) > SMALL or axis == "replica":
            yield f"bytes over {axis}", said["bytes"][axis] / size - 1


def table(found: dict[str, dict[str, Any]]) -> list[str]:
    """Of each quantity the median and the worst error, then each miss with what it comes from."""
    rows = [(name, what, error) for name, x in found.items() for what, error in errors(x)]
    lines = []
    for what in dict.fromkeys(what for _, what, _ in rows):
        these = sorted(abs(error) for _, own, error in rows if own == what)
        near = sum(error <= NEAR for error in these)
        middle, worst = statistics.median(these), these[-1]
        lines.append(f"{what:<20} median {middle:6.1%}  worst {worst:6.1%}  within 10 %: {near} of {len(these)}")
    for name, what, error in rows:
        if abs(error) > NEAR:
            lines.append(f"MISS {name}: {what} {error:+.1%}: {because(found[name], what)}")
    lines += [f"FITS NOT, as predicted it would: {n}" for n, x in found.items() if claims_too_much(x)]
    return [*lines, *order(found)]


def claims_too_much(x: dict[str, Any]) -> bool:
    return x["predicted"]["fits"] and not x["compiled"]["fits"]


def because(x: dict[str, Any], what: str) -> str:
    said, is_ = x["predicted"], x["compiled"]
    if what == "seconds":
        parts = [f"computing {said['computing']:.3f} / {is_['computing']:.3f} s"]
        parts += [f"{axis} {said['waiting'].get(axis, 0):.3f} / {s:.3f} s" for axis, s in is_["waiting"].items() if s]
        return ", ".join(parts)
    if what.startswith("bytes"):
        axis = what.rpartition(" ")[2]
        own = [s for wire in x["wire"].values() for s in wire if s["axis"] == axis]
        return ", ".join(f"{s['kind']} {s['dtype']} {s['bytes'] / GIB:.2f} GiB" for s in own)
    moment = max(said["moments"], key=lambda name: sum(said["moments"][name].values()))
    arrays = [f"{a} {size / GIB:.2f}" for a, size in said["moments"][moment].items() if size > GIB / 10]
    largest = [f"{size:.2f} {where}" for size, where in next(iter(x["largest"].values()))]
    return f"predicted {moment}: {', '.join(arrays)} GiB; compiled, largest: {', '.join(largest)}"


def order(found: dict[str, dict[str, Any]]) -> list[str]:
    """Of every two rows whose played times differ by more than 10 %, whether the predicted ones stand in that order."""
    rows = [(name, x["predicted"]["seconds"], x["compiled"]["seconds"]) for name, x in found.items()]
    rows = [row for row in rows if math.isfinite(row[2])]
    pairs = [(a, b) for a in rows for b in rows if b[2] > (1 + NEAR) * a[2]]
    wrong = [(a[0], b[0]) for a, b in pairs if a[1] >= b[1]]
    lines = [f"order: right in {len(pairs) - len(wrong)} of {len(pairs)} pairs that differ by more than 10 %"]
    return lines + [f"WRONG ORDER {a} is faster than {b}" for a, b in wrong]


# ── running ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def kept() -> dict[str, Any]:
    return json.loads(RESULT.read_text()) if RESULT.exists() else {"rows": {}, "picks": {}}


def keep(found: dict[str, Any]) -> None:
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(found | {"versions": common.versions(), "machine": common.machine()}, indent=1) + "\n")


def chosen(only: str, held_out: bool) -> Sequence[Row]:
    return [row for row in ROWS if only in row.name and (row.held_out or not held_out)]


def main() -> None:
    parser = usage.parser(__doc__, "python bench/plan.py")
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--held-out", action="store_true", help="those alone")
    parser.add_argument(
        "--pick", default="", metavar="CONFIG", help="judge what is picked for this model, as llama3_8b"
    )
    parser.add_argument("--hardware", default="", metavar="MACHINE", help="on this machine")
    args = parser.parse_args()
    workers, result = Workers(), kept()
    if args.pick:
        result["picks"][f"{args.pick} {args.hardware}"] = picks.judge(args.pick, args.hardware, workers)
        return keep(result)
    found = {}
    for row in chosen(args.only, args.held_out):
        found[row.name] = workers.row(row) | {"held_out": row.held_out}
        result["rows"] |= found
        keep(result)
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()

"""What a dry run for each kind of chip says and takes: train.py --target, in a process of its own.

python bench/targets.py                          all rows: 70 minutes of processor time (needs requirements-targets.txt)
python bench/targets.py --only=h100 --only=b200  machines whose name contains one of these

Rows are kept in bench/results/targets.json as they are done, by Python's version, and rows of this commit are not run
again. A verdict counts whatever it is: what does not fit has to be said, with a remedy that was compiled.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import common  # noqa: E402
from runtime import usage  # noqa: E402

GIB = 2**30
KEPT = common.RESULTS / "targets.json"
GPUS = ("h100", "h200", "a100", "b200")
# Of 8, 32, 64, 256 and 1,024 chips. Slices of v5e and v6e end at 256.
MACHINES = {gpu: [f"{gpu}:8", f"{gpu}:4x8", f"{gpu}:8x8", f"{gpu}:32x8", f"{gpu}:128x8"] for gpu in GPUS}
MACHINES |= {"v5p": ["v5p-16", "v5p-64", "v5p-128", "v5p-512", "v5p-2048"]}
MACHINES |= {tpu: [f"{tpu}-8", f"{tpu}-32", f"{tpu}-64", f"{tpu}-256", f"4x{tpu}-256"] for tpu in ("v5e", "v6e")}
CONFIGS = ("llama3_8b",) * 3 + ("llama3_70b",) * 2
ROWS = [(machine, config) for machines in MACHINES.values() for machine, config in zip(machines, CONFIGS, strict=True)]
BARS = {"CPU seconds": 300.0, "GiB of the compiler": 4.0}


class Done(NamedTuple):
    """Of a child process."""

    code: int
    output: str
    cpu_seconds: float
    peak_rss: float  # bytes


def run(command: list[str]) -> Done:
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(command, cwd=common.ROOT, stdout=output, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(child.pid, 0)  # what this child used, and none before it
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        return Done(child.returncode, output.read(), used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def measure(machine: str, config: str) -> dict[str, Any]:
    """Raises SystemExit where it ends otherwise than with a verdict."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--config=configs/{config}.py", f"--target={machine}", "--dry_run", f"--save={folder}"]
        done = run([sys.executable, "train.py", *flags])
        lines = [line.strip() for line in done.output.splitlines()]
        said = [line for line in lines if line.startswith(("fits: ", "does not fit: ", "error: "))]
        if done.code not in (0, 1, 2) or not said:
            raise SystemExit(f"{machine} {config} ended with {done.code}:\n{done.output}")
        row = {"machine": machine, "config": config, "code": done.code, "said": said[-1]}
        row |= {"cpu_seconds": done.cpu_seconds, "rss": done.peak_rss}
        row["notes"] = [line for line in lines if line.startswith(("data.batch_size=", "mesh.replica="))]
        summary = Path(folder) / "summary.json"
        return row | ({"summary": short(json.loads(summary.read_text()))} if summary.exists() else {})


def short(summary: dict[str, Any]) -> dict[str, Any]:
    """Without the arrays' names and what each collective sends."""
    programs = {
        name: {key: p[key] for key in ("state_bytes", "temporary_bytes", "peak_bytes", "flops", "seconds")}
        for name, p in summary["programs"].items()
    }
    kept = {key: summary[key] for key in ("mesh", "versions", "fits", "spare_bytes", "remedies")}
    return kept | {"programs": programs}


def table(rows: list[dict[str, Any]]) -> None:
    print("\n| machine | model | peak, GiB | verdict | CPU s | GiB of the compiler |\n|---|---|---:|---|---:|---:|")
    for row in rows:
        peaks = [p["peak_bytes"] for p in row.get("summary", {"programs": {}})["programs"].values()]
        peak = f"{max(peaks) / GIB:.2f}" if peaks else ""
        cells = [
            row["machine"],
            row["config"],
            peak,
            verdict(row),
            f"{row['cpu_seconds']:.0f}",
            f"{row['rss'] / GIB:.1f}",
        ]
        print("| " + " | ".join(cells) + " |")


def verdict(row: dict[str, Any]) -> str:
    if row["code"] == 2:
        return "state does not fit"
    if row["code"] == 0:
        return "fits"
    works = [r["flags"].replace("--config.", "") for r in row["summary"]["remedies"] if r["fits"]]
    return f"fits with {works[0]}" if works else "does not fit"


def main() -> None:
    parser = usage.parser(__doc__, "python bench/targets.py")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="machines whose name contains it")
    args = parser.parse_args()
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=common.ROOT, text=True).strip()
    python = platform.python_version()
    kept: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    shown = []
    for machine, config in ROWS:
        if args.only and not any(text in machine for text in args.only):
            continue
        key = f"{python} {machine} {config}"
        if kept.get(key, {}).get("commit") != commit:
            kept[key] = measure(machine, config) | {"commit": commit, "date": time.strftime("%Y-%m-%d")}
            KEPT.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
        shown.append(row := kept[key])
        used = {"CPU seconds": row["cpu_seconds"], "GiB of the compiler": row["rss"] / GIB}
        over = [f"MISSED: {value:.0f} {name}" for name, value in used.items() if value > BARS[name]]
        print(f"  {machine} {config}: {row['said']}", f"{row['cpu_seconds']:.0f} s", *over, sep="; ", flush=True)
    table(shown)


if __name__ == "__main__":
    main()

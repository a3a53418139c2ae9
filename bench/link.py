"""Step time and bytes on real sockets over a slow link: hosts are network namespaces that run one train.py each.

sudo python bench/link.py --mbit=100 --hosts=2          about 20 minutes on 2 cores; --hosts=4 takes 35
sudo python bench/link.py --only="sync none,sync int8" --seconds=10

The hosts hang on one bridge, itself in a namespace, and nothing leads out of it. `tc tbf` lets --mbit through each
host's link in each direction. Bytes are those that the hosts' interfaces counted between two steps, so start-up does
not count; `socket` is what is left of them without 66 bytes of headers a packet (Ethernet 14, IPv4 20, TCP 32), the
acknowledgements' too. Hosts cut their packets themselves (gso_max_segs 1): what is counted is a frame on the link.

A row trains for --seconds, the time within which `loss` compares them: the mean of the last fifth of that time, of the
replicas that exchange gradients, of replica 0 where each has parameters of its own. Each host has one of this machine's
cores, alone or with others, and the batch is 4 however many hosts there are: real ones compute faster. Each row trains
once more without the limit: `bare` is what computing and coding take, and moving the bytes through sockets on the same
cores (25 MB for `sync none`; `diloco none` sends something in one step of 30, and computes in the others). Speed-ups
are over `sync none`, float32 through the same exchange, and over `psum`, XLA's own all-reduce. `--link` is what that
option of train.py says of a run whose steps take `bare` seconds: with nothing hidden, as XLA:CPU hides nothing.
"""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import common, link_row, namespaces  # noqa: E402
from bench.link_row import Row  # noqa: E402
from runtime import usage  # noqa: E402

H = 30
LOCAL = (f"--config.sync.interval={H}",)
STREAMING = (*LOCAL, "--config.sync.fragments=2", "--config.sync.overlap=4")
PORT = 8476  # of the first row; each has its own

ROWS = (
    Row("sync", "none"),
    Row("sync", "none", ("--config.sync.algorithm=psum",), label=" psum"),
    Row("sync", "bf16"),
    Row("sync", "int8", speedup=2.8),
    Row("sync", "int4", speedup=4.5),
    Row("sync", "sign"),
    Row("sync", "topk"),
    Row("sync", "powersgd"),
    Row("stale", "none"),
    Row("stale", "int4"),
    Row("diloco", "none", LOCAL, H),
    Row("diloco", "int4", LOCAL, H, speedup=15),
    Row("eager", "int4", LOCAL, H),
    Row("streaming", "int4", STREAMING, H),
)


def predicted(row: Row, config: str, hosts: int) -> float:
    """Closed form of the bytes that a device sends per step over `replica`."""
    import jax

    from parallel.cost.bytes import bytes_per_step
    from parallel.layout import mesh as meshes
    from recipes import build, methods

    values, _ = methods.parse(["train.py", *row.flags(config, hosts)], "")
    mesh = meshes.build(meshes.fill_sizes(values.mesh, hosts), jax.devices()[:hosts])
    return bytes_per_step(build.build(values, mesh).strategy, values.steps)


# ── the table ────────────────────────────────────────────────────────────────────────────────────────────────────


def print_table(rows: list[dict[str, Any]]) -> None:
    """Bytes and packets are those that a host sends per step; off: socket bytes beside predicted ones."""
    heads = ["", "predicted", "HLO", "socket", "raw", "packets", "off", "s/step", "bare", "--link"]
    heads += ["× none", "× psum", "loss", "steps"]
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    for r in rows:
        counted = [f"{r[key]:,.0f}" for key in ("predicted", "hlo", "socket", "raw", "packets")]
        rest = [f"{r[key]:.2f}" if r[key] else "" for key in ("speedup", "speedup_psum")]
        rest += [f"{r['loss']:.3f}" if r["loss"] else "n/a"]
        told = f"{link_seconds(r):.3f} ({link_seconds(r) / r['step_seconds'] - 1:+.1%})"
        times = [f"{r['step_seconds']:.3f}", f"{r['bare_seconds']:.3f}", told]
        lines.append([r["name"], *counted, f"{r['off']:+.1%}", *times, *rest, f"{r['loss_steps']}"])
    print("", *("| " + " | ".join(line) + " |" for line in lines), sep="\n")


def link_seconds(row: dict[str, Any]) -> float:
    """Of a step, by `--link`."""
    from parallel.cost.link import Link

    return row["bare_seconds"] + Link("", row["mbit"] * 1e6).seconds(row["predicted"])


def report_on(report: common.Report, rows: list[Row], found: list[dict[str, Any]]) -> None:
    for row, r in zip(rows, found, strict=True):
        report.row(f"{row.name}: seconds per step", r["step_seconds"], "s")
        report.row(f"{row.name}: socket bytes beside predicted", abs(r["off"]), "", at_most=0.05)
        off = abs(link_seconds(r) / r["step_seconds"] - 1)
        report.row(f"{row.name}: a step by --link, off", off, at_most=0.10 if len(r["socket_of_hosts"]) == 2 else None)
        if row.speedup and r["speedup"]:
            report.row(f"{row.name}: steps as fast as those of sync none", r["speedup"], "×", at_least=row.speedup)
            if r["speedup_psum"]:
                report.row(f"{row.name}: steps as fast as those of XLA's own all-reduce", r["speedup_psum"], "×")
    by_name = {r["name"]: r for r in found}
    if full := by_name.get("sync none"):
        for name, bar in (("diloco none", 0.05), ("sync none", None)):
            if name in by_name:
                share = by_name[name]["bare_seconds"] / full["step_seconds"]
                report.row(f"a step of {name} without the limit / of sync none", share, at_most=bar)


def main() -> int:
    parser = usage.parser(__doc__, "sudo python bench/link.py")
    parser.add_argument("--hosts", type=int, default=2, choices=range(2, 251), metavar="N", help="2 to 250")
    parser.add_argument("--mbit", type=float, default=100, help="rate of each host's link, in each direction")
    parser.add_argument("--only", default="", help="rows, with commas between")
    parser.add_argument("--seconds", type=float, default=30, help="training time of a row, at least")
    parser.add_argument("--steps", type=int, default=8, help="measured steps of a row, at least")
    parser.add_argument("--config", default="bench/gpt4m.py", metavar="FILE", help="what is trained")
    parser.add_argument("--json", type=Path, help="write the table here too")
    args = parser.parse_args()
    if lacking := namespaces.missing():
        print(lacking, file=sys.stderr)
        return 2
    by_name = {row.name: row for row in ROWS}
    names = args.only.split(",") if args.only else list(by_name)
    if unknown := [name for name in names if name not in by_name]:
        parser.error(f"no row {', '.join(unknown)}; there are {', '.join(by_name)}")
    rows = [by_name[name] for name in names]

    from parallel.layout import mesh as meshes

    meshes.simulate(args.hosts)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda n, _: sys.exit(128 + n))
    report, found = common.Report(f"link-{args.hosts}"), []
    predictions = [predicted(row, args.config, args.hosts) for row in rows]
    with contextlib.closing(namespaces.Hosts(args.hosts)) as hosts:
        for i, (row, size) in enumerate(zip(rows, predictions, strict=True)):
            bare, result = (
                link_row.measure(row, hosts, args.config, PORT + 2 * i + n, args.steps, args.seconds, mbit)
                for n, mbit in enumerate((0, args.mbit))
            )
            result |= {"bare_seconds": bare["step_seconds"], "bare_spread": bare["step_seconds_spread"]}
            result |= {"predicted": size, "off": result["socket"] / size - 1, "load": os.getloadavg()[0]}
            found.append(result)
            times = {r["name"]: r["step_seconds"] for r in found}
            for key, base in (("speedup", "sync none"), ("speedup_psum", "sync none psum")):
                result[key] = times[base] / result["step_seconds"] if base in times else None
            times = f"{result['step_seconds']:.3f} s/step, bare {result['bare_seconds']:.3f}"
            print(f"  {row.name}: {times}, socket {result['off']:+.2%}", flush=True)
    print_table(found)
    report_on(report, rows, found)
    report.details |= {"mbit": args.mbit, "hosts": args.hosts, "seconds": args.seconds, "table": found}
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    if not args.only and args.config == parser.get_default("config"):  # else it is not what results/ is for
        report.finish()
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RuntimeError as error:
        sys.exit(f"error: {error}")

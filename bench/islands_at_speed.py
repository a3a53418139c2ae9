"""Real islands of unequal speed against those of the laboratory: four processes that share a log in a folder, steps per
second capped at 1 : 1 : 2 : 4, on the model, text and rows of configs/compare/asynchronous.py.

python bench/islands_at_speed.py            about 6 minutes: two rows of 107 s, and the laboratory's
python bench/islands_at_speed.py --scale=2

--scale: steps a second of the slowest; the fastest must be capped at a quarter of what it does alone. Told is how much
sooner Delayed Nesterov with H by speed comes to the loss with which synchronous DiLoCo ends: by the laboratory's clock,
and by the times at which the records of the real log were written.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np  # noqa: E402

from bench import common  # noqa: E402
from configs.compare import asynchronous as rows  # noqa: E402
from islands import comparison, founding, keyring, pace, replay  # noqa: E402
from islands.compared import reached  # noqa: E402
from islands.folder import Folder  # noqa: E402
from islands.follow import Follower  # noqa: E402
from islands.laboratory import Measured, play  # noqa: E402
from islands.language import Language, Programs  # noqa: E402
from islands.member import Member, encoded  # noqa: E402
from islands.payload import Draw, Part  # noqa: E402
from islands.reader import record_key  # noqa: E402
from islands.store import run  # noqa: E402
from recipes import methods  # noqa: E402
from runtime import usage  # noqa: E402

SCHEMES = ("synchronous DiLoCo", "Delayed Nesterov + DyLU")
SEED = 0


def described(name: str) -> tuple[Any, Any, dict[str, Any]]:
    """(what an island trains, its scheme, the keys of a log) of a row on the steady sites."""
    row = next(row for row in rows.ROWS if row["name"] == name)
    config, scheme = comparison.described(rows.get_config(), row["changes"], name)
    return config, scheme, {"sync.strategy": "island", **row["changes"]}


def begin(name: str, log: Path, task: Language) -> None:
    config = task.programs.config.copy_and_resolve_references()
    with config.unlocked():
        config.update_from_flattened_dict(described(name)[2] | {"sync.replicas": 0})
    methods.validate(config)
    run(Folder(log).prepare())
    founding.begin(Folder(log), config, task.init())


def island(name: str, log: Path, number: int, speed: float, seconds: float) -> None:
    """One process: rounds until the time is up, which begins when all have joined."""
    config, scheme, _ = described(name)
    task = Language(Programs(config), SEED)
    own, done = task.begin(number), 0
    task.steps(task.init(), own, number, 0, 2)  # compiled, and warm
    own = task.begin(number)
    member = Member.start(Folder(log), f"i{number}", 0, lambda line: print(line, flush=True))
    while len(member.follower.view.live()) < len(rows.SITES["steady"]):
        time.sleep(0.05)
    end, clock = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        version, params = member.take()
        began, speeds = time.monotonic(), member.follower.speeds
        count = scheme.interval
        if scheme.dylu and member.name in speeds:
            count = pace.local_steps(count, speeds[member.name], max(speeds.values()))
        after, own, _ = task.steps(params, own, number, done, count)
        computing = time.monotonic() - began
        time.sleep(max(0.0, count / speed - computing))
        done, clock = done + count, clock + 1
        parts = [Part(leaf, 0, params[leaf] - after[leaf]) for leaf in params]
        told = {pace.SPEED: (count / max(count / speed, computing)).hex()}
        blobs = encoded(member.follower, parts, Draw(SEED, member.name, clock))
        member.hand_over(blobs, version, count, count * task.tokens, told)
        print(json.dumps({"computing": computing, "allowed": count / speed}), flush=True)
    member.end()


def real(name: str, folder: Path, scale: float) -> tuple[Measured, float]:
    """(its curve, by the times of its records; the median share of a round that computing takes, of the busiest)."""
    config, _, _ = described(name)
    task, log, seconds = Language(Programs(config), SEED), folder / name.replace(" ", "-"), rows.SECONDS / scale
    begin(name, log, task)
    running = [
        subprocess.Popen(
            [sys.executable, __file__, f"--of={name}", f"--log={log}", f"--number={i}", f"--seconds={seconds}",
             f"--speed={site['speed'] * scale}"], stdout=subprocess.PIPE, text=True,
        )
        for i, site in enumerate(rows.SITES["steady"])
    ]  # fmt: skip
    told = [process.communicate()[0] for process in running]
    assert all(process.returncode == 0 for process in running), told
    shares = [[json.loads(line) for line in text.splitlines() if line.startswith("{")] for text in told]
    assert not replay.of(Folder(log), None, True, print).differs
    return curve(task, log, scale), max(statistics.median(x["computing"] / x["allowed"] for x in own) for own in shares)


def curve(task: Language, log: Path, scale: float) -> Measured:
    """Losses of the versions of a log at 65 times, in the laboratory's seconds since all had joined."""
    follower = run(Follower.open(Folder(log), from_oldest=True))
    written = lambda number: (log / record_key(number)).stat().st_mtime
    joins: list[float] = []
    follower.watch = lambda record: joins.append(written(record.sequence)) if record.type == "join" else None
    found, grid = Measured(), [rows.SECONDS * i / 64 for i in range(65)]
    times: list[float] = []
    losses: list[float] = []
    while run(follower.advance(follower.view.next)):
        number = follower.view.next - 1
        if len(joins) == len(rows.SITES["steady"]):
            at = (written(number) - joins[-1]) * scale
            if not times or at - times[-1] > rows.SECONDS / 200:
                times.append(at)
                losses.append(task.loss(follower.state.copied("params")))
    for at in grid:
        before = [loss for t, loss in zip(times, losses, strict=True) if t <= at]
        found.times.append(at)
        found.losses.append(before[-1] if before else losses[0])
    return found


def laboratory(name: str) -> Measured:
    config, scheme, _ = described(name)
    sites = [comparison.Site(**site) for site in rows.SITES["steady"]]
    return play(Language(Programs(config), SEED), sites, scheme, rows.SECONDS, SEED)


def main() -> int:
    parser = usage.parser(__doc__, "python bench/islands_at_speed.py")
    parser.add_argument("--scale", type=float, default=3.0, metavar="X", help="steps a second of the slowest")
    parser.add_argument("--of", default="", metavar="ROW", help="of its own: one island of this row")
    parser.add_argument("--log", type=Path, metavar="PATH", help="of its own: where its log is")
    parser.add_argument("--number", type=int, default=0, metavar="I", help="of its own: which island")
    parser.add_argument("--speed", type=float, default=1.0, metavar="X", help="of its own: steps a second")
    parser.add_argument("--seconds", type=float, default=0.0, metavar="X", help="of its own: how long")
    args = parser.parse_args()
    if args.of:
        island(args.of, args.log, args.number, args.speed, args.seconds)
        return 0
    report, sooner = common.Report("islands-at-speed"), {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ[keyring.FOLDER] = f"{folder}/keys"
        for where in ("laboratory", "real"):
            curves = {}
            for name in SCHEMES:
                if where == "real":
                    curves[name], share = real(name, Path(folder), args.scale)
                    report.row(f"{name}: share of a round that is computing", share, at_most=0.25)
                else:
                    curves[name] = laboratory(name)
            target = float(np.mean(curves[SCHEMES[0]].losses[-8:]))
            seconds = [reached(curves[name], target) for name in SCHEMES]
            for name, at in zip(SCHEMES, seconds, strict=True):
                report.row(f"{where}: s to the loss {target:.3f}, {name}", at)
            sooner[where] = seconds[0] / seconds[1]
            report.row(f"{where}: times sooner", sooner[where])
    report.row(
        "times sooner, real / laboratory: difference", abs(sooner["real"] / sooner["laboratory"] - 1), at_most=0.15
    )
    report.finish()
    return 0


if __name__ == "__main__":
    sys.exit(main())

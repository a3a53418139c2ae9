"""One of several processes without a model, started by runtime.launch: what they say to each other, as JSON in FOLDER.

python -m runtime.launch --processes=2 -- tests/agreeing.py SCENARIO FOLDER
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from parallel.layout import mesh as meshes
from runtime import agree, exits, lock, preemption
from runtime.checkpoint import Checkpoints
from runtime.config import RunError, UsageError

parser = argparse.ArgumentParser()
parser.add_argument("scenario")
parser.add_argument("folder", type=Path)
parser.add_argument("--coordinator")
parser.add_argument("--num_processes", type=int)
parser.add_argument("--process_id", type=int)
args = parser.parse_args()
me = args.process_id
found: dict = {}


def caught(call, *arguments, **options) -> list[str]:
    try:
        return ["", call(*arguments, **options)]
    except (UsageError, RunError) as error:
        return [type(error).__name__, str(error)]


def raising(error):
    raise error


def talk() -> None:
    found["everyone"] = agree.everyone("a", {"me": me})
    found["decided"] = agree.decided("b", lambda: f"by {me}")
    found["decided badly"] = caught(agree.decided, "c", lambda: raising(UsageError("no such thing")))

    def read() -> None:
        with agree.together("data"):
            if me == 1:
                raise UsageError("data.path='x' does not exist")

    found["together"] = caught(read)
    facts = {"optimizer.lr": [1e-3, 5e-3][me], "data": ["0f", "ff"][me], "seed": 0, **({"only here": 1} if me else {})}
    found["same"] = caught(agree.same, "facts", facts)
    found["equal"] = caught(agree.same, "facts", {"seed": 0})
    folder = args.folder / f"machine {me}"  # each machine has a folder of its own there
    nonce = agree.decided("lock", lambda: lock.hold(folder))
    folder.mkdir(exist_ok=True)
    found["not shared"] = caught(agree.shared, folder, nonce, seconds=0.5)
    nonce = agree.decided("lock", lambda: lock.hold(args.folder / "run"))
    found["shared"] = caught(agree.shared, args.folder / "run", nonce, seconds=10)
    found["held"] = caught(agree.decided, "lock", lambda: lock.hold(args.folder / "run"))
    found["elsewhere"] = caught(agree.everyone, ["here", "there"][me])
    if me == 0:
        found["alone"] = caught(agree.everyone, "a compilation", None, seconds=0.5)
    else:
        time.sleep(1.5)
        agree.everyone("a compilation")


def restore() -> None:
    """Process 1 cannot read its file of step 2; its view of the directory is older than process 0's."""
    mesh = meshes.build({"replica": 1, "fsdp": 2, "tensor": 1})
    sharding = NamedSharding(mesh, P("fsdp"))

    def state(step: int):
        whole = np.random.default_rng(step).standard_normal((64, 256), np.float32)
        return {"w": jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])}

    checkpoints = Checkpoints(args.folder / "checkpoints", keep=3)
    for step in (1, 2):
        checkpoints.save(step, state(step), None, {"made at": step})
    found["saved"] = checkpoints.finish()
    if me == 1:
        for file in (args.folder / "checkpoints" / "2" / "state" / "ocdbt.process_1" / "d").iterdir():
            os.truncate(file, file.stat().st_size // 2)
        checkpoints._on_disk = lambda: []
    agree.everyone("cut")
    abstract = {"w": jax.ShapeDtypeStruct((64, 256), np.float32, sharding=sharding)}
    said: list[str] = []
    restored, found["step"] = checkpoints.restore(lambda _: abstract, said.append)
    found["said"] = said
    found["equal"] = all(
        np.array_equal(shard.data, np.asarray(expected.data))
        for shard, expected in zip(restored["w"].addressable_shards, state(1)["w"].addressable_shards, strict=True)
    )
    checkpoints.save(2, state(2), None)  # numbered alike by all, also after one alone could not read
    found["again"] = checkpoints.finish()
    checkpoints.close()


def in_collective() -> None:
    """All wait for process 1, which never comes."""
    from jax.experimental import multihost_utils

    multihost_utils.process_allgather(np.array(me))
    (args.folder / f"ready-{me}").write_text("")
    if me == 1:
        time.sleep(1)
        {"raises": lambda: raising(ValueError("something unforeseen")), "killed": lambda: os.kill(os.getpid(), 9),
         "fails": lambda: raising(RunError("the disk is full"))}[args.scenario]()  # fmt: skip
    multihost_utils.process_allgather(np.array(me))


def stopped() -> None:
    """SIGTERM to process 1, while process 0 waits for it in a collective: before training, or at some step of it."""
    from jax.experimental import multihost_utils

    multihost_utils.process_allgather(np.array(me))
    step = 0
    if args.scenario == "stopped-training":
        preemption.notice().training_begins(0)
    elif me == 1:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    while not (step and notice().requested(step)) and step < 2000:
        multihost_utils.process_allgather(np.array(step))
        step += 1
        if (me, step) == (1, 7):
            os.kill(os.getpid(), signal.SIGTERM)
    found["step"] = step


def notice() -> preemption.PreemptionNotice:
    assert preemption._notice
    return preemption._notice


def main() -> int:
    meshes.simulate(args.num_processes, args.num_processes)
    agree.start_distributed(args.coordinator, args.num_processes, me)
    preemption.notice()
    scenarios = {"talk": talk, "restore": restore, "stopped-before": stopped, "stopped-training": stopped}
    scenarios.get(args.scenario, in_collective)()
    (args.folder / f"{me}.json").write_text(json.dumps(found))
    agree.leave()
    return 0


sys.exit(exits.guarded(main, "", os._exit))

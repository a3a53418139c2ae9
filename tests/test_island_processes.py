"""An island of several processes is as one of one process: the same pushes, which fold to the same bits."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import test_island_run as one

pytest.importorskip("cryptography", reason="pip install -r requirements-islands.txt")

from islands import keyring, member, replay
from islands.folder import Folder
from islands.member import Member, Push
from islands.payload import Draw, Part
from islands.reader import Reader
from islands.record import canonical, digest
from islands.store import run

pytestmark = pytest.mark.slow

MESH = ["--config.mesh.tensor=2"]


@pytest.fixture(autouse=True)
def keys(monkeypatch, tmp_path):
    monkeypatch.setenv(keyring.FOLDER, str(tmp_path / "keys"))


def trained(log: Path, workdir: Path, processes: int, **how: str) -> str:
    """The digest of the parameters that it ends with."""
    code, out = one.ended(one.island_process(log, "a", workdir, *MESH, simulate=4, processes=processes, **how))
    assert code == (-signal.SIGKILL if how.get("die_at") else 0) or processes > 1 and how.get("die_at"), out
    return json.loads((workdir / "summary.json").read_text()).get("params_digest", "")


def folded(log: Path) -> str:
    found = replay.of(Folder(log), None, True, print)
    assert not found.differs
    return found.params_digest


def joined(log: Path) -> set[str]:
    reader = run(Reader.open(Folder(log)))
    run(reader.read())
    return set(reader.view.live())


def bad_push(log: Path) -> None:
    """By another island: its last piece, which lies on the last device, is not finite."""
    z = Member.start(Folder(log), "z", 0, print)
    form = z.follower.form
    cut = {name: 3 * size // 4 // form.codec.block * form.codec.block for name, size in form.sizes.items()}
    parts = [
        Part(name, first, np.ones(last - first, np.float32))
        for name, size in form.sizes.items()
        for first, last in ((0, cut[name]), (cut[name], size))
        if first < last
    ]
    blobs = member.encoded(z.follower, parts, Draw(0, "z", 0))
    *data, text = member.push_of(z.follower, blobs)
    said, leaf = json.loads(text), max(form.sizes, key=lambda name: form.sizes[name])
    first, count, name, offset, length, _ = said["leaves"][leaf]["pieces"][-1]
    changed = bytearray(data[0])
    changed[offset + length - 2 : offset + length] = b"\x80\x7f"  # a scale of infinity, bfloat16
    for pieces in said["leaves"].values():
        for piece in pieces["pieces"]:
            piece[2] = digest(bytes(changed))
            piece[5] = digest(bytes(changed[piece[3] : piece[3] + piece[4]]))
    z.push(Push([bytes(changed), canonical(said)], z.take()[0], 4, 4))
    z.take()
    z.end()
    assert [each.line for each in z.follower.wrong], "it is refused"


def test_two_processes_push_and_fold_as_one_does(tmp_path):
    ends = []
    for processes in (1, 2):
        log = tmp_path / f"log{processes}"
        one.init(log)
        bad_push(log)
        ends.append((trained(log, tmp_path / f"a{processes}", processes), folded(log)))
    assert ends[0] == ends[1]


def test_two_processes_that_were_killed_make_the_same_pushes(tmp_path):
    pushes = []
    for point in ("", "after link records 4"):
        log, workdir = tmp_path / f"log{len(point)}", tmp_path / f"a{len(point)}"
        one.init(log)
        if point:
            one.ended(one.island_process(log, "a", workdir, *MESH, simulate=4, processes=2, die_at=point))
            entries = run(run(Reader.open(Folder(log))).read())
            assert entries[-1].record.type == "push", "it has died after its second push"
        trained(log, workdir, 2)
        pushes.append((one.pushes(log), folded(log)))
    assert pushes[0] == pushes[1]


def test_islands_of_one_and_of_two_processes_train_together(tmp_path):
    log = tmp_path / "log"
    one.init(log, "--config.island.merge=average", "--config.island.staleness=0", "--snapshots=4")
    options = ["--config.island.merge=average", "--config.island.staleness=0", *MESH]
    z = Member.start(Folder(log), "z", 0, print)  # all wait for it: else one may be done before the other has joined
    b = one.island_process(log, "b", tmp_path / "b", *options, simulate=2)
    a = one.island_process(log, "a", tmp_path / "a", *options, simulate=4, processes=2)
    one.until(lambda: {"a", "b"} <= joined(log), 240)
    z.end()
    for process in (a, b):
        code, out = one.ended(process)
        assert code == 0, out
    digests = [json.loads((tmp_path / name / "summary.json").read_text())["params_digest"] for name in "ab"]
    assert digests[0] == digests[1] and len({name for name, *_ in one.pushes(log)}) == 2
    folded(log)

"""A run that is an island: with train.py's own programs, what islands come to is what one program of all of them comes
to; and a run that is killed makes the same pushes when it goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import helpers
import jax
import numpy as np
import pytest

pytest.importorskip("cryptography", reason="pip install -r requirements-islands.txt")

from islands import founding, keyring, replay
from islands.__main__ import main
from islands.folder import Folder
from islands.follow import form_of
from islands.payload import payload_bytes
from islands.reader import LogError, Reader
from islands.record import PUSH
from islands.store import run
from parallel.layout import placement
from recipes import island
from recipes.programs import compile_init, compile_steps
from runtime.config import UsageError
from runtime.digest import named_arrays

SMALL = {"num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "model_dim": 16, "mlp_dim": 32}
SMALL = {f"model__{key}": value for key, value in SMALL.items()}
ALONE = {"sync__strategy": "island", "sync__interval": 3}
PLAIN = {"sync__outer__optimizer": "sgd", "sync__outer__lr": 1.0}
DILOCO = {"sync__outer__optimizer": "nesterov", "sync__outer__lr": 0.7, "sync__outer__momentum": 0.9}
ADAM = {"optimizer__eps": 1e-3}  # where gradients are no more than rounding, Adam takes it for a direction
SGD = {"optimizer__name": "sgd", "optimizer__momentum": 0.9, "optimizer__lr": 0.05}


@pytest.fixture(autouse=True)
def keys(monkeypatch, tmp_path):
    monkeypatch.setenv(keyring.FOLDER, str(tmp_path / "keys"))


def rows(parts: Any, step: int, first: int, count: int) -> dict[str, jax.Array]:
    """A batch of the rows from `first` on."""
    loader = helpers.Loader(helpers.text(), seq_len=32, batch_size=32, seed=0)
    take = lambda ids: loader.rows(step, (ids + first).tolist())
    return placement.place_train(parts.mesh, 1, count, [take])


class Fleet:
    """Islands of one process, each in a thread, with the same compiled programs."""

    def __init__(self, folder: Path, config: Any, steps: int, count: int = 1):
        self.config, self.folder, self.steps, self.count = config, folder, steps, count
        config.steps = steps
        config.data.batch_size = 32 // count
        self.parts = helpers.build(config, (1, 1, 1))
        self.programs, self.init = compile_steps(self.parts, helpers.QUICKLY), compile_init(self.parts)
        first = named_arrays(self.init(np.uint32(0)).params)
        run(Folder(folder).prepare())
        founding.begin(Folder(folder), config, {name: np.asarray(x).reshape(-1) for name, x in first.items()})

    def run(self) -> list[dict[str, np.ndarray]]:
        """Their parameters at the end."""
        joined = [self._join(chr(ord("a") + i)) for i in range(self.count)]
        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(self._train, range(self.count), joined))

    def _join(self, name: str) -> tuple[island.Islander, Any]:
        config = self.config.copy_and_resolve_references()
        config.island.log, config.island.name = str(self.folder), name
        met, state = island.meet(config, self.parts), self.init(np.uint32(7))  # drawn weights that nobody trains on
        return island.Islander.join(met, config, self.parts, state, {}, lambda line: None)

    def _train(self, i: int, joined: tuple[island.Islander, Any]) -> dict[str, np.ndarray]:
        own, state = joined
        size = self.config.data.batch_size
        for step in range(self.steps):
            state, _ = self.programs["inner"](state, rows(self.parts, step, i * size, size))
            state = own.after(step + 1, state)
        own.end(interrupted=False)
        return {name: np.asarray(x) for name, x in named_arrays(state.params).items()}


def check(found: dict[str, np.ndarray], wanted: Any, most: float = 1e-6):
    for name, x in named_arrays(wanted).items():
        np.testing.assert_allclose(found[name], np.asarray(x), rtol=0, atol=most, err_msg=name)


@pytest.mark.slow
def test_one_island_with_plain_steps_outside_trains_as_it_would_alone(tmp_path):
    (found,) = Fleet(tmp_path / "log", helpers.tiny(**ALONE, **PLAIN, **SMALL), 6).run()
    config = helpers.tiny(**SMALL)
    _, state = helpers.train_here(config, helpers.build(config, (1, 1, 1)), 6, quickly=True)
    check(found, state.params)


@pytest.mark.slow
@pytest.mark.parametrize("inner", [SGD, ADAM], ids=["sgd", "adamw"])
@pytest.mark.parametrize("merge", ["average", "nesterov"])
def test_with_staleness_0_islands_are_diloco(merge, inner, tmp_path):
    """Delayed Nesterov without a delay is it, too, where all wait for all."""
    own = {"island__merge": merge, "island__staleness": 0}
    a, b = Fleet(tmp_path / "log", helpers.tiny(**ALONE, **DILOCO, **own, **inner), 9, 2).run()
    config = helpers.tiny(sync__strategy="diloco", sync__interval=3, sync__replicas=2, **DILOCO, **inner)
    _, state = helpers.train_here(config, helpers.build(config, (1, 1, 1)), 9, quickly=True)
    check(a, state.params)
    check(b, state.params)


@pytest.mark.slow
def test_with_staleness_0_and_rounds_of_one_step_islands_are_synchronous_sgd(tmp_path):
    plain = SGD | {"optimizer__momentum": 0.0, "optimizer__clip_norm": 0.0, "optimizer__weight_decay": 0.0}
    own = {"island__merge": "average", "island__staleness": 0, "sync__strategy": "island", "sync__interval": 1}
    outer = {"sync__outer__optimizer": "nesterov", "sync__outer__lr": 1.0, "sync__outer__momentum": 0.0}
    a, _ = Fleet(tmp_path / "log", helpers.tiny(**own, **outer, **plain), 6, 2).run()
    config = helpers.tiny(**plain)
    _, state = helpers.train_here(config, helpers.build(config, (1, 1, 1)), 6, quickly=True)
    check(a, state.params)


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────


def test_a_log_of_another_run_is_refused_with_the_difference(tmp_path):
    config = helpers.tiny(**ALONE)
    parts = helpers.build(config, (1, 1, 1))
    run(Folder(tmp_path / "log").prepare())
    zeros = {name: np.zeros(x.size, np.float32) for name, x in named_arrays(parts.param_shapes).items()}
    founding.begin(Folder(tmp_path / "log"), config, zeros)
    config.island.log, config.island.name = str(tmp_path / "log"), "a"
    island.meet(config, parts)
    config.sync.codec, config.sync.outer.lr, config.island.merge = "int8", 0.5, "average"
    with pytest.raises(UsageError) as error:
        island.meet(config, parts)
    assert str(error.value).splitlines()[1:] == [
        "  island.merge: nesterov in the run, average in this config",
        "  sync.codec: none in the run, int8 in this config",
        "  sync.outer.lr: 0.7 in the run, 0.5 in this config",
    ]
    config.island.name = ""
    with pytest.raises(UsageError, match="sync.strategy=island needs island.name"):
        island.meet(config, parts)


@pytest.mark.parametrize("keys, said", [
    ({"sync__strategy": "sync", "island__name": "a"}, "island.name=a is not read when sync.strategy=sync"),
    ({"sync__decay": 0.5}, "sync.decay=0.5 is not read when sync.strategy=island"),
    ({"island__merge": "average"}, "island.merge=average with island.staleness=-1: it keeps a sum"),
    ({"island__quorum": 3}, "island.quorum=3 is not read when island.merge=nesterov"),
    ({"mesh__replica": 2}, "mesh.replica=2 with sync.strategy=island: an island is one replica"),
    ({"sync__outer__optimizer": "adam"}, "island.merge=nesterov takes sync.outer.optimizer=nesterov, or sgd"),
])  # fmt: skip
def test_bad_values_are_refused_before_anything_is_computed(keys, said):
    with pytest.raises(UsageError) as error:
        helpers.tiny(**ALONE | keys)
    assert said in str(error.value)


def test_each_island_has_its_own_order_of_the_data():
    seeds = {island.data_seed(helpers.tiny(**ALONE, island__name=name, seed=seed)) for name in "ab" for seed in (0, 1)}
    assert len(seeds) == 4 and all(0 <= seed < 2**32 for seed in seeds)


def test_a_log_that_was_forked_after_the_checkpoint_is_refused(tmp_path):
    config = helpers.tiny(**ALONE, island__log=str(tmp_path / "log"), island__name="a")
    parts = helpers.build(config, (1, 1, 1))
    run(Folder(tmp_path / "log").prepare())
    zeros = {name: np.zeros(x.size, np.float32) for name, x in named_arrays(parts.param_shapes).items()}
    founding.begin(Folder(tmp_path / "log"), config, zeros)
    met, state = island.meet(config, parts), compile_init(parts)(np.uint32(0))
    gone, other = "it is another log, or a copy", "the log was forked"
    for last, why in (({"next": 1, "tail": "0" * 64}, other), ({"next": 9, "tail": ""}, gone)):
        with pytest.raises(LogError, match=why):
            island.Islander.join(met, config, parts, state, {island.NAME: last}, print)


# ── real processes ───────────────────────────────────────────────────────────────────────────────────────────────

OPTIONS = [
    "--config.sync.strategy=island", "--config.sync.codec=int4", "--config.sync.interval=4", "--config.steps=16",
    "--config.checkpoint.every=3", "--config.sample.tokens=0",
]  # fmt: skip


def init(log: Path, *options: str):
    found = subprocess.run(
        [*helpers.command(log)[:1], "-m", "islands", "init", str(log), "--config=configs/tiny.py", *OPTIONS, *options],
        cwd=helpers.ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr


def island_process(
    log: Path, name: str, workdir: Path, *options: str, die_at: str = "", simulate: int = 1, processes: int = 1
) -> subprocess.Popen:
    own = [f"--config.island.log={log}", f"--config.island.name={name}"]
    command = helpers.command(workdir, *OPTIONS, *own, *options, simulate=simulate, processes=processes)
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    environment |= {"SLACKLINE_DIE_AT": die_at} if die_at else {}
    return subprocess.Popen(
        command, cwd=helpers.ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ended(process: subprocess.Popen) -> tuple[int, str]:
    out, _ = process.communicate(timeout=500)
    return process.returncode, out


def pushes(log: Path) -> list[tuple[str, int, tuple]]:
    """(island, round, payloads) of all that count."""
    entries = run(run(Reader.open(Folder(log))).read())
    records = [entry.record for entry in entries if entry.verdict.folded]
    return [(record.island, record.clock, record.payloads) for record in records if record.type == PUSH]


POINTS = [
    "before write payloads 3",
    "after link payloads 4",
    "before link records 4",
    "after link records 4",
    "before read payloads 3",
]


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_a_run_that_is_killed_and_goes_on_makes_the_same_pushes(point, undisturbed, tmp_path):
    log, wanted, digest = tmp_path / "log", *undisturbed
    init(log)
    code, out = ended(island_process(log, "a", tmp_path / "a", die_at=point))
    assert code == -signal.SIGKILL, out
    code, out = ended(island_process(log, "a", tmp_path / "a"))
    assert code == 0, out
    assert pushes(log) == wanted
    assert replay.of(Folder(log), None, True, print).params_digest == digest


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(pushes, parameters) of an island that nobody kills."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(keyring.FOLDER, str(folder / "keys"))
        init(folder / "log")
        code, out = ended(island_process(folder / "log", "a", folder / "a"))
        assert code == 0, out
    found = replay.of(Folder(folder / "log"), None, True, print)
    assert not found.differs
    form = form_of(run(Reader.open(Folder(folder / "log"))).run.facts)
    for _, _, (*blobs, _) in pushes(folder / "log"):
        assert sum(blob.bytes for blob in blobs) == payload_bytes(form.sizes, form.codec)
    return pushes(folder / "log"), found.params_digest


@pytest.mark.slow
def test_three_islands_one_of_which_is_stopped_and_one_killed(tmp_path):
    """On different meshes. One is stopped, leaves and returns; one is killed, and returns or is taken to be gone."""
    log = tmp_path / "log"
    init(log, "--snapshots=5")
    steps = ["--config.steps=120", "--config.checkpoint.every=10"]
    a, b, c = (
        island_process(log, name, tmp_path / name, *steps, *mesh, simulate=4)
        for name, mesh in (
            ("a", []),
            ("b", ["--config.mesh.tensor=2"]),
            ("c", ["--config.mesh.fsdp=1", "--config.mesh.tensor=4"]),
        )
    )
    made_by = lambda name: sum(island == name for island, *_ in pushes(log))
    stops = {"b": b.terminate, "c": c.kill}  # each by its own pace: one may be done before another has begun

    def all_stopped() -> bool:
        for name in [name for name in stops if made_by(name) >= 3]:
            stops.pop(name)()
        return not stops

    until(all_stopped, 240)
    assert ended(b)[0] == 75 and ended(c)[0] == -signal.SIGKILL
    b, c = (island_process(log, name, tmp_path / name, *steps, simulate=2) for name in ("b", "c"))
    for process in (a, b, c):
        code, out = ended(process)
        assert code == 0, out
    made = pushes(log)
    assert len({(name, clock) for name, clock, _ in made}) == len(made)
    found = replay.of(Folder(log), None, True, print)
    assert not found.differs and len(found.snapshots) > 5
    assert set(elsewhere(log)) == {found.params_digest}
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["step"] == 120


def elsewhere(log: Path) -> Iterator[str]:
    """What other processes replay to: with all of NumPy's kernels that this CPU has turned off, and other Pythons."""
    import numpy._core._multiarray_umath as umath

    features = " ".join(name for name in umath.__cpu_dispatch__ if umath.__cpu_features__.get(name))
    others = [Path(name) for name in os.environ.get("SLACKLINE_PYTHONS", "").split()]
    others += [helpers.ROOT / venv / "bin/python" for venv in (".venv", ".venv-newest")]
    plain = {"NPY_DISABLE_CPU_FEATURES": features, "OPENBLAS_CORETYPE": "Prescott"}
    for python, more in [(sys.executable, plain), *((str(path), {}) for path in others if path.exists())]:
        done = subprocess.run(
            [python, "-m", "islands", "replay", str(log), "--verify", "--json"], cwd=helpers.ROOT,
            env=os.environ | more, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        yield json.loads(done.stdout)["params_digest"]


def until(true: Callable[[], bool], seconds: float):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.2)


def test_replay_says_what_it_came_to(tmp_path, capsys):
    run(Folder(tmp_path / "log").prepare())
    founding.begin(Folder(tmp_path / "log"), helpers.tiny(**ALONE), {"w": np.zeros(5, np.float32)})
    assert main(["replay", str(tmp_path / "log"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["version"] == 0 and said["snapshots"] == []

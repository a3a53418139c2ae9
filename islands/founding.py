"""The beginning of a run of islands: its first parameters are made once, and everybody takes them from the log."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from islands import check, keyring, merge, payload, snapshot, terms, trust
from islands import secret as secrets
from islands.log import Log, upload
from islands.payload import Form
from islands.reader import PATIENCE, RUN
from islands.record import OWNER, Run
from islands.secret import RunKey, Secret
from islands.snapshot import Place
from islands.state import State
from islands.store import Clock, Patient, Store, open_store, run
from islands.trust import Key
from islands.view import View
from parallel.layout import mesh as meshes
from recipes import build, methods, parameters, programs
from runtime.config import UsageError, flatten
from runtime.console import human_bytes, human_count
from runtime.digest import named_arrays


def init(log: str, argv: Sequence[str], snapshots: int, encrypt: bool, doc: str, say: Callable[[str], None]) -> None:
    """Begins a log. argv: as train.py takes it. snapshots: versions between two; 0: none. encrypt: payloads.

    Raises UsageError where there is one already, where the store is unsound, and for a config of no island.
    """
    config, flags = methods.parse(argv, doc)
    methods.validate(config)
    if config.sync.strategy != "island":
        raise UsageError(f"sync.strategy={config.sync.strategy}: a log is for islands: set sync.strategy=island")
    store = open_store(log)
    _check(store, log)
    if flags.simulate:
        meshes.simulate(flags.simulate, 1)
    parts = build.build(config, meshes.build(meshes.fill_sizes(config.mesh, len(jax.devices()))))
    params = first_parameters(config, parts)
    given = begin(store, config, params, snapshots, encrypt)
    count = sum(x.size for x in params.values())
    say(f"{log}: begun, with {human_count(count)} parameters, {human_bytes(4 * count)}; its owner's key is "
        f"{keyring.path(given.owner, OWNER)}")  # fmt: skip
    if encrypt:
        say(f"every island needs a copy of the key of its payloads, {keyring.payload_key(given)}, in the same place")
    say(f"on each site: python train.py … --config.island.log={log} --config.island.name=NAME")


def _check(store: Store, log: str) -> None:
    """Raises UsageError where no log may begin."""
    run(store.prepare())
    if run(store.get(RUN, 1)) is not None:
        raise UsageError(f"{log} has a log already: choose another folder or path")
    found = check.of(store)
    if not found.sound:
        raise UsageError(f"{log} cannot hold a log:\n" + "\n".join(check.lines(found)))


def first_parameters(config: Any, parts: build.Parts) -> dict[str, np.ndarray]:
    """{weight: float32 vector}: drawn, or those of init.workdir."""
    taken = config.init.workdir if programs.takes_over(config, parts) else None
    program = programs.compile_init(parts, bool(taken))
    if taken:
        state = program(parameters.read(taken, parts.task.axes, parts.state.params, print).params)
    else:
        state = program(np.uint32(config.seed))
    found = named_arrays(state.params)
    if other := [name for name, x in found.items() if x.dtype != np.float32]:
        raise UsageError(f"{other[0]} is of {found[other[0]].dtype}: islands fold float32")
    return {name: np.asarray(x).reshape(-1) for name, x in found.items()}


def begin(store: Store, config: Any, params: dict[str, np.ndarray], snapshots: int = 0, encrypt: bool = False) -> Run:
    """Writes the first snapshot and run.json; the owner's key, and that of payloads, into this machine's folder."""
    keys = terms.agreed(dict(flatten(config)))
    rule = terms.of(keys).rule
    try:
        form = Form({name: x.size for name, x in params.items()}, methods.codec(config.sync))
        limit = payload.payload_bytes(form.sizes, form.codec) + payload.manifest_limit(form)
    except ValueError as error:
        raise UsageError(str(error)) from error
    key, run_key = Key.new(), RunKey.new() if encrypt else None
    secret = secrets.made(key.public, run_key) if run_key else None
    first = _first_snapshot(store, merge.start(rule, params), View(members=trust.owner(key.public)), key.public, secret)
    facts = {
        "keys": keys,
        "codec": form.named(),
        "leaves": dict(form.sizes),
        "snapshots": snapshots,
        "first": {"manifest": first.manifest, "payloads": [each._asdict() for each in first.payloads]},
    }
    if run_key:
        facts[secrets.FACT] = run_key.name
        limit = secrets.stored_bytes(limit) + payload.BLOBS * secrets.stored_bytes(0)
    given = Run(owner=key.public, budget=limit, facts=facts)
    keyring.save(key, key.public, OWNER)
    if run_key:
        run_key.write(keyring.payload_key(given))
    run(Log.begin(store, given, {}, key))
    return given


def _first_snapshot(store: Store, state: State, view: View, seed: str, secret: Secret | None) -> Place:
    """Before there is a log that names it."""
    patient = Patient(store, Clock, PATIENCE, seed)
    blobs = [run(upload(patient, chunk)) for chunk in snapshot.chunks(state, secret)]
    data = snapshot.manifest(state, view, "", secret)
    run(upload(patient, data))
    return snapshot.place(-1, data, blobs)

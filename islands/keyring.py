"""Where the private keys of islands are, and how a name comes onto the member list.

They lie in a folder of this machine (SLACKLINE_KEYS, or ~/.slackline/keys), never in the log. Who has the owner's key
there needs nothing more: a name that is used for the first time gets a key, and the owner's puts it onto the list.
"""

import os
from dataclasses import replace
from pathlib import Path

from islands import record as records
from islands import secret, snapshot
from islands.log import Log
from islands.record import OWNER, Run
from islands.secret import RunKey, Secret
from islands.store import Store, run
from islands.trust import Key
from islands.view import Member, View
from runtime.config import UsageError

FOLDER = "SLACKLINE_KEYS"


def path(owner: str, name: str) -> Path:
    """owner: the public key of the run's."""
    folder = Path(os.environ.get(FOLDER) or "~/.slackline/keys").expanduser()
    return folder / f"{owner[:16]}-{name}.pem"


def new(owner: str, name: str) -> Key:
    """Makes the key of a name. Raises UsageError where there is one."""
    _check(name)
    key = Key.new()
    save(key, owner, name)
    return key


def save(key: Key, owner: str, name: str) -> None:
    at = path(owner, name)
    at.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    key.write(at)


def have(owner: str, name: str) -> bool:
    return path(owner, name).exists()


def of_owner(given: Run) -> Key:
    """Raises UsageError where this machine has not the key of the run's owner."""
    if not have(given.owner, OWNER):
        raise UsageError(
            f"only the owner of this run may do that, and its key is not here ({path(given.owner, OWNER)}): do it on "
            "the machine where the run was begun, or copy the file from there"
        )
    return Key.read(path(given.owner, OWNER))


def allow(store: Store, name: str, key: str = "", role: str = "push", norm_bound: float = 0.0) -> Member:
    """Puts a name onto the member list, or changes what it may. key: public; "": that of this machine, made if there is
    none. norm_bound: 0: none."""
    _check(name)
    log = _owners(store)
    if not key:
        at = path(log.run.owner, name)
        key = (Key.read(at) if at.exists() else new(log.run.owner, name)).public
    try:
        records.check_hex(key, "key", f"the key of {name}")
    except ValueError as error:
        raise UsageError(str(error)) from error
    member = Member(key, role, norm_bound.hex() if norm_bound else "")
    run(log.write_members(lambda before: {**before, name: member}))
    return member


def revoke(store: Store, name: str) -> None:
    """From its record on nothing of this name counts. Raises UsageError where it is not on the list."""
    _check(name)
    log = _owners(store)
    if name not in log.view.members:
        raise UsageError(f"{name} is not on the member list: {', '.join(sorted(log.view.members))}")
    run(log.write_members(lambda before: {**before, name: replace(before[name], revoked=True)}))


def of_member(store: Store, given: Run, view: View, name: str) -> Key:
    """The key of an island that is about to take part. Raises UsageError with what to do where it may not."""
    _check(name)
    member, owned = view.members.get(name), have(given.owner, OWNER)
    if member and member.revoked:
        raise UsageError(f"island.name={name}: its key is revoked; choose another name, or ask the owner of the run")
    if not have(given.owner, name):
        if member or not owned:
            raise UsageError(
                f"island.name={name}: its key is not here ({path(given.owner, name)}): "
                + ("copy the file from where it was made, or choose another name" if member else
                   f"`python -m islands keys new LOG {name}` makes one")
            )  # fmt: skip
        allow(store, name)
    key = Key.read(path(given.owner, name))
    if not member and owned:
        allow(store, name)
    elif not member or member.key != key.public or not member.writes:
        raise UsageError(
            f"island.name={name} may not push: the owner of the run allows it by `python -m islands keys allow LOG "
            f"{name} --key={key.public}`"
        )
    return key


def payload_key(given: Run) -> Path:
    """Of the file with the key of a run's payloads, where they are encrypted."""
    return path(given.owner, OWNER).with_name(f"{given.owner[:16]}.payloads")


def secret_of(given: Run) -> Secret | None:
    """What opens the payloads of a run; None where they are not encrypted. Raises UsageError where there is no key."""
    if secret.FACT not in given.facts:
        return None
    at = payload_key(given)
    if not at.exists():
        raise UsageError(f"the payloads of this run are encrypted: copy the file with their key from its owner to {at}")
    return secret.of(given, RunKey.read(at))


def _owners(store: Store) -> Log:
    log = run(Log.open(store))
    log = run(snapshot.begin(store, Log, island=OWNER, key=of_owner(log.run)))
    run(log.read())
    return log


def _check(name: str) -> None:
    if name == OWNER:
        raise UsageError(f"{OWNER} is the name of the run's owner: choose another one for an island")
    try:
        records.check_name(name)
    except ValueError as error:
        raise UsageError(str(error)) from error

"""docs/islands_policy.json: who may do what below each prefix of a log, by the rules in which S3 reads a policy."""

import copy
import fnmatch
import json
import re
from typing import Any

import helpers
import pytest

POLICY = json.loads((helpers.ROOT / "docs" / "islands_policy.json").read_text())
ROLES = {"member": "islands-member", "owner": "islands-owner", "truncate": "islands-truncate", "admin": "admin"}
PUT, GET, DELETE, LIST = "s3:PutObject", "s3:GetObject", "s3:DeleteObject", "s3:ListBucket"


def may(policy: dict[str, Any], who: str, action: str, key: str, if_none_match: bool = False) -> bool:
    """Who is an island, of the name a, in one of the roles. An admin's own policy allows everything, and an explicit
    refusal counts more than that."""
    resource = f"arn:aws:s3:::BUCKET/RUN/{key}" if action != LIST else "arn:aws:s3:::BUCKET"
    arn, effects = f"arn:aws:iam::ACCOUNT:role/{ROLES[who]}", {"Allow"} if who == "admin" else set()
    for said in policy["Statement"]:
        concerned = said["Principal"] == "*" or arn in said["Principal"]["AWS"]
        resources = [each.replace("${aws:PrincipalTag/island}", "a") for each in said["Resource"]]
        fits = action in said["Action"] and any(fnmatch.fnmatchcase(resource, each) for each in resources)
        if concerned and fits and all(holds(*each, arn, if_none_match) for each in said.get("Condition", {}).items()):
            effects.add(said["Effect"])
    return effects == {"Allow"}


def holds(operator: str, asked: dict[str, Any], arn: str, if_none_match: bool) -> bool:
    if operator == "Null":
        return asked == {"s3:if-none-match": "false" if if_none_match else "true"}
    assert operator == "ArnNotEquals" and asked.keys() == {"aws:PrincipalArn"}, "no such condition is known here"
    return arn not in asked["aws:PrincipalArn"]


OBJECTS = ["run.json", "records/00000000000000000007", f"payloads/{64 * '0'}", "heartbeats/a"]
CREATES = {"run.json": ["owner"], OBJECTS[1]: ["member", "owner"], OBJECTS[2]: ["member", "owner"]}


def rights(policy: dict[str, Any]) -> dict[tuple, bool]:
    """Of everybody, for every object, all that a log or a thief may want."""
    asked = [(PUT, True), (PUT, False), (GET, False), (DELETE, False), ("s3:DeleteObjectVersion", False)]
    return {
        (who, action, key, condition): may(policy, who, action, key, condition)
        for who in ROLES
        for key in [*OBJECTS, "heartbeats/b", "other"]
        for action, condition in [*asked, (LIST, False)]
    }


@pytest.mark.parametrize("key", OBJECTS[:3])
def test_what_is_created_is_created_once_and_never_overwritten(key):
    assert [who for who in ROLES if may(POLICY, who, PUT, key, True)] == [*CREATES[key], "admin"]
    assert not any(may(POLICY, who, PUT, key) for who in ROLES)


@pytest.mark.parametrize("key", [*OBJECTS, "heartbeats/b"])
def test_all_read_and_one_role_deletes_what_is_truncated(key):
    assert all(may(POLICY, who, GET, key) and may(POLICY, who, LIST, key) for who in ROLES)
    deletes = ["truncate"] if key.startswith(("records/", "payloads/")) else []
    assert [who for who in ROLES if may(POLICY, who, DELETE, key)] == deletes
    assert not any(may(POLICY, who, "s3:DeleteObjectVersion", key) for who in ROLES)


def test_an_island_writes_its_own_heartbeat_and_nothing_else_beside_the_log():
    assert may(POLICY, "member", PUT, "heartbeats/a") and not may(POLICY, "truncate", PUT, "heartbeats/a")
    assert not any(may(POLICY, "member", PUT, key, c) for key in ("heartbeats/b", "other") for c in (True, False))


def test_every_statement_is_needed():
    """Without any of them, or with one resource or condition less, somebody may do something else."""
    for n, said in enumerate(POLICY["Statement"]):
        changes = [("Statement", n)]
        changes += [("Resource", i) for i in range(len(said["Resource"]) if len(said["Resource"]) > 1 else 0)]
        changes += [("Condition", 0)] if "Condition" in said else []
        for what, i in changes:
            changed = copy.deepcopy(POLICY)
            if what == "Condition":
                del changed["Statement"][n]["Condition"]
            else:
                del (changed["Statement"] if what == "Statement" else changed["Statement"][n][what])[i]
            assert rights(changed) != rights(POLICY), f"{said['Sid']} is the same without {what} {i}"


def test_the_policy_has_every_object_of_the_page_and_the_shape_that_s3_wants():
    page = (helpers.ROOT / "docs" / "islands.md").read_text()
    table = page.split("## The log", 1)[1].split("\n\n", 2)[1]
    prefixes = {name.partition("/")[0] for name in re.findall(r"^\| `(\S+)`", table, re.MULTILINE)}
    resources = [each for said in POLICY["Statement"] for each in said["Resource"]]
    assert {key.partition("/")[0] for key in OBJECTS} == prefixes
    assert all(any(f"/RUN/{prefix}" in each for each in resources) for prefix in prefixes)
    assert POLICY.keys() == {"Version", "Statement"} and POLICY["Version"] == "2012-10-17"
    keys = {"Sid", "Effect", "Principal", "Action", "Resource"}
    assert all(keys <= said.keys() <= keys | {"Condition"} for said in POLICY["Statement"])
    sids = [said["Sid"] for said in POLICY["Statement"]]
    assert len(set(sids)) == len(sids) and all(sid.isalnum() for sid in sids)
    assert len(json.dumps(POLICY)) < 20 << 10, "S3 takes no larger one"
    assert "islands_policy.json" in page

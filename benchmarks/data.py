"""Seeded records that follow the API's contract, in the sizes that the benchmarks serve."""

import json
import random
import uuid
from collections.abc import Iterator
from typing import Any

SEED = 20260901
SIZES = (1, 20)
"""Sizes of the records, in KB of JSON."""

SAMPLE_ID = "exec_00000000"
_PLACE = "@" * len(SAMPLE_ID)
_LOGIN_BYTES = 520
"""More than the JSON of one login with its authentications takes."""
_STATUSES = ("Enqueued", "InProgress", "Finished", "Failed")
_WORDS = ("Invoice", "Portal", "Payroll", "Claims", "Benefits", "Supplier", "Ledger", "Intake", "Renewal", "Audit")


def execution_ids(count: int) -> Iterator[str]:
    """Return ids of the given number of executions."""
    return (f"exec_{number:08d}" for number in range(count))


def template(kilobytes: int) -> tuple[bytes, bytes]:
    """Return the JSON of a record before and after its id."""
    before, after = _compact(_record(kilobytes * 1024)).split(_PLACE)
    return before.encode(), after.encode()


def body(kilobytes: int, execution_id: str = SAMPLE_ID) -> bytes:
    """Return the JSON of a record."""
    before, after = template(kilobytes)
    return before + execution_id.encode() + after


def _record(size: int) -> dict[str, Any]:
    """Return a finished record with as many logins as fit the size. The last URL's token fills the rest."""
    rng = random.Random(SEED)
    record: dict[str, Any] = {
        "id": _PLACE,
        "workflow": {"id": _uuid(rng), "name": _name(rng)},
        "logins": [],
        "authentications": [],
        "contextAuthentications": [],
        "startTime": "2026-08-31T05:31:56.123Z",
        "endTime": "2026-08-31T05:34:12.456Z",
        "durationMs": 136333,
        "isRecording": False,
        "browserSessionId": _uuid(rng),
        "status": "Completed",
    }
    while size - len(_compact(record)) > _LOGIN_BYTES:
        _add_login(record, rng)
    missing = size - len(_compact(record))
    record["authentications"][-1]["liveViewUrl"] += rng.randbytes(missing).hex()[:missing]
    return record


def _compact(record: dict[str, Any]) -> str:
    return json.dumps(record, separators=(",", ":"))


def _add_login(record: dict[str, Any], rng: random.Random) -> None:
    login = {"id": _uuid(rng), "name": _name(rng)}
    session = _uuid(rng)
    record["logins"].append(login)
    record["authentications"].append(
        {
            "browserSessionId": session,
            "status": rng.choice(_STATUSES),
            "liveViewUrl": f"https://live.example.com/sessions/{session}?token={rng.randbytes(16).hex()}",
        }
    )
    record["contextAuthentications"].append(
        {
            "contextAuthenticationId": _uuid(rng),
            "loginSummary": {"loginId": login["id"], "name": login["name"], "isManual": rng.random() < 0.5},
            "authenticationStatus": "Unauthenticated",
        }
    )


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(bytes=rng.randbytes(16), version=4))


def _name(rng: random.Random) -> str:
    return " ".join(rng.sample(_WORDS, 2))

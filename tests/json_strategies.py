"""Strategies for property tests and fuzzing: valid records of a server, and invalid ones."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

SAMPLES = Path(__file__).parent / "samples"

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
ids = texts.filter(bool)

json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=12,
)


def changed(**fields: Any) -> bytes:
    """Return the documented example with some fields replaced, or left out where the value is `...`."""
    record = {**json.loads((SAMPLES / "documented.json").read_bytes()), **fields}
    return json.dumps({name: value for name, value in record.items() if value is not ...}).encode()


def spelled(moment: datetime) -> str:
    """Return a time in the format of the API."""
    return moment.isoformat().replace("+00:00", "Z")


times = st.datetimes(datetime(1, 1, 2), datetime(9999, 12, 30), timezones=st.just(UTC)).map(spelled)  # noqa: DTZ001
named = st.fixed_dictionaries({"id": texts, "name": texts})
durations = st.none() | st.integers(0, 2**53) | st.floats(0, 1e15)
authentications = st.fixed_dictionaries({}, optional={"status": texts, "browserSessionId": texts, "liveViewUrl": texts})
context_authentications = st.fixed_dictionaries(
    {
        "contextAuthenticationId": texts,
        "loginSummary": st.fixed_dictionaries({"loginId": texts, "name": texts, "isManual": st.booleans()}),
        "authenticationStatus": texts,
    }
)

records = st.fixed_dictionaries(
    {
        "id": ids,
        "workflow": named,
        "logins": st.lists(named, max_size=3),
        "authentications": st.lists(authentications, max_size=3),
        "contextAuthentications": st.lists(context_authentications, max_size=3),
        "startTime": times,
        "endTime": st.none() | times,
        "durationMs": durations,
        "isRecording": st.booleans(),
        "browserSessionId": st.none() | texts,
        "status": texts,
    },
    optional={"sessionId": texts},
)
"""Records that fit the contract, in the format that the library writes."""


@st.composite
def mutated(draw: st.DrawFn, records: st.SearchStrategy[dict[str, Any]]) -> bytes:
    """Return the JSON of a record with a value replaced, removed, added or broken."""
    answer = draw(records)
    holder: Any = answer
    while True:
        inner = [
            value
            for value in (holder.values() if isinstance(holder, dict) else holder)
            if value and isinstance(value, (dict, list))
        ]
        if not inner or draw(st.booleans()):
            break
        holder = draw(st.sampled_from(inner))
    keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    key = draw(st.sampled_from(keys)) if keys else None
    match draw(st.sampled_from(["replace", "remove", "add", "text"])):
        case "replace" if key is not None:
            holder[key] = draw(json_values)
        case "remove" if key is not None:
            del holder[key]
        case "add" if isinstance(holder, dict):
            holder[draw(texts)] = draw(json_values)
    body = json.dumps(answer, ensure_ascii=draw(st.booleans())).encode()
    return draw(broken(body)) if draw(st.booleans()) else body


@st.composite
def broken(draw: st.DrawFn, body: bytes) -> bytes:
    """Return bytes that are cut, doubled, overwritten or interrupted at some place."""
    start = draw(st.integers(0, len(body)))
    stop = draw(st.integers(start, len(body)))
    return body[:start] + draw(st.binary(max_size=8)) + draw(st.sampled_from([b"", body[start:stop]])) + body[stop:]

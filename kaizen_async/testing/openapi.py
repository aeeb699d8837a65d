"""What the emulator serves, as an OpenAPI description: `GET /openapi.json`."""

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Final, cast

from kaizen_async.config import __version__
from kaizen_async.testing.checks import MOST_ID_CHARACTERS
from kaizen_async.testing.lives import Life
from kaizen_async.testing.records import SERVED, Snapshot, digest_of

_ERRORS: Final = {
    "400": "The body is not a JSON object with an id.",
    "401": "There is a key, and the request lacks it.",
    "404": "No record has this id.",
    "413": "The body is too large.",
    "415": "The body is not announced as application/json.",
    "421": "The Host header names another server.",
    "429": "The rate limit is exceeded; see Retry-After.",
}
_QUESTION: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["id"],
    "properties": {"id": {"type": "string", "minLength": 1, "maxLength": MOST_ID_CHARACTERS}},
}


_ERROR_BODY: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["message"],
    "properties": {"message": {"type": "string"}},
}
_LIVES: Final = (Life.running(status="Enqueued"), Life.running(), Life.ended(), Life.ended(status="Failed"))
_TYPES: Final = {bool: "boolean", int: "integer", float: "number", str: "string"}


def description(path_prefix: str, own_paths: Iterable[str]) -> dict[str, Any]:
    """Return the description of an emulator that also serves some paths of a user's own."""
    start = datetime(2026, 1, 1, tzinfo=UTC)
    examples = [
        Snapshot.of("exec_1", life, digest=digest_of(f"example {place}"), start=start, age=30)
        for place, life in enumerate(_LIVES)
    ]
    kinds = {
        path: _lookup("An execution.", _schema_of([json.loads(kind.encode(each, None)) for each in examples]))
        for path, kind in SERVED.items()
    }
    paths: dict[str, Any] = {
        **kinds,
        **{path: _lookup("A record of a kind of your own.", {"type": "object"}) for path in own_paths},
        "/health": {
            "get": {
                "summary": "Whether the emulator serves.",
                "security": [],
                "responses": {"200": {"description": "It does."}},
            }
        },
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Kaizen API, emulated by kaizen_async", "version": __version__},
        # Relative to where the description was read: clients in other containers reach it by another name.
        "servers": [{"url": path_prefix or "/"}],
        "security": [{"key": []}, {}],
        "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _lookup(summary: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {
        "post": {
            "summary": summary,
            "requestBody": {"required": True, "content": _json(_QUESTION)},
            "responses": {
                "200": {"description": "The record.", "content": _json(schema)},
                **{status: {"description": text, "content": _json(_ERROR_BODY)} for status, text in _ERRORS.items()},
            },
        }
    }


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _schema_of(examples: list[Any]) -> dict[str, Any]:
    """Return the JSON Schema that fits all examples. What is always null may have any type."""
    known = [example for example in examples if example is not None]
    if not known:
        return {}
    schema: dict[str, Any]
    if isinstance(known[0], dict):
        records = cast("list[dict[str, Any]]", known)
        names = list(dict.fromkeys(name for record in records for name in record))
        schema = {
            "type": "object",
            "required": [name for name in names if all(name in record for record in records)],
            "properties": {name: _schema_of([each[name] for each in records if name in each]) for name in names},
        }
    elif isinstance(known[0], list):
        items = [item for example in cast("list[list[Any]]", known) for item in example]
        schema = {"type": "array", "items": _schema_of(items)}
    else:
        schema = {"type": _TYPES[type(known[0])]}
    if len(known) < len(examples):
        schema["type"] = [schema["type"], "null"]
    return schema

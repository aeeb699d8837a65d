"""What the emulator serves, as an OpenAPI description: `GET /openapi.json`."""

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, Final, cast

from kaizen_async.config import __version__
from kaizen_async.testing.checks import MOST_ID_CHARACTERS
from kaizen_async.testing.lives import Life
from kaizen_async.testing.records import KINDS, Snapshot, digest_of

_ERRORS: Final = {
    "400": "The body is not a JSON object with an id.",
    "401": "There is a key, and the request lacks it.",
    "404": "No record has this id.",
    "413": "The body is too large.",
    "415": "The body is not announced as application/json.",
    "429": "The rate limit is exceeded; see Retry-After.",
}
_QUESTION: Final[dict[str, Any]] = {
    "type": "object",
    "required": ["id"],
    "properties": {"id": {"type": "string", "minLength": 1, "maxLength": MOST_ID_CHARACTERS}},
}


def description(base_url: str, own_paths: Iterable[str]) -> dict[str, Any]:
    """Return the description of an emulator that also serves some paths of a user's own."""
    example = Snapshot.of(
        "exec_1", Life.ended(), digest=digest_of("example"), start=datetime(2026, 1, 1, tzinfo=UTC), age=30
    )
    kinds = {
        path: _lookup("An execution.", _schema_of(json.loads(KINDS[path].encode(example, None)))) for path in KINDS
    }
    paths: dict[str, Any] = {
        **kinds,
        **{path: _lookup("A record of a kind of your own.", {"type": "object"}) for path in own_paths},
        "/health": {
            "get": {"summary": "Whether it serves.", "security": [], "responses": {"200": {"description": "It does."}}}
        },
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Kaizen API, emulated by kaizen_async", "version": __version__},
        "servers": [{"url": base_url.rstrip("/")}],
        "security": [{"key": []}, {}],
        "paths": paths,
        "components": {"securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
    }


def _lookup(summary: str, schema: dict[str, Any]) -> dict[str, Any]:
    found = {"description": "The record.", "content": {"application/json": {"schema": schema}}}
    errors = {status: {"description": text} for status, text in _ERRORS.items()}
    return {
        "post": {
            "summary": summary,
            "requestBody": {"required": True, "content": {"application/json": {"schema": _QUESTION}}},
            "responses": {"200": found, **errors},
        }
    }


def _schema_of(value: Any) -> dict[str, Any]:
    """Return the JSON Schema of a made-up record: what may be null has any type."""
    if value is None:
        return {}
    if isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        return {"type": "object", "properties": {name: _schema_of(each) for name, each in fields.items()}}
    if isinstance(value, list):
        return {"type": "array", "items": _schema_of(value[0]) if value else {}}
    return {"type": {bool: "boolean", int: "integer", float: "number", str: "string"}[type(value)]}

"""What the emulator serves, as an OpenAPI description: `GET /openapi.json`."""

from collections.abc import Iterable
from typing import Any, Final

import msgspec

from kaizen_async.config import __version__
from kaizen_async.models import InstructorExecution, WorkflowExecution
from kaizen_async.testing.checks import MOST_ID_CHARACTERS

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
    (instructor, workflow), schemas = msgspec.json.schema_components(
        (InstructorExecution, WorkflowExecution), ref_template="#/components/schemas/{name}"
    )
    wrapped: dict[str, Any] = {"type": "object", "required": ["execution"], "properties": {"execution": workflow}}
    paths: dict[str, Any] = {
        "/instructor/executions/get": _lookup("An instructor execution.", instructor),
        "/executions/get": _lookup("A workflow execution.", wrapped),
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
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
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

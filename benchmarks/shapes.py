"""The record in other forms: minimal msgspec Structs, and pydantic models with any base class."""

from datetime import datetime
from typing import Any

import msgspec


class NamedLean(msgspec.Struct, gc=False):
    """A workflow or a login."""

    id: str
    name: str


class AuthenticationLean(msgspec.Struct, rename="camel", gc=False):
    """An authentication."""

    browser_session_id: str
    status: str
    live_view_url: str


class LoginSummaryLean(msgspec.Struct, rename="camel", gc=False):
    """The login of a context authentication."""

    login_id: str
    name: str
    is_manual: bool


class ContextAuthenticationLean(msgspec.Struct, rename="camel", gc=False):
    """A context authentication."""

    context_authentication_id: str
    login_summary: LoginSummaryLean
    authentication_status: str


class LeanExecution(msgspec.Struct, rename="camel", gc=False):
    """Every field of the record with its simplest type, without enums and dates."""

    id: str
    workflow: NamedLean
    logins: list[NamedLean]
    authentications: list[AuthenticationLean]
    context_authentications: list[ContextAuthenticationLean]
    start_time: str
    end_time: str | None
    duration_ms: float | None
    is_recording: bool
    browser_session_id: str | None
    status: str


def pydantic_execution(base: type[Any]) -> Any:
    """Return the record as a model based on pydantic's BaseModel or on an SDK's own base class."""
    from pydantic import Field, create_model  # noqa: PLC0415 - contenders without pydantic must not load it

    def model(title: str, /, **fields: Any) -> Any:
        aliased = {key: (kind, Field(alias=_camel(key))) for key, kind in fields.items()}
        return create_model(title, __base__=base, **aliased)  # type: ignore[call-overload]

    named = model("Named", id=str, name=str)
    authentication = model("Authentication", browser_session_id=str, status=str, live_view_url=str)
    summary = model("LoginSummary", login_id=str, name=str, is_manual=bool)
    context = model(
        "ContextAuthentication", context_authentication_id=str, login_summary=summary, authentication_status=str
    )
    return model(
        "Execution",
        id=str,
        workflow=named,
        logins=list[named],
        authentications=list[authentication],
        context_authentications=list[context],
        start_time=datetime,
        end_time=datetime | None,
        duration_ms=float | None,
        is_recording=bool,
        browser_session_id=str | None,
        status=str,
    )


def _camel(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(part.capitalize() for part in others)

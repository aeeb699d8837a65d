"""The tree of errors: which classes code can catch, what an error says, and that errors can be pickled and copied."""

import copy
import json
import pickle
import re
from typing import Any

import pytest

import kaizen_async.errors
from kaizen_async import (
    AttemptTimeoutError,
    AuthenticationError,
    ClientClosedError,
    DeadlineExceededError,
    DecodeError,
    InstructorExecution,
    InvalidIdError,
    KaizenError,
    NotFoundError,
    RateLimitError,
    StatusError,
    TransportError,
)
from kaizen_async.errors import BODY_LIMIT, MESSAGE_LIMIT, printable, seconds


def one_of_each() -> list[KaizenError]:
    """Return an error of every class, each attribute set to something other than its default."""
    context: dict[str, Any] = {"execution_id": "exec_1", "attempts": 3}
    status: dict[str, Any] = {"body": b"no", "retry_after": 2.5, "retryable": True, **context}
    return [
        KaizenError("it failed", **context),
        TransportError("cut off", retryable=False, disconnected=True, garbled=True, **context),
        AttemptTimeoutError("no complete response within 30 s", **context),
        StatusError("the server answered 500", status=500, **status),
        AuthenticationError("the server answered 401", status=401, **status),
        NotFoundError("the server answered 404", status=404, **status),
        RateLimitError("the server answered 429", status=429, **status),
        DecodeError("no record", path="$.workflow.name", body=b"{}", retryable=True, **context),
        DeadlineExceededError("its deadline passed", last_execution=("a", "record"), **context),
        InvalidIdError("an execution id must not be empty", position=3, **context),
        ClientClosedError("the client is closed", **context),
    ]


ERRORS = pytest.mark.parametrize("error", one_of_each(), ids=lambda error: type(error).__name__)


def test_one_of_each_is_complete() -> None:
    """The cases below cover every error class."""
    classes = {value for value in vars(kaizen_async.errors).values() if isinstance(value, type)}
    assert {type(error) for error in one_of_each()} == {cls for cls in classes if issubclass(cls, KaizenError)}


@ERRORS
def test_pickling_keeps_everything(error: KaizenError) -> None:
    """An error is unchanged after pickling once and twice, with every protocol."""
    error.gave_up = "the budget is used up"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        restored = error
        for _ in range(2):
            restored = pickle.loads(pickle.dumps(restored, protocol))  # noqa: S301 - our own bytes
            assert type(restored) is type(error)
            assert vars(restored) == vars(error)
            assert restored.args == error.args
            assert str(restored) == str(error)


@ERRORS
@pytest.mark.parametrize("copying", [copy.copy, copy.deepcopy])
def test_copies_are_equal_and_independent(error: KaizenError, copying: Any) -> None:
    """A copy of an error is equal, and changing the copy does not change the original."""
    copied = copying(error)
    assert type(copied) is type(error)
    assert vars(copied) == vars(error)
    assert copied.args == error.args
    copied.execution_id = "exec_2"
    assert error.execution_id == "exec_1"


def test_a_record_inside_an_error_is_pickled_with_it(sample_execution: InstructorExecution) -> None:
    """Pickling a deadline error keeps its last record."""
    error = DeadlineExceededError("its deadline passed", last_execution=sample_execution)
    assert pickle.loads(pickle.dumps(error)).last_execution == sample_execution  # noqa: S301 - our own bytes


def test_the_drawn_tree_is_the_tree() -> None:
    """The tree in the module's docstring, which users read, shows each class under its base."""
    branches = re.findall(r"^    ([│ ├└─]*)(\w+Error)\b", kaizen_async.errors.__doc__ or "", re.MULTILINE)
    path: list[str] = []
    drawn = {}
    for indent, name in branches:
        depth = len(indent) // 4
        path[depth:] = [name]
        drawn[name] = path[depth - 1] if depth else "Exception"
    assert drawn == {type(error).__name__: type(error).__bases__[0].__name__ for error in one_of_each()}


@pytest.mark.parametrize("error", [e for e in one_of_each() if type(e) in {AttemptTimeoutError, DeadlineExceededError}])
def test_both_time_bounds_are_builtin_timeouts(error: KaizenError) -> None:
    """Code that catches TimeoutError catches both timeouts, and can distinguish them."""
    assert isinstance(error, TimeoutError)
    assert isinstance(error, TransportError) is isinstance(error, AttemptTimeoutError)


def test_no_other_error_is_a_builtin_timeout() -> None:
    """Only the two timeout errors are TimeoutErrors."""
    timeouts = {type(error) for error in one_of_each() if isinstance(error, TimeoutError)}
    assert timeouts == {AttemptTimeoutError, DeadlineExceededError}


@pytest.mark.parametrize(
    ("context", "gave_up", "text"),
    [
        ({}, None, "it failed"),
        ({"execution_id": "exec_1"}, None, "exec_1: it failed"),
        ({"execution_id": "exec_1", "attempts": 1}, None, "exec_1: it failed (after 1 attempt)"),
        ({"execution_id": "exec_1", "attempts": 5}, "", "exec_1: it failed (after 5 attempts)"),
        ({"attempts": 2}, "no time is left", "it failed (after 2 attempts); no time is left"),
    ],
)
def test_the_text_of_an_error(context: dict[str, Any], gave_up: str | None, text: str) -> None:
    """One line gives the id, the reason, the attempts, and why there was no further attempt."""
    error = KaizenError("it failed", **context)
    error.gave_up = gave_up
    assert str(error) == text
    assert repr(error) == f"KaizenError({text!r})"
    assert error.reason == "it failed"


def test_a_hostile_id_cannot_forge_log_lines() -> None:
    """The text of an error has no line breaks, terminal escapes or endless ids. The attribute keeps the exact id."""
    hostile = "a\n2026-01-01 ERROR forged\x1b[31m" + "x" * 10_000
    error = KaizenError("it failed", execution_id=hostile)
    assert "\n" not in str(error)
    assert "\x1b" not in str(error)
    assert len(str(error)) < MESSAGE_LIMIT + 50
    assert error.execution_id == hostile


def test_printable_shortens_text_and_replaces_controls() -> None:
    """`printable` keeps short printable text.

    It shortens long text with an ellipsis and replaces control characters.
    """
    assert printable("héllo wörld 執行") == "héllo wörld 執行"
    assert printable("x" * MESSAGE_LIMIT) == "x" * MESSAGE_LIMIT
    cut = printable("x" * (MESSAGE_LIMIT + 1))
    assert len(cut) == MESSAGE_LIMIT
    assert cut.endswith("x…")
    assert printable("a\r\n\tb\u202e\x00") == "a���b��"


@pytest.mark.parametrize(
    ("duration", "text"),
    [(0, "0 s"), (0.25, "0.25 s"), (2, "2 s"), (29.96, "30 s"), (60.0, "60 s"), (3600, "3600 s"), (12345.6, "12346 s")],
)
def test_seconds_are_rounded_for_people(duration: float, text: str) -> None:
    """Durations have at most three digits below a hundred seconds, and whole seconds above."""
    assert seconds(duration) == text


@pytest.mark.parametrize("error", [e for e in one_of_each() if isinstance(e, StatusError | DecodeError)])
def test_an_error_keeps_only_the_beginning_of_a_body(error: StatusError | DecodeError) -> None:
    """An error keeps at most `BODY_LIMIT` bytes of a body, because a program may hold thousands of errors."""
    needed = {"status": error.status} if isinstance(error, StatusError) else {"path": None}
    made = type(error)("no", body=b"x" * 3 * BODY_LIMIT, **needed)  # type: ignore[arg-type]
    assert made.body == b"x" * BODY_LIMIT


def test_defaults_are_the_cautious_ones() -> None:
    """By default, only a transport error is retryable."""
    assert TransportError("x").retryable
    assert AttemptTimeoutError("x").retryable
    assert not StatusError("x", status=400).retryable
    assert not DecodeError("x", path=None).retryable
    assert not DeadlineExceededError("x").retryable
    assert not ClientClosedError("x").retryable
    assert StatusError("x", status=400).retry_after is None
    assert DeadlineExceededError("x").last_execution is None


def details(error: KaizenError) -> dict[str, Any]:
    """Return the attributes that travel as JSON."""
    return {name: value for name, value in vars(error).items() if name != "last_execution"}


@ERRORS
@pytest.mark.parametrize("travel", [lambda args: args, lambda args: json.loads(json.dumps(args))], ids=["args", "json"])
def test_an_error_is_rebuilt_from_its_args(error: KaizenError, travel: Any) -> None:
    """Type, text and attributes of an error survive being rebuilt from its args, as Celery and taskiq do it."""
    error.request_id = "req-1"
    rebuilt = type(error)(*travel(error.args))
    assert type(rebuilt) is type(error)
    assert str(rebuilt) == str(error)
    assert details(rebuilt) == details(error)
    assert rebuilt.args == error.args
    assert error.args[0] == error.reason


@pytest.mark.parametrize("cls", dict.fromkeys(type(error) for error in one_of_each()))
def test_any_error_can_be_made_of_a_text(cls: type[KaizenError]) -> None:
    """Every error class accepts a text alone, because some queues keep only that.

    Its attributes have their defaults.
    """
    error = cls("it failed")
    assert (str(error), error.args, error.execution_id) == ("it failed", ("it failed",), "")
    assert str(cls()) == ""


def test_unknown_details_are_ignored() -> None:
    """An error ignores unknown details, because the content of a queue is untrusted input."""
    error = StatusError("it failed", {"__class__": 5, "with_traceback": 1, "status": 500})
    assert error.args == ("it failed", {"status": 500})


def test_the_args_of_an_error_may_be_replaced() -> None:
    """Replacing the args of an error changes its text, as some tools do to add to it."""
    error = StatusError("it failed", status=500)
    error.args = ("it failed again",)
    assert (error.reason, error.status) == ("it failed again", 500)
    error.args = ()
    assert error.reason == ""


def test_the_text_names_the_request() -> None:
    """The text of an error has the request id, so that a user can give it to the server's support."""
    error = StatusError("it failed", status=500, attempts=2)
    error.request_id = "8f14\n"
    assert str(error) == "it failed (after 2 attempts, request id 8f14�)"

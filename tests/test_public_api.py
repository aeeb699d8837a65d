"""The public API: names, signatures, the effect of each setting, and the direction of imports."""

import ast
import importlib
import inspect
import itertools
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from scripted_transport import Reply, ScriptedTransport, health_of, record, status
from virtual_time import virtual_time

import kaizen_async
from kaizen_async import ClientStats, KaizenClient, KaizenError, RetryPolicy
from kaizen_async._transport.transport import Answer

PACKAGE = Path(kaizen_async.__file__).parent


def test_the_public_names() -> None:
    """The public names match this list, so that adding or removing a name is a deliberate change."""
    assert kaizen_async.__all__ == [
        "AttemptTimeoutError",
        "Authentication",
        "AuthenticationError",
        "AuthenticationStatus",
        "Change",
        "ChangeStream",
        "ClientClosedError",
        "ClientStats",
        "ConnectionPolicy",
        "ContextAuthentication",
        "ContextAuthenticationStatus",
        "DeadlineExceededError",
        "DecodeError",
        "ExecutionStatus",
        "Executions",
        "Found",
        "HedgePolicy",
        "InstructorExecution",
        "InvalidIdError",
        "KaizenClient",
        "KaizenError",
        "Login",
        "LoginSummary",
        "LookupFailed",
        "NotFoundError",
        "Outcome",
        "OutcomeStream",
        "PollPolicy",
        "RateLimitError",
        "Record",
        "RetryPolicy",
        "Seen",
        "StatusError",
        "TransportError",
        "WaitStream",
        "WatchFailed",
        "Workflow",
        "WorkflowExecution",
        "__version__",
        "to_columns",
    ]


@pytest.mark.parametrize("name", kaizen_async.__all__)
def test_a_public_name_is_there_and_documented(name: str) -> None:
    """Every public name exists and has a docstring."""
    thing = getattr(kaizen_async, name)
    assert isinstance(thing, str) or inspect.getdoc(thing)


PUBLIC_MODULES = ["events", "otel", "testing", "workers"]
"""Modules from which users import names, besides the package itself. Each lists its public names in `__all__`."""


def test_the_reference_shows_every_public_name_and_no_other() -> None:
    """The reference lists exactly the public names. A module in the reference stands for its `__all__`."""
    reference = Path(__file__).parents[1] / "docs" / "reference.md"
    shown = re.findall(r"^::: kaizen_async\.(\S+)$", reference.read_text(), re.MULTILINE)
    assert len(shown) == len(set(shown))
    assert {name for name in kaizen_async.__all__ if not name.startswith("__")} | set(PUBLIC_MODULES) == set(shown)


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_every_public_module_has_valid_exports(module: str) -> None:
    """Each name in a public module's `__all__` exists, and each class has a docstring."""
    imported = importlib.import_module(f"kaizen_async.{module}")
    for name in imported.__all__:
        thing = getattr(imported, name)
        assert not isinstance(thing, type) or inspect.getdoc(thing)


def test_every_error_is_public() -> None:
    """Every error class is public, so that users can catch it."""
    errors = {
        name
        for name, value in vars(kaizen_async.errors).items()
        if isinstance(value, type) and issubclass(value, KaizenError)
    }
    assert errors <= set(kaizen_async.__all__)


def parameters(function: Any) -> dict[str, Any]:
    """Return the parameters of a method with their defaults."""
    signature = inspect.signature(function)
    return {name: p.default for name, p in signature.parameters.items() if name != "self"}


def test_the_settings_of_the_client() -> None:
    """The client's settings match this list, and all but the key are keyword-only."""
    settings = parameters(KaizenClient)
    assert list(settings) == [
        "api_key",
        "base_url",
        "concurrency",
        "attempt_timeout",
        "deadline",
        "retry",
        "poll",
        "hedge",
        "max_response_bytes",
        "connection_max_age",
        "connections",
        "ended_records",
        "keep_raw",
        "session",
        "ssl_context",
        "proxy",
        "trust_env",
        "allow_insecure_http",
        "headers",
        "request_id_headers",
        "limiter",
        "on_event",
        "clock",
    ]
    assert settings["concurrency"] == 50
    assert settings["attempt_timeout"] == 30.0
    assert settings["deadline"] == 60.0
    kinds = [p.kind for p in inspect.signature(KaizenClient).parameters.values()]
    assert kinds[1:] == [inspect.Parameter.KEYWORD_ONLY] * (len(kinds) - 1)


@pytest.mark.parametrize(
    ("verb", "names"),
    [
        ("get", ["execution_id", "deadline", "retry", "max_age"]),
        ("get_many", ["ids", "deadline", "retry"]),
        ("stream", ["ids", "deadline", "retry", "checkpoint"]),
        ("wait", ["execution_id", "deadline", "poll"]),
        ("wait_many", ["ids", "deadline", "poll", "checkpoint"]),
        ("watch", ["ids", "deadline", "poll"]),
    ],
)
def test_the_parameters_of_the_methods(verb: str, names: list[str]) -> None:
    """Each method's parameters match this list, and all but the ids are keyword-only."""
    method = getattr(kaizen_async.Executions, verb)
    assert list(parameters(method)) == names
    kinds = [p.kind for p in inspect.signature(method).parameters.values()]
    assert kinds[2:] == [inspect.Parameter.KEYWORD_ONLY] * (len(kinds) - 2)


def test_the_snapshot_of_a_client_is_plain_numbers() -> None:
    """The stats of a client are plain numbers, so that they can be logged and exported."""
    stats = KaizenClient().stats()
    assert isinstance(stats, ClientStats)
    assert stats.by_path == {}
    assert stats.health == "healthy"
    for name in set(stats.__struct_fields__) - {"by_path", "health"}:
        assert isinstance(getattr(stats, name), int | float | None)


async def requests_under(policy: RetryPolicy, replies: list[Answer], tokens: int) -> list[float]:
    """Return the times of the requests for one execution under a policy.

    Each reply comes once, and then records follow.
    """

    def play(execution_id: str, number: int) -> Reply:
        return replies[number - 1] if number <= len(replies) else record(execution_id)

    transport = ScriptedTransport(play, latency=0)
    async with transport.client(deadline=None) as client:
        client._binding.random.uniform = lambda _, high: high  # type: ignore[method-assign]
        health_of(client)._budget = tokens
        (outcome,) = await client.instructor_executions.get_many(["a"], retry=policy)
        assert outcome.attempts == len(transport.sent)
        return transport.times


BROKEN = status(500)

RETRY_FIELDS: dict[str, tuple[RetryPolicy, list[Answer], int, list[float]]] = {
    "max_attempts": (RetryPolicy(max_attempts=2), [BROKEN] * 9, 100, [0, 0.25]),
    "initial_backoff": (RetryPolicy(initial_backoff=1), [BROKEN] * 2, 100, [0, 1, 3]),
    "max_backoff": (RetryPolicy(max_backoff=0.3), [BROKEN] * 3, 100, [0, 0.25, 0.55, 0.85]),
    "statuses": (RetryPolicy(statuses=frozenset({404})), [status(404), BROKEN], 100, [0, 0.25]),
    "budgeted": (RetryPolicy(budgeted=False), [BROKEN], 0, [0, 0.25]),
}
"""For each field: a policy, the replies before a record, the budget that is left, and the times of the requests."""


def test_every_field_of_the_retry_policy_has_a_case() -> None:
    """Every field of the retry policy has a case above."""
    assert set(RETRY_FIELDS) == set(RetryPolicy.__struct_fields__)


@pytest.mark.parametrize("field", RETRY_FIELDS)
def test_every_field_of_the_retry_policy_changes_what_happens(field: str) -> None:
    """Each field changes the number or the times of the requests, compared with the default policy."""
    policy, replies, tokens, times = RETRY_FIELDS[field]

    @virtual_time
    async def play() -> None:
        assert await requests_under(policy, replies, tokens) == times
        assert await requests_under(RetryPolicy(), replies, tokens) != times

    play()


LAYERS = [
    ["__init__"],
    ["client"],
    ["executions"],
    ["_binding", "_waiting.streams", "_waiting.waiter"],
    ["_waiting.scheduler"],
    ["_waiting.turns", "_waiting.disturbance"],
    ["_waiting.calls", "_waiting.verdict", "_waiting.silence"],
    ["_lookup.lookup"],
    ["_bulk", "_lookup.engine", "_lookup.hedge", "otel", "_lookup.retry"],
    ["_lookup.health"],
    ["_streams", "events", "_lookup.verdicts"],
    ["_ledger", "tables"],
    [
        "_kinds",
        "_waiting.cadence",
        "_waiting.memory",
        "_waiting.timetable",
        "outcomes",
        "_lookup.evidence",
        "_lookup.pace",
        "_transport.transport",
        "_transport.wire",
        "_ids",
    ],
    ["_transport.pool", "_transport.session", "_waiting.poll_rules"],
    ["_transport.connection", "_transport.key"],
    ["_transport.capacity"],
    ["_transport.failures"],
    [
        "clock",
        "config",
        "_lookup.received",
        "_transport.reading",
        "_transport.request_id",
        "_transport.statuses",
        "_waiting.entry",
        "models",
        "stats",
    ],
    ["_records.base", "_transport.encodings", "_transport.head", "_transport.proxies", "_transport.resolver"],
    ["_records.facts", "_records.schema", "_records.tolerance", "_transport.response", "_transport.trace"],
    ["errors", "_transport.withhold"],
]
"""The modules in layers. Each module imports only from lower layers. A lookup passes through them from the top down."""

BESIDE = {"_cli", "testing", "workers"}
"""Folders beside the library, from which the library imports nothing."""


def imports_of(module: str) -> set[str]:
    """Return the full names of all modules that a module of the package imports, anywhere in its code."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found.add(node.module or "")
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_every_module_has_its_layer() -> None:
    """Every module of the library is in one layer. The command, the emulator and the workers are outside."""
    paths = (path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))
    modules = {".".join(path.parts) for path in paths if path.parts[0] not in BESIDE}
    modules = {module for module in modules if not module.endswith(".__init__")} - {"__main__"}
    assert sorted(itertools.chain(*LAYERS)) == sorted(modules)


@pytest.mark.parametrize("depth", range(len(LAYERS)))
def test_imports_go_down_only(depth: int) -> None:
    """A module imports only from lower layers, so there are no circular imports."""
    below = {f"kaizen_async.{module}" for layer in LAYERS[depth + 1 :] for module in layer}
    for module in LAYERS[depth]:
        own = {name for name in imports_of(module) if name.split(".")[0] == "kaizen_async"}
        assert own <= below, f"{module} imports {own - below}"


@pytest.mark.parametrize(
    ("library", "modules"),
    [
        ("tenacity", {"_lookup.retry"}),
        (
            "aiohttp",
            {
                "client",
                "_binding",
                "_transport.connection",
                "_transport.encodings",
                "_transport.failures",
                "_transport.pool",
                "_transport.reading",
                "_transport.resolver",
                "_transport.session",
                "_transport.transport",
                "otel",
            },
        ),
        ("opentelemetry", {"otel"}),
        ("uvloop", set()),
        ("click", set()),
        ("pydantic", {"_records.schema"}),
        ("pydantic_core", {"_records.schema"}),
    ],
)
def test_few_modules_import_each_dependency(library: str, modules: set[str]) -> None:
    """Only the listed modules import each dependency, so that changes of its API affect few files."""
    users = {
        module for layer in LAYERS for module in layer if any(n.split(".")[0] == library for n in imports_of(module))
    }
    assert users == modules


PURE = [
    "_records.base",
    "_records.schema",
    "_records.tolerance",
    "_transport.wire",
    "_transport.statuses",
    "_lookup.verdicts",
    "_lookup.evidence",
    "_lookup.pace",
    "_lookup.health",
    "models",
    "config",
    "errors",
    "outcomes",
    "stats",
    "_waiting.cadence",
    "_waiting.poll_rules",
]


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_import_no_event_loop(module: str) -> None:
    """Modules that need no event loop import neither asyncio nor aiohttp, so that tests can use plain values."""
    assert not {name.split(".")[0] for name in imports_of(module)} & {"asyncio", "aiohttp", "tenacity"}


def test_importing_the_library_loads_no_extras() -> None:
    """Importing the library loads neither the command, the emulator and the workers nor packages of extras."""
    script = "import sys, kaizen_async; print(*sorted(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=20, check=True)  # noqa: S603 - our own
    loaded = set(ran.stdout.split())
    assert "kaizen_async.client" in loaded
    assert not {name for name in loaded if name.split(".")[1:2] in (["testing"], ["_cli"], ["workers"])}
    assert not loaded & {"click", "rich", "pytest", "uvloop", "aiohttp.web", "aioresponses", "opentelemetry"}

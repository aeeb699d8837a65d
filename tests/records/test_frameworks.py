"""Records and errors work in frameworks, tables and task queues, with the real packages.

Packages that are not in the extra `test` are in the extra `frameworks`. Their tests are marked as examples, which the
gate runs with all extras. Without the extra, they are skipped with a reason.
"""

import importlib
import json
import math
import re
import sys
import types
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pydantic
import pytest
from aiohttp.test_utils import TestClient, TestServer
from fastapi import Body, FastAPI
from fastapi.encoders import jsonable_encoder
from fastapi.testclient import TestClient as FastAPIClient

from kaizen_async import (
    DeadlineExceededError,
    ExecutionStatus,
    Found,
    InstructorExecution,
    KaizenClient,
    LookupFailed,
    NotFoundError,
    Outcome,
    Record,
    Workflow,
    WorkflowExecution,
    to_columns,
)
from kaizen_async._transport.wire import Endpoint
from kaizen_async.testing import KaizenEmulator, Life

SENT = {
    **json.loads((Path(__file__).parents[1] / "samples" / "documented.json").read_bytes()),
    "durationMs": 123,
    "params": {"a": [1, None]},
}
BODY = json.dumps(SENT).encode()
EXECUTION = Endpoint("instructor/executions/get", InstructorExecution).decode(BODY, SENT["id"])


def needs(name: str) -> Any:
    """Return a module of the extra `frameworks`, or skip."""
    return pytest.importorskip(name, reason=f"{name} is not installed: pip install -e '.[frameworks]'")


def recipe(title: str) -> types.ModuleType:
    """Run the code under a heading of docs/web-apps.md, and return its definitions as a module."""
    document = (Path(__file__).parents[2] / "docs" / "web-apps.md").read_text()
    found = re.search(rf"^## {re.escape(title)}$.*?^```python\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)
    assert found is not None
    module = types.ModuleType(f"recipe_{title.split(maxsplit=1)[0].lower().replace('.', '_')}")
    sys.modules[module.__name__] = module  # frameworks look up annotations and routes in it
    exec(compile(found[1], title, "exec"), vars(module))  # noqa: S102 - the documentation is ours
    return module


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[KaizenEmulator]:
    """Serve an emulator in which every execution exists, and put its URL into the environment."""
    with KaizenEmulator(default_life=Life.ended().with_fields({"beyond": [1]})) as emulator:
        monkeypatch.setenv("KAIZEN_BASE_URL", emulator.base_url)
        monkeypatch.setenv("KAIZEN_API_KEY", "sk-test-key")
        yield emulator


def assert_whole(fields: dict[str, Any]) -> None:
    """Fail if a response lacks a field."""
    assert fields["id"] == "exec_1"
    assert fields["beyond"] == [1]
    assert fields["isRecording"] in {True, False}


# FastAPI and pydantic.


def test_fastapi_returns_records_in_every_annotation() -> None:
    """FastAPI returns a record as the server sent it, with unknown fields and whole numbers, for every annotation."""
    app = FastAPI()

    @app.get("/annotated")
    async def annotated() -> InstructorExecution:
        return EXECUTION

    @app.get("/listed")
    async def listed() -> list[InstructorExecution]:
        return [EXECUTION]

    @app.get("/united")
    async def united() -> InstructorExecution | None:
        return EXECUTION

    @app.get("/either")
    async def either() -> WorkflowExecution | InstructorExecution:
        return EXECUTION

    @app.get("/plain")
    async def plain():  # type: ignore[no-untyped-def]  # noqa: ANN202 - many handlers have no annotation
        return EXECUTION

    @app.get("/within")
    async def within() -> dict[str, Any]:
        return {"record": EXECUTION}

    @app.get("/model", response_model=InstructorExecution)
    async def model() -> Any:
        return EXECUTION

    @app.post("/back")
    async def back(execution: Annotated[InstructorExecution, Body()]) -> bool:
        return execution == EXECUTION

    with FastAPIClient(app) as client:
        for path in ("annotated", "united", "either", "plain", "model"):
            assert client.get(f"/{path}").json() == SENT, path
        assert client.get("/listed").json() == [SENT]
        assert client.get("/within").json() == {"record": SENT}
        assert '"durationMs":123,' in client.get("/annotated").text
        assert client.post("/back", json=SENT).json() is True
        assert client.post("/back", json={"id": 5}).status_code == 422
        schemas = client.get("/openapi.json").json()["components"]["schemas"]
    described = schemas["InstructorExecution"]
    properties = described["properties"]
    assert set(properties) == {*SENT, "sessionId"} - {"params"}
    assert properties["workflow"] == {"$ref": "#/components/schemas/Workflow"}
    assert properties["startTime"] == {"type": "string", "format": "date-time", "title": "Starttime"}
    assert [kind["type"] for kind in properties["endTime"]["anyOf"]] == ["string", "null"]
    assert [kind["type"] for kind in properties["durationMs"]["anyOf"]] == ["number", "null"]
    assert properties["status"]["type"] == "string"
    assert described["description"].startswith("One instructor execution")
    assert set(described["required"]) == set(properties) - {"sessionId"}
    assert jsonable_encoder(EXECUTION) == SENT
    assert jsonable_encoder({"a": [EXECUTION]}) == {"a": [SENT]}


def test_pydantic_reads_and_writes_records() -> None:
    """Pydantic reads and writes records as fields and in a TypeAdapter, from Python and from JSON."""

    class Report(pydantic.BaseModel):
        execution: InstructorExecution
        workflow: Workflow
        status: ExecutionStatus
        anything: Any = None

    report = Report(
        execution=EXECUTION, workflow=EXECUTION.workflow, status=ExecutionStatus("Zorp"), anything=EXECUTION
    )
    assert report.execution is EXECUTION
    written = json.loads(report.model_dump_json())
    assert written["execution"] == written["anything"] == SENT
    assert written["workflow"] == SENT["workflow"]
    assert report.model_dump()["status"] == "Zorp"
    again = Report.model_validate_json(report.model_dump_json())
    assert again.execution == EXECUTION
    assert again.execution.extra == EXECUTION.extra
    assert Report.model_validate({**written, "execution": SENT}).execution.to_dict() == SENT

    adapter = pydantic.TypeAdapter(list[InstructorExecution])
    assert adapter.validate_json(adapter.dump_json([EXECUTION])) == [EXECUTION]
    assert adapter.validate_python(adapter.dump_python([EXECUTION])) == [EXECUTION]
    with pytest.raises(pydantic.ValidationError, match=r"Expected `str`, got `int` - at `\$.id`"):
        adapter.validate_json(b'[{"id": 5, "status": "x", "endTime": null}]')
    with pytest.raises(pydantic.ValidationError):
        adapter.validate_python([5])


# Recipes.


def test_fastapi_recipe(served: KaizenEmulator) -> None:
    """The typed FastAPI handler of the documentation returns the whole record."""
    with FastAPIClient(recipe("Records as return values").app) as client:
        assert_whole(client.get("/typed/exec_1").json())


@pytest.mark.example
def test_litestar_recipe(served: KaizenEmulator) -> None:
    """The Litestar recipe returns the whole record and describes it in its schema."""
    testing = needs("litestar.testing")
    with testing.TestClient(recipe("Litestar").app) as client:
        assert_whole(client.get("/executions/exec_1").json())
        schemas = client.get("/schema/openapi.json").json()["components"]["schemas"]
    assert "endTime" in schemas["InstructorExecution"]["properties"]


@pytest.mark.example
async def test_django_recipe(served: KaizenEmulator) -> None:
    """The async Django view returns the whole record to an ASGI client."""
    django = needs("django")
    needs("django.conf").settings.configure(SECRET_KEY="x", ROOT_URLCONF="recipe_django", ALLOWED_HOSTS=["*"])
    django.setup()
    kaizen: KaizenClient = recipe("Django").kaizen
    async with kaizen:
        response = await importlib.import_module("django.test").AsyncClient().get("/executions/exec_1")
    assert response.headers["Content-Type"] == "application/json"
    assert_whole(response.json())


async def test_aiohttp_recipe(served: KaizenEmulator) -> None:
    """The aiohttp.web recipe opens the client in a cleanup context and returns the whole record."""
    async with TestClient(TestServer(recipe("aiohttp.web").app)) as client:
        response = await client.get("/executions/exec_1")
        assert_whole(await response.json())


@pytest.mark.example
def test_flask_recipe(served: KaizenEmulator) -> None:
    """The Flask recipe creates one client for each request and leaves no socket open."""
    needs("flask")
    client = recipe("Flask").app.test_client()
    assert_whole(client.get("/executions/exec_1").get_json())
    assert_whole(client.get("/executions/exec_1").get_json())


# Tables.


@pytest.fixture
async def outcomes() -> list[Outcome[InstructorExecution]]:
    """Return one outcome of each kind, with the failed one first."""
    async with KaizenEmulator(default_life=Life.ended(duration=5)) as emulator:
        emulator.add("running", Life.running())
        async with KaizenClient(base_url=emulator.base_url) as kaizen:
            found = await kaizen.instructor_executions.get_many(["ended", "running"])
    failed: Outcome[InstructorExecution] = LookupFailed("gone", None, NotFoundError("gone", status=404), 1, 0.5, "r-1")
    return [failed, *found]


@pytest.mark.example
def test_a_pandas_table(outcomes: list[Outcome[InstructorExecution]]) -> None:
    """A pandas table of outcomes has time columns and error columns."""
    pandas = needs("pandas")
    table = pandas.DataFrame(to_columns(outcomes))
    assert list(table["id"]) == ["gone", "ended", "running"]
    assert str(table["end_time"].dtype).startswith("datetime64[")
    assert table["error_type"].iloc[0] == "NotFoundError"
    assert table["request_id"].iloc[0] == "r-1"
    assert table[table.succeeded == True].id.tolist() == ["ended"]  # noqa: E712 - as pandas writes it
    assert {"workflow_name", "logins_count", "duration_ms", "error"} <= set(table.columns)


@pytest.mark.example
def test_a_polars_table(outcomes: list[Outcome[InstructorExecution]]) -> None:
    """A polars table has the right column types even if its first hundreds of rows have no values."""
    polars = needs("polars")
    table = polars.DataFrame(to_columns([outcomes[0]] * 500 + outcomes[1:]))
    assert table.schema["end_time"] == polars.Datetime("us", "UTC")
    assert table.schema["duration_ms"] == polars.Float64
    assert table.schema["succeeded"] == polars.Boolean
    assert table["status"].to_list()[-2:] == ["Completed", "InProgress"]


@pytest.mark.example
def test_a_pyarrow_table(outcomes: list[Outcome[InstructorExecution]]) -> None:
    """A pyarrow table has the same columns."""
    pyarrow = needs("pyarrow")
    table = pyarrow.table(to_columns(outcomes))
    assert table.column_names == list(to_columns(outcomes))
    assert table.schema.field("start_time").type == pyarrow.timestamp("us", tz="UTC")
    assert table.to_pylist()[0]["error"].startswith("gone")


def test_columns_are_flat_and_complete(outcomes: list[Outcome[InstructorExecution]]) -> None:
    """Every column has a value for every outcome, and the columns about the lookup come last."""
    columns = to_columns(outcomes)
    assert {len(column) for column in columns.values()} == {3}
    assert columns["status"] == [None, "Completed", "InProgress"]
    assert columns["succeeded"] == [None, True, None]
    assert list(columns)[:3] == ["id", "workflow_id", "workflow_name"]
    assert list(columns)[-2:] == ["error_type", "error"]


def test_columns_of_other_record_types() -> None:
    """Every field of a record type of the caller becomes one column, with one value for each row."""

    class Odd(Record, frozen=True, gc=False, kw_only=True):
        id: str
        at: datetime
        number: float | int
        error: str
        options: dict[str, int]
        nothing: None = None

    minute = timedelta(minutes=1)
    ends = [datetime(9999, 12, 31, 23, 59, 59), datetime(9999, 12, 31, 23, 59, tzinfo=timezone(-minute))]  # noqa: DTZ001 - a server may send it
    records = [
        Odd(id="a", at=ends[0], number=10**400, error="e", options={"x": 1}),
        Odd(id="b", at=ends[1], number=-(10**400), error="f", options={}),
    ]
    columns = to_columns([Found(record.id, record, None, 1, 0.0) for record in records])
    assert columns["number"] == [math.inf, -math.inf]
    assert columns["execution_error"] == ["e", "f"]
    assert columns["error"] == [None, None]
    assert columns["options"] == ['{"x":1}', "{}"]
    assert columns["at"] == [moment.replace(tzinfo=UTC) for moment in ends]
    assert to_columns([]) == {}


# Task queues.


def error_of_a_task() -> DeadlineExceededError:
    """Return an error with all attributes that JSON can hold."""
    error = DeadlineExceededError("it had not ended when the deadline passed", execution_id="exec_1", attempts=3)
    error.request_id = "r-1"
    return error


@pytest.mark.example
@pytest.mark.parametrize("serializer", ["json", "pickle"])
def test_celery_returns_errors_and_records(serializer: str) -> None:
    """A Celery result backend stores errors and records, and its result raises the error of the task."""
    celery = needs("celery")
    app = celery.Celery("test", backend="cache+memory://", broker="memory://")
    app.conf.update(result_serializer=serializer, accept_content=[serializer], result_accept_content=[serializer])
    backend = app.backend
    failed, done = f"failed-{serializer}", f"done-{serializer}"  # all in-memory caches are shared
    backend.mark_as_failure(failed, error_of_a_task(), traceback="")
    raised = app.AsyncResult(failed).result
    assert type(raised) is DeadlineExceededError
    assert str(raised) == str(error_of_a_task())
    assert (raised.execution_id, raised.attempts, raised.request_id) == ("exec_1", 3, "r-1")
    backend.mark_as_done(done, EXECUTION)
    returned = app.AsyncResult(done).result
    record = returned if serializer == "pickle" else InstructorExecution.from_dict(returned)
    assert record == EXECUTION
    assert record.to_dict() == SENT


@pytest.mark.parametrize("serializer", ["JSONSerializer", "PickleSerializer"])
def test_taskiq_returns_errors_and_records(serializer: str) -> None:
    """Errors and records survive the serialised form of taskiq's result backends."""
    form = getattr(needs("taskiq.serializers"), serializer)()
    result_type = needs("taskiq").TaskiqResult[Any]
    sent = result_type(is_err=True, return_value=EXECUTION, execution_time=0.1, error=error_of_a_task())
    again = result_type.model_validate(form.loadb(form.dumpb(sent.model_dump(mode="json"))))
    assert type(again.error) is DeadlineExceededError
    assert str(again.error) == str(error_of_a_task())
    assert InstructorExecution.from_dict(again.return_value) == EXECUTION


def test_serializers_find_their_protocols() -> None:
    """`dict` and the `__json__` of Celery and Pyramid return all fields. msgspec encodes the typed fields."""
    assert dict(EXECUTION) == EXECUTION.__json__() == SENT
    assert set(msgspec.json.decode(msgspec.json.encode(EXECUTION))) == set(SENT) - {"params"}

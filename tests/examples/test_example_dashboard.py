"""The example dashboard works in a real uvicorn, over real HTTP, and in a real browser."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest

from kaizen_async.testing import Fault, KaizenEmulator, Life

pytest.importorskip("fastapi.sse", reason="pip install 'kaizen-async[examples]'")
pytest.importorskip("uvicorn", reason="pip install 'kaizen-async[examples]'")

pytestmark = [pytest.mark.example, pytest.mark.timeout(120)]

FOLDER = Path(__file__).parents[2] / "examples" / "fastapi_dashboard"
PATIENCE = 30.0
VIEWERS = 200
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CHROMIUM_FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Dashboard(NamedTuple):
    """A running app."""

    url: str
    process: subprocess.Popen[str]


@contextmanager
def serving(base_url: str, **settings: str) -> Iterator[Dashboard]:
    """Serve the app in its own process until the end of the block."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        # The child inherits the listening socket, so the port cannot be taken and no request comes too early.
        command = [sys.executable, "-m", "uvicorn", "app:app", "--fd", str(listener.fileno()), "--log-level", "warning"]
        process = subprocess.Popen(  # noqa: S603 - our own
            command,
            cwd=FOLDER,
            env={**os.environ, "KAIZEN_BASE_URL": base_url, **settings},
            pass_fds=[listener.fileno()],
            stderr=subprocess.PIPE,
            text=True,
        )
    try:
        yield Dashboard(f"http://127.0.0.1:{port}", process)
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def dashboard(emulator: KaizenEmulator) -> Iterator[Dashboard]:
    """Return a running app that uses the emulator of the test."""
    with serving(emulator.base_url) as running:
        yield running


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """Return a session without a limit of connections."""
    timeout = aiohttp.ClientTimeout(total=PATIENCE)
    async with aiohttp.ClientSession(timeout=timeout, connector=aiohttp.TCPConnector(limit=0)) as session:
        yield session


async def events_in(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, Any]]:
    """Yield the name and the data of each server-sent event."""
    name = ""
    async for line in response.content:
        field, _, value = line.decode().strip().partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            yield name, json.loads(value)


async def watched(http: aiohttp.ClientSession, dashboard: Dashboard, *ids: str) -> list[tuple[str, Any]]:
    """Return all events about some executions, after the stream has ended."""
    async with http.get(f"{dashboard.url}/changes", params=[("id", one) for one in ids]) as response:
        assert response.content_type == "text/event-stream"
        return [event async for event in events_in(response)]


async def until(holds: Callable[[], Any]) -> None:
    """Wait for an awaitable condition to hold."""
    deadline = time.monotonic() + PATIENCE
    while not await holds():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def test_a_lookup_returns_the_record(
    emulator: KaizenEmulator, dashboard: Dashboard, http: aiohttp.ClientSession
) -> None:
    """The app returns a record with the API's field names."""
    emulator.add("exec_1", workflow="Import invoices")
    async with http.get(f"{dashboard.url}/executions/exec_1") as response:
        assert response.status == 200
        record = await response.json()
    assert record["id"] == "exec_1"
    assert record["workflow"]["name"] == "Import invoices"
    assert record["endTime"]


@pytest.mark.parametrize(
    ("fault", "status", "retry_after"),
    [
        (None, 404, None),
        (Fault.status(401), 502, None),
        (Fault.status(400), 502, None),
        (Fault.reset(), 502, None),
        (Fault.status(429, headers={"Retry-After": "60"}), 503, "60"),
        (Fault.status(503, headers={"Retry-After": "7"}), 503, "7"),
        (Fault.hang(), 504, None),
    ],
    ids=["unknown", "key refused", "refused", "reset", "throttled", "unavailable", "hanging"],
)
async def test_an_error_has_the_right_status(
    emulator: KaizenEmulator, http: aiohttp.ClientSession, fault: Fault | None, status: int, retry_after: str | None
) -> None:
    """The app responds to an error with a fitting status, the reason, and the API's Retry-After if there is one."""
    if fault is not None:
        emulator.faults.always(fault)
    # Without a Retry-After, all attempts fit into the time. One that did not would give a Retry-After too.
    with serving(emulator.base_url, LOOK_UP_SECONDS="10" if status == 502 else "2") as dashboard:
        async with http.get(f"{dashboard.url}/executions/exec_1") as response:
            assert response.status == status
            assert response.headers.get("Retry-After") == retry_after
            assert (await response.json())["detail"].startswith("exec_1: ")


async def test_a_watch_sends_changes_until_all_have_ended(
    emulator: KaizenEmulator, dashboard: Dashboard, http: aiohttp.ClientSession
) -> None:
    """The stream sends the error of an execution that cannot be looked up, and continues to watch the others."""
    emulator.add("exec_1", Life.of(("Enqueued", 0), ("Zorp", 1), ("Completed", 2)))
    events = await watched(http, dashboard, "exec_1", "nobody")
    rows = [data for name, data in events if name == "change"]
    statuses = [row["execution"]["status"] for row in rows if row["id"] == "exec_1"]
    life = ["Enqueued", "Zorp", "Completed"]  # a busy machine may miss some
    assert statuses == [status for status in life if status in statuses], (
        "in the order of its life; a busy machine may miss some"
    )
    assert statuses[-1] == "Completed"
    assert [row["error"] is None for row in rows if row["id"] == "nobody"] == [False]
    assert events[-1] == ("done", 2)


async def test_without_ids_there_is_nothing_to_watch(dashboard: Dashboard, http: aiohttp.ClientSession) -> None:
    """The app refuses a watch without ids."""
    async with http.get(f"{dashboard.url}/changes") as response:
        assert response.status == 422


@pytest.mark.parametrize("ids", [["a b"], ["../x"], ["x" * 129], ["a"] * 5001, []])
async def test_ids_of_strangers_are_bounded(dashboard: Dashboard, http: aiohttp.ClientSession, ids: list[str]) -> None:
    """The app refuses invalid ids, too many ids and foreign hosts before it sends a request."""
    async with http.post(f"{dashboard.url}/changes", json={"ids": ids}) as response:
        assert response.status == 422
    async with http.get(f"{dashboard.url}/", headers={"Host": "evil.example"}) as response:
        assert response.status == 400
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]


@pytest.mark.parametrize(
    "ids", ["[NaN]", '["\\ud800"]', '["\\u0000"]', json.dumps(["x" * 100] * 9000)], ids=lambda ids: ids[:9]
)
async def test_what_a_stranger_sends_is_not_repeated(
    dashboard: Dashboard, http: aiohttp.ClientSession, ids: str
) -> None:
    """It may be no text, and it may be a megabyte."""
    headers = {"Content-Type": "application/json"}
    async with http.post(f"{dashboard.url}/changes", data=f'{{"ids": {ids}}}', headers=headers) as response:
        assert response.status == 422
        assert len(await response.read()) < 1000


async def test_pages_of_other_sites_take_no_place(
    dashboard: Dashboard, emulator: KaizenEmulator, http: aiohttp.ClientSession
) -> None:
    """A browser says when another site's page sends a request. The app refuses it before it takes a place."""
    for site in ("cross-site", "same-site"):
        headers = {"Sec-Fetch-Site": site}
        async with http.get(f"{dashboard.url}/changes?id=exec_1", headers=headers) as response:
            assert response.status == 403
        async with http.post(f"{dashboard.url}/changes", json={"ids": ["exec_1"]}, headers=headers) as response:
            assert response.status == 403
        async with http.get(f"{dashboard.url}/", headers=headers) as response:
            assert response.status == 200  # a link to the dashboard
    assert emulator.request_count == 0


async def test_thousands_can_be_watched(emulator: KaizenEmulator, http: aiohttp.ClientSession) -> None:
    """A POST watches thousands of ids, and the app refuses further pages with a 503."""
    ids = [f"exec_{number}" for number in range(5000)]
    emulator.add_many(ids, Life.ended())
    with serving(emulator.base_url, MOST_WATCHED="5000", POLLS_PER_SECOND="10000") as dashboard:
        async with http.post(f"{dashboard.url}/changes", json={"ids": ids}) as response:
            assert response.status == 200
            async with http.get(f"{dashboard.url}/changes", params={"id": "one"}) as refused:
                assert refused.status == 503
                assert refused.headers["Retry-After"]
            events = [event async for event in events_in(response)]
    assert len({data["id"] for name, data in events if name == "change"}) == 5000
    assert events[-1] == ("done", 5000)


async def test_many_viewers_cost_the_polls_of_one(
    emulator: KaizenEmulator, dashboard: Dashboard, http: aiohttp.ClientSession
) -> None:
    """All viewers see the end, and the emulator receives as many polls as for one viewer."""
    ids = [f"exec_{number}" for number in range(5)]
    emulator.add_many(ids, Life.lasting(5))
    everything = await asyncio.gather(*(watched(http, dashboard, *ids) for _ in range(VIEWERS)))
    for events in everything:
        ended = {data["id"] for name, data in events if name == "change" and data["execution"]["endTime"]}
        assert ended == set(ids)
    # Polls are at least a second apart, and a slow machine does not add any.
    assert max(emulator.requests_for(one) for one in ids) < 20 < VIEWERS


async def test_a_viewer_who_leaves_ends_the_watch(
    emulator: KaizenEmulator, dashboard: Dashboard, http: aiohttp.ClientSession
) -> None:
    """The app stops polling when its last viewer leaves."""
    emulator.add("exec_1", Life.running())

    async def waiting() -> int:
        async with http.get(f"{dashboard.url}/stats") as response:
            stats: dict[str, int] = await response.json()
            return stats["waiting"]

    async with http.get(f"{dashboard.url}/changes", params={"id": "exec_1"}) as response:
        assert await anext(events_in(response))
        assert await waiting() == 1

    async def left() -> bool:
        return await waiting() == 0

    await until(left)


async def test_the_server_stops_with_pages_open(
    emulator: KaizenEmulator, dashboard: Dashboard, http: aiohttp.ClientSession
) -> None:
    """On SIGTERM the server ends open streams without `done`, so that browsers reconnect, and prints no complaint."""
    emulator.add("exec_1", Life.running())
    async with http.get(f"{dashboard.url}/changes", params={"id": "exec_1"}) as response:
        events = events_in(response)
        assert [(await anext(events))[0] for _ in range(2)] == ["upstream", "change"]
        dashboard.process.send_signal(signal.SIGTERM)
        assert [event async for event in events] == []
    _, complaints = await asyncio.to_thread(dashboard.process.communicate, timeout=PATIENCE)
    assert complaints == ""
    assert dashboard.process.returncode == -signal.SIGTERM


def test_the_page_shows_changes(emulator: KaizenEmulator, dashboard: Dashboard, tmp_path: Path) -> None:
    """In a browser, rows appear, a status changes, a finished row is marked, and the count advances."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install 'kaizen-async[examples]'")
    if CHROMIUM is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    emulator.add("exec_1", Life.of(("Enqueued", 0), ("Zorp", 4), ("Completed", 8)), workflow="Import invoices")
    emulator.add("exec_2", Life.running(), workflow="<b>Check</b> claims")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_FLAGS)
        page = browser.new_page()
        problems: list[str] = []
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        expect = playwright.expect
        expect.set_options(timeout=PATIENCE * 1000)
        page.goto(f"{dashboard.url}/?id=exec_1&id=exec_2&id=nobody")
        first, second, unknown = (
            page.locator("tbody tr").filter(has=page.get_by_text(one, exact=True))
            for one in ("exec_1", "exec_2", "nobody")
        )
        expect(first).to_contain_text("Import invoices")
        expect(second).to_contain_text("<b>Check</b> claims")
        expect(unknown).to_contain_text("No execution has this id.")
        expect(first).to_contain_text("Zorp")
        expect(page.locator("#count")).to_have_text("1 of 3 ended")
        expect(first).to_contain_text("Completed")
        expect(first).to_have_class("ended fine")
        expect(second).not_to_have_class("ended")
        expect(page.locator("#count")).to_have_text("2 of 3 ended")
        expect(page.locator("tbody tr").first).to_contain_text("nobody")
        expect(page.locator("#connection")).to_have_text("live")
        page.screenshot(path=tmp_path / "dashboard.png", full_page=True)
        page.set_viewport_size({"width": 390, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        for cell in first.locator("td").all():
            box = cell.bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 390
        page.locator("#legend button", has_text="InProgress").click()
        expect(page.locator("tbody tr")).to_have_count(1)
        emulator.faults.always(Fault.status(503))
        expect(page.locator("#alarm")).to_contain_text("The Kaizen API responded with an error (503).")
        age = second.locator(".age").inner_text()
        emulator.faults.clear()
        expect(page.locator("#alarm")).to_be_hidden()
        assert age
        other_ids_can_be_chosen(page, expect, dashboard.url)
        browser.close()
    assert problems == []


def other_ids_can_be_chosen(page: Any, expect: Any, url: str) -> None:
    """Check that the page refuses too many ids and none, and that the Back button restores the earlier ids."""
    page.locator("#change").click()
    too_many = "\n".join(f"exec_{one}" for one in range(5001))
    page.evaluate("(text) => { document.getElementById('ids').value = text }", too_many)
    page.get_by_role("button", name="Watch", exact=True).click()
    expect(page.locator("#refusal")).to_have_text("5,001 ids are too many. This page takes up to 5,000.")
    page.locator("#ids").fill(" ")
    page.get_by_role("button", name="Watch", exact=True).click()
    expect(page.locator("#refusal")).to_have_text("Enter at least one id.")
    page.locator("#ids").fill("exec_2")
    page.get_by_role("button", name="Watch", exact=True).click()
    expect(page.locator("#count")).to_have_text("0 of 1 ended")
    page.go_back()
    expect(page.locator("#count")).to_have_text("2 of 3 ended")
    page.goto(f"{url}/#%E0")
    expect(page.locator("#refusal")).to_contain_text("“%E0” cannot be an id")


def test_the_demo_starts_with_one_command() -> None:
    """The demo prints its URL and ends at Ctrl-C."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, str(FOLDER / "demo.py"), "--port", str(port), "--executions", "3"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603 - our own
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(f"Open http://127.0.0.1:{port}/demo")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.communicate()

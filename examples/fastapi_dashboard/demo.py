"""Serve the dashboard against an emulator that plays a batch of executions: `python demo.py`."""

import os
from argparse import ArgumentParser
from random import Random

import uvicorn
from app import app
from fastapi.responses import RedirectResponse

from kaizen_async.testing import KaizenEmulator, Life

WORKFLOWS = ("Import invoices", "Check claims", "Renew policies", "Sync contacts")


def play_batch(emulator: KaizenEmulator, size: int) -> list[str]:
    """Let executions of several workflows begin that take from seconds to two minutes; return their ids."""
    random = Random(7)
    ids = [f"exec_{number}" for number in range(1, size + 1)]
    for execution_id in ids:
        seconds = min(120.0, 8 + random.lognormvariate(3, 0.8))
        status = random.choices(["Completed", "Failed"], [9, 1])[0]
        life = Life.lasting(seconds, status=status, age=random.uniform(0, 10))
        emulator.add(execution_id, life, workflow=random.choice(WORKFLOWS))
    return ids


def main() -> None:
    """Start the emulator and the app, and say where to look."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--executions", type=int, default=40)
    options = parser.parse_args()
    with KaizenEmulator() as emulator:
        ids = play_batch(emulator, options.executions)
        os.environ["KAIZEN_BASE_URL"] = emulator.base_url
        page = f"/#{','.join(ids)}"
        app.add_api_route("/demo", lambda: RedirectResponse(page), include_in_schema=False)
        print(f"Open http://127.0.0.1:{options.port}/demo - Ctrl-C ends it.", flush=True)
        uvicorn.run(app, port=options.port, log_level="warning")


if __name__ == "__main__":
    main()

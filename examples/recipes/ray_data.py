"""Lookups as a step of a Ray Data pipeline: `python ray_data.py exec_1 exec_2`.

Each actor has one client and one event loop for all its batches. The actors share nothing: divide the number of
requests in flight among them, as `concurrency` does here.
"""

import asyncio
import sys

import ray.data

from kaizen_async import KaizenClient


class LookUp:
    """Adds the status of each execution of a batch, or why there is none."""

    def __init__(self) -> None:
        self.runner = asyncio.Runner()
        self.kaizen = KaizenClient(concurrency=20)  # retries and pauses are the client's

    def __call__(self, batch: dict[str, list[str]]) -> dict[str, list[str]]:
        """Look a batch up."""
        outcomes = self.runner.run(self.kaizen.instructor_executions.get_many(map(str, batch["id"])))
        statuses = [str(one.execution.status) if one.execution else str(one.error) for one in outcomes]
        return {"id": [one.id for one in outcomes], "status": statuses}


if __name__ == "__main__":
    ids = ray.data.from_items([{"id": execution_id} for execution_id in sys.argv[1:]])
    for row in ids.map_batches(LookUp, concurrency=2, batch_size=500).iter_rows():
        print(row["id"], row["status"])

"""A taskiq broker of your own, with the task of kaizen_async beside yours: `taskiq worker tasks:broker`."""

import os

from kaizen_async.workers import create_broker, register

REDIS_URL = os.environ.get("REDIS_URL", "redis://localhost")
RATE = float(os.environ.get("KAIZEN_RATE", "100"))

broker = create_broker(REDIS_URL)  # or any other broker of taskiq
register(broker, url=REDIS_URL, per_second=RATE)


@broker.task
async def greet(name: str) -> None:
    """Do something else: your own tasks run in the same workers."""
    print(f"Hello, {name}")

"""A broker with the task of this package, for those who have no taskiq broker of their own.

    kaizen-async run worker                         checks Redis, then starts this:
    taskiq worker kaizen_async.workers.app:broker

Settings come from the environment: REDIS_URL, KAIZEN_NAMESPACE, KAIZEN_RATE (requests per second of all workers), and
what `KaizenClient` takes from it.
"""

import os

from kaizen_async.client import KaizenClient
from kaizen_async.workers.broker import create_broker
from kaizen_async.workers.store import DEFAULT_URL
from kaizen_async.workers.worker import register

url = os.environ.get("REDIS_URL", DEFAULT_URL)
namespace = os.environ.get("KAIZEN_NAMESPACE", "kaizen")
rate = os.environ.get("KAIZEN_RATE")

try:
    per_second = float(rate) if rate else None
except ValueError:
    raise ValueError(f"KAIZEN_RATE must be a number of requests per second, not {rate!r:.40}") from None

KaizenClient()  # Its settings come from the environment: what is wrong with them is reported before a worker starts.

broker = create_broker(url, namespace=namespace)
task = register(broker, url=url, namespace=namespace, per_second=per_second)

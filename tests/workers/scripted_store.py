"""A store with scripted replies in place of Redis."""

import asyncio
from collections.abc import Callable
from typing import Any

from kaizen_async.workers.recorder import Held
from kaizen_async.workers.shards import Shard


class Replies:
    """A store with scripted replies to scripts and commands.

    Args:
        reply: Called with the name of the script, or "command", and its arguments. It returns a reply or an awaitable.

    Attributes:
        called: The arguments of each call.
    """

    tag = "{x}"
    runs = "{x}:runs"
    workers = "{x}:workers"
    address = "redis://h"

    def __init__(self, reply: Callable[..., Any], on_trouble: Callable[[str], None] = lambda _: None) -> None:
        self.called: list[tuple[Any, ...]] = []
        self.reply = reply
        self.report_trouble = on_trouble

    def run(self, name: str) -> str:
        """Return the key of a run."""
        return f"{{x}}:run:{name}"

    async def script(self, *words: Any) -> Any:
        """Return the reply to a script."""
        self.called.append(words)
        reply = self.reply(*words)
        return await reply if asyncio.iscoroutine(reply) else reply

    async def command(self, *words: Any) -> Any:
        """Return the reply to a command."""
        return await self.script("command", *words)

    async def aclose(self) -> None:
        """Do nothing."""


def held(size: int = 10) -> Held:
    """Return a shard that a worker holds."""
    return Held(1, "token", 0, "", Shard([f"exec_{number}" for number in range(size)], 1), b"")

"""The interface of all contenders: a few methods that look executions up."""

import asyncio
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Coroutine, Iterable, Sequence
from itertools import islice
from time import perf_counter
from typing import Any, ClassVar


class WrongRecordError(Exception):
    """Raised when a response has another id than the requested one."""


class Contender(ABC):
    """One client of the API. The driver below is the cheapest possible one, without a task per lookup.

    A lookup is always the same request, `POST /instructor/executions/get` with `{"id": ...}`. Its response is always
    read, decoded and checked for the id. Settings are the client's defaults, except for the address, the key and, if
    the client has one, its limit of lookups in flight.
    """

    title: ClassVar[str]
    slow: ClassVar[bool] = False
    """Whether a run takes fewer lookups, so that it ends in reasonable time."""
    lazy: ClassVar[bool] = False
    """Whether `keep` takes ids from an iterator without holding on to them."""

    def __init__(self, base_url: str, concurrency: int) -> None:
        self.base_url = base_url
        self.concurrency = concurrency

    @abstractmethod
    async def setup(self) -> None:
        """Create the client inside the running loop."""

    @abstractmethod
    async def look_up(self, execution_id: str) -> str:
        """Look one execution up and return the id in its record."""

    @abstractmethod
    async def close(self) -> None:
        """Close the client."""

    async def run(self, ids: Sequence[str]) -> list[float]:
        """Look all ids up, `concurrency` at a time, and return the duration of each lookup in seconds."""
        seconds: list[float] = []
        remaining = iter(ids)

        async def work() -> None:
            for execution_id in remaining:
                began = perf_counter()
                check(await self.look_up(execution_id), execution_id)
                seconds.append(perf_counter() - began)

        await asyncio.gather(*(work() for _ in range(self.concurrency)))
        return seconds

    async def keep(self, ids: Iterable[str]) -> object:
        """Look all ids up, and return the result of the client's bulk method."""
        raise NotImplementedError(self.title)

    async def attempt(self, ids: Sequence[str], ends: Counter[str], *, in_flight: int | None) -> None:
        """Look all ids up, and count the results: "ok" or the name of an error.

        Args:
            ids: The ids.
            ends: A counter that is updated after each lookup, so that it is right at a timeout.
            in_flight: Number of lookups that the caller starts at a time, or None for all at once.
        """
        remaining = iter(ids)

        async def work() -> None:
            for execution_id in remaining:
                ends[await self._end(self.look_up(execution_id), execution_id)] += 1

        await asyncio.gather(*(work() for _ in range(in_flight or len(ids))))

    async def _end(self, look_up: Coroutine[Any, Any, str], execution_id: str) -> str:
        try:
            check(await look_up, execution_id)
        except Exception as error:  # noqa: BLE001 - every client has its own errors, and all are counted
            return type(error).__name__
        return "ok"


def check(found: str, execution_id: str) -> None:
    """Raise an error unless the found id is the requested one."""
    if found != execution_id:
        raise WrongRecordError(f"asked for {execution_id}, got {found}")


def batches(ids: Sequence[str], size: int) -> Iterable[list[str]]:
    """Return the ids in lists of a given size."""
    remaining = iter(ids)
    while batch := list(islice(remaining, size)):
        yield batch

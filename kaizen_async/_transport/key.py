"""The API key where a function gives it: asked before the first request, and again when the server refuses the key."""

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from kaizen_async.config import require_key
from kaizen_async.errors import TransportError

KeyFunction: TypeAlias = Callable[[], str | Awaitable[str]]


class RotatingKey:
    """Asks a user's function for the key. Those who need another one at the same time share what it returns.

    Args:
        ask: Returns the key, or an awaitable of it.
        use: Called with each key.
        failed: Makes an error that shows no key from an error and its cause.

    Attributes:
        number: How many keys there have been.
    """

    def __init__(
        self,
        ask: KeyFunction,
        use: Callable[[str], None],
        failed: Callable[[TransportError, Exception], Exception],
    ) -> None:
        self.number = 0
        self._ask = ask
        self._use = use
        self._failed = failed
        self._lock = asyncio.Lock()

    async def renew(self, number: int) -> None:
        """Ask for another key, unless somebody has done so since key `number` was in use.

        Raises:
            TransportError: The function failed (another attempt may succeed), or what it returned cannot be a key.
        """
        async with self._lock:
            if self.number != number:
                return
            try:
                key = self._ask()
                if inspect.isawaitable(key):
                    key = await key
            except Exception as error:  # noqa: BLE001 - it is the caller's code, often with a network behind it
                # Its text may quote what it asked with, so only its type is named.
                failure = TransportError(f"not sent: the function api_key raised {type(error).__name__}")
                raise self._failed(failure, error) from None
            try:
                key = require_key(key)
            except (TypeError, ValueError) as error:
                raise TransportError(f"not sent: what the function returned: {error}", retryable=False) from None
            self._use(key)
            self.number += 1

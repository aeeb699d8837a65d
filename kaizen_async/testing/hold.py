"""A client's hold on a virtual clock during one request, and letting go of it while time has to pass."""

import asyncio
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from kaizen_async.testing.clock import VirtualClock

WIRE_PATIENCE: Final = 5.0
"""Real seconds after which a request over the wire holds the clock no longer, so that its timeout can end it: the
server may be another one, which hangs."""


class Hold:
    """The hold of one request. The client takes and releases it; a server may let go of it and take it back.

    Made in the event loop of the client. `let_go` and `take_back` may be called from any thread.
    """

    def __init__(self, clock: "VirtualClock") -> None:
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._is_held = True
        self.is_over = False

    def let_go(self) -> None:
        """Let time pass, although the request is in flight."""
        if self._is_held and not self.is_over:
            self._is_held = False
            self._clock.let_go(self._loop)

    def take_back(self) -> None:
        """Make time stand still again."""
        if not self._is_held and not self.is_over:
            self._is_held = True
            self._clock.take_back(self._loop)

    def end(self) -> None:
        """Take the hold back for good, for the client to release."""
        self.take_back()
        self.is_over = True

    @contextmanager
    def for_the_wire(self) -> Generator[None]:
        """Keep the hold during a request over the wire, for a few real seconds at most."""
        timer = self._loop.call_later(WIRE_PATIENCE, self.let_go)
        try:
            yield
        finally:
            timer.cancel()

"""An event loop in a thread of its own."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any


class LoopThread:
    """Runs coroutines while other threads and loops work."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="kaizen-emulator", daemon=True)
        self._thread.start()

    def run(self, operation: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a coroutine function to its end; block until then."""
        asyncio.run_coroutine_threadsafe(operation(), self.loop).result()

    def close(self) -> None:
        """End the loop and the thread."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

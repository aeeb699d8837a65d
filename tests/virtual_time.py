"""Virtual time passes when all tasks wait. Hours of back-off take a moment, and every figure is exact."""

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from random import Random
from typing import Any, ParamSpec

P = ParamSpec("P")


class _JumpingSelector(selectors.DefaultSelector):  # type: ignore[misc,valid-type]
    """A selector that advances virtual time to the next timer at once. The loop calls it once in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.steps_left = -1
        self.at_step: Callable[[], object] = lambda: None

    def select(self, timeout: float | None = None) -> list[Any]:
        events: list[Any] = super().select(0)
        if self.steps_left == 0:
            self.at_step()
        elif not events:
            assert timeout is not None, "all tasks are waiting, and no timer will wake them"
            self.now += timeout
        self.steps_left -= 1
        return events


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop that never waits. It serves tasks, timers and futures, but real sockets never become ready."""

    def __init__(self) -> None:
        self._jumping = _JumpingSelector()
        super().__init__(self._jumping)

    def time(self) -> float:
        """Return virtual seconds."""
        return self._jumping.now

    def after_steps(self, steps: int, callback: Callable[[], object]) -> None:
        """Call back after a number of loop steps, whatever their duration."""
        self._jumping.steps_left = steps
        self._jumping.at_step = callback


class LoopClock:
    """The running loop's time, for a client in virtual time."""

    def __init__(self) -> None:
        self.random = Random(0)

    def time(self) -> float:
        """Return the loop's seconds."""
        return asyncio.get_running_loop().time()

    def wall(self) -> float:
        """Return seconds since an epoch of the tests."""
        return 1_700_000_000.0 + self.time()

    def call_at(self, when: float, callback: Callable[[], None]) -> asyncio.TimerHandle:
        """Call back at a time of the loop."""
        return asyncio.get_running_loop().call_at(when, callback)

    def hold(self) -> None:
        """Do nothing, because a scripted request takes virtual time too."""

    def release(self) -> None:
        """Do nothing."""


def run(main: Coroutine[Any, Any, None], *, debug: bool = True) -> None:
    """Run a coroutine in virtual time and fail if tasks are left. Debug mode is on unless the test is large."""

    async def checked() -> None:
        await main
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, left

    with asyncio.Runner(loop_factory=VirtualLoop, debug=debug) as runner:
        runner.run(checked())


def virtual_time(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    """Turn a coroutine function into a test that runs in virtual time."""

    @functools.wraps(test)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        run(test(*args, **kwargs))

    return wrapped


def at_every_step(cancelled_at: Callable[[int], Coroutine[Any, Any, bool]], *, more_than: int) -> None:
    """Cancel a task after 0, 1, 2, … loop steps, until it ends before that. Fail if it takes too few steps."""

    @virtual_time
    async def play() -> None:
        step = 0
        while not await cancelled_at(step):
            step += 1
        assert step > more_than

    play()

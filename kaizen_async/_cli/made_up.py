"""Executions and faults for the emulator, made up from a seed: the same seed, the same run."""

from collections import Counter
from collections.abc import Callable
from typing import Final

from kaizen_async.testing.chance import fraction
from kaizen_async.testing.emulator import KaizenEmulator
from kaizen_async.testing.faults import Exchange, Fault, Reply
from kaizen_async.testing.lives import Life

FAULTS: Final = {
    "status 503": Fault.status(503),
    "connection reset": Fault.reset(),
    "502 as HTML": Fault.html_502(),
    "body cut short": Fault.truncated_body(),
    "0.2 s late": Fault.latency(0.2),
}
"""What goes wrong with requests, each as often as the others."""


def lives(*, seed: int, duration: float, fail_rate: float) -> Callable[[str], Life]:
    """Return a function that gives each id a life of half to one and a half times a duration."""

    def life(execution_id: str) -> Life:
        length = duration * (0.5 + fraction(seed, "duration", execution_id))
        failed = fraction(seed, "failed", execution_id) < fail_rate
        return Life.lasting(length, status="Failed" if failed else "Completed")

    return life


def misbehave(emulator: KaizenEmulator, share: float) -> Counter[str]:
    """Let a share of the requests meet a fault; return the counts of those that have, as they grow."""
    met: Counter[str] = Counter()
    for number, (name, fault) in enumerate(FAULTS.items()):
        # The first that hits decides, so that those behind it are asked about fewer requests; a delay decides nothing.
        asked = len(FAULTS) if fault.delays else len(FAULTS) - share * number
        emulator.faults.chance(_counted(name, fault, met), share / asked)
    return met


def _counted(name: str, fault: Fault, met: Counter[str]) -> Fault:
    async def play(exchange: Exchange) -> Reply:
        met[name] += 1
        return await fault.play(exchange)

    return Fault(name, play, fault.delays, fault.needs_connection)

"""Idles until its standard input ends, and prints the longest delay of its event loop in ms.

Beside a measured process, this shows how much of a delay the machine causes.
"""

import asyncio
import sys
from time import perf_counter

from hostile_client import BEAT


async def measure() -> float:
    """Return the longest delay of a wake-up, in ms."""
    ended = asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    longest = 0.0
    while not ended.done():
        began = perf_counter()
        await asyncio.sleep(BEAT)
        longest = max(longest, perf_counter() - began - BEAT)
    return longest * 1e3


if __name__ == "__main__":
    print(asyncio.run(measure()))

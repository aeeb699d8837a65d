"""The bare loop at its leanest: the same lookup, with `concurrency` workers over one iterator in place of a gather."""

import contender
from contenders import bare


class Contender(bare.Contender):
    """No task for each id, no semaphore."""

    title = "bare aiohttp + msgspec, workers"
    run = contender.Contender.run

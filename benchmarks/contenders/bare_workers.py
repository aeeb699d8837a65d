"""The fastest bare loop: the same lookup, with `concurrency` workers over one iterator instead of a gather."""

import contender
from contenders import bare


class Contender(bare.Contender):
    """The bare loop without a task for each id and without a semaphore."""

    title = "bare aiohttp + msgspec, workers"
    run = contender.Contender.run

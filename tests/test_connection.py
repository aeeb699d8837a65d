"""Our own connection reads what aiohttp's parser reads, or leaves it to that."""

import itertools
import random

import fuzz_responses
import pytest

CASES = 2000
MOST_CUTS = 120


@pytest.mark.parametrize("sample", fuzz_responses.SAMPLES.values(), ids=fuzz_responses.SAMPLES)
async def test_a_response_is_read_alike_wherever_it_is_cut(sample: bytes) -> None:
    """Whole, and in two pieces cut at every position of the head and the beginning of the body."""
    await fuzz_responses.check([sample])
    for position in range(1, min(len(sample), MOST_CUTS)):
        await fuzz_responses.check(fuzz_responses.cut(sample, [position]))


async def test_changed_responses_are_read_alike() -> None:
    """A few thousand broken in small ways, the same in every run; `fuzz_responses.py` searches on."""
    for pieces in itertools.islice(fuzz_responses.cases(random.Random(1)), CASES):
        await fuzz_responses.check(pieces)

"""Workers share durations, so that each worker knows the ends that all of them have seen."""

import random
from typing import Any

from kaizen_async import KaizenClient, PollPolicy
from kaizen_async._waiting.cadence import Cadence


def learned_from(ends: list[tuple[str, float]]) -> Any:
    """Return the durations that one process learns from its own ends."""
    cadence = Cadence(PollPolicy(), random.Random(1))
    for workflow_id, seconds in ends:
        cadence.learn(workflow_id, seconds)
    return cadence.state()


def drawn(count: int, seed: int) -> list[tuple[str, float]]:
    """Return ends of three workflows."""
    draw = random.Random(seed)
    return [(f"wf_{draw.randrange(3)}", draw.lognormvariate(4, 1)) for _ in range(count)]


async def test_shared_ends_teach_as_much_as_own_ends() -> None:
    """Shared ends in the same order teach exactly as much as ends that the process saw itself."""
    ends = drawn(500, seed=1)
    async with KaizenClient() as client:
        client.instructor_executions.learn(ends)
        async with client.instructor_executions.wait_many(()) as outcomes:
            assert outcomes.checkpoint()["learned"] == learned_from(ends)


def test_ends_that_come_later_weigh_hardly_more() -> None:
    """An end that moves by n places changes its weight by a factor of at most 1/0.99**n. Here n is at most 20."""
    ends = drawn(1000, seed=2)
    draw = random.Random(3)
    moved = [end for _, end in sorted((place + draw.uniform(0, 20), end) for place, end in enumerate(ends))]
    straight, shuffled = (learned_from(some)["workflows"] for some in (ends, moved))
    assert straight.keys() == shuffled.keys()
    for workflow_id in straight:
        weights, others = ({bin_: rest for bin_, *rest in some[workflow_id]} for some in (straight, shuffled))
        assert weights.keys() == others.keys()
        for bin_, counts in weights.items():
            for count, other in zip(counts, others[bin_], strict=True):
                assert count * 0.99**20 - 1e-3 <= other <= count / 0.99**20 + 1e-3

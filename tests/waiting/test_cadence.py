"""The intervals between polls follow a plain rule and learned durations, within guaranteed bounds."""

import json
import math
from collections.abc import Callable
from random import Random
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kaizen_async._waiting import poll_rules
from kaizen_async._waiting.cadence import HIGHEST_SURE, LAGS, LOWEST, MAX_WORKFLOWS, MEMORY, Cadence
from kaizen_async._waiting.poll_rules import PollRule
from kaizen_async.config import PollPolicy

WIDE = PollPolicy(max_interval=3600.0, spread=0.0)
WIDE_BY_SECONDS = PollPolicy(lag_seconds=5.0, max_interval=3600.0, spread=0.0)

policies = st.builds(
    PollPolicy,
    lag_share=st.floats(0.001, 0.9),
    lag_seconds=st.none() | st.floats(0.01, 1000),
    min_interval=st.floats(0.01, 10),
    max_interval=st.floats(10, 10_000),
    spread=st.just(0.0),
)
histories = st.lists(st.tuples(st.sampled_from(["a", "b"]), st.floats(1e-6, 1e9)), max_size=40)


def cadence_of(policy: PollPolicy, *durations: float, workflow_id: str = "a") -> Cadence:
    """Return a cadence that has learned these durations of one workflow."""
    cadence = Cadence(policy, Random(1))
    for duration in durations:
        cadence.learn(workflow_id, duration)
    return cadence


def plain_of(policy: PollPolicy) -> Callable[[float], float]:
    """Return the plain rule of a policy, written independently of the library."""

    def interval(age: float) -> float:
        wished = 2 * policy.lag_share * age if policy.lag_seconds is None else 2 * policy.lag_seconds
        return sorted([policy.min_interval, wished, policy.max_interval])[1]

    return interval


def watch(cadence: Cadence, workflow_id: str, duration: float) -> tuple[int, float]:
    """Poll one execution from its start until the poll that sees its end. Return the number of polls and the lag."""
    age, polls = 0.0, 1
    while age < duration:
        age += cadence.next_delay(age, workflow_id)
        polls += 1
    return polls, age - duration


@pytest.mark.parametrize(("age", "interval"), [(-3.0, 1.0), (0.0, 1.0), (5.0, 1.0), (100.0, 10.0), (1000.0, 15.0)])
def test_plain_share(age: float, interval: float) -> None:
    """Without learned durations, the interval is twice the desired share of the age, within the bounds."""
    assert cadence_of(PollPolicy(spread=0.0)).next_delay(age, "a") == pytest.approx(interval)


@pytest.mark.parametrize("age", [0.0, 5.0, 100_000.0])
def test_plain_seconds(age: float) -> None:
    """Without learned durations, a lag in seconds gives intervals of twice that lag at any age."""
    assert cadence_of(WIDE_BY_SECONDS).next_delay(age, None) == 10.0


def test_lag_of_plain_rule() -> None:
    """The plain rule meets its target lag on average for all durations."""
    random = Random(3)
    durations = [random.uniform(100, 10_000) for _ in range(400)]
    by_share = [watch(cadence_of(WIDE), "a", duration)[1] / duration for duration in durations]
    by_seconds = [watch(cadence_of(WIDE_BY_SECONDS), "a", duration)[1] for duration in durations]
    assert mean(by_share) == pytest.approx(0.05, rel=0.1)
    assert mean(by_seconds) == pytest.approx(5.0, rel=0.1)


def test_spread() -> None:
    """Intervals vary by 10 % to both sides, so that executions of equal age are not polled in step."""
    cadence = Cadence(PollPolicy(), Random(1))
    delays = [cadence.next_delay(100.0, "a") for _ in range(1000)]
    assert 9.0 <= min(delays) < 9.1
    assert 10.9 < max(delays) <= 11.0


@pytest.mark.parametrize(("age", "low", "high"), [(0.0, 1.0, 1.1), (10_000.0, 13.5, 15.0)])
def test_spread_within_bounds(age: float, low: float, high: float) -> None:
    """At a bound of the policy, intervals vary only to its inner side."""
    cadence = Cadence(PollPolicy(), Random(1))
    delays = [cadence.next_delay(age, "a") for _ in range(1000)]
    assert low <= min(delays) < low + 0.1 * (high - low)
    assert high - 0.1 * (high - low) < max(delays) <= high


def test_deterministic() -> None:
    """The same calls with the same random numbers give the same intervals."""
    first, second = cadence_of(PollPolicy(), 60.0, 90.0), cadence_of(PollPolicy(), 60.0, 90.0)
    ages = range(0, 200, 7)
    assert [first.next_delay(age, "a") for age in ages] == [second.next_delay(age, "a") for age in ages]


@pytest.mark.parametrize("policy", [WIDE, WIDE_BY_SECONDS])
def test_learned_shape(policy: PollPolicy) -> None:
    """The client polls executions of a known workflow most often around their usual end."""
    random = Random(5)
    cadence = cadence_of(policy, *(random.lognormvariate(math.log(600), 0.2) for _ in range(100)))
    factor = {age: cadence.next_delay(age, "a") / plain_of(policy)(age) for age in (50.0, 650.0, 20_000.0)}
    assert factor[50.0] > 3
    assert factor[650.0] < 1
    assert factor[20_000.0] > factor[650.0] * 1.5


def test_few_ends() -> None:
    """A few learned durations also make polls at nearby ages more frequent."""
    cadence = cadence_of(WIDE, *[600.0] * 10)
    assert cadence.next_delay(200.0, "a") == pytest.approx(6 * 20.0)
    assert cadence.next_delay(440.0, "a") < 2 * 44.0
    assert cadence.next_delay(800.0, "a") < 80.0


@pytest.mark.parametrize("workflow_id", ["b", None])
def test_unknown_workflow(workflow_id: str | None) -> None:
    """The interval of an unknown workflow stays between half and double the plain interval."""
    cadence = cadence_of(WIDE, *[600.0] * 100)
    assert cadence.next_delay(50.0, "a") > 20
    assert 2.5 <= cadence.next_delay(50.0, workflow_id) <= 10.0


@pytest.mark.parametrize(("policy", "aim"), [(WIDE, 0.05), (WIDE_BY_SECONDS, 5.0)])
def test_learning_pays(policy: PollPolicy, aim: float) -> None:
    """With learned durations the mean lag still meets its target, with fewer polls than the plain rule."""
    random = Random(7)
    learned, plain = cadence_of(policy), cadence_of(policy)
    polls, plain_polls, lags = 0, 0, []
    for number in range(1200):
        workflow_id, typical = random.choice([("a", 40), ("b", 300), ("c", 1500)])
        duration = random.lognormvariate(math.log(typical), 0.5)
        seen, lag = watch(learned, workflow_id, duration)
        learned.learn(workflow_id, duration)
        if number >= 300:
            polls += seen
            plain_polls += watch(plain, workflow_id, duration)[0]
            lags.append(lag / duration if policy.lag_seconds is None else lag)
    assert mean(lags) == pytest.approx(aim, rel=0.2)
    assert polls < plain_polls * (0.6 if policy.lag_seconds is None else 0.8)


def test_shift_is_followed() -> None:
    """When a workflow becomes ten times faster, a few ends are enough to poll its executions earlier."""
    cadence = cadence_of(WIDE, *[900.0] * 200)
    before = cadence.next_delay(85.0, "a")
    for _ in range(20):
        cadence.learn("a", 90.0)
    few = cadence.next_delay(85.0, "a")
    for _ in range(300):
        cadence.learn("a", 90.0)
    assert before > 40
    assert few < before / 2
    assert cadence.next_delay(85.0, "a") < 9.5


def test_learning_off() -> None:
    """Without `learn`, every interval follows the plain rule."""
    cadence = cadence_of(PollPolicy(spread=0.0, learn=False), *[600.0] * 100)
    assert cadence.next_delay(100.0, "a") == 10.0
    assert cadence.state()["workflows"] == {}


class Doubling(PollRule):
    """A rule of the tests: each interval is as long as all before it together, and at first two seconds."""

    name = "doubling"
    learns = False

    def unit(self, age: float) -> float:
        """Return the age, or the first interval."""
        return max(age, 2.0)


def test_a_new_rule_is_a_class_and_an_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """One entry in the table of rules is enough: a field of the policy chooses it, and it may refuse to learn."""
    monkeypatch.setattr(poll_rules, "RULES", {"max_rate": Doubling, **poll_rules.RULES})
    cadence = Cadence(PollPolicy(max_rate=0.5, spread=0, max_interval=100), Random(1))
    cadence.restore({"aim": "share", "lags": [], "workflows": {"w": [[40, 30.0, 30.0]]}})
    assert [cadence.next_delay(age, "w") for age in (0.5, 2, 4, 8)] == [2, 2, 4, 8]
    assert cadence.state()["aim"] == "doubling"


@pytest.mark.parametrize("duration", [0.0, -5.0, math.nan, math.inf])
def test_impossible_durations(duration: float) -> None:
    """The cadence ignores an impossible duration."""
    assert cadence_of(WIDE, duration).state() == cadence_of(WIDE).state()


@given(policies, histories, st.floats(0, 1e9), st.sampled_from(["a", "b", "c", None]))
def test_intervals_are_bounded(
    policy: PollPolicy, history: list[tuple[str, float]], age: float, workflow_id: str | None
) -> None:
    """With any learned durations, an interval stays within the policy's bounds and near the plain rule's."""
    cadence = Cadence(policy, Random(1))
    for seen, duration in history:
        cadence.learn(seen, duration)
    interval, plain = cadence.next_delay(age, workflow_id), plain_of(policy)(age)
    assert policy.min_interval <= interval <= policy.max_interval
    assert plain * LOWEST * (1 - 1e-9) <= interval <= plain * HIGHEST_SURE * (1 + 1e-9)


@given(policies, histories, st.floats(1, 2000))
def test_misleading_history(policy: PollPolicy, history: list[tuple[str, float]], duration: float) -> None:
    """A misleading history costs at most twice the plain rule's polls and six times its interval."""
    cadence = Cadence(policy, Random(1))
    for seen, ended in history:
        cadence.learn(seen, ended)
    age, learned, last = 0.0, 0, 0.0
    while age < duration:
        learned, last = learned + 1, age
        age += cadence.next_delay(age, "a")
    plain, plain_age = 0, 0.0
    while plain_age < duration:
        plain, plain_age = plain + 1, plain_age + plain_of(policy)(plain_age)
    assert learned <= 2 * plain + 1
    assert age - last <= HIGHEST_SURE * plain_of(policy)(duration) * (1 + 1e-9)


@pytest.mark.parametrize("true_duration", [20.0, 5000.0])
def test_the_guarantee_binds(true_duration: float) -> None:
    """A misleading history changes the number of polls, so the test of the guarantee can fail."""
    polls, _ = watch(cadence_of(WIDE, *[600.0] * 200), "a", true_duration)
    plain_polls, _ = watch(cadence_of(WIDE), "a", true_duration)
    assert polls < plain_polls / 1.5


@pytest.mark.parametrize("policy", [WIDE, WIDE_BY_SECONDS])
def test_state_restores(policy: PollPolicy) -> None:
    """A cadence that restores the JSON of another cadence's state continues with the same intervals."""
    random = Random(9)
    first = cadence_of(policy, *(random.lognormvariate(5, 1) for _ in range(150)))
    second = cadence_of(policy)
    second.restore(json.loads(json.dumps(first.state())))
    assert second.state() == first.state()
    first.learn("a", 100.0)
    second.learn("a", 100.0)
    for age in (0.0, 10.0, 100.0, 1000.0, 10_000.0):
        assert second.next_delay(age, "a") == pytest.approx(first.next_delay(age, "a"), rel=0.05)


def test_restoring_keeps_known_workflows() -> None:
    """Restoring a state adds unknown workflows and does not change the known ones."""
    here = cadence_of(WIDE, *[600.0] * 60)
    before = here.state()
    there = cadence_of(WIDE, 1.0)
    there.learn("b", 30.0)
    here.restore(there.state())
    after = here.state()
    assert after["workflows"]["a"] == before["workflows"]["a"]
    assert after["workflows"]["b"] == there.state()["workflows"]["b"]
    assert after["lags"] == before["lags"]


def test_state_of_another_policy() -> None:
    """Durations learned under a share also serve a policy in seconds, after one end has set its scale."""
    cadence = cadence_of(WIDE_BY_SECONDS)
    cadence.restore(cadence_of(WIDE, *[600.0] * 100).state())
    assert cadence.next_delay(100.0, "a") == 10.0
    cadence.learn("a", 600.0)
    assert cadence.next_delay(100.0, "a") > 40.0


@pytest.mark.parametrize(
    "state",
    [
        None,
        {},
        {"aim": "minutes", "lags": [1.0], "workflows": {}},
        {"aim": "share", "lags": [-1.0], "workflows": {}},
        {"aim": "share", "lags": [1e308], "workflows": {}},
        {"aim": "share", "lags": [1.0] * (LAGS + 1), "workflows": {}},
        {"aim": "share", "lags": [1.0], "workflows": {"a": [[100, 1.0, 1.0]]}},
        {"aim": "share", "lags": [1.0], "workflows": {"a": [[5, 1e308, 1.0]]}},
        {"aim": "share", "lags": [1.0], "workflows": {"a": [[5, 1.0, 1e308]]}},
        {"aim": "share", "lags": [1.0], "workflows": {"a": [[5, math.nan, 1.0]]}},
        {"aim": "share", "lags": [1.0], "workflows": {"a" * 201: []}},
        {"aim": "share", "lags": [1.0], "workflows": {"a": 7}},
    ],
)
def test_broken_state(state: object) -> None:
    """The cadence refuses an invalid state and keeps its own."""
    cadence = cadence_of(WIDE, 60.0, 90.0)
    before = cadence.state()
    with pytest.raises(ValueError, match=r"Expected|Invalid|missing"):
        cadence.restore(state)
    assert cadence.state() == before


def test_memory_is_bounded() -> None:
    """Above the limit, the cadence forgets the workflow with the oldest last end."""
    cadence = cadence_of(WIDE, 60.0, workflow_id="often")
    for number in range(MAX_WORKFLOWS + 50):
        cadence.learn(f"workflow {number}", 60.0)
        if number % 100 == 0:
            cadence.learn("often", 60.0)
    workflows = cadence.state()["workflows"]
    assert len(workflows) == MAX_WORKFLOWS
    assert {"often", f"workflow {MAX_WORKFLOWS + 49}"} <= workflows.keys()
    assert "workflow 0" not in workflows
    assert sum(ended for _, ended, _ in workflows["often"]) > 9


def test_old_ends_fade() -> None:
    """Old ends lose weight, so that the sum of the weights is bounded."""
    weights = cadence_of(WIDE, *[600.0] * 3000).state()["workflows"]["a"]
    assert sum(ended for _, ended, _ in weights) == pytest.approx(MEMORY)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lag_share": 0.0},
        {"lag_share": 1.0},
        {"lag_share": math.nan},
        {"lag_seconds": 0.0},
        {"min_interval": 0.0},
        {"max_interval": math.inf},
        {"min_interval": 20.0},
        {"spread": -0.1},
        {"spread": 1.0},
    ],
)
def test_policy_values(wrong: dict[str, float]) -> None:
    """A policy refuses values that allow no schedule."""
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PollPolicy(**wrong)


@pytest.mark.parametrize("wrong", [{"lag_share": "5 %"}, {"lag_seconds": "5"}, {"spread": True}])
def test_policy_types(wrong: dict[str, object]) -> None:
    """A policy refuses values that are not numbers."""
    with pytest.raises(TypeError, match=next(iter(wrong))):
        PollPolicy(**wrong)  # type: ignore[arg-type]

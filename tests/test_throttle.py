"""The gate and the retry budget, on a clock that is moved by hand."""

import math
from itertools import pairwise
from random import Random

import pytest

from kaizen_async import KaizenError, RateLimitError, StatusError, TransportError
from kaizen_async._lookup.throttle import (
    CALM_SECONDS,
    DECREASE,
    LEAST_EVIDENCE,
    LEAST_PAUSE,
    LONGEST_PAUSE,
    MOST_ASKED,
    PROBE_DOUBLING,
    PROBE_SECONDS,
    RAMP_SECONDS,
    RECENT_ANSWERS,
    SAFETY,
    SHORTEST_PAUSE,
    SLOWEST_RATE,
    Gate,
    RetryBudget,
    is_throttling,
)


class NoSpread(Random):
    """Draws the lower end of every range."""

    def uniform(self, a: float, b: float) -> float:
        """Return the lower end."""
        return a


class HandClock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


@pytest.fixture
def clock() -> HandClock:
    """Return the clock of the gate."""
    return HandClock()


@pytest.fixture
def gate(clock: HandClock) -> Gate:
    """Return a gate without random spread."""
    return Gate(clock, NoSpread())


def accept(gate: Gate, answers: int) -> None:
    """Let a gate see that many accepted answers."""
    for _ in range(answers):
        gate.accepted()


def close(gate: Gate, retry_after: float | None, status: int = 429) -> bool:
    """Let a gate see a throttling answer to a request of its present epoch."""
    return gate.throttled(status, retry_after, gate.epoch)


@pytest.mark.parametrize(
    ("error", "throttles"),
    [
        (RateLimitError("x", status=429), True),
        (RateLimitError("x", status=429, retry_after=1), True),
        (StatusError("x", status=503, retry_after=0), True),
        (StatusError("x", status=503), False),
        (StatusError("x", status=500, retry_after=1), False),
        (TransportError("x"), False),
        (KaizenError("x"), False),
    ],
)
def test_what_throttles(error: KaizenError, throttles: bool) -> None:
    """429 asks the whole client to slow down, and so does 503 if it names a time."""
    assert is_throttling(error) is throttles


def test_a_gate_that_saw_no_throttling_is_open(gate: Gate) -> None:
    """Nobody needs to ask it, and whoever does may send at once."""
    accept(gate, 500)
    assert not gate.engaged
    assert gate.pace() is None
    assert gate.seconds_left() == 0
    assert gate.reserve() == 0


def test_nobody_sends_before_retry_after_has_passed(gate: Gate, clock: HandClock) -> None:
    """The pause is never shorter than the server asked for, and is counted down."""
    assert close(gate, 4)
    assert gate.engaged
    assert gate.pace() == 0
    assert gate.seconds_left() == 4
    assert gate.reserve() == 4
    clock.now += 3
    assert gate.seconds_left() == 1
    clock.now += 1
    assert gate.seconds_left() == 0
    assert gate.pace() == SLOWEST_RATE


def test_the_end_of_a_pause_is_spread_a_little_later(clock: HandClock) -> None:
    """By up to a tenth, and at most a second, so that clients throttled together do not come back together."""
    ends = []
    for seed in range(200):
        gate = Gate(clock, Random(seed))
        close(gate, 4)
        ends.append(gate.seconds_left())
    assert 4 <= min(ends) < 4.05
    assert 4.35 < max(ends) <= 4.4
    long = Gate(clock, Random(1))
    close(long, 3600)
    assert 3600 <= long.seconds_left() <= 3601


def test_a_429_that_names_no_time_pauses_ever_longer(gate: Gate, clock: HandClock) -> None:
    """The first pause is short, each next one doubles, up to a limit."""
    pauses = []
    for _ in range(7):
        close(gate, None)
        pauses.append(gate.seconds_left())
        clock.now += gate.seconds_left()
    assert pauses == [SHORTEST_PAUSE, 1.0, 2.0, 4.0, LONGEST_PAUSE, LONGEST_PAUSE, LONGEST_PAUSE]


def test_stragglers_of_the_old_epoch_start_no_new_pause(gate: Gate) -> None:
    """The answers to requests sent before the gate closed tell nothing new; only a longer time in them counts."""
    assert gate.throttled(429, 2, 0)
    assert not gate.throttled(429, 2, 0)
    assert gate.seconds_left() == 2
    assert not gate.throttled(503, 5, 0)
    assert gate.seconds_left() == 5
    assert not gate.throttled(429, 1, 0)
    assert gate.seconds_left() == 5
    assert gate.status == 429


def test_a_straggler_that_makes_the_pause_longer_voids_what_was_reserved(gate: Gate, clock: HandClock) -> None:
    """Whoever kept a moment free sees another epoch, also if the answer comes after the pause."""
    gate.throttled(429, 1, 0)
    epoch = gate.epoch
    assert gate.reserve() == 1
    gate.throttled(429, 1, 0)
    assert gate.epoch == epoch
    clock.now += 0.5
    gate.throttled(429, 1, 0)
    assert gate.epoch == epoch + 1
    assert gate.reserve() == 1
    clock.now += 5
    assert gate.seconds_left() == 0
    assert not gate.throttled(429, 1, 0)
    assert gate.epoch == epoch + 2
    assert gate.seconds_left() == 1


def test_a_pause_of_no_time_is_a_short_one(gate: Gate) -> None:
    """Servers say 0 when they mean less than a second."""
    close(gate, 0)
    assert gate.seconds_left() == pytest.approx(LEAST_PAUSE)


def moments(gate: Gate, count: int) -> list[float]:
    """Return the moments of that many reservations."""
    return [gate.reserve() for _ in range(count)]


def test_sends_after_a_first_pause_double_in_pace(gate: Gate, clock: HandClock) -> None:
    """Nothing known yet: start with what was taken at once, per pause, and double every `RAMP_SECONDS`."""
    accept(gate, 8)
    close(gate, 0.8)
    clock.now += 0.8
    start_rate = 8 / 0.8
    sent = moments(gate, 200)
    assert sent[0] == 0
    for doublings in range(1, 5):
        expected = start_rate * RAMP_SECONDS / math.log(2) * (2**doublings - 1)
        assert sum(moment < doublings * RAMP_SECONDS for moment in sent) == pytest.approx(expected, abs=1)
    clock.now += 2 * RAMP_SECONDS
    assert gate.pace() == pytest.approx(4 * start_rate)


def test_a_slow_start_is_not_a_slow_second_send(gate: Gate) -> None:
    """The pace doubles while a sender waits: at half a send per second the second does not take two seconds."""
    close(gate, 1)
    first, second = moments(gate, 2)
    assert 0.3 < second - first < 0.6


def test_the_pace_of_the_ramp_is_bounded(gate: Gate, clock: HandClock) -> None:
    """However long nothing is throttled, the arithmetic does not overflow, learned rate or not."""
    for teach in (close, learn_100):
        teach(gate, 1)
        clock.now += 10**6
        pace = gate.pace()
        assert pace is not None
        assert math.isfinite(pace)
        assert pace > 10**6


def test_the_burst_counts_what_was_accepted_after_the_first_refusal(gate: Gate, clock: HandClock) -> None:
    """Answers overtake each other: all to requests sent together are one burst, wherever the refusal is."""
    accept(gate, 3)
    close(gate, 1)
    accept(gate, 17)
    clock.now += 1
    assert gate.pace() == pytest.approx(20)


def test_idle_times_before_a_burst_do_not_slow_it_down(gate: Gate, clock: HandClock) -> None:
    """An hour at two answers a second says nothing about how many more there could have been."""
    for _ in range(7200):
        gate.accepted()
        clock.now += 0.5
    accept(gate, 20)
    close(gate, 1)
    clock.now += 1
    assert gate.pace() == pytest.approx(20, rel=0.1)


def learn_100(gate: Gate, retry_after: float = 1) -> None:
    """Teach a gate that a server with a burst of 20 takes 100 a second, and leave it paused."""
    clock = gate._clock
    assert isinstance(clock, HandClock)
    accept(gate, 20)
    close(gate, 1)
    clock.now += 1
    for _ in range(120):
        gate.accepted()
        clock.now += 0.01
    close(gate, retry_after)


def test_a_second_refusal_teaches_the_rate_of_a_token_bucket(gate: Gate, clock: HandClock) -> None:
    """It took 20 at once, and later 100 a second for 1.2 seconds: beyond its burst that is 83 a second."""
    learn_100(gate)
    clock.now += 1
    assert gate.pace() == pytest.approx(83 * SAFETY, rel=0.01)


def test_a_fixed_window_is_learned_from_what_it_took_and_its_pause(gate: Gate, clock: HandClock) -> None:
    """30 in a second, then told to wait for the rest of ten: three a second is what the server wants."""
    accept(gate, 30)
    close(gate, 10)
    clock.now += 10
    accept(gate, 30)
    clock.now += 1
    close(gate, 9)
    clock.now += 9
    assert gate.pace() == pytest.approx(3 * SAFETY, rel=0.01)


def test_a_rate_proven_before_the_first_refusal_is_kept(gate: Gate, clock: HandClock) -> None:
    """A job that ran at 100 a second for ten seconds is not taken for one of 30 after two refusals in a row."""
    for _ in range(1000):
        gate.accepted()
        clock.now += 0.01
    close(gate, 1)
    clock.now += 1
    for _ in range(30):
        gate.accepted()
        clock.now += 0.01
    close(gate, 1)
    clock.now += 1
    assert gate.pace() == pytest.approx(100 * SAFETY, rel=0.05)


def test_the_pace_returns_to_the_learned_rate_and_then_probes_for_more(gate: Gate, clock: HandClock) -> None:
    """The curve of CUBIC: reached after `PROBE_SECONDS`, flat there, above it later, and then doubling."""
    learn_100(gate)
    clock.now += 1
    paces = []
    for _ in range(5):
        paces.append(gate.pace() or 0)
        clock.now += PROBE_SECONDS / 2
    start, half, back, beyond, full = paces
    assert start < half < back < beyond < full
    assert back == pytest.approx(start / SAFETY)
    assert half == pytest.approx(back, rel=0.01)
    assert beyond - back == pytest.approx(back - half)
    clock.now += PROBE_DOUBLING - PROBE_SECONDS / 2
    assert gate.pace() == pytest.approx(2 * full)


def test_sends_at_a_learned_rate_are_spaced_evenly(gate: Gate, clock: HandClock) -> None:
    """The pace of the first second is the learned one."""
    learn_100(gate)
    clock.now += 1
    sent = moments(gate, 80)
    gaps = [after - before for before, after in pairwise(sent)]
    assert min(gaps) == pytest.approx(max(gaps), rel=0.02)
    assert 1 / gaps[0] == pytest.approx(83 * SAFETY, rel=0.01)


def test_a_learned_rate_that_is_refused_too_soon_is_lowered(gate: Gate, clock: HandClock) -> None:
    """Whatever the answers of a short time seem to prove."""
    learn_100(gate)
    clock.now += 1
    before = gate.pace() or 0
    for _ in range(100):
        gate.accepted()
        clock.now += 0.01
    close(gate, 1)
    clock.now += 1
    assert gate.pace() == pytest.approx(DECREASE * before)


def test_a_learned_rate_is_halved_at_most(gate: Gate, clock: HandClock) -> None:
    """A few answers do not throw away what was learned."""
    learn_100(gate)
    clock.now += 1
    before = gate.pace() or 0
    accept(gate, LEAST_EVIDENCE)
    close(gate, 1)
    clock.now += 1
    assert gate.pace() == pytest.approx(before / 2)


def test_a_server_that_takes_nothing_any_more_is_approached_slowly_again(gate: Gate, clock: HandClock) -> None:
    """In an outage each pause is followed by fewer sends; once it is over, the pace doubles as at the beginning."""
    learn_100(gate)
    paces = []
    for _ in range(9):
        clock.now += 1
        paces.append(gate.pace())
        close(gate, 1)
    assert paces[1:] == sorted(paces[1:], reverse=True)
    assert paces[-1] == SLOWEST_RATE
    clock.now += 1 + 8 * RAMP_SECONDS
    assert gate.pace() == pytest.approx(SLOWEST_RATE * 2**8)


def test_the_slowest_pace_is_always_tried(gate: Gate, clock: HandClock) -> None:
    """However often a server refuses, a request every other second goes out."""
    for _ in range(20):
        close(gate, 5)
        clock.now += 5
    assert gate.pace() == SLOWEST_RATE


def test_pauses_that_name_no_time_are_short_again_once_answers_came(gate: Gate, clock: HandClock) -> None:
    """Only refusals in a row make the pause longer."""
    for _ in range(4):
        close(gate, None)
        clock.now += gate.seconds_left()
    accept(gate, LEAST_EVIDENCE)
    close(gate, None)
    assert gate.seconds_left() == SHORTEST_PAUSE


def test_a_pace_that_holds_nobody_back_is_dropped_after_a_while(gate: Gate, clock: HandClock) -> None:
    """Half a minute after the pause, and a sender who need not wait: the gate is open again, as if new."""
    accept(gate, 10)
    close(gate, 1)
    clock.now += 1 + CALM_SECONDS
    assert gate.reserve() == 0
    assert gate.engaged
    clock.now += 1
    assert gate.reserve() == 0
    assert not gate.engaged
    assert gate.pace() is None
    close(gate, None)
    assert gate.seconds_left() == SHORTEST_PAUSE


def test_a_long_pause_is_no_calm(gate: Gate, clock: HandClock) -> None:
    """A minute in which nobody sent does not show that all is well: the first sends after it are paced."""
    accept(gate, 10)
    close(gate, 60)
    clock.now += 60
    sent = moments(gate, 50)
    assert gate.engaged
    assert sent[-1] > 0.5


def test_a_gate_that_still_holds_somebody_back_stays_engaged(gate: Gate, clock: HandClock) -> None:
    """Time alone does not open it while its pace is felt."""
    close(gate, 1)
    clock.now += CALM_SECONDS + 2
    for _ in range(2):
        gate._next_send = clock.now + 1
        assert gate.reserve() == 1
    assert gate.engaged


def test_each_reservation_is_a_moment_of_its_own(gate: Gate, clock: HandClock) -> None:
    """A thousand senders who ask at once get a thousand different moments, none before the pause ends."""
    close(gate, 2)
    moments = [gate.reserve() for _ in range(1000)]
    assert len(set(moments)) == 1000
    assert moments == sorted(moments)
    assert moments[0] == 2


def test_the_memory_of_the_gate_is_bounded(gate: Gate) -> None:
    """However many answers were accepted, only the last are remembered."""
    accept(gate, 10 * RECENT_ANSWERS)
    assert len(gate._recent) == RECENT_ANSWERS


def test_a_budget_lets_single_failures_be_retried_for_ever() -> None:
    """A retry that fails in every sixth look-up costs what the five others earn."""
    budget = RetryBudget()
    for _ in range(10_000):
        assert budget.spend()
        for _ in range(budget.COST):
            budget.earn(retried=False)


def test_a_budget_ends_a_storm() -> None:
    """If everything fails there are CAPACITY / COST retries, and then none."""
    budget = RetryBudget()
    granted = sum(budget.spend() for _ in range(1000))
    assert granted == budget.CAPACITY // budget.COST == 90
    assert not budget.spend()


def test_a_budget_recovers_with_successes_up_to_its_capacity() -> None:
    """COST successes pay for one retry; a long calm does not save up for a storm."""
    budget = RetryBudget()
    while budget.spend():
        pass
    for _ in range(budget.COST - 1):
        budget.earn(retried=False)
    assert not budget.spend()
    budget.earn(retried=False)
    assert budget.spend()
    for _ in range(10_000):
        budget.earn(retried=False)
    assert budget.tokens == budget.CAPACITY


def test_a_retry_that_worked_gives_its_cost_back() -> None:
    """So a server that fails now and then, but answers the next attempt, never uses the budget up."""
    budget = RetryBudget()
    for _ in range(1000):
        assert budget.spend()
        budget.earn(retried=True)
    assert budget.tokens == budget.CAPACITY
    budget.spend()
    budget.earn(retried=False)
    assert budget.tokens == budget.CAPACITY - budget.COST + 1
    budget.earn(retried=True)
    assert budget.tokens == budget.CAPACITY


@pytest.mark.parametrize("asked", [1e5, 9_999_999_999, 2.5e11, math.inf])
def test_a_pause_beyond_reason_is_cut(gate: Gate, asked: float) -> None:
    """One answer with a broken clock does not stop a client for ever."""
    gate.throttled(503, asked, gate.epoch)
    assert gate.seconds_left() == MOST_ASKED


def test_a_moment_given_back_is_free_again(gate: Gate, clock: HandClock) -> None:
    """Booking and giving back leaves the next moment where it was; one of another epoch is not there to give."""
    close(gate, 2)
    clock.now += 2
    gate.reserve()
    after_one = gate.next_in()
    epoch = gate.epoch
    for _ in range(1000):
        gate.give_back(epoch, clock.now + gate.reserve())
    assert gate.next_in() == pytest.approx(after_one)
    gate.give_back(epoch - 1, clock.now)
    assert gate.next_in() == pytest.approx(after_one)


def test_pauses_without_an_answer_between_them_are_barren(gate: Gate, clock: HandClock) -> None:
    """As long as hardly anything is accepted; then throttling is what it seems."""
    assert not gate.is_barren
    gate.throttled(429, 1, gate.epoch)
    assert gate.is_barren
    clock.now += 1
    gate.throttled(429, 1, gate.epoch)
    assert gate.is_barren
    clock.now += 1
    accept(gate, LEAST_EVIDENCE)
    assert not gate.is_barren
    gate.throttled(429, 1, gate.epoch)
    assert not gate.is_barren

"""The memory for records that waits keep is bounded in bytes."""

from typing import Any

import msgspec
import pytest

from kaizen_async._lookup import received
from kaizen_async._waiting import memory
from kaizen_async._waiting.memory import EndedRecords, HeavyRecords, TooHeavy


class Record(msgspec.Struct, frozen=True):
    """A record whose size is the size of its text."""

    id: str
    text: str = ""


class Unhashable(msgspec.Struct):
    """A record without a hash."""

    text: str


def test_heavy_last_records_share_one_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Light records are always kept. Heavy records are kept within one shared bound, and a removed one makes room."""
    monkeypatch.setattr(memory, "MOST_HEAVY", 50_000)
    records = HeavyRecords()
    light, heavy, too_heavy = Record("a", "x"), Record("a", "x" * 20_000), Record("a", "x" * memory.MOST_PER_RECORD)

    def is_kept(execution_id: str, record: Any) -> bool:
        return records.keep("endpoint", execution_id, record) is record

    records.forget("endpoint", "never kept")
    assert [is_kept(execution_id, heavy) for execution_id in "abc"] == [True, True, False]
    assert is_kept("a", heavy), "a record takes the place of the one before"
    assert is_kept("c", light)
    assert not is_kept("b", too_heavy)
    assert is_kept("c", heavy)
    records.forget("endpoint", "a")
    records.forget("endpoint", "a")
    assert is_kept("d", heavy)


def test_a_thousand_records_of_a_hostile_server_take_64_mib_at_most() -> None:
    """The bounds for received records, finished records and a thousand waits add up to at most 64 MiB."""
    last = memory.MOST_HEAVY + 1000 * memory.LIGHT
    assert 2 * received.MOST_BYTES + memory.MOST_ENDED + last <= 64 * 2**20


def test_a_stand_in_knows_equal_records() -> None:
    """A stand-in recognises equal records by their hash. Records without a hash always count as different."""
    stand_in = TooHeavy.of(Record("a", "x"))
    assert stand_in.stands_for(Record("a", "x"))
    assert not stand_in.stands_for(Record("a", "y"))
    assert not TooHeavy.of(Unhashable("x")).stands_for(Unhashable("x"))


@pytest.mark.parametrize("most", [0, 2])
def test_ended_records_are_bounded(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished records are bounded in number and in bytes, and the least recently used go first."""
    monkeypatch.setattr(memory, "MOST_ENDED", 50_000)
    ended = EndedRecords(most)
    assert ended.get("endpoint", "a") is None
    for execution_id in ("a", "b", "b"):
        ended.put("endpoint", execution_id, Record(execution_id))
    assert (ended.get("endpoint", "a") is not None) is bool(most)
    ended.put("endpoint", "c", Record("c"))
    kept = [execution_id for execution_id in "abc" if ended.get("endpoint", execution_id) is not None]
    assert kept == (["a", "c"] if most else [])
    for execution_id in ("d", "e"):
        ended.put("endpoint", execution_id, Record(execution_id, "x" * 30_000))
    kept = [execution_id for execution_id in "acde" if ended.get("endpoint", execution_id) is not None]
    assert kept == (["e"] if most else [])

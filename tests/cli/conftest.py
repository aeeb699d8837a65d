"""What the tests of the command share."""

from collections.abc import Iterator

import pytest
from running_command import Command, in_process

from kaizen_async.testing import KaizenEmulator, Life


@pytest.fixture
def server() -> Iterator[KaizenEmulator]:
    """Yield an emulator with three finished executions."""
    with KaizenEmulator() as emulator:
        emulator.add_many(["a", "b", "c"], Life.ended())
        yield emulator


@pytest.fixture
def command(server: KaizenEmulator, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Return a function that runs the command against the emulator."""
    return in_process(server, monkeypatch)

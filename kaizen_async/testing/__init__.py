"""A server on your own machine that plays the Kaizen API, for tests of what uses it.

`KaizenEmulator` listens on loopback, so the code under test runs unchanged: real sockets, real timeouts, real
connection resets. You say which executions exist and how they live, and what goes wrong:

    async with KaizenEmulator() as emulator:
        emulator.add("exec_1", Life.lasting(2))
        emulator.faults.next(Fault.status(503), times=2, id="exec_1")
        async with KaizenClient(base_url=emulator.base_url) as kaizen:
            execution = await kaizen.instructor_executions.wait("exec_1")
        assert execution.is_finished
        assert emulator.answers[503] == 2

In pytest, the fixture `kaizen_emulator` gives one to each test that requests it.
"""

# Loaded on first use, so that importing one name does not load the whole kit.
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kaizen_async.testing.chance import fraction
    from kaizen_async.testing.clock import VirtualClock
    from kaizen_async.testing.emulator import KaizenEmulator, ScriptError
    from kaizen_async.testing.fault_plan import FaultPlan
    from kaizen_async.testing.faults import Answer, Exchange, Fault
    from kaizen_async.testing.history import Request
    from kaizen_async.testing.lives import Life
    from kaizen_async.testing.recording import Recorder

__all__ = [
    "Answer",
    "Exchange",
    "Fault",
    "FaultPlan",
    "KaizenEmulator",
    "Life",
    "Recorder",
    "Request",
    "ScriptError",
    "VirtualClock",
    "fraction",
]

_MODULES = {
    "Answer": "faults",
    "Exchange": "faults",
    "Fault": "faults",
    "FaultPlan": "fault_plan",
    "KaizenEmulator": "emulator",
    "Life": "lives",
    "Recorder": "recording",
    "Request": "history",
    "ScriptError": "emulator",
    "VirtualClock": "clock",
    "fraction": "chance",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

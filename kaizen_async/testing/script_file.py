"""A script for an emulator in a file, JSON or YAML: what `kaizen-async emulator --config` reads.

api_key: secret
default: {lasting: 60}
executions:
  exec_1: {ended: Completed}
  exec_2: {lasting: 30, status: Failed, workflow: Download invoices}
  exec_3: {running: Paused, record: {sessionId: s_1}}
  exec_4: {steps: [[Enqueued, 0], [InProgress, 5], [Completed, 60, {downloads: []}]]}
kinds:
  invoices/get: {inv_1: {total: 12}}
rate_limit: {rate: 100, burst: 20}
faults:
  - {status: 503, times: 2, id: exec_1}
  - {latency: 0.2, chance: 0.1}
"""

from collections.abc import Iterable
from datetime import date, datetime
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from kaizen_async.errors import printable
from kaizen_async.testing.emulator import KaizenEmulator
from kaizen_async.testing.faults import Fault
from kaizen_async.testing.lives import Life

_YAML: Final = {".yaml", ".yml"}
_LARGEST: Final = 1 << 24
"""Bytes above which a file is not read."""
_MOST_VALUES: Final = 1_000_000
"""Values that YAML may stand for: with aliases of aliases, a file of a kilobyte stands for billions."""


class ScriptedLife(msgspec.Struct, forbid_unknown_fields=True):
    """One execution: exactly one of `ended`, `lasting`, `running` and `steps`, and what its record holds."""

    ended: str | None = None
    lasting: float | None = None
    running: str | None = None
    steps: list[tuple[Any, ...]] | None = None
    ends: bool = True
    status: str = "Completed"
    age: float = 0.0
    workflow: str | dict[str, Any] | None = None
    record: dict[str, Any] = {}
    without: list[str] = []

    def life(self) -> Life:
        """Return the life.

        Raises:
            TypeError, ValueError: The file gives no life, several, or one that is not valid.
        """
        given = [name for name in ("ended", "lasting", "running", "steps") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"an execution takes one of ended, lasting, running and steps, not {' and '.join(given)}")
        if self.lasting is not None:
            return Life.lasting(self.lasting, status=self.status, age=self.age)
        if self.running is not None:
            return Life.running(status=self.running, age=self.age)
        if self.steps is not None:
            steps: list[Any] = self.steps
            return Life.of(*steps, ends=self.ends, age=self.age)
        return Life.ended(status=self.ended or self.status)


class ScriptedFault(msgspec.Struct, forbid_unknown_fields=True):
    """One fault: exactly one of `status`, `latency` and `fault`; and when: `times`, `nth`, `chance`, or always."""

    status: int | None = None
    latency: float | None = None
    fault: str | None = None
    id: str | None = None
    times: int | None = None
    nth: int | None = None
    chance: float | None = None

    def made(self) -> Fault:
        """Return the fault.

        Raises:
            TypeError, ValueError: The fault is unknown, or the file gives none or several.
        """
        if [self.status, self.latency, self.fault].count(None) != 2:  # noqa: PLR2004 - all but one
            raise ValueError("a fault takes exactly one of status, latency and fault")
        if self.status is not None:
            return Fault.status(self.status)
        if self.latency is not None:
            return Fault.latency(self.latency)
        if self.fault not in _NAMED:
            raise ValueError(f"a fault is one of {', '.join(_NAMED)}, not {self.fault!r:.80}")
        return _NAMED[self.fault]


class ScriptedRate(msgspec.Struct, forbid_unknown_fields=True):
    """A rate limit."""

    rate: float
    burst: int = 20
    retry_after: float | None = 1.0


class Script(msgspec.Struct, forbid_unknown_fields=True):
    """The content of a file."""

    api_key: str | None = None
    default: ScriptedLife | None = None
    executions: dict[str, ScriptedLife] = {}
    kinds: dict[str, dict[str, Any]] = {}
    rate_limit: ScriptedRate | None = None
    faults: list[ScriptedFault] = []

    def apply(self, emulator: KaizenEmulator) -> None:
        """Let an emulator follow the script.

        Raises:
            TypeError, ValueError: A part is not valid; the message says which.
        """
        if self.default is not None:
            emulator.accept_any(self.default.life().with_fields(self.default.record))
        for execution_id, scripted in self.executions.items():
            fields = {"workflow": scripted.workflow, "record": scripted.record, "without": scripted.without}
            emulator.add(execution_id, scripted.life(), **fields)  # type: ignore[arg-type]
        for path, records in self.kinds.items():
            emulator.serve(path, records)
        if self.rate_limit is not None:
            emulator.rate_limit(self.rate_limit.rate, self.rate_limit.burst, self.rate_limit.retry_after)
        for scripted_fault in self.faults:
            _apply_fault(emulator, scripted_fault)


def read_script(file: Path) -> Script:
    """Return the script in a file: YAML if its name ends in .yaml or .yml, else JSON.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not a valid script; the message says where.
        ImportError: It is YAML, and PyYAML is not installed (extra `testing`).
    """
    shown = printable(str(file))
    with file.open("rb") as opened:
        data = opened.read(_LARGEST + 1)  # of a device that never ends too
    if len(data) > _LARGEST:
        raise ValueError(f"{shown} is larger than {_LARGEST} bytes, which is too large for a script")
    try:
        if file.suffix.lower() not in _YAML:
            return msgspec.json.decode(data, type=Script)
        content = msgspec.yaml.decode(data)
        _require_few_values(content)
        return msgspec.convert(content, Script, builtin_types=(datetime, date))
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        why = printable(" ".join(str(error).split()))
        raise ValueError(f"{shown} is not a script for the emulator: {why}") from None


def _require_few_values(content: object) -> None:
    """Refuse YAML that stands for too many values, before anything walks through all of them.

    Raises:
        ValueError: It does, or a part of it contains itself.
    """
    sizes: dict[int, int] = {}

    def size_of(value: object) -> int:
        place = id(value)
        if isinstance(value, dict):
            parts: Iterable[object] = cast("dict[object, object]", value).values()
        elif isinstance(value, list):
            parts = cast("list[object]", value)
        else:
            return 1
        if place not in sizes:
            sizes[place] = _MOST_VALUES  # for a part that contains itself
            sizes[place] = 1 + sum(map(size_of, parts))
        return sizes[place]

    if size_of(content) > _MOST_VALUES:
        raise ValueError(f"its aliases stand for more than {_MOST_VALUES:,} values")


def _apply_fault(emulator: KaizenEmulator, scripted: ScriptedFault) -> None:
    fault = scripted.made()
    if scripted.times is not None:
        emulator.faults.next(fault, scripted.times, id=scripted.id)
    elif scripted.nth is not None:
        emulator.faults.nth(fault, scripted.nth, id=scripted.id)
    elif scripted.chance is not None:
        emulator.faults.chance(fault, scripted.chance, id=scripted.id)
    else:
        emulator.faults.always(fault, id=scripted.id)


_NAMED: Final = {
    "reset": Fault.reset(),
    "disconnect": Fault.disconnect(),
    "hang": Fault.hang(),
    "html_502": Fault.html_502(),
    "truncated_body": Fault.truncated_body(),
    "malformed_body": Fault.malformed_body(),
    "stalled_body": Fault.stalled_body(),
}

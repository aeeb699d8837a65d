"""The formats of results, in one table: how a result is written, and how `--resume` reads it back.

A result is given as a JSON object, its document. A format makes one line of it. A new format is a class and an entry in
`FORMATS`: the option `--format`, files, pipes, `--fields` and `--resume` then work with it.
"""

import csv
import io
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, ClassVar, Final

import msgspec

from kaizen_async._cli.formats import is_formula, pick, without_apostrophe

COLUMNS: Final = (
    *("id", "status", "workflow.name", "startTime", "endTime", "durationMs"),
    *("error.type", "error.message", "error.status", "error.attempts", "error.retryable", "error.requestId"),
    "error.lastExecution.status",
)
"""The columns of CSV, unless `--fields` names others."""

CHANGE_COLUMNS: Final = ("id", "before.status", "after.status", *COLUMNS[6:])
"""The columns of CSV for the changes that `watch` sees."""

JSON_TAIL: Final = b"\n]\n"
"""How a file of JSON ends, after its results."""

_UNSAFE: Final = re.compile(
    "[\x7f-\x9f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)
"""Characters that JSON allows and that harm the program that shows it: C1 controls, DEL, invisible ones, those that
change the direction of text, the line breaks of JavaScript, and halves of characters."""


class Fields:
    """The fields of each result that are written.

    Args:
        chosen: The paths that `--fields` names; empty for all fields.
        columns: The columns of a format with columns, if `--fields` names none.
        formulas: Whether to write cells unchanged that a spreadsheet would take for formulas.
    """

    def __init__(self, chosen: tuple[str, ...], columns: tuple[str, ...], *, formulas: bool) -> None:
        self.chosen = chosen
        self.columns = chosen or columns
        self.formulas = formulas
        self._used = dict.fromkeys(chosen, False)

    def pick(self, data: Any, path: str) -> Any:
        """Return the value at a path of a document."""
        value = pick(data, path)
        if value is not None and path in self._used:
            self._used[path] = True
        return value

    @property
    def unused(self) -> list[str]:
        """Fields that no result had and that are not known, perhaps because their names are misspelled."""
        return [path for path, used in self._used.items() if not used and path not in COLUMNS]


class Format(ABC):
    """A format that has one line for each result.

    Attributes:
        is_array: Whether the lines are the elements of a JSON array. Then the writer adds brackets and commas.
        resumable: Whether a line shows its id and whether it is a failure, so that `--resume` can read it.
        suffix: The end of the names of files that have this format unless `--format` says otherwise.
        failure_fields: If `--fields` is given, `--resume` needs one of these fields to recognise a failure.
    """

    is_array: ClassVar[bool] = False
    resumable: ClassVar[bool] = True
    suffix: ClassVar[str | None] = None
    failure_fields: ClassVar[tuple[str, ...]] = ()

    def head(self, fields: Fields) -> bytes:
        """Return the line at the beginning of a file; empty if the format has none."""
        del fields
        return b""

    @abstractmethod
    def line(self, execution_id: str, document: bytes, fields: Fields) -> bytes:
        """Return the line of a result, with its line break."""

    @abstractmethod
    def read(self, line: bytes, number: int, fields: Fields) -> tuple[str | None, bool]:
        """Return the id of a line and whether it has a record. The id is None if the line is not a result.

        Raises:
            ValueError, KeyError, RecursionError, csv.Error: The line was not written in this format.
        """


class JsonLines(Format):
    """One JSON object in each line."""

    def line(self, execution_id: str, document: bytes, fields: Fields) -> bytes:
        """Return the document, or an object of the chosen fields by their paths."""
        del execution_id
        if fields.chosen:
            data = decoded(document)
            chosen = {path: fields.pick(data, path) for path in fields.chosen}
            if is_failure(data):
                chosen["error"] = data["error"]
            document = msgspec.json.encode(chosen)
        return safe(document) + b"\n"

    def read(self, line: bytes, number: int, fields: Fields) -> tuple[str | None, bool]:
        """Read the members `id` and `error`."""
        del number, fields
        parts = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
        error = msgspec.json.decode(parts["error"]) if "error" in parts else None
        return msgspec.json.decode(parts["id"], type=str), not is_failure({"error": error})


class JsonArray(JsonLines):
    """The same objects as the elements of one array."""

    is_array = True

    def read(self, line: bytes, number: int, fields: Fields) -> tuple[str | None, bool]:
        """Read an element, with or without the comma behind it."""
        stripped = line.strip().removesuffix(b",")
        return (None, False) if stripped in (b"[", b"]", b"[]") else super().read(stripped, number, fields)


class Csv(Format):
    """A row for each result, below a row with the names of the columns."""

    suffix = ".csv"
    failure_fields = ("error.attempts", "error.retryable")

    def head(self, fields: Fields) -> bytes:
        """Return the names of the columns."""
        return _csv_row(fields.columns)

    def line(self, execution_id: str, document: bytes, fields: Fields) -> bytes:
        """Return a row."""
        del execution_id
        data = decoded(document)
        return _csv_row(cell_of(fields.pick(data, path), formulas=fields.formulas) for path in fields.columns)

    def read(self, line: bytes, number: int, fields: Fields) -> tuple[str | None, bool]:
        """Read the columns of the id and of failures. The first line must name the columns."""
        cells = next(csv.reader([line.decode()]))
        if number == 1:
            if cells != list(fields.columns):
                raise ValueError("other columns")
            return None, False
        row = dict(zip(fields.columns, cells, strict=True))
        return without_apostrophe(row["id"]), not any(row.get(name) for name in self.failure_fields)


class Ids(Format):
    """The ids alone, for `--only-ids`."""

    resumable = False

    def line(self, execution_id: str, document: bytes, fields: Fields) -> bytes:
        """Return the id."""
        del document, fields
        return execution_id.encode() + b"\n"

    def read(self, line: bytes, number: int, fields: Fields) -> tuple[str | None, bool]:
        """Return the line as an id."""
        del number, fields
        return line.decode(), True


ONLY_IDS: Final = "ids"
TABLE: Final = "table"
"""For people. Its rows are drawn from the outcomes themselves, see `table.py`, and no program reads them back."""

FORMATS: Final[dict[str, Format]] = {"ndjson": JsonLines(), "json": JsonArray(), "csv": Csv(), ONLY_IDS: Ids()}
"""The formats that a program can read."""

CHOICES: Final = (*(name for name in FORMATS if name != ONLY_IDS), TABLE)
"""The choices of `--format`."""


def is_failure(document: Any) -> bool:
    """Return whether a document says that a lookup failed. An `error` of a record itself lacks some of these parts."""
    error = pick(document, "error")
    return isinstance(error, dict) and {"type", "attempts", "retryable"} <= error.keys()


def decoded(document: bytes) -> Any:
    """Return the value of a document."""
    try:
        return msgspec.json.decode(document)
    except (msgspec.DecodeError, UnicodeDecodeError):  # half a character, or no UTF-8: what the server sent is kept
        return json.loads(document.decode(errors="replace"))


def _csv_row(cells: Iterable[str]) -> bytes:
    row = io.StringIO()
    csv.writer(row, lineterminator="\n").writerow(cells)
    return row.getvalue().encode(errors="backslashreplace")


def safe(line: bytes) -> bytes:
    """Return JSON as valid UTF-8, with the characters escaped that could harm a terminal or a reader."""
    if line.isascii() and b"\x7f" not in line:
        return line
    return _UNSAFE.sub(_escaped, line.decode(errors="replace")).encode()


def _escaped(found: re.Match[str]) -> str:
    units = found[0].encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[at]:02x}{units[at + 1]:02x}" for at in range(0, len(units), 2))


def cell_of(value: Any, *, formulas: bool) -> str:
    """Return a value as a CSV cell.

    Args:
        value: What is in the document.
        formulas: Whether to write cells unchanged that a spreadsheet would take for formulas.
    """
    if value is None:
        return ""
    text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
    if isinstance(value, str) and not formulas and is_formula(text):
        text = f"'{text}"
    # A cell with a line break would make two lines of a row, and a crash could leave one of them.
    return _UNSAFE.sub(_escaped, _CONTROL.sub(lambda found: _NAMED.get(found[0], " "), text))


_CONTROL: Final = re.compile("[\x00-\x1f]")
_NAMED: Final = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}

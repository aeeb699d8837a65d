"""The formats that ids come in: a reader takes bytes, in whatever pieces they arrive, and gives ids.

The format is detected from the first line that is neither blank nor a comment, or given. A piece of input that is not
an id is reported with its line number, and the reader continues with the next one.
"""

import codecs
import csv
import io
import json
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Final, cast

from kaizen_async.errors import printable

LONGEST: Final = 1 << 20
"""Bytes of a line, a JSON value or a CSV row above which it is not read."""

FORMATS: Final = ("lines", "json", "csv", "tsv", "nul")
"""The choices of `--input-format`. `json` stands for every sequence of JSON values: NDJSON, strings, arrays."""

_FORMULA: Final = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""First characters for which spreadsheets take a cell for a formula, the wide ones of East Asian keyboards too."""

DELIMITERS: Final = (",", ";", "\t")
"""What may stand between the cells of CSV, most likely first."""

_ID_COLUMNS: Final = ("id", "execution_id", "executionid", "execution id")
_BLANK: Final = r"\s\u00ad\u061c\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff"
_INVISIBLE: Final = f"[{_BLANK}]+"
_LEADING: Final = re.compile(rf"^[\x00-\x1f\x7f-\x9f{_BLANK}]+")
_AROUND: Final = re.compile(f"^{_INVISIBLE}|{_INVISIBLE}$")
_LITERAL: Final = 8
"""Characters that the longest incomplete token at the end of a piece of JSON may have: `\\ud83d`, `-Infinity`."""

csv.field_size_limit(LONGEST)


class NotAnIdError(ValueError):
    """Raised for a piece of input that is not an id; the message says what is wrong with it."""


class LayoutError(ValueError):
    """Raised for an input in which no ids can be found; the message says why."""


@dataclass
class Counts:
    """What was read.

    Attributes:
        ids: Valid ids.
        blank: Blank lines.
        comments: Lines that begin with `#`.
        invalid: Lines, JSON values or CSV rows that are not ids.
    """

    ids: int = 0
    blank: int = 0
    comments: int = 0
    invalid: int = 0


@dataclass(frozen=True)
class Layout:
    """How the input is laid out.

    Attributes:
        format: One of `FORMATS`; None to detect it.
        field: Where the id is in a JSON object, as a path of names separated by dots.
        column: The name of the CSV column that holds the ids; None for one with a usual name.
    """

    format: str | None = None
    field: str = "id"
    column: str | None = None


def checked_id(text: str) -> str:
    """Return an id without the white space and invisible characters around it.

    Raises:
        NotAnIdError: Nothing is left, or there is a character in it that cannot be part of an id.
    """
    if text.isascii() and text.isprintable() and " " not in text and text:
        return text
    execution_id = _AROUND.sub("", text)
    if not execution_id:
        raise NotAnIdError("is empty")
    for char in execution_id:
        if char.isspace() or not char.isprintable():
            other = "a control character" if unicodedata.category(char) == "Cc" else "not a Unicode character"
            name = unicodedata.name(char, other).lower().replace("unicode", "Unicode")
            raise NotAnIdError(f"is not an id, because it contains U+{ord(char):04X} ({name}): {excerpt(execution_id)}")
        if char == "\N{REPLACEMENT CHARACTER}":
            raise NotAnIdError("is not valid text in its encoding")
    return execution_id


def pick(value: Any, path: str) -> Any:
    """Return what is in a JSON value under a path of names (and numbers of list items); None if there is nothing."""
    found: Any = value
    for name in path.split("."):
        if isinstance(found, dict):
            found = cast("dict[str, object]", found).get(name)
        elif isinstance(found, list) and name.isdecimal():
            items = cast("list[object]", found)
            found = items[int(name)] if int(name) < len(items) else None
        else:
            return None
    return found


def excerpt(text: str) -> str:
    """Return the beginning of a foreign text, safe to show."""
    shown = printable(text)
    return repr(shown if len(shown) <= 60 else f"{shown[:59]}…")  # noqa: PLR2004 - fits a line of a terminal


def detect(line: str, layout: Layout) -> str:
    """Return the format of an input from its first line that is neither blank nor a comment.

    Raises:
        LayoutError: It looks like CSV, but no column has a usual name for ids; or it begins a table of the command.
    """
    if layout.column is None and (line.startswith(("{", "[")) or len(line) > LONGEST):
        return "json" if line.startswith(("{", "[")) else "lines"
    if line.split()[:2] in (["ID", "WORKFLOW"], ["ID", "STATUS"]) and not set(line) & set(DELIMITERS):
        raise LayoutError("is that of a table for people; write it with --format ndjson or csv to read it again")
    delimiter = _delimiter_of(line, layout)
    cells = _cells_of(line, delimiter)
    if layout.column is not None or _has_column(cells, layout):
        return "tsv" if delimiter == "\t" else "csv"
    if line.startswith('"') and len(cells) == 1:
        return "json"
    if len(cells) > 1:
        columns = ", ".join(printable(cell) for cell in cells[:12])
        raise LayoutError(f"looks like CSV without a column id ({columns}); name the column with --column")
    return "lines"


def _cells_of(header: str, delimiter: str) -> list[str]:
    cells = next(csv.reader(io.StringIO(header), delimiter=delimiter), cast("list[str]", []))
    return [cell.strip() for cell in cells]


def _delimiter_of(header: str, layout: Layout) -> str:
    """Return the delimiter of a CSV header: a comma, a semicolon (as Excel writes in some countries) or a tab."""
    for delimiter in DELIMITERS:
        if _has_column(_cells_of(header, delimiter), layout):
            return delimiter
    return max(DELIMITERS, key=header.count)


def _has_column(cells: list[str], layout: Layout) -> bool:
    """Whether a CSV header names the column that holds the ids."""
    return any(cell.lower() in _names_of_column(layout) for cell in cells)


def _names_of_column(layout: Layout) -> tuple[str, ...]:
    return _ID_COLUMNS if layout.column is None else (layout.column.strip().lower(),)


def _is_open(row: str) -> bool:
    """Whether a CSV row ends within a quoted cell, so that the next line belongs to it."""
    try:
        next(csv.reader(io.StringIO(row), strict=True), None)
    except csv.Error as error:
        return _ends_within_cell(error)
    return False


def _ends_within_cell(error: csv.Error) -> bool:
    return "unexpected end" in str(error)


class Reader(ABC):
    """Turns pieces of bytes into ids.

    Args:
        layout: Where the ids are in the input.
        counts: Counts what is read.
        report: Called with the line number and the reason for each piece of input that is not an id.
        line: The number of the last line before the first piece.
    """

    def __init__(self, layout: Layout, counts: Counts, report: Callable[[int, str], None], line: int = 0) -> None:
        self.layout: Layout = layout
        self.counts: Counts = counts
        self.line: int = line
        self._report = report

    @abstractmethod
    def feed(self, piece: bytes) -> Iterator[str]:
        """Yield the ids that this piece completes."""

    @abstractmethod
    def end(self) -> Iterator[str]:
        """Yield the ids in what is left at the end of the input."""

    def _found(self, text: str, line: int) -> Iterable[str]:
        """Return a text if it is an id, or report it."""
        try:
            execution_id = checked_id(text)
        except NotAnIdError as error:
            self._refuse(str(error), line)
            return ()
        self.counts.ids += 1
        return (execution_id,)

    def _refuse(self, why: str, line: int) -> None:
        self.counts.invalid += 1
        self._report(line, why)


class LineReader(Reader):
    """Reads one id from each line, and is the base of formats that consist of lines."""

    separator = b"\n"
    comment = b"#"

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._rest = b""
        self._skipping = False

    def feed(self, piece: bytes) -> Iterator[str]:
        """Yield the ids in the lines that this piece completes."""
        *lines, self._rest = (self._rest + piece).split(self.separator)
        for line in lines:
            yield from self._take(line)
        if len(self._rest) > LONGEST:
            if not self._skipping:
                self._refuse(f"is longer than {LONGEST:,} bytes", self.line + 1)
            self._rest, self._skipping = b"", True

    def end(self) -> Iterator[str]:
        """Yield the id in a last line without a line break."""
        if self._rest or self._skipping:
            yield from self._take(self._rest)

    def _take(self, line: bytes) -> Iterable[str]:
        self.line += 1
        if self._skipping:
            self._skipping = False
        elif len(line) > LONGEST:
            self._refuse(f"is longer than {LONGEST:,} bytes", self.line)
        elif not (stripped := line.strip()):
            self.counts.blank += 1
        elif self.comment and stripped.startswith(self.comment):
            self.counts.comments += 1
        else:
            # What is not text matters only in an id, where `checked_id` finds it.
            return self._read(line.decode(errors="replace"), self.line)
        return ()

    def _read(self, text: str, line: int) -> Iterable[str]:
        """Return the ids in a line."""
        if text.startswith(("{", "[", '"')) or "," in text:
            self._refuse(f"is not an id, but looks like JSON or CSV: {excerpt(text)}", line)
            return ()
        return self._found(text, line)


class NulReader(LineReader):
    """Reads ids that are separated by NUL, as `find -print0` and `sort -z` write them."""

    separator = b"\0"
    comment = b""


class CsvReader(LineReader):
    """Reads one column of CSV or TSV. The first row names the columns. A quoted cell may contain line breaks."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._column: int | None = None
        self._delimiter = ","
        self._row: list[tuple[int, str]] = []
        self._row_size = 0

    def end(self) -> Iterator[str]:
        """Yield the ids of what is left; a quoted cell that never ends hides no row."""
        yield from super().end()
        while self._row:
            yield from self._give_up("a quoted cell never ends")

    def _take(self, line: bytes) -> Iterable[str]:
        if not self._row or self._skipping or len(line) > LONGEST:
            return super()._take(line)
        self.line += 1  # in a quoted cell, where blank lines and # are text
        return self._read(line.decode(errors="replace"), self.line)

    def _read(self, text: str, line: int) -> Iterator[str]:
        self._row.append((line, text))
        self._row_size += len(text) + 1
        if len(self._row) > 1 and '"' not in text and self._row_size <= LONGEST:
            return  # the quoted cell continues
        row = "\n".join(part for _, part in self._row)
        if self._column is None:
            self._delimiter = "\t" if self.layout.format == "tsv" else _delimiter_of(row, self.layout)
        try:
            cells = next(csv.reader(io.StringIO(row), delimiter=self._delimiter, strict=True))
        except csv.Error as error:
            if not _ends_within_cell(error) or self._row_size > LONGEST:
                yield from self._give_up(str(error))
            return
        line = self._row[0][0]
        self._row, self._row_size = [], 0
        if self._column is None:
            self._column = self._find_column(cells)
        elif len(cells) <= self._column:
            self._refuse(f"has no column {self._column + 1}", line)
        else:
            yield from self._found(without_apostrophe(cells[self._column]), line)

    def _find_column(self, cells: list[str]) -> int:
        wanted = _names_of_column(self.layout)
        for at, name in enumerate(cells):
            if name.strip().lower() in wanted:
                return at
        shown = ", ".join(printable(name.strip()) for name in cells[:12])
        raise LayoutError(f"has no column {self.layout.column or 'id'!r} ({shown}); name the column with --column")

    def _give_up(self, why: str) -> Iterator[str]:
        """Report the first line of a row that cannot be read, and read the lines after it again."""
        (line, _), *others = self._row
        self._row, self._row_size = [], 0
        self._refuse(f"is not CSV: {why}", line)
        for number, text in others:
            yield from self._read(text, number)


def is_formula(cell: str) -> bool:
    """Return whether a spreadsheet may take a cell for a formula. Some drop white space and controls before it."""
    return cell.startswith(("\t", "\r")) or _LEADING.sub("", cell).startswith(_FORMULA)


def without_apostrophe(cell: str) -> str:
    """Return a cell without the apostrophe that our own CSV puts before what looks like a formula."""
    return cell[1:] if cell.startswith("'") and is_formula(cell[1:]) else cell


class JsonReader(Reader):
    """Reads a sequence of JSON values: one a line, one after another, or in arrays.

    A value is a string, a whole number, or an object with the id in a field. If a value cannot be read, the reader
    continues on the next line.
    """

    _value: Final = re.compile(r"[^\s,\[\]\ufeff]")
    _decode: Final = json.JSONDecoder().raw_decode

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.line = max(1, self.line + 1)
        self._text = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._line_is_blank = True
        self._skipping = False

    def feed(self, piece: bytes) -> Iterator[str]:
        """Yield the ids of the values that this piece completes."""
        self._text += self._decoder.decode(piece)
        yield from self._read(final=False)

    def end(self) -> Iterator[str]:
        """Yield the ids of what is left."""
        self._text += self._decoder.decode(b"", final=True)
        yield from self._read(final=True)

    def _read(self, *, final: bool) -> Iterator[str]:
        text, at = self._text, 0
        while True:
            at = self._skip_gap(text, at)
            if at == len(text):
                break
            self._line_is_blank = False
            if self._skipping or text[at] == "#":
                end_of_line = text.find("\n", at)
                if end_of_line < 0:
                    break
                self.counts.comments += not self._skipping
                self._skipping, at = False, end_of_line
                continue
            try:
                value, end = self._decode(text, at)
            except (ValueError, RecursionError) as error:
                if not final and _is_incomplete(error, text) and len(text) - at <= LONGEST:
                    break
                self._refuse(f"is not JSON: {excerpt(text[at : at + 80].partition(chr(10))[0])}", self.line)
                self._skipping = True
                continue
            if end == len(text) and not final:
                break  # the number may continue
            yield from self._id_in(value, self.line)
            self.line += text.count("\n", at, end)
            at = end
        self._text = text[at:]

    def _skip_gap(self, text: str, at: int) -> int:
        """Return where the next value begins, and count the lines up to there."""
        value = self._value.search(text, at)
        end = len(text) if value is None else value.start()
        first, *others = text[at:end].split("\n")
        self._line_is_blank = self._line_is_blank and not first.strip()
        for part in others:
            self.line += 1
            self.counts.blank += self._line_is_blank
            self._line_is_blank = not part.strip()
        return end

    def _id_in(self, value: Any, line: int) -> Iterator[str]:
        if isinstance(value, dict):
            value = pick(value, self.layout.field)
            if value is None:
                self._refuse(f"has no field {self.layout.field!r}; name the field with --field", line)
                return
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        if isinstance(value, str):
            yield from self._found(value, line)
        else:
            self._refuse(f"has {excerpt(json.dumps(value))} where an id was expected", line)


def _is_incomplete(error: Exception, text: str) -> bool:
    """Whether JSON could not be read because it continues in the next piece."""
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.msg.startswith("Unterminated string") or error.pos >= len(text) - _LITERAL


READERS: Final[dict[str, type[Reader]]] = {
    "lines": LineReader,
    "json": JsonReader,
    "csv": CsvReader,
    "tsv": CsvReader,
    "nul": NulReader,
}


class DetectingReader(Reader):
    """Finds out encoding and format from the first bytes, then leaves the rest to the reader of that format."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._start = b""
        self._decoder: codecs.IncrementalDecoder | None = None
        self._encoding_is_known = False
        self._line_breaks = io.IncrementalNewlineDecoder(None, translate=True)
        self._reader: Reader | None = None

    def feed(self, piece: bytes) -> Iterator[str]:
        """Yield the ids that this piece completes."""
        yield from self._take(piece, final=False)

    def end(self) -> Iterator[str]:
        """Yield the ids of what is left."""
        yield from self._take(b"", final=True)
        if self._reader is not None:
            yield from self._reader.end()

    def _take(self, piece: bytes, *, final: bool) -> Iterator[str]:
        if not self._encoding_is_known:
            self._start += piece
            if not final and len(self._start) < 4 and (b"\n" not in self._start or b"\0" in self._start):  # noqa: PLR2004 - the longest mark
                return
            encoding, mark = encoding_of(self._start, guess=self.layout.format != "nul")
            piece, self._start = self._start[mark:], b""
            self._decoder = None if encoding == "utf-8" else codecs.getincrementaldecoder(encoding)("replace")
            self._encoding_is_known = True
        if self._decoder is not None:
            piece = self._decoder.decode(piece, final).encode(errors="replace")
        if self.layout.format != "nul":  # of any encoding, latin-1 leaves each byte as it is
            piece = self._line_breaks.decode(piece.decode("latin-1"), final).encode("latin-1")
        if self._reader is None:
            self._start += piece
            self._find_format(final=final)
            piece, self._start = (self._start, b"") if self._reader is not None else (b"", self._start)
        if self._reader is not None:
            yield from self._reader.feed(piece)

    def _find_format(self, *, final: bool) -> None:
        """Skip blank lines and comments; with the line after them, choose the reader."""
        start, at = self._start, 0
        while self._reader is None:
            blank = _BLANK_LINES.match(start, at)
            at = at if blank is None else blank.end()
            self.counts.blank += 0 if blank is None else blank[0].count(b"\n")
            self.line += 0 if blank is None else blank[0].count(b"\n")
            end = _end_of_row(start, at)
            line = start[at:] if end < 0 else start[at:end]
            if end < 0 and not (final or line.lstrip()[:1] == b"[" or b"\0" in line or len(line) > LONGEST):
                break
            if end >= 0 and line.lstrip()[:1] == b"#" and self.layout.format != "nul":
                self.counts.comments += 1
                self.line += 1
                at = end + 1
            elif line.strip() or end >= 0:
                chosen = self.layout.format or ("nul" if b"\0" in line else None)
                chosen = chosen or detect(line.decode(errors="replace").strip(), self.layout)
                self.layout = replace(self.layout, format=chosen)
                self._reader = READERS[chosen](self.layout, self.counts, self._report, self.line)
            else:
                break
        self._start = start[at:]


def _end_of_row(text: bytes, at: int) -> int:
    """Return where the line at a place ends, after the line breaks in a quoted CSV cell; -1 if it does not yet."""
    end = text.find(b"\n", at)
    if text[at : at + 1] == b'"' and end >= 0:
        while 0 <= end < at + LONGEST and _is_open(text[at:end].decode(errors="replace")):
            quote = text.find(b'"', end)
            end = -1 if quote < 0 else text.find(b"\n", quote)
    return end


_BLANK_LINES: Final = re.compile(rb"(?:[ \t\r\f\v]*\n)+")


def encoding_of(start: bytes, *, guess: bool) -> tuple[str, int]:
    """Return the encoding of a text from its first bytes, and the length of its byte order mark.

    Args:
        start: The first bytes, four if there are as many.
        guess: Whether zero bytes may be taken for halves of UTF-16 characters.
    """
    for mark, encoding in _MARKS:
        if start.startswith(mark):
            return encoding, len(mark)
    zeros = [byte == 0 for byte in start[:4]]
    if guess and zeros in ([False, True], [False, True, False, True]):
        return "utf-16-le", 0
    if guess and zeros in ([True, False], [True, False, True, False]):
        return "utf-16-be", 0
    return "utf-8", 0


_MARKS: Final = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)

"""Input formats, output formats and files that another run continues."""

import csv
import json
import os
from collections import Counter
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any

import msgspec
import pytest
from running_command import Command, ids_in

from kaizen_async._cli import formats
from kaizen_async._cli.formats import Counts, DetectingReader, Layout, LayoutError, pick, without_apostrophe
from kaizen_async._cli.output_formats import FORMATS, Fields, Format, cell_of, decoded, is_failure, safe
from kaizen_async._cli.table import moment_of
from kaizen_async.testing import Fault, KaizenEmulator, Life


def read(given: bytes, size: int, **layout: Any) -> tuple[list[str], list[tuple[int, str]], Counts]:
    """Return the ids, the reports and the counts of an input that arrives in pieces of a given size."""
    reported: list[tuple[int, str]] = []
    counts = Counts()
    reader = DetectingReader(Layout(**layout), counts, lambda line, why: reported.append((line, why)))
    ids = [found for at in range(0, len(given), size) for found in reader.feed(given[at : at + size])]
    return [*ids, *reader.end()], reported, counts


class TestInput:
    """The command detects the format from the first bytes, in pieces of any size."""

    @pytest.mark.parametrize(
        ("given", "layout"),
        [
            ("a\nb\nc\n", {}),
            ("# ids\r\n\r\na\r\n\r\nb\r\n# more\r\nc", {}),
            ('{"id": "a"}\n{"id": "b", "error": {"type": "x"}}\n{"id": "c"}\n', {}),
            ('{"x": {"y": ["a"]}}{"x": {"y": ["b"]}}\n\n{"x": {"y": ["c"]}}', {"field": "x.y.0"}),
            ('"a"\n"b"\n"c"\n', {}),
            ('["a", "b",\n {"id": "c"}]', {}),
            ('[\n{"id":"a"},\n{"id":"b"},\n{"id":"c"}\n]\n', {}),
            ("id,status\na,x\n\nb,y\nc,z\n", {}),
            ('status,ID\n"line 1\nline 2",a\n"x, ""y""",b\n,c', {}),
            ("status;execution_id\nx;a\ny;b\nz;c\n", {}),
            ("name\tid\nx\ta\ny\tb\nz\tc\n", {}),
            ("name,other\nx,a\ny,b\nz,c\n", {"column": "Other"}),
            ("a\rb\rc\r", {}),
            ("id,x\ra,1\rb,2\rc,3", {}),
            ('id,text\na,"\n# no comment\n\n"\nb,\nc,', {}),
            ('"na\nme",id\nx,a\ny,b\nz,c\n', {}),
            ('"a\n""b""",other\nx,a\ny,b\nz,c\n', {"column": "other"}),
            ("this, that\tid\n1,2\ta\n\tb\n;\tc\n", {}),
            ('"x;y";id\n1,5;a\n;b\n;c\n', {}),
            ("text,id\nx\u2028y,a\nx\x0by,b\n\x85,c\n", {}),
        ],
    )
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
    def test_ids_are_found_in_every_format(self, given: str, layout: dict[str, Any], encoding: str) -> None:
        """Ids are found in every format and encoding, with and without a byte order mark."""
        text = given.encode(encoding)
        for size in (1, 2, 3, 7, len(text)):
            ids, reported, counts = read(text, size, **layout)
            assert (ids, reported, counts.ids) == (["a", "b", "c"], [], 3), size

    @pytest.mark.parametrize(("given", "layout"), [(b"exec_1\0exec\n2\0\0exec_3\0", None), (b"a\0b\0#\0", "nul")])
    def test_zero_bytes_separate_ids(self, given: bytes, layout: str | None) -> None:
        """With `-0`, ids may contain line breaks, and `#` starts no comment."""
        for size in (1, len(given)):
            ids, reported, _ = read(given, size, format=layout)
            assert (ids, reported[:1]) == (
                (["a", "b", "#"], []) if layout else (["exec_1", "exec_3"], [(2, reported[0][1])])
            )

    @pytest.mark.parametrize(
        ("given", "ids", "lines"),
        [
            (b"a\nb c\n\xff\nd\n", ["a", "d"], [2, 3]),
            (b"a\n{}\nb,c\nd\n", ["a", "d"], [2, 3]),
            (b'{"id": "a"}\n{"id": 7}\n{"no": 1}\n{"id": [1]}\nnonsense\n{"id": "z"}\n', ["a", "7", "z"], [3, 4, 5]),
            (b'{"id": "a"}\n# comment\n{"id": "b\n', ["a"], [3]),
            (b'id,x\na,1\n"b,2\nc,3\n', ["a", "c"], [3]),
            (b'x,id\n1,a\n2\n"3"4,b\n5,c\n', ["a", "c"], [3, 4]),
            (b'id,x\na,"\n' + b"b,\n" * 3, ["b"] * 3, [2]),
            (b'"a\nb\n', [], [1, 2]),
            (b"id,name\na,M\xfcller\n\xfc,x\nb,\n", ["a", "b"], [3]),
            (b'{"id": "a"}\n' + b'{"x": ' * 5000 + b'\n{"id": "b"}\n', ["a", "b"], [2]),
        ],
    )
    def test_an_invalid_id_is_reported_with_its_line(self, given: bytes, ids: list[str], lines: list[int]) -> None:
        """An invalid id is reported with its line number, and the lines after it are read."""
        for size in (5, len(given)):
            found, reported, counts = read(given, size)
            assert (found, [line for line, _ in reported]) == (ids, lines)
            assert counts.invalid == len(lines)

    def test_what_is_too_long_hides_nothing_else(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A CSV cell or a line that is too long is reported, and what follows is read."""
        monkeypatch.setattr(formats, "LONGEST", 100)
        ids, reported, _ = read(b'id,x\na,"' + b"z\n" * 60 + b"b,\n", 9)
        assert (ids, [line for line, _ in reported]) == (["z"] * 59 + ["b"], [2])
        for size in (9, 200):
            ids, reported, _ = read(b"a\n" + b"z" * 101 + b"\nb\n", size)
            assert (ids, reported) == (["a", "b"], [(2, "is longer than 100 bytes")])

    @pytest.mark.parametrize(
        ("given", "layout", "why"),
        [
            (b"name,other\nx,y\n", {}, "looks like CSV without a column id"),
            (b"name,other\nx,y\n", {"column": "id"}, "has no column 'id'"),
            (b"name\nx\n", {"format": "csv"}, "has no column 'id'"),
        ],
    )
    def test_csv_without_a_column_of_ids_is_refused(self, given: bytes, layout: dict[str, Any], why: str) -> None:
        """CSV without an id column is refused with its columns and the option to choose one."""
        with pytest.raises(LayoutError, match=f"{why}.*name.*--column"):
            read(given, 4, **layout)

    def test_a_table_is_not_read(self, command: Command) -> None:
        """A table of the command is refused, because a part of a long message would be taken for an id."""
        for table in (command("get", "a", "none", "-f", "table").stdout, "ID   STATUS\na    Completed\n"):
            refused = command("get", "-", given=table)
            assert (refused.exit_code, refused.stdout) == (2, "")
            assert "first line of standard input is that of a table for people" in refused.stderr
        assert command("get", "-", given="ID\na\n").exit_code == 0
        given = command("get", "-", "--input-format", "lines", given="name,other\na\n")
        assert (len(given.stdout.splitlines()), "line 1 of standard input is not an id" in given.stderr) == (1, True)

    def test_the_input_can_be_a_file(self, command: Command, tmp_path: Path) -> None:
        """`--input` reads a file and excludes arguments. A file name given as an id gets a hint."""
        ids = tmp_path / "ids.csv"
        ids.write_text("id\na\nb\n")
        assert {json.loads(line)["id"] for line in command("get", "-i", ids).stdout.splitlines()} == {"a", "b"}
        for arguments, said in (
            (("-i", ids, "a"), "give ids or --input, not both"),
            (("-i", tmp_path / "none"), "No such file"),
            (("-0", "--input-format", "csv", "-"), "contradict"),
            (("-", "a"), "not both"),
        ):
            refused = command("get", *arguments)
            assert refused.exit_code == 2
            assert said in refused.stderr
        assert f"Hint: {ids} is a file here" in command("get", ids).stderr


class TestOutput:
    """Results are written in the chosen format."""

    def test_formats(self, command: Command, tmp_path: Path) -> None:
        """Every format has the same results."""
        (array,) = (json.loads(command("get", "a", "b", "--format", "json").stdout),)
        assert [record["id"] for record in array] == ["a", "b"]
        rows = list(csv.DictReader(StringIO(command("get", "a", "none", "-f", "csv").stdout)))
        assert [(row["id"], row["status"], row["error.type"]) for row in rows] == [
            ("a", "Completed", ""),
            ("none", "", "NotFoundError"),
        ]
        assert command("get", "a", "b", "--only-ids").stdout == "a\nb\n"
        assert command("get", "a", "none", "--only-failed", "--only-ids").stdout == "none\n"
        assert command("get", "a", "--fields", "id,workflow.name").stdout.startswith('{"id":"a","workflow.name":"')
        assert "no result has a field zorp" in command("get", "a", "--fields", "zorp").stderr
        table = tmp_path / "table.txt"
        command("get", "a", "none", "-f", "table", "-o", table, "--only-failed")
        header, row, *_ = table.read_text().splitlines()
        assert (header.split()[0], row.split()[0]) == ("ID", "none")
        assert json.loads(command("get", "-", "-f", "json", given='{"id": 1 2}').stdout) == []

    def test_cells_that_look_like_formulas_are_neutralised(self, command: Command, server: KaizenEmulator) -> None:
        """CSV cells that look like formulas are neutralised by default, and a cell has only one line."""
        for first in "=+-@\t\r":
            assert cell_of(f"{first}cmd", formulas=False).startswith("'")
            assert not cell_of(f"{first}cmd", formulas=True).startswith("'")
        for first in ("\uff1d", "\uff0b", "\uff0d", "\uff20", " =", "\u3000@", "\n=", "\x00=", "\u200b+", "\x85-"):
            assert cell_of(f"{first}cmd", formulas=False).startswith("'")
        assert cell_of(f"{' ' * 100_000}x", formulas=False).endswith(" x")
        assert without_apostrophe(cell_of(" =id", formulas=False)) == " =id"
        assert cell_of(-5, formulas=False) == "-5"
        assert cell_of(None, formulas=False) == ""
        assert cell_of("a\nb\x00\u202e", formulas=False) == "a\\nb \\u202e"
        server.add("=id", Life.ended())
        assert "'=id" in command("get", "=id", "-f", "csv").stdout
        assert "\n=id" in command("get", "=id", "-f", "csv", "--formulas").stdout

    def test_json_is_valid_and_harmless(self) -> None:
        """JSON output escapes control characters and replaces invalid UTF-8."""
        text = '{"x":"\x7f\x9b\u202e\u2028\u200b\ufeff\U000e0041é"}'
        escaped = safe(text.encode())
        assert json.loads(escaped) == json.loads(text)
        assert escaped.decode() == '{"x":"\\u007f\\u009b\\u202e\\u2028\\u200b\\ufeff\\udb40\\udc41é"}'
        safe(b'{"x":"\xff"}').decode()

    def test_the_place_of_the_output_is_checked_first(self, command: Command, tmp_path: Path) -> None:
        """The command sends nothing if the output cannot be written."""
        ids = tmp_path / "ids.txt"
        ids.write_text("a\n")
        for arguments, said in (
            (("-o", tmp_path), "directory"),
            (("-o", tmp_path / "none" / "x"), "No such file"),
            (("-o", ids, "-i", ids), "is the file that the ids come from"),
        ):
            refused = command("get", *arguments)
            assert refused.exit_code == 2
            assert said in refused.stderr
        assert ids.read_text() == "a\n"
        assert command("get", "a", "-o", "/dev/null").exit_code == 0
        full = command("get", "a", "-o", "/dev/full")
        assert (full.exit_code, "No space left on device" in full.stderr) == (1, True)

    def test_times_at_the_ends_of_the_calendar_are_shown(self) -> None:
        """Times at the ends of the calendar are shown, even if another time zone would overflow."""
        assert moment_of(datetime(1, 1, 1, tzinfo=UTC)) == "0001-01-01"
        assert moment_of(datetime(9999, 12, 31, 23, 59, tzinfo=UTC)).startswith(("9999", "10000"))

    def test_paths_reach_into_documents(self) -> None:
        """Paths of `--fields` accept names and list indexes, and a missing value is empty."""
        assert pick({"a": [{"b": 1}]}, "a.0.b") == 1
        assert pick({"a": [1]}, "a.7") is None
        assert pick({"a": 1}, "a.b") is None
        assert not is_failure({"error": {"type": "x", "message": "a record's own"}})


class Bars(Format):
    """A format of the tests: `id|status`, and an empty status for a failure."""

    suffix = ".bars"

    def line(self, execution_id: str, document: bytes, fields: Fields) -> bytes:
        """Return the id and the status."""
        return f"{execution_id}|{fields.pick(decoded(document), 'status') or ''}\n".encode()

    def read(self, line: bytes, number: int, fields: Fields) -> tuple[str | None, bool]:
        """Read the id and the status."""
        execution_id, status = line.decode().strip().split("|")
        return execution_id, bool(status)


def test_a_new_format_is_a_class_and_an_entry(
    command: Command, server: KaizenEmulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One entry in the table of formats is enough to write results and to resume from them."""
    monkeypatch.setitem(FORMATS, "bars", Bars())
    file = tmp_path / "out.bars"
    assert command("get", "-o", file, "--resume", "a", "later").exit_code == 1
    assert sorted(file.read_text().splitlines()) == ["a|Completed", "later|"]
    server.add("later", Life.ended())
    assert command("get", "-o", file, "--resume").exit_code == 0
    assert sorted(file.read_text().splitlines()) == ["a|Completed", "later|Completed"]
    assert server.requests_for("a") == 1


class TestResume:
    """A run continues an earlier one, however it ended."""

    @pytest.mark.parametrize("name", ["out.ndjson", "out.json", "out.csv"])
    def test_after_a_cut_at_any_byte_each_id_has_one_line(self, command: Command, tmp_path: Path, name: str) -> None:
        """After a truncation at any byte, as by `kill -9`, a resumed run writes one line for each id."""
        file = tmp_path / name
        arguments = ["get", "-", "-o", file, "-f", name.partition(".")[2], "--resume"]
        fields = ["--fields", "id,status,error.retryable"]
        assert command(*arguments, *fields, given="a\nb\nnone\nc\n").exit_code == 1
        whole = file.read_bytes()
        line_ends = [end + 1 for end, byte in enumerate(whole) if byte == ord("\n")]
        for end in sorted({0, *line_ends, *(end - 1 for end in line_ends), *range(0, len(whole), 20)}):
            file.write_bytes(whole[:end])
            assert command(*arguments, *fields, given="a\nb\nnone\nc\n").exit_code == 1
            assert Counter(ids_in(file)) == Counter(["a", "b", "c", "none"]), end

    @pytest.mark.parametrize("name", ["out.ndjson", "out.json", "out.csv"])
    def test_failed_ids_are_tried_again(
        self, command: Command, server: KaizenEmulator, tmp_path: Path, name: str
    ) -> None:
        """`--resume` looks only failed ids up again, and without ids uses those in the file."""
        file = tmp_path / name
        link = tmp_path / f"link-{name}"
        link.symlink_to(file)
        arguments = ["get", "-o", link, "-f", name.partition(".")[2], "--resume"]
        assert command(*arguments, "a", "b", "later").exit_code == 1
        server.add("later", Life.ended())
        again = command(*arguments)
        assert (again.exit_code, "1 found, 0 failed" in again.stderr) == (0, True)
        assert Counter(ids_in(file)) == Counter(["a", "b", "later"])
        assert b"NotFound" not in file.read_bytes()
        assert link.is_symlink()
        assert server.requests_for("a") == 1
        assert "3 already there" in command(*arguments, "a", "b", "later").stderr

    def test_other_files_are_refused(self, command: Command, tmp_path: Path) -> None:
        """Files that are not results are refused and stay unchanged."""
        file = tmp_path / "x.ndjson"
        for content in ("something else\n", "[1]\n", '{"a": 1}\n', "[" * 100_000 + "\n"):
            file.write_text(content)
            refused = command("get", "a", "-o", file, "--resume")
            assert (refused.exit_code, file.read_text()) == (2, content)
            assert "line 1 of" in refused.stderr
        table = tmp_path / "x.csv"
        table.write_text("other,columns\n")
        assert "line 1 of" in command("get", "a", "-o", table, "--resume").stderr
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        assert "is not a regular file" in command("get", "a", "-o", pipe, "--resume").stderr
        for arguments in (
            ("--resume",),
            ("--resume", "-o", "-"),
            ("--resume", "-o", pipe),
            ("--resume", "-o", file, "--only-failed"),
            ("--resume", "-o", file, "--fields", "status"),
            ("--resume", "-o", table, "--fields", "id,status"),
        ):
            assert command("get", "a", *arguments).exit_code == 2

    def test_a_full_disk_loses_nothing(self, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """On a full disk, the incomplete line is removed, and the next run writes it."""
        file = tmp_path / "out.ndjson"
        pwrite, room = os.pwrite, 1500

        def limited(descriptor: int, data: bytes, offset: int) -> int:
            if offset >= room:
                raise OSError(28, "No space left on device")
            return pwrite(descriptor, data[: room - offset], offset)

        monkeypatch.setattr(os, "pwrite", limited)
        full = command("get", "-", "-o", file, "--resume", given="a\nb\nc\n")
        assert (full.exit_code, "No space left on device" in full.stderr) == (1, True)
        assert len(file.read_bytes()) <= room
        monkeypatch.undo()
        assert all(msgspec.json.decode(line) for line in file.read_bytes().splitlines())


class TestCheckpointFiles:
    """A checkpoint is untrusted input, because users may edit it."""

    @pytest.mark.parametrize(
        "change",
        [
            {"taken": {"count": -1, "digest": ""}},
            {"taken": {"count": 1e308, "digest": ""}},
            {"unprinted": [""]},
            {"unprinted": ["a\x1b]52;c;x\x07"], "base_url": "http://\x1b]52;c;x\x07/"},
            {"kind": "\x1b]52;c;x\x07"},
            {"waiting": {}},
            {
                "waiting": {
                    "version": 2,
                    "taken": 0,
                    "taken_at": 0.0,
                    "ids": [["a", 20_000_000, 1.0, 1.0]],
                    "learned": None,
                }
            },
            {"waiting": {"version": 2, "taken": 0, "taken_at": 0.0, "ids": [["a", 1, 1e308, 1e308]], "learned": None}},
            {"waiting": {"version": 2, "taken": 0, "taken_at": 1e308, "ids": [["a", 1, 1.0, 1.0]], "learned": None}},
            {"waiting": {"version": 2, "taken": 0, "taken_at": 0.0, "ids": [["a", 1, 1.0, 1.0]], "learned": "x"}},
            {
                "waiting": {
                    "version": 2,
                    "taken": 0,
                    "taken_at": 0.0,
                    "ids": [],
                    "learned": {"aim": "share", "lags": [-1]},
                }
            },
        ],
    )
    def test_values_out_of_bounds_do_no_harm(
        self, command: Command, server: KaizenEmulator, tmp_path: Path, change: dict[str, Any]
    ) -> None:
        """A checkpoint with invalid values is refused in one line or resumed in bounded time, with safe output."""
        file = tmp_path / "waiting.json"
        saved = {
            "kind": "kaizen-async wait",
            "base_url": server.base_url,
            "taken": {"count": 0, "digest": ""},
            "unprinted": [],
            "waiting": {"version": 2, "taken": 0, "taken_at": 0.0, "ids": [], "learned": None},
        }
        file.write_text(json.dumps({**saved, **change}))
        result = command("wait", "--checkpoint", file, "--deadline", "5")
        assert result.exit_code in {0, 1, 2}
        assert "\x1b" not in result.output
        assert "Traceback" not in result.output

    @pytest.mark.parametrize("content", [b"", b"[" * 100_000, b"nonsense", b"{}", b"\xff\xfe", b'{"kind":"x"}'])
    def test_foreign_files_are_refused(self, command: Command, tmp_path: Path, content: bytes) -> None:
        """Foreign files are refused and stay unchanged."""
        file = tmp_path / "waiting.json"
        file.write_bytes(content)
        refused = command("wait", "a", "--checkpoint", file)
        assert (refused.exit_code, file.read_bytes()) == (2, content)
        assert "is not a checkpoint of kaizen-async wait" in refused.stderr

    def test_an_unusable_checkpoint_is_reported(self, command: Command, server: KaizenEmulator, tmp_path: Path) -> None:
        """A read-only file, a folder, circular links and a pipe are reported as unusable checkpoints."""
        circle = tmp_path / "circle"
        circle.symlink_to(circle)
        read_only = tmp_path / "read-only"
        server.faults.always(Fault.hang(), id="hangs")
        assert command("wait", "hangs", "--checkpoint", read_only, "--deadline", "0.2").exit_code == 1
        read_only.chmod(0o444)
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        for path in (circle, read_only, pipe):
            refused = command("wait", "a", "--checkpoint", path)
            assert refused.exit_code == 2
            assert "checkpoint" in refused.stderr

    def test_the_results_do_not_go_into_the_checkpoint(self, command: Command, tmp_path: Path) -> None:
        """One file as checkpoint and output is refused, also under two names, and is not created."""
        file, link = tmp_path / "file", tmp_path / "link"
        link.symlink_to(file)
        refused = command("wait", "a", "--checkpoint", file, "-o", link)
        assert (refused.exit_code, file.exists()) == (2, False)
        assert "--checkpoint and --output name the same file" in refused.stderr

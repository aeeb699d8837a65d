"""Tables in Markdown, aligned for reading on a terminal."""

from dataclasses import dataclass, field


@dataclass
class Table:
    """A table with a title. The first column is text, and the others are figures."""

    title: str
    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """Return the table as Markdown, with its title and notes."""
        return (
            "\n".join([f"### {self.title}", "", self.grid(), "", *(f"{note}  " for note in self.notes)]).rstrip() + "\n"
        )

    def grid(self) -> str:
        """Return the lines of the table alone."""
        widths = [max(len(cell) for cell in column) for column in zip(self.columns, *self.rows, strict=True)]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        return "\n".join(_line(cells, widths) for cells in (self.columns, rule, *self.rows))


def _line(cells: list[str], widths: list[int]) -> str:
    first, *others = zip(cells, widths, strict=True)
    return "| " + " | ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]) + " |"

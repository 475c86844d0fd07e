"""Brief: a state and a ledger in at most ten lines, as text for a prompt and as HTML for a notebook.

state     digest, sites, bytes, steps; then the largest sites, and the others in one line
ledger    digest, steps, entries; then a line for each step, of many the first and the last ones
Names come from files: what is not printable is shown by its number.
"""

from __future__ import annotations

from html import escape
from typing import Any, NamedTuple

from tersor.errors import counted

ROWS = 9  # of the ten lines, after the title; the last one counts the others
LONGEST = 300  # letters of a cell


class Table(NamedTuple):
    """A title and rows of cells. Numbers have a leading space in `heads` and are aligned to the right."""

    title: str
    heads: tuple[str, ...]
    rows: list[tuple[str, ...]]


class Brief:
    """Base of what is shown briefly. A class that derives from it defines `summary`."""

    def summary(self) -> Table:
        raise NotImplementedError

    def __repr__(self) -> str:
        title, heads, rows = self.summary()
        widths = [max(len(row[n]) for row in rows) for n in range(len(heads))] if rows else []
        lines = [
            "  ".join(
                cell.rjust(width) if head.startswith(" ") else cell.ljust(width)
                for cell, width, head in zip(row, widths, heads, strict=True)
            )
            for row in rows
        ]
        return "\n".join([title, *(f"  {line}".rstrip() for line in lines)])

    def _repr_html_(self) -> str:
        """For Jupyter and others. Every cell is escaped, and nothing is loaded from elsewhere."""
        title, heads, rows = self.summary()
        align = [' style="text-align:right"' if head.startswith(" ") else "" for head in heads]
        top = "".join(f"<th{how}>{escape(head.strip())}</th>" for head, how in zip(heads, align, strict=True))
        body = "".join(
            f"<tr>{''.join(f'<td{h}>{escape(c)}</td>' for c, h in zip(row, align, strict=True))}</tr>"
            for row in rows
        )
        return f"<div><p>{escape(title)}</p><table><tr>{top}</tr>{body}</table></div>"


class BriefState(Brief):
    """How a State is shown: the largest sites first, the others in one line."""

    def summary(self: Any) -> Table:
        nbytes, given = self.nbytes, self.given_nbytes
        title = f"State {self.digest}: {counted(len(self.forms), 'site')}, {nbytes:,} bytes, "
        title += counted(self.ledger.count, "step")
        if given and nbytes and self.ledger.count:
            title += f"; {given / nbytes:.1f} x smaller than {given:,} bytes as given"
        sizes = sorted(((form.nbytes, name) for name, form in self.forms.items()), key=lambda s: -s[0])
        most = ROWS if len(sizes) <= ROWS else ROWS - 1
        rows: list[tuple[str, ...]] = [
            (
                printable(name), " x ".join(map(str, self.forms[name].shape)) or "scalar", f"{size:,} bytes",
                outlined(self.forms[name]),
            )
            for size, name in sizes[:most]
        ]  # fmt: skip
        if rest := sizes[most:]:
            rows.append((counted(len(rest), "other"), "", f"{sum(size for size, _ in rest):,} bytes", ""))
        return Table(title, ("site", "shape", " bytes", "form"), rows)


class BriefLedger(Brief):
    """How a Ledger is shown: a line for each step; of many steps the first and the last ones."""

    def summary(self: Any) -> Table:
        title = f"Ledger {self.digest}: {counted(self.count, 'step')}, {counted(len(self.entries), 'entry')}"
        rows: list[tuple[str, ...]] = []
        for number, name in enumerate(self.step_names()):
            entries = [entry for entry in self.entries if entry.step == number and entry.name == name]
            edits = sum(entry.changes for entry in entries)
            did = f"{counted(edits, 'edit')}, {counted(len(entries) - edits, 'note')}"
            took = f"{self.seconds[number]:.1f} s" if number in self.seconds else ""
            rows.append((f"{number + 1}", name, "past" if number < len(self.past) else did, took))
        if (more := len(rows) - ROWS) > 0:
            rows[ROWS // 2 : ROWS // 2 + more + 1] = [("", f"{more + 1} others", "", "")]
        return Table(title, (" step", "name", "did", " time"), rows)


def outlined(form: Any) -> str:
    """The form in a word or two: its class, and those of its parts that have parts: Masked(Codebook)."""
    inner = [outlined(child) for child in form.children().values() if child.children()]
    return type(form).__name__ + (f"({', '.join(inner)})" if inner else "")


def printable(name: str) -> str:
    """A name in one line, with what is not printable by its number; of a very long one both ends."""
    name = name if name.isprintable() else ascii(name)[1:-1]
    half = LONGEST // 2
    return name if len(name) <= LONGEST else f"{name[:half]}...{name[-half:]}"

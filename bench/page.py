"""Page: the results in bench/README.md, written from bench/results.csv.

python bench/page.py [--check]        everything between the two marks is generated; the rest is by hand
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from table import Row, read

README = Path(__file__).resolve().parent / "README.md"
BEGIN, END = "<!-- results: written by bench/page.py -->", "<!-- end of results -->"


def page(text: str, rows: list[Row]) -> str:
    """The page with its results replaced."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{README} has lost its marks: {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{results(rows)}\n{END}{after}"


def results(rows: list[Row]) -> str:
    """First the targets, then all measurements, bench by bench."""
    aimed = [row for row in rows if row.target]
    met = sum(row.met == "yes" for row in aimed)
    parts = [f"{met} of {len(aimed)} targets are met.\n"]
    parts.append(
        table(
            ("bench", "subject", "measure", "value", "target", "met"),
            ((r.bench, r.subject, r.measure, valued(r), r.target, f"**{r.met}**") for r in aimed),
        )
    )
    for bench in dict.fromkeys(row.bench for row in rows):
        parts.append(f"<details><summary>{bench}: all that was measured</summary>\n")
        parts.append(
            table(
                ("subject", "measure", "value", "note"),
                ((r.subject, r.measure, valued(r), r.note) for r in rows if r.bench == bench),
            )
        )
        parts.append("</details>\n")
    return "\n".join(parts)


def valued(row: Row) -> str:
    return f"{row.value} {row.unit}".strip()


def table(head: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    cells = [head, ("---",) * len(head), *lines]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in cells)


def write() -> None:
    README.write_text(page(README.read_text(), read()))


def main(argv: list[str] | None = None) -> int:
    return command(argv, __doc__ or "", README, lambda: page(README.read_text(), read()))


def command(argv: list[str] | None, about: str, file: Path, text: Callable[[], str]) -> int:
    """Write a page that is made of rows; with --check only say whether it is up to date. The exit code."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    if not parser.parse_args(argv).check:
        file.write_text(text())
        return 0
    if file.read_text() == text():
        return 0
    print(f"{file} is not what the rows say: run python {sys.argv[0]}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())

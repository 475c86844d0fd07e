"""Table: the results in bench/results.csv, one measured number a line.

A row replaces the row with the same bench, subject and measure, and the file is sorted: a run changes only
the lines of its own measurements.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

RESULTS = Path(__file__).resolve().parent / "results.csv"
DIGITS = 4  # significant digits: more would only be noise in the diff


class Row(NamedTuple):
    """One number: its bench, subject and measure, and its target."""

    bench: str
    subject: str
    measure: str
    value: float | str
    unit: str = ""
    target: str = ""  # ">= 150", "<= 1", or nothing
    met: str = ""  # "yes" or "no", filled in from value and target
    note: str = ""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.bench, self.subject, self.measure


def judged(row: Row) -> Row:
    """The row with the value as it is written, and whether it meets the target."""
    value = row.value
    if not isinstance(value, str):
        whole = isinstance(value, int) or float(value).is_integer()
        value = f"{int(value)}" if whole else f"{value:.{DIGITS}g}"
    if not row.target:
        return row._replace(value=value)
    sign, limit = row.target.split()
    if sign not in {"<=", ">="}:
        raise ValueError(f"target {row.target!r} of {row.key}: begin with <= or >=")
    met = float(value) <= float(limit) if sign == "<=" else float(value) >= float(limit)
    return row._replace(value=value, met="yes" if met else "no")


def read(path: Path = RESULTS) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        lines = csv.DictReader(file)
        if tuple(lines.fieldnames or ()) != Row._fields:
            raise ValueError(f"{path} has columns {lines.fieldnames}, not {list(Row._fields)}")
        return [Row(**line) for line in lines]


def record(rows: Iterable[Row], path: Path = RESULTS) -> None:
    """Put rows into the table; earlier rows with the same key are replaced."""
    table = {row.key: row for row in read(path)}
    table.update((row.key, judged(row)) for row in rows)
    draft = path.with_suffix(".tmp")
    with draft.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(table[key] for key in sorted(table))
    os.replace(draft, path)

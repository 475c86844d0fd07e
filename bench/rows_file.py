"""Rows file: measured rows as lines of JSON.

A row replaces that of the same key; a quick one replaces only a quick one.
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tersor.core.recipe import Recipe
from tersor.files import write_text

FOLDER = Path(__file__).resolve().parent
# Those of the zoo are part of the package: `tersor zoo` shows them.
ZOO_ROWS = FOLDER.parent / "src" / "tersor" / "zoo" / "measured.jsonl"
COMPARISON_ROWS = FOLDER / "comparisons.jsonl"
Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def record(row: Row, path: Path, key: Callable[[Row], Any]) -> None:
    """Put a row in the place of that with the same key; the file is sorted by keys."""
    rows = {key(old): old for old in read(path)}
    if row["quick"] and not rows.get(key(row), row)["quick"]:
        print(f"{path.name}: {key(row)}: a whole row is recorded; the quick one is not", file=sys.stderr)
        return
    rows[key(row)] = row
    write(rows, path)


def keep(known: Collection[Any], path: Path, key: Callable[[Row], Any]) -> None:
    """Drop the rows whose key is not known: those of recipes that have changed."""
    write({key(row): row for row in read(path) if key(row) in known}, path)


def write(rows: Mapping[Any, Row], path: Path) -> None:
    write_text(path, "".join(f"{json.dumps(rows[each])}\n" for each in sorted(rows)))


def shorter(recipe: Recipe, share: float) -> Recipe:
    """The same recipe with this share of the epochs of each step."""
    return replace(recipe, steps=tuple(shortened(recipe.steps, share)))


def shortened(steps: Iterable[Any], share: float) -> Iterable[Any]:
    for step in steps:
        yield replace(step, epochs=share * step.epochs) if getattr(step, "epochs", 0) else step


def processor() -> str:
    """The processor's name, as Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()

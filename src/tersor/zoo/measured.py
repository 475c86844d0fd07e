"""Measured: what bench/tables.py found for each architecture, and what each is best at.

measured.jsonl    a row for each: float and int8 network on 1,000 test scenes, bytes, milliseconds
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tersor.zoo.architectures import ZOO

FILE = Path(__file__).with_name("measured.jsonl")
Row = Mapping[str, Any]
# What a target asks for first, as (better is lower, value of a row).
TARGETS: dict[str, tuple[str, Callable[[Row], float]]] = {
    "cloud": ("the best {metric}", lambda row: -row["accuracy"]["after"][0]),
    "mobile": ("the fewest milliseconds", lambda row: row["latency"]["after"][0]),
    "edge": ("the smallest file", lambda row: row["bytes"]["packed"]),
}


@cache
def measured() -> dict[str, Row]:
    """{architecture: its row}; those that were not measured, or only tried out, are left out."""
    rows = map(json.loads, FILE.read_text(encoding="utf-8").splitlines())
    return {row["name"]: row for row in rows if row["name"] in ZOO and not row["quick"]}


def suits(name: str) -> dict[str, str]:
    """{target: why}: the targets for which no measured architecture of the same metric, compressed, is
    better."""
    rows = measured()
    if name not in rows:
        return {}
    rivals = [row for row in rows.values() if row["metric"] == rows[name]["metric"]]
    metric = rows[name]["metric"]
    return {
        target: f"{why.format(metric=metric)} of {len(rivals)} networks with {metric}"
        for target, (why, value) in TARGETS.items()
        if len(rivals) > 1 and value(rows[name]) <= min(map(value, rivals))
    }

"""What tersor compress prints."""

import io
from typing import Any

import pytest
from rich.console import Console

from tersor.report.search_table import trials

LATENCY = {"ratio": [2.0, 1.9, 2.1]}
DONE = {"why": "", "drop": [0.25, -0.1, 0.6], "nbytes": 250, "seconds": 3.0, "over": ["drop"]}
REFUSED = {"name": "slim 0.5", "why": "no", "seconds": 1.0}


def printed(search: dict[str, Any]) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=140).print(trials(search))
    return [line.strip() for line in out.getvalue().splitlines() if line.strip()]


@pytest.mark.parametrize(("latency", "column"), [(LATENCY, True), (None, False)])
def test_a_row_for_each_trial(latency: Any, column: bool) -> None:
    rows = [{**DONE, "name": "8 bits", "latency": latency}, REFUSED]
    head, _, done, refused = printed(
        {"trials": rows, "best": "8 bits", "unit": "points", "given_nbytes": 1000}
    )
    assert ("times as fast" in head) == column
    speed = ["2.00"] if column else []
    assert done.split() == [
        "8",
        "bits",
        "*",
        "0.25",
        "-0.10",
        "to",
        "0.60",
        "250",
        "25.0",
        "%",
        *speed,
        "3.0",
        "s",
        "drop",
    ]
    assert refused.split() == ["slim", "0.5", "1.0", "s", "refused", "(1)"]

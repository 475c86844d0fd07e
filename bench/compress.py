"""Compress: the best model within a budget, found by tersor compress, and what the search took.

drop<=0.5                  the smallest file
drop<=0.5,latency<=50%     the fastest in ONNX Runtime, batch 1, one thread
One half of the test images decides between trials, the other half judges at the end. Beside it, what the
first thing that one would write gives: quantize entropy. Times are of processors, all threads together.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from job import lost, main, read_back
from networks import load, task
from table import Row

from tersor.core.run import run
from tersor.errors import BudgetError
from tersor.io.container_writer import save
from tersor.search.compress import compress
from tersor.steps import Entropy, Quantize

DROP, EPOCHS, RATE = 0.5, 3.0, 0.002
SIZE, SPEED = f"drop<={DROP:g}", f"drop<={DROP:g},latency<=50%"
BUDGETS = {
    "lenet300": (SIZE,),
    "lenet5": (SIZE, SPEED),
    "resnet20": (SIZE, SPEED),
    "mobilenetv2": (SIZE, SPEED),
}


def measure(name: str) -> Iterator[Row]:
    net, on = load(name), replace(task(), calibrate=None)  # labelled ones would decide
    given = on.scores(net)
    plain = run(net, [Quantize(), Entropy()], on)
    with tempfile.TemporaryDirectory() as folder:
        nbytes = save(plain, Path(folder) / "plain.tersor")
    fall, note = lost(given, on.scores(read_back(plain, name)[0]))
    yield row(name, "quantize entropy, file", nbytes / 1000, "kB", note=f"drop {fall.amount:.2f}; {note}")
    for budget in BUDGETS[name]:
        yield from within(name, budget)


def within(name: str, budget: str) -> Iterator[Row]:
    """The rows of one search."""
    net, on = load(name), replace(task(), calibrate=None)
    began = time.process_time()
    try:
        with tempfile.TemporaryDirectory() as folder:
            _, facts = compress(net, on, budget, Path(folder) / "out", epochs=EPOCHS, lr=RATE)
    except BudgetError as error:
        print(f"{name}: {error}", file=sys.stderr)
        yield row(name, f"{budget}, found", 0, "", target=">= 1", note="no trial is within the budget")
        return
    took = time.process_time() - began
    search = facts["search"]
    amount, low, high = facts["accuracy"]["drop"]
    of = 100 * facts["files"]["result"]["nbytes"] / search["given_nbytes"]
    note = f"{len(search['trials'])} trials: {search['recipe']}"
    yield row(
        name, f"{budget}, file", facts["files"]["result"]["nbytes"] / 1000, "kB", note=f"{of:.1f} %; {note}"
    )
    note = f"95 % interval {low:+.2f} to {high:+.2f}, test images"
    yield row(name, f"{budget}, drop", round(amount, 2), "points", target=f"<= {DROP:g}", note=note)
    yield row(name, f"{budget}, processor time", round(took / 60, 1), "min")
    if "latency" in facts:
        middle, low, high = facts["latency"]["ratio"]
        note = f"95 % interval {low:.2f} to {high:.2f}"
        yield row(name, f"{budget}, times as fast", round(middle, 2), "x", target=">= 2", note=note)


def row(name: str, what: str, value: float, unit: str, *, target: str = "", note: str = "") -> Row:
    return Row("compress", name, what, value, unit, target, note=note)


if __name__ == "__main__":
    sys.exit(main(__doc__, measure, tuple(BUDGETS)))

"""Job: the shared code of the benches of accuracy: command line, output of rows, files that are read back.

python bench/NAME.py [--record] [SUBJECT ...]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import page
from networks import NETWORKS, steady
from table import Row, judged, record
from torch import Tensor, nn

from tersor.core.state import State
from tersor.errors import TersorError
from tersor.io.container import load
from tersor.io.container_writer import save
from tersor.measure.accuracy import Drop, drop

Measure = Callable[[str], Iterator[Row]]  # subject -> its rows


def main(
    doc: str | None, measure: Measure, subjects: Sequence[str], argv: list[str] | None = None,
    parents: Sequence[argparse.ArgumentParser] = (),
) -> int:  # fmt: skip
    """Measure the subjects named on the command line (default: all), and print or record the rows.

    `parents`: parsers with the bench's own options, for its --help.
    """
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0], parents=list(parents))
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=f"of {', '.join(subjects)}")
    parser.add_argument("--record", action="store_true", help="put the numbers into bench/results.csv")
    options = parser.parse_args(argv)
    if unknown := set(options.subjects) - set(subjects):
        parser.error(f"no subject {', '.join(sorted(unknown))}; there are {', '.join(subjects)}")
    steady()
    try:
        for subject in options.subjects or subjects:
            rows = []
            for row in measure(subject):
                print(line(judged(row)), flush=True)
                rows.append(row)
            if options.record:
                record(rows)
                page.write()
    except TersorError as error:
        parser.exit(1, f"{error}\n")
    return 0


def speed(result: State) -> tuple[float, str]:
    """How many times as fast as the given network, as `measure latency=true` noted, and a note on it."""
    data = next(entry.data for entry in result.ledger.notes("latency"))
    middle, low, high = data["ratio"]
    return middle, f"95 % interval {low:.2f} to {high:.2f}, one thread"


def line(row: Row) -> str:
    """One row for the terminal."""
    verdict = {"yes": "met", "no": "NOT MET", "": ""}[row.met]
    value = f"{row.value} {row.unit}".strip()
    return f"{row.subject:14} {row.measure:44} {value:>14} {row.target:>8} {verdict:7} {row.note}".rstrip()


def read_back(result: State, name: str, *, tiny: bool = False) -> tuple[nn.Module, int]:
    """A new network with the weights read back from the written file, and the bytes of that file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.tersor"
        save(result, path, tiny=tiny)
        return load(path).model(NETWORKS[name]()).eval(), path.stat().st_size


def lost(before: Tensor, after: Tensor) -> tuple[Drop, str]:
    """The paired drop in points, and a note with both accuracies and its interval. One score an image."""
    fall = drop(before, after)
    was, now = (100 * float(scores.double().mean()) for scores in (before, after))
    return fall, f"{was:.2f} to {now:.2f} %, 95 % interval {fall.low:+.2f} to {fall.high:+.2f}"

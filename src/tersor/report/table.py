"""Table: the facts of a run for a terminal: before and after, then each step's doing by layer.

              before     after                      layer         1 prune       2 cluster     bits
accuracy      98.62 %    98.49 %   drop ...         conv1.weight  done: kept    done: 16      1.29
file          394,104    14,902    26.4 x           fc.bias       -             -             32.00
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tersor.measure.accuracy import SIGNIFICANT
from tersor.report.console import milliseconds, p_value, percent, seconds, whole

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

Facts = Mapping[str, Any]
ROWS = 60  # layers that a terminal is shown; report.json has them all


def report(facts: Facts) -> Iterator[RenderableType]:
    """Everything that `run` and `demo` print."""
    yield headline(facts)
    yield ""
    yield layers(facts)
    hidden = len(facts["sites"]) - ROWS
    if hidden > 0:
        yield f"and {hidden} more, in report.json"
    yield ""
    yield from steps(facts)


def grid(*columns: str) -> Table:
    """A table of our kind: no frame, a line under the head, numbers to the right in columns named ">..."."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.removeprefix(">"), justify="right" if right else "left", no_wrap=right)
    return table


def headline(facts: Facts) -> Table:
    """Before and after, one quantity a row, what it means at the end."""
    table = grid("", ">before", ">after", "")
    for row in (*accuracy_rows(facts), *file_rows(facts), *bit_rows(facts), *latency_rows(facts)):
        table.add_row(*row)
    return table


def accuracy_rows(facts: Facts) -> Iterator[tuple[str, ...]]:
    found = facts.get("accuracy")
    if found is None:
        return
    metric = facts.get("metric", "accuracy")
    share = metric == "accuracy"  # then in hundredths; another metric's unit is its own
    (was, *was_within), (now, *now_within) = found["before"], found["after"]
    fall, low, high = found["drop"] if share else (points / 100 for points in found["drop"])
    digits, unit = (2, " points") if share else (4, "")
    verdict = "significant" if found["p"] < SIGNIFICANT else "not significant"

    def number(value: float) -> str:
        return percent(value) if share else f"{value:.4f}"

    def interval(low: float, high: float) -> str:
        return f"{number(low).removesuffix(' %')} - {number(high)}"

    fell = f"drop {fall:.{digits}f}{unit}, 95 % interval {low:.{digits}f} to {high:.{digits}f}"
    yield metric, number(was), number(now), fell
    test = f"{verdict}: paired {p_value(found['p'])}, n = {whole(found['n'])}"
    yield "  95 % interval", interval(*was_within), interval(*now_within), test


def file_rows(facts: Facts) -> Iterator[tuple[str, ...]]:
    files = facts.get("files", {})
    if "given" in files and "result" in files:
        before, after = files["given"]["nbytes"], files["result"]["nbytes"]
        yield "file, bytes", whole(before), whole(after), f"{before / after:.1f} x smaller, all included"


def bit_rows(facts: Facts) -> Iterator[tuple[str, ...]]:
    bits = facts["bits"]
    count = max(bits["weights"], 1)
    given, stored, bound = (bits[key] / count for key in ("given", "stored", "bound"))
    yield "bits a weight", f"{given:.3f}", f"{stored:.3f}", f"order-0 entropy bound {bound:.3f}"


def latency_rows(facts: Facts) -> Iterator[tuple[str, ...]]:
    found = facts.get("latency")
    if found is None:
        return
    (was, *was_within), (now, *now_within) = found["before"], found["after"]
    ratio, low, high = found["ratio"]
    yield (
        "latency, ONNX Runtime", milliseconds(was), milliseconds(now),
        f"before / after {ratio:.2f}, 95 % interval {low:.2f} to {high:.2f}",
    )  # fmt: skip
    within = (f"{milliseconds(low)[:-3]} - {milliseconds(high)}" for low, high in (was_within, now_within))
    yield "  95 % interval", *within, "medians of interleaved rounds"


def layers(facts: Facts) -> Table:
    """One row a layer, one column a step that did something to layers."""
    columns = [
        (number, step)
        for number, step in enumerate(facts["steps"], 1)
        if any(event["did"] != "bits" for event in step["sites"].values())
    ]
    table = grid("layer", *(f"{number} {step['step']}" for number, step in columns), ">bits", ">bound")
    for name, site in list(facts["sites"].items())[:ROWS]:
        cells = [cell(step["sites"].get(name), step) for _, step in columns]
        count = max(site["weights"], 1)
        table.add_row(name, *cells, f"{site['stored'] / count:.2f}", f"{site['bound'] / count:.2f}")
    return table


def cell(event: Facts | None, step: Facts) -> str:
    """What a step did to a layer: done or skipped, and why or how much."""
    if event is None or event["did"] == "bits":
        return "-"
    if "text" in event:
        return f"{event['did']}: {event['text']}"
    trained = any(note["kind"] == "trained" for note in step["notes"])
    return "done: trained" if trained else f"done: {event['how']}"


def steps(facts: Facts) -> Iterator[str]:
    """One line a step: what it says of the whole model, and its time."""
    for number, step in enumerate(facts["steps"], 1):
        did = [event["did"] for event in step["sites"].values() if event["did"] != "bits"]
        counts = [f"{did.count(word)} {word}" for word in dict.fromkeys(did)]
        said = [note["text"] for note in step["notes"]]
        time = [seconds(step["seconds"])] if "seconds" in step else []
        yield f"{number} {step['step']}: {'; '.join([*counts, *said, *time])}"

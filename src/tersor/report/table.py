"""Table: the facts of a run for a terminal: before and after, then what each step did to each layer.

               before   after                     layer         1 prune      2 cluster   3 entropy   bits
accuracy, %     98.62   98.49   drop 0.13 ...     conv1.weight  29.9% kept   16 values   144 bytes   1.29
file, bytes   394,104  14,902   26.4 x ...        fc.bias       trained      -           skipped    32.00
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from tersor.errors import few
from tersor.measure.accuracy import SIGNIFICANT
from tersor.report.console import p_value, ranged, seconds, whole
from tersor.report.file_sizes import SHOWN
from tersor.report.largest import folded, largest, summed, words
from tersor.report.largest import ranged as numbers
from tersor.runtimes import RUNTIMES

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

Facts = Mapping[str, Any]
SLIGHT = 0.05  # relative change of latency that counts as none

# A step's fact about a site, short enough for a narrow column, by the name of the fact.
BRIEF: dict[str, Callable[[Any, Facts], str]] = {
    "kept": lambda kept, site: f"{kept / max(site['weights'], 1):.1%} kept",
    "entries": lambda entries, site: f"{entries} values",
    "decibels": lambda decibels, site: f"{decibels:.1f} dB",
    "rank": lambda rank, site: f"rank {rank}",
    "after": lambda after, site: f"{whole(after)} bytes",
    "shape": lambda shape, site: "x".join(map(str, shape)),
}


def report(facts: Facts, every: bool = False) -> Iterator[RenderableType]:
    """The whole output of `run`; `every`: with a row for every layer."""
    rows = largest(facts["sites"], every)
    yield headline(facts)
    yield layers(facts, rows.shown)
    yield from folded(rows, facts["sites"], "layer")
    yield from steps(facts)
    if "export" in facts:
        yield f"exported: {facts['export']['text']}"
    if "out" in facts:
        exported = "".join(f", {name}" for name in facts.get("exported", ()))
        yield f"written to {facts['out']}: model.tersor{exported}, recipe.lock.yaml, report.json"


def grid(*columns: str) -> Table:
    """A table in the house style: no frame, a line under the head. A column named ">..." is right-aligned.
    Others have names and words, which are folded on a narrow terminal, never cut off."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    for column in columns:
        right = column.startswith(">")
        table.add_column(
            column.removeprefix(">"), justify="right" if right else "left", no_wrap=right, overflow="fold"
        )
    return table


def headline(facts: Facts) -> Table:
    """Before and after, one quantity a row, with its meaning in the last column."""
    table = grid("", ">before", ">after", "")
    for row in (*accuracy_rows(facts), *file_rows(facts), *bit_rows(facts), *latency_rows(facts)):
        table.add_row(*row)
    return table


def accuracy_rows(facts: Facts) -> Iterator[tuple[str, ...]]:
    found = facts.get("accuracy")
    if found is None:
        return
    metric, percent = found.get("metric", "accuracy"), found.get("unit", "points") == "points"
    # A metric that is not a share has its own unit.
    label, times, digits, unit = (f"{metric}, %", 100, 2, " points") if percent else (metric, 1, 4, "")
    label += ", lower is better" if found.get("better") == "lower" else ""
    (was, *was_within), (now, *now_within) = (scaled(found[key], times) for key in ("before", "after"))
    fall, *within = found["drop"]
    fell = f"drop {fall:.{digits}f}{unit} (95 %: {ranged(within, digits, 'to')})"
    yield label, f"{was:.{digits}f}", f"{now:.{digits}f}", fell
    verdict = "significant" if found["p"] < SIGNIFICANT else "not significant"
    test = f"{verdict}: {p_value(found['p'])}, paired, n = {whole(found['n'])}"
    yield "  95 % interval", ranged(was_within, digits), ranged(now_within, digits), test


def scaled(values: Iterable[float | None], times: float) -> list[Any]:
    return [None if value is None else times * value for value in values]


def file_rows(facts: Facts) -> Iterator[tuple[str, ...]]:
    files = facts.get("files", {})
    if "given" in files and "result" in files:
        before, after = files["given"]["nbytes"], files["result"]["nbytes"]
        yield "file, bytes", whole(before), whole(after), f"{before / after:.1f} x smaller, all included"


def bit_rows(facts: Facts) -> Iterator[tuple[str, ...]]:
    bits = facts["bits"]
    given, stored, bound = (bits[key] / max(bits["weights"], 1) for key in ("given", "stored", "bound"))
    yield "bits a weight", f"{given:.3f}", f"{stored:.3f}", f"entropy bound {bound:.3f} (order 0)"


def latency_rows(facts: Facts) -> Iterator[tuple[str, ...]]:
    found = facts.get("latency")
    if found is None:
        return
    (was, *was_within), (now, *now_within) = found["before"], found["after"]
    ratio, low, high = found["ratio"]
    digits = 4 if max(was, now) < 1 else 3
    speed = f"{ratio:.2f} x as fast (95 %: {ranged((low, high), 2, 'to')})"
    name = found.get("runtime", "onnxruntime")  # notes of earlier versions do not name it
    title = RUNTIMES[name].title if name in RUNTIMES else name
    yield f"{title}, ms", f"{was:.{digits}f}", f"{now:.{digits}f}", speed
    means = "not known: too noisy" if found.get("noisy") else verdict(low, high)
    yield "  95 % interval", ranged(was_within, digits), ranged(now_within, digits), means


def verdict(low: float, high: float) -> str:
    """A speed-up's interval in words. The place of a file in memory alone changes times by about 1 %."""
    if low > 1 + SLIGHT or high < 1 - SLIGHT:
        return "faster" if low > 1 else "slower"
    if low > 1 - SLIGHT and high < 1 + SLIGHT:
        return f"the same within {SLIGHT:.0%}"
    return "no clear difference"


def layers(facts: Facts, names: Iterable[str]) -> Table:
    """One row for each of these layers, one column for each step that worked on layers; "-" if the step left
    a layer out."""
    columns = [(number, step) for number, step in enumerate(facts["steps"], 1) if actions(step)]
    table = grid("layer", *(f"{number} {step['step']}" for number, step in columns), ">bits", ">bound")
    for name in names:
        site = facts["sites"][name]
        cells = [cell(step, name, site) for _, step in columns]
        count = max(site["weights"], 1)
        table.add_row(name, *cells, f"{site['stored'] / count:.2f}", f"{site['bound'] / count:.2f}")
    return table


def actions(step: Facts) -> dict[str, Facts]:
    """What a step did, by site. Measurements are left out."""
    return {name: event for name, event in step["sites"].items() if event["did"] != "bits"}


def cell(step: Facts, name: str, site: Facts) -> str:
    """What a step did to a layer in a word or two."""
    event = actions(step).get(name)
    if event is None:
        return "-"
    if event["did"] != "done":
        return str(event["did"])
    data = event.get("data", {})
    for key, brief in BRIEF.items():
        if key in data:
            return brief(data[key], site)
    trained = any(note["kind"] == "trained" for note in step["notes"])
    return event.get("text") or ("trained" if trained else event["how"])


def steps(facts: Facts) -> Iterator[str]:
    """A line for each step: counts, notes on the whole model, its time; then the sites that it left out."""
    for number, step in enumerate(facts["steps"], 1):
        did = [event["did"] for event in actions(step).values()]
        counts = ", ".join(f"{did.count(word)} {word}" for word in dict.fromkeys(did))
        texts = [counts, *summed(note["text"] for note in step["notes"])]
        texts += [seconds(step["seconds"])] if "seconds" in step else []
        yield f"{number} {step['step']}: {'; '.join(filter(None, texts))}"
        reasons: dict[str, dict[str, str]] = {}
        for name, event in actions(step).items():
            if event["did"] != "done":
                why = f"{event['did']}: {event.get('text', '')}"
                reasons.setdefault(words(why), {})[name] = why
            if "masked" in event:
                why = f"masked: {event['masked']}"
                reasons.setdefault(words(why), {})[name] = why
        yield from (f"    {few(said, SHOWN)} {numbers(list(said.values()))}" for said in reasons.values())

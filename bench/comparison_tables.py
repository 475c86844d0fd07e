"""Comparison tables: (a) to (g) of docs/tables.md, as text, from the rows of bench/comparisons.jsonl.

A cell is a function of a trial and its row. A trial without a row says "not measured", one that Tersor
refused says why. Two tables are derived: the fewest weights at equal accuracy (b), the least drop at equal
bytes (d).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from statistics import mean
from typing import Any

from comparison_rows import SEEDS, STUDENTS, TABLES, Trial
from page import table
from rows_file import Row

from tersor.maths.statistics import paired

Rows = Mapping[tuple[str, str, int], Row]  # by net, recipe, seed
Cell = Callable[[Row], str]
NEAR = 1.05  # times as many bytes count as equal, in favor of what is not linear
EQUAL = 1.0  # points of drop that the interval's upper end may have, for "equal accuracy"
LINEAR = "linear"  # a group of (d)
ORT = "onnxruntime"
NAMES = {ORT: "ONNX Runtime", "openvino": "OpenVINO"}
NONE = "not measured"


def share(now: float, was: float) -> str:
    return f"{now:,.0f} ({100 * now / was:.1f} %)"


def interval(values: Iterable[float], digits: int = 2) -> str:
    middle, low, high = values
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def accuracy(row: Row) -> str:
    return interval([100 * value for value in row["accuracy"]["after"]])


def drop(row: Row) -> str:
    return interval(row["accuracy"]["drop"])


def weights(row: Row) -> str:
    was, now = row["weights"]
    return share(now, was)


def macs(row: Row) -> str:
    was, now = row["macs"]
    return f"{100 * now / was:.1f} %"


def stored(word: str) -> Cell:
    return lambda row: share(row["bytes"][word], row["bytes"]["given"])


def seconds(row: Row) -> str:
    return f"{row['seconds']:.0f}"


def speed(name: str) -> Cell:
    """Times as fast as the given network, in turns."""

    def cell(row: Row) -> str:
        if name not in row.get("runtimes", {}):
            return NONE
        found = row["runtimes"][name]
        return interval(found["ratio"]) + (", noisy" if found["noisy"] else "")

    return cell


def milliseconds(name: str) -> Cell:
    return lambda row: beside(row, name, lambda found: (found["before"], found["after"]), 3)


def memory(row: Row) -> str:
    return beside(row, ORT, lambda found: alone(found, "megabytes"), 1)


def processor_seconds(row: Row) -> str:
    return beside(row, ORT, lambda found: alone(found, "seconds"), 3)


def alone(found: Row, word: str) -> tuple[Any, Any]:
    return found["before alone"][word], found["after alone"][word]


def beside(row: Row, name: str, of: Callable[[Row], tuple[Any, Any]], digits: int) -> str:
    """The given network's number and that of the row's, with their intervals if they have any."""
    if name not in row.get("runtimes", {}):
        return NONE
    both = of(row["runtimes"][name])
    if None in both:
        return NONE
    return ", ".join(
        interval(each, digits) if isinstance(each, list) else f"{each:.{digits}f}" for each in both
    )


COST: dict[str, Cell] = {"`.tersor`, bytes": stored("coded"), "training, s": seconds}
QUALITY: dict[str, Cell] = {"accuracy, %": accuracy, "drop, points (95 %)": drop}
SPEED: dict[str, Cell] = {f"{title}, times as fast": speed(name) for name, title in NAMES.items()}
COLUMNS: dict[str, dict[str, Cell]] = {
    "a": QUALITY | {"bytes before coding": stored("plain")} | COST,
    "b": QUALITY | {"weights left": weights, "MACs left": macs} | SPEED | COST,
    "c": QUALITY | COST,
    "d": QUALITY | COST,
    "f": QUALITY | {"weights left": weights, "MACs left": macs} | COST,
    "g": QUALITY | {"weights left": weights, "MACs left": macs} | SPEED | COST,
}
RUNNING = {f"{title}, ms": milliseconds(name) for name, title in NAMES.items()} | SPEED | {
    "memory, MB": memory, "processor s of 1,000 calls": processor_seconds,
    "energy": lambda row: row.get("energy", NONE),
}  # fmt: skip
ARMS = {"alone": "finetune", "taught": "distill"}
STUDENT = (
    "student", "weights", "alone, %", "taught, %", "gain, points (95 %)", "by seed",
    *(f"{arm}: training, s" for arm in ARMS),
)  # fmt: skip
FIRST = {"a": "alone", "b": "what goes", "c": "bits", "d": "levels", "f": "criterion", "g": "product"}


def listed(trials: Iterable[Trial], rows: Rows, columns: Mapping[str, Cell], first: str) -> str:
    """A table of these trials with their recipes, one for each group."""
    parts = []
    for group, members in groupby(trials, lambda trial: trial.group):
        lines = [line(trial, rows.get(trial.key), columns) for trial in members]
        parts.append((f"**{group}**\n\n" if group else "") + table((first, *columns, "recipe"), lines))
    return "\n".join(parts)


def line(trial: Trial, row: Row | None, columns: Mapping[str, Cell]) -> tuple[str, ...]:
    label = trial.label + (" (quick)" if row and row["quick"] else "")
    recipe = f"`{trial.words}`" if trial.words else ""
    reason = trial.why or ("not measured" if row is None else row.get("refused", ""))
    if row is None or reason:
        return (label, reason, *[""] * (len(columns) - 1), recipe)
    return (label, *(cell(row) for cell in columns.values()), recipe)


def measured(trials: Iterable[Trial], rows: Rows) -> list[tuple[Trial, Row]]:
    """The trials that have figures, of a whole training."""
    found = ((trial, rows[trial.key]) for trial in trials if trial.key in rows)
    return [(trial, row) for trial, row in found if "refused" not in row and not row["quick"]]


def equal_accuracy(rows: Rows) -> str:
    """For each kind the fewest weights whose drop is at most EQUAL, by the interval's upper end."""
    tuned = [pair for pair in measured(TABLES["b"], rows) if pair[0].net == "lenet5"]
    kinds: dict[str, list[tuple[Trial, Row]]] = {}
    for trial, row in tuned:
        kinds.setdefault(trial.label.partition(",")[0], []).append((trial, row))
    lines = []
    for kind, found in kinds.items():
        within = [row for _, row in found if row["accuracy"]["drop"][2] <= EQUAL]
        if not within:
            lines.append((kind, f"none of {len(found)} is within", "", ""))
            continue
        best = min(within, key=lambda row: row["weights"][1])
        lines.append((kind, weights(best), drop(best), stored("coded")(best)))
    return table(("what goes", "fewest weights left", "drop, points (95 %)", "`.tersor`, bytes"), lines)


def at_equal_bytes(rows: Rows) -> Iterator[tuple[Trial, Row, dict[str, tuple[Trial, Row]]]]:
    """Each file with linear levels, and by kind the file of least drop in as many bytes, by NEAR."""
    found = measured(TABLES["d"], rows)
    for trial, row in found:
        if trial.group != LINEAR:
            continue
        fits: dict[str, list[tuple[Trial, Row]]] = {}
        for other, its in found:
            if other.group != LINEAR and its["bytes"]["coded"] <= NEAR * row["bytes"]["coded"]:
                fits.setdefault(other.group, []).append((other, its))
        yield trial, row, {kind: min(some, key=least) for kind, some in fits.items()}


def least(one: tuple[Trial, Row]) -> float:
    return float(one[1]["accuracy"]["drop"][0])


def equal_bytes(rows: Rows) -> str:
    """For the bytes of each file with linear levels: the least drop of each other kind in as many."""
    kinds = [kind for kind in dict.fromkeys(trial.group for trial in TABLES["d"]) if kind != LINEAR]
    lines = []
    for trial, row, best in at_equal_bytes(rows):
        cells = [f"{row['bytes']['coded']:,}", f"{drop(row)}; {trial.label}"]
        for kind in kinds:
            if (one := best.get(kind)) is None:
                cells.append("none fits")
            else:
                cells.append(f"{drop(one[1])}; {one[0].label}, {one[1]['bytes']['coded']:,} bytes")
        lines.append(tuple(cells))
    return table(("bytes", LINEAR, *kinds), lines)


def gains(rows: Rows) -> dict[str, tuple[list[float], list[float]]]:
    """By student: percent alone and taught, of the seeds that have both."""
    found = {}
    for net in STUDENTS:
        arms = {
            (trial.label.partition(",")[0], trial.seed): 100 * row["accuracy"]["after"][0]
            for trial, row in measured(TABLES["e"], rows)
            if trial.net == net
        }
        both = [seed for seed in SEEDS if ("alone", seed) in arms and ("taught", seed) in arms]
        if both:
            found[net] = tuple([arms[arm, seed] for seed in both] for arm in ARMS)
    return found


def students(rows: Rows) -> str:
    """(e): the gain by the teacher, paired by seed."""
    lines = []
    for net, (apart, taught) in gains(rows).items():
        some = [row for trial, row in measured(TABLES["e"], rows) if trial.net == net]
        gain, low, high, _ = paired(apart, taught)
        took = (mean(row["seconds"] for row in some if word in row["recipe"]) for word in ARMS.values())
        lines.append((
            net, weights(some[0]), f"{mean(apart):.2f}", f"{mean(taught):.2f}",
            "one seed, no interval" if len(apart) == 1 else f"{gain:+.2f} ({low:+.2f} to {high:+.2f})",
            ", ".join(f"{b - a:+.2f}" for a, b in zip(apart, taught, strict=True)),
            *(f"{each:.0f}" for each in took),
        ))  # fmt: skip
    words = dict.fromkeys(trial.words for trial in TABLES["e"])
    return table(STUDENT, lines) + "\n" + "".join(f"* `{recipe}`\n" for recipe in words)


def before(rows: Rows) -> tuple[str, ...]:
    """The line of the given network in (a)."""
    found = [row for trial, row in measured(TABLES["a"], rows) if trial.net == "lenet5"]
    if not found:
        return ("nothing", NONE, *[""] * (len(COLUMNS["a"]) - 1), "")
    row = found[0]
    nbytes = f"{row['bytes']['given']:,}"
    took = row.get("trained") or {}
    training = f"{took['seconds']:.0f}, {took['epochs']} epochs, as its file says" if took else NONE
    whole = interval([100 * value for value in row["accuracy"]["before"]])
    return ("nothing", whole, "", nbytes, nbytes, training, "safetensors, as given")
